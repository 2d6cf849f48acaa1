"""A MODEL_DIR of version 0.1, before modules and names moved, goes on: no stage runs again."""

import tarfile
from pathlib import Path

import pytest

KEPT = Path(__file__).parent / "model_dirs" / "docid_0.1.tar.xz"

STAGES = ("prepare", "generate", "candidates", "teach", "distill", "control", "evaluate")


@pytest.mark.slow
def test_no_stage_of_version_0_1_runs_again(tmp_path, command):
    with tarfile.open(KEPT) as archive:
        archive.extractall(tmp_path, filter="data")
    folder = tmp_path / "model"
    before = (folder / "evaluate" / "metrics.json").read_bytes()
    done = command("dgr_jax.train", f"--model_dir={folder}")
    for stage in STAGES:
        assert f"{stage}: done already, from the same configuration; skipped" in done.stderr
    assert (folder / "evaluate" / "metrics.json").read_bytes() == before
    found = command(
        "dgr_jax.retrieve", f"--model_dir={folder}", "--query=Why do bees dance?", "--k=5"
    )
    assert found.stdout.count("\n") > 3
