"""Latent semantic analysis by its definition: a dense matrix and all of its singular vectors."""

from __future__ import annotations

import math

import numpy as np


def matrix(sentences, passages, size):
    """f64 [size, texts]: 1 in sentences, log(1 + tf) in passages, times log((1 + n) / (1 + df))."""
    columns = []
    for sentence in sentences:
        columns.append([1.0 if token in sentence else 0.0 for token in range(size)])
    for passage in passages:
        columns.append([math.log(1 + list(passage).count(token)) for token in range(size)])
    found = np.array(columns).T
    for row in found:
        row *= math.log((1 + len(columns)) / (1 + np.count_nonzero(row)))
    return found


def embeddings(sentences, passages, size, width):
    """f64 [size, width]: U sqrt(s) of the first `width` singular values, rows of length
    sqrt(width); a row of 0 stays."""
    left, values, _ = np.linalg.svd(matrix(sentences, passages, size), full_matrices=False)
    rows = np.zeros((size, width))
    rows[:, : min(width, len(values))] = (left * np.sqrt(values))[:, :width]
    lengths = np.linalg.norm(rows, axis=1, keepdims=True)
    return np.divide(rows, lengths, out=np.zeros_like(rows), where=lengths > 1e-9) * width**0.5
