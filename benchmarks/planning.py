"""Planned search beside plain beam search: queries a second, and what is lost.

    python -m benchmarks.planning --passages 1000 100000 --output=planning.json
    python -m benchmarks.planning --model_dir=MODEL_DIR  # a finished experiment, its test queries
    python -m benchmarks.planning --plan_only --passages 1000 100000 8800000

All answer the same queries in turns, tokens and plans made anew each time:

- plain: beam search among all identifiers, by --plain_beams;
- beams: the plan names --planned passages, and beam search, by --beams, writes their identifiers;
- identifiers: the identifiers of all planned passages are scored in one pass;
- plan: the plan alone.

`kept` is the share of the ten best by `identifiers` that `beams` finds among its ten best. `faster`
is how many times as fast as `plain` `beams` is by the clock; `faster_by_processor` the same by
processor time (least, median and most of the turns), which other programs change less. Passages
without --model_dir are of drawn words, and the student has drawn parameters: it knows nothing, and
only `kept` says something of quality. With it, RR@10 and a paired test stand beside.

--plan_only: no student and no texts. Postings are drawn with the document frequencies of stems that
were counted in passages of MS MARCO (SHARES; a passage has 31 of them), and a query has six words,
drawn by how often they occur, which have as many postings as an average query of MS MARCO (a
seventh of the passages). Milliseconds a query, alone and in batches of 32.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import resource
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
from dgr_jax.retrieval.bm25 import Bm25, Postings
from dgr_jax.retrieval.generative import Decoder, Search
from dgr_jax.retrieval.planned import PlannedDecoder
from dgr_jax.retrieval.retriever import Retriever
from dgr_jax.retrieval.simultaneous import Lexical, LexicalPlanner
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


# Rank of a word -> share of the passages that it stands in; between them on lines of log and log.
SHARES = {1: 0.21, 10: 0.106, 30: 0.064, 100: 0.035, 300: 0.0168, 1000: 0.0064, 3000: 0.0015,
          10_000: 0.0002, 2_000_000: 2e-8}  # fmt: skip
RARE = 300  # postings
GIB = 1 << 30


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
    """Queries a second of each, in turns, processor milliseconds a query, and what each found."""
    found = {name: search() for name, search in systems.items()}  # compiles
    speeds, busy = ({name: [] for name in systems} for _ in range(2))
    for _ in range(rounds):
        for name, search in systems.items():
            start = time.perf_counter(), time.process_time()
            search()
            speeds[name].append(queries / (time.perf_counter() - start[0]))
            busy[name].append(1e3 * (time.process_time() - start[1]) / queries)
    report = {
        name: dict(zip(("min", "median", "max"), np.percentile(s, [0, 50, 100]).round(1).tolist(),
                       strict=True))
        for name, s in speeds.items()
    }  # fmt: skip
    ratios = np.array(speeds["beams"]) / np.array(speeds["plain"])
    of_processor = np.array(busy["plain"]) / np.array(busy["beams"])
    ten = [(found[name][0][:, :10]) for name in ("identifiers", "beams")]
    kept = [len({*a} & {*b}) / len({*a}) for a, b in zip(*ten, strict=True)]
    quality = {
        "faster": round(float(np.median(ratios)), 2),
        "faster_by_processor": np.percentile(of_processor, [0, 50, 100]).round(2).tolist(),
        "kept": round(np.mean(kept), 4),
    }
    milliseconds = {name: round(float(np.median(times)), 2) for name, times in busy.items()}
    return {"queries_per_second": report, "processor_ms": milliseconds, **quality}, found


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


class Pids:
    """The pids of drawn passages, without memory."""

    def __init__(self, count):
        self.count = count

    def __len__(self):
        return self.count

    def __getitem__(self, i):
        return f"p{i:08}"


def drawn_postings(passages):
    """Postings of drawn impacts, in the order of the passages within each word."""
    random = np.random.default_rng(0)
    ranks = np.arange(1, int(min(2_000_000, 40 * passages)))
    shares = np.exp(np.interp(np.log(ranks), np.log(list(SHARES)), np.log(list(SHARES.values()))))
    sizes = random.poisson(shares * passages)
    sizes = -np.sort(-np.minimum(sizes[sizes > 0], passages))
    starts = np.concatenate([[0], np.cumsum(sizes)])
    needed = 8 * int(starts[-1]) + 4 * passages * int((sizes > passages / 8).sum())
    print(f"{starts[-1]:,} postings of {len(sizes):,} words: {needed / GIB:.2f} GiB", flush=True)
    if needed > 6 * GIB:
        raise SystemExit("--passages: expected fewer, of which postings take at most 6 GiB")
    places = np.empty(starts[-1], np.int32)
    for start, size in zip(starts, sizes, strict=False):
        if size < RARE:  # few, in whatever order: all at once
            places[start:] = random.integers(0, passages, len(places) - start)
            break
        gaps = np.cumsum(random.exponential(size=size + 1).astype(np.float32), dtype=np.float64)
        places[start : start + size] = (gaps[:-1] / gaps[-1] * passages).astype(np.int32)
    np.minimum(places, passages - 1, out=places)
    impacts = random.random(starts[-1], np.float32) + np.float32(0.1)
    return Postings([f"w{i}" for i in range(len(sizes))], starts, places, impacts)


def plan_alone(passages, arguments):
    """Milliseconds a query of a plan by words, alone and in batches, in several rounds."""
    start = time.perf_counter()
    postings = drawn_postings(passages)
    planner = LexicalPlanner([(Bm25(stemmer="", stop_words=""), postings, 1.0)], Pids(passages))
    row = {"passages": passages, "made_in_seconds": round(time.perf_counter() - start, 1)}
    row["index_bytes"] = planner.nbytes
    sizes = np.diff(postings.starts)
    random = np.random.default_rng(1)
    words = random.choice(len(sizes), (arguments.queries, 6), p=sizes / sizes.sum())
    row["postings_a_query"] = round(float(sizes[words].sum(1).mean()))
    texts = [" ".join(f"w{word}" for word in query) for query in words]
    for batch in (1, 32):
        blocks = [texts[i : i + batch] for i in range(0, len(texts), batch)]
        planner.best(blocks[0], arguments.planned)
        times = []
        for _ in range(arguments.rounds):
            before = time.perf_counter(), time.process_time()
            for block in blocks:
                planner.best(block, arguments.planned)
            after = time.perf_counter(), time.process_time()
            times.append([1e3 * (b - a) / len(texts) for a, b in zip(before, after, strict=True)])
        by_clock, by_processor = np.median(times, 0).round(3).tolist()
        row[f"ms_a_query_in_batches_of_{batch}"] = by_clock
        row[f"processor_ms_a_query_in_batches_of_{batch}"] = by_processor
    row["peak_gib"] = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1 << 20), 2)
    return row


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--passages", type=int, nargs="+", default=[1000, 100_000])
    parser.add_argument("--queries", type=int, default=256)
    parser.add_argument("--planned", type=int, default=100)
    parser.add_argument("--beams", type=int, default=10)
    parser.add_argument("--plain_beams", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--model_dir", help="instead of drawn passages")
    parser.add_argument("--plan_only", action="store_true", help="of drawn postings, no student")
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
        if arguments.plan_only:
            report["rows"].append(plan_alone(passages, arguments))
            print(json.dumps(report["rows"][-1]), flush=True)
            continue
        with tempfile.TemporaryDirectory() as folder:
            store, texts = drawn(passages, arguments.queries, folder)
            student = student_of(passages, Search(num_beams=beams, depth=beams, query_length=12))
            add(passages, student, store, Hashed(), texts)
        print(json.dumps(report["rows"][-1]), flush=True)
    if arguments.output:
        arguments.output.write_text(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
