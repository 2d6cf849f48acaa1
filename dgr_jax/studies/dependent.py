"""A command that does not outlive the process that started it, however that one ended.

    python -m dgr_jax.studies.dependent PARENT COMMAND ...

becomes the command, once the kernel has been asked to kill it with its parent. Where the kernel
cannot be asked (only Linux can), it stays between the two, and kills the command when its own
parent has changed.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
from collections.abc import Sequence

_PR_SET_PDEATHSIG = 1  # of linux/prctl.h
_POLL = 0.5  # seconds


def command(arguments: Sequence[str]) -> list[str]:
    """What this process must start instead of a command that shall not outlive it."""
    return [sys.executable, "-m", "dgr_jax.studies.dependent", str(os.getpid()), *arguments]


def become(parent: int, arguments: list[str]) -> None:
    """Becomes the command, which is killed when the process `parent` ends; or ends at once, where
    it has ended already."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() == parent:  # otherwise it ended before the kernel was asked
        os.execvp(arguments[0], arguments)
    sys.exit(1)


def watch(parent: int, arguments: Sequence[str]) -> int:
    """Runs the command to its end, hands SIGTERM and SIGINT on to it, and kills it when the process
    `parent` has ended; -> its exit status."""
    child = subprocess.Popen(arguments)
    for signum in (signal.SIGTERM, signal.SIGINT):
        signal.signal(signum, lambda signum, _: child.send_signal(signum))
    while True:
        try:
            return child.wait(_POLL)
        except subprocess.TimeoutExpired:
            if os.getppid() != parent:
                child.kill()


if __name__ == "__main__":
    if sys.platform == "linux":
        become(int(sys.argv[1]), sys.argv[2:])
    sys.exit(watch(int(sys.argv[1]), sys.argv[2:]))
