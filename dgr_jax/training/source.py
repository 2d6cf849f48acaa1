"""Batches from token arrays, by step: NumPy only, where TensorFlow is not installed.

A source answers `batch(step)` for any step, so a resumed run needs no other position than its
step, and every process of a pod reads only its own rows of the same global batch.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from dgr_jax.display import listed
from dgr_jax.training.arrays import Features, blocks_of, read_arrays, write_arrays

__all__ = [
    "ArraySource",
    "MixtureSource",
    "Prefetch",
    "Source",
    "blocks_of",
    "read_arrays",
    "write_arrays",
]


class Source(Protocol):
    """What the loop asks of its data."""

    def batch(self, step: int, process_index: int = 0, process_count: int = 1) -> dict[str, Any]:
        """This process's rows of the global batch of a step, [batch_size / process_count, ...]."""


def parts_of(batch: Mapping[str, Any]) -> dict[str, Features]:
    """The parts of a batch {name: features}; {"": features} of one that has none."""
    whole = not all(isinstance(part, Mapping) for part in batch.values())
    return {"": dict(batch)} if whole else dict(batch)


def _checked(features: Mapping[str, np.ndarray], name: str) -> Features:
    counts = {key: len(values) for key, values in features.items()}
    if not counts or len(set(counts.values())) != 1 or 0 in counts.values():
        raise ValueError(f"{name}: got {listed(counts)}, expected equally many examples of each")
    return dict(features)


def _arrays(given: str | Path | Mapping[str, np.ndarray]) -> Features:
    if isinstance(given, Mapping):
        return _checked(given, "token arrays")
    return _checked(read_arrays(given), str(given))


def local_rows(batch_size: int, process_index: int, process_count: int) -> slice:
    if batch_size % process_count:
        raise ValueError(
            f"batch_size: got {batch_size}, expected a multiple of {process_count}, the number of "
            f"processes"
        )
    share = batch_size // process_count
    return slice(process_index * share, (process_index + 1) * share)


def positive(batch_size: int) -> int:
    if batch_size < 1:
        raise ValueError(f"batch_size: got {batch_size}, expected 1 or more")
    return batch_size


class _Shuffled:
    """Endless order over `count` examples: a new permutation each epoch, from (seed, epoch)."""

    def __init__(self, count: int, seed: int | Sequence[int]) -> None:
        self.count = count
        self._seed = [seed] if isinstance(seed, int) else list(seed)
        self._kept: dict[int, np.ndarray] = {}

    def _epoch(self, epoch: int) -> np.ndarray:
        if epoch not in self._kept:
            rows = np.arange(self.count, dtype=np.int32 if self.count < 2**31 else np.int64)
            np.random.default_rng([*self._seed, epoch]).shuffle(rows)
            for old in sorted(self._kept)[:-1]:
                self._kept.pop(old, None)
            self._kept[epoch] = rows
        return self._kept[epoch]

    def rows(self, start: int, stop: int) -> np.ndarray:
        """Example numbers at places start .. stop of the endless order, int64 [stop - start]."""
        parts = [np.zeros(0, np.int64)]
        while start < stop:
            epoch, place = divmod(start, self.count)
            taken = self._epoch(epoch)[place : place + stop - start]
            parts.append(taken.astype(np.int64))
            start += len(taken)
        return np.concatenate(parts)


class ArraySource:
    """One task: each epoch is a new permutation; batches run on over its end, none is short."""

    def __init__(
        self, arrays: str | Path | Mapping[str, np.ndarray], batch_size: int, seed: int
    ) -> None:
        """Args:
        arrays: a folder of `write_arrays`, or the features themselves, [examples, ...] each.
        batch_size: of all processes together; may exceed the examples, which then repeat.
        """
        self.features = _arrays(arrays)
        self.count = len(next(iter(self.features.values())))
        self.batch_size = positive(batch_size)
        self._order = _Shuffled(self.count, seed)

    def batch(self, step: int, process_index: int = 0, process_count: int = 1) -> Features:
        """See `Source`."""
        start = step * self.batch_size
        local = local_rows(self.batch_size, process_index, process_count)
        rows = self._order.rows(start + local.start, start + local.stop)
        return {name: values[rows] for name, values in self.features.items()}


def _uniform(seed: int, start: int, stop: int) -> np.ndarray:
    """A uniform number in [0, 1) for each step, float64: splitmix64 (Steele et al. 2014)."""
    with np.errstate(over="ignore"):
        key = np.random.default_rng([seed, 1]).integers(2**63, dtype=np.uint64)
        z = key + np.arange(start, stop, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        z = z ^ (z >> np.uint64(31))
    return (z >> np.uint64(11)).astype(np.float64) * 2.0**-53


class MixtureSource:
    """Several tasks by rate, each in its own endless order, shuffled within a batch.

    A step's examples go to the tasks by stratified points: u_j = (j + phi) / batch_size with one
    phi per step, against the cumulative rates. So a task's share is its rate at every step up to
    one example, exact on average, and its examples before any step are counted without replay.
    """

    _CHUNK = 1 << 18

    def __init__(
        self,
        tasks: Mapping[str, tuple[str | Path | Mapping[str, np.ndarray], float]],
        batch_size: int,
        seed: int,
    ) -> None:
        """Args:
        tasks: name -> (folder or features, rate); rates are relative, all above 0.
        """
        self.batch_size = positive(batch_size)
        self.names = sorted(tasks)
        self._seed = seed
        self._features = [_arrays(tasks[name][0]) for name in self.names]
        self._check_tasks([tasks[name][1] for name in self.names])
        rates = np.array([tasks[name][1] for name in self.names], np.float64)
        self._edges = np.concatenate([[0.0], np.cumsum(rates) / rates.sum()])
        self._edges[-1] = 1.0
        counts = [len(next(iter(features.values()))) for features in self._features]
        self._orders = [_Shuffled(count, (seed, 2, i)) for i, count in enumerate(counts)]
        self._known = (0, np.zeros(len(self.names), np.int64))

    def _check_tasks(self, rates: Sequence[float]) -> None:
        if not self.names:
            raise ValueError("mixture: got no tasks, expected at least one")
        for name, rate in zip(self.names, rates, strict=True):
            if not rate > 0:
                raise ValueError(f"mixture: got rate {rate} of task {name!r}, expected above 0")
        first = {key: (a.dtype, a.shape[1:]) for key, a in self._features[0].items()}
        for name, features in zip(self.names, self._features, strict=True):
            got = {key: (a.dtype, a.shape[1:]) for key, a in features.items()}
            if got != first:
                raise ValueError(
                    f"mixture: task {name!r} has features {_described(got)}, expected "
                    f"{_described(first)} as task {self.names[0]!r}; set equal lengths"
                )

    def _of_steps(self, start: int, stop: int) -> np.ndarray:
        """Examples of each task in each step, int64 [stop - start, tasks]."""
        phi = _uniform(self._seed, start, stop)
        # Points j + phi below batch_size * edge.
        below = np.ceil(self.batch_size * self._edges[None, :] - phi[:, None]).astype(np.int64)
        below = np.clip(below, 0, self.batch_size)
        below[:, 0], below[:, -1] = 0, self.batch_size
        return np.diff(below, axis=1)

    def counts(self, step: int) -> np.ndarray:
        """Examples of each task (order of `names`) in all steps before `step`, int64 [tasks]."""
        known, total = self._known
        if step < known:
            known, total = 0, np.zeros(len(self.names), np.int64)
        for start in range(known, step, self._CHUNK):
            total = total + self._of_steps(start, min(step, start + self._CHUNK)).sum(axis=0)
        self._known = (step, total)
        return total

    def batch(self, step: int, process_index: int = 0, process_count: int = 1) -> Features:
        """See `Source`."""
        local = local_rows(self.batch_size, process_index, process_count)
        before, here = self.counts(step), self._of_steps(step, step + 1)[0]
        task = np.repeat(np.arange(len(self.names)), here)
        ranges = zip(self._orders, before, before + here, strict=True)
        rows = np.concatenate([order.rows(int(a), int(b)) for order, a, b in ranges])
        mixed = np.random.default_rng([self._seed, 3, step]).permutation(self.batch_size)[local]
        return self._gather(task[mixed], rows[mixed])

    def _gather(self, task: np.ndarray, rows: np.ndarray) -> Features:
        first = self._features[0]
        batch = {key: np.empty((len(rows), *a.shape[1:]), a.dtype) for key, a in first.items()}
        for i, features in enumerate(self._features):
            places = np.flatnonzero(task == i)
            for key, values in features.items():
                batch[key][places] = values[rows[places]]
        return batch


def _described(features: Mapping[str, tuple[np.dtype, tuple[int, ...]]]) -> str:
    return ", ".join(f"{key} {dtype}{list(shape)}" for key, (dtype, shape) in features.items())


class Prefetch:
    """Iterates over make(start), make(start + 1) ... make(stop - 1), made ahead on a thread.

    An error of `make` is raised at its place. Use as a context manager: leaving stops the thread.
    """

    def __init__(self, make: Callable[[int], Any], start: int, stop: int, depth: int = 2) -> None:
        self._queue: queue.Queue[tuple[Any, BaseException | None]] = queue.Queue(depth)
        self._left = max(0, stop - start)
        self._closed = threading.Event()
        self._thread = threading.Thread(
            target=self._run, args=(make, start, stop), name="prefetch", daemon=True
        )
        self._thread.start()

    def _run(self, make: Callable[[int], Any], start: int, stop: int) -> None:
        for step in range(start, stop):
            try:
                item = (make(step), None)
            except BaseException as error:  # the reader raises it instead
                item = (None, error)
            if not self._put(item) or item[1] is not None:
                return

    def _put(self, item: tuple[Any, BaseException | None]) -> bool:
        while not self._closed.is_set():
            try:
                self._queue.put(item, timeout=0.1)
            except queue.Full:
                continue
            return True
        return False

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        if self._left == 0 or self._closed.is_set():
            raise StopIteration
        item, error = self._queue.get()
        if error is not None:
            self.close()
            raise error
        self._left -= 1
        return item

    def __enter__(self) -> Prefetch:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Stops the thread and waits for it; a second call does nothing."""
        self._closed.set()
        self._thread.join()
