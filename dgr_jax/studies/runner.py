"""Runs the experiments of a study one after another, each in a process of its own."""

from __future__ import annotations

import logging
import os
import platform
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from typing import IO, Any

from dgr_jax import interrupts, processes
from dgr_jax.studies import dependent
from dgr_jax.studies.grid import Grid, Run

logger = logging.getLogger(__name__)

LOG = "log.txt"  # what the experiment of a run said, in its folder


def run(grid: Grid) -> list[str]:
    """Runs what has not been run; -> a line for each experiment that failed.

    Raises before anything starts where one of them cannot be. SIGTERM stops the experiment that
    runs, and ends this process with the status of one told to stop.
    """
    grid.check()
    failures = []
    for position, run in enumerate(grid.runs, start=1):
        grid.link(run)
        if all(done for done, _ in grid.state(run).values()):
            continue
        logger.info("study: %d/%d %s", position, len(grid.runs), run.folder.name)
        if why := _train(grid, run):
            failures.append(f"{run.folder.name} failed: {why} ({run.folder / LOG})")
            logger.error("study: %s", failures[-1])
    return failures


def _train(grid: Grid, run: Run) -> str:
    """Runs one experiment, which ends when this process does; -> why it failed, or blank."""
    # Each host has its own: another processor may lack instructions of what was compiled here.
    compiled = grid.folder / "compiled" / platform.node()
    shared = {"JAX_COMPILATION_CACHE_DIR": str(compiled)}
    command = [sys.executable, "-m", "dgr_jax.train", *run.flags]
    with (run.folder / LOG).open("a", encoding="utf-8") as output:
        begins = output.tell()
        status = _status([*command, f"--model_dir={run.folder}"], output, shared)
    if status in (processes.EXIT_STOPPED, interrupts.EXIT_INTERRUPTED):
        sys.exit(status)
    with (run.folder / LOG).open("rb") as log:
        log.seek(begins)
        return _reason(log.read().decode("utf-8", "replace"), status)


def _status(command: Sequence[str], output: IO[str], settings: Mapping[str, str]) -> int:
    """Runs a command to its end, which is that of this process at the latest, with environment
    variables that this process does not set.

    SIGTERM and Ctrl-C are handed on to it, and make the status that of a process told to stop.
    """
    told: list[int] = []
    environment = {**settings, **os.environ}
    bound = dependent.command(command)
    with subprocess.Popen(bound, stdout=output, stderr=output, env=environment) as child:

        def stop(signum: int, _: Any) -> None:
            told.append(signum)
            child.send_signal(signum)

        heard = [signal.SIGTERM, signal.SIGINT]
        if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
            heard.remove(signal.SIGINT)
        before = {signum: signal.signal(signum, stop) for signum in heard}
        try:
            with interrupts.held("waits for the experiment, which saves its last step"):
                status = child.wait()
        finally:
            for signum, handler in before.items():
                signal.signal(signum, handler)
    if told:
        return interrupts.EXIT_INTERRUPTED if signal.SIGINT in told else processes.EXIT_STOPPED
    return status


def _reason(log: str, status: int) -> str:
    """Why an experiment failed, from what it said; blank where it did not."""
    if not status:
        return ""
    if status < 0:
        return f"ended by {signal.Signals(-status).name}"
    lines = [line for line in log.splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("error: ")]
    return (errors or lines or [f"exit status {status}"])[-1].removeprefix("error: ")
