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
    """

    arrays: Arrays
    layout: Layout
    vocab_size: int
    capacity: dict[str, tuple[int, ...]]
    row_ids: np.ndarray

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

    def rows(self) -> tuple[np.ndarray, np.ndarray]:
        """The sorted rows again: int32 [U, T] padded with 0, and lengths int32 [U]."""
        columns, _ = trie_arrays.to_columns(self.arrays, self.layout)
        present = np.arange(len(columns.tokens)) < columns.lengths[:, None]
        tokens = columns.tokens.T.astype(np.int32) + columns.base
        return np.where(present, tokens, 0), columns.lengths.astype(np.int32)

    def restrict(self, row_mask: np.ndarray) -> Trie:
        """The trie of some rows, in arrays of the same padded shapes.

        Tails begin where they began before, even where a row is now alone from an earlier depth:
        so no array can grow, and the shapes of the whole index always do.

        row_mask: bool [.], True for the rows of the sorted identifier table that may be written.
        """
        mask, expected = np.asarray(row_mask), int(self.row_ids.max()) + 1
        if mask.dtype != np.bool_ or mask.ndim != 1 or len(mask) < expected:
            raise ValueError(
                f"Trie.restrict: row_mask must be bool of shape [{expected}]; got "
                f"{mask.dtype} of shape {mask.shape}"
            )
        table_rows = np.sort(self.row_ids)
        keep = np.flatnonzero(mask[table_rows])
        if not keep.size:
            raise ValueError("Trie.restrict: the mask leaves no identifier; expected one True")
        columns, depths = trie_arrays.to_columns(self.arrays, self.layout)
        columns, depths = _take(columns, keep), depths[keep]
        shared = trie_build.shared_prefix(columns)
        arrays, order = trie_arrays.assemble(columns, shared, depths, self.layout, self.vocab_size)
        return dataclasses.replace(self, arrays=arrays, row_ids=table_rows[keep][order])

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
        stored = dict(self.arrays.items()) | {"row_ids": self.row_ids}
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
    eos_id: int | None = None,
    vocab_size: int,
    like: Trie | None = None,
) -> Trie:
    """Builds the index of a set of identifiers.

    rows: int [U, T], in any order, repeated rows allowed; T at most 64 tokens.
    lengths: int [U]; None: every row has T tokens.
    eos_id: appended to every row, so that a row may be a prefix of another. Leave it out when
      the rows already end so, or all have the same length.
    vocab_size: tokens that the model scores, at most 2^30.
    like: an index whose shapes this one has, as long as all fit, so that nothing is compiled again;
      where they do not, there is room for a quarter more.

    Raises ValueError for bad shapes, tokens outside of the vocabulary, empty rows, and rows that
    are proper prefixes of others.
    """
    columns = trie_build.to_columns(rows, lengths, eos_id, vocab_size)
    columns, shared = _sorted_unique(columns)
    layout = trie_arrays.choose_layout(columns, vocab_size)
    if like is not None and trie_arrays.is_within(layout, like.layout):
        layout = like.layout
        columns.tokens = columns.tokens.astype(layout.token_dtype, copy=False)
    depths = trie_build.tail_depths(shared)
    arrays, bfs = trie_arrays.assemble(columns, shared, depths, layout, vocab_size)
    capacity = trie_arrays.capacities(arrays, layout)
    if like is not None:
        fits = layout == like.layout and all(
            shape[:1] <= like.capacity[name][:1] for name, shape in capacity.items()
        )
        capacity = like.capacity if fits else trie_arrays.capacities(arrays, layout, room=1.25)
    return Trie(arrays, layout, vocab_size, capacity, bfs)


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


def _sorted_unique(columns: Columns) -> tuple[Columns, np.ndarray]:
    """Columns sorted and without repeats, and what each row shares with the one before, [U]."""
    shared, origin = trie_build.shared_prefix(columns), None
    if not trie_build.is_sorted(columns, shared):
        origin = trie_build.sorting_order(columns)
        columns = _take(columns, origin)
        shared = trie_build.shared_prefix(columns)
    lengths = columns.lengths
    repeated = (shared[1:] == lengths[1:]) & (lengths[1:] == lengths[:-1])
    if repeated.any():
        keep = np.flatnonzero(np.append(True, ~repeated))
        columns, shared = _take(columns, keep), shared[keep]
        origin = keep if origin is None else origin[keep]
    trie_build.check_prefix_free(columns, shared, origin)
    return columns, shared


def _take(columns: Columns, index: np.ndarray) -> Columns:
    tokens = np.stack([column[index] for column in columns.tokens])
    return dataclasses.replace(columns, tokens=tokens, lengths=columns.lengths[index])
