import dataclasses
import gzip
import logging
import sys
import types

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dgr_jax.corpora.types import Passage, ScoredPassage
from dgr_jax.retrieval.bm25 import Bm25
from dgr_jax.teaching import sparse_teacher, teachers
from dgr_jax.teaching.list_recipes import TopM, TwoLists
from dgr_jax.teaching.sparse_teacher import SparseEncoderTeacher
from dgr_jax.teaching.teacher import Coverage, Teacher, best_first, judged_first
from dgr_jax.teaching.teachers import (
    BiEncoderTeacher,
    Bm25Teacher,
    CrossEncoderTeacher,
    FusionTeacher,
    RunTeacher,
    VectorTeacher,
)


class ListStore(list):
    """Passages in memory with the methods of a PassageStore."""

    @property
    def pids(self):
        return [passage.pid for passage in self]

    def __contains__(self, pid):
        return pid in self.pids

    def index_of(self, pid):
        for row, passage in enumerate(self):
            if passage.pid == pid:
                return row
        raise KeyError(pid)


STORE = ListStore(
    Passage(pid, text)
    for pid, text in [
        ("a", "bees make honey in the hive"),
        ("b", "the queen lays eggs in the hive"),
        ("c", "sails and masts of ships"),
        ("d", "bread dough needs yeast"),
        ("e", ""),
    ]
)
QUERIES = {"q1": "honey of bees", "q2": "masts of ships", "q3": "zebra"}
CANDIDATES = {"q1": ["c", "b"], "q2": ["a", "c", "d"], "q3": []}
QRELS = {"q1": {"a": 1, "d": 0}, "q2": {"c": 2, "b": 1}, "q3": {"elsewhere": 1}}


def pids(ranked):
    return {qid: [p.pid for p in listed] for qid, listed in ranked.items()}


def scored(*items):
    return [ScoredPassage(pid, score) for pid, score in items]


def rank(made, queries=QUERIES, candidates=CANDIDATES, qrels=QRELS, **settings):
    return dict(made.rank(queries, candidates, STORE, qrels, **settings))


def write_run(path, rows):
    path.write_text("".join(f"{q} Q0 {p} {r} {s} tag\n" for q, p, r, s in rows))
    return str(path)


# Teachers.


def test_bm25_teacher_scores_candidates_and_puts_the_judged_first():
    ranked = rank(Bm25Teacher())
    assert list(ranked) == list(QUERIES)
    assert pids(ranked) == {"q1": ["a", "b", "c"], "q2": ["c", "b", "a", "d"], "q3": []}
    own = rank(Bm25Teacher(judged_first=False))
    assert pids(own)["q2"] == ["c", "a", "b", "d"], "no word in common: ties by pid"
    index = Bm25().fit(STORE)
    assert own["q1"][0].score == index.scores(QUERIES["q1"])[0]
    for listed in ranked.values():
        scores = [p.score for p in listed]
        assert scores == sorted(scores, reverse=True)


def test_bm25_teacher_can_add_its_own_best():
    ranked = rank(Bm25Teacher(judged_first=False, own=1))
    assert pids(ranked)["q1"] == ["a", "b", "c"], "its first is judged already"
    own = rank(Bm25Teacher(judged_first=False, own=1), candidates={"q1": ["b"]}, qrels={})
    assert pids(own)["q1"] == ["a", "b"]
    two = rank(Bm25Teacher(own=2), queries={"q1": "hive"}, candidates={"q1": ["c"]}, qrels={})
    assert pids(two)["q1"] == ["a", "b", "c"]
    with pytest.raises(ValueError, match="Bm25Teacher.own: got -1, expected at least 0"):
        rank(Bm25Teacher(own=-1))


def own_scores(scores):
    """A teacher with these scores, qid -> pid -> score."""

    @dataclasses.dataclass(frozen=True)
    class Own(Teacher):
        def order(self, queries, pools, store):
            for qid, listed in scores.items():
                yield qid, best_first(list(listed), np.array(list(listed.values()), np.float64))

    return Own()


def test_scores_that_are_not_finite_are_left_out_and_counted(caplog):
    nan, inf = float("nan"), float("inf")
    coverage = Coverage()
    teacher = own_scores({"q1": {"a": 1.0, "b": nan, "c": 2.0, "d": inf}, "q2": {"a": -inf}})
    ranked = rank(teacher, coverage=dict.fromkeys(QUERIES, coverage))
    assert ranked == {"q1": scored(("c", 2.0), ("a", 1.0)), "q2": [], "q3": []}
    assert coverage.report()["scores_not_finite"] == 3
    assert "Teach.teacher=@Own(): 3 of 5 scores are not finite (NaN or inf)" in caplog.text


def test_scores_that_float32_cannot_hold_teach_nothing(caplog):
    """1e39 would be infinite in a rank list, and the two beside it one number."""
    own = {"q1": {"a": 1e39, "b": 100000000.2, "c": 100000000.1}, "q2": {"a": -1e39}}
    ranked = rank(own_scores(own), coverage={})
    assert pids(ranked) == {"q1": ["b", "c"], "q2": [], "q3": []}
    assert "2 of 4 scores are not finite (NaN or inf), or beyond 1e30" in caplog.text
    assert "1 of 1 lists have one score for all passages" in caplog.text


def test_lists_of_equal_scores_are_counted_and_warned_of(caplog):
    coverage = Coverage()
    teacher = own_scores({"q1": {"b": 2.0, "a": 2.0}, "q2": {"a": 1.0, "b": 0.0}, "q3": {"a": 1.0}})
    rank(teacher, coverage=dict.fromkeys(QUERIES, coverage))
    assert coverage.report()["lists_of_equal_scores"] == 1
    assert "Teach.teacher=@Own(): 1 of 2 lists have one score for all passages" in caplog.text
    caplog.clear()
    rank(own_scores({"q1": {"b": 2.0, "a": 1.0}}), coverage={})
    assert not caplog.text


def test_min_relevance_decides_what_is_positive():
    ranked = rank(Bm25Teacher(), min_relevance=2)
    assert pids(ranked) == {"q1": ["b", "c"], "q2": ["c", "a", "d"], "q3": []}


def test_run_teacher_orders_the_candidates_that_it_holds(tmp_path):
    path = write_run(
        tmp_path / "run.txt",
        [
            ("q1", "d", 1, 9.0),
            ("q1", "b", 2, 1.0),
            ("q1", "c", 3, 5.0),
            ("q9", "c", 1, 5.0),
            ("q1", "gone", 4, 4.0),
        ],
    )
    coverage = Coverage()
    ranked = rank(RunTeacher(path), coverage=dict.fromkeys(QUERIES, coverage))
    assert ranked == {"q1": scored(("c", 5.0), ("b", 1.0)), "q2": [], "q3": []}
    assert coverage.report() == {
        "queries": 3,
        "queries_scored": 1,
        "queries_with_positive": 2,
        "candidates": 5,
        "candidates_scored": 2 / 5,
        "positive_in_candidates": 1 / 2,
        "positive_scored": 0.0,
        "Success@1": 0.0,
        "RR@10": 0.0,
    }
    first = rank(RunTeacher(path, judged_first=True))
    # q1: the mean gap of two scores is 4; q2: the run knows nothing but the judgements do.
    assert first["q1"] == scored(("a", 9.0), ("c", 5.0), ("b", 1.0))
    assert first["q2"] == scored(("c", 1.0), ("b", 0.0))


def test_run_teacher_can_take_the_lists_of_the_run(tmp_path, caplog):
    path = write_run(
        tmp_path / "run.txt", [("q1", "d", 1, 9.0), ("q1", "gone", 2, 7.0), ("q1", "a", 3, 5.0)]
    )
    with caplog.at_level(logging.WARNING):
        ranked = rank(RunTeacher(path, pool="run"))
    assert pids(ranked) == {"q1": ["d", "a"], "q2": [], "q3": []}
    assert caplog.messages == [
        f"{path}: left out 1 of 3 places of the run: their passages are not in the corpus"
    ]


def test_run_teacher_reads_score_tables_and_gzip_and_keeps_ranks_of_ties(tmp_path):
    table = tmp_path / "scores.tsv"
    table.write_text("\nq2\ta\t0.5\nq2\tc\t0.7\n")
    ranked = rank(RunTeacher(str(table)))
    assert pids(ranked)["q2"] == ["c", "a"]
    packed = tmp_path / "run.gz"
    packed.write_bytes(gzip.compress(b"q2 Q0 d 1 3 x\nq2 Q0 a 2 3 x\nq2 Q0 c 3 2 x\n"))
    ranked = rank(RunTeacher(str(packed)))
    assert pids(ranked)["q2"] == ["d", "a", "c"]


def test_bad_runs_are_named(tmp_path):
    path = write_run(tmp_path / "run.txt", [("other", "a", 1, 1.0)])
    with pytest.raises(ValueError, match=r"RunTeacher\.path = .*: none of the 3 queries is in"):
        rank(RunTeacher(path))
    with pytest.raises(ValueError, match=r"RunTeacher\.pool = 'x', expected 'candidates' or 'run'"):
        RunTeacher(path, pool="x")
    (tmp_path / "empty").write_text("\n")
    with pytest.raises(ValueError, match=r"RunTeacher\.path = .*the file is empty"):
        rank(RunTeacher(str(tmp_path / "empty")))


def vector_files(tmp_path, passages, queries, ids):
    np.save(tmp_path / "p.npy", passages)
    np.save(tmp_path / "q.npy", queries)
    (tmp_path / "ids.tsv").write_text(ids)
    return [str(tmp_path / name) for name in ("p.npy", "q.npy", "ids.tsv")]


def test_vector_teacher_takes_dot_products(tmp_path):
    rng = np.random.default_rng(0)
    passages = rng.normal(size=(5, 3)).astype(np.float16)
    vectors = rng.normal(size=(2, 3)).astype(np.float16)
    ids = "query-id\tcorpus-id\tscore\nq2\tc\t2\nq2\tb\t1\nq1\ta\t1\n"
    files = vector_files(tmp_path, passages, vectors, ids)
    ranked = rank(VectorTeacher(*files))
    scores = vectors.astype(np.float32) @ passages.astype(np.float32).T
    expected = sorted("abcd", key=lambda pid: -scores[0][ord(pid) - ord("a")])
    assert pids(ranked)["q2"] == expected
    np.testing.assert_allclose(
        [p.score for p in ranked["q1"]], np.sort(scores[1][[0, 1, 2]])[::-1], rtol=1e-5
    )
    assert ranked["q3"] == []
    more = np.concatenate([passages[::-1], passages[:1]])  # of passages that are elsewhere, too
    corpus = tmp_path / "corpus.jsonl"
    corpus.write_text("".join(f'{{"_id": "{pid}", "text": ""}}\n' for pid in "edcbax"))
    listed = tmp_path / "pids.txt"
    listed.write_text("\n".join("edcbax"))
    for path in (corpus, listed):
        of_more = VectorTeacher(*vector_files(tmp_path, more, vectors, ids), str(path))
        assert pids(rank(of_more)) == pids(ranked)
    corpus.write_text('{"_id": "a", "text": ""}\n')
    with pytest.raises(ValueError, match=r"passage_ids_path = .*: lacks 4 of the 5 .*as 'b'"):
        rank(VectorTeacher(*files, str(corpus)))


def test_fusion_adds_the_weighted_scores_of_passages_that_all_teachers_know(tmp_path):
    """The run has another order, and knows fewer queries."""
    rows = [("q2", "d", 1, 4.0), ("q2", "a", 2, 3.0), ("q1", "b", 1, 2.0), ("q1", "a", 2, 1.0)]
    run = RunTeacher(write_run(tmp_path / "run.txt", rows))
    bm25 = Bm25Teacher(judged_first=False)
    ranked = rank(FusionTeacher((bm25, run), (0.5, 2.0)))
    alone = {qid: {p.pid: p.score for p in listed} for qid, listed in rank(bm25).items()}
    assert ranked["q1"] == scored(
        ("b", 4.0 + alone["q1"]["b"] / 2), ("a", 2.0 + alone["q1"]["a"] / 2)
    )
    assert pids(ranked) == {"q1": ["b", "a"], "q2": ["d", "a"], "q3": []}
    assert pids(rank(FusionTeacher((bm25, run), judged_first=True)))["q2"] == ["c", "b", "d", "a"]
    with pytest.raises(ValueError, match="FusionTeacher.teachers: got 1, expected 2 or more"):
        FusionTeacher((bm25,))
    with pytest.raises(ValueError, match="FusionTeacher.weights: got 1, expected 2, one a teacher"):
        FusionTeacher((bm25, run), (1.0,))


@pytest.mark.parametrize(
    ("passages", "queries", "ids", "message"),
    [
        ((4, 3), (1, 3), "q1\n", r"passages_path = .*: got 4 vectors, expected one for each of 5"),
        ((5, 3), (1, 2), "q1\n", r"queries_path = .*: got 2 dimensions, expected 3 as in"),
        ((5, 3), (3, 3), "q1\nq1\n", r"query_ids_path = .*: got 1 different qids, .* each of 3"),
    ],
)
def test_vectors_that_do_not_fit_are_named(tmp_path, passages, queries, ids, message):
    files = vector_files(
        tmp_path, np.zeros(passages, np.float32), np.zeros(queries, np.float32), ids
    )
    with pytest.raises(ValueError, match=r"VectorTeacher\." + message):
        rank(VectorTeacher(*files))


class FakeCrossEncoder:
    """Scores a pair by the number of words in common."""

    calls: list[int] = []

    def __init__(self, model, max_length):
        if model == "unreachable":
            raise OSError("no route to host")
        self.wide = model == "wide"

    def predict(self, pairs, *, batch_size, show_progress_bar):
        self.calls.append(len(pairs))
        scores = np.array([len(set(q.split()) & set(p.split())) for q, p in pairs], np.float32)
        return np.stack([scores, scores], 1) if self.wide else scores


class FakeSentenceTransformer:
    """Encodes a text as its counts of a few words."""

    def __init__(self, model):
        self.model = model

    def encode(self, texts, *, batch_size, normalize_embeddings, **settings):
        words = ["bees", "honey", "masts", "ships", "query:", "passage:"]
        vectors = np.array([[text.split().count(word) for word in words] for text in texts], float)
        if normalize_embeddings:
            vectors /= np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-9)
        return vectors


class FakeSparseTensor:
    """As much of a sparse tensor as is read, of an array [rows, columns]."""

    def __init__(self, array):
        self.array, self.shape = array, array.shape

    def coalesce(self):
        return self

    def indices(self):
        return Numbers(np.stack(self.array.nonzero()))

    def values(self):
        return Numbers(self.array[self.array.nonzero()])


class Numbers(np.ndarray):
    """A tensor's numbers, in memory."""

    def __new__(cls, array):
        return np.asarray(array).view(cls)

    def float(self):
        return self.astype(np.float32)

    def numpy(self):
        return np.asarray(self)


class FakeSparseEncoder:
    """Counts words of passages, and weighs those of queries twice."""

    encoded: list[int] = []

    def __init__(self, model):
        if model == "unreachable":
            raise OSError("no route to host")

    def encode_document(self, texts, *, convert_to_sparse_tensor, max_active_dims, **settings):
        assert convert_to_sparse_tensor and settings["save_to_cpu"]
        self.encoded.append(len(texts))
        words = ["hive", "honey", "masts", "ships"][:max_active_dims]
        return FakeSparseTensor(
            np.array([[text.split().count(word) for word in words] for text in texts], np.float64)
        )

    def encode_query(self, texts, **settings):
        tensor = self.encode_document(texts, **settings)
        return FakeSparseTensor(2 * tensor.array)


@pytest.fixture
def sentence_transformers(monkeypatch):
    fake = types.ModuleType("sentence_transformers")
    fake.CrossEncoder = FakeCrossEncoder
    fake.SentenceTransformer = FakeSentenceTransformer
    fake.SparseEncoder = FakeSparseEncoder
    monkeypatch.setitem(sys.modules, "sentence_transformers", fake)
    monkeypatch.setattr(FakeCrossEncoder, "calls", [])
    monkeypatch.setattr(FakeSparseEncoder, "encoded", [])


def test_cross_encoder_teacher(sentence_transformers, monkeypatch):
    monkeypatch.setattr(teachers, "_BLOCK", 1)
    ranked = rank(CrossEncoderTeacher("local"))
    assert ranked["q1"] == scored(("a", 2.0), ("c", 1.0), ("b", 0.0))
    assert ranked["q2"] == scored(("c", 3.0), ("a", 0.0), ("b", 0.0), ("d", 0.0))
    assert ranked["q3"] == []
    assert FakeCrossEncoder.calls == [3, 4]
    with pytest.raises(ValueError, match=r"CrossEncoderTeacher\.model = 'unreachable' cannot be"):
        rank(CrossEncoderTeacher("unreachable"))
    with pytest.raises(ValueError, match=r"got scores of shape \(3, 2\) for 3 pairs"):
        rank(CrossEncoderTeacher("wide"))


def test_bi_encoder_teacher(sentence_transformers):
    ranked = rank(BiEncoderTeacher("local", normalise=False))
    assert ranked["q1"] == scored(("a", 2.0), ("b", 0.0), ("c", 0.0))
    assert ranked["q2"][0] == ScoredPassage("c", 2.0)
    prefixed = BiEncoderTeacher("local", query_prefix="passage: ", passage_prefix="passage: ")
    found = rank(prefixed)["q1"]
    assert found[0].score == pytest.approx(1.0)
    assert found[1].score == pytest.approx(1 / 3**0.5)
    assert rank(BiEncoderTeacher("local"), {}, {}, {}) == {}


def test_sparse_encoder_teacher(sentence_transformers, monkeypatch):
    monkeypatch.setattr(sparse_teacher, "_QUERIES", 2)
    ranked = rank(SparseEncoderTeacher("local"))
    assert ranked["q1"] == scored(("a", 2.0), ("b", 0.0), ("c", 0.0))
    assert ranked["q2"] == scored(("c", 4.0), ("a", 0.0), ("b", 0.0), ("d", 0.0))
    assert ranked["q3"] == []
    assert FakeSparseEncoder.encoded == [4, 2, 1], "each passage once, two queries together"
    assert rank(SparseEncoderTeacher("local", max_active_dims=1))["q1"][0].score == 0.0
    assert rank(SparseEncoderTeacher("local"), {}, {}, {}) == {}
    with pytest.raises(ValueError, match=r"SparseEncoderTeacher\.model = 'unreachable' cannot be"):
        rank(SparseEncoderTeacher("unreachable"))


def test_sparse_encoders_need_a_newer_package(sentence_transformers, monkeypatch):
    monkeypatch.delattr(sys.modules["sentence_transformers"], "SparseEncoder")
    with pytest.raises(ImportError, match="'sentence-transformers>=5'"):
        rank(SparseEncoderTeacher("local"))


@pytest.mark.parametrize("kind", [CrossEncoderTeacher, BiEncoderTeacher, SparseEncoderTeacher])
def test_encoders_without_their_extra(kind, monkeypatch):
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)
    with pytest.raises(
        ImportError,
        match=rf"^{kind.__name__}\.model needs the extra 'dgr_jax\[encoders\]': pip install",
    ):
        rank(kind())


# Judged passages first.

lists = st.dictionaries(st.sampled_from("abcdefgh"), st.floats(-5, 5, width=32), max_size=6).map(
    lambda d: sorted(scored(*d.items()), key=lambda p: (-p.score, p.pid))
)
grades = st.dictionaries(st.sampled_from("abcdefgh"), st.integers(1, 3), max_size=3)


@settings(max_examples=100, deadline=None)
@given(lists, grades)
def test_judged_first_moves_positives_and_keeps_everything_else(listed, positives):
    moved = judged_first(listed, positives)
    count = len(positives)
    assert {p.pid for p in moved[:count]} == set(positives)
    assert moved[count:] == [p for p in listed if p.pid not in positives]
    assert [positives[p.pid] for p in moved[:count]] == sorted(positives.values(), reverse=True)
    scores = [p.score for p in moved]
    assert all(np.isfinite(scores))
    assert scores == sorted(scores, reverse=True)
    assert count == 0 or count == len(moved) or scores[count - 1] > scores[count]
    again = judged_first(moved, positives)
    assert again == moved


def test_judged_first_leaves_a_right_order_alone():
    listed = scored(("a", 3.0), ("b", 2.0), ("c", 1.0))
    assert judged_first(listed, {"a": 1}) == listed
    assert judged_first(listed, {"c": 2, "a": 1}) == scored(("c", 4.0), ("a", 3.0), ("b", 2.0))


def test_judged_first_stays_above_in_float32():
    moved = judged_first(scored(("a", 5e6), ("b", 5e6 - 1e-3)), {"b": 1})
    assert np.float32(moved[0].score) > np.float32(moved[1].score)


def test_report_measures_the_teachers_own_order():
    ranked = {
        "q1": scored(("b", 2.0), ("a", 1.0)),
        "q2": scored(("c", 2.0)),
        "q3": [],
        "q4": scored(("a", 1.0)),
    }
    candidates = {"q1": ["a", "b", "c"], "q2": ["c"], "q3": ["a"], "q4": ["b"]}
    positives = {"q1": {"a": 1}, "q2": {"c": 1}, "q3": {"d": 1}, "q4": {}}
    coverage = Coverage()
    for qid, listed in ranked.items():
        coverage.add(listed, candidates[qid], positives[qid])
    assert coverage.report() == {
        "queries": 4,
        "queries_scored": 3,
        "queries_with_positive": 3,
        "candidates": 6,
        "candidates_scored": 3 / 6,
        "positive_in_candidates": 2 / 3,
        "positive_scored": 2 / 3,
        "Success@1": 1 / 3,
        "RR@10": (1 / 2 + 1) / 3,
    }
    assert set(Coverage().report().values()) == {0}


# Rank lists.


def select(recipe, ranked, qrels, candidates=None, qids=None, **settings):
    qids = list(ranked) if qids is None else qids
    return recipe.select(
        ranked.items(), qids=qids, store=STORE, qrels=qrels, candidates=candidates or {}, **settings
    )


def test_top_m_is_the_list_as_it_is_with_the_positive_ensured():
    ranked = {
        "q1": scored(("d", 4.0), ("a", 3.0), ("b", 2.0), ("c", 1.0)),
        "q2": scored(("d", 4.0), ("a", 3.0), ("b", 2.0), ("c", 1.0)),
        "q3": scored(("b", 2.0), ("a", 1.0)),
        "q4": scored(("a", 1.0), ("b", 0.5)),
        "q5": scored(("b", 1.0)),
        "q6": scored(("a", 1.0)),
    }
    qrels = {"q1": {"a": 1}, "q2": {"a": 1, "c": 2}, "q3": {"b": 1}, "q5": {"a": 1}, "q6": {"a": 1}}
    lists = select(TopM(size=3), ranked, qrels)
    assert lists.passages.tolist() == [[3, 0, 1], [3, 0, 2], [1, 0, -1]]
    assert (TopM(size=3).lists_a_query, TopM(size=3).length) == (1, 3)
    assert lists.teacher_scores.tolist() == [[4, 3, 2], [4, 3, 1], [2, 1, 0]]
    assert lists.positives.tolist() == [1, 2, 0]
    assert lists.positive_passages.tolist() == [0, 2, 1]
    assert lists.query_rows.tolist() == [0, 1, 2]
    assert {a.dtype for a in (lists.passages, lists.positives, lists.query_rows)} == {
        np.dtype(np.int32)
    }
    assert lists.teacher_scores.dtype == np.float32
    assert lists.report == {
        "queries": 6,
        "lists": 3,
        "without_positive": 1,
        "positive_not_scored": 1,
        "too_few_negatives": 1,
    }


def test_query_rows_follow_the_given_qids_and_nothing_gives_empty_arrays():
    ranked = {"q1": scored(("a", 2.0), ("b", 1.0))}
    lists = select(TopM(), ranked, {"q1": {"a": 1}}, qids=["q0", "q1"])
    assert lists.query_rows.tolist() == [1]
    both = {"q1": ranked["q1"], "q0": scored(("c", 2.0), ("d", 1.0))}
    lists = select(TopM(size=2), both, {"q1": {"a": 1}, "q0": {"d": 1}}, qids=["q0", "q1"])
    assert lists.query_rows.tolist() == [0, 1]
    assert lists.passages.tolist() == [[2, 3], [0, 1]]
    assert lists.positives.tolist() == [1, 0]
    empty = select(TopM(), {}, {}, qids=["q0"])
    assert empty.passages.shape == empty.teacher_scores.shape == (0, 5)
    assert len(empty.positive_passages) == 0


def test_min_relevance_holds_for_lists_too():
    ranked = {"q1": scored(("a", 3.0), ("b", 2.0), ("c", 1.0))}
    lists = select(TopM(size=2), ranked, {"q1": {"a": 1, "c": 2}}, min_relevance=2)
    assert lists.passages.tolist() == [[0, 2]]
    assert lists.positives.tolist() == [1]


BIG = ListStore(Passage(f"p{i:03d}", "x") for i in range(60))


def two_lists_case(seed):
    rng = np.random.default_rng(seed)
    order = [f"p{i:03d}" for i in rng.permutation(60)]
    ranked = {"q": scored(*((pid, 60.0 - i) for i, pid in enumerate(order)))}
    student = [f"p{i:03d}" for i in rng.permutation(60)]
    qrels = {"q": {student[0]: 1, student[5]: 2, student[50]: 2, student[7]: 0}}
    return ranked, student, qrels


@pytest.mark.parametrize("seed", range(5))
def test_two_lists_share_the_negatives_of_the_student(seed):
    ranked, student, qrels = two_lists_case(seed)
    recipe = TwoLists(negatives=4, depth=20)
    lists = recipe.select(
        ranked.items(), qids=["q"], store=BIG, qrels=qrels, candidates={"q": student}, seed=seed
    )
    assert lists.passages.shape == (2, 5) == (recipe.lists_a_query, recipe.length)
    place = {p.pid: i for i, p in enumerate(ranked["q"])}
    negatives = []
    for row, positive, scores in zip(
        lists.passages, lists.positive_passages, lists.teacher_scores, strict=True
    ):
        listed = [BIG[i].pid for i in row]
        assert listed == sorted(listed, key=place.get), "the teacher's order"
        assert scores.tolist() == [60.0 - place[pid] for pid in listed]
        assert qrels["q"].get(BIG[positive].pid, 0) >= 1
        negatives.append(set(listed) - {BIG[positive].pid})
    assert negatives[0] == negatives[1]
    assert student[1] in negatives[0], "the student's first passage that is not positive"
    assert negatives[0] <= set(student[:20])
    assert not negatives[0] & {student[0], student[5], student[50]}
    best = min((student[5], student[50]), key=place.get)
    assert BIG[lists.positive_passages[0]].pid == best


def test_two_lists_depend_on_seed_and_query_alone():
    ranked, student, qrels = two_lists_case(0)
    more = {"other": ranked["q"], **ranked}
    recipe = TwoLists(negatives=4, depth=60)

    def draw(run, seed):
        lists = recipe.select(
            run.items(),
            qids=list(run),
            store=BIG,
            qrels={qid: qrels["q"] for qid in run},
            candidates={qid: student for qid in run},
            seed=seed,
        )
        return lists.passages[-2:].tolist()

    assert draw(ranked, 1) == draw(more, 1)
    assert len({str(draw(ranked, seed)) for seed in range(5)}) > 1
    drawn = {passage for seed in range(200) for passage in draw(ranked, seed)[0]}
    assert len(drawn) == 60 - 2, "every negative comes up, and the best positive"


def test_two_lists_of_one_positive_are_equal_and_too_few_negatives_are_counted():
    ranked = {
        "q1": scored(("a", 3.0), ("b", 2.0), ("c", 1.0)),
        "q2": scored(("a", 3.0), ("b", 2.0), ("c", 1.0)),
        "q3": scored(("a", 3.0)),
        "q4": scored(("a", 3.0), ("b", 2.0), ("c", 1.0)),
    }
    qrels = {"q1": {"a": 1}, "q2": {"a": 1}, "q3": {"b": 1}, "q4": {}}
    candidates = {
        "q1": ["c", "c", "a", "b"],
        "q2": ["d", "c", "a", "e"],  # the teacher has not scored d and e
        "q3": ["a"],
        "q4": ["a"],
    }
    lists = select(TwoLists(negatives=2, depth=4), ranked, qrels, candidates)
    assert lists.passages.tolist() == [[0, 1, 2], [0, 1, 2]]
    assert lists.query_rows.tolist() == [0, 0]
    assert lists.report == {
        "queries": 4,
        "lists": 2,
        "without_positive": 1,
        "positive_not_scored": 1,
        "too_few_negatives": 1,
    }


def test_bad_recipes_are_named():
    with pytest.raises(ValueError, match=r"TopM\.size: got 1, expected at least 2"):
        TopM(size=1)
    with pytest.raises(ValueError, match=r"TwoLists\.depth: got 3, expected at least 4, TwoLists"):
        TwoLists(negatives=4, depth=3)
