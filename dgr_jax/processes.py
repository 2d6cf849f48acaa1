"""Several processes that work on one experiment, such as one on each host of a TPU pod.

JAX joins them (`start`). Their common decisions go through its coordination service, which the
first of them runs: `agree`, `wait`, and `Stop`, which saves at the same step everywhere.

They end together. A process that fails tells the others. When one dies, JAX notices after HEARTBEAT
seconds without a sign of life and aborts the others, whose last message names the dead process.
With a single process, the functions of this module have no effect.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import threading
import traceback
from collections.abc import Iterator
from typing import Any

from dgr_jax import interrupts
from dgr_jax.process_group import EXIT_STOPPED, HEARTBEAT, Group

logger = logging.getLogger(__name__)

VARIABLES = {
    "coordinator_address": "JAX_COORDINATOR_ADDRESS",
    "num_processes": "JAX_NUM_PROCESSES",
    "process_id": "JAX_PROCESS_ID",
}

_LOST = ("gloo", "connection closed", "connection reset", "unavailable", "socket closed", "barrier")

_group: Group | None = None


def settings(given: dict[str, str | None]) -> dict[str, Any] | None:
    """coordinator_address, num_processes and process_id from flags, or else from the environment.

    {} where JAX shall find them, in a SLURM step with several tasks; None where this process works
    alone. Raises ValueError where only some of them are given, or one is no number.
    """
    joined = {name: given.get(name) or os.environ.get(v, "") for name, v in VARIABLES.items()}
    missing = [f"--{name} ({VARIABLES[name]})" for name, value in joined.items() if not value]
    if len(missing) == len(joined):
        return {} if int(os.environ.get("SLURM_STEP_NUM_TASKS", 1)) > 1 else None
    if missing:
        raise ValueError(f"several processes: {' and '.join(missing)} must be given as well")
    address = joined["coordinator_address"]
    if not address.rpartition(":")[2].isdigit():
        raise ValueError(f"--coordinator_address: got {address!r}, expected HOST:PORT")
    for name in ("num_processes", "process_id"):
        if not joined[name].isdecimal():
            raise ValueError(f"--{name}: got {joined[name]!r}, expected a number")
    count, index = int(joined["num_processes"]), int(joined["process_id"])
    if not index < count:
        raise ValueError(
            f"--process_id: got {index}, expected a number below --num_processes={count}"
        )
    return joined | {"num_processes": count, "process_id": index} if count > 1 else None


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
        assert state.coordinator_address is not None
        _group = Group(state.client, state.process_id, state.num_processes)
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
