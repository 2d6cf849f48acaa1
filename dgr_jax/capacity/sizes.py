"""Sizes of vocabularies, identifiers and indexes before anything is made."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from dgr_jax import partitioning
from dgr_jax.data.vocabulary import SentencePiece, round_up
from dgr_jax.decoding import trie_arrays, trie_build
from dgr_jax.experiments.common import Training
from dgr_jax.experiments.dense import DenseExperiment
from dgr_jax.experiments.generative import Experiment
from dgr_jax.identifiers.scheme import CorpusSize, Sizes, TableSizes
from dgr_jax.models.t5 import T5Config
from dgr_jax.training.step import abstract_state

_MOST_IDS = 2**31 - 1


@dataclass(frozen=True)
class PreparedSizes:
    """What the prepare stage would leave of a corpus: tokens of the vocabulary, and identifiers."""

    corpus: CorpusSize
    vocab_size: int
    identifiers: Sizes

    @property
    def length(self) -> int:
        """Tokens of the longest identifier."""
        return self.identifiers.length


def estimated_sizes(experiment: Experiment, corpus: CorpusSize) -> PreparedSizes:
    """Sizes from the settings. Codes are taken to be used evenly, text vocabularies to be full.

    Raises ValueError for more tokens than int32 can number.
    """
    scheme = experiment.prepare.identifiers
    identifiers = scheme.sizes(corpus)
    size = text_size(experiment.prepare.vocabulary) + round_up(len(scheme.views))
    size = experiment.model.vocab_size or size + round_up(identifiers.codes)
    if size > _MOST_IDS:
        raise ValueError(
            f"{type(scheme).__name__}: got {identifiers.codes:,} codes for {corpus.passages:,} "
            f"passages in a vocabulary of {size:,}, expected at most {_MOST_IDS:,} tokens, whose "
            "ids are int32: take smaller settings of IDENTIFIERS, a smaller SentencePiece.size, "
            "or fewer passages"
        )
    return PreparedSizes(corpus, size, identifiers)


def text_size(pieces: SentencePiece) -> int:
    """Tokens of a text vocabulary before any code, full; one that is given has T5's 32,000."""
    return round_up((32_000 if pieces.path else pieces.size) + pieces.extra_ids)


def model_config(experiment: Experiment, sizes: PreparedSizes) -> T5Config:
    """The student with the vocabulary of these sizes."""
    return dataclasses.replace(experiment.model, vocab_size=sizes.vocab_size)


def training_stages(experiment: Experiment | DenseExperiment) -> dict[str, Training]:
    """Every stage that trains, in order."""
    return {k: v for system in experiment.systems for k, v in experiment.training(system).items()}


def held_bytes(tree: Any) -> int:
    """Bytes on one chip of abstract arrays with shardings."""
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * np.dtype(leaf.dtype).itemsize
        for leaf in jax.tree.leaves(tree)
    )


def state_bytes(model: Any, settings: Training) -> tuple[int, int]:
    """Bytes of a model's parameters, and of the state of the optimizer that trains it."""
    mesh = partitioning.make_mesh(devices=jax.devices()[:1])
    state = abstract_state(model, settings.optimizer.transformation(settings.steps), mesh)
    return held_bytes(state.params), held_bytes(state.opt_state)


def abstract_trie(
    table: TableSizes, vocab_size: int
) -> tuple[trie_arrays.Arrays, trie_build.Layout]:
    """The arrays of the trie of random identifiers, in shape and dtype, without memory.

    Rows in c cells fill c (1 - exp(-rows / c)) of them; exp(-rows / c) of the rows are alone.
    """
    rows, length = table.rows, len(table.levels)
    cells = [math.prod(table.levels[:depth]) for depth in range(length + 1)]
    alone = [rows * math.exp(-(rows - 1) / cell) for cell in cells]
    nodes = [cell * -math.expm1(-rows / cell) for cell in cells]
    alone[-1] = nodes[-1] = rows
    inner = [nodes[depth] - alone[depth] for depth in range(length)]
    stored = [1.0] + [nodes[depth] - alone[depth - 1] for depth in range(1, length + 1)]
    mean = table.length if table.mean_length is None else table.mean_length
    left = [max(0.0, mean - depth) for depth in range(length + 1)]
    tails = alone[0] * left[0]
    tails += sum((alone[d] - alone[d - 1]) * left[d] for d in range(1, length + 1))
    layout = _layout(table, vocab_size)
    most = layout.gathers[-1]
    wide = sum(i for depth, i in enumerate(inner) if i >= 1 and stored[depth + 1] / i > most)
    counts = dict(nodes=sum(stored), inner=sum(inner), tails=tails, wide=wide)
    arrays = _arrays(table, layout, **{name: round(count) for name, count in counts.items()})
    capacity = trie_arrays.capacities(arrays, layout)
    padded = {name: _unreal(capacity[name], array.dtype) for name, array in arrays.items()}
    return trie_arrays.Arrays(**padded), layout


def trie_bytes(table: TableSizes, vocab_size: int) -> int:
    """Bytes of such a trie on a device."""
    return sum(array.nbytes for _, array in abstract_trie(table, vocab_size)[0].items())


def _layout(table: TableSizes, vocab_size: int) -> trie_build.Layout:
    # A closing token, which is small, stretches the range of token ids at a depth.
    spans = np.array([vocab_size] if table.closing else table.levels)
    words = trie_build.bitmap_words(vocab_size, spans[spans > trie_build.GATHERS[-1]])
    return trie_build.Layout(
        ends="token" if table.closing else "fixed",
        max_length=trie_build.size_class(table.length) if table.closing else table.length,
        gathers=trie_build.choose_gathers(words),
        bitmap_words=words,
        token_dtype=trie_build.smallest_dtype(spans.max() - 1).name,
    )


def _arrays(
    table: TableSizes, layout: trie_build.Layout, *, nodes: int, inner: int, tails: int, wide: int
) -> trie_arrays.Arrays:
    token, longest = np.dtype(layout.token_dtype), layout.max_length
    shapes = {
        "edge_tokens": ((nodes,), token),
        "directory": ((-(-nodes // 32), 2), np.uint32),
        "first_child": ((inner + 1,), np.int32),
        "tails": ((tails,), token),
        "tail_start": ((table.rows if table.closing else 0,), np.int32),
        "row_length": ((0,), np.uint8),
        "wide": ((wide,), np.int32),
        "bitmaps": ((wide, layout.bitmap_words), np.uint32),
        "base": ((longest + 1,), np.int32),
        "bitmap_low": ((longest + 1,), np.int32),
        "level_start": ((longest + 2,), np.int32),
        "tail_bias": ((longest + 1,), np.int32),
        "ends_at": ((), np.int32),
    }
    return trie_arrays.Arrays(**{name: _unreal(*spec) for name, spec in shapes.items()})


def _unreal(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """An array of this shape that takes no memory."""
    return np.broadcast_to(np.zeros((), dtype), shape)
