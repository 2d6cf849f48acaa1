"""Queries that come together are answered together; what waits is bounded, and can be given up."""

from __future__ import annotations

import asyncio
import threading
import time

import pytest

from dgr_jax.serving.batches import Batcher, Closed, Full, Late


class Doubles:
    """Answers 2 * item when `gate` is open; notes each batch."""

    def __init__(self):
        self.gate = threading.Event()
        self.gate.set()
        self.began = threading.Event()
        self.batches = []

    def __call__(self, items):
        self.began.set()
        self.gate.wait(5)
        self.batches.append(list(items))
        return [2 * item for item in items]


def run(work, *, most=4, patience=0.05, waiting=100):
    """Runs `work(batcher, answer)` in an event loop of its own."""
    answer = Doubles()

    async def inside():
        batcher = Batcher(most=most, patience=patience, waiting=waiting)
        batcher.start()
        try:
            return await work(batcher, answer)
        finally:
            answer.gate.set()
            await batcher.drain(5)

    return asyncio.run(inside()), answer


def test_what_comes_together_is_answered_together():
    async def work(batcher, answer):
        return await asyncio.gather(*(batcher.ask("a", answer, [i], 5) for i in range(6)))

    answers, answer = run(work)
    assert answers == [[0], [2], [4], [6], [8], [10]]
    assert answer.batches == [[0, 1, 2, 3], [4, 5]]


def test_a_full_batch_does_not_wait():
    async def work(batcher, answer):
        start = time.monotonic()
        await batcher.ask("a", answer, [1, 2, 3, 4], 5)
        return time.monotonic() - start

    seconds, _ = run(work, patience=30)
    assert seconds < 5


def test_one_waits_for_as_many_as_came_before_and_nobody_who_asks_alone_waits():
    async def work(batcher, answer):
        await asyncio.wait_for(batcher.ask("a", answer, [1], 50), 5)
        await asyncio.wait_for(batcher.ask("a", answer, [2, 3], 50), 5)
        waits = asyncio.create_task(batcher.ask("a", answer, [4], 50))
        await asyncio.sleep(0.05)
        assert not waits.done() and len(batcher) == 1
        await asyncio.wait_for(batcher.ask("a", answer, [5], 50), 5)
        await asyncio.wait_for(waits, 5)
        assert len(batcher) == 0

    _, answer = run(work, patience=30)
    assert answer.batches == [[1], [2, 3], [4, 5]]


def test_patience_ends():
    async def work(batcher, answer):
        await batcher.ask("a", answer, [1, 2], 5)
        return await batcher.ask("a", answer, [3], 5)

    answers, answer = run(work, patience=0.02)
    assert answers == [6] and answer.batches == [[1, 2], [3]]


def test_other_keys_are_other_batches_in_the_order_of_their_first():
    async def work(batcher, answer):
        asked = [("a", 1), ("b", 2), ("a", 3)]
        await asyncio.gather(*(batcher.ask(key, answer, [i], 5) for key, i in asked))

    _, answer = run(work)
    assert answer.batches == [[1, 3], [2]]


async def until(condition):
    for _ in range(500):
        if condition():
            return
        await asyncio.sleep(0.01)
    raise AssertionError("it never was")


def test_no_more_waits_than_is_allowed():
    async def work(batcher, answer):
        answer.gate.clear()
        first = asyncio.create_task(batcher.ask("a", answer, [0], 5))
        await until(answer.began.is_set)
        waits = asyncio.create_task(batcher.ask("a", answer, [1, 2], 5))
        await until(lambda: len(batcher) == 2)
        with pytest.raises(Full) as full:
            await batcher.ask("a", answer, [3, 4], 5)
        assert full.value.seconds >= 1
        last = asyncio.create_task(batcher.ask("a", answer, [5], 5))
        await until(lambda: len(batcher) == 3)
        answer.gate.set()
        return [await first, await waits, await last]

    answers, _ = run(work, waiting=3, patience=0)
    assert answers == [[0], [2, 4], [10]]


def test_who_is_late_or_cancelled_is_not_answered():
    async def work(batcher, answer):
        answer.gate.clear()
        first = asyncio.create_task(batcher.ask("a", answer, [0], 5))
        await until(answer.began.is_set)
        cancelled = asyncio.create_task(batcher.ask("a", answer, [1], 5))
        waits = asyncio.create_task(batcher.ask("a", answer, [2], 5))
        await until(lambda: len(batcher) == 2)
        cancelled.cancel()
        with pytest.raises(Late):
            await batcher.ask("a", answer, [3], 0.01)
        answer.gate.set()
        assert await first == [0] and await waits == [4]
        with pytest.raises(asyncio.CancelledError):
            await cancelled

    _, answer = run(work, patience=0)
    assert answer.batches == [[0], [2]]


def test_an_error_reaches_who_asked_and_nobody_else():
    def breaks(items):
        raise KeyError("x")

    async def work(batcher, answer):
        with pytest.raises(KeyError):
            await batcher.ask("b", breaks, [1], 5)
        return await batcher.ask("a", answer, [1], 5)

    assert run(work)[0] == [2]


def test_drained_it_answers_what_waits_and_takes_no_more():
    async def work(batcher, answer):
        answer.gate.clear()
        asked = [asyncio.create_task(batcher.ask("a", answer, [i], 5)) for i in range(6)]
        await until(lambda: len(batcher) == 2)
        drained = asyncio.create_task(batcher.drain(5))
        await asyncio.sleep(0.01)
        with pytest.raises(Closed):
            await batcher.ask("a", answer, [9], 5)
        answer.gate.set()
        await drained
        return await asyncio.gather(*asked)

    assert run(work)[0] == [[0], [2], [4], [6], [8], [10]]
