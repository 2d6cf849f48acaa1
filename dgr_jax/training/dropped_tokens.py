"""Queries with some of their tokens left out: word dropout (Iyyer et al. 2015). NumPy only.

Axis letters: B queries, V inputs of one (where lists are of several views), Q query length.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from dgr_jax.special_tokens import UNK_ID
from dgr_jax.training.arrays import Features
from dgr_jax.training.source import Source, parts_of


class DroppedTokens:
    """Batches whose queries, encoder_input_tokens int32 [B, Q] or [B, V, Q], lack a share of their
    text's tokens, drawn anew at each step; those that stay close up.

    The end of a query and the markers of views stay, and so does a query that would lose all of its
    text. The same seed and step leave out the same, however many processes read the batch.
    """

    def __init__(self, source: Source, share: float, *, text_tokens: int, seed: int) -> None:
        """Args:
        share: the probability with which a token is left out.
        text_tokens: ids from here on are not of text.
        """
        self._source, self._share, self._seed = source, share, seed
        self._text_tokens = text_tokens

    def batch(self, step: int, process_index: int = 0, process_count: int = 1) -> Any:
        """See `source.Source`."""
        batch = self._source.batch(step, process_index, process_count)
        parts = parts_of(batch)
        for place, (name, part) in enumerate(sorted(parts.items())):
            random = np.random.default_rng([self._seed, 6, step, place])
            parts[name] = self._shortened(part, random, process_index, process_count)
        return parts[""] if "" in parts else parts

    def _shortened(
        self, part: Features, random: np.random.Generator, process: int, processes: int
    ) -> Features:
        tokens = part["encoder_input_tokens"]
        drawn = random.random((len(tokens) * processes, tokens.shape[-1]), np.float32)
        drawn = drawn[process * len(tokens) : (process + 1) * len(tokens)]
        text = (tokens >= UNK_ID) & (tokens < self._text_tokens)
        left_out = text & (drawn < self._share).reshape(len(tokens), *(1,) * (tokens.ndim - 2), -1)
        left_out &= ~(left_out == text).all(-1, keepdims=True)
        order = np.argsort(left_out | (tokens == 0), axis=-1, kind="stable")
        kept = np.take_along_axis(np.where(left_out, 0, tokens), order, axis=-1)
        return {**part, "encoder_input_tokens": kept}
