"""A command that does not outlive the process that started it, even when that is killed."""

from __future__ import annotations

import signal
import subprocess
import sys
import time

import pytest

from dgr_jax.studies import dependent

CHILD = "import os, time; print(os.getpid(), flush=True); time.sleep(60)"
WATCHING = (
    "import os, sys; from dgr_jax.studies import dependent;"
    "sys.exit(dependent.watch(os.getppid(), sys.argv[1:]))"
)
PARENT = (
    "import subprocess, sys; from dgr_jax.studies import dependent;"
    f"command = [sys.executable, '-c', {CHILD!r}];"
    "subprocess.Popen(HOW).wait()"
)
KERNEL = "dependent.command(command)"
WATCHED = f"[sys.executable, '-c', {WATCHING!r}, *command]"


def is_running(process: int) -> bool:
    try:
        with open(f"/proc/{process}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.skipif(sys.platform != "linux", reason="/proc tells what runs")
@pytest.mark.parametrize("how", [KERNEL, WATCHED], ids=["kernel", "watched"])
def test_a_killed_process_takes_its_command_with_it(how):
    code = PARENT.replace("HOW", how)
    with subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, text=True
    ) as parent:
        child = int(parent.stdout.readline())
        assert is_running(child)
        parent.kill()
        end = time.monotonic() + 20
        while is_running(child) and time.monotonic() < end:
            time.sleep(0.05)
        assert not is_running(child)


@pytest.mark.skipif(sys.platform != "linux", reason="other systems watch the parent")
def test_nothing_starts_when_the_parent_has_ended_already(tmp_path):
    ran = tmp_path / "ran"
    command = [sys.executable, "-m", "dgr_jax.studies.dependent", "999999999", "touch", str(ran)]
    assert subprocess.run(command).returncode == 1 and not ran.exists()


def test_status_output_and_signals_are_those_of_the_command():
    code = "import sys; print('said'); sys.exit(7)"
    for command in (
        dependent.command([sys.executable, "-c", code]),
        [sys.executable, "-c", WATCHING, sys.executable, "-c", code],
    ):
        done = subprocess.run(command, capture_output=True, text=True)
        assert (done.returncode, done.stdout) == (7, "said\n")
    for command in (
        dependent.command([sys.executable, "-c", CHILD]),
        [sys.executable, "-c", WATCHING, sys.executable, "-c", CHILD],
    ):
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as running:
            running.stdout.readline()
            running.terminate()
            assert running.wait(20) in (-signal.SIGTERM, 256 - signal.SIGTERM)
