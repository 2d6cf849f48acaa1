"""Beam search against exhaustive scoring and a plain beam search."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from dgr_jax.decoding import constraint as constraints
from dgr_jax.decoding import trie, trie_build
from dgr_jax.decoding.beam_search import beam_search, score_by_token
from dgr_jax.decoding.sampling import sample
from dgr_jax.decoding.trie_expand import TrieConstraint
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


def score_fn(inputs, targets, cache, position):
    """Log-probabilities of several tokens of every beam, step by step."""
    found = []
    for t in range(inputs.shape[-1]):
        logits, cache = step_fn(inputs[..., t], cache, position + t)
        found.append(logits)
    return score_by_token(lambda logits: logits, jnp.stack(found, 2), targets)


def start(batch, beams):
    return {"memory": jnp.repeat(jnp.asarray(_QUERY[:batch])[:, None], beams, 1)}


compiled = functools.partial(  # quick to compile, slow to run
    jax.jit, compiler_options={"xla_backend_optimization_level": 0}
)


@functools.partial(
    compiled,
    static_argnames=("step", "score", "batch_size", "num_beams", "length_penalty", "max_length"),
)
def search(
    constraint,
    *,
    step=step_fn,
    score=None,
    batch_size=2,
    num_beams,
    length_penalty=0.0,
    max_length=None,
):
    return beam_search(
        step,
        constraint,
        start(batch_size, num_beams),
        batch_size=batch_size,
        num_beams=num_beams,
        max_length=max_length,
        length_penalty=length_penalty,
        score_fn=score,
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


def sets_of(lengths, *also):
    """Rows of the given lengths, and anchors so that all sets share a few compilations."""
    rows = st.lists(lengths.flatmap(tokens), max_size=12)
    return rows.map(lambda rows: [*rows, [11, 11, 11, 11], [2, 2, 2, 2], *also])


def tokens(n):
    return st.lists(st.integers(2, VOCAB - 1), min_size=n, max_size=n)


def build(rows, narrow=64, eos_id=None):
    """An index whose wide paths are taken by nodes of more than `narrow` children."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trie_build, "GATHERS", (narrow,))
        patch.setattr(trie_build, "WIDEST_GATHER", 2 * narrow)
        return trie.build(*ragged(rows), eos_id=eos_id, vocab_size=VOCAB)


many = settings(max_examples=15, deadline=None)
slow = functools.partial(pytest.param, marks=pytest.mark.slow)


@pytest.mark.parametrize(("narrow", "renormalise"), [(1, False), slow(64, True)])
@many
@given(rows=sets_of(st.integers(1, 4), [5]))
def test_wide_enough_is_exhaustive_where_identifiers_are_prefixes_of_others(
    narrow, renormalise, rows
):
    index = build(rows, narrow, eos_id=EOS)
    result = search(index.constraint(renormalise=renormalise), num_beams=16)
    legal = reference.unique_rows(rows, eos_id=EOS)
    expected = [reference.exhaustive(model, q, legal, renormalise) for q in range(2)]
    same_results(result, expected, 16, index)


@pytest.mark.parametrize(("narrow", "beams", "penalty"), [(1, 3, 0.0), slow(64, 1, 1.0)])
@many
@given(rows=sets_of(st.integers(1, 4), [5]))
def test_narrow_beams_follow_the_definition(narrow, beams, penalty, rows):
    index = build(rows, narrow, eos_id=EOS)
    result = search(index.constraint(), num_beams=beams, length_penalty=penalty)
    legal = reference.unique_rows(rows, eos_id=EOS)
    expected = [
        reference.beam_search(model, q, legal, beams, length_penalty=penalty) for q in range(2)
    ]
    same_results(result, expected, beams, index)


@many
@given(rows=sets_of(st.just(4)))
def test_fixed_length_without_closing_token(rows):
    index = build(rows, 1)
    assert index.layout.ends == "fixed"
    result = search(index.constraint(), num_beams=5)
    legal = reference.unique_rows(rows)
    expected = [reference.beam_search(model, q, legal, 5) for q in range(2)]
    same_results(result, expected, 5, index)


@pytest.mark.parametrize("rows", [slow([[5, 6, 7]]), slow([[5]]), [[3, 4], [5], [6, 7, 8]]])
def test_one_passage_and_prefix_free_rows_of_several_lengths(rows):
    index = build(rows)
    result = search(index.constraint(), num_beams=4)
    legal = reference.unique_rows(rows)
    same_results(result, [reference.exhaustive(model, q, legal) for q in range(2)], 4, index)


@pytest.mark.parametrize("penalty", [2.0, slow(-1.0)])
def test_a_length_penalty_orders_and_reports_true_log_probs(penalty):
    rows = [[7], [7, 3], [7, 3, 9, 9], [4, 5, 5], [2]]
    index = build(rows, eos_id=EOS)
    result = search(index.constraint(), num_beams=6, length_penalty=penalty)
    legal = reference.unique_rows(rows, eos_id=EOS)
    expected = [reference.exhaustive(model, q, legal, False, penalty) for q in range(2)]
    assert [row for row, _ in expected[0]] != [
        row for row, _ in reference.exhaustive(model, 0, legal)
    ]
    same_results(result, expected, 6, index)


def test_bfloat16_logits_are_accumulated_in_float32():
    rows = [[a, b, c] for a in (2, 5, 9) for b in (3, 4) for c in (6, 7)]

    def step(tokens, cache, position):
        logits, cache = step_fn(tokens, cache, position)
        return logits.astype(jnp.bfloat16), cache

    def rounded(query, prefix):
        return np.asarray(jnp.asarray(model(query, prefix), jnp.bfloat16), np.float64)

    index = build(rows)
    result = search(index.constraint(), step=step, num_beams=12)
    assert result.log_probs.dtype == jnp.float32
    log_probs = dict(reference.exhaustive(rounded, 0, reference.unique_rows(rows)))
    for row, log_prob in zip(np.asarray(result.tokens[0]), result.log_probs[0], strict=True):
        assert log_probs[tuple(row.tolist())] == pytest.approx(float(log_prob), abs=2e-2)


def flat_step(tokens, cache, position):
    return jnp.zeros((*tokens.shape, VOCAB)), cache


@pytest.mark.parametrize("narrow", [slow(1), 64])
def test_ties_go_to_the_smaller_tokens(narrow):
    rows = [[a, b] for a in range(2, VOCAB) for b in range(2, VOCAB)]
    index = build(rows, narrow)
    result = search(index.constraint(), step=flat_step, num_beams=7)
    assert result.tokens[1].tolist() == sorted(rows)[:7]
    index = build([row[: 1 + sum(row) % 2] for row in rows], narrow, eos_id=EOS)
    result = search(index.constraint(), step=flat_step, num_beams=5)
    legal = reference.unique_rows([row[: 1 + sum(row) % 2] for row in rows], eos_id=EOS)
    expected = reference.beam_search(lambda *_: np.zeros(VOCAB), 0, legal, 5)
    same_results(result, [expected, expected], 5, index)


@pytest.mark.slow
def test_a_thousand_beams():
    rows = np.random.default_rng(0).integers(2, VOCAB, (300, 4)).tolist()
    index = build(rows)
    result = search(index.constraint(), batch_size=1, num_beams=1000)
    legal = reference.unique_rows(rows)
    assert int(result.valid.sum()) == len(legal)
    same_results(result, [reference.exhaustive(model, 0, legal)], 1000, index)


def test_sequences_that_have_not_ended_are_dropped():
    rows = [[5], [6, 7], [8, 9, 10]]
    index = build(rows, eos_id=EOS)
    result = search(index.constraint(), num_beams=3, max_length=2)
    assert result.tokens.shape == (2, 3, 2)
    assert result.valid.tolist() == [[True, False, False]] * 2
    assert result.tokens[0, 0].tolist() == [5, EOS]


def test_stops_when_no_live_beam_can_reach_the_finished_ones():
    """Logits are NaN from step 2 on: reading them would show."""
    rows = [[5], [6], [7, 7, 7, 7]]

    def step(tokens, cache, position):
        logits = jnp.zeros(VOCAB).at[7].set(-10.0)
        logits = jnp.where(position < 2, logits, jnp.nan)
        return jnp.broadcast_to(logits, (*tokens.shape, VOCAB)), cache

    result = search(build(rows, eos_id=EOS).constraint(), step=step, num_beams=2)
    assert result.tokens[0, :, 0].tolist() == [5, 6]
    assert np.isfinite(result.log_probs).all()


def search_ahead(constraint, **settings):
    """A search that scores up to 4 tokens at once, which so small an index would not be worth."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TrieConstraint, "completion_width", 4)
        return search(constraint, score=score_fn, **settings)


ANCHORS = [[2] * 7, [11] * 7, [11] * 3 + [2]]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("ends", "penalty", "renormalise"),
    [("token", 1.0, False), ("fixed", 0.0, False), ("mixed", 0.0, True), ("token", 0.0, False)],
)
@many
@given(data=st.data())
def test_what_is_decided_is_scored_at_once(ends, penalty, renormalise, data):
    lengths = st.just(7) if ends == "fixed" else st.integers(1, 7)
    rows = data.draw(st.lists(lengths.flatmap(tokens), max_size=9))
    if ends == "mixed":  # none is a prefix of another
        rows = [row for row in rows if row[0] not in (2, 11)]
        rows = [row for row in rows if not any(row[: len(r)] == r != row for r in rows)]
    rows += ANCHORS[: 2 if ends == "fixed" else 3]
    index = build(rows, 1, eos_id=EOS if ends == "token" else None)
    assert index.layout.ends == ends
    constraint = index.constraint(renormalise=renormalise)
    settings = dict(num_beams=3, length_penalty=penalty)
    result = search_ahead(constraint, **settings)
    by_steps = search(constraint, **settings)
    for name in ("tokens", "rows", "valid"):
        assert getattr(result, name).tolist() == getattr(by_steps, name).tolist()
    np.testing.assert_allclose(result.log_probs, by_steps.log_probs, atol=1e-5)
    np.testing.assert_array_equal(index.table_rows(result.rows) >= 0, result.valid)


@pytest.mark.parametrize(
    ("count", "length", "fixed", "mixed"), [(7, 7, 4, 0), (2000, 12, 9, 11), (7, 4, 0, 0)]
)
def test_how_many_tokens_one_pass_scores(count, length, fixed, mixed):
    rows = np.random.default_rng(0).integers(2, VOCAB, (count, length))
    assert trie.build(rows, vocab_size=VOCAB).constraint().completion_width == fixed
    lengths = np.resize([2, length], count)
    text = trie.build(rows, lengths, eos_id=EOS, vocab_size=VOCAB).constraint()
    assert (text.max_length > length, text.completion_width) == (True, mixed)


def test_no_step_is_taken_where_nothing_is_left_to_choose():
    """Of seven tokens the first decides; logits of the last steps are NaN."""
    rows = [[a] + [2 + (a + i) % 9 for i in range(6)] for a in range(2, 9)]
    constraint = build(rows, 1).constraint()

    def step(tokens, cache, position):
        logits, cache = step_fn(tokens, cache, position)
        return jnp.where(position < 7 - constraint.completion_width, logits, jnp.nan), cache

    result = search(constraint, step=step, score=score_fn, num_beams=4)
    legal = reference.unique_rows(rows)
    for query in range(2):
        expected = reference.beam_search(model, query, legal, 4)
        assert [tuple(row) for row in result.tokens[query].tolist()] == [r for r, _ in expected]
        np.testing.assert_allclose(result.log_probs[query], [p for _, p in expected], atol=2e-4)


@pytest.mark.slow
@pytest.mark.parametrize("max_length", [4, 6])
def test_rest_beyond_the_longest_sequence_is_dropped(max_length):
    rows = [[a] + [5] * (a % 4 + 1) for a in range(2, 9)]
    constraint = build(rows, 1, eos_id=EOS).constraint()
    settings = dict(num_beams=5, max_length=max_length)
    result, expected = (
        search(constraint, score=score_fn, **settings),
        search(constraint, **settings),
    )
    assert result.valid.tolist() == expected.valid.tolist()
    assert result.tokens.tolist() == expected.tokens.tolist()


def test_unconstrained_with_and_without_closing_token():
    def logits(query, prefix):
        return model(query, prefix)[:5]

    def step(tokens, cache, position):
        scores, cache = step_fn(tokens, cache, position)
        return scores[..., :5], cache

    every = [(a, b, c) for a in range(5) for b in range(5) for c in range(5)]
    result = search(constraints.Unconstrained(3), step=step, num_beams=4)
    expected = [reference.beam_search(logits, q, every, 4) for q in range(2)]
    closed = {(*row[: row.index(EOS)], EOS) for row in every if EOS in row}
    for query, best in enumerate(expected):
        assert [tuple(row) for row in result.tokens[query].tolist()] == [row for row, _ in best]
        np.testing.assert_allclose(result.log_probs[query], [x for _, x in best], atol=1e-4)
    result = search(constraints.Unconstrained(3, eos_id=EOS), step=step, num_beams=30)
    expected = reference.exhaustive(logits, 0, sorted(closed))
    found = [
        tuple(row[: row.index(EOS) + 1])
        for row, ok in zip(result.tokens[0].tolist(), result.valid[0], strict=True)
        if ok
    ]
    assert found == [row for row, _ in expected][: len(found)]
    assert len(found) == min(30, len(closed))


def test_a_new_index_does_not_compile_again():
    index = build([[a, b, 3, 3] for a in range(2, 9) for b in range(2, 9)], 1)
    search(index.constraint(), num_beams=5)
    count = search._cache_size()
    other = search(build([[5, b, 3, 3] for b in range(2, 9)], 1).constraint(), num_beams=5)
    part = index.restrict(np.arange(49) == 48)
    result = search(part.constraint(), num_beams=5)
    assert search._cache_size() == count
    assert other.tokens[0, :, 0].tolist() == [5] * 5
    assert result.tokens[0].tolist() == [[8, 8, 3, 3], *[[0] * 4] * 4]


@functools.partial(compiled, static_argnames=("num_samples", "temperature", "best_tokens"))
def draw(constraint, key, *, num_samples, **settings):
    cache = start(1, num_samples)
    return sample(
        step_fn, constraint, cache, key=key, batch_size=1, num_samples=num_samples, **settings
    )


def test_samples_follow_the_model_over_the_legal_tokens():
    rows = [[2], [2, 5], [3, 4], [7, 7, 7], [7, 8]]
    index = build(rows, eos_id=EOS)
    drawn = draw(index.constraint(), jax.random.key(0), num_samples=4000)
    assert drawn.valid.all()
    legal = reference.unique_rows(rows, eos_id=EOS)
    log_probs = dict(reference.exhaustive(model, 0, legal))
    found = [legal[row] for row in index.table_rows(drawn.rows[0])]
    np.testing.assert_allclose(drawn.log_probs[0], [log_probs[row] for row in found], atol=1e-4)
    for row, log_prob in reference.exhaustive(model, 0, legal, renormalise=True):
        assert found.count(row) / 4000 == pytest.approx(np.exp(log_prob), abs=0.03)
    for row, tokens in zip(found[:20], drawn.tokens[0].tolist(), strict=False):
        assert tuple(tokens[: len(row)]) == row
        assert not any(tokens[len(row) :])


@pytest.mark.slow
def test_samples_at_low_temperature_are_greedy():
    rows = np.random.default_rng(0).integers(2, VOCAB, (30, 4)).tolist()
    constraint = build(rows).constraint()
    greedy = search(constraint, batch_size=1, num_beams=1).tokens[0, 0].tolist()
    cold = draw(constraint, jax.random.key(1), num_samples=3, temperature=1e-4)
    assert cold.tokens[0].tolist() == [greedy] * 3


@pytest.mark.parametrize(
    ("call", "settings", "message"),
    [
        (search, {"num_beams": 0}, "beam_search.num_beams must be at least 1; got 0"),
        (search, {"num_beams": 1, "max_length": 0}, "max_length must be at least 1; got 0"),
        (draw, {"num_samples": 0}, "sample.num_samples must be at least 1; got 0"),
        (draw, {"num_samples": 1, "best_tokens": 0}, "sample.best_tokens must be at least 1"),
        (draw, {"num_samples": 1, "temperature": 0.0}, "sample.temperature must be above 0; got 0"),
    ],
)
def test_bad_settings_are_refused(call, settings, message):
    first = () if call is search else (jax.random.key(0),)
    with pytest.raises(ValueError, match=message):
        call(build([[3]]).constraint(), *first, **settings)


@pytest.mark.slow
@pytest.mark.parametrize("axis", [None, "model"])
def test_sharded_gives_the_same(axis):
    """Queries over data; the index on every device, or its long arrays over model."""
    if jax.device_count() < 4:
        pytest.skip("needs several devices")
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:4]).reshape(2, 2), ("data", "model"))
    rows = np.random.default_rng(0).integers(2, VOCAB, (60, 4)).tolist()
    constraint = build(rows, 1).constraint()

    def place(leaf):
        spec = P(axis) if leaf.ndim and leaf.shape[0] >= 64 else P()
        return jax.device_put(leaf, NamedSharding(mesh, spec))

    def run(constraint, cache):
        return beam_search(step_fn, constraint, cache, batch_size=2, num_beams=5)

    alone = compiled(run)(constraint, start(2, 5))
    cache = jax.device_put(start(2, 5), NamedSharding(mesh, P("data")))
    sharded = compiled(run)(jax.tree.map(place, constraint), cache)
    assert alone.tokens.tolist() == sharded.tokens.tolist()
    np.testing.assert_allclose(alone.log_probs, sharded.log_probs, rtol=1e-6)
