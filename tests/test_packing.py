"""Identifiers laid side by side, each that is no prefix of another once."""

from __future__ import annotations

import functools
import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dgr_jax.losses import ranking
from dgr_jax.training import packing
from dgr_jax.training.objectives import Distillation
from dgr_jax.training.packing import PackedLists
from dgr_jax.training.plan_losses import CodeLoss
from dgr_jax.training.source import ArraySource
from tests import toy

T = 6


def lists_of(seed, count=4, passages=3, identifiers=5, symbols=2):
    """Lists of few symbols, so that many identifiers are equal or prefixes; some are empty."""
    rng = np.random.default_rng(seed)
    shape = (count, passages, identifiers)
    tokens = rng.integers(1, symbols + 1, (*shape, T)).astype(np.int32)
    # Of a token beyond one byte, which order must hold for.
    tokens *= rng.choice([1, 300])
    tokens = np.where(np.arange(T) < rng.integers(0, T + 1, (*shape, 1)), tokens, 0)
    return {
        "identifier_tokens": tokens,
        "identifier_views": rng.integers(0, 3, shape).astype(np.int32),
    }


def needed(lists, number):
    """{(view, tokens)} that are no prefix of another, of one list."""
    tokens, views = (lists[k][number] for k in ("identifier_tokens", "identifier_views"))
    own = {
        (int(view), tuple(row[row > 0].tolist()))
        for view, row in zip(views.ravel(), tokens.reshape(-1, T), strict=True)
        if row.any()
    }
    return {
        (view, row)
        for view, row in own
        if not any(v == view and len(o) > len(row) and o[: len(row)] == row for v, o in own)
    }


def check(lists, made):
    """Every identifier reads its own tokens; a row holds what is needed, once, and nothing else."""
    tokens, views = lists["identifier_tokens"], lists["identifier_views"]
    laid, segments, starts = (made[f"packed_{k}"] for k in ("tokens", "segments", "starts"))
    width = laid.shape[-1]
    np.testing.assert_array_equal(laid > 0, segments > 0)
    for number in range(len(tokens)):
        flat, of_token = laid[number].ravel(), segments[number].ravel()
        for place in np.ndindex(tokens.shape[1:3]):
            row, start = tokens[number][place], starts[number][place]
            length = int((row > 0).sum())
            if not length:
                continue
            np.testing.assert_array_equal(flat[start : start + length], row[:length])
            own = of_token[start]
            assert (of_token[start : start + length] == own).all()
            assert start % width == 0 or of_token[start - 1] != own  # nothing of it lies before
            assert start // width == (start + length - 1) // width
            assert views[number].ravel()[own - 1] == views[number][place]
        found = [
            (int(views[number].ravel()[own - 1]), tuple(flat[of_token == own].tolist()))
            for own in np.unique(of_token[of_token > 0])
        ]
        assert len(found) == len(set(found)) and set(found) == needed(lists, number)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 4), st.sampled_from([T, 8, 16]))
def test_identifiers_lie_in_rows(seed, symbols, width):
    lists = lists_of(seed, symbols=symbols)
    tokens, views = lists["identifier_tokens"], lists["identifier_views"]
    flat = tokens.reshape(len(tokens), -1, T)
    rows = packing.places(flat, views.reshape(flat.shape[:2]), width).rows
    for number, of_list in enumerate(rows.tolist()):
        total = sum(len(row) for _, row in needed(lists, number))
        assert -(-total // width) <= of_list <= max(1, -(-2 * total // width))
    most = max(1, int(rows.max()))
    check(lists, packing.packed(tokens, views, most, width))
    if rows.max() > 1:
        with pytest.raises(ValueError, match=f"that fills {most} rows .* expected {most - 1} or"):
            packing.packed(tokens, views, most - 1, width)


def test_empty_lists_take_nothing():
    tokens, views = np.zeros((2, 2, 3, T), np.int32), np.ones((2, 2, 3), np.int32)
    made = packing.packed(tokens, views, 1, 8)
    assert not made["packed_tokens"].any() and not made["packed_starts"].any()


def test_batches_have_the_rows_of_the_largest_list(caplog, monkeypatch):
    monkeypatch.setattr(packing, "_BLOCK", 4)
    lists = lists_of(1, count=11, passages=8, identifiers=9, symbols=4)
    lists["identifier_tokens"][7, :, 3:] = 0
    tokens, views = lists["identifier_tokens"], lists["identifier_views"]
    rows = packing.rows_needed(tokens, views)
    assert rows == packing.places(tokens.reshape(11, -1, T), views.reshape(11, -1), 64).rows.max()
    assert rows > packing.rows_needed(tokens[7:8], views[7:8])
    with caplog.at_level(logging.INFO):
        source = PackedLists(ArraySource(lists, 3, seed=0), tokens.shape[1:], rows)
    share = round(100 * rows * 64 / (8 * 9 * T))
    assert f"in {rows} rows of 64 tokens, {share}% of what they take apart" in caplog.text
    for step in range(5):
        batch = source.batch(step)
        assert batch["packed_tokens"].shape == (3, rows, 64)
        check(batch, batch)
    parts = [source._lists.batch(4, i, 3) for i in range(3)]
    whole = np.concatenate([part["identifier_tokens"] for part in parts])
    np.testing.assert_array_equal(whole, batch["identifier_tokens"])


def test_rows_hold_two_of_the_longest():
    assert [packing.width_for(length) for length in (1, 22, 32, 33, 40)] == [64, 64, 64, 72, 80]


class Chain(toy.Toy):
    """A token's state is a sum over those before it in its segment, weighed by their distance."""

    def decode(self, encoded, queries, inputs, deterministic=True, segments=None):
        place = jnp.arange(inputs.shape[-1])
        weights = jnp.tril(0.5 ** jnp.abs(place[:, None] - place))
        if segments is not None:
            weights = weights * (segments[..., :, None] == segments[..., None, :])
        before = weights @ self.embedding[inputs]
        return jnp.tanh((before + encoded.sum(axis=1)[:, None, None]) @ self.kernel)


def test_docids_side_by_side_have_the_same_loss_and_gradients():
    """With the target of each query in a row of its own."""
    lists = toy.rank_lists(2, passages=5)
    lists["identifier_tokens"] = np.pad(lists["identifier_tokens"], [(0, 0)] * 3 + [(0, 3)])
    lists["identifier_tokens"][:, ::2, :, 2:5] = [7, 9, 3]
    objective = Distillation(ranking.distilled_ranknet, pack_docids=True)
    loss = objective.loss_fn(Chain())

    @jax.jit
    def compute(params, lists):
        total = lambda params: loss(params, {"rank_list": lists}, jax.random.key(0))[0]
        return jax.value_and_grad(total)(params)

    tokens = lists["identifier_tokens"]
    source = PackedLists(ArraySource(lists, 2, 0), tokens.shape[1:], packing.rows_needed(tokens))
    packed = source.batch(0)
    assert packed["packed_tokens"].shape == (2, 1, 64)
    apart = {name: leaf for name, leaf in packed.items() if not name.startswith("packed")}
    close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-4)
    jax.tree.map(close, compute(toy.params(), packed), compute(toy.params(), apart))


def test_docids_that_cannot_be_packed_are_refused():
    with pytest.raises(ValueError, match="Distillation.pack_docids: got True with a plan that is"):
        Distillation(ranking.distilled_ranknet, pack_docids=True, plan=CodeLoss())
