"""BM25 over a corpus: the baseline beside every student, and a teacher."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any, ClassVar

import jax
import numpy as np

from dgr_jax import partitioning, ranges
from dgr_jax.corpora import words
from dgr_jax.corpora.store import PassageStore
from dgr_jax.corpora.types import ScoredPassage
from dgr_jax.data.vocabulary import Vocabulary
from dgr_jax.retrieval.batching import Found, _nothing
from dgr_jax.retrieval.system import Opening, System, SystemSettings, checked_mask


@dataclass(frozen=True)
class Bm25:
    """Settings of BM25 (Robertson; Lucene's form of the inverse document frequency).

    What a word is, in any script: see `corpora.words`.

    k1: how soon more occurrences of a word stop counting. b: how much long passages are marked
    down. stop_words: a list of bm25s ("english", ...) or "" for none. stemmer: a language of
    PyStemmer ("english", ...; extra `stemmer`); "" for none.
    """

    k1: float = 0.9
    b: float = 0.4
    stop_words: str = "english"
    stemmer: str = ""

    def __post_init__(self) -> None:
        ranges.check(self, k1=ranges.at_least(0), b=ranges.between(0, 1))

    def fit(self, store: PassageStore) -> Bm25Index:
        """Indexes title and text of every passage."""
        if len(store) == 0:
            raise ValueError("the corpus has no passages to index")
        words_of = _words(self, alone=True)
        vocabulary: dict[str, int] = {}
        ids = [
            [vocabulary.setdefault(word, len(vocabulary)) for word in words_of(passage.contents)]
            for passage in store
        ]
        if not vocabulary:
            return Bm25Index(self, None, {}, store.pids)
        model = _bm25s().BM25(k1=self.k1, b=self.b, method="lucene")
        model.index((ids, vocabulary), show_progress=False)
        return Bm25Index(self, model, vocabulary, store.pids)


class Bm25Index:
    """A corpus indexed by `Bm25.fit`."""

    def __init__(
        self, settings: Bm25, model: Any, vocabulary: dict[str, int], pids: list[str]
    ) -> None:
        self._model = model
        self._vocabulary = vocabulary
        self._pids = pids
        self.settings = settings
        self._words = _words(settings)

    def scores(self, text: str) -> np.ndarray:
        """f32 [P]: the score of every passage; 0 where it has no word of the query."""
        ids = [self._vocabulary[w] for w in self._words(text) if w in self._vocabulary]
        if not ids:
            return np.zeros(len(self._pids), np.float32)
        return self._model.get_scores_from_ids(ids)

    def search(self, queries: Mapping[str, str], k: int) -> dict[str, list[ScoredPassage]]:
        """qid -> its k best passages, best first, ties by pid.

        Only passages that share a word with the query: fewer than k where there are no more, none
        where no word of the query is known.
        """
        if not isinstance(k, int) or k < 1:
            raise ValueError(f"Bm25 search: got k = {k!r}, expected 1 or more")
        return {qid: self.best(self.scores(text), k) for qid, text in queries.items()}

    @property
    def num_passages(self) -> int:
        """Passages of the corpus."""
        return len(self._pids)

    @property
    def nbytes(self) -> int:
        """Of the scores of words in passages, and where they stand."""
        parts = self._model.scores if self._model else {}
        return sum(parts[name].nbytes for name in ("data", "indices", "indptr") if name in parts)

    def best(self, scores: np.ndarray, k: int) -> list[ScoredPassage]:
        """The k best passages of `scores` (f32 [P]) above 0, best first, ties by pid."""
        return [ScoredPassage(self._pids[i], float(scores[i])) for i in self.places(scores, k)]

    def places(self, scores: np.ndarray, k: int) -> list[int]:
        """The passage indices of `best`."""
        threshold = 0.0
        if k < len(scores):
            threshold = np.partition(scores, len(scores) - k)[len(scores) - k]
        # All passages as good as the k-th stay in, so that pids decide between equals.
        found = np.flatnonzero((scores >= threshold) & (scores > 0))
        return sorted(found.tolist(), key=lambda i: (-scores[i], self._pids[i]))[:k]


@dataclass(frozen=True)
class Bm25System(System):
    """An index of BM25, ready to answer texts. It runs on the host.

    depth: passages of a query; allowed: bool [P], passages that may be found; None: all.
    """

    index: Bm25Index
    depth: int
    allowed: np.ndarray | None = None

    @property
    def mesh(self) -> jax.sharding.Mesh:
        """The processor."""
        return partitioning.make_mesh(devices=jax.local_devices(backend="cpu")[:1])

    @property
    def limits(self) -> dict[str, int]:
        """See System."""
        return {"depth": self.depth, "passages": self.index.num_passages}

    @property
    def index_bytes(self) -> int:
        """See System."""
        return self.index.nbytes

    def describe(self) -> dict[str, Any]:
        """See System."""
        return {"passages": self.index.num_passages, **vars(self.index.settings)}

    def encode(self, vocabulary: Vocabulary, texts: Sequence[str]) -> Sequence[str]:
        """See System: the texts as they are."""
        return texts

    def passages(self, queries: Sequence[str]) -> Found:
        """See System."""
        passages, scores = _nothing(len(queries), self.depth)
        for row, text in enumerate(queries):
            of_all = self.index.scores(text)
            if self.allowed is not None:
                of_all = of_all * self.allowed
            best = self.index.places(of_all, self.depth)
            passages[row, : len(best)], scores[row, : len(best)] = best, of_all[best]
        return passages, scores

    def restrict(self, passage_mask: np.ndarray) -> Bm25System:
        """See System."""
        count = self.index.num_passages
        return replace(self, allowed=checked_mask(passage_mask, count, self.allowed, "Bm25System"))


@dataclass(frozen=True)
class Bm25Baseline(SystemSettings):
    """BM25 as a system beside students."""

    bm25: Bm25 = Bm25()

    together: ClassVar[bool] = False

    def asked(self, search: Any) -> tuple[Any, ...]:
        """Of a search, the depth alone; of itself nothing where it is as it always was."""
        return search.depth, *[self.bm25] * (self.bm25 != Bm25())

    def open(self, opening: Opening) -> Bm25System:
        """BM25 of the passages."""
        return Bm25System(self.bm25.fit(opening.store), opening.depth)


def _bm25s() -> ModuleType:
    """The library; it would log its steps whatever the level of the program."""
    import bm25s

    logging.getLogger("bm25s").setLevel(logging.WARNING)
    return bm25s


def _words(settings: Bm25, *, alone: bool = False) -> Callable[[str], Iterable[str]]:
    """Text -> its words, without stop words, stemmed on demand. alone: see `words.words`."""
    from bm25s.tokenization import Tokenizer

    try:
        stop_words = frozenset(Tokenizer(stopwords=settings.stop_words or None).stopwords or ())
    except ValueError as error:
        raise ValueError(f"Bm25.stop_words = {settings.stop_words!r}: {error}") from None
    stem = _stemmer(settings.stemmer)

    def words_of(text: str) -> Iterable[str]:
        kept = [word for word in words.words(text, alone=alone) if word not in stop_words]
        return stem(kept) if stem else kept

    return words_of


def _stemmer(language: str) -> Callable[[list[str]], list[str]] | None:
    if not language:
        return None
    try:
        import Stemmer
    except ImportError:
        raise ImportError(
            "Bm25.stemmer needs the extra 'dgr_jax[stemmer]': pip install 'dgr_jax[stemmer]'"
        ) from None
    try:
        return Stemmer.Stemmer(language).stemWords
    except KeyError:
        raise ValueError(
            f"Bm25.stemmer = {language!r}, expected one of {sorted(Stemmer.algorithms())}"
        ) from None
