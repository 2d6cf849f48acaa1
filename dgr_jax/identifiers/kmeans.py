"""k-means on rows of a matrix that may be larger than memory."""

from __future__ import annotations

import warnings

import numpy as np

_CHUNK_BYTES = 64 << 20
_SHRINK = 0.1
_PLUS_PLUS = 2_000_000  # rows * clusters


def fit(
    vectors: np.ndarray,
    num_clusters: int,
    *,
    seed: int,
    full_batch: int,
) -> np.ndarray:
    """Centroids f32 [k, D] of vectors f32 [N, D], with k = min(num_clusters, N).

    Up to `full_batch` rows Lloyd's iterations, above mini-batches. One thread, so that the same
    seed gives the same centroids: the order in which the threads of scikit-learn add their sums is
    not fixed.
    """
    from sklearn.cluster import KMeans, MiniBatchKMeans
    from sklearn.exceptions import ConvergenceWarning
    from threadpoolctl import threadpool_limits

    if len(vectors) <= num_clusters:
        return np.array(vectors, np.float32)
    with threadpool_limits(limits=1), warnings.catch_warnings():
        # Fewer distinct rows than clusters: some centroids are equal and stay unused.
        warnings.simplefilter("ignore", ConvergenceWarning)
        start = _start(vectors, num_clusters, seed)
        if len(vectors) <= full_batch:
            model = KMeans(num_clusters, init=start, n_init=1, max_iter=25)
        else:
            model = MiniBatchKMeans(
                num_clusters,
                init=start,
                n_init=1,
                batch_size=max(4096, 4 * num_clusters),
                max_iter=20,
                reassignment_ratio=0,
                random_state=seed,
            )
        model.fit(vectors)
    return np.ascontiguousarray(model.cluster_centers_, np.float32)


def _start(vectors: np.ndarray, num_clusters: int, seed: int) -> np.ndarray:
    """Centroids to start from: rows, drawn towards the mean of all.

    The rows are those of k-means++, or random where that would take longer than the iterations.
    Residuals have little structure left: a row is about as far from any other row as from itself
    to the mean, times the square root of two, so the first centroid near the mean would take
    nearly all rows and never give them back. Near the mean the nearest centroid is the one in the
    most similar direction, and the rows spread over all of them.
    """
    from sklearn.cluster import kmeans_plusplus

    if len(vectors) * num_clusters <= _PLUS_PLUS:
        rows, _ = kmeans_plusplus(vectors, num_clusters, random_state=seed)
    else:
        rows = vectors[sample(len(vectors), num_clusters, seed)]
    mean = vectors.mean(axis=0)
    return mean + _SHRINK * (rows - mean)


def nearest(vectors: np.ndarray, centroids: np.ndarray) -> np.ndarray:
    """int32 [N]: the nearest centroid of each row, the first one of equals.

    |x - c|^2 = |x|^2 - 2 x.c + |c|^2, and |x|^2 is the same for all centroids.
    """
    half_norms = 0.5 * (centroids * centroids).sum(axis=1)
    return (vectors @ centroids.T - half_norms).argmax(axis=1).astype(np.int32)


def chunks(num_rows: int, width: int) -> list[slice]:
    """Slices of rows that hold about 64 MiB of float32 each."""
    step = max(1, _CHUNK_BYTES // (4 * max(1, width)))
    return [slice(low, min(low + step, num_rows)) for low in range(0, num_rows, step)]


def sample(num_rows: int, size: int, seed: int) -> np.ndarray:
    """Ascending row numbers int64 [min(num_rows, size)], drawn without replacement."""
    if num_rows <= size:
        return np.arange(num_rows)
    return np.sort(np.random.default_rng(seed).choice(num_rows, size, replace=False))


def as_float32(vectors: np.ndarray, name: str) -> np.ndarray:
    """A float32 copy in memory of some rows, checked to be finite."""
    vectors = np.asarray(vectors, np.float32)
    if not np.isfinite(vectors).all():
        raise ValueError(f"{name}: got values that are not finite, expected real vectors")
    return vectors
