"""Token embeddings from the texts of a corpus: latent semantic analysis (Deerwester et al. 1990).

Two tokens that occur in the same sentences and passages get vectors of a similar direction. These
come from the leading singular vectors of a matrix A [tokens, texts], which is always kept sparse.

Axis letters: m tokens that occur, n texts, k width of the embeddings.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
import scipy.sparse
from threadpoolctl import threadpool_limits

logger = logging.getLogger(__name__)

_BLOCK = 32  # the most vectors that are multiplied together
_SPAN = 5  # how many directions are searched for each one that is wanted
_NOISE = 1e-5  # eigenvalues below this part of the largest are 0 but for rounding in float32


def counted(texts: Sequence[Sequence[int]], size: int, *, binary: bool) -> scipy.sparse.csr_array:
    """f32 [texts, size]: log(1 + occurrences) of each token in each text, or 1 if `binary`."""
    starts = np.cumsum([0, *map(len, texts)])
    tokens = np.concatenate([np.zeros(0, np.int32), *(np.asarray(t, np.int32) for t in texts)])
    ones = np.ones(len(tokens), np.float32)
    counts = scipy.sparse.csr_array((ones, tokens, starts.astype(np.int32)), (len(texts), size))
    counts.sum_duplicates()
    counts.data = np.ones_like(counts.data) if binary else np.log1p(counts.data)
    return counts


def embeddings(
    blocks: Sequence[scipy.sparse.csr_array], width: int
) -> tuple[np.ndarray, np.ndarray]:
    """(tokens int32 [m], their embeddings f32 [m, width]), from the counts of `counted`.

    A is the transposed blocks side by side, with each token's row multiplied by log((1 + n) / (1 +
    number of texts with the token)). With A ~ U s V^T for `width` singular values, the embeddings
    are the rows of U sqrt(s), scaled to the length sqrt(width) of random embeddings. Where A has
    fewer singular values, the last columns are 0. Tokens that occur in no text, or in every text,
    have no row.
    """
    count = sum(block.shape[0] for block in blocks)
    seen: Any = sum(np.bincount(block.indices, minlength=block.shape[1]) for block in blocks)
    weights = np.log((1 + count) / (1 + seen)) * (seen > 0)
    tokens = np.flatnonzero(weights > 0)
    scale = weights[tokens, None].astype(np.float32)

    def products(vectors: np.ndarray) -> np.ndarray:
        """A A^T of f32 [m, b]."""
        whole = np.zeros((len(seen), vectors.shape[1]), np.float32)
        whole[tokens] = scale * vectors
        total = np.zeros_like(whole)
        for block in blocks:
            total += block.T @ (block @ whole)
        return scale * total[tokens]

    # Where other programs share the cores, threads of matrix products wait for each other. With one
    # thread the result does not depend on the number of cores either.
    with threadpool_limits(limits=1):
        values, vectors = _leading(products, len(tokens), width)
    rows = np.zeros((len(tokens), width), np.float32)
    rows[:, : len(values)] = vectors * values**0.25
    lengths = np.linalg.norm(rows, axis=1, keepdims=True)
    kept = lengths[:, 0] > 1e-6 * lengths.max(initial=0)
    rows = rows[kept] * (math.sqrt(width) / lengths[kept])
    return tokens[kept].astype(np.int32), rows


def _leading(
    products: Callable[[np.ndarray], np.ndarray], size: int, width: int
) -> tuple[np.ndarray, np.ndarray]:
    """(values f32 [k], vectors f32 [size, k]) of the k <= width largest eigenvalues of a symmetric
    matrix without negative eigenvalues, which is given by its products with vectors.

    The matrix is projected to the space that its powers span from random vectors (block Krylov
    iteration, Musco & Musco 2015). For the same number of products, that is much more accurate than
    the usual randomized decomposition (benchmarks/RESULTS.md). A small matrix is computed whole.
    """
    step = min(_BLOCK, -(-width // 4))
    span = -(-_SPAN * width // step) * step
    if size <= span:
        basis = np.eye(size, dtype=np.float32)
        inner = products(basis)
    else:
        basis, inner = _krylov(products, size, span, step)
    values, vectors = np.linalg.eigh(inner.astype(np.float64), UPLO="U")
    values, vectors = values[::-1][:width], vectors[:, ::-1][:, :width]
    kept = values > _NOISE * max(values.max(initial=0), 0)
    return values[kept].astype(np.float32), basis @ vectors[:, kept].astype(np.float32)


def _krylov(
    products: Callable[[np.ndarray], np.ndarray], size: int, span: int, step: int
) -> tuple[np.ndarray, np.ndarray]:
    """(an orthonormal basis f32 [size, span], the upper triangle [span, span] of the matrix in that
    basis), from `step` random vectors."""
    basis = np.empty((size, span), np.float32)
    inner = np.zeros((span, span), np.float32)
    drawn = np.random.default_rng(0).normal(size=(size, step)).astype(np.float32)
    block = np.linalg.qr(drawn)[0]
    for stop in range(step, span + 1, step):
        basis[:, stop - step : stop] = block
        before = basis[:, :stop]
        block = products(block)
        inner[:stop, stop - step : stop] = before.T @ block
        for _ in range(2):  # after the first time, rounding leaves a part of the earlier directions
            block = np.linalg.qr(block - before @ (before.T @ block))[0]
        if stop // step % _SPAN == 0:
            logger.info("start: %d of %d directions", stop, span)
    return basis, inner


def put(params: Any, tokens: jax.Array, rows: jax.Array) -> Any:
    """The parameters with these rows in each of their token embeddings; all others stay."""

    def changed(path: Any, leaf: jax.Array) -> jax.Array:
        is_embedding = jax.tree_util.keystr(path).endswith("['token_embedder']['embedding']")
        return leaf.at[tokens].set(rows.astype(leaf.dtype)) if is_embedding else leaf

    return jax.tree_util.tree_map_with_path(changed, params)
