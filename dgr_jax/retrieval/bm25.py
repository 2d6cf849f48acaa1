"""BM25 over a corpus: the baseline beside every student, and a teacher."""

from __future__ import annotations

import functools
import itertools
import logging
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any, ClassVar

import jax
import numpy as np
import Stemmer

from dgr_jax import partitioning, ranges
from dgr_jax.corpora import words
from dgr_jax.corpora.store import PassageStore
from dgr_jax.corpora.types import Passage, ScoredPassage
from dgr_jax.data.vocabulary import Vocabulary
from dgr_jax.retrieval import kept_postings
from dgr_jax.retrieval.batching import Found, _nothing
from dgr_jax.retrieval.kept_postings import KeptPostings, Postings, of_passages
from dgr_jax.retrieval.system import Opening, System, SystemSettings, checked_mask
from dgr_jax.settings import unless_default

SNOWBALL = "snowball"
# The list "english" of bm25s, which takes as long to import as a question to answer.
ENGLISH = frozenset(
    "a an and are as at be but by for if in into is it no not of on or such that the their then "
    "there these they this to was will with".split()
)

_GROUP = 128  # passages of which the best is looked up first


@dataclass(frozen=True)
class Bm25:
    """Settings of BM25 (Robertson; Lucene's form of the inverse document frequency).

    What a word is, in any script: see `corpora.words`. Stop words are left out, and each other word
    counts as its stem. The pairs of characters of scripts without spaces have no endings to lose.

    k1: how soon more occurrences of a word stop counting. b: how much long passages are marked
    down. stop_words: a list of bm25s ("english": 33 words, "german", ...) or "" for none.
    stemmer: "snowball", the one of `language`; "" for words as they stand; or an algorithm of
      PyStemmer, such as "porter".
    language: that of the texts, for which Snowball has a stemmer.
    grams: characters of the n-grams that count in place of words, see `words.grams`; stop words
      and stems are of no concern then. 0: words.
    queries_weight: what an occurrence in a training query of which the passage is a positive
      counts, beside 1 for each in the passage (fields of BM25F; Robertson, Zaragoza and Taylor
      2004). Such queries count in document frequencies too, by which the words of questions, rare
      in passages, lose weight. 0: passages alone.
    sentences: whether each sentence of a text counts as a passage of its own, of which the best is
      the score of the passage. Titles count where there is no text.
    """

    k1: float = 0.9
    b: float = 0.4
    stop_words: str = "english"
    stemmer: str = SNOWBALL
    language: str = unless_default("english")
    grams: int = unless_default(0)
    queries_weight: float = unless_default(0.0)
    sentences: bool = unless_default(False)

    def __post_init__(self) -> None:
        ranges.check(
            self,
            k1=ranges.at_least(0),
            b=ranges.between(0, 1),
            grams=ranges.at_least(0),
            queries_weight=ranges.at_least(0),
        )
        if self.sentences and self.queries_weight:
            raise ValueError(
                f"Bm25.queries_weight: got {self.queries_weight} with Bm25.sentences, expected 0: "
                "training queries belong to whole passages"
            )
        if self.stop_words != "english":
            _stop_words(self.stop_words)
        if self.algorithm not in ("", *Stemmer.algorithms()):
            by_language = self.stemmer == SNOWBALL
            raise ValueError(
                f"Bm25.{'language' if by_language else 'stemmer'}: got {self.algorithm!r}, "
                f"expected {'one of' if by_language else f'{SNOWBALL},'} "
                f"{', '.join(Stemmer.algorithms())}; words stay as they stand by Bm25.stemmer=''"
            )

    @property
    def algorithm(self) -> str:
        """The algorithm of PyStemmer that makes the stems; "" where words stay as they stand."""
        return self.language if self.stemmer == SNOWBALL else self.stemmer

    def reader(self, *, alone: bool = False) -> Callable[[str], Iterable[str]]:
        """What finds the words of a query, or its n-grams: text -> words. alone: those of a
        passage, see `words.words`."""
        if self.grams:
            return functools.partial(words.grams, size=self.grams)
        return _words(self, alone=alone)

    def counts(
        self, passages: Iterable[Passage], queries: Mapping[str, Sequence[str]]
    ) -> Iterator[list[dict[str, float]]]:
        """word -> occurrences, of each sentence of a passage, or of title and text as one; then
        with those in its training queries, weighed: pid -> queries."""
        words_of = self.reader(alone=True)
        for passage in passages:
            if self.sentences:
                texts = words.sentences(passage.text) or [passage.contents]
                yield [dict(Counter(words_of(text))) for text in texts]
                continue
            counts: dict[str, float] = dict(Counter(words_of(passage.contents)))
            asked = queries.get(passage.pid, ()) if self.queries_weight else ()
            for word in itertools.chain.from_iterable(map(words_of, asked)):
                counts[word] = counts.get(word, 0) + self.queries_weight
            yield [counts]

    def fit(self, store: PassageStore) -> Bm25Index:
        """Indexes title and text of every passage, and its training queries where these count.

        Raises ValueError where they do, and are not kept with the passages.
        """
        if len(store) == 0:
            raise ValueError("the corpus has no passages to index")
        if self.queries_weight or self.sentences:
            return self._counted(store)
        words_of = self.reader(alone=True)
        vocabulary: dict[str, int] = {}
        ids = [
            [vocabulary.setdefault(word, len(vocabulary)) for word in words_of(passage.contents)]
            for passage in store
        ]
        if not vocabulary:
            return Bm25Index(self, None, {}, store.pids)
        model = _bm25s().BM25(k1=self.k1, b=self.b, method="lucene")
        model.index((ids, vocabulary), show_progress=False)
        mean_words = sum(map(len, ids)) / len(ids)
        return Bm25Index(self, model, vocabulary, store.pids, mean_words)

    def _counted(self, store: PassageStore) -> Bm25Index:
        """Indexes what the library has no form of."""
        queries = store.queries if self.queries_weight else {}
        if queries is None:
            raise ValueError(
                f"{type(self).__name__}.queries_weight: got {self.queries_weight}, expected 0: no "
                f"training queries are kept with the passages ({store.folder}); an evaluation of "
                "the MODEL_DIR that was trained keeps them"
            )
        nothing = Postings.none(np.zeros(0, np.int32) if self.sentences else None)
        counts = self.counts(store, queries)
        kept = KeptPostings(nothing, np.zeros(0, np.float32), None)
        kept = kept.changed(self, np.zeros(0, bool), counts)
        return self.reopened(kept.postings, store.pids, kept.mean_words or 0.0)

    def reopened(self, postings: Postings, pids: list[str], mean_words: float = 0.0) -> Bm25Index:
        """An index whose scores are made of these; mean_words: only needed to keep it again."""
        if not postings.words:
            return Bm25Index(self, None, {}, pids, mean_words, postings.sizes)
        model = _bm25s().BM25(k1=self.k1, b=self.b, method="lucene")
        model.scores = {
            "data": postings.impacts, "indices": postings.passages, "indptr": postings.starts,
            "num_docs": len(pids) if postings.sizes is None else int(postings.sizes.sum()),
        }  # fmt: skip
        model.nonoccurrence_array = None
        vocabulary = {word: i for i, word in enumerate(postings.words)}
        return Bm25Index(self, model, vocabulary, pids, mean_words, postings.sizes)


# The settings of the baseline before they could be chosen.
WORDS = Bm25(stemmer="")


class Bm25Index:
    """A corpus indexed by `Bm25.fit`."""

    def __init__(
        self,
        settings: Bm25,
        model: Any,
        vocabulary: dict[str, int],
        pids: list[str],
        mean_words: float = 0.0,
        sizes: np.ndarray | None = None,
    ) -> None:
        self._model = model
        self._vocabulary = vocabulary
        self._pids = pids
        self.settings = settings
        self.mean_words = mean_words
        self._sizes = sizes
        self._words = settings.reader()

    def postings(self) -> Postings:
        """What its scores are made of."""
        if self._model is None:
            return Postings.none(self._sizes)
        of = self._model.scores
        words = list(self._vocabulary)[: len(of["indptr"]) - 1]  # bm25s adds a blank one
        starts = np.asarray(of["indptr"], np.int64)
        return Postings(words, starts, of["indices"], of["data"], self._sizes)

    def scores(self, text: str) -> np.ndarray:
        """f32 [P]: the score of every passage; 0 where it has no word of the query."""
        if ids := self._ids(text):
            return of_passages(self._model.get_scores_from_ids(ids), self._sizes)
        return np.zeros(len(self._pids), np.float32)

    def scores_of(self, text: str, passages: np.ndarray) -> np.ndarray:
        """f32 [n]: `scores` of a few passages, int [n], to the last bit; the time hardly grows with
        the corpus, for each word's passages, which ascend, are searched for these. Sentences are
        all looked at."""
        if self._sizes is not None:
            return self.scores(text)[passages]
        scores = np.zeros(len(passages), np.float32)
        for word in self._ids(text):
            of = self._model.scores
            entries = slice(of["indptr"][word], of["indptr"][word + 1])
            holders, impacts = of["indices"][entries], of["data"][entries]
            if len(holders):
                place = np.minimum(holders.searchsorted(passages), len(holders) - 1)
                scores += np.where(holders[place] == passages, impacts[place], np.float32(0))
        return scores

    def _ids(self, text: str) -> list[int]:
        return [self._vocabulary[w] for w in self._words(text) if w in self._vocabulary]

    def kept(self) -> KeptPostings:
        """The same with what passages that come later are weighed with."""
        count = self.num_passages if self._sizes is None else int(self._sizes.sum())
        return KeptPostings.of(self.postings(), count, self.mean_words)

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
        """Bytes of the scores of words in passages, and of where they stand."""
        parts = self._model.scores if self._model else {}
        return sum(parts[name].nbytes for name in ("data", "indices", "indptr") if name in parts)

    def best(self, scores: np.ndarray, k: int) -> list[ScoredPassage]:
        """The k best passages of `scores` (f32 [P]) above 0, best first, ties by pid."""
        return [ScoredPassage(self._pids[i], float(scores[i])) for i in self.places(scores, k)]

    def places(self, scores: np.ndarray, k: int) -> list[int]:
        """The passage indices of `best`."""
        return places(scores, k, self._pids)


def places(scores: np.ndarray, k: int, pids: Sequence[str]) -> list[int]:
    """Indices of the k best of `scores` (f32 [P]) above 0, best first, ties by pid."""
    # Alone, as partition is slow where most are 0, or where many share a common word.
    reached = _reached(scores, k)
    matching = np.flatnonzero(scores >= reached if reached > 0 else scores > 0)
    if k < len(matching):
        of_matching = scores[matching]
        threshold = np.partition(of_matching, len(matching) - k)[len(matching) - k]
        # All passages as good as the k-th stay in, so that pids decide between equals.
        matching = matching[of_matching >= threshold]
    return sorted(matching.tolist(), key=lambda i: (-scores[i], pids[i]))[:k]


def _reached(scores: np.ndarray, k: int) -> float:
    """A score that k passages reach: the k-th best of the best of disjoint groups; 0 of too few."""
    maxima = scores[: len(scores) // _GROUP * _GROUP].reshape(_GROUP, -1).max(0)
    return np.partition(maxima, len(maxima) - k)[len(maxima) - k] if k <= len(maxima) else 0.0


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
        """The mesh of the processor alone."""
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
        """See SystemSettings: the depth of the search and, unless they are WORDS, its settings."""
        return search.depth, words.RULES, *[self.bm25] * (self.bm25 != WORDS)

    def open(self, opening: Opening) -> Bm25System:
        """BM25 of the passages; of postings that are kept, where there are any."""
        pids = opening.store.pids
        folder = kept_postings.place(opening.prepared / kept_postings.PLANS, self.bm25)
        held = KeptPostings.load(folder, pids)
        index = self.bm25.reopened(held.postings, pids) if held else self.bm25.fit(opening.store)
        return Bm25System(index, opening.depth)


def _bm25s() -> ModuleType:
    """The library; it would log its steps whatever the level of the program."""
    import bm25s

    logging.getLogger("bm25s").setLevel(logging.WARNING)
    return bm25s


def _stop_words(name: str) -> frozenset[str]:
    """A list of bm25s; none for ""."""
    if name == "english":
        return ENGLISH
    from bm25s.tokenization import Tokenizer

    try:
        listed = Tokenizer(stopwords=name or None).stopwords or ()
        return frozenset(map(str.casefold, listed))
    except ValueError as error:
        raise ValueError(f"Bm25.stop_words = {name!r}: {error}") from None


def _words(settings: Bm25, *, alone: bool = False) -> Callable[[str], Iterable[str]]:
    """Text -> its words without stop words, or their stems. alone: see `words.words`."""
    stop_words = _stop_words(settings.stop_words)
    stem = Stemmer.Stemmer(settings.algorithm).stemWords if settings.algorithm else None

    def words_of(text: str) -> Iterable[str]:
        kept = [word for word in words.words(text, alone=alone) if word not in stop_words]
        return stem(kept) if stem else kept

    return words_of
