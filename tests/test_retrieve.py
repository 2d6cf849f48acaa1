"""Questions from the command line: what is printed, and what cannot be asked."""

from __future__ import annotations

import json
from types import SimpleNamespace

import numpy as np
import pytest

from dgr_jax import retrieve
from dgr_jax.retrieval.dense import Searcher
from dgr_jax.retrieval.generative import Decoder
from dgr_jax.retrieval.multiview.search import MultiviewDecoder
from dgr_jax.retrieval.retriever import Hit, Retriever, _check_sizes
from dgr_jax.serving import ask


class Stub:
    """A retriever that finds given passages."""

    def __init__(self, *hits: Hit, **limits: int) -> None:
        self.hits = list(hits)
        self.decoder = SimpleNamespace(limits=limits)

    def search(self, queries, k):
        return [self.hits[:k] for _ in queries]


def printed(capsys, query: str, *hits: Hit) -> str:
    ask._print(Stub(*hits), [query], 10)
    return capsys.readouterr().out


def test_a_passage_without_a_title_says_its_pid_once(capsys):
    out = printed(capsys, "why?", Hit(1, "p7", -1.5, "", "Because.", "3 4"))
    assert out == "why?\n  1. p7  -1.500  3 4\n     Because.\n"
    out = printed(capsys, "why?", Hit(1, "p7", -1.5, " ", "Because.", ""))
    assert out.splitlines()[1] == "  1. p7  -1.500"
    out = printed(capsys, "why?", Hit(1, "p7", -1.5, "Bees", "Because.", "3 4"))
    assert out.splitlines()[1] == "  1. Bees p7  -1.500  3 4"


def test_nothing_found_is_said(capsys):
    ask._print(Stub(num_beams=8), ["why?"], 10)
    ask._print(Stub(passages=8), ["who?"], 10)
    assert capsys.readouterr().out.splitlines() == [
        "why?",
        "     nothing was found: no identifier that was written is one of a passage",
        "who?",
        "     nothing was found: no passage fits",
    ]


def test_what_passages_hold_is_not_obeyed(capsys):
    """Neither by the terminal nor by rich."""
    hit = Hit(
        1, "p\x1b]0;x\x07", 0.5, "[bold]:bee:\x1b[31m\nb", "a\x9b31m\u202e :bee: [red]", "\x1b"
    )
    out = printed(capsys, "[bold]:bee:\x1b[2J", hit)
    assert out == (
        "[bold]:bee:\\x1b[2J\n"
        "  1. [bold]:bee:\\x1b[31m b p\\x1b]0;x\\x07  0.500  \\x1b\n"
        "     a\\x9b31m\\u202e :bee: [red]\n"
    )


def test_json_has_a_line_for_each_question_and_controls_no_terminal(capsys):
    hit = Hit(1, "p\x1b", -1.5, "Bees", "\u202eBecause.\n", "3 4", {"plan": 2.0})
    ask._print_json(Stub(hit), ["why\nso?", "when?"], 10)
    out = capsys.readouterr().out
    assert out.isascii() and "\x1b" not in out
    first, second = map(json.loads, out.splitlines())
    assert first == {
        "query": "why\nso?",
        "hits": [
            {
                "rank": 1, "pid": "p\x1b", "score": -1.5, "title": "Bees",
                "text": "\u202eBecause.\n", "identifier": "3 4", "parts": {"plan": 2.0},
            }
        ],
    }  # fmt: skip
    assert second["query"] == "when?"


@pytest.mark.parametrize("columns", ["0", "1", "7"])
def test_a_terminal_without_columns(columns, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", columns)
    assert "Because" in printed(capsys, "why?", Hit(1, "p7", -1.5, "Bees", "Because. " * 40, "3"))


# More passages than a system can find.


def retriever() -> Retriever:
    """One that is asked for too much before it searches."""
    decoder = SimpleNamespace(limits={"num_beams": 8, "depth": 10}, most_passages=8)
    decoder.by_pid = lambda pid_of: decoder
    return Retriever(decoder, None, SimpleNamespace(pid_of=None))


def limits(kind: type, **settings) -> dict[str, int]:
    return kind.limits.fget(SimpleNamespace(**settings))


@pytest.mark.parametrize(
    ("found", "message"),
    [
        (
            limits(Decoder, search=SimpleNamespace(num_beams=8, depth=600)),
            "--k: got 600, expected at most 8, the beams (--num_beams)",
        ),
        (
            limits(
                MultiviewDecoder,
                search=SimpleNamespace(depth=600, scoring=SimpleNamespace(max_passages=500)),
            ),
            "--k: got 600, expected at most 500, the passages that are scored "
            "(Scoring.max_passages)",
        ),
        (
            limits(
                Searcher,
                search=SimpleNamespace(depth=600), index=SimpleNamespace(num_passages=240),
            ),
            "--k: got 600, expected at most 240, all of them",
        ),
    ],
)  # fmt: skip
def test_what_bounds_the_passages_is_named(found, message):
    with pytest.raises(ValueError) as error:
        ask._checked_k(600, found)
    assert str(error.value) == message
    assert ask._checked_k(least := min(found.values()), found) == least
    assert ask._checked_k(None, found) == min(10, least)  # nobody has asked for more than there is


@pytest.mark.parametrize(
    ("k", "message"),
    [
        (0, "k: got 0, expected at least 1"),
        (-1, "k: got -1, expected at least 1"),
        (2.0, "k: got 2.0, expected a whole number"),
        (True, "k: got True, expected a whole number"),
        ("3", "k: got '3', expected a whole number"),
        (9, "k: got 9, expected at most 8: set num_beams (8) and depth (10) in Retriever.load"),
        (np.int64(0), "k: got 0, expected at least 1"),
    ],
)
def test_a_k_of_which_there_is_no_best(k, message):
    with pytest.raises(ValueError) as error:
        retriever().search(["why?"], k=k)
    assert str(error.value) == message


def test_without_a_k_as_many_are_found_as_can_be():
    asked = retriever()
    asked.decoder.encode = lambda vocabulary, queries: queries
    asked.decoder.hits = lambda queries: [["hit"] * 10 for _ in queries]
    asked._hit = lambda store, rank, hit: rank
    assert asked.search(["why?"]) == [[*range(1, 9)]]
    asked.decoder.most_passages = 100
    assert asked.search(["why?"], None) == [[*range(1, 11)]]


@pytest.mark.parametrize("k", ["0", "-3"])
def test_k_of_the_command(k, tmp_path):
    with pytest.raises(ValueError, match=f"--k: got {k}, expected at least 1"):
        retrieve.command([f"--model_dir={tmp_path}", "--query=bees", f"--k={k}"])


def test_questions_in_any_locale():
    """Python leaves bytes that the locale does not know as halves of surrogate pairs."""
    unknown = "señal 蜂".encode().decode("ascii", "surrogateescape")
    assert ask._written(unknown) == "señal 蜂" == ask._written("señal 蜂")
    with pytest.raises(ValueError, match="--query: got 'a.udcff', expected text in UTF-8"):
        ask._written("a\udcff")
    for blank in (" \n", "\u200b \u202e"):
        with pytest.raises(ValueError, match="--query: got a blank question"):
            ask._written(blank)


@pytest.mark.parametrize("query", ["a\ud800", None, 3, b"bees"])
def test_queries_that_are_no_text(query):
    with pytest.raises(ValueError, match="queries: got .*, expected text that can be written"):
        retriever().search(["bees", query])


@pytest.mark.parametrize(("name", "value"), [("depth", 2.5), ("num_beams", "8"), ("depth", True)])
def test_sizes_of_a_search_are_whole_numbers(name, value):
    usual = {"num_beams": 100, "depth": 100, "renormalise": False}
    with pytest.raises(ValueError, match=f"{name}: got {value!r}, expected a whole number"):
        _check_sizes({name: value}, usual)
    _check_sizes({"depth": np.int32(3), "renormalise": True}, usual)
