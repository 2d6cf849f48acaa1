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
from collections.abc import Mapping
from typing import Any

import numpy as np

from dgr_jax.training.arrays import Features
from dgr_jax.training.packing import first_fit
from dgr_jax.training.source import Source

logger = logging.getLogger(__name__)

_PER_ROW = 2  # of the longest queries
_SEEN = 32  # steps by which the number of rows is chosen
_WORTH = 0.9  # share of the tokens read, padding counted, up to which queries are packed


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
            for name, part in _parts(source.batch(step)).items():
                lengths = _lengths(part)[self._groups(part, shards)]
                needed = _rows(lengths, part)
                inputs[name], rows[name] = lengths.shape[1], max(rows.get(name, 0), needed)
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
        parts, shards = _parts(batch), self._shards // process_count
        for name in self._rows:
            every = _parts(whole)[name]
            lengths = _lengths(every)[self._groups(every, self._shards)]
            fits = _rows(lengths, every) <= self._rows[name]
            rows = self._rows[name] if fits else -(-lengths.shape[1] // _PER_ROW)
            parts[name] = packed(parts[name], self._groups(parts[name], shards), rows)
        return parts[""] if "" in parts else parts

    def _groups(self, part: Features, shards: int) -> np.ndarray:
        """The places, among B*V, of each group's inputs, int [G, n]. A microbatch has every so
        manyth query of a shard (see `training.step`)."""
        queries, *views, _ = part["encoder_input_tokens"].shape
        places = np.arange(queries * int(np.prod(views)))
        places = places.reshape(shards, -1, self._microbatches, *views).swapaxes(1, 2)
        return places.reshape(shards * self._microbatches, -1)


def packed(part: Features, groups: np.ndarray, rows: int) -> Features:
    """The features with those of `PackedQueries`; groups: int [G, n], as of its `_groups`."""
    tokens = part["encoder_input_tokens"]
    width = _PER_ROW * tokens.shape[-1]
    grouped = tokens.reshape(-1, tokens.shape[-1])[groups]
    starts, _ = first_fit(_lengths(part)[groups], width)
    of_group, inputs, offsets = np.nonzero(grouped)
    at = starts[of_group, inputs] + offsets
    flat = np.zeros((2, len(groups), rows * width), np.int32)
    flat[0, of_group, at], flat[1, of_group, at] = grouped[of_group, inputs, offsets], inputs + 1
    laid, segments = flat.reshape(2, len(groups), rows, width)
    in_order = np.empty(groups.size, np.int32)
    in_order[groups] = starts
    return {
        **part,
        "packed_query_tokens": laid,
        "packed_query_segments": segments,
        "packed_query_starts": in_order.reshape(tokens.shape[:-1]),
    }


def _parts(batch: Any) -> dict[str, Features]:
    """The parts of a batch that has some; {"": batch} of one that has none."""
    whole = not all(isinstance(part, Mapping) for part in batch.values())
    return {"": batch} if whole else dict(batch)


def _lengths(part: Features) -> np.ndarray:
    """Tokens of each input, up to its last, int [B*V]."""
    there = part["encoder_input_tokens"] > 0
    return ((np.arange(there.shape[-1]) + 1) * there).max(-1).reshape(-1)


def _rows(lengths: np.ndarray, part: Features) -> int:
    """The most rows that a group needs; lengths: int [G, n]."""
    width = _PER_ROW * part["encoder_input_tokens"].shape[-1]
    return int(first_fit(lengths, width)[1].max())
