"""A prepared collection as a TensorFlow Dataset that `seqio.TfdsDataSource` reads."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

VERSION = "1.0.0"
_SHARD = 500_000
_BLOCK = 1_000


def features(*, views: bool = False) -> tfds.features.FeaturesDict:
    """Features of a generation example: see `dgr_jax.data.examples`, and `dgr_jax.data.views` for
    examples of several views."""
    plain = {
        "inputs": tfds.features.Text(),
        "targets": tfds.features.Tensor(shape=(None,), dtype=np.int32),
        "qid": tfds.features.Text(),
        "pid": tfds.features.Text(),
    }
    return tfds.features.FeaturesDict(plain | {"view": tfds.features.Text()} if views else plain)


def positives() -> tfds.features.FeaturesDict:
    """Features of a query with its positives: see `dgr_jax.data.examples.of_positives`."""
    numbers = tfds.features.Tensor(shape=(None,), dtype=np.int32)
    return tfds.features.FeaturesDict(
        {
            "inputs": tfds.features.Text(),
            "positives": numbers,
            "grades": numbers,
            "query": numbers,
            "qid": tfds.features.Text(),
        }
    )


def write(
    data_dir: Path,
    name: str,
    splits: Mapping[str, Iterable[Mapping[str, Any]]],
    of: tfds.features.FeaturesDict | None = None,
) -> dict[str, int]:
    """Write `name`:1.0.0 into `data_dir`, one TFDS split a source of examples; -> examples a split.

    Examples are streamed; a shard holds at most 500,000. of: their features; None: `features()`.
    """
    folder = data_dir / name / VERSION
    folder.mkdir(parents=True, exist_ok=True)
    identity = tfds.core.dataset_info.DatasetIdentity(
        name=name, version=tfds.core.Version(VERSION), data_dir=str(folder), module_name=__name__
    )
    info = tfds.core.DatasetInfo(
        builder=identity,
        features=of or features(),
        description="Training examples: a text, and the passages that it is about.",
    )
    writer = tfds.core.SequentialWriter(info, max_examples_per_shard=_SHARD)
    writer.initialize_splits(list(splits))
    counts = {}
    for split, stream in splits.items():
        counts[split] = 0
        for block in _blocks(stream):
            writer.add_examples({split: block})
            counts[split] += len(block)
    writer.close_all()
    return counts


def _blocks(stream: Iterable[Mapping[str, Any]]) -> Iterator[list[Mapping[str, Any]]]:
    stream = iter(stream)
    while block := list(itertools.islice(stream, _BLOCK)):
        yield block
