"""Answering questions from the command line with a trained student."""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
import os
import sys
import textwrap
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from dgr_jax import display
from dgr_jax.analysis import speed
from dgr_jax.corpora import checks, files, lines, trec, words
from dgr_jax.corpora.types import RankList
from dgr_jax.partitioning import Mesh
from dgr_jax.retrieval.retriever import USUAL_K, Hit, Retriever, is_text

logger = logging.getLogger(__name__)


def answer(args: argparse.Namespace) -> None:
    """--query: print passages, with --json as JSON; --queries: write a TREC run, or measure speed
    (--report_speed)."""
    if args.k is not None and args.k < 1:
        raise ValueError(f"--k: got {args.k}, expected at least 1")
    asked = [_written(query) for query in args.query]
    queries = read_queries(args.queries) if args.queries else {}
    settings: dict[str, Any] = {"depth": args.k or USUAL_K}
    if args.batch_size is not None:
        settings["batch_size"] = args.batch_size
    elif not args.report_speed:
        settings["batch_size"] = min(32, max(len(asked), len(queries)))
    if args.num_beams is not None:
        settings["num_beams"] = args.num_beams
    mesh = _mesh(args.mesh) if args.mesh else None
    retriever = Retriever.load(args.model_dir, system=args.system, mesh=mesh, **settings)
    k = _checked_k(args.k, retriever.decoder.limits)
    if asked:
        show = _print_json if args.json else _print
        show(retriever, asked, k)
    if args.report_speed:
        _report_speed(retriever, list(queries.values()), args.output)
    elif queries:
        if args.rerank:
            given = trec.run_in_memory(trec.runs(args.rerank))
            ranked = retriever.rerank(queries, given)
            run = {qid: passages[:k] for qid, passages in ranked.items()}
        else:
            run = retriever.run(queries)
        lists = (RankList(qid, tuple(passages)) for qid, passages in run.items())
        trec.write_run(args.output, lists, tag="dgr_jax")
        logger.info("wrote the passages of %d queries to %s", len(run), args.output)


def _written(query: str) -> str:
    """A question of the command line, decoded as UTF-8 whatever the locale is.

    Raises ValueError for other bytes, and for a blank question.
    """
    try:
        query = query if is_text(query) else os.fsencode(query).decode("utf-8")
    except UnicodeError:
        raise ValueError(f"--query: got {query!r}, expected text in UTF-8") from None
    if not words.visible(query):
        raise ValueError("--query: got a blank question")
    return query


_LIMITS = {
    "num_beams": "the beams (--num_beams)",
    "passages": "all of them",
    "planned": "the passages that are planned (`planned` of Experiment.plan, as Lexical.planned)",
    "scoring.max_passages": "the passages that are scored (Scoring.max_passages)",
}


def _checked_k(k: int | None, limits: Mapping[str, int]) -> int:
    """k, or the usual number where nobody has given one; ValueError naming the limit that keeps a
    query from finding k passages."""
    name = min(limits, key=limits.__getitem__)
    if k is None:
        return min(USUAL_K, limits[name])
    if k > limits[name]:
        raise ValueError(
            f"--k: got {k}, expected at most {limits[name]}, {_LIMITS.get(name, name)}"
        )
    return k


def _mesh(text: str) -> Mesh:
    try:
        data, model = (int(size) for size in text.split(","))
    except ValueError:
        raise ValueError(f"--mesh: got {text!r}, expected DATA,MODEL such as 4,2") from None
    return Mesh(data=data, model=model)


def _report_speed(retriever: Retriever, queries: list[str], output: str | None) -> None:
    """Prints the report, and writes it as JSON."""
    report = speed.measure(retriever, queries)
    console = display.console()
    said = [report["device"]]
    for name, value in retriever.decoder.describe().items():
        words = name.removeprefix("num_").replace("_", " ")
        said.append(f"{value:,} {words}" if isinstance(value, int) else f"{words} {value}")
    console.print("; ".join(said))
    table = Table("batch", "queries", "queries/s", "p50 ms", "p95 ms", "p99 ms")
    for row in (report["alone"], report["batched"]):
        numbers = (row["queries_per_second"], *row["latency_ms"].values())
        cells = (str(row["batch_size"]), str(row["queries"]))
        table.add_row(*cells, *(f"{value:.1f}" for value in numbers))
    console.print(table)
    if output:
        with lines.writing(output) as handle:
            handle.write(f"{json.dumps(report, indent=1)}\n".encode())
        logger.info("wrote the speed of %d queries to %s", len(queries), output)


def read_queries(path: str) -> dict[str, str]:
    """qid -> text of a TSV (qid, text) or a BEIR queries.jsonl; also a pipe, such as /dev/stdin.

    Raises ValueError naming file and line for a missing column, a repeated qid, a qid that no run
    can hold, a blank text and an empty file.
    """
    where = lines.place(path)
    if not where.exists() or where.is_dir():
        raise FileNotFoundError(f"--queries={path}: no such file; expected a TSV of qid and text")
    queries: dict[str, str] = {}
    with files.rereadable(where):
        for line, qid, text in _records(where):
            if qid.split() != [qid]:
                raise lines.error(where, line, f"the query id {lines.shown(qid)}", checks.ID)
            qid = checks.checked_id(qid, where, line, "query")
            got, expected = f"qid {lines.shown(qid)} again", "a different qid on each line"
            blank = not words.visible(text)
            if blank:
                got, expected = f"a blank text of qid {lines.shown(qid)}", "a question"
            if qid in queries or blank:
                raise lines.error(where, line, got, expected)
            queries[qid] = text
    if not queries:
        raise ValueError(f"--queries={path}: the file has no query; expected qid, tab, text")
    return queries


def _records(path: Path) -> Iterator[tuple[int, str, str]]:
    """(line, qid, text) of each query. A file holds JSON lines if its name ends in .jsonl or its
    text begins with a brace."""
    first = next((text.lstrip() for _, text in lines.read(path) if text.strip()), "")
    if path.name.removesuffix(".gz").endswith(".jsonl") or first.startswith("{"):
        for line, record in lines.json_objects(path, "_id, text"):
            qid = checks.id_field(record, "_id", path, line, "query")
            yield line, qid, checks.text_field(record, "text", path, line)
        return
    for line, text_of_line in lines.read(path):
        qid, tab, text = text_of_line.partition("\t")
        if not text_of_line.strip():
            continue
        if not tab:
            raise lines.error(path, line, repr(text_of_line[:60]), "two columns: qid, tab, text")
        if not checks.header(path, line, (qid, text), "query"):
            yield line, qid, text


def _print_json(retriever: Retriever, queries: list[str], k: int) -> None:
    """Prints a line for each question: a JSON object of the query and its hits, best first."""
    for query, hits in zip(queries, retriever.search(queries, k), strict=True):
        said = {"query": query, "hits": [dataclasses.asdict(hit) for hit in hits]}
        sys.stdout.write(json.dumps(said) + "\n")


def _print(retriever: Retriever, queries: list[str], k: int) -> None:
    console = display.console()
    for query, hits in zip(queries, retriever.search(queries, k), strict=True):
        console.print(display.cell(query, "bold"))
        if not hits:
            written = "num_beams" in retriever.decoder.limits
            why = "identifier that was written is one of a passage" if written else "passage fits"
            console.print(f"     nothing was found: no {why}")
        for hit in hits:
            _print_hit(console, hit)


def _print_hit(console: Console, hit: Hit) -> None:
    """Prints rank, title, pid, score and identifier, and then the beginning of the text."""
    title, pid = display.cell(hit.title.strip(), "cyan"), display.cell(hit.pid, "dim")
    named = (title, " ", pid) if title.plain else (display.cell(hit.pid, "cyan"),)
    rest = display.cell(f"  {hit.score:.3f}  {hit.identifier}".rstrip(), "dim")
    console.print(Text.assemble(f"{hit.rank:3d}. ", *named, rest))
    snippet = textwrap.shorten(display.harmless_line(hit.text), 160, placeholder=" ...")
    indent = " " * 5
    wrapped = textwrap.fill(
        snippet, min(console.width, 100), initial_indent=indent, subsequent_indent=indent
    )
    console.print(wrapped)
