"""Answering questions from the command line with a trained student."""

from __future__ import annotations

import argparse
import textwrap
from pathlib import Path

from rich.console import Console
from rich.markup import escape

from dgr_jax.corpora import lines, trec
from dgr_jax.corpora.types import RankList
from dgr_jax.retrieval.generative import Retriever


def answer(args: argparse.Namespace) -> None:
    """--query: print passages; --queries: write a TREC run to --output."""
    settings = {"depth": args.k}
    if args.num_beams:
        settings["num_beams"] = args.num_beams
    retriever = Retriever.load(args.model_dir, system=args.system, **settings)
    if args.query:
        _print(retriever, args.query, args.k)
    if args.queries:
        run = retriever.run(read_queries(args.queries))
        lists = (RankList(qid, tuple(passages)) for qid, passages in run.items())
        trec.write_run(args.output, lists, tag="dgr_jax")


def read_queries(path: str) -> dict[str, str]:
    """qid -> text of a TSV (qid, text) or a BEIR queries.jsonl."""
    if Path(path).name.removesuffix(".gz").endswith(".jsonl"):
        found = lines.json_objects(path, "_id, text")
        return {str(record["_id"]): record["text"] for _, record in found}
    queries = {}
    for number, line in lines.read(path):
        qid, tab, text = line.partition("\t")
        if not tab:
            raise lines.error(path, number, repr(line[:60]), "two columns: qid, tab, text")
        queries[qid] = text
    return queries


def _print(retriever: Retriever, queries: list[str], k: int) -> None:
    console = Console()
    for query, hits in zip(queries, retriever.search(queries, k), strict=True):
        console.print(f"[bold]{escape(query)}[/bold]")
        for hit in hits:
            console.print(
                f"{hit.rank:3d}. [cyan]{escape(hit.title or hit.pid)}[/cyan] "
                f"[dim]{escape(hit.pid)}  {hit.score:.3f}  {escape(hit.identifier)}[/dim]"
            )
            console.print(
                textwrap.indent(
                    textwrap.shorten(escape(hit.text), 160, placeholder=" ..."), "     "
                )
            )
