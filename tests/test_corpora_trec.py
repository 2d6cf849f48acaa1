"""TREC qrels, runs and score tables: every form, the order of ties, and what is refused."""

from __future__ import annotations

import gzip
import logging
import math
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dgr_jax import evaluation
from dgr_jax.corpora import checks, trec
from dgr_jax.corpora.types import Qrel, RankList, ScoredPassage
from tests.conftest import ROOT


def _file(tmp_path: Path, text: str, name: str = "f.txt") -> Path:
    path = tmp_path / name
    path.write_bytes(gzip.compress(text.encode()) if name.endswith(".gz") else text.encode())
    return path


def _pids(lists) -> dict[str, list[str]]:
    return {rank_list.qid: [passage.pid for passage in rank_list.passages] for rank_list in lists}


@pytest.mark.parametrize(
    "text",
    [
        "q1 0 p1 2\nq1 0 p2 -1\n",
        "q1\t0\tp1\t2\r\n\r\nq1\t0\tp2\t-1\r\n",
        "q1 Q0  p1\t+2\nq1 Q0  p2\t-1",
        "query-id\tcorpus-id\tscore\nq1\tp1\t2\nq1\tp2\t-1\n",
        "q1 p1 2\nq1 p2 -1\n",
    ],
)
@pytest.mark.parametrize("name", ["f.txt", "f.txt.gz"])
def test_qrels_of_every_form(tmp_path, text, name):
    assert list(trec.qrels(_file(tmp_path, text, name))) == [
        Qrel("q1", "p1", 2),
        Qrel("q1", "p2", -1),
    ]


def test_qrels_of_two_columns_are_positive(tmp_path):
    assert list(trec.qrels(_file(tmp_path, "q1 p1\nq2 p1\n"))) == [
        Qrel("q1", "p1", 1),
        Qrel("q2", "p1", 1),
    ]


def test_a_header_of_two_columns_is_of_known_names_alone(tmp_path):
    for header in ("query_id doc_id", "qid\tpid", "query-id corpus-id"):
        read = list(trec.qrels(_file(tmp_path, f"{header}\nq1 p1\n")))
        assert read == [Qrel("q1", "p1", 1)]
    assert list(trec.qrels(_file(tmp_path, "q1 label\n"))) == [Qrel("q1", "label", 1)]


def test_spaces_beyond_ascii_belong_to_ids(tmp_path):
    assert list(trec.qrels(_file(tmp_path, "q p\u00a01 1\n"))) == [Qrel("q", "p\u00a01", 1)]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("q1 0 p1 yes", "line 1: found the relevance 'yes'; expected a whole number"),
        ("q1 p1 1\nq1 p2 1.0", "line 2: found the relevance '1.0'; expected a whole number"),
        ("q1 p1 ²", "line 1: found the relevance '²'; expected a whole number"),
        ("q1", r"line 1: found 1 column \('q1'\); expected 4 columns \(qid, .* or 2 columns"),
        (
            "q 0 p 1\nq p 1",
            r"line 2: found 3 columns \('q p 1'\); expected 4 columns \(qid, an unu",
        ),
    ],
)
def test_qrels_refused(tmp_path, text, message):
    with pytest.raises(ValueError, match=message):
        list(trec.qrels(_file(tmp_path, text)))


def test_runs_are_sorted_by_score_then_pid_whatever_the_file_says(tmp_path):
    text = "q2 Q0 a 0 1e-3 t\nq2 Q0 c 1 7 t\nq2 Q0 b 2 7.0 t\nq1\tQ0\tx\t1\t-2\tt\n"
    assert list(trec.runs(_file(tmp_path, text))) == [
        RankList(
            "q2", (ScoredPassage("b", 7.0), ScoredPassage("c", 7.0), ScoredPassage("a", 0.001))
        ),
        RankList("q1", (ScoredPassage("x", -2.0),)),
    ]


def test_ties_by_rank_on_request(tmp_path):
    path = _file(tmp_path, "q Q0 a 3 1 t\nq Q0 b 2 1 t\nq Q0 c 9 5 t\n")
    assert _pids(trec.runs(path)) == {"q": ["c", "a", "b"]}
    assert _pids(trec.runs(path, ties="rank")) == {"q": ["c", "b", "a"]}
    with pytest.raises(ValueError, match=r"ties='tag'; expected 'pid' or 'rank' \(gin: runs.ties"):
        list(trec.runs(path, ties="tag"))


@pytest.mark.parametrize("score", ["0", "1.5", "nan", "None", "-", "NA"])
def test_an_order_without_scores_is_scored_by_rank(tmp_path, score):
    text = f"q Q0 a 2 {score} t\nq Q0 b 1 {score} t\nr Q0 a 1 {score} t\n"
    assert list(trec.runs(_file(tmp_path, text))) == [
        RankList("q", (ScoredPassage("b", -1.0), ScoredPassage("a", -2.0))),
        RankList("r", (ScoredPassage("a", -1.0),)),
    ]


def test_equal_scores_of_one_query_stay_where_others_differ(tmp_path):
    text = "q Q0 b 1 4 t\nq Q0 a 2 4 t\nr Q0 a 1 2 t\nr Q0 b 2 1 t\n"
    assert next(trec.runs(_file(tmp_path, text))).passages == (
        ScoredPassage("a", 4.0),
        ScoredPassage("b", 4.0),
    )


def test_one_passage_a_query_keeps_its_score(tmp_path):
    lists = list(trec.runs(_file(tmp_path, "q Q0 a 1 4 t\nr Q0 a 1 4 t\n")))
    assert [rank_list.passages[0].score for rank_list in lists] == [4.0, 4.0]


def test_repeated_ranks_give_no_order(tmp_path):
    lists = list(trec.runs(_file(tmp_path, "q Q0 b 0 4 t\nq Q0 a 0 4 t\n")))
    assert lists[0].passages == (ScoredPassage("a", 4.0), ScoredPassage("b", 4.0))
    with pytest.raises(ValueError, match=r"found neither scores nor different ranks for .* 'q'"):
        list(trec.runs(_file(tmp_path, "q Q0 b 0 - t\nq Q0 a 0 - t\n")))


def test_interleaved_queries_are_gathered_with_a_warning(tmp_path, caplog):
    text = "q Q0 a 1 3 t\nr Q0 a 1 3 t\nq Q0 b 2 4 t\n"
    with caplog.at_level(logging.WARNING):
        assert _pids(trec.runs(_file(tmp_path, text))) == {"q": ["b", "a"], "r": ["a"]}
        assert _pids(trec.scores(_file(tmp_path, "q a 1\nr a 2\nq b 3\n"))) == {
            "q": ["b", "a"],
            "r": ["a"],
        }
    assert len(caplog.records) == 2
    assert "the lines of a query do not stand together" in caplog.text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("q Q0 a 1 3\n", r"line 1: found 5 columns \('q Q0 a 1 3'\); expected 6 columns: qid, Q0"),
        ("q Q0 a 1 3 t\nq Q0 b 2 x t", "line 2: found the score 'x'; expected a finite number"),
        ("q Q0 a 1 3 t\nq Q0 b 2 1_0 t", "line 2: found the score '1_0'; expected a finite numb"),
        ("q Q0 a 1 3 t\nq Q0 b 2 ٣ t", "line 2: found the score '٣'; expected a finite number"),
        ("q Q0 a 1 3 t\nq Q0 b 2 inf t", "line 2: found the score 'inf'; expected a finite number"),
        (
            "q Q0 a 1 3 t\nq Q0 b 2 nan t",
            "line 2: found no score for 'b'; expected a finite number",
        ),
        ("q Q0 a 0.5 3 t\n", "line 1: found the rank '0.5'; expected a whole number"),
        (
            "q Q0 a 1 3 t\nq Q0 b 2 2 t\nq Q0 a 3 1 t\n",
            "line 3: found the passage 'a' of the query 'q' again, first seen on line 1; expected",
        ),
    ],
)
def test_runs_refused(tmp_path, text, message):
    with pytest.raises(ValueError, match=message):
        list(trec.runs(_file(tmp_path, text)))


def test_scores_with_and_without_header(tmp_path):
    rows = "q\ta\t0.5\nq\tb\t1.5\nr\ta\t2\n"
    for text in (rows, "qid\tpid\tscore\n" + rows):
        assert _pids(trec.scores(_file(tmp_path, text))) == {"q": ["b", "a"], "r": ["a"]}
    with pytest.raises(ValueError, match=r"line 1: found 2 columns .* expected 3 columns: qid"):
        list(trec.scores(_file(tmp_path, "q a\n")))
    with pytest.raises(
        ValueError, match="line 2: found no score for 'b'; expected a finite number"
    ):
        list(trec.scores(_file(tmp_path, "q a 1\nq b high\n")))


@pytest.mark.parametrize("name", ["run.txt", "run.txt.gz"])
def test_write_run_sorts_ranks_and_keeps_every_digit(tmp_path, name):
    passages = (ScoredPassage("c", 0.1), ScoredPassage("b", 1 / 3), ScoredPassage("a", 0.1))
    trec.write_run(tmp_path / name, [RankList("q", passages), RankList("empty", ())], "tag")
    data = (tmp_path / name).read_bytes()
    assert (gzip.decompress(data) if name.endswith(".gz") else data).decode() == (
        "q Q0 b 1 0.3333333333333333 tag\nq Q0 a 2 0.1 tag\nq Q0 c 3 0.09999998658895493 tag\n"
    )


SCORES = st.floats(allow_nan=False, allow_infinity=False)
RUNS = st.dictionaries(
    st.text("qé\u00a0", min_size=1, max_size=3),
    st.dictionaries(st.text("abcü", min_size=1, max_size=3), SCORES, min_size=2, max_size=5),
    max_size=4,
).filter(lambda run: not run or any(len(set(scores.values())) > 1 for scores in run.values()))


@given(RUNS)
def test_a_run_survives_the_way_out_and_back(tmp_path_factory, run):
    path = tmp_path_factory.mktemp("run") / "run.txt"
    in_memory = {
        qid: [ScoredPassage(*item) for item in sorted(scores.items(), key=lambda i: (-i[1], i[0]))]
        for qid, scores in run.items()
    }
    trec.write_run(path, trec.rank_lists(in_memory), "t")
    back = trec.run_in_memory(trec.runs(path))
    for qid, passages in in_memory.items():
        assert [passage.pid for passage in back[qid]] == [passage.pid for passage in passages]
        for written, passage in zip(back[qid], passages, strict=True):
            assert written.score == pytest.approx(passage.score, rel=1e-5, abs=1e-30)
    again = path.with_name("again.txt")
    trec.write_run(again, trec.rank_lists(back), "t")
    assert again.read_bytes() == path.read_bytes()


@pytest.mark.parametrize(
    ("lists", "tag", "message"),
    [
        ([RankList("q 1", ())], "t", "found the qid 'q 1'; expected a word"),
        ([RankList("q", (ScoredPassage("", 1.0),))], "t", "found the pid ''; expected a word"),
        ([], "my tag", "found the tag 'my tag'; expected a word"),
        (
            [RankList("q", (ScoredPassage("a", math.nan),))],
            "t",
            "found the score nan for the query",
        ),
        ([RankList("q", ()), RankList("q", ())], "t", "found two rank lists of the query 'q'"),
        (
            [RankList("q", (ScoredPassage("a", 2.0), ScoredPassage("a", 1.0)))],
            "t",
            "found the passage 'a' twice for the query 'q'; expected each passage once",
        ),
    ],
)
def test_write_run_refuses_and_leaves_no_file(tmp_path, lists, tag, message):
    with pytest.raises(ValueError, match=message):
        trec.write_run(tmp_path / "run.txt", lists, tag)
    assert not list(tmp_path.iterdir())


def test_qrels_in_memory():
    qrels = [Qrel("q", "a", 1), Qrel("r", "a", 0), Qrel("q", "b", 2), Qrel("q", "a", 3)]
    assert trec.qrels_in_memory(qrels) == {"q": {"a": 3, "b": 2}, "r": {"a": 0}}


def test_check_qrels_counts_and_gives_three_examples():
    qrels = [Qrel("q", f"p{i}", 1) for i in range(6)] + [Qrel("x", "p0", 1), Qrel("x", "p9", 1)]
    assert checks.check_qrels(qrels[:2], {"q"}, {"p0", "p1"}) == (qrels[:2], 0, 0, 0)
    with pytest.raises(ValueError) as caught:
        checks.check_qrels(qrels, {"q"}, {"p0", "p1"}, where="dev.tsv")
    assert str(caught.value) == (
        "dev.tsv: found 6 of 8 judgements with 1 unknown query id (x) and 5 unknown passage ids "
        "(p2, p3, p4); expected ids of the collection's queries and passages"
    )


def test_check_qrels_drops_unknown_ids_on_request(caplog):
    qrels = [Qrel("q", "p0", 1), Qrel("x", "p0", 1), Qrel("q", "p8", 1), Qrel("q", "p9", 0)]
    settings = {"where": "split 'test'", "setting": "Prepare.unknown_judgements"}
    with pytest.raises(ValueError, match="passages; Prepare.unknown_judgements = 'drop' leaves"):
        checks.check_qrels(qrels, {"q"}, {"p0"}, **settings)
    checked = checks.check_qrels(qrels, {"q"}, {"p0"}, unknown="drop", **settings)
    assert checked == checks.CheckedQrels(qrels[:1], 3, unknown_queries=1, unknown_passages=2)
    assert caplog.messages == [
        "split 'test': found 3 of 4 judgements with 1 unknown query id (x) and 2 unknown passage "
        "ids (p8, p9): they are left out"
    ]
    with pytest.raises(ValueError, match="found 3 of 3 judgements .* expected ids of the coll"):
        checks.check_qrels(qrels[1:], {"q"}, {"p0"}, unknown="drop", **settings)
    with pytest.raises(ValueError, match="unknown_judgements: got 'keep', expected 'error' or"):
        checks.check_qrels(qrels, {"q"}, {"p0"}, unknown="keep", **settings)


# Real runs, where they are: first stages, cross-encoders, language models' orders without scores.

MSMARCO = ROOT.parent / "shared" / "data" / "msmarco"


@pytest.mark.parametrize("path", sorted(MSMARCO.glob("runs/*/*.txt")), ids=lambda p: p.name)
def test_real_runs_are_read_whole_and_agree_with_the_judgements(path):
    judged = trec.qrels_in_memory(trec.qrels(MSMARCO / "qrels" / "dl19.tsv"))
    run = trec.run_in_memory(trec.runs(path, ties="rank"))
    assert run.keys() == judged.keys()
    assert sum(map(len, run.values())) == len(path.read_text().splitlines())
    for listed in run.values():
        scores = [passage.score for passage in listed]
        assert scores == sorted(scores, reverse=True)
    found = evaluation.evaluate(run, judged, ("nDCG@10", "RR@10"), min_relevance=2)
    assert found["nDCG@10"] > 0.5
    assert found["RR@10"] > 0.7


@pytest.mark.parametrize(
    ("grade", "message"),
    [
        (
            "10000000000000000000",
            "the relevance '1000.*'; expected a whole number of at most 1,000,",
        ),
        ("-1000001", "the relevance '-1000001'; expected a whole number of at most 1,000,000"),
        ("9" * 5000, "the relevance '9+...9+'; expected a whole number of at most 1,000,000"),
        ("NaN", "the relevance 'NaN'; expected a whole number"),
        ("1_0", "the relevance '1_0'; expected a whole number"),
    ],
)
def test_grades_that_cannot_be_measured_with_are_refused(tmp_path, grade, message):
    path = _file(tmp_path, f"q 0 a 1000000\nq 0 b -0002\nq 0 c {grade}\n")
    judged = trec.qrels(path)
    assert [next(judged).relevance for _ in range(2)] == [1_000_000, -2]
    with pytest.raises(ValueError, match=f"line 3: found {message}") as caught:
        next(judged)
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize(
    "character", ["\0", "\x1b", "\x1f", "\x0c", "\x7f", "\x85", "\ufeff", "\r"]
)
def test_control_characters_in_columns_are_refused(tmp_path, character):
    run = _file(tmp_path, f"q Q0 a 1 3 t\nq Q0 b{character}c 2 2 t\n", "run.txt")
    table = _file(tmp_path, f"q a 1\nq b{character}c 2\n", "table.txt")
    message = re.escape(f"line 2: found the character {character!r}; expected columns without it")
    for read, path in ((trec.runs, run), (trec.scores, table), (trec.qrels, table)):
        with pytest.raises(ValueError, match=message):
            list(read(path))


def test_ranks_of_any_length_end_in_words(tmp_path):
    path = _file(tmp_path, f"q Q0 a {'9' * 5000} 3 t\n")
    with pytest.raises(
        ValueError, match=r"line 1: found the rank '9+\.\.\.9+'; expected a whole num"
    ):
        list(trec.runs(path))


def test_write_run_refuses_ids_that_no_reader_takes(tmp_path):
    lists = [RankList("q", (ScoredPassage("a\x1b", 1.0),))]
    with pytest.raises(
        ValueError, match=r"found the pid 'a\\x1b'; expected a word, for white space"
    ):
        trec.write_run(tmp_path / "run.txt", lists, "t")
