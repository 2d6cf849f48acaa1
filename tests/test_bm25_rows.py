"""scripts/bm25_rows.py: the baseline without an experiment's stages."""

from __future__ import annotations

import runpy
import sys

import pytest

from dgr_jax.config import cli
from dgr_jax.corpora import beir
from dgr_jax.corpora.types import Passage, Qrel, Query
from tests.conftest import ROOT


@pytest.fixture
def rows(monkeypatch, capsys):
    """flags -> system -> its measures, as they are printed."""
    monkeypatch.setattr(cli, "_configure_logging", lambda verbose: None)

    def run(*flags):
        monkeypatch.setattr(sys, "argv", ["bm25_rows.py", *flags])
        runpy.run_path(str(ROOT / "scripts" / "bm25_rows.py"), run_name="__main__")
        printed = capsys.readouterr().out
        cells = [line.split("│")[1:-1] for line in printed.splitlines() if line.startswith("│")]
        return {name.strip(): [float(cell) for cell in values] for name, *values in cells}, printed

    return run


def test_the_rows_of_the_quickstart_are_those_of_the_readme(rows):
    found, printed = rows("--gin_file=quickstart.gin")
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert found.keys() == {"bm25", "bm25 of words"}
    for name, line in (("bm25", "BM25 of stems"), ("bm25 of words", "BM25 of words")):
        cells = " | ".join(f"{value:.3f}".lstrip("0") for value in found[name])
        assert f"| {line} | {cells} |" in text
    assert "bm25 and bm25 of words: RR@10 0.8715 against 0.8010: +0.0705 (p < 0.001; " in printed


def test_queries_that_are_passages_do_not_find_themselves(rows, tmp_path):
    """As in an experiment; pairs that were judged twice count as there too."""
    texts = [f"the {name} beside the {other}" for name, other in ("ab", "bc", "cd", "da")]
    texts = [text.replace(" a", " otter").replace(" b", " violin") for text in texts]
    passages = [Passage(f"p{i}", text) for i, text in enumerate(texts)]
    queries = [Query(f"p{i}", text) for i, text in enumerate(texts)]
    qrels = {"train": [Qrel("p2", "p3", 1)], "test": [Qrel("p0", "p1", 1), Qrel("p0", "p1", 1)]}
    beir.write_beir(tmp_path, passages, queries, qrels)
    flags = ("--gin_file=beir.gin", f"--data_dir={tmp_path}", "--gin.Evaluate.measures=('RR@10',)")
    assert rows(*flags)[0]["bm25 of words"][0] == 1.0
    assert rows(*flags, "--gin.Prepare.self_hits='keep'")[0]["bm25 of words"][0] == 0.5


def test_settings_reach_the_rows(rows):
    flags = ("--gin_file=quickstart.gin", "--gin.Bm25.k1=0", "--gin.Evaluate.measures=('RR@10',)")
    found, _ = rows(*flags)
    assert list(found) == ["bm25", "bm25 of words"]
    assert found != rows(flags[0], flags[2])[0]
    assert rows(*flags, "--gin.Bm25.stemmer=")[0]["bm25"] == found["bm25 of words"]
