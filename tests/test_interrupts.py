"""Ctrl-C ends a command where nothing is lost, with exit status 130, wherever Python is."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dgr_jax import interrupts, processes
from dgr_jax.checkpoints import Checkpoints
from dgr_jax.studies import runner as studies
from tests import test_loop
from tests.conftest import ROOT

PROGRAM = """
import os, signal, sys, time
from dgr_jax import interrupts, processes
from dgr_jax.config import cli

def press():
    os.kill(os.getpid(), signal.SIGINT)

def wait(seconds=20):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        time.sleep(0.01)

def command(_):
{body}
    print("came to its end")

cli.main(command)
"""


def run(body: str, **how) -> subprocess.CompletedProcess:
    indented = "\n".join(f"    {line}" for line in body.strip().splitlines())
    return subprocess.run(
        [sys.executable, "-c", PROGRAM.format(body=indented)],
        cwd=ROOT, capture_output=True, text=True, timeout=60, **how,
    )  # fmt: skip


GOES_ON = "candidates: interrupted; the same command goes on with it\n"
PLACES = {
    "in a loop": "press(); wait()",
    "in a destructor": """
class Held:
    def __del__(self):
        press()
        wait()
Held()
wait()
""",
    "in a callback of the garbage collector": """
import gc
gc.callbacks.append(lambda phase, info: (press(), wait(1)))
gc.collect()
wait()
""",
    "where all exceptions are caught": """
for _ in range(3):
    try:
        press()
        wait()
    except BaseException:
        pass
""",
    "while a library waits": """
import threading
threading.Timer(0.5, press).start()
threading.Event().wait(20)
""",
    "while stderr is elsewhere": """
from dgr_jax.data import loading
os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
with loading.quietly():
    press()
    wait()
""",
}


@pytest.mark.parametrize("place", PLACES)
def test_a_command_ends_and_says_how_to_go_on(place):
    done = run("interrupts.goes_on('candidates')\n" + PLACES[place].strip())
    assert (done.returncode, done.stdout, done.stderr) == (130, "", GOES_ON)


def test_a_command_with_nothing_to_go_on_ends_quietly():
    done = run("press(); wait()")
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "")


LOOP = """
with processes.Stop("generate") as stop:
    for step in range(1, 100):
        if step == 3:
            press()
            time.sleep(0.02)
            {twice}
        if stop.requested(step):
            print("saved", step)
            sys.exit(stop.status)
"""


def test_a_loop_saves_first():
    done = run(LOOP.format(twice=""))
    assert done.returncode == 130 and done.stdout == "saved 3\n"
    assert done.stderr == (
        "interrupted: generate is saved after this step; Ctrl-C again ends at once\n"
    )


def test_two_signals_at_once_are_one_press():
    """Two signals, as when a terminal and a parent process both send one, count as one Ctrl-C."""
    done = run(LOOP.format(twice="press()"))
    assert done.returncode == 130 and done.stdout == "saved 3\n"


def test_a_second_press_does_not_wait():
    again = f"time.sleep({interrupts.ONE_PRESS + 0.1}); press(); wait()"
    done = run(LOOP.format(twice=again))
    assert done.returncode == 130 and done.stdout == ""


def test_a_press_in_the_last_moment_of_a_loop_is_not_lost():
    last = "with processes.Stop('generate') as stop:\n    stop.requested(1)\n    press()\n"
    done = run(f"{last}    time.sleep(0.1)\nwait()")
    assert done.returncode == 130 and "came to its end" not in done.stdout


def test_early(tmp_path):
    """Ctrl-C while a command is still being imported."""
    slow = "import os, signal\nos.kill(os.getpid(), signal.SIGINT)\nfor i in range(10**9): pass\n"
    (tmp_path / "difflib.py").write_text(slow)  # that cli imports
    done = subprocess.run(
        [sys.executable, "-m", "dgr_jax.train", "--help"], cwd=ROOT, capture_output=True,
        env=os.environ | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}, text=True, timeout=60,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (130, "")
    assert done.stderr == "interrupted: nothing was begun\n"


def test_the_first_step_is_not_waited_for():
    done = run("interrupts.goes_on('generate')\nwith processes.Stop():\n    press()\n    wait()")
    assert done.returncode == 130
    assert done.stderr == "generate: interrupted; the same command goes on with it\n"


def test_ignored_as_the_shell_has_asked():
    ignore = lambda: signal.signal(signal.SIGINT, signal.SIG_IGN)
    done = run("press(); wait(0.2)\n" + LOOP.format(twice="").strip(), preexec_fn=ignore)
    assert done.returncode == 0 and done.stdout == "came to its end\n"


def test_without_a_command_handlers_are_put_back():
    before = signal.getsignal(signal.SIGINT)
    with interrupts.heard():
        assert signal.getsignal(signal.SIGINT) != before
    assert signal.getsignal(signal.SIGINT) == before
    with pytest.raises(SystemExit, match="130"), processes.Stop("generate") as stop:
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.requested(1)
    assert signal.getsignal(signal.SIGINT) == before
    with pytest.raises(KeyboardInterrupt), processes.Stop("generate"):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)


def test_sigterm_in_the_last_step_is_not_lost(caplog):
    with pytest.raises(SystemExit, match="75"), processes.Stop("generate"):
        os.kill(os.getpid(), signal.SIGTERM)
    assert caplog.messages == ["generate: stopped at its end; the same command goes on"]


@pytest.mark.slow
def test_a_study_hands_ctrl_c_on_to_its_experiment(tmp_path):
    child = "import signal, sys, time\nsignal.signal(signal.SIGINT, lambda *_: sys.exit(130))\n"
    child += "print('ready', flush=True)\ntime.sleep(30)\n"
    code = (
        "import sys\nfrom dgr_jax.config import cli\n"
        "from dgr_jax.studies import runner as studies\n"
        "def command(_):\n"
        f"    with open({str(tmp_path / 'log')!r}, 'w') as log:\n"
        f"        sys.exit(studies._status([sys.executable, '-c', {child!r}], log, {{}}))\n"
        "cli.main(command)\n"
    )
    study = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stderr=subprocess.PIPE)
    wait_for(tmp_path / "log", "ready")
    study.send_signal(signal.SIGINT)
    assert study.wait(20) == 130 == interrupts.EXIT_INTERRUPTED
    assert studies.interrupts is interrupts
    assert b"waits for the experiment" in study.communicate()[1]


def wait_for(file: Path, text: str) -> None:
    deadline = time.monotonic() + 60
    while not (file.is_file() and text in file.read_text()):
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_who_reads_no_more_is_told_no_more():
    """A pipe that is closed early, as by `| head -1`: no traceback, and the status of SIGPIPE."""
    code = "import sys\nfrom dgr_jax.config import cli\n"
    code += (
        "def command(_):\n    for i in range(100_000):\n        print('line', i)\ncli.main(command)"
    )
    for flags in ([], ["-u"]):
        program = subprocess.Popen(
            [sys.executable, *flags, "-c", code], cwd=ROOT, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip
        assert program.stdout.readline() == "line 0\n"
        program.stdout.close()
        assert program.stderr.read() == ""
        assert program.wait() == 141


def test_help_into_a_closed_pipe():
    command = f"{sys.executable} -m dgr_jax.train --help | true; exit ${{PIPESTATUS[0]}}"
    for _ in range(3):  # whoever is faster
        done = subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode in (0, 141) and done.stderr == ""


def test_closed_streams():
    command = f"{sys.executable} -m dgr_jax.train --gin_file=none.gin >&- 2>&-"
    assert subprocess.run(["bash", "-c", command], cwd=ROOT).returncode == 2
    command = f"{sys.executable} -m dgr_jax.train --help >&-"
    done = subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_crash_shows_harmless_text():
    code = "import sys\nfrom dgr_jax import interrupts\nfrom dgr_jax.config import cli\n"
    code += "interrupts.is_program = lambda: True\n"
    code += "def command(_):\n    raise KeyError(chr(27) + '[31m')\n"
    code += "def verbose(_):\n    cli.parse(cli.parser('x', ''), ['--verbose'])\n"
    code += "    raise ValueError(chr(27) + '[31m')\n"
    for which in ("command", "verbose"):
        done = subprocess.run(
            [sys.executable, "-c", f"{code}cli.main({which})"], cwd=ROOT, capture_output=True
        )
        assert done.returncode == 1 and b"Traceback" in done.stderr
        assert b"\\x1b[31m" in done.stderr and b"\x1b" not in done.stderr


def test_a_broken_connection_is_no_closed_pipe(capsys, monkeypatch):
    from dgr_jax.config import cli

    def command(_):
        raise BrokenPipeError(32, "Broken pipe")

    monkeypatch.setattr(cli.logging.getLogger(), "level", cli.logging.WARNING)
    monkeypatch.setattr(cli, "_close_broken", lambda: False)
    with pytest.raises(SystemExit, match="2"):
        cli.main(command)
    assert "Broken pipe" in capsys.readouterr().err


def test_training_saves_its_last_step(tmp_path, caplog):
    def interrupt(now):
        if now == 5:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(SystemExit, match="130"):
        test_loop.run(tmp_path, validation=test_loop.at_each_step(interrupt))
    with Checkpoints(tmp_path / "checkpoints") as saved:
        step = saved.latest()
    assert step in (5, 6)
    said = f"generate: interrupted: saved step {step}; the same command goes on from there"
    assert said in caplog.messages


@pytest.mark.parametrize("program", [True, False])
def test_at_the_end_of_a_program_all_is_done(monkeypatch, program):
    monkeypatch.setattr(interrupts, "is_program", lambda: program)
    before = signal.getsignal(signal.SIGINT)
    try:
        with interrupts.heard():
            pass
        assert signal.getsignal(signal.SIGINT) == (signal.SIG_IGN if program else before)
    finally:
        signal.signal(signal.SIGINT, before)
