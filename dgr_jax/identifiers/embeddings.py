"""Passage vectors that docids are clustered from."""

from __future__ import annotations

import logging
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import numpy as np

from dgr_jax import ranges
from dgr_jax.corpora import lines, words
from dgr_jax.identifiers import kept_models, kmeans

if TYPE_CHECKING:
    from dgr_jax.corpora.store import PassageStore

_log = logging.getLogger(__name__)

_MODEL = "embeddings"  # folder of what is kept
_IN_MEMORY = 1 << 30  # bytes of vectors from which they are kept in a file


class Embeddings(Protocol):
    """Vectors of passages."""

    def embed(self, store: PassageStore, seed: int) -> np.ndarray:
        """Floating point [P, D], row i for passage i; may be a memory map."""


@runtime_checkable
class KeptEmbeddings(Embeddings, Protocol):
    """Vectors of passages, and of those that come later."""

    def embed_and_keep(self, store: PassageStore, seed: int, folder: Path) -> np.ndarray:
        """As `embed`; leaves in the folder what `of_texts` needs."""

    def of_texts(self, texts: Sequence[str], folder: Path) -> np.ndarray:
        """f32 [n, D]: vectors of texts, by the model that `embed_and_keep` has left."""


def embedded(
    embeddings: Embeddings, store: PassageStore, seed: int, keep: Path | None
) -> np.ndarray:
    """The vectors of passages; keep: where the model is left, if it can be."""
    if keep is None or not isinstance(embeddings, KeptEmbeddings):
        return embeddings.embed(store, seed)
    return embeddings.embed_and_keep(store, seed, keep / _MODEL)


def later(embeddings: Embeddings, texts: Sequence[str], kept: Path) -> np.ndarray:
    """f32 [n, D]: vectors of texts that come later, by the model that `embedded` has left.

    Raises ValueError where there is none.
    """
    if not isinstance(embeddings, KeptEmbeddings):
        raise ValueError(
            f"{type(embeddings).__name__} has no vectors for passages that come later; expected "
            "TfidfSvd or SentenceEncoder, or prepare and train again with all passages"
        )
    return embeddings.of_texts(texts, kept / _MODEL)


@dataclass(frozen=True)
class TfidfSvd(KeptEmbeddings):
    """TF-IDF of title and text, reduced by truncated singular value decomposition (LSA).

    Words are those of `corpora.words`, the same as BM25's.

    dim: D. max_features: the vocabulary keeps the most frequent words. min_count: a word must be in
    so many passages (in 1 for corpora of fewer than 1,000). stop_words: "english" or "" for none.
    fit_passages: vocabulary and decomposition are fitted on a sample of this size; all passages
    are then projected in pieces, and vectors of more than 1 GiB are kept in a temporary file.
    iterations: power iterations of the randomised decomposition (Halko et al. 2011).
    """

    dim: int = 128
    max_features: int = 200_000
    min_count: int = 2
    stop_words: str = "english"
    fit_passages: int = 500_000
    iterations: int = 5

    def __post_init__(self) -> None:
        counts = ("dim", "max_features", "min_count", "fit_passages")
        ranges.check(
            self, **dict.fromkeys(counts, ranges.at_least(1)), iterations=ranges.at_least(0)
        )

    def embed(self, store: PassageStore, seed: int) -> np.ndarray:
        """f32 [P, D] unit rows, the same for the same seed.

        Where the corpus has fewer than D dimensions, the last columns are 0. A blank passage, or
        one without a known word, gets the first axis: the direction all passages share.
        """
        return self._embed(store, seed, None)

    def embed_and_keep(self, store: PassageStore, seed: int, folder: Path) -> np.ndarray:
        """As `embed`; the words, their weights and the axes are kept in the folder."""
        return self._embed(store, seed, folder)

    def of_texts(self, texts: Sequence[str], folder: Path) -> np.ndarray:
        """f32 [n, D] unit rows, as those of `embed`.

        By hand, as scikit-learn takes longer to be imported than all else here.
        """
        arrays = kept_models.load(folder, ("words", "weights", "axes"))
        known = arrays["words"].tobytes().decode().split("\n")
        # Those that an older version kept were not folded.
        places = {word.casefold(): place for place, word in enumerate(known)}
        idf, axes = np.asarray(arrays["weights"]), np.asarray(arrays["axes"])
        vectors = np.zeros((len(texts), self.dim), np.float32)
        for vector, text in zip(vectors, texts, strict=True):
            counts = Counter(places[word] for word in words.words(text) if word in places)
            if counts:
                place, count = np.array(sorted(counts.items())).T
                weights = idf[place] * (1 + np.log(count))
                vector[: axes.shape[1]] = weights / np.linalg.norm(weights) @ axes[place]
        return _unit_rows(vectors)

    def _embed(self, store: PassageStore, seed: int, folder: Path | None) -> np.ndarray:
        num_passages = _counted(store)
        vectors = _zeros(num_passages, self.dim)
        fit_rows = kmeans.sample(num_passages, self.fit_passages, seed)
        vectorizer = self._vectorizer(num_passages)
        try:
            weights = vectorizer.fit_transform(_contents(store, fit_rows, num_passages))
        except ValueError as error:
            if "empty vocabulary" not in str(error) and "no terms remain" not in str(error).lower():
                raise
            _log.warning("no passage has a word that can be counted; all get the same vector")
            nothing = np.zeros(0, np.float32)
            self._keep(folder, [], nothing, nothing.reshape(0, 1))
            return _unit_rows(vectors)
        axes = self._axes(weights, seed)
        self._keep(folder, vectorizer.get_feature_names_out(), vectorizer.idf_, axes)
        width = axes.shape[1]
        if len(fit_rows) == num_passages:
            vectors[:, :width] = weights @ axes
        else:
            for low, texts in _text_chunks(store):
                vectors[low : low + len(texts), :width] = vectorizer.transform(texts) @ axes
        return _unit_rows(vectors)

    @staticmethod
    def _keep(
        folder: Path | None, known: Sequence[str], weights: np.ndarray, axes: np.ndarray
    ) -> None:
        """known: words; weights: of each, f32 [words]; axes f32 [words, width]."""
        if folder is not None:
            text = np.frombuffer("\n".join(known).encode(), np.uint8)
            kept_models.save(folder, {"words": text, "weights": weights, "axes": axes})

    def _vectorizer(self, num_passages: int) -> Any:
        from sklearn.feature_extraction.text import TfidfVectorizer

        return TfidfVectorizer(
            tokenizer=words.words,
            token_pattern=None,
            lowercase=False,
            sublinear_tf=True,
            max_features=self.max_features,
            min_df=self.min_count if num_passages >= 1000 else 1,
            stop_words=self.stop_words or None,
            dtype=np.float32,
        )

    def _axes(self, weights: Any, seed: int) -> np.ndarray:
        """f32 [words, width <= D]: right singular vectors of sparse weights [passages, words]."""
        from sklearn.utils.extmath import randomized_svd
        from threadpoolctl import threadpool_limits

        width = min(self.dim, *weights.shape)
        # One thread: most time goes into sparse products, which have no threads, and the result
        # does not depend on the number of cores.
        with threadpool_limits(limits=1):
            _, _, axes = randomized_svd(weights, width, n_iter=self.iterations, random_state=seed)
        return np.ascontiguousarray(axes.T, np.float32)


@dataclass(frozen=True)
class SentenceEncoder(KeptEmbeddings):
    """Vectors of a sentence-transformers model (extra `encoders`).

    model: a local folder or a hub id. prefix: put before every passage, for models that expect
    one ("passage: ").
    """

    model: str = "sentence-transformers/all-MiniLM-L6-v2"
    batch_size: int = 64
    prefix: str = ""

    def __post_init__(self) -> None:
        ranges.check(self, batch_size=ranges.at_least(1))

    def embed(self, store: PassageStore, seed: int) -> np.ndarray:
        """f32 [P, D] unit rows; nothing is drawn, so `seed` changes nothing."""
        del seed
        _counted(store)
        encoder = load_sentence_transformer(self.model, "SentenceEncoder.model")
        parts = []
        for low, texts in _text_chunks(store):
            parts.append(self._encoded(encoder, texts))
            _log.info("embedded %d of %d passages", low + len(texts), len(store))
        return np.concatenate(parts)

    def embed_and_keep(self, store: PassageStore, seed: int, folder: Path) -> np.ndarray:
        """As `embed`: the model lies elsewhere, and stays there."""
        return self.embed(store, seed)

    def of_texts(self, texts: Sequence[str], folder: Path) -> np.ndarray:
        """f32 [n, D] unit rows."""
        encoder = load_sentence_transformer(self.model, "SentenceEncoder.model")
        return self._encoded(encoder, texts)

    def _encoded(self, encoder: Any, texts: Sequence[str]) -> np.ndarray:
        vectors = encoder.encode(
            [self.prefix + text for text in texts],
            batch_size=self.batch_size,
            normalize_embeddings=True,
            convert_to_numpy=True,
            show_progress_bar=False,
        )
        return np.asarray(vectors, np.float32)


@dataclass(frozen=True)
class FromFile(Embeddings):
    """Vectors computed elsewhere: a .npy array float16 or float32 [P, D] in corpus order."""

    path: str

    def embed(self, store: PassageStore, seed: int) -> np.ndarray:
        """The file, memory mapped, as it is: rows are not normalised."""
        del seed
        vectors = load_vectors(self.path, "FromFile.path")
        if len(vectors) != len(store):
            raise ValueError(
                f"FromFile.path = {self.path!r}: got {len(vectors)} vectors, expected one for each "
                f"of {len(store)} passages"
            )
        return vectors


def load_vectors(path: str, name: str) -> np.ndarray:
    """A float16 or float32 [rows, D] array, memory-mapped, or read whole where it lies in a bucket;
    `name` is the setting to blame."""
    try:
        if "://" in path:
            with lines.place(path).open("rb") as file:
                vectors = np.load(file, allow_pickle=False)
        else:
            vectors = np.load(path, mmap_mode="r", allow_pickle=False)
    except FileNotFoundError:
        raise FileNotFoundError(f"{name} = {path!r}: no such file; expected a .npy array") from None
    except OSError:
        raise
    except Exception as error:  # the parser of its header fails in many ways
        reason = " ".join(str(error).split())[:120] or type(error).__name__
        raise ValueError(f"{name} = {path!r}: not a whole .npy array ({reason!r})") from None
    if vectors.ndim != 2 or vectors.dtype not in (np.float16, np.float32):
        raise ValueError(
            f"{name} = {path!r}: got {vectors.dtype} of shape {vectors.shape}, "
            "expected float16 or float32 [rows, dimensions]"
        )
    return vectors


def load_sentence_transformer(model: str, name: str) -> Any:
    """The encoder; `name` is the setting to blame when it cannot be had."""
    try:
        from sentence_transformers import SentenceTransformer
    except ImportError:
        raise ImportError(
            f"{name} needs the extra 'dgr_jax[encoders]': pip install 'dgr_jax[encoders]'"
        ) from None
    try:
        return SentenceTransformer(model)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{name} = {model!r} cannot be loaded: give a local folder of a sentence-transformers "
            f"model, or a hub id where the network can be reached ({error})"
        ) from error


def _zeros(rows: int, width: int) -> np.ndarray:
    """f32 [rows, width] in memory, or mapped into it from a file that is gone when it is let go."""
    if rows * width * 4 <= _IN_MEMORY:
        return np.zeros((rows, width), np.float32)
    with tempfile.TemporaryFile() as file:
        return np.memmap(file, np.float32, "w+", shape=(rows, width))


def _counted(store: PassageStore) -> int:
    if len(store) == 0:
        raise ValueError("the corpus has no passages to embed")
    return len(store)


def _contents(store: PassageStore, rows: np.ndarray, num_passages: int) -> Iterator[str]:
    """Texts of some passages; in one pass where they are all of them."""
    if len(rows) == num_passages:
        return (passage.contents for passage in store)
    return (store[int(row)].contents for row in rows)


def _text_chunks(store: PassageStore, size: int = 20_000) -> Iterator[tuple[int, list[str]]]:
    passages = iter(store)
    low = 0
    while texts := [passage.contents for passage in islice(passages, size)]:
        yield low, texts
        low += len(texts)


def _unit_rows(vectors: np.ndarray) -> np.ndarray:
    """Scales the rows of f32 [P, D] in place to length 1; rows of zeros become the first axis."""
    norms = np.sqrt(np.einsum("pd,pd->p", vectors, vectors))
    blank = norms < 1e-6
    vectors[blank] = 0.0
    vectors[blank, 0] = 1.0
    norms[blank] = 1.0
    vectors /= norms[:, None]
    return vectors
