"""One process among several: their messages, who of them is alive, and how they end together.

The package uses it through `dgr_jax.processes`.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import select
import signal
import socket
import sys
import threading
import time
from typing import Any

from dgr_jax import interrupts

HEARTBEAT = 30  # seconds without a sign of life after which a process is taken for dead
EXIT_STOPPED = 75  # EX_TEMPFAIL of sysexits.h: stopped by SIGTERM; the same command goes on
EXIT_LOST = 76  # another process died; the same command goes on

_KEYS = "dgr_jax/"
_SILENT = 5  # seconds without a sign of life after which a process may be named as the dead one
_POLL = 5000  # milliseconds


class Group:
    """This process among the others, and the thread that watches over them."""

    def __init__(self, client: Any, index: int, count: int) -> None:
        self.index, self.count = index, count
        self._client = client
        self._calls = 0
        self._names = {i: f"process {i}" for i in range(count)}
        self._signs: dict[int, tuple[str, float]] = {}  # last sign of life, and the time it came
        self._looked = time.monotonic()
        self._lock = threading.Lock()
        self._step: int | None = None  # the last finished step of a loop; None outside a loop
        self._stopping = False
        self.signal: int = signal.SIGTERM  # the signal that stops them
        self._pressed = 0.0  # the time of the first Ctrl-C in this process
        self._last: int | None = None  # the step to stop after
        self._closed = threading.Event()

    def open(self, address: str) -> None:
        """Learns the names of the others, and begins to watch."""
        self._address = address
        self._set(f"name/{self.index}", socket.gethostname())
        for i in range(self.count):
            self._names[i] = f"process {i} ({self._get(f'name/{i}')})"
        read, write = os.pipe()
        os.set_blocking(write, False)
        if threading.current_thread() is threading.main_thread():
            # With a handler Python writes a byte for each signal, which wakes the watching thread.
            for sig in (signal.SIGTERM, signal.SIGINT):
                if signal.getsignal(sig) != signal.SIG_IGN:
                    signal.signal(sig, lambda *_: None)
            signal.set_wakeup_fd(write, warn_on_full_buffer=False)
        self._abort = ctypes.CFUNCTYPE(None, ctypes.c_int)(self._aborted)
        self._libc = ctypes.CDLL(None)
        self._libc.signal(signal.SIGABRT, self._abort)
        self._thread = threading.Thread(target=self._watch, args=(read,), daemon=True)
        self._thread.start()

    # Messages through the coordination service.

    def _set(self, key: str, value: str) -> None:
        self._client.key_value_set(_KEYS + key, value, allow_overwrite=True)

    def _get(self, key: str) -> str:
        """Waits for a key without limit, while Python's signal handlers can run."""
        while True:
            try:
                return self._client.blocking_key_value_get(_KEYS + key, _POLL)
            except Exception as error:
                if "DEADLINE_EXCEEDED" not in str(error):
                    raise

    def agree(self, value: Any) -> Any:
        self._calls += 1
        if self.index == 0:
            self._set(f"agree/{self._calls}", json.dumps(value))
            return value
        return json.loads(self._get(f"agree/{self._calls}"))

    def wait(self) -> None:
        self._set(f"wait/{self._calls}/{self.index}", "")
        if self.index == 0:
            for i in range(1, self.count):
                self._get(f"wait/{self._calls}/{i}")
        self.agree(None)

    # A loop of steps that SIGTERM ends.

    def enter(self) -> None:
        with self._lock:
            self._step = 0
            if self._stopping:
                self._set(f"step/{self.index}", "0")

    def leave_loop(self) -> bool:
        """Whether the loop was told to stop."""
        with self._lock:
            self._step = None
            return self._stopping

    def requested(self, step: int) -> bool:
        """Whether to stop after this step.

        Each process has reported the step it had done when it heard of the stop. All stop after the
        first step that none of them had done then.
        """
        with self._lock:
            self._step = step
            if not self._stopping:
                return False
        if self._last is None:
            self._last = 1 + max(int(self._get(f"step/{i}")) for i in range(self.count))
        return step >= self._last

    def _stop(self, by: int, sig: int) -> None:
        with self._lock:
            self._stopping, self.signal = True, sig
            if self._step is not None:
                self._set(f"step/{self.index}", str(self._step))
                return
        if sig == signal.SIGINT:
            self.end(interrupts.EXIT_INTERRUPTED, f"Ctrl-C on {self._names[by]}: all stop")
        self.end(EXIT_STOPPED, f"SIGTERM on {self._names[by]}: all stop")

    # The thread that watches the others.

    def _watch(self, read: int) -> None:
        beats = 0
        while not self._closed.is_set():
            try:
                if select.select([read], [], [], 1.0)[0]:
                    self._tell(os.read(read, 64))
                beats += 1
                self._set(f"sign/{self.index}", str(beats))
                said = dict(self._client.key_value_dir_get(_KEYS))
            except Exception:  # the first process is gone, and JAX will abort this one
                continue
            self._look({key.removeprefix(_KEYS): value for key, value in said.items()})

    def _tell(self, signals: bytes) -> None:
        """Tells all processes to stop; a second Ctrl-C ends this one and so the others at once."""
        if signal.SIGINT in signals:
            now = time.monotonic()
            if self._pressed and now - self._pressed > interrupts.ONE_PRESS:
                self.end(interrupts.EXIT_INTERRUPTED, "Ctrl-C again: ends without saving")
            self._pressed = self._pressed or now
        for sig in (signal.SIGTERM, signal.SIGINT):
            if sig in signals:
                self._set("stop", json.dumps([self.index, sig]))

    def _look(self, said: dict[str, str]) -> None:
        self._looked = time.monotonic()
        for i in range(self.count):
            sign = said.get(f"sign/{i}", "")
            if self._signs.get(i, ("",))[0] != sign or i not in self._signs:
                self._signs[i] = (sign, self._looked)
            if i != self.index and f"left/{i}" in said:
                code, why = json.loads(said[f"left/{i}"])
                self.end(code, why or f"{self._names[i]} ended with exit status {code}, see there")
        if "stop" in said and not self._stopping:
            self._stop(*json.loads(said["stop"]))

    def _gone(self) -> tuple[int, float] | None:
        """The process that seems dead and for how many seconds it has been silent, or None."""
        silent = {i: self._looked - since for i, (_, since) in self._signs.items()}
        index = max(silent, key=silent.__getitem__, default=self.index)
        seconds = silent.get(index, 0.0)
        # The first process may have ended already because another one died.
        if seconds < HEARTBEAT / 2 and self.index and not self._reachable():
            return 0, time.monotonic() - self._looked
        return None if index == self.index or seconds < _SILENT else (index, seconds)

    def _reachable(self) -> bool:
        host, _, port = self._address.rpartition(":")
        try:
            with socket.create_connection((host.strip("[]"), int(port)), timeout=3):
                return True
        except OSError:
            return False

    def _obituary(self, index: int, seconds: float) -> str:
        return (
            f"{self._names[index]} died: no sign of life for {seconds:.0f} s; the same command, "
            "for all processes, goes on from the newest checkpoint"
        )

    def _aborted(self, _: int) -> None:
        """Handles SIGABRT, which JAX's thread sends where a process is silent or unreachable."""
        gone = self._gone()
        if gone is None:  # the reason is in this process
            self._libc.signal(signal.SIGABRT, None)
            return
        os.write(2, f"error: {self._obituary(*gone)}\n".encode())
        os._exit(EXIT_LOST)

    def blame(self) -> None:
        """Ends this process if another seems dead within the time that JAX needs to notice it."""
        deadline = time.monotonic() + HEARTBEAT + 10
        while time.monotonic() < deadline:
            if (gone := self._gone()) is not None:
                self.end(EXIT_LOST, self._obituary(*gone))
            time.sleep(1)

    # The end.

    def end(self, code: int, message: str) -> None:
        """Ends this process at once, after telling the others, without waiting for their end."""
        if message:
            sys.stderr.write(f"error: {message}\n")
        sys.stdout.flush()
        sys.stderr.flush()
        with contextlib.suppress(Exception):
            self._set(f"left/{self.index}", json.dumps([code, message]))
            deadline = time.monotonic() + _SILENT
            # The service ends with the first process, so that one waits until all have heard.
            while self.index == 0 and time.monotonic() < deadline:
                left = self._client.key_value_dir_get(f"{_KEYS}left")
                if len(left) == self.count:
                    break
                time.sleep(0.1)
        os._exit(code)

    def close(self) -> None:
        """Leaves the group when all others do."""
        import jax

        self._closed.set()
        self._thread.join()
        with contextlib.suppress(Exception):
            jax.distributed.shutdown()
