"""How fast a student answers: queries a second and latency, one question at a time and batched."""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from dgr_jax.retrieval.retriever import Retriever

ALONE = 200  # questions asked one at a time


def measure(retriever: Retriever, queries: Sequence[str]) -> dict[str, Any]:
    """Device, sizes, and for `alone` and `batched`: queries_per_second and latency_ms p50/p95/p99.

    Texts go in and pids come out: tokenising, search, ranking. Everything is compiled before.
    Alone: at most 200 of the queries, one after the other. Batched: the latency of a query is the
    time of its batch when nothing else runs; queries a second are those of all batches in a row,
    when host and device work at the same time. The queries start again to fill the last batch.

    Raises ValueError without queries.
    """
    if not queries:
        raise ValueError("queries: got none, expected one or more")
    system = retriever.decoder
    size = system.batch_size
    full = list(itertools.islice(itertools.cycle(queries), -(-len(queries) // size) * size))
    parts = [full[start : start + size] for start in range(0, len(full), size)]
    for warm_up in ([full[0]], parts[0], full):
        _seconds(retriever, warm_up)
    alone = [_seconds(retriever, [query]) for query in queries[:ALONE]]
    batched = [_seconds(retriever, part) for part in parts]
    return {
        "device": device_name(system.mesh.devices.flat[0]),
        "mesh": dict(system.mesh.shape),
        **system.describe(),
        "jax": jax.__version__,
        "alone": _summary(1, len(alone), sum(alone), alone),
        "batched": _summary(size, len(full), _seconds(retriever, full), batched),
    }


def _seconds(retriever: Retriever, texts: Sequence[str]) -> float:
    queries = {str(qid): text for qid, text in enumerate(texts)}
    start = time.perf_counter()
    retriever.run(queries)
    return time.perf_counter() - start


def _summary(size: int, queries: int, seconds: float, latencies: list[float]) -> dict[str, Any]:
    p50, p95, p99 = (1000 * np.percentile(latencies, (50, 95, 99))).round(3).tolist()
    return {
        "batch_size": size,
        "queries": queries,
        "queries_per_second": round(queries / seconds, 3),
        "latency_ms": {"p50": p50, "p95": p95, "p99": p99},
    }


def device_name(device: jax.Device) -> str:
    """What the device calls itself; of a CPU, its model and the number of cores."""
    if device.platform != "cpu":
        return device.device_kind
    described = Path("/proc/cpuinfo")
    lines = described.read_text().splitlines() if described.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else 'CPU'}, {os.cpu_count()} cores"
