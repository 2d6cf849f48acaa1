"""Queries with some of their tokens left out."""

from __future__ import annotations

import numpy as np
import pytest

from dgr_jax.special_tokens import EOS_ID
from dgr_jax.training.dropped_tokens import DroppedTokens
from dgr_jax.training.source import ArraySource

TEXT, MARKER = 100, 104


def source(queries=64, views=(), length=12, seed=0):
    """Queries with a marker in front, text of ids 10 to 99 and the end, then padding."""
    rng = np.random.default_rng(seed)
    tokens = np.zeros((queries, *views, length), np.int32)
    for query in tokens:
        words = rng.integers(10, TEXT, rng.integers(2, length - 1))
        query[..., 0], query[..., 1 : len(words) + 1] = MARKER, words
        query[..., len(words) + 1] = EOS_ID
    features = {"encoder_input_tokens": tokens, "number": np.arange(queries, dtype=np.int32)}
    return ArraySource(features, 32, seed=0)


def dropped(given, share=0.3):
    return DroppedTokens(given, share, text_tokens=TEXT, seed=5)


@pytest.mark.parametrize("views", [(), (3,)])
def test_text_is_left_out_and_what_stays_closes_up(views):
    given = source(views=views)
    before, after = given.batch(2), dropped(given).batch(2)
    np.testing.assert_array_equal(before["number"], after["number"])
    lost = []
    for whole, short in zip(
        before["encoder_input_tokens"], after["encoder_input_tokens"], strict=True
    ):
        for whole_view, view in zip(whole.reshape(-1, 12), short.reshape(-1, 12), strict=True):
            stays, was = view[view > 0].tolist(), iter(whole_view.tolist())
            assert all(token in was for token in stays)  # in their order
            assert view[: len(stays)].all() and stays[0] == MARKER and stays[-1] == EOS_ID
            assert len(stays) > 2
            lost.append(1 - (len(stays) - 2) / (np.count_nonzero(whole_view) - 2))
        assert (short == short.reshape(-1, 12)[0]).all()  # all views of a query alike
    assert 0.2 < np.mean(lost) < 0.4


def test_each_step_draws_anew_and_processes_agree():
    given = dropped(source())
    whole = given.batch(1)["encoder_input_tokens"]
    halves = [given.batch(1, process, 2)["encoder_input_tokens"] for process in (0, 1)]
    np.testing.assert_array_equal(np.concatenate(halves), whole)
    np.testing.assert_array_equal(given.batch(1)["encoder_input_tokens"], whole)
    # Two steps are an epoch of the same queries, in another order in the next.
    sums = {given.batch(step)["encoder_input_tokens"].sum() for step in (0, 2, 4)}
    assert len(sums) == 3


def test_parts_of_a_batch_are_drawn_for_themselves():
    class Two:
        def batch(self, step, process_index=0, process_count=1):
            return dict.fromkeys(("rank_list", "generation"), source().batch(step))

    parts = dropped(Two()).batch(0)
    queries = [parts[name]["encoder_input_tokens"] for name in ("rank_list", "generation")]
    assert (queries[0] != queries[1]).any()
