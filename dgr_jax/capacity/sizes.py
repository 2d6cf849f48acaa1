"""Sizes of vocabularies, identifiers and indexes before anything is made."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from dgr_jax.data.vocabulary import SentencePiece
from dgr_jax.decoding import trie_arrays, trie_build
from dgr_jax.experiments.generative import Experiment
from dgr_jax.identifiers.atomic import Atomic
from dgr_jax.identifiers.rq import ResidualQuantization
from dgr_jax.identifiers.semantic import KMeansTree
from dgr_jax.identifiers.string import NaiveString


@dataclass(frozen=True)
class Sizes:
    """What the prepare stage would find: passages, tokens of the vocabulary, the choices at every
    position of an identifier, and whether identifiers end with a closing token."""

    passages: int
    vocab_size: int
    levels: tuple[int, ...]
    closing: bool

    @property
    def length(self) -> int:
        return len(self.levels) + self.closing


def estimated_sizes(experiment: Experiment, passages: int) -> Sizes:
    """Sizes from the settings. Codes are taken to be used evenly, text vocabularies to be full."""
    levels, codes, closing = _levels(experiment.prepare.identifiers, passages)
    text = text_size(experiment.prepare.vocabulary)
    size = experiment.model.vocab_size or _rounded(text + codes)
    return Sizes(passages, size, levels, closing)


def text_size(pieces: SentencePiece) -> int:
    """Tokens of a text vocabulary before any code, full; one that is given has T5's 32,000."""
    return _rounded((32_000 if pieces.path else pieces.size) + pieces.extra_ids)


def _rounded(tokens: int) -> int:
    return -(-tokens // 128) * 128


def _levels(scheme: Any, passages: int) -> tuple[tuple[int, ...], int, bool]:
    """(choices at each position, docid codes in the vocabulary, ends with a closing token)."""
    if isinstance(scheme, ResidualQuantization):
        scheme = scheme.sized(passages)
        levels = (scheme.codebook_size,) * scheme.num_codes
        if math.prod(levels) < 2 * passages:  # many share their codes: a tie code tells them apart
            levels = (*levels, max(2, math.ceil(2 * passages / math.prod(levels))))
        return levels, sum(levels), False
    if isinstance(scheme, KMeansTree):
        splits = math.log(max(passages / scheme.leaf_size, 1)) / math.log(scheme.branching)
        levels = (scheme.branching,) * math.ceil(splits) + (scheme.leaf_size,)
        return levels, sum(levels), True
    if isinstance(scheme, NaiveString):
        return (10,) * len(str(passages - 1)), 10, False
    if isinstance(scheme, Atomic):
        return (passages,), passages, False
    return (2000,) * 12, 0, True  # titles and other text


def abstract_trie(sizes: Sizes) -> tuple[trie_arrays.Arrays, trie_build.Layout]:
    """The arrays of the trie of random identifiers, in shape and dtype, without memory.

    Rows in c cells fill c (1 - exp(-rows / c)) of them; exp(-rows / c) of the rows are alone.
    """
    rows, length = sizes.passages, len(sizes.levels)
    cells = [math.prod(sizes.levels[:depth]) for depth in range(length + 1)]
    alone = [rows * math.exp(-(rows - 1) / cell) for cell in cells]
    nodes = [cell * -math.expm1(-rows / cell) for cell in cells]
    alone[-1] = nodes[-1] = rows
    inner = [nodes[depth] - alone[depth] for depth in range(length)]
    stored = [1.0] + [nodes[depth] - alone[depth - 1] for depth in range(1, length + 1)]
    left = [length - depth + sizes.closing for depth in range(length + 1)]
    tails = alone[0] * left[0]
    tails += sum((alone[d] - alone[d - 1]) * left[d] for d in range(1, length + 1))
    layout = _layout(sizes)
    most = layout.gathers[-1]
    wide = sum(i for depth, i in enumerate(inner) if i >= 1 and stored[depth + 1] / i > most)
    counts = dict(nodes=sum(stored), inner=sum(inner), tails=tails, wide=wide)
    made = _arrays(sizes, layout, **{name: round(count) for name, count in counts.items()})
    capacity = trie_arrays.capacities(made, layout)
    padded = {name: _unreal(capacity[name], array.dtype) for name, array in made.items()}
    return trie_arrays.Arrays(**padded), layout


def _layout(sizes: Sizes) -> trie_build.Layout:
    # A closing token, which is small, stretches the range of token ids at a depth.
    spans = np.array([sizes.vocab_size] if sizes.closing else sizes.levels)
    words = trie_build.bitmap_words(sizes.vocab_size, spans[spans > trie_build.GATHERS[-1]])
    return trie_build.Layout(
        ends="token" if sizes.closing else "fixed",
        max_length=trie_build.size_class(sizes.length) if sizes.closing else sizes.length,
        gathers=trie_build.choose_gathers(words),
        bitmap_words=words,
        token_dtype=trie_build.smallest_dtype(spans.max() - 1).name,
    )


def _arrays(
    sizes: Sizes, layout: trie_build.Layout, *, nodes: int, inner: int, tails: int, wide: int
) -> trie_arrays.Arrays:
    if sizes.vocab_size > trie_build.MAX_VOCABULARY:
        raise ValueError(
            f"Prepare.identifiers: a vocabulary of {sizes.vocab_size} tokens, expected at most "
            f"{trie_build.MAX_VOCABULARY}, which the trie can hold"
        )
    token, longest = np.dtype(layout.token_dtype), layout.max_length
    shapes = {
        "edge_tokens": ((nodes,), token),
        "directory": ((-(-nodes // 32), 2), np.uint32),
        "first_child": ((inner + 1,), np.int32),
        "tails": ((tails,), token),
        "tail_start": ((sizes.passages if sizes.closing else 0,), np.int32),
        "row_length": ((0,), np.uint8),
        "wide": ((wide,), np.int32),
        "bitmaps": ((wide, layout.bitmap_words), np.uint32),
        "base": ((longest + 1,), np.int32),
        "bitmap_low": ((longest + 1,), np.int32),
        "level_start": ((longest + 2,), np.int32),
        "tail_bias": ((longest + 1,), np.int32),
        "ends_at": ((), np.int32),
    }
    return trie_arrays.Arrays(**{name: _unreal(*found) for name, found in shapes.items()})


def _unreal(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """An array of this shape that takes no memory."""
    return np.broadcast_to(np.zeros((), dtype), shape)
