"""Ctrl-C (SIGINT): a command ends where nothing is lost, says how to go on, with exit status 130.

Python itself would raise KeyboardInterrupt wherever it happens to be, and in a destructor or a
callback of the garbage collector that is swallowed. Here a thread listens, also while Python waits
for a compiler. It ends the process at once, as SIGTERM does: what stages write is whole after any
end. Only loops that save first (`held`) are given the time to, and a second Ctrl-C takes it back.
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
ONE_PRESS = 0.5  # seconds in which a terminal and a parent process may both tell of it

_listener: _Listener | None = None


@contextlib.contextmanager
def heard() -> Iterator[None]:
    """Around all that a command does; without effect off the main thread, where Python hears no
    signals, and where the shell had SIGINT ignored, as of jobs in the background."""
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
    """Around a loop that sees to SIGINT itself, and saves before it leaves.

    what: happens now, for the line that answers the first Ctrl-C; the second ends the process.
    Ends the process with SystemExit where the loop was left as if nothing had been.
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


def goes_on(what: str) -> None:
    """From here on the same command goes on with this, so that the answer to Ctrl-C says it."""
    if _listener is not None:
        _listener.work = what


class _Listener:
    """Hears SIGINT through the descriptor that the interpreter's own handler writes to."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.saving = ""  # what a loop does before it leaves; "": there is none
        self.work = ""  # that the same command goes on with
        self.pressed = 0.0  # when Ctrl-C came first
        self._stderr = os.dup(2)  # which is elsewhere while libraries are loaded quietly
        read, self._write = os.pipe()
        os.set_blocking(self._write, False)
        self._handler = signal.signal(signal.SIGINT, _ignore)
        self._descriptor = signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
        threading.Thread(target=self._listen, args=(read,), daemon=True).start()

    def close(self) -> None:
        """Signals go where they went before; at the end of a program, nowhere: all is done, and the
        interpreter, on its way out, puts the default back in the place of a handler."""
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
        """Ctrl-C was pressed."""
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
        """Writes to stderr, past Python's buffers, which another thread may hold."""
        start = "\n" if os.isatty(self._stderr) else ""  # after a progress line and ^C
        with contextlib.suppress(OSError):
            os.write(self._stderr, f"{start}{line}\n".encode(errors="backslashreplace"))


def _ignore(number: int, frame: FrameType | None) -> None:
    """A handler, so that the interpreter writes to the descriptor and raises nothing."""


def is_program() -> bool:
    """Whether this process runs one of our commands (`python -m dgr_jax.train`), and no other
    program that calls them."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    return spec is not None and spec.name.startswith("dgr_jax.")
