"""All identifiers scored: as the model says, as a beam as wide as the table, and what a narrower
one loses."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dgr_jax import partitioning
from dgr_jax.models.t5 import Transformer
from dgr_jax.retrieval import exhaustive
from dgr_jax.retrieval.exhaustive import (
    _ceilings,
    identifier_log_probs,
    lost,
    passages,
    recall_lost,
)
from dgr_jax.retrieval.generative import Search
from dgr_jax.retrieval.prefix_ceiling import PrefixCeiling
from tests import students
from tests.reference import exhaustive as reference
from tests.reference.retrieval import rank_passages

CODES = students.codes(40)
QUERIES = students.queries(6)
SEARCH = Search(num_beams=40, depth=40, batch_size=4, query_length=8)


@pytest.fixture(scope="module")
def decoder():
    return students.decoder(CODES, SEARCH)


@pytest.fixture(scope="module")
def log_probs(decoder):
    """f32 [6, U], in blocks of 7 identifiers, with a padded batch and a padded block."""
    return np.concatenate(list(identifier_log_probs(decoder, QUERIES, block=7)))


def token_logits(rows):
    """f32 [6, U, T, V]: the logits of every token of the rows for every query."""
    params = jax.tree.map(jnp.asarray, students.parameters(students.CONFIG))
    inputs = np.pad(rows[:, :-1], ((0, 0), (1, 0)))
    inputs = np.broadcast_to(inputs, (len(QUERIES), *inputs.shape))
    return np.asarray(
        jax.jit(Transformer(students.CONFIG).apply)({"params": params}, QUERIES, inputs)
    )


def test_log_probs_are_sums_over_tokens(decoder, log_probs):
    rows = decoder.table.tokens
    logits = token_logits(rows)
    expected = [
        [reference.log_prob(logits[q, u], row) for u, row in enumerate(rows.tolist())]
        for q in range(len(QUERIES))
    ]
    np.testing.assert_allclose(log_probs, expected, atol=2e-5)


def same(found, expected):
    np.testing.assert_array_equal(found[0], expected[0])
    np.testing.assert_allclose(found[1], expected[1], atol=5e-5)


def test_passages_are_ranked_by_their_best_identifier(decoder, log_probs):
    rows = np.argsort(-log_probs, axis=1)
    owners = [decoder.table.passages_of(row).tolist() for row in range(len(decoder.table))]
    scores = np.take_along_axis(log_probs, rows, 1)
    expected = rank_passages(rows.tolist(), scores.tolist(), owners, SEARCH.depth)
    indices, values = passages(decoder, QUERIES, block=7)
    assert indices.tolist() == [[passage for passage, _ in row] for row in expected]
    np.testing.assert_allclose(values, [[score for _, score in row] for row in expected])


OF_LENGTHS = np.unique(students.texts(30, 3), axis=0)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "renormalise"),
    [("lengths", False), ("shared", True), ("restricted", True), ("adaptive", False)],
)
def test_a_beam_as_wide_as_the_table_is_exhaustive(kind, renormalise):
    """Identifiers of several lengths; passages with several identifiers; some passages left out;
    output weights that depend on the prefix."""
    rows = OF_LENGTHS if kind == "lengths" else CODES
    owners = np.arange(len(rows)) // 3 if kind == "shared" else None
    search = dataclasses.replace(SEARCH, renormalise=renormalise, num_beams=len(rows))
    layers = 1 if kind == "adaptive" else 0
    config = dataclasses.replace(students.CONFIG, prefix_adaptive_layers=layers)
    decoder = students.decoder(rows, search, passages=owners, config=config)
    if kind == "restricted":
        decoder = decoder.restrict(np.arange(decoder.table.num_passages) % 3 == 0)
    found, expected = passages(decoder, QUERIES), decoder.passages(QUERIES)
    np.testing.assert_array_equal(found[0], expected[0])
    np.testing.assert_allclose(found[1], expected[1], atol=5e-5)


def test_renormalised_is_over_the_tokens_that_go_on():
    rows = OF_LENGTHS
    random = np.random.default_rng(0)
    by_prefix = {}
    logits = np.zeros((2, *rows.shape, 64))
    for u, row in enumerate(rows.tolist()):
        for t in range(len(row)):
            logits[:, u, t] = by_prefix.setdefault(tuple(row[:t]), random.normal(size=(2, 64)))
    log_probs = logits - np.logaddexp.reduce(logits, -1, keepdims=True)
    picked = np.take_along_axis(log_probs, rows[None, ..., None], -1)[..., 0]
    found = exhaustive.renormalised(np.where(rows > 0, picked, 0.0).astype(np.float32), rows)
    written = [[token for token in row if token] for row in rows.tolist()]
    expected = [
        [reference.log_prob(logits[q, u], row, written) for u, row in enumerate(written)]
        for q in range(2)
    ]
    np.testing.assert_allclose(found.sum(-1), expected, atol=1e-5)
    np.testing.assert_allclose(np.exp(found.sum(-1)).sum(-1), 1.0, atol=1e-5)


@pytest.mark.slow
def test_a_mesh_changes_nothing(log_probs):
    two = students.decoder(CODES, SEARCH, mesh=partitioning.Mesh(data=2), devices=2)
    found = np.concatenate(list(identifier_log_probs(two, QUERIES)))
    np.testing.assert_allclose(found, log_probs, atol=2e-5)


@pytest.mark.parametrize(
    ("rows", "size", "shape"), [(10, 7, (2, 5)), (10, 5, (2, 5)), (11, 5, (3, 4)), (3, 9, (1, 3))]
)
def test_blocks_are_as_even_as_can_be(rows, size, shape):
    values = np.arange(1, rows + 1)[:, None]
    blocks = exhaustive._blocks(values, size)
    assert blocks.shape == (*shape, 1)
    assert (blocks.reshape(-1, 1)[:rows] == values).all()
    assert not blocks.reshape(-1)[rows:].any()


EXACT = np.array([[3, 1, 2, 0], [5, 6, 4, -1]])


@pytest.mark.parametrize(
    ("found", "recall"),
    [
        ([[0, -1, -1, -1], [-1, -1, -1, -1]], 0.25),
        ([[0, 2, 1, -1], [4, 6, -1, -1]], 0.25),
        ([[9, 3, 2, 0], [5, 8, 4, 7]], 1.0),
        (EXACT, 1.0),
    ],
)
def test_what_is_lost_is_counted(found, recall):
    counted = lost(7, EXACT, np.array(found), [[0, 3], [5]])
    exact = [[3, 1, 2, 0], [5, 6, 4]]
    passages, first = reference.lost(exact, np.array(found).tolist())
    means = {name: values.mean() for name, values in counted.values().items()}
    expected = {"passages": passages, "first": first, "recall": recall, "exhaustive_recall": 1.0}
    assert means == pytest.approx(expected)
    assert list(lost(7, EXACT, np.array(found)).values()) == ["passages", "first"]


@pytest.mark.slow
def test_a_narrow_beam_loses_something_and_a_wide_one_nothing(decoder):
    exact = passages(decoder, QUERIES)[0][:, :5]
    positives = [[q, q + 9] for q in range(6)]
    narrow, wide = recall_lost(decoder, QUERIES, [3, 40], k=5, positives=positives)
    search = dataclasses.replace(SEARCH, num_beams=3)
    beam = dataclasses.replace(decoder, search=search).passages(QUERIES)[0][:, :5]
    shares = reference.lost(exact.tolist(), beam.tolist())
    assert narrow.num_beams == 3
    assert (narrow.passages.mean(), narrow.first.mean()) == pytest.approx(shares)
    assert narrow.passages.mean() > 0
    assert (wide.num_beams, wide.passages.any(), wide.first.any()) == (40, False, False)
    np.testing.assert_array_equal(wide.recall, wide.exhaustive_recall)
    np.testing.assert_array_equal(wide.recall, narrow.exhaustive_recall)
    assert (wide.ceiling == 1.0).all()
    ceiling = PrefixCeiling(decoder.table.tokens[decoder.table.rows_of_passages()])
    for spread in (0.9, 0.5):
        (narrow,) = recall_lost(decoder, QUERIES, [1], k=5, positives=positives, spread=spread)
        assert narrow.ceiling.tolist() == [ceiling(right, 1, 5, spread) for right in positives]


def test_the_ceiling_is_among_passages_that_may_be_returned(decoder):
    allowed = np.arange(40) != 9
    some = dataclasses.replace(decoder, allowed=allowed)
    found = _ceilings(some, [[0, 9], [9], [1, 1]], [40], 5, 0.9)
    assert found.tolist() == [[0.5, 0.0, 1.0]]


@pytest.mark.parametrize(
    ("tokens", "settings", "message"),
    [
        (np.zeros((0, 3)), {}, "recall_lost: got no queries, expected one or more"),
        (np.ones((2, 3)), {"k": 5}, "recall_lost: got k=5, expected 1 to 4, the depth"),
        (
            np.ones((2, 3)),
            {"k": 4, "positives": [[1], []]},
            "recall_lost: got positives of 1 queries, expected one or more of each of the 2",
        ),
        (
            np.ones((2, 3)),
            {"k": 4, "positives": [[1]] * 3},
            "recall_lost: got positives of 3 queries, expected one or more of each of the 2",
        ),
    ],
)
def test_what_cannot_be_compared(tokens, settings, message):
    with pytest.raises(ValueError) as caught:
        recall_lost(SimpleNamespace(search=Search(depth=4)), tokens, [1], **settings)
    assert str(caught.value) == message
