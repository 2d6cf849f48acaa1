"""Batches of Grain (extra `grain`) in training, and token arrays in Grain.

Whoever loads data by Grain makes a `grain.MapDataset` of examples, and `GrainSource` hands it to
`loop.train`. `examples` is the other way: a MapDataset of token arrays in the order in which
`source.ArraySource` reads them, so that the same batches can be made, or changed, by Grain.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from dgr_jax.training.arrays import Features
from dgr_jax.training.source import ArraySource, local_rows, positive


def _grain() -> Any:
    try:
        import grain
    except ImportError as error:
        raise ImportError(
            "batches of Grain need the extra 'dgr_jax[grain]': pip install 'dgr_jax[grain]'"
        ) from error
    return grain


class _Examples:
    """What `grain.MapDataset.source` reads: examples at the places of an endless order."""

    def __init__(self, source: ArraySource, epochs: int) -> None:
        self._source, self._epochs = source, epochs

    def __len__(self) -> int:
        return self._source.count * self._epochs

    def __getitem__(self, place: int) -> Features:
        return {name: values[0] for name, values in self._source.batch(int(place)).items()}


def examples(arrays: str | Path | Mapping[str, np.ndarray], seed: int, *, epochs: int = 1) -> Any:
    """A grain.MapDataset of single examples, {name: [...]}, each epoch another permutation of them.

    arrays, seed: as of `ArraySource`, whose order this is. Raises ImportError where Grain is
    missing.
    """
    return _grain().MapDataset.source(_Examples(ArraySource(arrays, 1, seed), epochs))


class GrainSource:
    """A Source (see `source`) of the batches of a grain.MapDataset of examples.

    Step s has the examples s * batch_size up to (s + 1) * batch_size of the dataset, which begins
    again after its last one, as a repeated MapDataset does.
    """

    def __init__(self, dataset: Any, batch_size: int) -> None:
        """dataset: a grain.MapDataset of {name: array}, of the same shapes in each example."""
        if not isinstance(dataset, _grain().MapDataset):
            raise ValueError(
                f"dataset: got {type(dataset).__name__}, expected a grain.MapDataset, whose "
                "examples are found by their place"
            )
        if not len(dataset):
            raise ValueError("dataset: got one without examples, expected at least one")
        self._dataset, self.batch_size = dataset, positive(batch_size)

    def batch(self, step: int, process_index: int = 0, process_count: int = 1) -> Features:
        """See `source.Source`."""
        local = local_rows(self.batch_size, process_index, process_count)
        first = step * self.batch_size
        rows = [self._dataset[place] for place in range(first + local.start, first + local.stop)]
        if None in rows:
            raise ValueError(
                "dataset: got one whose examples are filtered, expected one with an example at "
                "each place; filter before it is made"
            )
        return {name: np.stack([row[name] for row in rows]) for name in rows[0]}
