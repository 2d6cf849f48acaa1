"""Ctrl-C (SIGINT) ends a command without loss, with a line on how to go on and exit status 130.

Python itself would raise KeyboardInterrupt at whatever line it has reached, and would swallow it in
a destructor or a callback of the garbage collector. Here a thread listens, also while Python waits
for a compiler. It ends the process at once, as SIGTERM does, for the files of the stages are whole
after any end. Only loops that save first (`held`) get the time to do so, and a second Ctrl-C ends
these at once too.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from types import FrameType

EXIT_INTERRUPTED = 130  # 128 + SIGINT, as shells say it
ONE_PRESS = 0.5  # seconds: a second signal within them, from a parent process, is the same Ctrl-C

_listener: _Listener | None = None


@contextlib.contextmanager
def heard() -> Iterator[None]:
    """A context manager around everything that a command does.

    It has no effect outside the main thread, which alone gets Python's signals, nor where the shell
    ignores SIGINT, as it does for jobs in the background.
    """
    global _listener
    main = threading.current_thread() is threading.main_thread()
    if not main or _listener or signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        yield
        return
    _listener = _Listener()
    try:
        yield
    finally:
        _listener.close()
        _listener = None


@contextlib.contextmanager
def held(what: str) -> Iterator[None]:
    """A context manager around a loop that handles SIGINT itself and saves before it ends.

    what: what happens now, for the line that answers the first Ctrl-C; a second Ctrl-C ends the
    process at once. Where the loop ends normally after a Ctrl-C, the process ends by SystemExit.
    """
    listener = _listener
    if listener is None:
        yield
        return
    with listener.lock:
        listener.saving = what
    try:
        yield
    finally:
        with listener.lock:
            listener.saving = ""
    if listener.pressed:
        raise SystemExit(EXIT_INTERRUPTED)


def goes_on(work: str) -> None:
    """Notes what the same command, run again, would go on with, so that the answer to Ctrl-C says
    it."""
    if _listener is not None:
        _listener.work = work


class _Listener:
    """Gets SIGINT through the file descriptor that the interpreter's own handler writes to."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.saving = ""  # what a loop does before it ends; blank where no loop runs
        self.work = ""  # what the same command would go on with
        self.pressed = 0.0  # the time of the first Ctrl-C
        self._stderr = os.dup(2)  # a copy, as stderr is redirected while libraries load quietly
        read, self._write = os.pipe()
        os.set_blocking(self._write, False)
        self._handler = signal.signal(signal.SIGINT, _ignore)
        self._descriptor = signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
        threading.Thread(target=self._listen, args=(read,), daemon=True).start()

    def close(self) -> None:
        """Restores the handling of signals as it was before.

        At the end of a program SIGINT is ignored instead: all work is done, and the interpreter,
        while it ends, would replace a handler by the default.
        """
        signal.set_wakeup_fd(self._descriptor)
        signal.signal(signal.SIGINT, signal.SIG_IGN if is_program() else self._handler)
        os.close(self._write)

    def _listen(self, read: int) -> None:
        while signals := os.read(read, 64):
            if signal.SIGINT in signals:
                self.press()
        os.close(read)
        os.close(self._stderr)

    def press(self) -> None:
        """Handles one Ctrl-C."""
        with self.lock:
            now = time.monotonic()
            if self.pressed and now - self.pressed < ONE_PRESS:
                return
            first, self.pressed = not self.pressed, now
            if first and self.saving:
                self._say(f"interrupted: {self.saving}; Ctrl-C again ends at once")
                return
            if self.work:
                self._say(f"{self.work}: interrupted; the same command goes on with it")
            os._exit(EXIT_INTERRUPTED)

    def _say(self, line: str) -> None:
        """Writes to stderr directly, as another thread may hold the lock of Python's buffers."""
        start = "\n" if os.isatty(self._stderr) else ""  # a terminal shows a progress line and ^C
        with contextlib.suppress(OSError):
            os.write(self._stderr, f"{start}{line}\n".encode(errors="backslashreplace"))


def _ignore(signal_number: int, frame: FrameType | None) -> None:
    """Does nothing; with a handler the interpreter writes to the descriptor and does not raise."""


def is_program() -> bool:
    """Whether this process runs one of our commands (`python -m dgr_jax.train`), and is not another
    program that calls them."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    return spec is not None and spec.name.startswith("dgr_jax.")
