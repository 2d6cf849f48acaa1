"""Host side of the trie: identifier rows to breadth-first arrays, by array operations only.

A node is a prefix of some row. A node below which several rows lie is *internal*; a node below
which one row lies is a *tail*, and the tree ends there: the rest of the row is kept as a run of
tokens. Nodes are numbered level by level and, within a level, in the order of the sorted rows,
so the children of a node are contiguous and tails of the same depth follow each other.

The rows are read as columns (one small contiguous array a depth).  `shared[i]`, the number of
tokens that row i shares with row i-1, is all that is known of the shape of the tree: row i opens
a node at level t where shared[i] < t, and its tail begins at depth
max(shared[i], shared[i+1]) + 1.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from dgr_jax.special_tokens import LONGEST_IDENTIFIER

MAX_LENGTH = LONGEST_IDENTIFIER
MAX_VOCABULARY = 1 << 30  # token ids, and places in a bitmap, are int32
GATHERS = (8, 64)  # children gathered for every beam, by the widest node that beams stand on
WIDEST_GATHER = 2048  # above this a node is worth a bitmap, whatever the vocabulary
_CHUNK = 1 << 18  # rows converted at a time


@dataclasses.dataclass(frozen=True)
class Layout:
    """What the compiled step knows of an index: equal layouts and shapes share one compilation.

    ends: how a row ends: 'fixed' (every row has `max_length` tokens), 'token' (a closing token
      that occurs nowhere else) or 'mixed' (the length of each row is stored).
    max_length: the longest row, rounded up to a size class unless `ends` is 'fixed'.
    gathers: children that a step gathers for each beam, ascending: the first that is enough for
      all beams; nodes of more children than the last own a bitmap.
    bitmap_words: uint32 words of a bitmap; it covers 32 * bitmap_words token ids.
    token_dtype: of the stored tokens, relative to the smallest token of their depth.
    """

    ends: str
    max_length: int
    gathers: tuple[int, ...]
    bitmap_words: int
    token_dtype: str


@dataclasses.dataclass
class Columns:
    """Rows as columns: tokens [T, U] relative to base [T], lengths uint8 [U]."""

    tokens: np.ndarray
    base: np.ndarray
    lengths: np.ndarray
    end_token: int  # -1 unless every row ends with this token, which occurs nowhere else


def size_class(n: int) -> int:
    """The smallest of 0, 1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 14, 16, 20 ... that is at least n."""
    if n <= 4:
        return n
    step = 1 << (n - 1).bit_length() - 3
    return -(-n // step) * step


def smallest_dtype(largest: int) -> np.dtype:
    """The smallest unsigned dtype that holds `largest`."""
    return np.min_scalar_type(max(int(largest), 0))


def to_columns(
    rows: np.ndarray, lengths: np.ndarray | None, eos_id: int | None, vocab_size: int
) -> Columns:
    """Checks rows [U, T] and turns them into small columns, EOS appended where it is given.

    Raises ValueError naming the first offending row.
    """
    if not 0 < vocab_size <= MAX_VOCABULARY:
        raise ValueError(f"trie.build.vocab_size must be 1 to {MAX_VOCABULARY}; got {vocab_size}")
    rows, lengths = _checked_shapes(rows, lengths, eos_id)
    if eos_id is not None:
        lengths = lengths + np.uint8(1)
    columns = int(lengths.max())
    low, high, end_token = _survey(rows, lengths, eos_id, columns, vocab_size)
    base = np.where(high < 0, 0, low).astype(np.int32)
    tokens = np.zeros((columns, len(rows)), smallest_dtype((high - base).max(initial=0)))
    for start, block, present in _blocks(rows, lengths, eos_id, columns):
        relative = block - base
        tokens[:, start : start + len(block)] = np.where(present, relative, 0).T
    return Columns(tokens, base, lengths, end_token)


def _checked_shapes(rows, lengths, eos_id):
    rows = np.asarray(rows)
    if rows.ndim != 2 or not np.issubdtype(rows.dtype, np.integer):
        raise ValueError(
            f"trie.build: rows must be integers of shape [U, T]; got {rows.dtype} of shape "
            f"{rows.shape}"
        )
    if rows.shape[0] == 0:
        raise ValueError("trie.build: no rows: an index needs at least one identifier")
    if lengths is None:
        lengths = np.full(rows.shape[0], rows.shape[1])
    lengths = np.asarray(lengths)
    if lengths.shape != rows.shape[:1]:
        raise ValueError(
            f"trie.build: lengths must have shape {rows.shape[:1]}; got {lengths.shape}"
        )
    bad = np.flatnonzero((lengths < (eos_id is None)) | (lengths > rows.shape[1]))
    if bad.size:
        raise ValueError(
            f"trie.build: row {bad[0]} has length {lengths[bad[0]]}; expected "
            f"{int(eos_id is None)} to {rows.shape[1]}"
        )
    longest = int(lengths.max()) + (eos_id is not None)
    if longest > MAX_LENGTH:
        raise ValueError(
            f"trie.build: the longest row has {longest} tokens (EOS included); expected at most "
            f"{MAX_LENGTH}"
        )
    return rows, lengths.astype(np.uint8)


def _blocks(rows, lengths, eos_id, columns):
    """Yields (first row, integer block [n, columns] with EOS in place, present [n, columns]).

    `present` is True where there is a token, or the scalar True when no row of a block is short.
    """
    depth, dtype = np.arange(columns), np.promote_types(rows.dtype, np.int32)
    for start in range(0, len(rows), _CHUNK):
        part, length = rows[start : start + _CHUNK], lengths[start : start + _CHUNK, None]
        if eos_id is None and length.min() == columns:
            yield start, part[:, :columns].astype(dtype, copy=False), True
            continue
        block = np.zeros((len(part), columns), dtype)
        width = min(columns, part.shape[1])
        block[:, :width] = part[:, :width]
        if eos_id is not None:
            block[depth == length - 1] = eos_id
        yield start, block, depth < length


def _survey(rows, lengths, eos_id, columns, vocab_size):
    """Smallest and largest token of each depth, and the closing token or -1."""
    low = np.full(columns, MAX_VOCABULARY)
    high = np.full(columns, -1)
    end_token = -1
    for start, block, present in _blocks(rows, lengths, eos_id, columns):
        low = np.minimum(low, block.min(0, where=present, initial=MAX_VOCABULARY))
        high = np.maximum(high, block.max(0, where=present, initial=-1))
        if low.min() < 0 or high.max() >= vocab_size:
            row, depth = np.argwhere(present & ((block < 0) | (block >= vocab_size)))[0]
            raise ValueError(
                f"trie.build: row {start + row} holds token {block[row, depth]} at depth {depth}; "
                f"expected 0 to {vocab_size - 1} (trie.build.vocab_size)"
            )
        last = block[np.arange(len(block)), lengths[start : start + len(block)].astype(int) - 1]
        end_token = int(last[0]) if start == 0 else end_token
        if end_token >= 0:
            count = ((block == end_token) & present).sum()
            end_token = end_token if count == len(block) == (last == end_token).sum() else -1
    return low, high, end_token


def shared_prefix(columns: Columns) -> np.ndarray:
    """uint8 [U]: the tokens that each row shares with the row before it; 0 for the first."""
    tokens, lengths = columns.tokens, columns.lengths
    shared = np.zeros(len(lengths), np.uint8)
    shortest = np.minimum(lengths[1:], lengths[:-1])
    same = np.flatnonzero((tokens[0, 1:] == tokens[0, :-1]) & (shortest > 0)).astype(np.int32)
    for depth in range(1, len(tokens) + 1):
        shared[same + 1] = depth
        if depth == len(tokens) or not same.size:
            break
        column = tokens[depth]
        same = same[(column[same] == column[same + 1]) & (shortest[same] > depth)]
    return shared


def is_sorted(columns: Columns, shared: np.ndarray) -> bool:
    """Whether no row comes after a larger one (repeated rows and prefixes first are sorted)."""
    here = np.arange(1, len(shared), dtype=np.int32)
    depth = shared[1:]
    both = (depth < columns.lengths[1:]) & (depth < columns.lengths[:-1])
    if (depth[~both] < columns.lengths[:-1][~both]).any():
        return False
    here, depth = here[both], depth[both]
    return bool((columns.tokens[depth, here - 1] < columns.tokens[depth, here]).all())


def sorting_order(columns: Columns) -> np.ndarray:
    """int64 [U]: the stable order that sorts the rows; a prefix comes before its extensions.

    The leading tokens are packed into one 64-bit key; only rows that tie there are compared on
    the next 64 bits, and so on.
    """
    keys = _sort_keys(columns)
    first = next(keys)
    order = np.argsort(first, kind="stable")
    group = _runs(first[order])
    for key in keys:
        sizes = np.bincount(group)
        ties = np.flatnonzero(sizes[group] > 1)
        if not ties.size:
            break
        members = order[ties]
        inner = np.lexsort((key[members], group[ties]))
        order[ties] = members[inner]
        new = np.zeros(len(order), bool)
        new[1:] = group[1:] != group[:-1]
        value = key[order[ties]]
        new[ties[1:]] |= value[1:] != value[:-1]
        group = np.cumsum(new)
    return order


def _runs(values):
    return np.cumsum(np.append(False, values[1:] != values[:-1]))


def _sort_keys(columns):
    """Yields uint64 [U] keys of as many whole tokens as fit in 64 bits; a missing token is 0."""
    bits = [int(column.max()).bit_length() + 1 for column in columns.tokens]
    depth = 0
    while depth < len(bits):
        key, used = np.zeros(len(columns.lengths), np.uint64), 0
        while depth < len(bits) and used + bits[depth] <= 64:
            present = columns.lengths > depth
            value = np.where(present, columns.tokens[depth].astype(np.uint64) + np.uint64(1), 0)
            key = (key << np.uint64(bits[depth])) | value.astype(np.uint64)
            used += bits[depth]
            depth += 1
        yield key


def check_prefix_free(columns: Columns, shared: np.ndarray, rows: np.ndarray | None) -> None:
    """Raises ValueError when a sorted, unique row continues the row before it.

    rows: int [U], their numbers in the input; None: as they are.
    """
    bad = np.flatnonzero(shared[1:] == columns.lengths[:-1])
    if bad.size:
        first, second = (bad[0], bad[0] + 1) if rows is None else rows[bad[0] : bad[0] + 2]
        raise ValueError(
            f"trie.build: row {first} is a proper prefix of row {second}; rows of which one "
            "continues another need a closing token: set eos_id"
        )


def tail_depths(shared: np.ndarray) -> np.ndarray:
    """uint8 [U]: the depth from which each sorted row is alone."""
    if len(shared) == 1:
        return np.zeros(1, np.uint8)
    depth = shared + np.uint8(1)
    depth[:-1] = np.maximum(depth[:-1], depth[1:])
    return depth


@dataclasses.dataclass
class Branches:
    """The branching region: edge_tokens [nodes], internal bool [nodes], first_child int32
    [internal + 1], level_start int64 [levels + 1]."""

    edge_tokens: np.ndarray
    internal: np.ndarray
    first_child: np.ndarray
    level_start: np.ndarray


def branches(columns: Columns, shared: np.ndarray, depths: np.ndarray) -> Branches:
    """Numbers the nodes level by level; the work is the sum of the tail depths."""
    tokens = [np.zeros(1, columns.tokens.dtype)]
    internal = [depths[:1] > 0]
    first_child, level_start = [], [0, 1]
    alive = np.arange(len(shared), dtype=np.int32)
    for level in range(1, int(depths.max()) + 1):
        if level > 1:
            alive = alive[depths[alive] >= level]
        starts = alive[shared[alive] < level]
        opens = shared[starts] + 1 < level if level > 1 else starts == 0
        first_child.append((level_start[-1] + np.flatnonzero(opens)).astype(np.int32))
        tokens.append(columns.tokens[level - 1][starts])
        internal.append(depths[starts] > level)
        level_start.append(level_start[-1] + len(starts))
    first_child.append(np.array([level_start[-1]], np.int32))
    return Branches(
        np.concatenate(tokens),
        np.concatenate(internal),
        np.concatenate(first_child),
        np.asarray(level_start),
    )


def rank_directory(flags: np.ndarray) -> np.ndarray:
    """uint32 [words, 2] of bool [n]: 32 flags (least bit first) and the flags set before them."""
    words = -(-len(flags) // 32)
    packed = np.zeros(words * 4, np.uint8)
    bits = np.packbits(flags, bitorder="little")
    packed[: len(bits)] = bits
    directory = np.zeros((words, 2), np.uint32)
    directory[:, 0] = packed.view("<u4")
    np.cumsum(np.bitwise_count(directory[:-1, 0]), out=directory[1:, 1])
    return directory


def tails(columns: Columns, depths: np.ndarray, order: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Flat tail tokens, and int64 [U] starts, of the rows taken in breadth-first `order`."""
    left = columns.lengths[order] - depths[order]
    starts = np.cumsum(left, dtype=np.int64) - left
    flat = np.empty(int(left.sum(dtype=np.int64)), columns.tokens.dtype)
    for part, depth, present in tail_blocks(depths[order], left):
        block = columns.tokens[depth : depth + present.shape[1]].take(order[part], axis=1).T
        values = block.ravel() if present.all() else block[present]
        flat[starts[part.start] : starts[part.start] + len(values)] = values
    return flat, starts


def tail_blocks(depths: np.ndarray, left: np.ndarray):
    """Yields (slice of breadth-first rows, their one depth, bool [n, longest] tokens present)."""
    bounds = np.searchsorted(depths, np.arange(MAX_LENGTH + 2))
    for depth in range(MAX_LENGTH + 1):
        for begin in range(bounds[depth], bounds[depth + 1], _CHUNK):
            part = slice(begin, min(begin + _CHUNK, int(bounds[depth + 1])))
            size = left[part, None]
            yield part, depth, np.arange(size.max()) < size


def bitmap_words(vocab_size: int, spans: np.ndarray) -> int:
    """Words of a bitmap that covers the widest of `spans` token ranges: a size class."""
    words = size_class(-(-int(spans.max(initial=0)) // 32))
    return min(words, -(-vocab_size // 32))


def choose_gathers(words: int) -> tuple[int, ...]:
    """GATHERS and, where there are bitmaps, one that is as wide as it pays against a bitmap."""
    fair = 1 << (2 * words - 1).bit_length()
    longest = min(WIDEST_GATHER, fair)
    return (*GATHERS, longest) if words and longest > GATHERS[-1] else GATHERS


def bitmaps(
    edge_tokens: np.ndarray, first: np.ndarray, last: np.ndarray, shift: np.ndarray, words: int
) -> np.ndarray:
    """uint32 [n, words]: the bit of (token + shift) is set for each child of the n nodes.

    Bit p of word w stands for entry p * words + w (see selection.masked_top_k).
    """
    out = np.zeros((len(first), words), np.uint32)
    step = max(1, (1 << 25) // (32 * max(words, 1)))
    for begin in range(0, len(first), step):
        part = slice(begin, begin + step)
        count = (last[part] - first[part]).astype(np.int64)
        row = np.repeat(np.arange(len(count)), count)
        child = np.arange(len(row)) - np.repeat(np.cumsum(count) - count, count)
        token = edge_tokens[first[part][row] + child].astype(np.int64) + shift[part][row]
        flags = np.zeros((len(count), 32 * words), bool)
        flags[row, token] = True
        planes = flags.reshape(len(count), 32, words).transpose(0, 2, 1)
        packed = np.packbits(planes, axis=2, bitorder="little")
        out[part] = packed.reshape(len(count), -1).view("<u4")
    return out
