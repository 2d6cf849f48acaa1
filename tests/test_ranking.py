"""One order of passages: hits, cut-off, runs and measures agree where scores tie, and so does any
tool that sorts a written run by its scores."""

from __future__ import annotations

import itertools
import random
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from dgr_jax import evaluation
from dgr_jax.corpora import ranking, store, trec
from dgr_jax.corpora.types import Passage, RankList, ScoredPassage
from dgr_jax.retrieval import exhaustive
from dgr_jax.retrieval.bm25 import Bm25
from dgr_jax.retrieval.dense import DenseSearch, Searcher
from dgr_jax.retrieval.exact_search import ExactSearch, Index
from dgr_jax.retrieval.generative import Search
from dgr_jax.retrieval.retriever import Retriever
from tests import students, test_multiview

FLOAT32 = st.floats(width=32, allow_nan=False, allow_infinity=False)
NEAR = st.builds(
    lambda x, step: x * (1 + step * 1e-12), st.sampled_from([0.0, 1.0, -17.25]), FLOAT32
)


@example([float(np.finfo(np.float32).min)] * 3)
@given(st.lists(st.one_of(FLOAT32, NEAR.filter(np.isfinite)), max_size=8))
def test_scores_fall_strictly_as_float32_too(scores):
    scores = sorted(scores, reverse=True)
    fallen = ranking.falling(scores)
    assert all(after < before for before, after in itertools.pairwise(np.float32(fallen)))
    assert ranking.falling(fallen) == fallen
    if not scores or scores[-1] > -3.4e38:  # there is room below
        assert all(low <= score for low, score in zip(fallen, scores, strict=True))


def test_scores_at_the_end_of_the_range_are_raised():
    lowest = float(np.finfo(np.float32).min)
    above = float(np.nextafter(np.float32(lowest), np.float32(0)))
    assert ranking.falling([1.0, lowest, lowest]) == [1.0, above, lowest]
    lowest = float(np.finfo(np.float64).min)
    assert ranking.falling([lowest, lowest]) == [float(np.nextafter(lowest, 0)), lowest]


def test_what_falls_already_stays_as_it_is():
    assert ranking.falling([3.25, 1 / 3, 0.0, -1e-30]) == [3.25, 1 / 3, 0.0, -1e-30]
    assert ranking.falling([]) == []
    one = float(np.nextafter(np.float32(1), np.float32(0)))
    assert ranking.falling([1.0, 1.0, 0.5, 0.5 - 1e-12]) == [1.0, one, 0.5, 0.5 - 2**-25]
    assert ranking.falling([0.0, 0.0]) == [0.0, -(2.0**-126)]
    with pytest.raises(ValueError, match="found the score nan; expected a finite number"):
        ranking.falling([1.0, float("nan")])


@given(st.lists(st.sampled_from([1.0, 1 + 1e-12, 1 - 2**-24, 0.5, 2**-126, 0.0, -(2**-126), -3.5])))
def test_many_ties_fall_as_one_after_another(scores):
    scores = sorted(scores, reverse=True)
    expected = scores[:1]
    for score in scores[1:]:
        expected.append(min(score, float(ranking._below(np.float64(expected[-1])))))
    assert ranking.falling(scores) == expected


def sorted_by_score(path, number, docno_falls):
    """qid -> pids, as a tool sorts them that looks at scores alone and reads them as `number`."""
    rows = [line.split() for line in path.read_text().splitlines()]
    random.Random(0).shuffle(rows)
    found = {}
    for row in sorted(rows, key=lambda row: row[2], reverse=docno_falls):
        found.setdefault(row[0], []).append((number(row[4]), row[2]))
    return {
        qid: [pid for _, pid in sorted(listed, key=lambda pair: -pair[0])]
        for qid, listed in found.items()
    }


def agree(run, path, measured_on):
    """The run in memory, its file and every tool have one order, and the measures are of it."""
    trec.write_run(path, trec.rank_lists(run), "t")
    pids = {qid: [passage.pid for passage in passages] for qid, passages in run.items() if passages}
    assert trec.run_in_memory(trec.runs(path)) == {qid: run[qid] for qid in pids}
    for number, docno_falls in itertools.product((float, np.float32), (True, False)):
        assert sorted_by_score(path, number, docno_falls) == pids
    first = evaluation.per_query(run, measured_on, ("Success@1", "RR"))
    for qid, listed in pids.items():
        ranks = [rank for rank, pid in enumerate(listed, start=1) if pid in measured_on[qid]]
        assert first["RR"][qid] == pytest.approx(1 / ranks[0] if ranks else 0.0)
        assert first["Success@1"][qid] == float(ranks[:1] == [1])


def judged(qids, pids):
    """Two passages of each query, in a random order."""
    drawn = random.Random(1)
    return {qid: dict.fromkeys(drawn.sample(pids, 2), 1) for qid in qids}


def shuffled_pids(count):
    pids = [f"p{i}" for i in range(count)]
    random.Random(2).shuffle(pids)
    return pids


@pytest.fixture
def docids(tmp_path):
    """depth -> a retriever of 60 passages, six for each identifier, in a random order of pids."""
    rows = np.repeat(students.codes(10), 6, axis=0)
    passages = store.write(
        map(Passage, shuffled_pids(60), itertools.repeat("text")), tmp_path / "s"
    )
    queries = students.queries(5)
    vocabulary = SimpleNamespace(
        encode_inputs=lambda texts, _: queries[[int(text) for text in texts]],
        decode=lambda _: "",
    )

    def make(depth):
        search = Search(num_beams=10, depth=depth, batch_size=4, query_length=8)
        return Retriever(students.decoder(rows, search), vocabulary, passages)

    return make


def test_docids(docids, tmp_path):
    whole, queries = docids(60), {f"q{i}": str(i) for i in range(5)}
    deep = whole.run(queries)
    agree(deep, tmp_path / "deep.txt", judged(queries, whole.store.pids))
    retriever = docids(8)
    cut = retriever.run(queries)
    agree(cut, tmp_path / "cut.txt", judged(queries, whole.store.pids))
    for qid, hits in zip(queries, retriever.search(list(queries.values()), k=8), strict=True):
        assert [hit.pid for hit in hits] == [passage.pid for passage in cut[qid]]
        assert [passage.pid for passage in deep[qid][:8]] == [passage.pid for passage in cut[qid]]
        by_rule = sorted(hits, key=lambda hit: (-hit.score, hit.pid))
        assert [hit.rank for hit in by_rule] == list(range(1, 9))
        assert len({hit.score for hit in hits}) < 8  # some tie
    tokens = whole.vocabulary.encode_inputs(queries.values(), 8)
    found = exhaustive.passages(retriever.decoder, tokens)[0]
    assert found.tolist() == retriever.decoder.passages(tokens)[0].tolist()


class Vectors:
    """An encoder whose texts are their vectors."""

    config = SimpleNamespace(dim=2)
    queries = staticmethod(lambda tokens, _: tokens.astype(np.float32))


@pytest.mark.parametrize("settings", [{}, {"max_device_bytes": 1200}], ids=["at once", "streamed"])
@pytest.mark.parametrize("depth", [1, 7, 40, 400])
def test_dense(tmp_path, settings, depth):
    """Ties that end within the spare places, beyond them, and not at all."""
    drawn = np.random.default_rng(0)
    vectors = np.array([[1, 0], [0, 1], [1, 1]], np.float32)[
        drawn.choice(3, 300, p=(0.1, 0.2, 0.7))
    ]
    vectors[:4] = [[3, 0], [3, 0], [0, 0], [5, -9]]
    pids = shuffled_pids(len(vectors))
    searcher = Searcher(
        Vectors(), Index(vectors, ExactSearch(**settings)), DenseSearch(depth=depth)
    )
    assert (searcher.index.plan.blocks > 1) == bool(settings)
    queries = np.array([[1, 0], [0, 1], [1, 1], [0, 0], [-1, -1]])
    scores = queries @ vectors.T
    ordered = [sorted(range(300), key=lambda i, row=row: (-row[i], pids[i])) for row in scores]
    by_pid = searcher.by_pid(pids.__getitem__)
    for found, values in (by_pid.passages(queries), *by_pid.passages_of_blocks([queries])):
        for query, expected in enumerate(ordered):
            free = max(0, depth - 300)
            assert found[query].tolist() == expected[:depth] + [-1] * free
            best = scores[query][expected[:depth]].tolist()
            assert values[query].tolist() == best + [-np.inf] * free


def test_several_views():
    """Of eight passages that the same title names, four are scored, and two are asked for."""
    pids = shuffled_pids(9)
    index = test_multiview.build([[2, 3]] * 9, {"title": [[(4, 1)]] * 8 + [[(5, 1)]]})
    index = test_multiview.dataclasses.replace(
        index, pid_of=pids.__getitem__, scoring=test_multiview.Scoring(max_passages=4)
    )
    parts = test_multiview.written(index, [[(-0.25, (4, 1), "title")]])
    (found,) = index.rank(parts)
    assert len(set(found.scores.tolist())) == 1
    assert [pids[i] for i in found.passages] == sorted(pids[:8])[:4]


def test_bm25(tmp_path):
    pids = shuffled_pids(40)
    texts = [f"honey {'bees ' * (i % 3)}hive" for i in range(40)]
    index = Bm25().fit(store.write(map(Passage, pids, texts), tmp_path / "s"))
    run = index.search({"q": "honey bees", "r": "hive"}, 9)
    lists = [RankList(qid, tuple(passages)) for qid, passages in run.items()]
    trec.write_run(tmp_path / "run.txt", lists, "t")
    written = trec.run_in_memory(trec.runs(tmp_path / "run.txt"))
    agree(written, tmp_path / "again.txt", judged(run, pids))
    assert [p.pid for p in written["r"]] == [p.pid for p in run["r"]] == sorted(pids[::3])[:9]


def test_measures_are_of_the_order_that_is_written(tmp_path):
    passages = [ScoredPassage(pid, 1.0) for pid in ("b", "c", "a")]
    run = {"q": passages}
    assert evaluation.evaluate(run, {"q": {"a": 1}}, ("Success@1",)) == {"Success@1": 1.0}
    trec.write_run(tmp_path / "run.txt", trec.rank_lists(run), "t")
    assert sorted_by_score(tmp_path / "run.txt", np.float32, True) == {"q": ["a", "b", "c"]}
