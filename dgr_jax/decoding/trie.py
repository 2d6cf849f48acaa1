"""A trie of identifiers: built from rows, saved, restricted, and put on a device.

    index = trie.build(rows, lengths)            # arrays on the host
    index.save(folder); index = trie.load(folder)
    constraint = index.constraint()              # arrays on the device, for beam_search
    result = beam_search(step_fn, constraint, cache, ...)
    index.table_rows(result.rows)                # rows of the sorted identifier table

Bytes an identifier, for U random rows: about 1.25 nodes of the branching region (a token, two
bits of rank directory), a quarter of an internal node (4 bytes), and the tokens of its tail.
See trie_build for the numbering and trie_expand for the step.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import pathlib
from typing import TYPE_CHECKING

import numpy as np

from dgr_jax.decoding import trie_build
from dgr_jax.decoding.trie_build import Columns, Layout, size_class

if TYPE_CHECKING:
    from dgr_jax.decoding.trie_expand import TrieConstraint

_FORMAT = "dgr_jax.trie"
_VERSION = 1
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
    """What the device holds, unpadded.  Axis letters: n nodes, i internal nodes, U rows, L depths.

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


@dataclasses.dataclass(frozen=True)
class Trie:
    """An index of identifiers on the host.

    arrays, layout: see Arrays and trie_build.Layout.
    capacity: shape that each array is padded to on the device (a size class; kept by restrict).
    row_ids int32 [U]: breadth-first row -> row of the sorted, unique identifier table.
    offsets int64 [.+1] | None, passages int32 | None: passages of table row u are
      passages[offsets[u]:offsets[u+1]]; None: one each / the row itself.
    passage_mask bool [P] | None: passages that `restrict` left.
    """

    arrays: Arrays
    layout: Layout
    vocab_size: int
    capacity: dict[str, tuple[int, ...]]
    row_ids: np.ndarray
    offsets: np.ndarray | None = None
    passages: np.ndarray | None = None
    passage_mask: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.row_ids)

    @property
    def nbytes(self) -> int:
        """Bytes of the index proper: what decoding needs, before padding to size classes."""
        return sum(array.nbytes for _, array in self.arrays.items())

    @property
    def num_nodes(self) -> int:
        return len(self.arrays.edge_tokens)

    def table_rows(self, rows: np.ndarray) -> np.ndarray:
        """Rows of a BeamResult -> rows of the sorted identifier table; -1 stays -1."""
        rows = np.asarray(rows)
        return np.where(rows < 0, -1, self.row_ids[np.maximum(rows, 0)])

    def passages_of(self, row: int) -> np.ndarray:
        """int32 [.]: the passages of one row of a BeamResult, restricted ones left out."""
        if row < 0:
            return np.zeros(0, np.int32)
        table_row = int(self.row_ids[row])
        part = slice(table_row, table_row + 1)
        if self.offsets is not None:
            part = slice(self.offsets[table_row], self.offsets[table_row + 1])
        found = np.arange(part.start, part.stop, dtype=np.int32)
        if self.passages is not None:
            found = np.asarray(self.passages[part])
        return found if self.passage_mask is None else found[self.passage_mask[found]]

    def rows(self) -> tuple[np.ndarray, np.ndarray]:
        """The sorted rows again: int32 [U, T] padded with 0, and lengths int32 [U]."""
        columns, _ = _to_columns(self)
        present = np.arange(len(columns.tokens)) < columns.lengths[:, None]
        tokens = columns.tokens.T.astype(np.int32) + columns.base
        return np.where(present, tokens, 0), columns.lengths.astype(np.int32)

    def restrict(self, passage_mask: np.ndarray) -> Trie:
        """The trie of the rows that have an allowed passage, in arrays of the same padded shapes.

        Tails begin where they began before, even where a row is now alone from an earlier depth:
        so no array can grow, and the shapes of the whole index always do.

        passage_mask: bool [P], True for the passages that may be returned.
        """
        mask = np.asarray(passage_mask)
        expected = self.num_passages
        if mask.dtype != np.bool_ or mask.ndim != 1 or len(mask) < expected:
            raise ValueError(
                f"Trie.restrict: passage_mask must be bool of shape [{expected}]; got "
                f"{mask.dtype} of shape {mask.shape}"
            )
        if self.passage_mask is not None:
            mask = mask[: len(self.passage_mask)] & self.passage_mask
        table_rows = np.sort(self.row_ids)
        keep = np.flatnonzero(self._allowed_rows(mask)[table_rows])
        if not keep.size:
            raise ValueError("Trie.restrict: passage_mask leaves no identifier; expected one True")
        columns, depths = _to_columns(self)
        columns, depths = _take(columns, keep), depths[keep]
        shared = trie_build.shared_prefix(columns)
        arrays, order = _assemble(columns, shared, depths, self.layout, self.vocab_size)
        return dataclasses.replace(
            self, arrays=arrays, row_ids=table_rows[keep][order], passage_mask=mask
        )

    @property
    def num_passages(self) -> int:
        """Passages that a mask for `restrict` must cover."""
        if self.passage_mask is not None:
            return len(self.passage_mask)
        if self.passages is not None:
            return int(self.passages.max()) + 1
        return int(self.offsets[-1] if self.offsets is not None else self.row_ids.max() + 1)

    def _allowed_rows(self, mask: np.ndarray) -> np.ndarray:
        allowed = mask if self.passages is None else mask[self.passages]
        if self.offsets is None:
            return allowed
        before = np.append(0, np.cumsum(allowed))
        return before[self.offsets[1:]] > before[self.offsets[:-1]]

    def constraint(self, *, renormalise: bool = False) -> TrieConstraint:
        """The arrays on the default device, as a Constraint for beam_search.

        renormalise: log-probabilities over the legal tokens only, not the whole vocabulary.
        """
        from dgr_jax.decoding.trie_expand import TrieConstraint

        return TrieConstraint.put(self.padded(), self.layout, self.vocab_size, renormalise)

    def padded(self) -> Arrays:
        """The arrays at their capacity; padding repeats the sentinel or is 0 and never read."""
        fill = {"first_child": self.num_nodes, "wide": _BIG}
        return Arrays(
            **{
                name: _pad(array, self.capacity[name], fill.get(name, 0))
                for name, array in self.arrays.items()
            }
        )

    def save(self, folder: str | pathlib.Path) -> None:
        """Writes header.json and one .npy file an array; the header goes last."""
        folder = pathlib.Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "header.json").unlink(missing_ok=True)
        stored = dict(self.arrays.items()) | {
            name: getattr(self, name)
            for name in ("row_ids", "offsets", "passages", "passage_mask")
            if getattr(self, name) is not None
        }
        digests = {}
        for name, array in stored.items():
            np.save(folder / f"{name}.npy", np.ascontiguousarray(array).reshape(array.shape))
            digests[name] = _digest(folder / f"{name}.npy")
        header = {
            "format": _FORMAT,
            "version": _VERSION,
            "layout": dataclasses.asdict(self.layout),
            "vocab_size": self.vocab_size,
            "capacity": self.capacity,
            "sha256": digests,
        }
        (folder / "header.json").write_text(json.dumps(header, indent=1))


def build(
    rows: np.ndarray,
    lengths: np.ndarray | None = None,
    *,
    passages: np.ndarray | tuple[np.ndarray, np.ndarray] | None = None,
    eos_id: int | None = None,
    vocab_size: int,
) -> Trie:
    """Builds the index of a set of identifiers.

    rows: int [U, T], in any order, repeated rows allowed; T at most 64 tokens.
    lengths: int [U]; None: every row has T tokens.
    passages: the passage index of each row, int [U], or several a row as (offsets [U+1],
      passages); None: passage i is row i.
    eos_id: appended to every row, so that a row may be a prefix of another.  Leave it out when
      the rows already end so, or all have the same length.
    vocab_size: tokens that the model scores, at most 2^17.

    Raises ValueError for bad shapes, tokens outside of the vocabulary, empty rows, and rows that
    are proper prefixes of others.
    """
    columns = trie_build.to_columns(rows, lengths, eos_id, vocab_size)
    columns, shared, order, keep = _sorted_unique(columns)
    layout = _choose_layout(columns, vocab_size)
    depths = trie_build.tail_depths(shared)
    arrays, bfs = _assemble(columns, shared, depths, layout, vocab_size)
    offsets, passages = _passage_map(passages, order, keep, np.shape(rows)[0])
    return Trie(
        arrays,
        layout,
        vocab_size,
        _capacity(arrays, layout),
        bfs.astype(np.int32),
        offsets,
        passages,
    )


def _capacity(arrays: Arrays, layout: Layout) -> dict[str, tuple[int, ...]]:
    """Padded shapes: arrays that grow with the rows take a size class, the others their own."""
    unused = {
        "tail_start": layout.ends == "fixed",
        "row_length": layout.ends != "mixed",
        "wide": layout.bitmap_words == 0,
        "bitmaps": layout.bitmap_words == 0,
    }
    capacity = {name: array.shape for name, array in arrays.items()}
    for name, least in _SIZED.items():
        if not unused.get(name, False):
            length, *rest = capacity[name]
            capacity[name] = (size_class(max(length, least)), *rest)
    return capacity


def load(folder: str | pathlib.Path) -> Trie:
    """Opens a saved index, arrays memory-mapped; refuses foreign, newer and damaged files."""
    folder = pathlib.Path(folder)
    header = _read_header(folder / "header.json")
    stored = {}
    for name, digest in header["sha256"].items():
        path = folder / f"{name}.npy"
        if not path.exists() or _digest(path) != digest:
            state = "differs from its sha256 in header.json" if path.exists() else "is missing"
            raise ValueError(f"{path} {state}: the index is damaged; build it again")
        stored[name] = np.load(path, mmap_mode="r" if path.stat().st_size > 4096 else None)
    fields = [field.name for field in dataclasses.fields(Arrays)]
    return Trie(
        Arrays(**{name: stored.pop(name) for name in fields}),
        Layout(**header["layout"] | {"gathers": tuple(header["layout"]["gathers"])}),
        header["vocab_size"],
        {name: tuple(shape) for name, shape in header["capacity"].items()},
        **stored,
    )


def _read_header(path: pathlib.Path) -> dict:
    try:
        header = json.loads(path.read_text())
        found = (header["format"], header["version"])
    except FileNotFoundError:
        raise ValueError(f"{path} is missing: not a folder written by Trie.save") from None
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"{path} is not a trie header; expected JSON with format") from None
    if found != (_FORMAT, _VERSION):
        raise ValueError(
            f"{path}: got {found[0]!r} version {found[1]}; expected {_FORMAT!r} version {_VERSION}"
        )
    return header


def _digest(path: pathlib.Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sorted_unique(columns: Columns):
    """(columns sorted and without repeats, shared [U], sorting order | None, kept bool | None)."""
    shared = trie_build.shared_prefix(columns)
    order = None
    if not trie_build.is_sorted(columns, shared):
        order = trie_build.sorting_order(columns)
        columns = _take(columns, order)
        shared = trie_build.shared_prefix(columns)
    lengths = columns.lengths
    repeated = (shared[1:] == lengths[1:]) & (lengths[1:] == lengths[:-1])
    keep = None
    if repeated.any():
        keep = np.append(True, ~repeated)
        columns, shared = _take(columns, keep), shared[keep]
    origin = order if order is not None else np.arange(len(lengths))
    trie_build.check_prefix_free(columns, shared, origin if keep is None else origin[keep])
    return columns, shared, order, keep


def _take(columns: Columns, index: np.ndarray) -> Columns:
    tokens = np.stack([column[index] for column in columns.tokens])
    return dataclasses.replace(columns, tokens=tokens, lengths=columns.lengths[index])


def _passage_map(passages, order, keep, count):
    """Passages by sorted, unique row: (offsets or None, passages or None)."""
    sizes = None
    if isinstance(passages, tuple):
        starts, passages = (np.asarray(part) for part in passages)
        if len(starts) != count + 1 or starts[-1] != len(passages):
            raise ValueError(
                f"trie.build: passages as (offsets, passages) need {count + 1} offsets, the last "
                f"equal to {len(passages)}; got {len(starts)}, the last {starts[-1]}"
            )
        sizes = np.diff(starts)
        if order is not None:
            ids = np.repeat(np.arange(count)[np.argsort(order)], sizes)
            passages, sizes = passages[np.argsort(ids, kind="stable")], sizes[order]
    elif passages is not None:
        passages = np.asarray(passages)
        if passages.shape != (count,):
            raise ValueError(
                f"trie.build: passages must have shape ({count},), one a row; got {passages.shape}"
            )
        passages = passages if order is None else passages[order]
    elif order is not None:
        passages = order
    if keep is not None or sizes is not None:
        sizes = np.ones(count, np.int64) if sizes is None else sizes
        before = np.append(0, np.cumsum(sizes))
        sizes = before[np.append(np.flatnonzero(keep), count)] if keep is not None else before
    return sizes, None if passages is None else passages.astype(np.int32)


def _choose_layout(columns: Columns, vocab_size: int) -> Layout:
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


def _assemble(columns: Columns, shared, depths, layout: Layout, vocab_size: int):
    """(Arrays of sorted, unique rows, breadth-first order of the rows int64 [U])."""
    branches = trie_build.branches(columns, shared, depths)
    order = np.argsort(depths, kind="stable")
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


def _wide_nodes(branches, layout, shift):
    """Ids of the internal nodes that no gather covers, and their bitmaps."""
    first, last = branches.first_child[:-1], branches.first_child[1:]
    wide = np.flatnonzero(last - first > layout.gathers[-1]).astype(np.int32)
    level = np.searchsorted(branches.level_start, first[wide], side="right") - 2
    bits = trie_build.bitmaps(
        branches.edge_tokens, first[wide], last[wide], shift[level], layout.bitmap_words
    )
    return wide, bits


def _to_columns(trie: Trie) -> tuple[Columns, np.ndarray]:
    """The sorted rows of a trie as columns, and the depths uint8 [U] of their tails."""
    arrays = trie.arrays
    words = np.ascontiguousarray(arrays.directory[:, 0])
    internal = np.unpackbits(words.view(np.uint8), bitorder="little")[: trie.num_nodes] > 0
    levels = arrays.level_start[arrays.level_start < _BIG]
    is_tail = np.flatnonzero(~internal)
    depths = np.searchsorted(levels, is_tail, side="right") - 1
    left = _tail_sizes(trie, depths)
    tokens = np.zeros((int((depths + left).max()), len(trie)), arrays.tails.dtype)
    rows = _fill_branches(tokens, arrays, levels, internal)[is_tail]
    starts = np.cumsum(left) - left
    for part, depth, present in trie_build.tail_blocks(depths, left):
        block = np.zeros(present.shape, tokens.dtype)
        block[present] = arrays.tails[starts[part.start] : starts[part.start] + present.sum()]
        tokens[depth : depth + block.shape[1], rows[part]] = block.T
    lengths, tail_depths = np.empty((2, len(trie)), np.uint8)
    lengths[rows], tail_depths[rows] = depths + left, depths
    end = int(arrays.ends_at) if trie.layout.ends == "token" else -1
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


def _tail_sizes(trie, depths):
    """int64 [U]: tokens of each tail, rows in breadth-first order."""
    if trie.layout.ends == "fixed":
        return trie.layout.max_length - depths.astype(np.int64)
    starts = trie.arrays.tail_start.astype(np.int64) + depths
    return np.diff(np.append(starts, len(trie.arrays.tails)))


def _pad(array, shape, fill):
    if array.shape == shape:
        return array
    widths = [(0, target - size) for size, target in zip(array.shape, shape, strict=True)]
    return np.pad(array, widths, constant_values=fill)
