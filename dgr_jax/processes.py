"""Several processes that work on one experiment, such as one a host of a TPU pod.

JAX joins them (`start`). What they decide together goes through its coordination service, which the
first of them runs: `agree`, `wait`, and `Stop`, which saves at the same step everywhere.

None is left behind. A process that fails tells the others; of one that dies JAX hears nothing for
HEARTBEAT seconds, and then aborts those that are left: what they say last is the name of the dead.
With a single process nothing here does anything.
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
EXIT_STOPPED = 75  # EX_TEMPFAIL of sysexits.h: told to stop (SIGTERM), run the same command again
EXIT_LOST = 76  # another process died: run the same command again
VARIABLES = {
    "coordinator_address": "JAX_COORDINATOR_ADDRESS",
    "num_processes": "JAX_NUM_PROCESSES",
    "process_id": "JAX_PROCESS_ID",
}

_KEYS = "dgr_jax/"
_LOST = ("gloo", "connection closed", "connection reset", "unavailable", "socket closed", "barrier")
_SILENT = 5  # seconds without a sign of life: the likeliest to have died
_POLL = 5000  # milliseconds

_group: _Group | None = None


def settings(given: dict[str, str | None]) -> dict[str, Any] | None:
    """coordinator_address, num_processes, process_id of flags, or else of the environment.

    {}: JAX shall find them, in a SLURM step of several tasks; None: this process is alone.
    Raises ValueError where only some of them are given, or one is no number.
    """
    found = {name: given.get(name) or os.environ.get(v, "") for name, v in VARIABLES.items()}
    missing = [f"--{name} ({VARIABLES[name]})" for name, value in found.items() if not value]
    if len(missing) == len(found):
        return {} if int(os.environ.get("SLURM_STEP_NUM_TASKS", 1)) > 1 else None
    if missing:
        raise ValueError(f"several processes: {' and '.join(missing)} must be given as well")
    address = found["coordinator_address"]
    if not address.rpartition(":")[2].isdigit():
        raise ValueError(f"--coordinator_address: got {address!r}, expected HOST:PORT")
    for name in ("num_processes", "process_id"):
        if not found[name].isdecimal():
            raise ValueError(f"--{name}: got {found[name]!r}, expected a number")
    count, index = int(found["num_processes"]), int(found["process_id"])
    if not index < count:
        raise ValueError(
            f"--process_id: got {index}, expected a number below --num_processes={count}"
        )
    return found | {"num_processes": count, "process_id": index} if count > 1 else None


def start(given: dict[str, Any]) -> None:
    """Joins the other processes; before anything is computed.

    given: see `settings`; {}: JAX finds them (TPU, SLURM, MPI).
    Raises RuntimeError when not all of them come, within five minutes.
    """
    global _group
    import jax

    # It would take SIGTERM from Python, and never end a process outside of a loop; see `Stop`.
    jax.config.update("jax_enable_preemption_service", False)
    jax.distributed.initialize(**given, heartbeat_timeout_seconds=HEARTBEAT)
    from jax._src import distributed  # orbax takes the client from here, too

    state = distributed.global_state
    if state.num_processes > 1:
        assert state.coordinator_address is not None
        _group = _Group(state.client, state.process_id, state.num_processes)
        _group.open(state.coordinator_address)


def count() -> int:
    """Processes that work together."""
    return _group.count if _group else 1


def first() -> bool:
    """Whether this is the process that writes."""
    return _group is None or _group.index == 0


def agree(value: Any) -> Any:
    """What the first process has handed in, JSON; all of them call it in the same order."""
    return _group.agree(value) if _group else value


def wait() -> None:
    """Returns when all processes have called it, however long that takes."""
    if _group:
        _group.wait()


@contextlib.contextmanager
def leaving() -> Iterator[None]:
    """Around all that a process does: it ends together with the others, or tells them why not."""
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
    """Around what is done together: where the connection to another process breaks because that one
    died, this one ends, and says so."""
    try:
        yield
    except Exception as error:
        if _group and _is_lost(error):
            _group.blame()
        raise


def _is_lost(error: BaseException | None) -> bool:
    """Whether an error, or what it came of, is one of the connection."""
    while error is not None:
        if any(sign in str(error).lower() for sign in _LOST):
            return True
        error = error.__cause__ or error.__context__
    return False


class Stop:
    """SIGTERM or Ctrl-C while a loop of steps runs. A context manager: when it is left, they end
    the process as before; with several processes, all of them.

    One process: the handlers before it are put back. Several: a signal to any of them counts.
    Before the first step is done, which is compiled for long, there is nothing to save: Ctrl-C ends
    a command at once.
    """

    def __init__(self, name: str = "the stage") -> None:
        """name: of what is trained, for the line that answers Ctrl-C."""
        self._noted: int | None = None
        self._before: dict[int, Any] = {}
        self._name = name
        self._held: contextlib.ExitStack | None = None
        main = threading.current_thread() is threading.main_thread()
        self._handles = main and _group is None

    def __enter__(self) -> Stop:
        if _group:
            _group.enter()
        for number in (signal.SIGTERM, signal.SIGINT) if self._handles else ():
            if number == signal.SIGTERM or signal.getsignal(number) != signal.SIG_IGN:
                self._before[number] = signal.signal(number, self._note)
        return self

    def _note(self, number: int, frame: Any) -> None:
        if number == self._noted == signal.SIGINT and callable(self._before[number]):
            self._before[number](number, frame)  # a second Ctrl-C does not wait
        self._noted = self._noted or number

    def requested(self, step: int) -> bool:
        """Whether to stop after this step; every process gets the same answer."""
        if self._held is None:
            self._held = contextlib.ExitStack()
            self._held.enter_context(interrupts.held(f"{self._name} is saved after this step"))
        return _group.requested(step) if _group else self._noted is not None

    @property
    def status(self) -> int:
        """The exit status of a process that was told to stop."""
        number = _group.signal if _group else self._noted
        return interrupts.EXIT_INTERRUPTED if number == signal.SIGINT else EXIT_STOPPED

    def __exit__(self, kind: Any, *error: Any) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler or signal.SIG_DFL)
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
        self._signs: dict[int, tuple[str, float]] = {}  # of life, and when they were new
        self._looked = time.monotonic()
        self._lock = threading.Lock()
        self._step: int | None = None  # the last one of a loop; None: outside
        self._stopping = False
        self.signal: int = signal.SIGTERM  # that told them to stop
        self._pressed = 0.0  # when Ctrl-C came here first
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
            # A handler, so that a byte is written: it wakes the watch while Python is busy.
            for number in (signal.SIGTERM, signal.SIGINT):
                if signal.getsignal(number) != signal.SIG_IGN:
                    signal.signal(number, lambda *_: None)
            signal.set_wakeup_fd(write, warn_on_full_buffer=False)
        self._abort = ctypes.CFUNCTYPE(None, ctypes.c_int)(self._aborted)
        self._libc = ctypes.CDLL(None)
        self._libc.signal(signal.SIGABRT, self._abort)
        self._thread = threading.Thread(target=self._watch, args=(read,), daemon=True)
        self._thread.start()

    # What is said through the coordination service.

    def _set(self, key: str, value: str) -> None:
        self._client.key_value_set(_KEYS + key, value, allow_overwrite=True)

    def _get(self, key: str) -> str:
        """Waits for it, however long; Python's signal handlers run meanwhile."""
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
        """Whether it was told to stop."""
        with self._lock:
            self._step = None
            return self._stopping

    def requested(self, step: int) -> bool:
        """All have said, when they heard of it, which step they had done: the next one that none
        has done yet is the last."""
        with self._lock:
            self._step = step
            if not self._stopping:
                return False
        if self._last is None:
            self._last = 1 + max(int(self._get(f"step/{i}")) for i in range(self.count))
        return step >= self._last

    def _stop(self, by: int, number: int) -> None:
        with self._lock:
            self._stopping, self.signal = True, number
            if self._step is not None:
                self._set(f"step/{self.index}", str(self._step))
                return
        if number == signal.SIGINT:
            self.end(interrupts.EXIT_INTERRUPTED, f"Ctrl-C on {self._names[by]}: all stop")
        self.end(EXIT_STOPPED, f"SIGTERM on {self._names[by]}: all stop")

    # The watch.

    def _watch(self, read: int) -> None:
        beats = 0
        while not self._closed.is_set():
            try:
                if select.select([read], [], [], 1.0)[0]:
                    self._tell(os.read(read, 64))
                beats += 1
                self._set(f"sign/{self.index}", str(beats))
                said = dict(self._client.key_value_dir_get(_KEYS))
            except Exception:  # the first process is gone: JAX aborts this one
                continue
            self._look({key.removeprefix(_KEYS): value for key, value in said.items()})

    def _tell(self, signals: bytes) -> None:
        """Tells all to stop; a second Ctrl-C ends this process, and so the others, at once."""
        if signal.SIGINT in signals:
            now = time.monotonic()
            if self._pressed and now - self._pressed > interrupts.ONE_PRESS:
                self.end(interrupts.EXIT_INTERRUPTED, "Ctrl-C again: ends without saving")
            self._pressed = self._pressed or now
        for number in (signal.SIGTERM, signal.SIGINT):
            if number in signals:
                self._set("stop", json.dumps([self.index, number]))

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
        """The process that seems dead, and for how many seconds it was silent."""
        silent = {i: self._looked - since for i, (_, since) in self._signs.items()}
        index = max(silent, key=silent.__getitem__, default=self.index)
        seconds = silent.get(index, 0.0)
        # The first one may have left already because of another's death.
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
        """SIGABRT, in JAX's thread: it gives up on a process that is silent or unreachable."""
        gone = self._gone()
        if gone is None:  # its own fault
            self._libc.signal(signal.SIGABRT, None)
            return
        os.write(2, f"error: {self._obituary(*gone)}\n".encode())
        os._exit(EXIT_LOST)

    def blame(self) -> None:
        """Ends this process when another seems dead, within the time that JAX takes to see it."""
        deadline = time.monotonic() + HEARTBEAT + 10
        while time.monotonic() < deadline:
            if (gone := self._gone()) is not None:
                self.end(EXIT_LOST, self._obituary(*gone))
            time.sleep(1)

    # The end.

    def end(self, code: int, message: str) -> None:
        """Leaves at once, without waiting for the others, who hear of it."""
        if message:
            sys.stderr.write(f"error: {message}\n")
        sys.stdout.flush()
        sys.stderr.flush()
        with contextlib.suppress(Exception):
            self._set(f"left/{self.index}", json.dumps([code, message]))
            deadline = time.monotonic() + _SILENT
            while self.index == 0 and time.monotonic() < deadline:  # the service ends with it
                left = self._client.key_value_dir_get(f"{_KEYS}left")
                if len(left) == self.count:
                    break
                time.sleep(0.1)
        os._exit(code)

    def close(self) -> None:
        """Leaves when all others do."""
        import jax

        self._closed.set()
        self._thread.join()
        with contextlib.suppress(Exception):
            jax.distributed.shutdown()
