"""The script that measures an accelerator, at toy size."""

import json
import subprocess
import sys

import pytest

from tests.conftest import ROOT


def measured(tmp_path, *flags):
    report = tmp_path / "report.json"
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu", "--toy", f"--output={report}", *flags],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=580,
    )
    return done, json.loads(report.read_text()) if report.is_file() else None


@pytest.mark.slow
def test_every_part_comes_to_its_end(tmp_path):
    done, report = measured(tmp_path, "--parts=step,queries,plan", "--minutes=9")
    assert done.returncode == 0, done.stderr
    assert "toy sizes" in done.stdout and "queries/s" in done.stdout
    assert all(part["report"] for part in report.values())
    assert [line["batch"] for line in report["plan"]["report"]["lines"]] == [1, 4]


def test_what_has_no_time_is_said(tmp_path):
    done, report = measured(tmp_path, "--minutes=0")
    assert done.returncode == 1
    assert {part["report"] for part in report.values()} == {"not started: --minutes are over"}
    assert list(report) == ["step", "queries", "plan", "generate", "distill"]
    done, report = measured(tmp_path / "none", "--parts=step,tables")
    assert done.returncode == 2
    assert "unknown parts ['tables']; expected some of ['step'," in done.stderr
