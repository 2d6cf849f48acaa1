"""Prepared examples where TensorFlow is not installed: their token arrays, and no records.

This module has the functions of `dgr_jax.data.prepared`, which here count examples and write no
TFDS dataset. It also makes the arrays of a dense retriever, for which SeqIO tasks are used where
TensorFlow is installed. The arrays of generation are always made by `examples.features`.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dgr_jax.data.vocabulary import Vocabulary

VERSION = "1.0.0"
_BLOCK = 4096


class Shard(NamedTuple):
    """How many examples a file of records holds, and how many bytes they take."""

    examples: int
    num_bytes: int


def shard_path(data_dir: Path, name: str, split: str, index: int) -> Path:
    """The file of a shard of a split."""
    return data_dir / name / VERSION / f"{name}-{split}.tfrecord-{index:05d}"


class ShardWriter:
    """Counts the examples of a file that is not written."""

    def __init__(self, path: Path) -> None:
        del path
        self.shard = Shard(0, 0)

    def add(self, examples: Iterable[Mapping[str, Any]]) -> None:
        self.shard = Shard(self.shard.examples + sum(1 for _ in examples), 0)

    def close(self) -> None:
        pass


def features(*, views: bool = False) -> None:
    """Does nothing: without TensorFlow nobody reads the features of generation examples."""
    del views


def positives() -> None:
    """Does nothing: without TensorFlow nobody reads the features of a query's positives."""


def write(
    data_dir: Path, name: str, splits: Mapping[str, Iterable[Mapping[str, Any]]], of: None = None
) -> dict[str, int]:
    """Reads the examples of every split; returns how many each has."""
    del data_dir, name, of
    return {split: sum(1 for _ in examples) for split, examples in splits.items()}


def describe(
    data_dir: Path, name: str, shards: Mapping[str, Sequence[Shard]], of: None = None
) -> None:
    """Does nothing: there is no dataset to describe."""
    del data_dir, name, shards, of


def positives_arrays(
    examples: Iterable[Mapping[str, Any]], vocabulary: Vocabulary, query_length: int, most: int
) -> Iterator[dict[str, np.ndarray]]:
    """Features of `examples.of_positives` as PositivesConverter makes them, in blocks of n <= 4096.

    encoder_input_tokens int32 [n, query_length], positives and grades int32 [n, most], query int32
    [n, 1].
    """
    for held in _blocks(examples):
        numbers = {name: np.zeros((len(held), most), np.int32) for name in ("positives", "grades")}
        for name, rows in numbers.items():
            for row, example in zip(rows, held, strict=True):
                values = example[name][:most]
                row[: len(values)] = values
        yield {
            "encoder_input_tokens": vocabulary.encode_inputs(
                [example["inputs"] for example in held], query_length
            ),
            "positives": numbers["positives"] - 1,
            "grades": numbers["grades"],
            "query": np.array([example["query"] for example in held], np.int32) - 1,
        }


def passage_arrays(
    texts: Iterable[str], vocabulary: Vocabulary, length: int
) -> Iterator[dict[str, np.ndarray]]:
    """passage_tokens int32 [n <= 4096, length] of every text, as PassageConverter makes them."""
    for held in _blocks(texts):
        yield {"passage_tokens": vocabulary.encode_inputs(held, length)}


def _blocks(items: Iterable[Any]) -> Iterator[list[Any]]:
    items = iter(items)
    while block := list(itertools.islice(items, _BLOCK)):
        yield block
