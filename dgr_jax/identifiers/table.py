"""Which token sequences name which passages: sorted unique rows, and the passages of each row."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from dgr_jax.model_dir import kept
from dgr_jax.special_tokens import EOS_ID, PAD_ID

_FORMAT = "dgr_jax identifier table"
_VERSION = 1
_HEADER = "identifiers.json"
_DTYPES = {"tokens": "int32", "lengths": "int32", "offsets": "int64", "passages": "int32"}
_RANKS = {"tokens": 2, "lengths": 1, "offsets": 1, "passages": 1}
_CHUNK = 1 << 20


@dataclass(frozen=True, eq=False)
class IdentifierTable:
    """Identifiers of a corpus of P passages.

    tokens: int32 [U, T], unique rows in lexicographic order, right-padded with 0; no row is a
        prefix of another.
    lengths: int32 [U], tokens before the padding.
    offsets: int64 [U+1] and passages: int32 [offsets[U]]: the passages of row u are
        passages[offsets[u]:offsets[u+1]], ascending.
    view: what the identifiers are made of (title, string, atomic, semantic, rq, ...).
    num_code_tokens: code tokens the scheme needs after the text vocabulary; 0 for text views.
    num_passages: P, also counting passages without an identifier.
    counts: what the scheme met while it made the rows, a part of the report; not saved.
    """

    tokens: np.ndarray
    lengths: np.ndarray
    offsets: np.ndarray
    passages: np.ndarray
    view: str
    num_code_tokens: int
    num_passages: int
    counts: Mapping[str, int] = field(default_factory=dict)

    def __len__(self) -> int:
        """U, the number of identifiers."""
        return len(self.tokens)

    @classmethod
    def from_rows(
        cls,
        rows: np.ndarray,
        *,
        view: str,
        num_code_tokens: int = 0,
        passages: np.ndarray | None = None,
        num_passages: int | None = None,
        counts: Mapping[str, int] | None = None,
    ) -> IdentifierTable:
        """Sorts, joins equal rows and checks that no row is a prefix of another.

        rows: int [N, T], right-padded with 0. passages: int [N], the passage index of each row;
        left out, row i belongs to passage i. Equal (row, passage) pairs count once.

        Raises ValueError when there are no rows, a row is empty, holds a negative token or a token
        after padding, a passage index is outside 0..P-1, or a row is a prefix of another.
        """
        rows = _checked_rows(rows)
        owners = _checked_owners(passages, len(rows))
        if num_passages is None:
            num_passages = int(owners.max()) + 1
        if owners.min() < 0 or owners.max() >= num_passages:
            bad = int(owners.min() if owners.min() < 0 else owners.max())
            raise ValueError(f"passage index {bad} is outside 0..{num_passages - 1}")
        order, starts_row = sort_rows(rows, None if passages is None else owners)
        owners = owners[order]
        keep = starts_row.copy()
        keep[1:] |= owners[1:] != owners[:-1]
        if not keep.all():
            owners, starts_row = owners[keep], starts_row[keep]
            order = order[keep]
        first = np.flatnonzero(starts_row)
        tokens = rows[order[first]]
        table = cls(
            tokens=tokens,
            lengths=_lengths(tokens),
            offsets=np.append(first, len(owners)).astype(np.int64),
            passages=owners.astype(np.int32),
            view=view,
            num_code_tokens=int(num_code_tokens),
            num_passages=int(num_passages),
            counts=counts or {},
        )
        table._check_prefix_free()
        return table

    def _check_prefix_free(self) -> None:
        """In sorted order, a row that is a prefix of any other is a prefix of the row after it."""
        for low in range(0, len(self) - 1, _CHUNK):
            here, after = self.tokens[low : low + _CHUNK], self.tokens[low + 1 : low + 1 + _CHUNK]
            here = here[: len(after)]
            bad = np.flatnonzero((here != after).argmax(axis=1) >= self.lengths[low:][: len(here)])
            if len(bad):
                row = low + int(bad[0])
                raise ValueError(
                    f"identifier {self._readable(row)} of passage {self.passages_of(row)[0]} is a "
                    f"prefix of identifier {self._readable(row + 1)} of passage "
                    f"{self.passages_of(row + 1)[0]}; end rows of different lengths with "
                    f"{EOS_ID} (end of sequence)"
                )

    def _readable(self, row: int) -> list[int]:
        return self.tokens[row, : self.lengths[row]].tolist()

    def passages_of(self, row: int) -> np.ndarray:
        """The passage indices of one row, int32, ascending."""
        return self.passages[self.offsets[row] : self.offsets[row + 1]]

    def require_docids(self) -> IdentifierTable:
        """This table, or ValueError unless every passage has a row of its own."""
        sizes = np.diff(self.offsets)
        if sizes.max() > 1:
            row = int(sizes.argmax())
            raise ValueError(
                f"view {self.view!r} must give every passage its own identifier, but passages "
                f"{self.passages_of(row)[:3].tolist()} share {self._readable(row)}"
            )
        if len(self) != self.num_passages:
            raise ValueError(
                f"view {self.view!r} must give every passage its own identifier, but "
                f"{self.num_passages} passages have {len(self)} identifiers"
            )
        return self

    def rows_of_passages(self) -> np.ndarray:
        """int32 [P]: the row of each passage, -1 for a passage without one.

        Raises ValueError when a passage has several identifiers.
        """
        rows = np.full(self.num_passages, -1, np.int32)
        rows[self.passages] = np.repeat(np.arange(len(self), dtype=np.int32), np.diff(self.offsets))
        if len(self.passages) > np.count_nonzero(rows >= 0):
            raise ValueError(
                f"view {self.view!r} has {len(self.passages)} identifiers of "
                f"{np.count_nonzero(rows >= 0)} passages; one row a passage is expected"
            )
        return rows

    def lookup(self, tokens: np.ndarray) -> np.ndarray:
        """int64 [...]: the row equal to each sequence of tokens [..., T'], -1 when absent.

        Sequences are right-padded with 0 and may be shorter or longer than the table is wide.
        Binary search over the sorted rows, all sequences at once.
        """
        tokens = np.asarray(tokens)
        lead, width = tokens.shape[:-1], self.tokens.shape[1]
        wanted = tokens.reshape(-1, tokens.shape[-1])
        longer = (wanted[:, width:] != PAD_ID).any(axis=1)
        wanted = wanted[:, :width]
        wanted = np.pad(wanted, ((0, 0), (0, width - wanted.shape[1])))
        low = np.zeros(len(wanted), np.int64)
        high = np.full(len(wanted), len(self), np.int64)
        for _ in range(len(self).bit_length()):  # first row that is not smaller than the wanted one
            middle = np.minimum((low + high) // 2, len(self) - 1)
            smaller = _less(self.tokens[middle], wanted) & (low < high)
            low = np.where(smaller, middle + 1, low)
            high = np.where(smaller, high, middle)
        rows = self.tokens[np.minimum(low, len(self) - 1)]
        hit = (rows == wanted).all(axis=1) & ~longer
        return np.where(hit, low, -1).reshape(lead)

    def report(self) -> dict[str, Any]:
        """Counts for people: passages, identifiers, sharing, lengths, and code usage by level.

        For views made of codes, `levels` lists for every token position: how many passages reach
        it, how many codes are used, and the entropy (bits) and perplexity 2**entropy of their use;
        a perplexity equal to the number of codes means that they are used evenly.
        """
        sizes = np.diff(self.offsets)
        named = np.zeros(self.num_passages, bool)
        named[self.passages] = True
        summary: dict[str, Any] = {
            "view": self.view,
            "passages": self.num_passages,
            "passages_without_identifier": int(np.count_nonzero(~named)),
            "identifiers": len(self),
            "passages_sharing_an_identifier": int(sizes[sizes > 1].sum()),
            "largest_group": int(sizes.max()),
            "mean_length": float(self.lengths @ sizes / sizes.sum()),
            "longest": int(self.lengths.max()),
            "code_tokens": self.num_code_tokens,
            **self.counts,
        }
        if self.num_code_tokens:
            levels = [_usage(self.tokens[:, t], sizes) for t in range(self.tokens.shape[1])]
            summary["levels"] = [level for level in levels if level["passages"]]
        return summary

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Writes four .npy files, then the header that makes them a table."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / _HEADER).unlink(missing_ok=True)
        arrays = {name: getattr(self, name).astype(dtype) for name, dtype in _DTYPES.items()}
        for name, array in arrays.items():
            _write_array(folder / f"{name}.npy", array)
        header = {
            "format": _FORMAT,
            "version": _VERSION,
            "view": self.view,
            "num_code_tokens": self.num_code_tokens,
            "num_passages": self.num_passages,
            "shapes": {name: list(array.shape) for name, array in arrays.items()},
        }
        (folder / _HEADER).write_text(json.dumps(header, indent=2) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> IdentifierTable:
        """Opens a saved table; its arrays are memory mapped.

        Raises FileNotFoundError when there is no table, ValueError when the files are another
        program's, another version's, or not whole.
        """
        folder = Path(folder)
        header = _read_header(folder / _HEADER)
        with kept.reading(folder / _HEADER):
            shapes = {name: list(header["shapes"][name]) for name in _DTYPES}
            described: dict[str, Any] = {
                "view": str(header["view"]),
                "num_code_tokens": int(header["num_code_tokens"]),
                "num_passages": int(header["num_passages"]),
            }
        arrays: dict[str, Any] = {
            name: _open_array(folder / f"{name}.npy", name, shapes[name]) for name in _DTYPES
        }
        if len(arrays["offsets"]) and arrays["offsets"][-1] != len(arrays["passages"]):
            raise ValueError(
                f"{folder}: offsets end at {arrays['offsets'][-1]}, but there are "
                f"{len(arrays['passages'])} passages; make the table again"
            )
        return cls(**arrays, **described)


def sort_rows(
    rows: np.ndarray, last_key: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Lexicographic order of rows int32 [N, T] (non-negative), stable, then by `last_key` [N].

    Returns order int64 [N] and bool [N]: whether a sorted row differs from the one before it.
    Columns are packed into as few uint64 words as their ranges allow, so that millions of rows
    are sorted by one or two keys and not by T.
    """
    words = _packed(rows)
    keys = words if last_key is None else [*words, last_key]
    if len(keys) == 1:
        order = np.argsort(keys[0], kind="stable")
    else:
        order = np.lexsort(keys[::-1])
    differs = np.ones(len(rows), bool)
    differs[1:] = False
    for word in words:
        sorted_word = word[order]
        differs[1:] |= sorted_word[1:] != sorted_word[:-1]
    return order, differs


def _packed(rows: np.ndarray) -> list[np.ndarray]:
    """uint64 words [N], most significant first, whose order is the lexicographic order of rows."""
    words: list[np.ndarray] = []
    free_bits = 0
    for column in rows.T:
        low = int(column.min())
        bits = max(1, (int(column.max()) - low).bit_length())
        if bits > free_bits:
            words.append(np.zeros(len(rows), np.uint64))
            free_bits = 64
        words[-1] <<= np.uint64(bits)
        words[-1] |= (column - np.int32(low)).astype(np.uint64)
        free_bits -= bits
    return words


def _checked_rows(rows: np.ndarray) -> np.ndarray:
    """int32 [N, T] without columns that are padding in every row."""
    rows = np.asarray(rows)
    if rows.ndim != 2 or not np.issubdtype(rows.dtype, np.integer):
        raise ValueError(
            f"identifier rows: got {rows.dtype} of shape {rows.shape}, "
            "expected integers [passages, length]"
        )
    if rows.size == 0:
        raise ValueError(f"identifier rows: got none (shape {rows.shape}); is the corpus empty?")
    if rows.min() < 0:
        raise ValueError(f"identifier rows: got token {rows.min()}, expected 0 and above")
    rows = np.ascontiguousarray(rows, np.int32)
    used = np.array([column.any() for column in rows.T])
    for low in range(0, len(rows), _CHUNK):
        filled = rows[low : low + _CHUNK] != PAD_ID
        if not filled[:, 0].all():
            row = low + int(np.flatnonzero(~filled[:, 0])[0])
            raise ValueError(f"identifier row {row} is empty or begins with padding (0)")
        if (filled[:, 1:] & ~filled[:, :-1]).any():
            row = low + int(np.flatnonzero((filled[:, 1:] & ~filled[:, :-1]).any(axis=1))[0])
            raise ValueError(f"identifier row {row} has a token after padding: {rows[row]}")
    return rows[:, : int(np.flatnonzero(used)[-1]) + 1]


def _checked_owners(passages: np.ndarray | None, num_rows: int) -> np.ndarray:
    if passages is None:
        return np.arange(num_rows, dtype=np.int32)
    passages = np.asarray(passages)
    if passages.shape != (num_rows,):
        raise ValueError(
            f"passages: got shape {passages.shape}, expected one index for each of "
            f"{num_rows} identifier rows"
        )
    return passages


def _lengths(tokens: np.ndarray) -> np.ndarray:
    return (tokens != PAD_ID).sum(axis=1, dtype=np.int32)


def _less(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """bool [N]: left [N, T] comes before right [N, T]."""
    at = (left != right).argmax(axis=1)
    index = np.arange(len(left))
    return left[index, at] < right[index, at]


def _usage(column: np.ndarray, sizes: np.ndarray) -> dict[str, Any]:
    """How the codes of one position are used, each counted once a passage."""
    is_code = column > EOS_ID
    counts = np.bincount(column[is_code], weights=sizes[is_code])
    counts = counts[counts > 0]
    shares = counts / counts.sum() if len(counts) else counts
    entropy = float(-(shares * np.log2(shares)).sum()) if len(counts) else 0.0
    return {
        "passages": int(counts.sum()),
        "codes": len(counts),
        "entropy": abs(entropy),
        "perplexity": 2.0 ** abs(entropy),
        "largest_share": float(shares.max()) if len(counts) else 0.0,
    }


def _read_header(path: Path) -> dict[str, Any]:
    if not path.exists():
        raise FileNotFoundError(f"{path.parent}: no identifier table here ({path.name} is missing)")
    header = kept.read_json(path)
    if header.get("format") != _FORMAT:
        raise ValueError(f"{path}: got another format, expected {_FORMAT!r}")
    if header.get("version") != _VERSION:
        raise ValueError(
            f"{path}: got version {header.get('version')!r}, expected {_VERSION}; "
            "make the table again"
        )
    return header


def _write_array(path: Path, array: np.ndarray) -> None:
    """Replaces the file whole: a table may be saved over the files it is mapped from."""
    part = path.with_suffix(".part")
    with part.open("wb") as file:
        np.save(file, array)
    part.replace(path)


def _open_array(path: Path, name: str, shape: list[int]) -> np.ndarray:
    if not path.is_file():
        raise kept.Damaged(path, "is missing; make the table again")
    with kept.reading(path):
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    expected = f"{_DTYPES[name]} of shape {shape}"
    if array.dtype != _DTYPES[name] or list(array.shape) != shape or array.ndim != _RANKS[name]:
        raise ValueError(
            f"{path}: got {array.dtype} of shape {list(array.shape)}, expected {expected}; "
            "make the table again"
        )
    return array
