""".ci/run against programs that stand in for Pythons: which it takes, what it runs, how it ends."""

import os
import shutil
import subprocess

import pytest

from tests.conftest import ROOT

# Answers for the Python of its name's version, unless that is broken; makes environments that hold
# itself; writes what else it is asked for to $FAKE/calls, and fails where $FAKE/fail says so.
PYTHON = """#!/usr/bin/env bash
name=${0##*/}
case $1 in
  -) [[ -e $FAKE/$name ]] || exit 127; echo "$(cat "$FAKE/$name") $0" ;;
  -c) ;;
  -m)
    echo "$0 ${*:2}" >> "$FAKE/calls"
    if [[ $2 == venv ]]; then
      mkdir -p "$3/bin"; for program in python ruff mypy; do cp "$0" "$3/bin/$program"; done
    elif [[ $2 == pytest ]]; then
      echo "1 passed"
    fi
    ! grep -qsxF -- "${*:2}" "$FAKE/fail" ;;
  *) echo "$0 $*" >> "$FAKE/calls" ;;
esac
"""
NAMES = ("python3.14", "python3.13", "python3.12", "python3.11", "python3", "chromium")
DEFAULT, SLOW = "pytest --dist loadfile -n 2", "pytest --dist loadfile -n 3 -m slow"
TOOLKITS = (
    f"{DEFAULT} tests/test_integrations.py tests/test_hub.py tests/test_mcp.py "
    "tests/test_records_from_python.py"
)
WITH_TOOLKITS = (
    "pip install --quiet -e .[test,pyterrier,langchain,llamaindex,haystack,pretrained,mcp]"
)
TORCH = f"{DEFAULT} tests/test_integrations.py tests/test_interop.py tests/test_encoders.py"
WITH_TORCH = "pip install --quiet -e .[test,mteb,beir,encoders,interop]"
LOCAL_TORCH = "pip install --quiet --no-index --no-deps torch"


@pytest.fixture
def run(tmp_path):
    """run(here, fail=()) -> the finished process and its calls; here: program -> "minor micro" of
    the Pythons that are there, of `pyenv` those in its own folder."""

    def start(here, fail=()):
        (tmp_path / ".ci").mkdir()
        shutil.copy(ROOT / ".ci" / "run", tmp_path / ".ci")
        for place, names in {"bin": NAMES, "pyenv/versions/3.x/bin": ("python",)}.items():
            (tmp_path / place).mkdir(parents=True)
            for name in names:
                (tmp_path / place / name).write_text(PYTHON)
                (tmp_path / place / name).chmod(0o755)
        for name, version in here.items():
            (tmp_path / name).write_text(version)
        (tmp_path / "fail").write_text("".join(f"{line}\n" for line in fail))
        settings = {
            "PATH": f"{tmp_path / 'bin'}:/usr/bin:/bin",
            "FAKE": str(tmp_path),
            "PYENV_ROOT": str(tmp_path / "pyenv"),
            "DGR_JAX_CI_VENV": str(tmp_path / "venv"),
        }
        done = subprocess.run(
            ["bash", str(tmp_path / ".ci" / "run")],
            env=os.environ | settings, cwd="/", capture_output=True, text=True, timeout=60,
        )  # fmt: skip
        calls = tmp_path / "calls"
        text = calls.read_text().replace(f"{tmp_path}/", "") if calls.exists() else ""
        return done, text.splitlines()

    return start


def test_the_newest_and_the_oldest(run):
    done, calls = run({"python3.13": "13 0", "python3.12": "12 1", "python": "11 7"})
    assert done.returncode == 0, done.stderr
    assert [call for call in calls if " venv " in call] == [
        "bin/python3.13 venv venv-newest",
        "bin/python3.13 venv venv-toolkits",
        "pyenv/versions/3.x/bin/python venv venv-torch",
        "pyenv/versions/3.x/bin/python venv venv-oldest",
    ]
    installs = [call for call in calls if "-e" in call]
    assert installs == [
        "venv-newest/bin/python pip install --quiet -e .[test,docs,release,grain]",
        f"venv-toolkits/bin/python {WITH_TOOLKITS}",
        f"venv-torch/bin/python {WITH_TORCH}",
        "venv-oldest/bin/python pip install --quiet -e .[test] --constraint .ci/oldest.txt",
    ]
    assert [call for call in calls if "pytest" in call] == [
        f"venv-newest/bin/python {DEFAULT}",
        f"venv-toolkits/bin/python {TOOLKITS}",
        f"venv-torch/bin/python {TORCH}",
        f"venv-oldest/bin/python {DEFAULT}",
        f"venv-newest/bin/python {SLOW}",
    ]
    assert [call for call in calls if "ruff" in call or "mypy" in call] == [
        "venv-newest/bin/ruff format --check .",
        "venv-newest/bin/ruff check .",
        "venv-newest/bin/mypy dgr_jax",
    ]
    assert done.stdout.count("1 passed") == 5


def test_one_python_is_enough(run):
    done, calls = run({"python3": "11 2"})
    assert done.returncode == 0, done.stderr
    assert [call for call in calls if " venv " in call] == [
        "bin/python3 venv venv-newest",
        "bin/python3 venv venv-toolkits",
        "bin/python3 venv venv-torch",
        "bin/python3 venv venv-oldest",
    ]


def test_the_oldest_packages_are_not_built_for_newer_pythons(run):
    done, calls = run({"python3.14": "14 1", "python3.13": "13 9"})
    assert done.returncode == 0
    assert [call for call in calls if " venv " in call] == [
        "bin/python3.14 venv venv-newest",
        "bin/python3.14 venv venv-toolkits",
        "bin/python3.13 venv venv-torch",
    ]
    assert "oldest: not tested" in done.stderr


@pytest.mark.parametrize("failing", [DEFAULT, TOOLKITS, TORCH, SLOW])
def test_a_failure_is_remembered_and_the_rest_is_run(run, failing):
    done, calls = run({"python3.11": "11 7"}, fail=[failing])
    assert done.returncode == 1
    assert len([call for call in calls if "pytest" in call]) == 5


def test_toolkits_that_cannot_be_installed_are_not_tested_and_nothing_fails(run):
    done, calls = run({"python3.13": "13 0"}, fail=[WITH_TOOLKITS, WITH_TORCH])
    assert done.returncode == 0
    assert "toolkits: not tested, their packages cannot be installed" in done.stderr
    assert "torch: not tested, its packages cannot be installed" in done.stderr
    assert [call for call in calls if "pytest" in call] == [
        f"venv-newest/bin/python {DEFAULT}",
        f"venv-newest/bin/python {SLOW}",
    ]


@pytest.mark.parametrize("fail", [(), (LOCAL_TORCH,)])
def test_a_torch_that_lies_there_is_taken_first(run, fail):
    done, calls = run({"python3.13": "13 0"}, fail=fail)
    assert done.returncode == 0
    at = calls.index(f"venv-torch/bin/python {LOCAL_TORCH}")
    assert calls[at + 1] == f"venv-torch/bin/python {WITH_TORCH}"


def test_a_project_that_cannot_be_installed_ends_it(run):
    newest = "pip install --quiet -e .[test,docs,release,grain]"
    done, calls = run({"python3.13": "13 0"}, fail=[newest])
    assert done.returncode == 1
    assert calls[-1] == f"venv-newest/bin/python {newest}"


def test_no_python(run):
    done, calls = run({})
    assert (done.returncode, calls) == (1, [])
    assert done.stderr == "no Python 3.11 to 3.14 with venv and pip is here\n"


@pytest.mark.skipif(not shutil.which("shellcheck"), reason="shellcheck is not installed")
def test_it_is_clean():
    done = subprocess.run(["shellcheck", str(ROOT / ".ci" / "run")], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
