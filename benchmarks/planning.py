"""Planned search beside plain beam search: queries a second, and what is lost.

    python -m benchmarks.planning --passages 1000 100000 --output=planning.json
    python -m benchmarks.planning --model_dir=MODEL_DIR  # a finished experiment, its test queries

All answer the same queries in turns, tokens and plans made anew each time:

- plain: beam search among all identifiers, by --plain_beams;
- beams: the plan names --planned passages, and beam search, by --beams, writes their identifiers;
- identifiers: the identifiers of all planned passages are scored in one pass;
- plan: the plan alone.

`kept` is the share of the ten best by `identifiers` that `beams` finds among its ten best. Passages
without --model_dir are of drawn words, and the student has drawn parameters: it knows nothing, and
only `kept` says something of quality. With it, RR@10 and a paired test stand beside.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import tempfile
import time

import jax
import numpy as np
from flax import linen as nn

from dgr_jax import evaluation, partitioning
from dgr_jax.analysis.speed import device_name
from dgr_jax.corpora import store as stores
from dgr_jax.corpora.types import Passage
from dgr_jax.decoding import trie
from dgr_jax.identifiers.table import IdentifierTable
from dgr_jax.models.t5 import T5Config, Transformer
from dgr_jax.retrieval.batching import scored_passages
from dgr_jax.retrieval.generative import Decoder, Search
from dgr_jax.retrieval.planned import PlannedDecoder
from dgr_jax.retrieval.retriever import Retriever
from dgr_jax.retrieval.simultaneous import Lexical
from dgr_jax.stages.prepared import Prepared

WORDS, CODES, LENGTH, TEXT = 30_000, 256, 4, 4000
SIZES = dict(
    vocab_size=TEXT + CODES * LENGTH,
    emb_dim=128,
    num_heads=4,
    head_dim=32,
    mlp_dim=256,
    num_encoder_layers=2,
    num_decoder_layers=2,
)


class Hashed:
    """A vocabulary of which each word is one token."""

    def encode_inputs(self, texts, length):
        rows = np.zeros((len(texts), length), np.int32)
        for row, text in zip(rows, texts, strict=True):
            ids = [3 + int(word[1:]) % (TEXT - 3) for word in text.split()][: length - 1] + [1]
            row[: len(ids)] = ids
        return rows


def drawn(passages, queries, folder):
    """(store, texts of queries): words drawn by Zipf's law; a query has four words of a passage."""
    random = np.random.default_rng(0)
    chances = 1 / np.arange(1, WORDS + 1)
    words = random.choice(WORDS, (passages, 60), p=chances / chances.sum())
    texts = [" ".join(f"w{word}" for word in row) for row in words]
    store = stores.write((Passage(f"p{i}", text) for i, text in enumerate(texts)), folder)
    asked = [
        " ".join(f"w{word}" for word in (*random.permutation(words[i])[:4], *words[j][:2]))
        for i, j in random.integers(0, passages, (queries, 2))
    ]
    return store, asked


def student_of(passages, search):
    """A student with drawn parameters and drawn identifiers."""
    config, mesh = T5Config(**SIZES), partitioning.make_mesh(devices=jax.devices()[:1])
    random = np.random.default_rng(1)
    rows = TEXT + random.integers(0, CODES, (2 * passages, LENGTH)) + CODES * np.arange(LENGTH)
    table = IdentifierTable.from_rows(
        random.permutation(np.unique(rows, axis=0))[:passages].astype(np.int32), view="drawn"
    )
    index = trie.build(table.tokens, table.lengths, vocab_size=config.vocab_size)
    make = lambda: nn.unbox(partitioning.boxed_params(Transformer(config), jax.random.key(0)))
    return Decoder(config, jax.jit(make)(), index, table, search, mesh)


def searches(student, planner, vocabulary, texts, arguments):
    """Name -> what finds the passages of all queries."""
    plans = {
        "beams": {"num_beams": arguments.beams},
        "identifiers": {"ranked_by": "identifiers"},
        "plan": {"ranked_by": "plan"},
    }
    systems = {"plain": student} | {
        name: PlannedDecoder.of(student, Lexical(planned=arguments.planned, **settings), planner)
        for name, settings in plans.items()
    }
    return {
        name: lambda system=system: system.passages(system.encode(vocabulary, texts))
        for name, system in systems.items()
    }


def measured(systems, queries, rounds):
    """Queries a second of each, in turns, and what each found."""
    found = {name: search() for name, search in systems.items()}  # compiles
    speeds = {name: [] for name in systems}
    for _ in range(rounds):
        for name, search in systems.items():
            start = time.perf_counter()
            search()
            speeds[name].append(queries / (time.perf_counter() - start))
    report = {
        name: dict(zip(("min", "median", "max"), np.percentile(s, [0, 50, 100]).round(1).tolist(),
                       strict=True))
        for name, s in speeds.items()
    }  # fmt: skip
    ratios = np.array(speeds["beams"]) / np.array(speeds["plain"])
    ten = [(found[name][0][:, :10]) for name in ("identifiers", "beams")]
    kept = [len({*a} & {*b}) / len({*a}) for a, b in zip(*ten, strict=True)]
    quality = {"faster": round(float(np.median(ratios)), 2), "kept": round(np.mean(kept), 4)}
    return {"queries_per_second": report, **quality}, found


def with_judgements(report, found, made, split, min_relevance):
    """RR@10 of each, and `beams` against the others."""
    qids, qrels = list(made.queries(split)), made.qrels(split)
    values = {}
    for name, passages in found.items():
        run = scored_passages(qids, *passages, made.store.pids)
        by_query = evaluation.per_query(run, qrels, ["RR@10"], min_relevance=min_relevance)
        values[name] = [*by_query["RR@10"].values()]
    report["RR@10"] = {name: round(float(np.mean(v)), 4) for name, v in values.items()}
    report["beams against"] = {
        name: str(evaluation.compare("RR@10", values["beams"], values[name]))
        for name in ("plain", "plan")
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--passages", type=int, nargs="+", default=[1000, 100_000])
    parser.add_argument("--queries", type=int, default=256)
    parser.add_argument("--planned", type=int, default=100)
    parser.add_argument("--beams", type=int, default=10)
    parser.add_argument("--plain_beams", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--model_dir", help="instead of drawn passages")
    parser.add_argument("--split", default="test")
    parser.add_argument("--min_relevance", type=int, default=1)
    parser.add_argument("--output", type=pathlib.Path)
    arguments = parser.parse_args()
    beams = arguments.plain_beams
    report = {
        "device": device_name(jax.devices()[0]),
        "cores": len(os.sched_getaffinity(0)),
        "load": round(os.getloadavg()[0], 2),
        "settings": {k: str(v) for k, v in vars(arguments).items()},
        "rows": [],
    }
    print(json.dumps(report, indent=1), flush=True)

    def add(passages, student, store, vocabulary, texts):
        start = time.perf_counter()
        planner = Lexical(planned=arguments.planned).planner(store)
        row = {"passages": passages, "plan_seconds": round(time.perf_counter() - start, 2)}
        systems = searches(student, planner, vocabulary, texts, arguments)
        measures, found = measured(systems, len(texts), arguments.rounds)
        report["rows"].append(row | measures)
        return found

    if arguments.model_dir:
        made = Prepared.load(arguments.model_dir)
        settings = {"system": "distill", "num_beams": beams, "depth": beams}
        retriever = Retriever.load(arguments.model_dir, **settings)
        texts = [query.text for query in made.queries(arguments.split).values()]
        found = add(len(made.store), retriever.decoder, made.store, retriever.vocabulary, texts)
        with_judgements(report["rows"][0], found, made, arguments.split, arguments.min_relevance)
        print(json.dumps(report["rows"][0]), flush=True)
    for passages in () if arguments.model_dir else arguments.passages:
        with tempfile.TemporaryDirectory() as folder:
            store, texts = drawn(passages, arguments.queries, folder)
            student = student_of(passages, Search(num_beams=beams, depth=beams, query_length=12))
            add(passages, student, store, Hashed(), texts)
        print(json.dumps(report["rows"][-1]), flush=True)
    if arguments.output:
        arguments.output.write_text(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
