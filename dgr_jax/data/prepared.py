"""A prepared collection as a TensorFlow Dataset that `seqio.TfdsDataSource` reads.

Records are tf.train.Example messages, encoded here: the same example is the same bytes in every
process, and TFDS takes four times as long for the same messages (benchmarks/RESULTS.md).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf
import tensorflow_datasets as tfds

from dgr_jax.data.direct import VERSION, Shard, shard_path

_TURN = tfds.ReadConfig().interleave_block_length


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


class ShardWriter:
    """Writes one file of records; `shard` says what is in it."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._writer = tf.io.TFRecordWriter(str(path))
        self.shard = Shard(0, 0)

    def add(self, examples: Iterable[Mapping[str, Any]]) -> None:
        count, num_bytes = self.shard
        for example in examples:
            record = encoded(example)
            self._writer.write(record)
            count += 1
            num_bytes += len(record)
        self.shard = Shard(count, num_bytes)

    def close(self) -> None:
        self._writer.close()


def write(
    data_dir: Path,
    name: str,
    splits: Mapping[str, Iterable[Mapping[str, Any]]],
    of: tfds.features.FeaturesDict | None = None,
) -> dict[str, int]:
    """Writes `name`:1.0.0 into `data_dir`, one TFDS split, one file, a source of examples, which
    are streamed; -> examples a split. of: their features; None: `features()`."""
    shards = {}
    for split, examples in splits.items():
        writer = ShardWriter(shard_path(data_dir, name, split, 0))
        writer.add(examples)
        writer.close()
        shards[split] = [writer.shard]
    describe(data_dir, name, shards, of)
    return {split: shard.examples for split, (shard,) in shards.items()}


def describe(
    data_dir: Path,
    name: str,
    shards: Mapping[str, Sequence[Shard]],
    of: tfds.features.FeaturesDict | None = None,
) -> None:
    """Writes what makes the shards of each split the dataset `name`:1.0.0; of: see `write`."""
    folder = data_dir / name / VERSION
    identity = tfds.core.dataset_info.DatasetIdentity(
        name=name, version=tfds.core.Version(VERSION), data_dir=str(folder), module_name=__name__
    )
    info = tfds.core.DatasetInfo(
        builder=identity,
        features=of or features(),
        description="Training examples: a text, and the passages that it is about.",
    )
    info.set_file_format(file_format=tfds.core.FileFormat.TFRECORD)
    splits = [_split(folder, name, split, of) for split, of in shards.items()]
    info.set_splits(tfds.core.SplitDict(splits))
    info.write_to_directory(folder)


def in_order(data_dir: Path, name: str, split: str) -> int:
    """How many examples of a split TFDS reads first in the order they were written: all of one
    file; of several the first 16, a turn, of the first file."""
    info = tfds.builder_from_directory(str(data_dir / name / VERSION)).info
    lengths = info.splits[split].shard_lengths
    return lengths[0] if len(lengths) == 1 else min(lengths[0], _TURN)


def _split(folder: Path, name: str, split: str, shards: Sequence[Shard]) -> Any:
    template = tfds.core.ShardedFileTemplate(
        dataset_name=name,
        data_dir=folder,
        split=split,
        filetype_suffix="tfrecord",
        template="{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_INDEX}",
    )
    return tfds.core.SplitInfo(
        name=split,
        shard_lengths=[shard.examples for shard in shards],
        num_bytes=sum(shard.num_bytes for shard in shards),
        filename_template=template,
    )


def encoded(example: Mapping[str, Any]) -> bytes:
    """A tf.train.Example of texts and integers [n], features by name.

    Protocol buffers on the wire (protobuf.dev/programming-guides/encoding): a field is its number
    and type in a byte, here 0x0a, 0x12 and 0x1a for the fields 1, 2 and 3, its length and its
    bytes; integers follow each other in groups of 7 bits, the last without the high bit.
    """
    entries = []
    for name in sorted(example):
        value = example[name]
        if isinstance(value, str):
            feature = _field(0x0A, _field(0x0A, value.encode()))
        else:
            numbers = b"".join(map(_varint, np.asarray(value).tolist()))
            feature = _field(0x1A, _field(0x0A, numbers))
        entries.append(_field(0x0A, _field(0x0A, name.encode()) + _field(0x12, feature)))
    return _field(0x0A, b"".join(entries))


def _field(tag: int, content: bytes) -> bytes:
    return bytes((tag,)) + _varint(len(content)) + content


def _varint(number: int) -> bytes:
    if number < 0x80:
        return bytes((number,))
    groups = []
    while number:
        groups.append(number & 0x7F | 0x80)
        number >>= 7
    groups[-1] &= 0x7F
    return bytes(groups)
