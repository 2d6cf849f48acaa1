"""Passages from identifiers of several views, against a twin that looks everywhere."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dgr_jax.decoding import suffix_array, suffix_array_expand, trie
from dgr_jax.decoding.beam_search import BeamResult, beam_search
from dgr_jax.decoding.passage_scoring import VIEWS, Scoring, passage_scores
from dgr_jax.identifiers.table import IdentifierTable
from dgr_jax.retrieval.multiview import index as multiview
from dgr_jax.retrieval.multiview.index import MultiviewIndex, best
from dgr_jax.retrieval.multiview.written import Written, written_rows, written_spans
from tests.reference import multiview as reference
from tests.test_beam_search import compiled, start, step_fn

VOCAB = 12
EOS = 1
SCORING = Scoring(common=3, max_passages=4)

text = st.lists(st.integers(2, 5), max_size=8)
name = st.lists(st.integers(2, 5), min_size=1, max_size=3).map(lambda row: (*row, EOS))
log_prob = st.sampled_from([-0.25, -1.0, -2.5, -4.0, -16.0])
few = settings(max_examples=40, deadline=None)


def table(rows, num_passages):
    """IdentifierTable of [passage][several] token tuples; None without any."""
    pairs = sorted({(p, row) for p, several in enumerate(rows) for row in several})
    if not pairs:
        return None
    tokens = np.zeros((len(pairs), max(len(row) for _, row in pairs)), np.int32)
    for i, (_, row) in enumerate(pairs):
        tokens[i, : len(row)] = row
    owners = np.array([p for p, _ in pairs])
    return IdentifierTable.from_rows(tokens, view="x", passages=owners, num_passages=num_passages)


def build(passages, tables, **fields):
    built = {view: table(rows, len(passages)) for view, rows in tables.items()}
    built = {view: one for view, one in built.items() if one is not None}
    index = suffix_array.build(passages, vocab_size=VOCAB)
    return MultiviewIndex(index, built, **{"scoring": SCORING} | fields)


def written(index, queries, size=8):
    """Written of lists of the twin's identifiers: none of a view where no query has any."""
    parts = []
    for view in ("query", "body", "title"):  # in any order
        if view != "body" and view not in index.tables:
            continue
        tokens = np.zeros((len(queries), size, 5), np.int32)
        log_probs = np.full((len(queries), size), -np.inf, np.float32)
        lo, hi = np.zeros((2, len(queries), size), np.int64)
        for b, identifiers in enumerate(queries):
            for m, (value, row, _) in enumerate(i for i in identifiers if i[2] == view):
                tokens[b, m, : len(row)], log_probs[b, m] = row, value
                if view == "body":
                    lo[b, m], hi[b, m] = index.text.find(np.array(row))
                elif (place := index.tables[view].lookup(np.array(row))) >= 0:
                    lo[b, m], hi[b, m] = index.tables[view].offsets[place : place + 2]
        parts.append(Written(view, tokens, log_probs, lo, hi))
    return parts


@st.composite
def cases(draw):
    """(passages, tables, identifiers of two queries): many of them occur."""
    passages = draw(st.lists(text, min_size=1, max_size=8).filter(any))
    rows = st.lists(name, max_size=2)
    several = st.lists(rows, min_size=len(passages), max_size=len(passages))
    tables = {"title": draw(several), "query": draw(several)}
    spans = [
        tuple(p[at : at + n]) for p in passages for n in (1, 2, 3) for at in range(len(p) - n + 1)
    ]
    choices = [st.tuples(st.sampled_from(sorted(set(spans))), st.just("body"))]
    for view, lists in tables.items():
        if known := sorted({row for several in lists for row in several}):
            choices.append(st.tuples(st.sampled_from(known), st.just(view)))
    one = st.lists(st.one_of(choices), max_size=8, unique=True)
    queries = [[(draw(log_prob), tokens, view) for tokens, view in draw(one)] for _ in range(2)]
    for identifiers in queries:  # equal ones stand in this order
        identifiers.sort(key=lambda identifier: VIEWS.index(identifier[2]))
    return passages, tables, queries


def same(found, expected):
    """Equal scores, and equal passages except where scores differ by rounding alone."""
    scores = [score for _, score in expected]
    np.testing.assert_allclose(found.scores, scores, rtol=1e-5, atol=1e-5)
    assert sorted(found.passages.tolist()) == sorted(p for p, _ in expected)
    by_passage = dict(expected)
    got = [by_passage[p] for p in found.passages.tolist()]
    np.testing.assert_allclose(got, scores, rtol=1e-5, atol=1e-5)


def clear_cut(bounds, most):
    """No passage is nominated by rounding alone."""
    ordered = sorted(bounds.values(), reverse=True)
    return len(ordered) <= most or ordered[most - 1] > ordered[most] * (1 + 1e-5)


@few
@given(case=cases(), data=st.data())
def test_passages_are_those_of_the_twin(case, data):
    passages, tables, queries = case
    allowed = data.draw(st.none() | st.lists(st.booleans(), min_size=len(passages), max_size=8))
    allowed = None if allowed is None else np.resize(allowed, len(passages))
    index = build(passages, tables, allowed=allowed)
    for found, identifiers in zip(index.rank(written(index, queries)), queries, strict=True):
        expected, bounds = reference.rank(passages, tables, identifiers, SCORING, allowed)
        if clear_cut(bounds, SCORING.max_passages):
            same(found, expected)
        assert found.passages.dtype == np.int32 and found.scores.dtype == np.float32


@few
@given(case=cases())
def test_identifiers_of_passages_give_their_scores_again(case):
    """What training stores of a passage: scores are those of the search."""
    passages, tables, queries = case
    index = build(passages, tables)
    for found in index.rank(written(index, queries)):
        again = found.identifiers(8)
        assert again.mask.shape == (len(found.passages), 8)
        fixed = padded(again, 4, 64)
        scores = rescore(fixed, float(len(index.text)))[: len(found.scores)]
        np.testing.assert_allclose(scores, found.scores, rtol=1e-5)
        for held, weights in zip(again.mask, again.log_probs, strict=True):
            assert (np.diff(held.astype(int)) <= 0).all() and np.isfinite(weights).all()


def padded(found, rows, occurring):
    """In one shape, so that scoring compiles once."""
    more = rows - len(found.mask)
    grown = jax.tree.map(lambda x: np.pad(x, [(0, more)] + [(0, 0)] * (x.ndim - 1)), found)
    places = [(0, more), (0, occurring - found.spans.shape[1])]
    spans = np.pad(found.spans, places, constant_values=-1)
    return grown._replace(spans=spans, starts=np.pad(found.starts, places))


rescore = compiled(functools.partial(passage_scores, scoring=SCORING))


def test_the_best_identifiers_of_a_passage_keep_all_their_occurrences():
    passages = [[2, 3, 2, 3, 4], [5, 5, 5, 5, 5]]
    index = build(passages, {"title": [[(4, EOS)], []]})
    identifiers = [
        (-0.25, (2, 3), "body"),
        (-0.5, (4, EOS), "title"),
        (-1.0, (3,), "body"),
        (-4.0, (3, 4), "body"),
    ]
    (found,) = index.rank(written(index, [identifiers]))
    assert found.passages.tolist() == [0]
    two = found.identifiers(2)
    weights = [
        (x, f) for x, f in zip(two.log_probs[0].tolist(), two.counts[0].tolist(), strict=True)
    ]
    assert weights == [(-0.25, 2), (-0.5, 1)]
    assert [VIEWS[view] for view in two.views[0]] == ["body", "title"]
    assert two.tokens[0, :, :2].tolist() == [[2, 3], [4, EOS]]
    assert two.spans.tolist() == [[0, 0]] and two.starts.tolist() == [[0, 2]]
    many = found.identifiers(100)
    assert many.mask.shape == (1, 100) and many.mask.sum() == found.identifiers(4).mask.sum()


def test_common_identifiers_add_and_do_not_nominate():
    # 2 occurs four times, more than `common`; only passage 0 has the rare 3.
    passages = [[2, 3], [2, 4], [2, 4], [2, 4], [6] * 40]
    titles = [[(7, EOS)], [(7, EOS)], [(7, EOS)], [(7, EOS)], []]
    index = build(passages, {"title": titles})
    rare, common, title = (-1.0, (3,), "body"), (-0.25, (2,), "body"), (-0.25, (7, EOS), "title")
    alone, both, all_three, none = index.rank(
        written(index, [[rare], [rare, common], [rare, common, title], [common, title]])
    )
    assert [x.passages.tolist() for x in (alone, both, all_three, none)] == [[0], [0], [0], []]
    assert alone.scores[0] < both.scores[0] < all_three.scores[0]
    assert none.scores.shape == (0,) and none.identifiers(3).mask.shape == (0, 3)
    # 4 occurs three times: it nominates. Ties stand by passage index.
    (found,) = index.rank(written(index, [[(-1.0, (4,), "body"), (-0.5, (3,), "body")]]))
    assert found.passages.tolist() == [0, 1, 2, 3]
    assert len(set(found.scores[1:].tolist())) == 1


def test_common_spans_are_placed_where_they_stand():
    # 2 occurs five times; the rest of its passages, the last one too, is read from the text.
    passages = [[5, 2, 6], [8] * 40, [2, 2, 2], [4, 7, 2]]
    index = build(passages, {}, special_ids=(1, 11))
    identifiers = [(-0.25, (2,), "body"), (-1.0, (6,), "body"), (-2.0, (4, 7), "body")]
    parts = written(index, [identifiers])
    parts[0].tokens[0, 0, :3] = 11, 2, 11  # special tokens are no part of the text
    (found,) = index.rank(parts)
    places = {}
    each = zip(*found.identifiers(3), strict=True)
    for p, one in zip(found.passages.tolist(), each, strict=True):
        tokens, spans, starts = one[2], one[5], one[6]
        held = {int(start): tokens[k].tolist() for k, start in zip(spans, starts, strict=True)}
        places[p] = {start: [t for t in row if t not in (0, 11)] for start, row in held.items()}
    assert places == {0: {1: [2], 2: [6]}, 3: {2: [2], 0: [4, 7]}}


def test_passages_stay_by_the_best_span_at_each_place():
    # Two spans of -1 apart could add more than two nested spans of -0.9, of which one counts.
    passages = [[2, 3], [10, 11], [4, 5], [6, 7], [8, 9], [1] * 40]
    index = build(passages, {})
    apart = [(-1.0, (token,), "body") for token in range(2, 10)]
    nested = [(-0.9, (10,), "body"), (-0.9, (10, 11), "body")]
    first, second = index.rank(written(index, [apart + nested, apart[2:] + nested], size=12))
    assert first.passages.tolist() == [0, 2, 3, 4]
    assert second.passages.tolist() == [2, 3, 4, 1]


def test_best_of_several_queries_as_arrays():
    index = build([[2, 3], [2, 4], [6] * 40], {})
    queries = [[(-1.0, (2,), "body")], [], [(-1.0, (3,), "body"), (-1.0, (2,), "body")]]
    passages, scores = best(index.rank(written(index, queries)), depth=3)
    assert passages.tolist() == [[0, 1, -1], [-1, -1, -1], [0, 1, -1]]
    assert np.isneginf(scores).tolist() == [[False, False, True], [True] * 3, [False, False, True]]
    passages, scores = best(index.rank(written(index, queries)), depth=1)
    assert passages.tolist() == [[0], [-1], [0]] and scores.shape == (3, 1)


def test_from_beam_search_to_passages(monkeypatch):
    for name, sizes in {"_BUDGETS": (64,), "_CHUNKS": (8, 8)}.items():  # quick to compile
        monkeypatch.setattr(suffix_array_expand, name, sizes)
    rng = np.random.default_rng(0)
    passages = rng.integers(2, VOCAB, (6, 7)).tolist()
    titles = [[tuple(p[:2]) + (EOS,)] for p in passages[:4]] + [[], []]
    index = build(passages, {"title": titles})
    spans = index.text.constraint(max_length=3)
    rows = index.tables["title"]
    tree = trie.build(rows.tokens, rows.lengths, vocab_size=VOCAB)
    options = dict(batch_size=2, num_beams=3)

    @compiled
    def search(spans, titles):
        cache = start(2, 3)
        return (
            beam_search(step_fn, spans, cache, record=True, **options),
            beam_search(step_fn, titles, cache, **options),
        )

    from_spans, from_titles = jax.device_get(search(spans, tree.constraint()))
    parts = [
        written_spans(from_spans),
        written_rows("title", from_titles, tree.table_rows(from_titles.rows), rows),
    ]
    assert parts[0].tokens.shape == (2, 9, 3) and parts[1].lo.shape == (2, 3)
    for query, found in enumerate(index.rank(parts)):
        identifiers = [
            (float(value), tuple(row[row > 0].tolist()), part.view)
            for part in parts
            for value, row in zip(part.log_probs[query], part.tokens[query], strict=True)
            if np.isfinite(value)
        ]
        assert {"body", "title"} == {view for _, _, view in identifiers}
        expected, _ = reference.rank(passages, {"title": titles}, identifiers, index.scoring)
        same(found, expected)
        assert len(found.passages)


def test_no_more_passages_are_scored_than_a_size_class_that_holds_all():
    most = lambda count, scoring: (
        dataclasses.replace(build([[3, 4]] * count, {}), scoring=scoring)._most_passages
    )
    assert (most(9, Scoring()), most(70, Scoring())) == (64, 128)
    assert most(70, Scoring(max_passages=5)) == 5


def test_scoring_compiles_once_for_queries_of_all_sizes():
    passages = np.random.default_rng(0).integers(2, 6, (9, 8)).tolist()
    index = build(passages, {})
    spans = sorted({tuple(p[a : a + n]) for p in passages for n in (1, 2) for a in range(7)})
    queries = [[(-1.0, span, "body") for span in spans[:n]] for n in (1, 4, 8)]
    index.rank(written(index, queries[2:]))
    before = multiview._score._cache_size()
    index.rank(written(index, queries))
    assert multiview._score._cache_size() == before > 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"tables": {"body": None}},
            "MultiviewIndex.tables: got view 'body', expected title, query",
        ),
        (
            {"tables": {"title": table([[(4, EOS)]], 1)}},
            "MultiviewIndex.tables: 'title' has 1 passages; expected 2, those of the text",
        ),
        (
            {"allowed": np.ones(2, int)},
            "MultiviewIndex.allowed must be bool of shape [2]; got int64 of shape (2,)",
        ),
        (
            {"allowed": np.ones(3, bool)},
            "MultiviewIndex.allowed must be bool of shape [2]; got bool of shape (3,)",
        ),
    ],
)
def test_indexes_that_do_not_belong_together(change, message):
    index = build([[2, 3], [4]], {})
    with pytest.raises(ValueError) as error:
        dataclasses.replace(index, **change)
    assert str(error.value) == message


def test_bad_searches_are_refused():
    index = build([[2, 3], [4]], {})
    nothing = np.zeros((1, 1), np.int64)
    part = Written("title", nothing[..., None], nothing, nothing, nothing)
    with pytest.raises(ValueError) as error:
        index.rank([part])
    assert str(error.value) == (
        "MultiviewIndex.rank: got view 'title', expected body: set MultiviewIndex.tables"
    )
    with pytest.raises(ValueError) as error:
        index.rank([])
    assert str(error.value) == "MultiviewIndex.rank: got no view, expected one or more"
    leaf = jnp.zeros((1, 1))
    with pytest.raises(ValueError) as error:
        written_spans(BeamResult(leaf, leaf, leaf, leaf))
    assert str(error.value) == (
        "written_spans: the search kept no prefixes; expected beam_search(record=True)"
    )
