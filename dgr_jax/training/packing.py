"""Identifiers of a query side by side: decoder rows without padding, each identifier once.

Docids such as titles differ in length, and identifiers of several views do, from one token to a
pseudo-query's; many of these are prefixes of one another, as every prefix of a span is an
identifier, and passages of a list share them. The log-probabilities of a prefix are those of the
longer identifier's first tokens. So the longest ones are enough: they are laid one after another in
rows of a fixed width, kept apart by segments. NumPy only.

Axis letters: n lists, I = L*K identifiers of a list, T identifier length, R rows of a list, W their
width.
"""

from __future__ import annotations

import logging
from typing import NamedTuple

import numpy as np

from dgr_jax.training.arrays import Features
from dgr_jax.training.source import Source

logger = logging.getLogger(__name__)

_BLOCK = 2048  # lists that are looked at together
_WIDTH = 64


class Places(NamedTuple):
    """Where identifiers lie: starts int32 [n, I], row * W + column of the first token; longest bool
    [n, I], those that are written, none of them a prefix of another; rows int32 [n], in use."""

    starts: np.ndarray
    longest: np.ndarray
    rows: np.ndarray


def width_for(length: int) -> int:
    """W for identifiers of at most `length` tokens: rows of at least two, in multiples of 8."""
    return max(_WIDTH, -(-2 * length // 8) * 8)


def places(tokens: np.ndarray, views: np.ndarray, width: int) -> Places:
    """Where the identifiers of each list lie in its rows.

    tokens: int32 [n, I, T], right-padded with 0; views: int32 [n, I]. Identifiers of other views
    are asked for with other encoder inputs, and never prefixes of each other.
    """
    words = np.concatenate([views[..., None] + 1, tokens], axis=-1).astype(">u4")
    keys = words.view(f"S{4 * words.shape[-1]}")[..., 0]  # compared byte by byte
    order = np.argsort(keys, axis=1, kind="stable")
    words = np.take_along_axis(words, order[..., None], axis=1)
    here, following = words[:, :-1], words[:, 1:]
    is_prefix = ((here == following) | (here == 0)).all(-1)
    # A prefix of any is a prefix of the next in order.
    is_prefix = np.pad(is_prefix, ((0, 0), (0, 1)))
    lengths = np.where(is_prefix, 0, (words[..., 1:] > 0).sum(-1))
    starts, rows = first_fit(lengths, width)
    ordinals = np.where(is_prefix, words.shape[1], np.arange(words.shape[1]))
    extends = np.minimum.accumulate(ordinals[:, ::-1], axis=1)[:, ::-1]
    starts = np.take_along_axis(starts, extends, axis=1)
    back = np.argsort(order, axis=1)
    return Places(
        np.take_along_axis(starts, back, axis=1),
        np.take_along_axis(lengths > 0, back, axis=1),
        rows,
    )


def first_fit(lengths: np.ndarray, width: int) -> tuple[np.ndarray, np.ndarray]:
    """First fit, the longest first: starts int32 [n, I] and rows in use int32 [n]."""
    order = np.argsort(-lengths, axis=1, kind="stable")
    most = int((lengths > 0).sum(1).max(initial=0))
    # Two rows are never both at most half full, so twice the tokens and one row are enough.
    rows = -(-2 * int(lengths.sum(1).max(initial=0)) // width) + 1
    free = np.full((len(lengths), rows), width, np.int32)
    starts = np.zeros(lengths.shape, np.int32)
    lists = np.arange(len(lengths))
    for place in order.T[:most]:
        length = lengths[lists, place]
        row = (free >= length[:, None]).argmax(1)
        starts[lists, place] = row * width + width - free[lists, row]
        free[lists, row] -= length
    return starts, (free < width).sum(1).astype(np.int32)


def packed(tokens: np.ndarray, views: np.ndarray, rows: int, width: int) -> Features:
    """Features of lists with identifier_tokens int32 [B, L, K, T] and identifier_views [B, L, K],
    zeros for docids.

    packed_tokens int32 [B, R, W]: identifiers one after another, then 0; packed_segments int32
    [B, R, W]: 1 + number among the L*K of the identifier that a token is of, 0 for none;
    packed_starts int32 [B, L, K]: place among R*W of each identifier's first token.

    Raises ValueError where a list needs more rows.
    """
    flat = tokens.reshape(len(tokens), -1, tokens.shape[-1])
    layout = places(flat, views.reshape(flat.shape[:2]), width)
    if layout.rows.max(initial=0) > rows:
        raise ValueError(
            f"rank lists: got one that fills {layout.rows.max()} rows of {width} tokens, expected "
            f"{rows} or fewer"
        )
    written = (flat > 0) & layout.longest[..., None]
    lists, numbers, offsets = np.nonzero(written)
    at = layout.starts[lists, numbers] + offsets
    flat_rows = np.zeros((2, len(tokens), rows * width), np.int32)
    flat_rows[0, lists, at], flat_rows[1, lists, at] = flat[written], numbers + 1
    laid, segments = flat_rows.reshape(2, len(tokens), rows, width)
    return {
        "packed_tokens": laid,
        "packed_segments": segments,
        "packed_starts": layout.starts.reshape(tokens.shape[:-1]),
    }


def rows_needed(tokens: np.ndarray, views: np.ndarray | None = None) -> int:
    """R: the most rows of `width_for` tokens that any list fills, at least 1.

    tokens: int32 [n, L, K, T]; views: int32 [n, L, K], None for docids; mapped or not.
    """
    if views is None:
        views = np.broadcast_to(np.int32(0), tokens.shape[:-1])
    rows, width = 1, width_for(tokens.shape[-1])
    for start in range(0, len(tokens), _BLOCK):
        block, of_view = tokens[start : start + _BLOCK], views[start : start + _BLOCK]
        flat = block.reshape(len(block), -1, block.shape[-1])
        layout = places(flat, of_view.reshape(flat.shape[:2]), width)
        rows = max(rows, int(layout.rows.max()))
    return rows


class PackedLists:
    """Rank lists with the features of `packed`."""

    def __init__(self, lists: Source, shape: tuple[int, ...], rows: int) -> None:
        """Args:
        lists: gives batches of the lists.
        shape: (L, K, T) of their identifier_tokens.
        rows: those that `rows_needed` finds for all of them.
        """
        self._lists, self._rows, self._width = lists, rows, width_for(shape[-1])
        logger.info(
            "rank lists: identifiers in %d rows of %d tokens, %.0f%% of what they take apart",
            rows,
            self._width,
            100 * rows * self._width / np.prod(shape),
        )

    def batch(self, step: int, process_index: int = 0, process_count: int = 1) -> Features:
        """See `source.Source`."""
        lists = self._lists.batch(step, process_index, process_count)
        tokens = lists["identifier_tokens"]
        views = lists.get("identifier_views", np.zeros(tokens.shape[:-1], np.int32))
        return {**lists, **packed(tokens, views, self._rows, self._width)}
