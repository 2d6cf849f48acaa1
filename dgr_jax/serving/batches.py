"""Queries that come at about the same time, answered together."""

from __future__ import annotations

import asyncio
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


@dataclass(frozen=True)
class _Waiting:
    key: Hashable
    answer: Answer
    item: Any
    answered: asyncio.Future
    since: float


class Batcher:
    """A queue in one event loop, whose batches are answered one after another in one thread.

    While a batch is answered, others gather. The first one to come to an idle thread waits
    `patience` seconds for more, less where a batch is full before.

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
        self._came = asyncio.Event()
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
        return sum(not waiting.answered.done() for waiting in self._queue)

    async def ask(
        self, key: Hashable, answer: Answer, items: Sequence[Any], seconds: float
    ) -> list[Any]:
        """The answers of the items, each answered with others of the same key.

        Raises Full where there is no room for all, Late after so many seconds, Closed after
        `drain`, and what `answer` raises. Whoever is cancelled, or late, does not wait any more.
        """
        if self._closed:
            raise Closed
        if len(self) + len(items) > self.waiting:
            batches = -(-self.waiting // self.most)
            raise Full(max(1, round(batches * self._seconds)))
        loop, now = asyncio.get_running_loop(), time.monotonic()
        asked = [_Waiting(key, answer, item, loop.create_future(), now) for item in items]
        self._queue.extend(asked)
        self._idle.clear()
        self._came.set()
        try:
            async with asyncio.timeout(seconds):
                return list(await asyncio.gather(*(waiting.answered for waiting in asked)))
        except TimeoutError as error:
            raise Late from error
        finally:
            for waiting in asked:
                waiting.answered.cancel()

    async def drain(self, seconds: float) -> None:
        """Takes nothing more, and returns when all that waits is answered, or is late."""
        self._closed = True
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
        """Waits until a batch is full, or its first item has waited long enough."""
        while self._queue and len(self) < self.most:
            left = self._queue[0].since + self.patience - time.monotonic()
            if left <= 0 or self._closed:
                return
            await asyncio.sleep(min(left, 0.001))

    def _next(self) -> list[_Waiting]:
        """The longest waiting item, and those that can be answered with it; they leave the queue,
        with those that nobody waits for."""
        there = [waiting for waiting in self._queue if not waiting.answered.done()]
        same = (waiting for waiting in there if waiting.key == there[0].key)
        batch = list(itertools.islice(same, self.most))
        taken = set(map(id, batch))
        self._queue = deque(waiting for waiting in there if id(waiting) not in taken)
        return batch


def _settle(answered: asyncio.Future, answer: Any) -> None:
    if answered.done():
        return
    if isinstance(answer, Exception):
        answered.set_exception(answer)
    else:
        answered.set_result(answer)
