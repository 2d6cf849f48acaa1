"""Text of others controls no terminal, table or plot."""

from __future__ import annotations

import csv
import io
import logging
import math
from types import SimpleNamespace

import pytest

from dgr_jax import display, evaluation, plots
from dgr_jax.analysis.inspection import Table
from dgr_jax.config import cli
from dgr_jax.stages.teach import taught
from dgr_jax.studies import grid, report
from dgr_jax.studies.rows import markdown
from dgr_jax.training import metrics

EVIL = {
    "\x1b[31mred\x1b[0m": "\\x1b[31mred\\x1b[0m",
    "\x1b]0;title\x07": "\\x1b]0;title\\x07",
    "\x9b31mred": "\\x9b31mred",
    "\x07\x08\x7f\x00": "\\x07\\x08\\x7f\\x00",
    "over\rwritten": "over\\rwritten",
    "\u202egpj.exe\u202c": "\\u202egpj.exe\\u202c",
    "\u2066a\u2069\u200e\u200f\u061c": "\\u2066a\\u2069\\u200e\\u200f\\u061c",
    "a\u2028b": "a\\u2028b",
    "\ud83d half": "\\ud83d half",
    "\U000e0067hidden": "\\U000e0067hidden",
    "\ufeffmark": "\\ufeffmark",
}  # fmt: skip
KEPT = (
    ":bee: [bold]x[/bold] [link=http://a]b[/link] 100% $5 [/]",
    "क्षि สวัสดี שָׁלוֹם مرحبا 👩\u200d👩\u200d👧 می\u200cخواهم",
    "tab\tand\nline",
)


@pytest.mark.parametrize(("text", "shown"), EVIL.items())
def test_harmless(text, shown):
    assert display.harmless(text) == shown


@pytest.mark.parametrize("text", KEPT)
def test_other_text_stays(text):
    assert display.harmless(text) == text


def test_one_line():
    assert display.harmless_line(" a\r\n\tb\u2028c\x1b") == " a b c\\x1b"
    assert display.markdown_cell("a|b\nc") == "a\\|b c"
    assert display.plot_label("costs $5 or $6") == r"costs \$5 or \$6"
    assert display.listed({"queries": 1200, "without_lists": 3}) == "1,200 queries, 3 without lists"


def printed(*things, **settings) -> str:
    file = io.StringIO()
    display.console(file=file, width=200, **settings).print(*things)
    return file.getvalue()


def test_consoles_take_text_for_text():
    from rich.table import Table as RichTable

    for text, shown in EVIL.items():
        assert printed(text) == f"{shown}\n"
    text = KEPT[0]
    assert printed(text) == f"{text}\n"
    table = RichTable(text, title=text)
    table.add_row("\x1b[31m:bee:")
    shown = printed(table)
    assert shown.count(text) == 2 and "\\x1b[31m:bee:" in shown and "\x1b" not in shown


@pytest.mark.parametrize("columns", ["0", "-3", "1", "much"])
def test_columns_that_cannot_be(columns, monkeypatch):
    monkeypatch.setenv("COLUMNS", columns)
    assert display.console().width >= 20


def test_measures_table_of_strange_names():
    from rich.console import Console

    results = {"[bold]\x1b[31m.trec": {"RR@10": 0.5}, ":bee:": {"RR@10": 0.4}}
    file = io.StringIO()
    Console(file=file, width=100).print(evaluation.measures_table(results, title="[red]:bee:"))
    assert "[bold]\\x1b[31m.trec" in file.getvalue() and "[red]:bee:" in file.getvalue()
    assert "\x1b" not in file.getvalue()


def test_notebook_tables():
    shown = Table("\x1b<b>", ("\u202ea",), [("\x1b<i>",)])._repr_html_()
    assert "\\x1b&lt;b&gt;" in shown and "\\x1b&lt;i&gt;" in shown and "\\u202ea" in shown


def test_study_tables(tmp_path):
    row = {"axis": "a|b\x1b[31m", "system": "x\ny", "RR@10": 0.5}
    report.write_table(tmp_path, "table", [row])
    assert markdown([row]) == (
        "| axis | system | RR@10 |\n| --- | --- | --- |\n| a\\|b\\\\x1b[31m | x y | 0.5 |\n"
    )
    with (tmp_path / "table.csv").open(newline="") as file:
        (read,) = csv.DictReader(file)
    assert read["axis"] == "a|b\\x1b[31m" and read["system"] == "x\ny"


def test_log_lines_and_complaints(capsys, monkeypatch):
    monkeypatch.setattr(logging.getLogger("dgr_jax"), "level", logging.NOTSET)
    cli._configure_logging(verbose=False)
    logging.getLogger("dgr_jax").info("prepare: %s", "pid \x1b[31m\u202e :bee:")
    assert capsys.readouterr().err == "prepare: pid \\x1b[31m\\u202e :bee:\n"

    def command(_):
        raise ValueError("no file at \x1b]0;x\x07")

    monkeypatch.setattr(logging.getLogger(), "level", logging.WARNING)
    with pytest.raises(SystemExit, match="2"):
        cli.main(command)
    assert capsys.readouterr().err.startswith("error: no file at \\x1b]0;x\\x07\n")
    with pytest.raises(SystemExit, match="2"):
        cli.parse(cli.parser("train", "..."), ["--\x1b[31m"])
    assert "unrecognized arguments: --\\x1b[31m" in capsys.readouterr().err


def test_labels_of_plots(tmp_path):
    name = "a $x$ \x1b :bee: $\\frac{$"
    found = {"RR@10": (0.5, 0.4, 0.6)}
    series = {name: [(1.0, found), (2.0, found)], "$": [(1.0, found)]}
    assert plots.measures_over(series, name, ["RR@10"], tmp_path / "over.png").is_file()
    assert plots.success_at_k({name: {1: 0.5, 2: 0.6}}, tmp_path / "k.png", title=name).is_file()
    rows = [{"step": 1, "loss": 1.0}]
    assert plots.training_curves({name: rows}, tmp_path / "curves.png").is_file()


# Messages say what is known, in words.


def test_progress_says_what_is_known():
    line = metrics.progress_line("generate", 1, 60, 6.4711, math.nan, 0.0)
    assert line == "generate 1/60 | loss 6.471"


def test_counts_are_words():
    nothing = SimpleNamespace(passages=(), report={"queries": 2, "fewer_than_two": 2})
    settings = SimpleNamespace(
        teacher=SimpleNamespace(rank=lambda texts, **_: {}),
        lists=SimpleNamespace(select=lambda ranked, **_: nothing),
        seed=0,
    )
    with pytest.raises(ValueError) as error:
        taught(settings, {"1": "a", "2": "b"}, qids=["1", "2"], coverage={})
    assert str(error.value) == (
        "no rank list could be made of 2 queries: 2 queries, 2 fewer than two; look at "
        "Teach.teacher and Teach.lists"
    )
    assert grid.shown({"LOSS": "listnet", "SIZE": "3"}) == "LOSS = listnet, SIZE = 3"
