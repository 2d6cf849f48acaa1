"""Queries of a batch side by side: encoder rows with little padding. NumPy only.

Questions differ in length, and most are much shorter than the longest. So they are laid one after
another in rows of the encoder, kept apart by segments: it computes of each what it would compute of
it alone, in fewer rows (`models.query_rows`). A batch is packed in groups, one for each data shard
and microbatch, so that no token leaves its device.

Axis letters: B queries, V inputs of one (where lists are of several views), Q query length, G
groups, n inputs of a group, R rows of a group, W = 2Q tokens of a row.
"""

from __future__ import annotations

import logging
from typing import Any, NamedTuple

import numpy as np

from dgr_jax.training.arrays import Features
from dgr_jax.training.packing import first_fit
from dgr_jax.training.source import Source, parts_of

logger = logging.getLogger(__name__)

_PER_ROW = 2  # of the longest queries
_SEEN = 32  # steps by which the number of rows is chosen
_WORTH = 0.9  # share of the tokens read, padding counted, up to which queries are packed


class _Layout(NamedTuple):
    """groups: places of each group's inputs among B*V, int [G, n]; starts int32 [G, n]: of each
    input, among R*W; rows: the most that a group needs."""

    groups: np.ndarray
    starts: np.ndarray
    rows: int


class PackedQueries:
    """Batches whose queries, encoder_input_tokens int32 [B, Q] or [B, V, Q], are packed too:

    packed_query_tokens int32 [G, R, W]: inputs one after another, then 0; packed_query_segments
    int32 [G, R, W]: 1 + number among the group's n of the input that a token is of, 0 for none;
    packed_query_starts int32 [B] or [B, V]: place among R*W of its first token.

    R is what the first steps need and a little more; a batch that needs more has as many as two
    inputs a row fill, so that there are no more than two shapes. The parts of a batch {name:
    features} are packed one by one, and those that would gain little stay as they are.
    """

    def __init__(self, source: Source, *, shards: int, microbatches: int) -> None:
        """Args:
        source: its first steps are read at once.
        shards: data shards, of all processes together.
        """
        self._source, self._shards, self._microbatches = source, shards, microbatches
        inputs: dict[str, int] = {}
        rows: dict[str, int] = {}
        for step in range(_SEEN):
            for name, part in parts_of(source.batch(step)).items():
                layout = self._layout(part, shards)
                inputs[name] = layout.groups.shape[1]
                rows[name] = max(rows.get(name, 0), layout.rows)
        spare = {name: most + -(-most // 32) for name, most in rows.items()}
        self._rows = {
            name: most for name, most in spare.items() if _PER_ROW * most <= _WORTH * inputs[name]
        }
        for name, most in self._rows.items():
            of = f" of {name}s" if name else ""
            logger.info("queries%s: %d in %d rows of the encoder", of, inputs[name], most)

    def batch(self, step: int, process_index: int = 0, process_count: int = 1) -> Any:
        """See `source.Source`."""
        batch = self._source.batch(step, process_index, process_count)
        # All processes need equally many rows, so that each looks at the queries of all.
        whole = batch if process_count == 1 else self._source.batch(step)
        parts, shards = parts_of(batch), self._shards // process_count
        for name, most in self._rows.items():
            layout = self._layout(parts[name], shards)
            of_all = layout if whole is batch else self._layout(parts_of(whole)[name], self._shards)
            fits = of_all.rows <= most
            rows = most if fits else -(-layout.groups.shape[1] // _PER_ROW)
            parts[name] = _packed(parts[name], layout, rows)
        return parts[""] if "" in parts else parts

    def _layout(self, part: Features, shards: int) -> _Layout:
        """A microbatch has every so manyth query of a shard (see `training.step`)."""
        queries, *views, length = part["encoder_input_tokens"].shape
        groups = np.arange(queries * int(np.prod(views)))
        groups = groups.reshape(shards, -1, self._microbatches, *views).swapaxes(1, 2)
        groups = groups.reshape(shards * self._microbatches, -1)
        starts, rows = first_fit(_lengths(part)[groups], _PER_ROW * length)
        return _Layout(groups, starts, int(rows.max()))


def _packed(part: Features, layout: _Layout, rows: int) -> Features:
    """The features with those of `PackedQueries`."""
    tokens, groups = part["encoder_input_tokens"], layout.groups
    width = _PER_ROW * tokens.shape[-1]
    grouped = tokens.reshape(-1, tokens.shape[-1])[groups]
    of_group, inputs, offsets = np.nonzero(grouped)
    at = layout.starts[of_group, inputs] + offsets
    flat = np.zeros((2, len(groups), rows * width), np.int32)
    flat[0, of_group, at], flat[1, of_group, at] = grouped[of_group, inputs, offsets], inputs + 1
    laid, segments = flat.reshape(2, len(groups), rows, width)
    in_order = np.empty(groups.size, np.int32)
    in_order[groups] = layout.starts
    return {
        **part,
        "packed_query_tokens": laid,
        "packed_query_segments": segments,
        "packed_query_starts": in_order.reshape(tokens.shape[:-1]),
    }


def _lengths(part: Features) -> np.ndarray:
    """Tokens of each input, up to its last, int [B*V]."""
    there = part["encoder_input_tokens"] > 0
    return ((np.arange(there.shape[-1]) + 1) * there).max(-1).reshape(-1)
