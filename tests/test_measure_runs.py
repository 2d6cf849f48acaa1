"""`evaluate --run --qrels`: runs and judgements from any file, and what is said of them."""

from __future__ import annotations

import gzip
import json
import os
import threading

import pytest

from dgr_jax import evaluate
from dgr_jax.config import cli
from dgr_jax.stages.measure_runs import measure_runs, names

QRELS = "q1 0 a 1\nq2 0 b 1\nq3 0 c 1\n"
RUN = "q1 Q0 a 1 3 t\nq1 Q0 x 2 2 t\nq2 Q0 y 1 3 t\nq2 Q0 b 2 2 t\nq3 Q0 c 1 1 t\nq3 Q0 z 2 0.5 t\n"


@pytest.fixture(autouse=True)
def logging_of_the_tests(monkeypatch):
    monkeypatch.setattr(cli, "_configure_logging", lambda verbose: None)


@pytest.fixture
def files(tmp_path):
    """name, text -> the path of a file."""

    def write(name, text):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
        return str(path)

    return write


def rows(capsys):
    """What is printed: first column -> the others."""
    cells = [line.split("│") for line in capsys.readouterr().out.splitlines() if "│" in line]
    return {row[1].strip(): [cell.strip() for cell in row[2:-1]] for row in cells}


@pytest.mark.parametrize("packed", [False, True])
def test_a_pipe_is_measured_as_a_file_is(files, tmp_path, capsys, caplog, packed):
    qrels, run = files("q.txt", QRELS), files("run.txt", RUN)
    measure_runs([run], qrels, 1)
    expected = rows(capsys)["run.txt"]
    assert expected[0] == "0.667"
    text = gzip.compress(RUN.encode()) if packed else RUN.encode()
    read, write = os.pipe()
    with os.fdopen(write, "wb") as handle:
        handle.write(text)
    os.mkfifo(tmp_path / "run")
    feed = threading.Thread(target=(tmp_path / "run").write_bytes, args=(text,))
    feed.start()
    measure_runs([f"/dev/fd/{read}", str(tmp_path / "run")], qrels, 1)
    feed.join()
    os.close(read)
    assert rows(capsys) == {f"/dev/fd/{read}": expected, str(tmp_path / "run"): expected}
    assert not caplog.messages


def test_two_runs_of_one_file_name_are_two(files, capsys):
    qrels = files("q.txt", QRELS)
    runs = [files("one/run.txt", RUN), files("two/run.txt", RUN.replace("q3 Q0 c", "q3 Q0 w"))]
    measure_runs([*runs, files("other.txt", RUN)], qrels, 1)
    measured = rows(capsys)
    assert list(measured) == [*runs, "other.txt"]
    assert [measured[name][0] for name in runs] == ["0.667", "0.333"]
    with pytest.raises(ValueError, match="run.txt: got it 2 times, expected once"):
        measure_runs([runs[0], runs[0]], qrels, 1)


@pytest.mark.parametrize(
    ("run", "qrels", "message"),
    [
        ("", QRELS, r"--run=.*run.txt: found no passage; expected a TREC run"),
        ("\n\n", QRELS, r"--run=.*run.txt: found no passage; expected a TREC run"),
        (
            RUN.replace("q", "topic"),
            QRELS,
            r"found none of the 3 queries of .*q.txt among its 3, such as 'topic1'; expected a run",
        ),
        (RUN, "", r"--qrels=.*q.txt: found no judgement; expected qid, 0, pid, grade"),
        (RUN, "query-id\tcorpus-id\tscore\n", "--qrels=.*q.txt: found no judgement"),
    ],
)
def test_runs_of_nothing_are_refused(files, run, qrels, message):
    with pytest.raises(ValueError, match=message):
        measure_runs([files("run.txt", run)], files("q.txt", qrels), 1)


@pytest.mark.parametrize(
    ("run", "remark"),
    [
        ("q1 Q0 a 1 3 t\nq1 Q0 x 2 2 t\n", "lacks 2 of the 3 judged queries, which count as 0"),
        (RUN + "q9 Q0 a 1 3 t\n", "1 of its 4 queries have no judgements, and are left out"),
        (
            RUN.replace(" Q0 ", " Q0 doc-"),
            "none of its passages, such as 'doc-a', is among the 3 judged ones; is it of another "
            "collection?",
        ),
        (
            RUN.replace(" 2 2 t", " 2 3 t"),
            "passages of 2 queries have equal scores, and stand in the order of their pids; other "
            "tools may order them otherwise",
        ),
    ],
)
def test_what_may_not_be_meant_is_said(files, caplog, run, remark):
    path = files("run.txt", run)
    measure_runs([path], files("q.txt", QRELS), 1)
    assert caplog.messages == [f"{path}: {remark}"]


def test_a_grade_that_no_judgement_reaches_is_said(files, caplog):
    measure_runs([files("run.txt", RUN)], files("q.txt", QRELS), 2)
    (message,) = caplog.messages
    assert (
        message.startswith("--min_relevance=2: the highest grade of ") and " is 1, so " in message
    )


def test_pairs_with_several_grades_are_said(files, capsys, caplog):
    qrels = files("q.txt", "q1 0 a 1\nq1 0 a 1\nq1 0 x 1\nq1 0 x 0\n")
    measure_runs([files("run.txt", RUN)], qrels, 1, measures=("P@2",))
    assert caplog.messages[0] == (
        f"{qrels}: found 1 pair of query and passage with different grades (q1 x: 1 and 0); "
        "expected one grade for each; the last grade counts"
    )
    assert rows(capsys)["run.txt"] == ["0.500"]


# For programs


def test_json_of_runs_query_by_query(files, capsys):
    qrels, run = files("q.txt", QRELS + "q4 0 d 1\n"), files("run.txt", RUN)
    flags = [f"--run={run}", f"--qrels={qrels}", "--measures=RR@10, P(rel=1,judged_only=True)@2"]
    evaluate.command([*flags, "--per_query", "--json"])
    said = json.loads(capsys.readouterr().out)
    (row,) = said.pop("runs")
    assert said == {"qrels": qrels, "queries": 4, "min_relevance": 1}
    assert (row["run"], row["queries"]) == (run, 3)
    assert row["measures"]["RR@10"] == pytest.approx(2.5 / 4)
    assert [row["per_query"][qid]["RR@10"] for qid in ("q1", "q2", "q3", "q4")] == [1, 0.5, 1, 0]
    assert row["per_query"]["q2"]["P(rel=1,judged_only=True)@2"] == 0.5
    evaluate.command([*flags, "--json"])
    assert "per_query" not in json.loads(capsys.readouterr().out)["runs"][0]


def test_tables_say_how_many_of_the_queries_a_run_has(files, capsys):
    qrels, run = files("q.txt", QRELS + "q4 0 d 1\n"), files("run.txt", RUN)
    measure_runs([run], qrels, 1, measures=("RR@10",), per_query=True)
    out = capsys.readouterr().out
    assert "run.txt: has 3 of the 4 judged queries" in out
    cells = [line.split("│")[1:3] for line in out.splitlines() if "│" in line]
    assert [[cell.strip() for cell in row] for row in cells] == [
        ["run.txt", "0.625"], ["q1", "1.000"], ["q2", "0.500"], ["q3", "1.000"], ["q4", "0.000"],
    ]  # fmt: skip


def test_names_of_measures_may_hold_commas():
    assert names("RR@10,P(rel=2,judged_only=True)@5, AP") == (
        "RR@10", "P(rel=2,judged_only=True)@5", "AP",
    )  # fmt: skip


@pytest.mark.parametrize(
    ("measure", "message"),
    [
        ("MRR@ten", "unknown measure 'MRR@ten'"),
        ("AnswerHits@5", "--measures: got 'AnswerHits@5', expected measures of judgements"),
    ],
)
def test_measures_are_known_before_a_file_is_read(measure, message):
    with pytest.raises(ValueError, match=message):
        measure_runs(["no file"], "no file", 1, measures=(measure,))


@pytest.mark.parametrize("flag", ["--measures=RR@10", "--per_query", "--json"])
def test_flags_of_runs_need_runs(flag, capsys):
    with pytest.raises(SystemExit):
        evaluate.command(["--gin_file=quickstart.gin", flag])
    assert f"{flag.partition('=')[0]} needs --run and --qrels" in capsys.readouterr().err
