"""Several processes that work on one experiment, such as one on each host of a TPU pod.

JAX joins them (`start`). Their common decisions go through its coordination service, which the
first of them runs: `agree`, `wait`, and `Stop`, which saves at the same step everywhere.

They end together. A process that fails tells the others. When one dies, JAX notices after HEARTBEAT
seconds without a sign of life and aborts the others, whose last message names the dead process.
With a single process, the functions of this module have no effect.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import logging
import os
import select
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from typing import Any

from dgr_jax import interrupts

logger = logging.getLogger(__name__)

HEARTBEAT = 30  # seconds without a sign of life after which a process is taken for dead
EXIT_STOPPED = 75  # EX_TEMPFAIL of sysexits.h: stopped by SIGTERM; the same command goes on
EXIT_LOST = 76  # another process died; the same command goes on
VARIABLES = {
    "coordinator_address": "JAX_COORDINATOR_ADDRESS",
    "num_processes": "JAX_NUM_PROCESSES",
    "process_id": "JAX_PROCESS_ID",
}

_KEYS = "dgr_jax/"
_LOST = ("gloo", "connection closed", "connection reset", "unavailable", "socket closed", "barrier")
_SILENT = 5  # seconds without a sign of life after which a process may be named as the dead one
_POLL = 5000  # milliseconds

_group: _Group | None = None


def settings(given: dict[str, str | None]) -> dict[str, Any] | None:
    """coordinator_address, num_processes and process_id from flags, or else from the environment.

    {} where JAX shall find them, in a SLURM step with several tasks; None where this process works
    alone. Raises ValueError where only some of them are given, or one is no number.
    """
    joined = {name: given.get(name) or os.environ.get(v) for name, v in VARIABLES.items()}
    missing = [f"--{name} ({VARIABLES[name]})" for name, value in joined.items() if not value]
    if len(missing) == len(joined):
        return {} if int(os.environ.get("SLURM_STEP_NUM_TASKS", 1)) > 1 else None
    if missing:
        raise ValueError(f"several processes: {' and '.join(missing)} must be given as well")
    address = joined["coordinator_address"]
    if not address.rpartition(":")[2].isdigit():
        raise ValueError(f"--coordinator_address: got {address!r}, expected HOST:PORT")
    for name in ("num_processes", "process_id"):
        if not joined[name].isdigit():
            raise ValueError(f"--{name}: got {joined[name]!r}, expected a number")
        joined[name] = int(joined[name])
    if not joined["process_id"] < joined["num_processes"]:
        raise ValueError(
            f"--process_id: got {joined['process_id']}, expected a number below --num_processes="
            f"{joined['num_processes']}"
        )
    return joined if joined["num_processes"] > 1 else None


def start(given: dict[str, Any]) -> None:
    """Joins the other processes; to be called before anything is computed.

    given: what `settings` returns; with {} JAX finds the processes (TPU, SLURM, MPI).
    Raises RuntimeError when not all of them have joined within five minutes.
    """
    global _group
    import jax

    # JAX's own service would keep SIGTERM from Python, and never end a process outside a loop of
    # steps. `Stop` handles it here.
    jax.config.update("jax_enable_preemption_service", False)
    jax.distributed.initialize(**given, heartbeat_timeout_seconds=HEARTBEAT)
    from jax._src import distributed  # orbax takes the client from here too

    state = distributed.global_state
    if state.num_processes > 1:
        _group = _Group(state.client, state.process_id, state.num_processes)
        _group.open(state.coordinator_address)


def count() -> int:
    """The number of processes that work together."""
    return _group.count if _group else 1


def first() -> bool:
    """Whether this is the process that writes."""
    return _group is None or _group.index == 0


def agree(value: Any) -> Any:
    """Returns the JSON value of the first process to all; each process makes the same calls in the
    same order."""
    return _group.agree(value) if _group else value


def wait() -> None:
    """Returns when all processes have called it, however long that takes."""
    if _group:
        _group.wait()


@contextlib.contextmanager
def leaving() -> Iterator[None]:
    """A context manager around everything that a process does: it ends together with the others, or
    tells them why it ends alone."""
    try:
        yield
    except SystemExit as end:
        _leave(0 if end.code is None else end.code if isinstance(end.code, int) else 1)
        raise
    except BaseException:
        if _group:
            traceback.print_exc()
        _leave(1)
        raise
    _leave(0)


def _leave(code: int) -> None:
    if _group and code in (0, EXIT_STOPPED, interrupts.EXIT_INTERRUPTED):
        _group.close()
    elif _group:
        _group.end(code, "")


@contextlib.contextmanager
def blaming() -> Iterator[None]:
    """A context manager around work that processes do together.

    Where the connection to another process breaks because that process died, this one ends with a
    message that names it.
    """
    try:
        yield
    except Exception as error:
        if _group and _is_lost(error):
            _group.blame()
        raise


def _is_lost(error: BaseException | None) -> bool:
    """Whether an error, or one of its causes, is an error of the connection."""
    while error is not None:
        if any(sign in str(error).lower() for sign in _LOST):
            return True
        error = error.__cause__ or error.__context__
    return False


class Stop:
    """A context manager that handles SIGTERM and Ctrl-C while a loop of steps runs.

    After it the signals end the process as they did before. A single process gets its old handlers
    back; with several, a signal to any of them stops all. Before the first step is done, which may
    take long to compile, there is nothing to save, and Ctrl-C ends a command at once.
    """

    def __init__(self, name: str = "the stage") -> None:
        """name: the name of what is trained, for the line that answers Ctrl-C."""
        self._noted: int | None = None
        self._before: dict[int, Any] = {}
        self._name = name
        self._held: contextlib.ExitStack | None = None
        main = threading.current_thread() is threading.main_thread()
        self._handles = main and _group is None

    def __enter__(self) -> Stop:
        if _group:
            _group.enter()
        for sig in (signal.SIGTERM, signal.SIGINT) if self._handles else ():
            if sig == signal.SIGTERM or signal.getsignal(sig) != signal.SIG_IGN:
                self._before[sig] = signal.signal(sig, self._note)
        return self

    def _note(self, sig: int, frame: Any) -> None:
        if sig == self._noted == signal.SIGINT and callable(self._before[sig]):
            self._before[sig](sig, frame)  # a second Ctrl-C does not wait for the step
        self._noted = self._noted or sig

    def requested(self, step: int) -> bool:
        """Whether to stop after this step; every process gets the same answer."""
        if self._held is None:
            self._held = contextlib.ExitStack()
            self._held.enter_context(interrupts.held(f"{self._name} is saved after this step"))
        return _group.requested(step) if _group else self._noted is not None

    @property
    def status(self) -> int:
        """The exit status of a process that was told to stop."""
        sig = _group.signal if _group else self._noted
        return interrupts.EXIT_INTERRUPTED if sig == signal.SIGINT else EXIT_STOPPED

    def __exit__(self, kind: Any, *error: Any) -> None:
        for sig, handler in self._before.items():
            signal.signal(sig, handler or signal.SIG_DFL)
        told = _group.leave_loop() if _group else self._noted is not None
        if told and kind is None:
            logger.warning("%s: stopped at its end; the same command goes on", self._name)
        if self._held is not None:
            self._held.__exit__(kind, *error)
        if told and kind is None:
            raise SystemExit(self.status)


class _Group:
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
        self.signal = signal.SIGTERM  # the signal that stops them
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
