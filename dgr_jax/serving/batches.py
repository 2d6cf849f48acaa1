"""Queries that come at about the same time, answered together."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import time
from collections import deque
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

Answer = Callable[[Sequence[Any]], Sequence[Any]]


class Full(Exception):
    """So much waits that no more is taken. seconds: when to try again."""

    def __init__(self, seconds: int) -> None:
        super().__init__(seconds)
        self.seconds = seconds


class Late(Exception):
    """The deadline passed before the answer was there."""


class Closed(Exception):
    """The service ends; nothing more is taken."""


@dataclass(slots=True)
class _Waiting:
    key: Hashable
    answer: Answer
    item: Any
    answered: asyncio.Future
    since: float
    taken: bool = False  # out of the queue, or nobody waits for it


class Batcher:
    """A queue in one event loop, whose batches are answered one after another in one thread.

    While a batch is answered, others gather. The first one to come to an idle thread waits for as
    many as the last batch had, `patience` seconds at most: who asks alone is answered at once.

    most: items that are answered together. waiting: items that may wait.
    on_batch: is told the size of each batch.
    """

    def __init__(
        self,
        *,
        most: int,
        patience: float,
        waiting: int,
        on_batch: Callable[[int], None] = lambda size: None,
    ) -> None:
        self.most, self.patience, self.waiting = most, patience, waiting
        self._on_batch = on_batch
        self._queue: deque[_Waiting] = deque()
        self._waits = 0  # of the queue, those that somebody waits for
        self._expected = 1  # items that are worth waiting for
        self._came = asyncio.Event()  # there are any
        self._enough = asyncio.Event()  # there are as many as expected
        self._idle = asyncio.Event()
        self._idle.set()
        self._closed = False
        self._thread = ThreadPoolExecutor(1, "answers")
        self._seconds = 0.1  # what a batch has taken of late
        self._task: asyncio.Task | None = None

    def start(self) -> None:
        """Begins to answer; to be called in the event loop."""
        self._task = asyncio.create_task(self._run())

    def __len__(self) -> int:
        """Items that wait."""
        return self._waits

    async def ask(
        self, key: Hashable, answer: Answer, items: Sequence[Any], seconds: float
    ) -> list[Any]:
        """The answers of the items, each answered with others of the same key.

        Raises Full where there is no room for all, Late after so many seconds, Closed after
        `drain`, and what `answer` raises. Whoever is cancelled, or late, does not wait any more.
        """
        if self._closed:
            raise Closed
        if self._waits + len(items) > self.waiting:
            batches = -(-self.waiting // self.most)
            raise Full(max(1, round(batches * self._seconds)))
        loop, now = asyncio.get_running_loop(), time.monotonic()
        asked = [_Waiting(key, answer, item, loop.create_future(), now) for item in items]
        self._queue.extend(asked)
        self._waits += len(asked)
        self._idle.clear()
        self._came.set()
        if self._waits >= self._expected:
            self._enough.set()
        try:
            async with asyncio.timeout(seconds):
                return list(await asyncio.gather(*(waiting.answered for waiting in asked)))
        except TimeoutError as error:
            raise Late from error
        finally:
            for waiting in asked:
                waiting.answered.cancel()
                self._take(waiting)

    def _take(self, waiting: _Waiting) -> None:
        self._waits -= not waiting.taken
        waiting.taken = True

    async def drain(self, seconds: float) -> None:
        """Takes nothing more, and returns when all that waits is answered, or is late."""
        self._closed = True
        self._enough.set()
        try:
            async with asyncio.timeout(seconds):
                await self._idle.wait()
        except TimeoutError:
            pass
        if self._task is not None:
            self._task.cancel()
        self._thread.shutdown(wait=False, cancel_futures=True)

    async def _run(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            await self._came.wait()
            await self._gather()
            batch = self._next()
            if batch:
                start, items = time.monotonic(), [waiting.item for waiting in batch]
                try:
                    answers = await loop.run_in_executor(self._thread, batch[0].answer, items)
                except Exception as error:
                    answers = [error] * len(batch)
                self._seconds = 0.9 * self._seconds + 0.1 * (time.monotonic() - start)
                self._on_batch(len(batch))
                for waiting, answer in zip(batch, answers, strict=True):
                    _settle(waiting.answered, answer)
            if not self._queue:
                self._came.clear()
                self._idle.set()

    async def _gather(self) -> None:
        """Waits until as many are there as the last batch had, or the first has waited enough."""
        while self._queue and self._waits < self._expected and not self._closed:
            left = self._queue[0].since + self.patience - time.monotonic()
            if left <= 0:
                return
            self._enough.clear()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(left):
                    await self._enough.wait()

    def _next(self) -> list[_Waiting]:
        """The longest waiting item, and those that can be answered with it; they leave the queue,
        with those that nobody waits for."""
        there = [waiting for waiting in self._queue if not waiting.taken]
        same = (waiting for waiting in there if waiting.key == there[0].key)
        batch = list(itertools.islice(same, self.most))
        for waiting in batch:
            self._take(waiting)
        self._queue = deque(waiting for waiting in there if not waiting.taken)
        self._expected = len(batch)
        return batch


def _settle(answered: asyncio.Future, answer: Any) -> None:
    if answered.done():
        return
    if isinstance(answer, Exception):
        answered.set_exception(answer)
    else:
        answered.set_result(answer)
