"""The device is a batch ahead of the host."""

from __future__ import annotations

from dgr_jax.retrieval.overlap import one_behind


def test_a_batch_is_read_once_the_next_is_started():
    log = []

    def started():
        for batch in "abc":
            log.append(f"start {batch}")
            yield batch

    for batch in one_behind(started()):
        log.append(f"read {batch}")
    assert log == ["start a", "start b", "read a", "start c", "read b", "read c"]
    assert list(one_behind([])) == []
