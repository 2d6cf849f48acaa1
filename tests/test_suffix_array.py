"""The suffix array against lists of passages: what it holds, finds and refuses, and its steps."""

import dataclasses
import functools
import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dgr_jax.decoding import (
    suffix_array,
    suffix_array_branches,
    suffix_array_build,
    suffix_array_expand,
)
from dgr_jax.decoding.beam_search import beam_search
from dgr_jax.decoding.sampling import sample
from dgr_jax.decoding.suffix_array_expand import SpanState
from tests.reference import decoding as decoding_reference
from tests.reference import suffix_array as reference
from tests.test_beam_search import compiled, model, slow, start, step_fn

VOCAB = 12
LENGTH = 3
BEAMS = 4

# Few tokens, so that spans repeat; passages may be empty, of one token, or equal.
passage = st.lists(st.integers(1, VOCAB - 1) | st.sampled_from([3, 4]), max_size=9)
corpora = st.lists(passage | st.just([3, 4, 3, 4, 5]), min_size=1, max_size=8).filter(any)
few = settings(max_examples=30, deadline=None)


def build(passages):
    return suffix_array.build(passages, vocab_size=VOCAB)


def all_spans(passages, longest=LENGTH):
    return [span for n in range(1, longest + 1) for span in reference.spans(passages, n)]


@few
@given(passages=corpora)
def test_holds_the_sorted_suffixes_of_the_passages(passages):
    index = build(passages)
    assert index.suffixes.tolist() == reference.sorted_suffixes(passages)
    assert len(index) == sum(map(len, passages))
    assert index.num_passages == len(passages)
    assert (index.tokens[index.starts + [len(p) for p in passages]] == 0).all()
    assert index.vocab_size == VOCAB


@few
@given(passages=corpora, stays=st.data(), added=st.lists(passage | st.just([3, 4, 5]), max_size=4))
def test_changed_passages_make_the_index_that_is_built_of_all(passages, stays, added):
    stay = stays.draw(st.lists(st.booleans(), min_size=len(passages), max_size=len(passages)))
    left = [p for p, stays in zip(passages, stay, strict=True) if stays] + added
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {"OFTEN": 3, "MOST": 2, "SAVING": 2}.items():
            patch.setattr(suffix_array_branches, name, value)
        index = suffix_array.build(passages, vocab_size=VOCAB, max_length=LENGTH)
        if not any(left):
            with pytest.raises(ValueError, match=f"{len(left)} passages without a token; expected"):
                index.changed(np.array(stay), added, max_length=LENGTH)
            return
        changed = index.changed(np.array(stay), added, max_length=LENGTH)
        expected = suffix_array.build(left, vocab_size=VOCAB, max_length=LENGTH)
    for name, array in expected.arrays().items():
        np.testing.assert_array_equal(changed.arrays()[name], array, err_msg=name)
        assert changed.arrays()[name].dtype == array.dtype, name


@few
@given(passages=corpora)
def test_finds_counts_and_locates_every_span(passages):
    index = build(passages)
    for span in [*all_spans(passages), (11, 11, 11), (3, 4, 11), (0, 3), (3, 0), (VOCAB, 3)]:
        lo, hi = index.find(np.array(span))
        assert hi - lo == len(reference.occurrences(passages, span))
        if lo == hi:
            continue
        tokens, counts = index.next_tokens(int(lo), int(hi), len(span))
        expected = reference.next_tokens(passages, span)
        assert dict(zip(tokens.tolist(), counts.tolist(), strict=True)) == expected
        found = index.locate(int(lo), int(hi), limit=100)
        assert found.tolist() == reference.passages_of(passages, span)
        assert found.dtype == np.int32


def test_finds_many_spans_of_several_lengths_at_once():
    index = build([[3, 4, 5], [3, 4, 6], []])
    spans = np.array([[[3, 4, 5], [3, 4, 9]], [[3, 9, 9], [7, 7, 7]]])
    lo, hi = index.find(spans, np.array([[3, 2], [1, 0]]))
    assert (hi - lo).tolist() == [[1, 2], [2, 6]]
    constraint = index.constraint()
    state = compiled(type(constraint).find)(constraint, spans, jnp.array([[3, 2], [1, 3]]))
    assert constraint.counts(state).tolist() == [[1, 2], [2, 0]]
    assert state.lo.tolist() == [[*lo[0]], [lo[1, 0], -1]]
    assert state.depth.tolist() == [[3, 2], [1, -1]]
    spans[..., 0] = [[0, VOCAB], [-1, 3]]
    unknown = compiled(type(constraint).find)(constraint, spans, jnp.ones((2, 2), jnp.int32))
    assert constraint.counts(unknown).tolist() == [[0, 0], [0, 2]]


def test_a_limit_bounds_the_occurrences_that_are_located():
    index = build([[5], [5, 5, 5], [4], [5]])
    lo, hi = map(int, index.find(np.array([5])))
    assert index.locate(lo, hi, limit=5).tolist() == [0, 1, 3]
    some = index.locate(lo, hi, limit=2).tolist()
    positions = np.asarray(index.suffixes[lo : lo + 2])
    owners = np.searchsorted(index.starts, positions, side="right") - 1
    assert some == sorted(set(owners.tolist()))
    constraint = index.constraint()
    state = SpanState(*(jnp.array([x, -1]) for x in (lo, hi, 1)))
    locate = compiled(type(constraint).locate, static_argnames="limit")
    assert locate(constraint, state, limit=6).tolist() == [[0, 1, 3, -1, -1, -1], [-1] * 6]
    assert locate(constraint, state, limit=2)[0].tolist() == some + [-1] * (2 - len(some))


@pytest.mark.parametrize(("vocab_size", "dtype"), [(1 << 16, np.uint16), (1 << 17, np.uint32)])
def test_large_vocabularies_sort_like_small_ones(vocab_size, dtype):
    rng = np.random.default_rng(0)
    small = [rng.integers(1, VOCAB, rng.integers(0, 20)).tolist() for _ in range(30)]
    names = np.append(0, np.sort(rng.choice(np.arange(1, vocab_size), VOCAB - 1, replace=False)))
    index = suffix_array.build((names[p] for p in small), vocab_size=vocab_size)
    assert index.tokens.dtype == dtype
    np.testing.assert_array_equal(index.suffixes, build(small).suffixes)
    lo, hi = index.find(names[[small[-1][:2]]])
    assert hi[0] - lo[0] == len(reference.occurrences(small, small[-1][:2]))


def test_a_long_corpus_is_read_in_parts(monkeypatch):
    passages = np.random.default_rng(0).integers(1, 5, (50, 6)).tolist()
    monkeypatch.setattr(suffix_array_branches, "OFTEN", 5)
    monkeypatch.setattr(suffix_array_branches, "SAVING", 2)
    whole = build(passages)
    assert len(whole.branches.lows) > 0
    monkeypatch.setattr(suffix_array_branches, "_CHUNK", 9)
    monkeypatch.setattr(suffix_array_build, "CHUNK", 7)
    monkeypatch.setattr(suffix_array_build, "_PASSAGES", 3)
    parts = build(iter(passages))
    for name, array in whole.arrays().items():
        np.testing.assert_array_equal(parts.arrays()[name], array, err_msg=name)
    lo, hi = map(int, parts.find(np.array([2])))
    tokens, counts = parts.next_tokens(lo, hi, 1)
    expected = reference.next_tokens(passages, (2,))
    assert dict(zip(tokens.tolist(), counts.tolist(), strict=True)) == expected


@few
@given(passages=corpora)
def test_lists_hold_the_next_tokens_of_the_spans_that_need_them(passages):
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {"OFTEN": 3, "MOST": 2, "SAVING": 2}.items():
            patch.setattr(suffix_array_branches, name, value)
        index = suffix_array.build(passages, vocab_size=VOCAB, max_length=LENGTH)
    expected = []
    for span in all_spans(passages, LENGTH - 1):
        lo, hi = map(int, index.find(np.array(span)))
        following = reference.next_tokens(passages, span)
        if hi - lo >= 3 and len(following) <= 2 and 2 * len(following) <= hi - lo:
            starts = [int(index.find(np.array([*span, token]))[0]) for token in following]
            expected.append((len(span), lo, starts))
    lists = index.branches
    found = [
        (depth, int(lists.lows[w]), lists.children[lists.ranges[w] : lists.ranges[w + 1]].tolist())
        for depth in range(len(lists.levels) - 1)
        for w in range(lists.levels[depth], lists.levels[depth + 1])
    ]
    assert found == expected


def test_planned_bytes_are_those_of_the_index():
    for vocab_size in (VOCAB, 1 << 17):
        index = suffix_array.build([[3, 4], [], [5] * 7], vocab_size=vocab_size)
        planned = suffix_array.planned_bytes(9, 3, vocab_size)
        own = {name: x.nbytes for name, x in index.arrays().items() if "branches" not in name}
        assert {name: planned[name] for name in own} == own
        assert sum(own.values()) <= index.nbytes <= planned["index"]
    planned = suffix_array.planned_bytes(700_000_000, 8_841_823, 32_128)
    assert 4.4e9 < planned["index"] < 4.6e9
    assert 9e9 < planned["build"] < 12e9
    with pytest.raises(ValueError, match="expected at most 2147483647 together: split the corpus"):
        suffix_array.planned_bytes(1 << 31, 1, 32_128)


def test_saved_and_opened_again(tmp_path):
    index = suffix_array.build(np.random.default_rng(0).integers(1, 9, (300, 20)), vocab_size=9)
    index.save(tmp_path)
    index.save(tmp_path)
    loaded = suffix_array.load(tmp_path)
    assert isinstance(loaded.suffixes, np.memmap)
    for name, array in index.arrays().items():
        np.testing.assert_array_equal(loaded.arrays()[name], array, err_msg=name)
        assert loaded.arrays()[name].dtype == array.dtype
    assert len(loaded.branches.lows) > 0
    assert loaded.constraint().nbytes == index.nbytes + 9


def saved(tmp_path):
    build([[3, 4, 5]]).save(tmp_path)
    return tmp_path / "header.json"


def change(header, **fields):
    header.write_text(json.dumps(json.loads(header.read_text()) | fields))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda header: header.unlink(), "header.json is missing: not a folder of dgr_jax.suffix"),
        (
            lambda header: header.write_text("[1]"),
            "header.json: is not a header of dgr_jax.suffix_",
        ),
        (
            lambda header: header.write_text("{"),
            "header.json: is not a header of dgr_jax.suffix_ar",
        ),
        (lambda header: change(header, format="x"), "got 'x' version 1; expected 'dgr_jax.suffix_"),
        (lambda header: change(header, version=7), "version 7; expected 'dgr_jax.suffix_array' ve"),
        (lambda header: change(header, sha256={}), "sha256 lacks branches_children, .*: build the"),
        (
            lambda header: header.with_name("suffixes.npy").unlink(),
            "suffixes.npy: is missing: the index is damaged",
        ),
        (
            lambda header: header.with_name("tokens.npy").write_bytes(
                header.with_name("tokens.npy").read_bytes()[:-2]
            ),
            "tokens.npy: differs from its sha256 in header.json: the index is damaged",
        ),
    ],
)
def test_foreign_newer_and_damaged_folders_are_refused_by_name(tmp_path, damage, message):
    damage(saved(tmp_path))
    with pytest.raises(ValueError, match=message):
        suffix_array.load(tmp_path)


@pytest.mark.parametrize(
    ("passages", "vocab_size", "message"),
    [
        ([[3], [4, 0]], 12, "passage 1 holds token 0; expected 1 to 11 "),
        ([[3], [], [4, 12]], 12, "passage 2 holds token 12; expected 1 to 11 .*build.vocab_size"),
        ([[3], [-1]], 12, "passage 1 holds token -1"),
        ([[3.5]], 12, r"passage 0 has dtype float64 and shape \(1,\); expected integers \[n\]"),
        ([[[3]]], 12, r"passage 0 has dtype int64 and shape \(1, 1\)"),
        ([], 12, "no passages; expected at least one"),
        ([[], []], 12, "2 passages without a token; expected at least one"),
        ([[3]], 1 << 18, "vocab_size must be between 2 and 131072; got 262144"),
    ],
)
def test_bad_passages_are_refused(passages, vocab_size, message):
    with pytest.raises(ValueError, match=message):
        suffix_array.build(passages, vocab_size=vocab_size)


def test_a_missing_library_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "pydivsufsort", None)
    with pytest.raises(ImportError, match=r"needs the extra 'dgr_jax\[multiview\]': pip install"):
        build([[3]])


def test_bad_constraints_are_refused():
    index = build([[3, 4]])
    with pytest.raises(ValueError, match="constraint.max_length must be at least 1; got 0"):
        index.constraint(max_length=0)
    with pytest.raises(ValueError, match=r"opening must be bool of shape \(12,\).*int64 of"):
        index.constraint(opening=np.zeros(12, np.int64))
    constraint = index.constraint()
    with pytest.raises(ValueError, match="scores of 11 tokens; the index was built for a vocab"):
        constraint.expand(constraint.init(1), jnp.zeros((1, 1, 11)), jnp.zeros((1, 1)), width=1)


def padded(index):
    """Lists of one size for all corpora, so that a step compiles once."""
    grow = lambda array: np.pad(array, (0, 200 - len(array)))
    lists = {name: grow(getattr(index.branches, name)) for name in ("lows", "ranges", "children")}
    return dataclasses.replace(index, branches=dataclasses.replace(index.branches, **lists))


def in_shape(passages):
    """One shape for all corpora, so that a step compiles once."""
    return [*passages, [VOCAB - 1] * (8 * 9 - sum(map(len, passages)))] + [[]] * (8 - len(passages))


@functools.cache
def step(budgets, chunks, width):
    """A jitted expand whose switches are taken at these sizes."""

    def expand(constraint, state, scores, prior):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(suffix_array_expand, "_BUDGETS", budgets)
            patch.setattr(suffix_array_expand, "_CHUNKS", chunks)
            patch.setattr(suffix_array_branches, "OFTEN", 3)
            return constraint.expand(state, scores, prior, width=width)

    return compiled(expand)


def states_of(index, beams):
    """SpanState [1, M] of spans, dead for None."""
    leaves = [
        (-1, -1, -1)
        if beam is None
        else (*map(int, index.find(np.array(beam[0], int))), len(beam[0]))
        for beam in beams
    ]
    return SpanState(*(jnp.array([leaf], jnp.int32) for leaf in zip(*leaves, strict=True)))


@st.composite
def steps(draw):
    """(passages, beams of one depth or None, scores [M, V]): few values, so that totals tie."""
    passages = in_shape(draw(corpora))
    depth = draw(st.integers(0, LENGTH - 1))
    spans = reference.spans(passages, depth) or [()]
    prior = st.sampled_from([0.0, -1.0, -0.5, -np.inf])
    beam = st.none() | st.tuples(st.sampled_from(spans), prior)
    beams = draw(st.lists(beam, min_size=BEAMS, max_size=BEAMS).filter(any))
    score = st.sampled_from([0.0, 1.0, 2.5, -3.0, -np.inf])
    values = draw(st.lists(score, min_size=BEAMS * 16, max_size=BEAMS * 16))
    return passages, beams, np.array(values, np.float32).reshape(BEAMS, 16)


@pytest.mark.parametrize(
    ("budgets", "chunks", "width", "dtype"),
    [
        slow((0,), (1, 2), 5, np.float32),  # all tested, a few tokens at a time
        ((2, 5, 9), (2, 3), 5, np.float32),  # some beams enumerated, others tested
        slow((64, 1024), (16, 16), 3, jnp.bfloat16),  # all enumerated
        slow((4, 16), (64, 64), 40, np.float32),  # more asked for than there is
    ],
)
@settings(max_examples=30, deadline=None)
@given(case=steps())
def test_a_step_is_that_of_reading_every_interval(budgets, chunks, width, dtype, case):
    passages, beams, scores = case
    with pytest.MonkeyPatch.context() as patch:  # lists of next tokens in the smallest corpora
        for name, value in {"OFTEN": 3, "MOST": 3, "SAVING": 2}.items():
            patch.setattr(suffix_array_branches, name, value)
        index = build(passages)
    constraint = padded(index).constraint(max_length=LENGTH)
    prior = np.array([[0.0 if beam is None else beam[1] for beam in beams]], np.float32)
    state = states_of(index, beams)
    found = step(budgets, chunks, width)(constraint, state, jnp.asarray(scores[None], dtype), prior)
    expected = reference.expand(passages, beams, scores, width)
    parent, token, total = (np.asarray(x)[0] for x in found[:3])
    number = len(expected)
    got = list(zip(total.tolist(), parent.tolist(), token.tolist(), strict=True))
    assert got[:number] == expected
    assert (total[number:] == -np.inf).all() and (token[number:] == 0).all()
    counts = constraint.counts(found.next_state)[0]
    for i, (_, m, following) in enumerate(expected):
        span = (*beams[m][0], following)
        assert counts[i] == len(reference.occurrences(passages, span))
        assert [int(leaf[0, i]) for leaf in found.next_state] == [
            *map(int, index.find(np.array(span))),
            len(span),
        ]
        assert bool(found.complete[0, i]) == (len(span) == LENGTH)
    assert all((leaf[0, number:] == -1).all() for leaf in found.next_state)
    assert not found.complete[0, number:].any()


@functools.partial(compiled, static_argnames=("num_beams", "record"))
def search(constraint, *, num_beams=BEAMS, record=True):
    return beam_search(
        step_fn, constraint, start(2, num_beams), batch_size=2, num_beams=num_beams, record=record
    )


def constraint_of(passages, opening=None):
    """Arrays of one shape for all corpora, so that beam search compiles once."""
    return padded(build(in_shape(passages))).constraint(max_length=LENGTH, opening=opening)


GIVEN = [[3, 4, 5, 3, 4, 6], [3, 4, 5], [], [7], [8, 9], [3, 4, 5], [10, 4, 5, 6, 2, 2, 2]]
PASSAGES = in_shape(GIVEN)


def live_beams(query, beams):
    """[(span, log_prob)] after each step."""
    live = [((), 0.0)]
    for _ in range(LENGTH):
        offers = []
        for span, log_prob in live:
            now = decoding_reference.log_softmax(model(query, span))
            following = reference.next_tokens(PASSAGES, span)
            offers += [((*span, token), log_prob + now[token]) for token in following]
        live = sorted(offers, key=lambda offer: -offer[1])[:beams]
        yield live


def test_beam_search_finds_spans_and_records_their_prefixes():
    constraint = constraint_of(GIVEN)
    result = search(constraint)
    locate = compiled(type(constraint).locate, static_argnames="limit")
    owners = locate(constraint, result.prefixes.state, limit=8).tolist()
    counts = constraint.counts(result.prefixes.state).tolist()
    prefixes = jax.tree.map(np.asarray, result.prefixes)
    for query in range(2):
        for depth, live in enumerate(live_beams(query, BEAMS)):
            rows, log_probs = prefixes.tokens[query, depth], prefixes.log_probs[query, depth]
            expected = [[*span] + [0] * (LENGTH - depth - 1) for span, _ in live]
            dead = BEAMS - len(live)
            assert rows.tolist() == expected + [[0] * LENGTH] * dead
            np.testing.assert_allclose(
                log_probs, [log_prob for _, log_prob in live] + [-np.inf] * dead, atol=1e-4
            )
            number = [len(reference.occurrences(PASSAGES, span)) for span, _ in live]
            assert counts[query][depth] == number + [0] * dead
            for row, (span, _) in zip(owners[query][depth], live, strict=False):
                assert [p for p in row if p >= 0] == reference.passages_of(PASSAGES, span)
    np.testing.assert_array_equal(result.tokens, prefixes.tokens[:, -1])
    np.testing.assert_array_equal(result.log_probs, prefixes.log_probs[:, -1])
    np.testing.assert_array_equal(result.rows, prefixes.state.lo[:, -1])
    assert result.valid.any()


def test_tokens_that_a_span_may_begin_with():
    opening = np.arange(VOCAB) == 4
    result = search(constraint_of([[3, 4, 3, 5], [4, 5]], opening))
    assert result.tokens[0][result.valid[0]].tolist() == [[4, 3, 5]]
    assert set(result.prefixes.tokens[..., 0].flatten().tolist()) == {0, 4}


def test_passages_shorter_than_a_span_are_found_by_their_prefixes():
    opening = np.arange(VOCAB) < VOCAB - 1  # not with what fills the corpus up
    result = search(constraint_of([[7], [8, 9]], opening))
    assert not result.valid.any()
    spans = {
        tuple(token for token in row if token)
        for step_rows in result.prefixes.tokens[0].tolist()
        for row in step_rows
    }
    assert spans - {()} == {(7,), (8,), (9,), (8, 9)}


def test_a_search_without_record_returns_no_prefixes():
    without = functools.partial(search.__wrapped__, record=False)
    shapes = jax.eval_shape(without, constraint_of(GIVEN))
    assert shapes.prefixes is None
    assert shapes.tokens.shape == (2, BEAMS, LENGTH)


@pytest.mark.slow
def test_samples_are_spans():
    constraint = constraint_of(GIVEN)

    def flat(tokens, cache, position):
        return jnp.zeros((*tokens.shape, VOCAB)), cache

    draw = functools.partial(sample, flat, batch_size=1, num_samples=40)
    drawn = compiled(lambda c, key: draw(c, {}, key=key))(constraint, jax.random.key(0))
    spans = set(reference.spans(PASSAGES, LENGTH))
    found = {
        tuple(row) for row, ok in zip(drawn.tokens[0].tolist(), drawn.valid[0], strict=True) if ok
    }
    assert found <= spans and len(found) > len(spans) // 2
