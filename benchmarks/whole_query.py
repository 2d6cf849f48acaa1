"""Whole queries of a finished experiment: what is asked, how fast, and what is found.

    python -m benchmarks.whole_query --model_dir=MODEL_DIR --beams=10 --rounds=5

Systems, all with the parameters of the distilled student, in turns; each reads the texts and
returns ranked passages:

- hf             transformers' generate with a trie of Python dicts (left out where it is not there)
- plain          beam search among all identifiers
- plain, int8    the same with Search.kernels='int8'
- planned        by the plan of the experiment, with its beams or --planned_beams; also with int8
- one pass       the identifiers of --planned planned passages scored at once; and with int8 kernels

Processor seconds are those of all threads of this process: of a system that others keep from its
cores they say more than the clock. `as plain` is the share of the ten passages that plain search
returns; RR@10 stands with a paired test against `plain`.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import json
import os
import pathlib
import time
from typing import Any

import jax
import numpy as np

from benchmarks import decode
from dgr_jax import evaluation
from dgr_jax.analysis.speed import device_name
from dgr_jax.models import eight_bits
from dgr_jax.retrieval.batching import scored_passages
from dgr_jax.retrieval.planned import PlannedDecoder
from dgr_jax.retrieval.retriever import Retriever
from dgr_jax.stages.prepared import Prepared


def hugging_face(student: Any, vocabulary: Any, arguments: argparse.Namespace) -> Any:
    """Texts -> passages, by transformers."""
    table, length = student.table, student.index.layout.max_length
    rows = np.asarray(table.tokens)
    params, beams = jax.device_get(student.params), arguments.beams
    search = decode.hugging_face(student.config, params, decode.dict_trie(rows), beams, length)

    def passages(texts):
        tokens, parts = student.encode(vocabulary, texts), []
        for start in range(0, len(tokens), arguments.batch):
            found = search(tokens[start : start + arguments.batch])
            parts.append(student.ranked(table.lookup(found.tokens[..., :length]), found.scores))
        return tuple(np.concatenate(part) for part in zip(*parts, strict=True))

    return passages


def systems_of(arguments: argparse.Namespace) -> tuple[dict[str, Any], Any]:
    """Name -> texts to passages, and the vocabulary."""
    settings = {"num_beams": arguments.beams, "depth": 10, "batch_size": arguments.batch}
    retriever = Retriever.load(arguments.model_dir, system="distill", **settings)
    student, vocabulary = retriever.decoder, retriever.vocabulary
    beams = {"num_beams": arguments.planned_beams} if arguments.planned_beams else {}
    planned = Retriever.load(arguments.model_dir, system="planned", **beams).decoder
    asked: dict[str, Any] = {}
    if all(map(importlib.util.find_spec, ("torch", "transformers"))):
        asked["hf"] = hugging_face(student, vocabulary, arguments)
    else:
        print("hf is left out: it needs the extra 'dgr_jax[interop]'")
    pass_of = {"ranked_by": "identifiers", "planned": arguments.planned}
    for kernels in ("float", "int8"):
        params = eight_bits.searched(student.params, kernels)
        of_kernels = dataclasses.replace(student, params=params)
        plans = {"planned": planned.plan, "one pass": dataclasses.replace(planned.plan, **pass_of)}
        found = {"plain": of_kernels} | {
            name: PlannedDecoder.of(of_kernels, plan, planned.planner)
            for name, plan in plans.items()
        }
        for name, system in found.items():
            asked[name + (", int8" if kernels == "int8" else "")] = lambda texts, system=system: (
                system.passages(system.encode(vocabulary, texts))
            )
    return asked, vocabulary


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model_dir", required=True)
    parser.add_argument("--split", default="test")
    parser.add_argument("--min_relevance", type=int, default=1)
    parser.add_argument("--beams", type=int, default=10)
    parser.add_argument("--planned", type=int, default=10, help="passages that one pass scores")
    parser.add_argument("--planned_beams", type=int, help="instead of those of the experiment")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output", type=pathlib.Path)
    arguments = parser.parse_args()
    prepared = Prepared.load(arguments.model_dir)
    queries = prepared.queries(arguments.split)
    qids, texts = list(queries), [query.text for query in queries.values()]
    qrels = prepared.qrels(arguments.split)
    asked, _ = systems_of(arguments)
    found = {name: search(texts) for name, search in asked.items()}  # compiles
    spent: dict[str, list] = {name: [] for name in asked}
    for _ in range(arguments.rounds):
        for name, search in asked.items():
            start = np.array([time.perf_counter(), time.process_time()])
            search(texts)
            spent[name].append([time.perf_counter(), time.process_time()] - start)
    values = {
        name: list(
            evaluation.per_query(
                scored_passages(qids, *passages, prepared.store.pids),
                qrels,
                ["RR@10"],
                min_relevance=arguments.min_relevance,
            )["RR@10"].values()
        )
        for name, passages in found.items()
    }
    rows = {}
    for name, times in spent.items():
        clock, processor = 1e3 * np.median(times, 0) / len(texts)
        same = [
            len({*a[a >= 0][:10]} & {*b[b >= 0][:10]}) / max(1, len({*a[a >= 0][:10]}))
            for a, b in zip(found["plain"][0], found[name][0], strict=True)
        ]
        rows[name] = {
            "ms_a_query": round(clock, 3),
            "processor_ms_a_query": round(processor, 3),
            "as_plain": round(float(np.mean(same)), 4),
            "RR@10": round(float(np.mean(values[name])), 4),
            "against_plain": str(evaluation.compare("RR@10", values[name], values["plain"])),
        }
        print(name, json.dumps(rows[name]), flush=True)
    if arguments.output:
        report = {"device": device_name(jax.devices()[0]), "load": os.getloadavg()[0]}
        arguments.output.write_text(json.dumps(report | {"rows": rows}, indent=1))


if __name__ == "__main__":
    main()
