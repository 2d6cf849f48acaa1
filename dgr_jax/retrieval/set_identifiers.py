"""Set identifiers: of every passage, the M pieces of the student's vocabulary that tell most of it.

They are the pieces of largest BM25 impact in the passage (Robertson; Lucene's form of the inverse
document frequency, k1 = .9, b = .4). No labels and no questions are used.

Axis letters: P passages, M pieces of a set.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dgr_jax.data.vocabulary import Vocabulary
from dgr_jax.decoding import array_folder
from dgr_jax.model_dir import kept
from dgr_jax.special_tokens import UNK_ID

if TYPE_CHECKING:
    from dgr_jax.corpora.store import PassageStore

logger = logging.getLogger(__name__)

_K1, _B = 0.9, 0.4
_BLOCK = 4096  # passages that are tokenised together
_FORMAT, _VERSION = "dgr_jax.set_identifiers", 1


def opened(
    store: PassageStore, vocabulary: Vocabulary, size: int, folder: Path, *, keep: bool
) -> np.ndarray:
    """The sets of all passages, see `build`: those that are kept in `folder`/sets-SIZE, or made
    now; keep: they stay there.

    Raises ValueError for kept ones of another corpus or vocabulary.
    """
    own = folder / f"sets-{size}"
    digest = hashlib.sha256("\n".join(store.pids).encode())
    digest.update((vocabulary.folder / "spiece.model").read_bytes())
    corpus = {"passages": len(store), "pids_and_pieces": digest.hexdigest()}
    sets = _load(own, corpus)
    if sets is None:
        sets = build(store, vocabulary, size)
        if keep:
            settings = {"corpus": corpus}
            array_folder.save(
                own, {"sets": sets}, kind=_FORMAT, version=_VERSION, settings=settings
            )
    return sets


def build(store: PassageStore, vocabulary: Vocabulary, size: int) -> np.ndarray:
    """[P, M]: pieces of each passage, the largest impact first, of equal ones the smaller piece;
    0 where it has fewer. uint16 where the pieces fit, int32 otherwise.

    Raises ValueError for a size above the number of pieces.
    """
    check_size(size, vocabulary.pieces)
    blocks = list(_counted(store, vocabulary))
    passages = np.zeros(vocabulary.pieces)
    for _, pieces, _, _ in blocks:
        passages += np.bincount(pieces, minlength=vocabulary.pieces)
    weights = np.log1p((len(store) - passages + 0.5) / (passages + 0.5))
    lengths = np.concatenate([of_block for _, _, _, of_block in blocks])
    scale = _K1 * (1 - _B + _B * lengths / max(lengths.mean(), 1e-9))
    dtype = np.uint16 if vocabulary.pieces <= 1 << 16 else np.int32
    sets, first = np.zeros((len(store), size), dtype), 0
    for owners, pieces, counts, of_block in blocks:
        impacts = weights[pieces] * counts / (counts + scale[first + owners])
        order = np.lexsort((pieces, -impacts, owners))
        starts = np.searchsorted(owners, np.arange(len(of_block)))
        place = np.arange(len(owners)) - starts[owners]  # owners are sorted before and after
        kept_places = place < size
        sets[first + owners[kept_places], place[kept_places]] = pieces[order][kept_places]
        first += len(of_block)
    filled = (sets > 0).sum(1)
    logger.info(
        "sets of %d pieces: %.1f on average, of %s passages; %s have fewer",
        *(size, filled.mean(), f"{len(store):,}", f"{(filled < size).sum():,}"),
    )
    return sets


def check_size(size: int, pieces: int) -> None:
    """Raises ValueError for more pieces of a set than the vocabulary has."""
    if size > pieces:
        raise ValueError(
            f"Learned.set_size: got {size}, expected at most {pieces:,}, the pieces of the "
            "vocabulary (SentencePiece.size)"
        )


def _counted(store: PassageStore, vocabulary: Vocabulary) -> Iterator[tuple[np.ndarray, ...]]:
    """Of each block of passages: (passage within the block, piece, how often it occurs there), by
    passage and piece; and the length of each passage in pieces."""
    for start in range(0, len(store), _BLOCK):
        texts = [store[i].contents for i in range(start, min(start + _BLOCK, len(store)))]
        tokens = [np.asarray(row, np.int64) for row in vocabulary.encode_all(texts)]
        owner = np.repeat(np.arange(len(tokens)), list(map(len, tokens)))
        piece = np.concatenate([*tokens, np.zeros(0, np.int64)])
        known = piece > UNK_ID
        together = owner[known] * vocabulary.pieces + piece[known]
        distinct, counts = np.unique(together, return_counts=True)
        owners, pieces = np.divmod(distinct, vocabulary.pieces)
        lengths = np.bincount(owner[known], minlength=len(tokens))
        yield owners, pieces.astype(np.int32), counts.astype(np.int32), lengths


def _load(folder: Path, corpus: dict[str, Any]) -> np.ndarray | None:
    """The sets that were kept in a folder; None where nothing whole is there."""
    if not (folder / "header.json").is_file():
        return None
    needed = {"corpus": corpus, "sha256": ("sets",)}
    try:
        arrays, header = array_folder.load(folder, kind=_FORMAT, version=_VERSION, needed=needed)
    except kept.Damaged as damage:
        logger.warning("%s; the sets are made again", damage.what)
        return None
    if header["corpus"] != corpus:
        raise ValueError(
            f"{folder}: holds the sets of another corpus or vocabulary: got one of "
            f"{header['corpus']['passages']:,} passages, expected the {corpus['passages']:,} that "
            "are prepared; remove the folder to make them again"
        )
    return arrays["sets"]
