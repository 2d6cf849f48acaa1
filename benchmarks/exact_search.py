"""Exact search by inner product: queries a second beside faiss-cpu's flat index, same vectors.

    XLA_FLAGS=--xla_force_host_platform_device_count=2 \
        python -m benchmarks.exact_search --passages=1000000 --dim=256 --output=exact.json

Needs the PyPI package faiss-cpu. All search all queries at once, in turn, with all cores that the
process may use; on a CPU the flag above makes a device of each of two cores.

- ours: retrieval.exact_search;
- faiss: IndexFlatIP as it is installed, which leaves BLAS alone below 128,000 queries (1.15);
- faiss_blas: the same with faiss.cvar.distance_compute_blas_threshold = 1.

Before anything is reported, all must have found the same passages, but for scores equal to within
rounding.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import pathlib
import time

import faiss
import jax
import numpy as np

from dgr_jax.analysis.speed import device_name
from dgr_jax.partitioning import make_mesh
from dgr_jax.retrieval.exact_search import ExactSearch, Index

SEED = 0


def unit_vectors(count: int, dim: int, rng: np.random.Generator) -> np.ndarray:
    """f32 [count, dim], of length 1."""
    vectors = rng.standard_normal((count, dim), np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def check(ours, theirs):
    """The same passages in the same order, except where scores are equal to within rounding."""
    np.testing.assert_allclose(ours[1], theirs[1], rtol=0, atol=1e-5)
    for mine, other, values in zip(ours[0], theirs[0], ours[1], strict=True):
        for place in np.flatnonzero(mine != other):
            near = np.abs(values - values[place]) < 1e-5
            assert near.sum() > 1 or place == len(values) - 1, (place, values[place])


def spread(values):
    low, median, high = np.percentile(values, [0, 50, 100])
    return {"median": round(float(median), 2), "min": round(low, 2), "max": round(high, 2)}


def searches_of(index, flat, queries, k):
    """Name -> what finds (passages, scores)."""

    def with_threshold(threshold):
        faiss.cvar.distance_compute_blas_threshold = threshold
        return flat.search(queries, k)[::-1]

    usual = faiss.cvar.distance_compute_blas_threshold
    return {
        "ours": lambda: index.search(queries, k),
        "faiss": lambda: with_threshold(usual),
        "faiss_blas": lambda: with_threshold(1),
    }


def compare(searches, count, rounds, exact):
    """Queries a second of each, in turns; what they found is compared once."""
    found = {name: search() for name, search in searches.items()}  # compiles, and fills caches
    for name in ("faiss", "faiss_blas") if exact else ():
        check(found["ours"], found[name])
    speeds = {name: [] for name in searches}
    for _ in range(rounds):
        for name, search in searches.items():
            start = time.perf_counter()
            search()
            speeds[name].append(count / (time.perf_counter() - start))
    ours, theirs = found["ours"][0], found["faiss"][0]
    shared = [len({*a} & {*b}) / len(a) for a, b in zip(ours, theirs, strict=True)]
    median = {name: float(np.median(values)) for name, values in speeds.items()}
    return {
        "queries": count,
        "k": ours.shape[1],
        "found_by_faiss": round(float(np.mean(shared)), 4),
        **{name: spread(values) for name, values in speeds.items()},
        "faster_than_faiss": round(median["ours"] / median["faiss"], 2),
        "faster_than_faiss_blas": round(median["ours"] / median["faiss_blas"], 2),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--passages", type=int, default=1_000_000)
    parser.add_argument("--dim", type=int, default=256)
    parser.add_argument("--queries", type=int, nargs="+", default=[1, 32, 256])
    parser.add_argument("--k", type=int, nargs="+", default=[10, 100])
    parser.add_argument("--storage", nargs="+", default=["float32"])
    parser.add_argument("--max_scores", type=int, default=ExactSearch.max_scores)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output", type=pathlib.Path)
    arguments = parser.parse_args()
    cores = len(os.sched_getaffinity(0))
    faiss.omp_set_num_threads(cores)
    rng = np.random.default_rng(SEED)
    vectors = unit_vectors(arguments.passages, arguments.dim, rng)
    queries = unit_vectors(max(arguments.queries), arguments.dim, rng)
    flat = faiss.IndexFlatIP(arguments.dim)
    flat.add(vectors)
    report = {
        "device": device_name(jax.devices()[0]),
        "devices": jax.device_count(),
        "cores": cores,
        "load": round(os.getloadavg()[0], 2),
        "versions": {name: importlib.metadata.version(name) for name in ("jax", "faiss-cpu")},
        "passages": arguments.passages,
        "dim": arguments.dim,
        "max_scores": arguments.max_scores,
        "queries_per_second": [],
    }
    print(json.dumps(report, indent=1), flush=True)
    for storage in arguments.storage:
        settings = ExactSearch(storage=storage, max_scores=arguments.max_scores)
        index = Index(vectors, settings, make_mesh())
        for k in arguments.k:
            for count in arguments.queries:
                exact = storage == "float32"
                row = {"storage": storage, "device_bytes": index.plan.device_bytes}
                searches = searches_of(index, flat, queries[:count], k)
                row |= compare(searches, count, arguments.rounds, exact)
                report["queries_per_second"].append(row)
                print(json.dumps(row), flush=True)
        del index
    if arguments.output:
        arguments.output.write_text(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
