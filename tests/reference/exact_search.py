"""Brute force: all scores in float64, all sorted."""

from __future__ import annotations

import ml_dtypes
import numpy as np


def stored(queries, vectors, storage):
    """What is multiplied, in float64."""
    queries, vectors = np.asarray(queries, np.float32), np.asarray(vectors, np.float32)
    if storage != "float32":
        queries = queries.astype(ml_dtypes.bfloat16)
    if storage == "bfloat16":
        vectors = vectors.astype(ml_dtypes.bfloat16)
    vectors = np.array(vectors, np.float64)
    if storage == "int8":
        for row in vectors:
            scale = np.abs(row).max() / 127 or 1.0
            row[:] = np.round(row / scale) * scale
    return np.array(queries, np.float64), vectors


def search(queries, vectors, k, storage="float32"):
    """(passage index [n, k], score [n, k]); -1 and -inf where there are fewer passages."""
    queries, vectors = stored(queries, vectors, storage)
    passages = np.full((len(queries), k), -1)
    scores = np.full((len(queries), k), -np.inf)
    for b, query in enumerate(queries):
        all_scores = [float(query @ vector) for vector in vectors]
        order = sorted(range(len(vectors)), key=lambda i: (-all_scores[i], i))[:k]
        passages[b, : len(order)] = order
        scores[b, : len(order)] = [all_scores[i] for i in order]
    return passages, scores
