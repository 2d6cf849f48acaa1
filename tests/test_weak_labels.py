"""scripts/weak_labels.py: a ranker's labels as a split beside those of people."""

from __future__ import annotations

import runpy
import sys

import pytest

from dgr_jax.corpora.beir import BeirCollection, write_beir
from dgr_jax.corpora.types import Passage, Qrel, Query
from tests.conftest import ROOT


@pytest.fixture
def folder(tmp_path):
    passages = [Passage("a", "red fox"), Passage("b", "red hen and fox"), Passage("c", "blue sea")]
    queries = [Query("1", "the red fox"), Query("2", "sea"), Query("3", "whale"), Query("4", "hen")]
    judged = {"train": [Qrel("1", "a", 2), Qrel("2", "b", 1), Qrel("3", "c", 1)],
              "test": [Qrel("4", "b", 1)]}  # fmt: skip
    write_beir(tmp_path / "given", passages, queries, judged)
    return tmp_path / "given"


@pytest.fixture
def label(folder, tmp_path, monkeypatch):
    def run(*flags):
        argv = ["weak_labels.py", f"--data_dir={folder}", f"--out={tmp_path / 'made'}", *flags]
        monkeypatch.setattr(sys, "argv", argv)
        runpy.run_path(str(ROOT / "scripts" / "weak_labels.py"), run_name="__main__")
        return BeirCollection(str(tmp_path / "made"))

    return run


def test_the_first_passages_of_bm25_are_labels(label, folder, capsys):
    made = label("--depth=2")
    assert list(made.qrels("weak")) == [Qrel("1", "a", 1), Qrel("1", "b", 1), Qrel("2", "c", 1)]
    given = BeirCollection(str(folder))
    assert made.splits == ("test", "train", "weak")
    assert list(made.passages()) == list(given.passages())
    assert list(made.all_queries()) == list(given.all_queries())
    assert all(list(made.qrels(s)) == list(given.qrels(s)) for s in given.splits)
    said = "3 labels of 2 of 3 queries; 33.3% of them judged relevant in 'train', which has 3"
    assert said in capsys.readouterr().out


def test_a_query_that_is_a_passage_is_no_label_of_itself(label, folder, tmp_path):
    queries = [Query("a", "red fox"), Query("3", "sea")]
    write_beir(folder, None, queries, {"train": [Qrel("a", "b", 1), Qrel("3", "c", 1)]})
    (folder / "qrels/test.tsv").unlink()
    assert list(label("--depth=1").qrels("weak")) == [Qrel("a", "b", 1), Qrel("3", "c", 1)]


def test_a_run_gives_labels_and_what_is_wrong_is_said(label, tmp_path, capsys):
    run = tmp_path / "llm.trec"
    run.write_text("2 Q0 a 1 9.0 llm\n2 Q0 b 2 8.0 llm\n4 Q0 a 1 7.0 llm\n")
    made = label(f"--run={run}", "--depth=1", "--name=llm")
    assert list(made.qrels("llm")) == [Qrel("2", "a", 1)]
    run.write_text("4 Q0 a 1 7.0 llm\n")
    for flags, message in (
        (("--name=test",), "has a split 'test' already"),
        ((f"--run={run}",), "llm.trec has no query of the split 'train'"),
        (("--depth=0",), "--depth: got 0, expected at least 1"),
    ):
        with pytest.raises(SystemExit):
            label(*flags)
        assert message in capsys.readouterr().err
