"""A prepared collection as a TensorFlow Dataset that `seqio.TfdsDataSource` reads.

Records are tf.train.Example messages, which are encoded here. So an example gives the same bytes in
every process, in a quarter of the time that TFDS takes (benchmarks/RESULTS.md).
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
    """Features of a generation example; see `dgr_jax.data.examples`, or `dgr_jax.data.views` for
    examples of several views."""
    plain = {
        "inputs": tfds.features.Text(),
        "targets": tfds.features.Tensor(shape=(None,), dtype=np.int32),
        "qid": tfds.features.Text(),
        "pid": tfds.features.Text(),
    }
    return tfds.features.FeaturesDict(plain | {"view": tfds.features.Text()} if views else plain)


def positives() -> tfds.features.FeaturesDict:
    """Features of a query with its positives; see `dgr_jax.data.examples.of_positives`."""
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
    """Writes one file of records; `shard` counts what was written."""

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
    """Writes the dataset `name`:1.0.0 into `data_dir` and returns the number of examples by split.

    splits: the examples of each TFDS split, which are streamed into one file. of: the features of
    an example; None takes `features()`.
    """
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
    """Writes the files that make the shards of all splits the dataset `name`:1.0.0.

    of: see `write`.
    """
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
    """How many examples of a split TFDS reads in the order in which they were written.

    All of them where the split is one file. With several files, TFDS reads 16 examples of one at a
    time, so only those of its first turn.
    """
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
    """The bytes of a tf.train.Example with texts and integers [n], its features sorted by name.

    The encoding is that of protocol buffers (protobuf.dev/programming-guides/encoding). A field has
    a byte for its number and type (0x0a, 0x12 and 0x1a for the fields 1, 2 and 3), then its length
    and its bytes. An integer is written in groups of 7 bits, of which only the last byte lacks the
    high bit.
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


def _varint(value: int) -> bytes:
    if value < 0x80:
        return bytes((value,))
    groups = []
    while value:
        groups.append(value & 0x7F | 0x80)
        value >>= 7
    groups[-1] &= 0x7F
    return bytes(groups)
