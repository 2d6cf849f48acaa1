"""Host side of the suffix array: passages become tokens, and positions in them sorted suffixes.

Suffixes are compared up to the end of their passage; where they are equal up to there, the passage
that comes first is first. So their order says nothing of other passages, and stays the same when
passages come and go.

The sorting of suffix arrays (Manber and Myers 1993) is left to libdivsufsort, which sorts bytes. A
token is written as two or three bytes, the most significant first, so that the order of the bytes
is that of the tokens. After the 0 that ends a passage the number of the passage is written, so that
no comparison goes beyond. Suffixes that begin elsewhere than at a token are dropped.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence

import numpy as np

CHUNK = 1 << 22  # how many entries a pass over the corpus holds at a time
NUMBER = 2  # places of a token that the number of a passage takes
_PASSAGES = 1 << 14


def token_dtype(vocab_size: int) -> np.dtype:
    """Of the tokens of an index."""
    return np.dtype(np.uint16 if vocab_size <= 1 << 16 else np.uint32)


def token_bytes(vocab_size: int) -> int:
    """How many bytes a token has while it is sorted."""
    return 2 if vocab_size <= 1 << 16 else 3


def parts(array: np.ndarray) -> Iterable[np.ndarray]:
    """An array, a chunk at a time."""
    return (array[a : a + CHUNK] for a in range(0, len(array), CHUNK))


def starts(lengths: np.ndarray) -> np.ndarray:
    """int32 [P]: where each passage begins, by the number of its tokens."""
    return np.append(0, np.cumsum(lengths + 1))[:-1].astype(np.int32)


def first(tokens: np.ndarray, vocab_size: int) -> np.ndarray:
    """int32 [V + 1]: how many suffixes begin with a smaller token."""
    counts = np.zeros(vocab_size, np.int64)
    for part in parts(tokens):
        counts += np.bincount(part, minlength=vocab_size)
    return np.append(0, np.cumsum(np.append(0, counts[1:]))).astype(np.int32)


def concatenate(
    passages: Iterable[Sequence[int] | np.ndarray], vocab_size: int
) -> tuple[np.ndarray, np.ndarray]:
    """(tokens with a 0 after each passage, lengths int64 [P])."""
    dtype = token_dtype(vocab_size)
    stream, blocks, lengths = iter(passages), [np.zeros(0, dtype)], [np.zeros(0, np.int64)]
    separator = np.zeros(1, np.uint8)
    while block := [np.asarray(p) for p in itertools.islice(stream, _PASSAGES)]:
        _check(block, (len(lengths) - 1) * _PASSAGES, vocab_size)
        lengths.append(np.array([len(p) for p in block]))
        separated = [part for p in block for part in (p, separator)]
        blocks.append(np.concatenate(separated, dtype=dtype, casting="unsafe"))
    return np.concatenate(blocks), np.concatenate(lengths)


def _check(block: Sequence[np.ndarray], before: int, vocab_size: int) -> None:
    for i, passage in enumerate(block):
        if passage.ndim != 1 or (passage.size and passage.dtype.kind not in "iu"):
            raise ValueError(
                f"suffix_array.build: passage {before + i} has dtype {passage.dtype} and shape "
                f"{passage.shape}; expected integers [n]"
            )
        if passage.size and not 0 < passage.min() <= passage.max() < vocab_size:
            wrong = passage.min() if passage.min() < 1 else passage.max()
            raise ValueError(
                f"suffix_array.build: passage {before + i} holds token {wrong}; expected 1 to "
                f"{vocab_size - 1} (0 separates passages; set suffix_array.build.vocab_size)"
            )


def sorted_suffixes(tokens: np.ndarray, lengths: np.ndarray, width: int) -> np.ndarray:
    """int32 [N]: positions in `tokens`, sorted by the text that begins there.

    width: bytes of a token, see `token_bytes`.
    """
    try:
        from pydivsufsort import divsufsort
    except ImportError:
        raise ImportError(
            "suffix_array.build needs the extra 'dgr_jax[multiview]': pip install "
            "'dgr_jax[multiview]' (or pip install pydivsufsort)"
        ) from None
    if not lengths.any():
        return np.zeros(0, np.int32)
    numbers = np.arange(len(lengths))
    ends = np.cumsum(lengths + 1) - 1 + NUMBER * numbers  # of the written passages
    written = np.zeros((len(tokens) + NUMBER * len(lengths), width), np.uint8)
    is_token = np.ones(len(written), bool)
    for place in range(NUMBER):
        is_token[ends + 1 + place] = False
    for byte in range(width):
        written[is_token, byte] = tokens >> (8 * (width - 1 - byte))
        for place in range(NUMBER):
            shift = 8 * (width * (NUMBER - place) - 1 - byte)
            written[ends + 1 + place, byte] = numbers >> shift & 255
    order = divsufsort(written.reshape(-1))
    del written
    positions = np.cumsum(is_token, dtype=np.int32) - np.int32(1)
    positions[ends] = -1
    positions[~is_token] = -1
    kept = 0
    for part in parts(order):  # in place, as kept entries are never written ahead of the reading
        part = positions[part[part % width == 0] // width]
        part = part[part >= 0]
        order[kept : kept + len(part)] = part
        kept += len(part)
    return order[:kept].astype(np.int32)


def staying(
    tokens: np.ndarray, suffixes: np.ndarray, lengths: np.ndarray, stay: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """(tokens, suffixes) without the passages that do not stay, bool [P]; lengths int64 [P]."""
    keep = np.repeat(stay, lengths + 1)
    positions = np.cumsum(keep, dtype=np.int32) - np.int32(1)
    positions[~keep] = -1
    left, kept = np.empty(int(keep.sum() - stay.sum()), np.int32), 0
    for part in parts(suffixes):
        part = positions[part]
        part = part[part >= 0]
        left[kept : kept + len(part)] = part
        kept += len(part)
    return tokens[keep], left
