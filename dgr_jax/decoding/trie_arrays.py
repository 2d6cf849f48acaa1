"""The arrays of a trie: assembled from sorted rows, padded for a device, and read back as rows."""

from __future__ import annotations

import dataclasses

import numpy as np

from dgr_jax.decoding import trie_build
from dgr_jax.decoding.trie_build import Branches, Columns, Layout, size_class

_SIZED = {  # arrays whose length depends on the rows, and the smallest length on the device
    "edge_tokens": 1024,
    "directory": 32,
    "first_child": 1024,
    "tails": 1024,
    "tail_start": 1024,
    "row_length": 1024,
    "wide": 64,
    "bitmaps": 64,
}
_BIG = np.iinfo(np.int32).max


@dataclasses.dataclass(frozen=True)
class Arrays:
    """What the device holds, unpadded. Axis letters: n nodes, i internal nodes, U rows, L depths.

    edge_tokens uint8/16/32 [n]: token by which a node is reached, less the base of its depth.
    directory uint32 [ceil(n/32), 2]: 32 is-internal bits, and the internal nodes before them.
    first_child int32 [i+1]: first child of each internal node; the next one bounds its children.
    tails uint8/16/32 [...]: the rows' remaining tokens, rows in breadth-first order.
    tail_start int32 [U]: token t of row r is tails[tail_start[r] + t]; empty for fixed lengths.
    row_length uint8 [U]: only when rows end without a closing token at different lengths.
    wide int32 [w]: internal ids, ascending, of nodes that own a bitmap; bitmaps uint32 [w, words].
    base, bitmap_low int32 [L]: token id that stored token 0 / bitmap bit 0 stands for.
    level_start int32 [L+2]: first node of each level.
    tail_bias int32 [L+1]: fixed lengths T: token t of row r of tail depth d is
      tails[tail_bias[d] + r * (T - d) + t].
    ends_at int32 []: the closing token ('token') or the length of the rows ('fixed').
    """

    edge_tokens: np.ndarray
    directory: np.ndarray
    first_child: np.ndarray
    tails: np.ndarray
    tail_start: np.ndarray
    row_length: np.ndarray
    wide: np.ndarray
    bitmaps: np.ndarray
    base: np.ndarray
    bitmap_low: np.ndarray
    level_start: np.ndarray
    tail_bias: np.ndarray
    ends_at: np.ndarray

    def items(self) -> list[tuple[str, np.ndarray]]:
        return [(field.name, getattr(self, field.name)) for field in dataclasses.fields(self)]


def capacities(arrays: Arrays, layout: Layout, room: float = 1.0) -> dict[str, tuple[int, ...]]:
    """Padded shapes: arrays that grow with the rows take a size class, the others their own.

    room: how many times as long the arrays may grow within their shapes.
    """
    unused = {
        "tail_start": layout.ends == "fixed",
        "row_length": layout.ends != "mixed",
        "wide": layout.bitmap_words == 0,
        "bitmaps": layout.bitmap_words == 0,
    }
    shapes = {name: array.shape for name, array in arrays.items()}
    for name, least in _SIZED.items():
        if not unused.get(name, False):
            length, *rest = shapes[name]
            shapes[name] = (size_class(max(int(room * length), least)), *rest)
    return shapes


def is_within(layout: Layout, other: Layout) -> bool:
    """Whether rows of a layout can be kept in another one."""
    longest = layout.max_length, other.max_length
    return (
        layout.ends == other.ends
        and (longest[0] == longest[1] if layout.ends == "fixed" else longest[0] <= longest[1])
        and layout.bitmap_words <= other.bitmap_words
        and np.dtype(layout.token_dtype).itemsize <= np.dtype(other.token_dtype).itemsize
    )


def choose_layout(columns: Columns, vocab_size: int) -> Layout:
    """The static description of the index of these rows."""
    longest = len(columns.tokens)
    same = bool((columns.lengths == longest).all())
    ends = "fixed" if same else "token" if columns.end_token >= 0 else "mixed"
    spans = columns.tokens.max(1).astype(np.int64) + 1
    words = trie_build.bitmap_words(vocab_size, spans[spans > trie_build.GATHERS[-1]])
    return Layout(
        ends=ends,
        max_length=longest if same else size_class(longest),
        gathers=trie_build.choose_gathers(words),
        bitmap_words=words,
        token_dtype=columns.tokens.dtype.name,
    )


def assemble(
    columns: Columns, shared: np.ndarray, depths: np.ndarray, layout: Layout, vocab_size: int
) -> tuple[Arrays, np.ndarray]:
    """Arrays of sorted, unique rows, and the breadth-first order of the rows, int32 [U].

    shared, depths: uint8 [U], see trie_build.shared_prefix and tail_depths.
    """
    branches = trie_build.branches(columns, shared, depths)
    order = np.argsort(depths, kind="stable").astype(np.int32)
    tails, starts = trie_build.tails(columns, depths, order)
    if max(len(tails), len(branches.edge_tokens)) > _BIG:
        raise ValueError(
            f"trie.build: {len(tails)} tail tokens and {len(branches.edge_tokens)} nodes; "
            f"expected at most {_BIG} of each: split the identifiers into several indexes"
        )
    longest, fixed = layout.max_length, layout.ends == "fixed"
    base = _pad(columns.base, (longest + 1,), 0)
    low = np.clip(base, 0, max(0, vocab_size - 32 * layout.bitmap_words)).astype(np.int32)
    wide, bitmaps = _wide_nodes(branches, layout, base - low)
    depth_rows = np.searchsorted(depths[order], np.arange(longest + 1))
    first_token = np.append(starts, len(tails))[depth_rows]
    depth = np.arange(longest + 1)
    ends_at = longest if fixed else columns.end_token
    arrays = Arrays(
        edge_tokens=branches.edge_tokens,
        directory=trie_build.rank_directory(branches.internal),
        first_child=branches.first_child,
        tails=tails,
        tail_start=np.zeros(0, np.int32) if fixed else (starts - depths[order]).astype(np.int32),
        row_length=columns.lengths[order] if layout.ends == "mixed" else np.zeros(0, np.uint8),
        wide=wide,
        bitmaps=bitmaps,
        base=base,
        bitmap_low=low,
        level_start=_pad(branches.level_start.astype(np.int32), (longest + 2,), _BIG),
        tail_bias=(first_token - depth_rows * (longest - depth) - depth).astype(np.int32),
        ends_at=np.array(ends_at, np.int32),
    )
    return arrays, order


def _wide_nodes(branches: Branches, layout: Layout, shift: np.ndarray):
    """Ids of the internal nodes that no gather covers, and their bitmaps."""
    first, last = branches.first_child[:-1], branches.first_child[1:]
    wide = np.flatnonzero(last - first > layout.gathers[-1]).astype(np.int32)
    level = np.searchsorted(branches.level_start, first[wide], side="right") - 2
    bits = trie_build.bitmaps(
        branches.edge_tokens, first[wide], last[wide], shift[level], layout.bitmap_words
    )
    return wide, bits


def to_columns(arrays: Arrays, layout: Layout) -> tuple[Columns, np.ndarray]:
    """The sorted rows of an index as columns, and the depths uint8 [U] of their tails."""
    words = np.ascontiguousarray(arrays.directory[:, 0])
    internal = np.unpackbits(words.view(np.uint8), bitorder="little")
    internal = internal[: len(arrays.edge_tokens)] > 0
    levels = arrays.level_start[arrays.level_start < _BIG]
    is_tail = np.flatnonzero(~internal)
    depths = np.searchsorted(levels, is_tail, side="right") - 1
    left = _tail_sizes(arrays, layout, depths)
    tokens = np.zeros((int((depths + left).max()), len(left)), arrays.tails.dtype)
    rows = _fill_branches(tokens, arrays, levels, internal)[is_tail]
    starts = np.cumsum(left) - left
    for part, depth, present in trie_build.tail_blocks(depths, left):
        block = np.zeros(present.shape, tokens.dtype)
        block[present] = arrays.tails[starts[part.start] : starts[part.start] + present.sum()]
        tokens[depth : depth + block.shape[1], rows[part]] = block.T
    lengths, tail_depths = np.empty((2, len(left)), np.uint8)
    lengths[rows], tail_depths[rows] = depths + left, depths
    end = int(arrays.ends_at) if layout.ends == "token" else -1
    return Columns(tokens, arrays.base[: len(tokens)], lengths, end), tail_depths


def _fill_branches(tokens, arrays, levels, internal):
    """Writes the tokens of the branching region; int32 [n]: first sorted row of each node."""
    first_child = arrays.first_child
    bounds = np.append(0, np.cumsum(internal))[levels]  # internal nodes before each level
    count = np.ones(len(internal), np.int32)  # rows below each node
    for level in range(len(levels) - 3, -1, -1):
        nodes, below = _level(levels, level), _level(levels, level + 1)
        heads = first_child[bounds[level] : bounds[level + 1]] - below.start
        count[nodes][internal[nodes]] = np.add.reduceat(count[below], heads)
    start = np.zeros(len(internal), np.int32)
    for level in range(len(levels) - 2):
        nodes, below = _level(levels, level), _level(levels, level + 1)
        heads = first_child[bounds[level] : bounds[level + 1] + 1] - below.start
        before = np.cumsum(count[below]) - count[below]
        parents = start[nodes][internal[nodes]]
        start[below] = before + np.repeat(parents - before[heads[:-1]], np.diff(heads))
        here = np.repeat(start[below] - before, count[below])
        here += np.arange(len(here), dtype=here.dtype)
        tokens[level, here] = np.repeat(arrays.edge_tokens[below], count[below])
    return start


def _level(levels, level):
    return slice(int(levels[level]), int(levels[level + 1]))


def _tail_sizes(arrays, layout, depths):
    """int64 [U]: tokens of each tail, rows in breadth-first order."""
    if layout.ends == "fixed":
        return layout.max_length - depths.astype(np.int64)
    starts = arrays.tail_start.astype(np.int64) + depths
    return np.diff(np.append(starts, len(arrays.tails)))


def padded(arrays: Arrays, shapes: dict[str, tuple[int, ...]]) -> Arrays:
    """The arrays at these shapes; padding repeats the sentinel or is 0 and never read."""
    fill = {"first_child": len(arrays.edge_tokens), "wide": _BIG}
    return Arrays(
        **{name: _pad(array, shapes[name], fill.get(name, 0)) for name, array in arrays.items()}
    )


def _pad(array, shape, fill):
    if array.shape == shape:
        return array
    widths = [(0, target - size) for size, target in zip(array.shape, shape, strict=True)]
    return np.pad(array, widths, constant_values=fill)
