"""Beam search against exhaustive scoring and a plain beam search."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dgr_jax.decoding import constraint as constraints
from dgr_jax.decoding import trie, trie_build
from dgr_jax.decoding.beam_search import beam_search, sample
from tests.reference import decoding as reference

VOCAB = 12
WIDTH = 4
EOS = 1
_RNG = np.random.default_rng(7)
_EMBED = _RNG.normal(size=(VOCAB, WIDTH)).astype(np.float32)
_MIX = _RNG.normal(size=(WIDTH, WIDTH)).astype(np.float32)
_OUT = 3 * _RNG.normal(size=(WIDTH, VOCAB)).astype(np.float32)
_QUERY = _RNG.normal(size=(3, WIDTH)).astype(np.float32)


def model(query, prefix):
    """A recurrent model whose memory is what beam search must reorder."""
    memory = _QUERY[query].astype(np.float64)
    for token in (0, *prefix):
        memory = np.tanh(memory @ _MIX + _EMBED[token])
    return memory @ _OUT


def step_fn(tokens, cache, position):
    memory = jnp.tanh(cache["memory"] @ _MIX + jnp.asarray(_EMBED)[tokens])
    return memory @ _OUT, {"memory": memory}


def start(batch, beams):
    return {"memory": jnp.repeat(jnp.asarray(_QUERY[:batch])[:, None], beams, 1)}


@functools.partial(jax.jit, static_argnames=("batch_size", "num_beams", "length_penalty", "step"))
def search(constraint, *, batch_size, num_beams, length_penalty=0.0, step=step_fn):
    return beam_search(
        step,
        constraint,
        start(batch_size, num_beams),
        batch_size=batch_size,
        num_beams=num_beams,
        length_penalty=length_penalty,
    )


def ragged(rows):
    lengths = np.array([len(row) for row in rows])
    out = np.zeros((len(rows), max(lengths.max(), 1)), np.int32)
    for i, row in enumerate(rows):
        out[i, : len(row)] = row
    return out, lengths


def same_results(result, expected, beams, index):
    """expected: per query [(row, log_prob)], best first."""
    result = jax.tree.map(np.asarray, result)
    for query, best in enumerate(expected):
        assert result.valid[query].tolist() == [i < len(best) for i in range(beams)]
        found = [
            tuple(row[:n])
            for row, n in zip(result.tokens[query], [len(row) for row, _ in best], strict=False)
        ]
        log_probs = np.array([log_prob for _, log_prob in best])
        np.testing.assert_allclose(result.log_probs[query][: len(best)], log_probs, atol=2e-4)
        assert found == [row for row, _ in best]
        assert (result.log_probs[query][len(best) :] == -np.inf).all()
        assert (result.tokens[query][len(best) :] == 0).all()
        assert (result.rows[query][len(best) :] == -1).all()
        table, lengths = index.rows()
        for (row, _), table_row in zip(best, index.table_rows(result.rows[query]), strict=False):
            assert tuple(table[table_row, : lengths[table_row]]) == row


def sets_of(lengths):
    """Rows of the given lengths, and two anchors so that all sets share a few compilations."""
    rows = st.lists(lengths.flatmap(lambda n: tokens(n)), max_size=12)
    return rows.map(lambda rows: [*rows, [11, 11, 11, 11], [2, 2, 2, 2]])


def tokens(n):
    return st.lists(st.integers(2, VOCAB - 1), min_size=n, max_size=n)


def build(rows, narrow=64, eos_id=None):
    """An index whose wide paths are taken by nodes of more than `narrow` children."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trie_build, "NARROW", narrow)
        patch.setattr(trie_build, "WIDEST_GATHER", 2 * narrow)
        return trie.build(*ragged(rows), eos_id=eos_id, vocab_size=VOCAB)


many = settings(max_examples=25, deadline=None)


@pytest.mark.parametrize(("narrow", "renormalise"), [(1, False), (1, True), (64, True)])
@many
@given(rows=sets_of(st.integers(1, 4)))
def test_wide_enough_is_exhaustive_where_identifiers_are_prefixes_of_others(
    narrow, renormalise, rows
):
    index = build(rows, narrow, eos_id=EOS)
    result = search(index.constraint(renormalise=renormalise), batch_size=2, num_beams=16)
    legal = reference.unique_rows(rows, eos_id=EOS)
    expected = [reference.exhaustive(model, q, legal, renormalise) for q in range(2)]
    same_results(result, expected, 16, index)


@pytest.mark.parametrize(("narrow", "beams", "penalty"), [(1, 3, 0.0), (1, 1, 0.0), (64, 3, 1.0)])
@many
@given(rows=sets_of(st.integers(1, 4)))
def test_narrow_beams_follow_the_definition(narrow, beams, penalty, rows):
    index = build(rows, narrow, eos_id=EOS)
    result = search(index.constraint(), batch_size=2, num_beams=beams, length_penalty=penalty)
    legal = reference.unique_rows(rows, eos_id=EOS)
    expected = [
        reference.beam_search(model, q, legal, beams, length_penalty=penalty) for q in range(2)
    ]
    same_results(result, expected, beams, index)


@pytest.mark.parametrize(("narrow", "beams"), [(1, 2), (64, 16)])
@many
@given(rows=sets_of(st.just(4)))
def test_fixed_length_without_closing_token(narrow, beams, rows):
    index = build(rows, narrow)
    assert index.layout.ends == "fixed"
    result = search(index.constraint(), batch_size=2, num_beams=beams)
    legal = reference.unique_rows(rows)
    expected = [reference.beam_search(model, q, legal, beams) for q in range(2)]
    same_results(result, expected, beams, index)
