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
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from dgr_jax.decoding import array_folder, trie_arrays, trie_build
from dgr_jax.decoding.trie_arrays import Arrays
from dgr_jax.decoding.trie_build import Columns, Layout
from dgr_jax.decoding.trie_expand import TrieConstraint
from dgr_jax.model_dir import kept

_FORMAT = "dgr_jax.trie"
_VERSION = 2  # of the folder: raise it when Layout, Arrays or what they mean changes


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
        columns, _ = trie_arrays.to_columns(self.arrays, self.layout)
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
        columns, depths = trie_arrays.to_columns(self.arrays, self.layout)
        columns, depths = _take(columns, keep), depths[keep]
        shared = trie_build.shared_prefix(columns)
        arrays, order = trie_arrays.assemble(columns, shared, depths, self.layout, self.vocab_size)
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

    def constraint(
        self,
        *,
        renormalise: bool = False,
        shardings: Callable[[Mapping[str, np.ndarray]], Mapping[str, Any]] | None = None,
    ) -> TrieConstraint:
        """The arrays on the default device, as a Constraint for beam_search.

        renormalise: log-probabilities over the legal tokens only, not the whole vocabulary.
        shardings: padded arrays by name -> where each of them goes instead of that device.
        """
        arrays = self.padded()
        places = shardings(dict(arrays.items())) if shardings else {}
        return TrieConstraint.put(arrays, self.layout, self.vocab_size, renormalise, places)

    def padded(self) -> Arrays:
        """The arrays at their capacity, as they go to the device."""
        return trie_arrays.padded(self.arrays, self.capacity)

    def save(self, folder: str | pathlib.Path) -> None:
        """Writes header.json and one .npy file an array; the header goes last."""
        stored = dict(self.arrays.items()) | {
            name: getattr(self, name)
            for name in ("row_ids", "offsets", "passages", "passage_mask")
            if getattr(self, name) is not None
        }
        settings = {
            "layout": dataclasses.asdict(self.layout),
            "vocab_size": self.vocab_size,
            "capacity": self.capacity,
        }
        array_folder.save(folder, stored, kind=_FORMAT, version=_VERSION, settings=settings)


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
    layout = trie_arrays.choose_layout(columns, vocab_size)
    depths = trie_build.tail_depths(shared)
    arrays, bfs = trie_arrays.assemble(columns, shared, depths, layout, vocab_size)
    offsets, passages = _passage_map(passages, order, keep, np.shape(rows)[0])
    return Trie(
        arrays,
        layout,
        vocab_size,
        trie_arrays.capacities(arrays, layout),
        bfs,
        offsets,
        passages,
    )


def load(folder: str | pathlib.Path) -> Trie:
    """Opens a saved index, arrays memory-mapped; refuses foreign, newer and damaged files."""
    needed = {"layout": _names(Layout), "capacity": _names(Arrays), "sha256": _names(Arrays)}
    stored, header = array_folder.load(folder, kind=_FORMAT, version=_VERSION, needed=needed)
    with kept.reading(pathlib.Path(folder) / "header.json"):
        return Trie(
            Arrays(**{name: stored.pop(name) for name in _names(Arrays)}),
            Layout(**header["layout"] | {"gathers": tuple(header["layout"]["gathers"])}),
            header["vocab_size"],
            {name: tuple(shape) for name, shape in header["capacity"].items()},
            **stored,
        )


def _names(of: type) -> list[str]:
    return [field.name for field in dataclasses.fields(of)]


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
    origin = order
    if keep is not None:
        origin = np.flatnonzero(keep) if order is None else order[keep]
    trie_build.check_prefix_free(columns, shared, origin)
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
