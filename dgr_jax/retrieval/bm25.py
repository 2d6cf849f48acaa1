"""BM25 over a corpus: the baseline beside every student, and a teacher."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np

from dgr_jax.corpora.types import ScoredPassage

if TYPE_CHECKING:
    from dgr_jax.corpora.store import PassageStore

_FORMAT = "dgr_jax bm25 index"
_VERSION = 1
_HEADER = "bm25.json"
_WORD = re.compile(r"\b\w\w+\b")


@dataclass(frozen=True)
class Bm25:
    """Settings of BM25 (Robertson; Lucene's form of the inverse document frequency).

    k1: how soon more occurrences of a word stop counting. b: how much long passages are marked
    down. stop_words: a list of bm25s ("english", ...) or "" for none. stemmer: a language of
    PyStemmer ("english", ...), which must then be installed; "" for none.
    """

    k1: float = 0.9
    b: float = 0.4
    stop_words: str = "english"
    stemmer: str = ""

    def fit(self, store: PassageStore) -> Bm25Index:
        """Indexes title and text of every passage."""
        if len(store) == 0:
            raise ValueError("the corpus has no passages to index")
        words = _words(self)
        vocabulary: dict[str, int] = {}
        ids = [
            [vocabulary.setdefault(word, len(vocabulary)) for word in words(passage.contents)]
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
        self._settings = settings
        self._model = model
        self._vocabulary = vocabulary
        self._pids = pids
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
        if k < 1:
            raise ValueError(f"Bm25 search: got k = {k}, expected 1 or more")
        return {qid: self._best(self.scores(text), k) for qid, text in queries.items()}

    def _best(self, scores: np.ndarray, k: int) -> list[ScoredPassage]:
        threshold = 0.0
        if k < len(scores):
            threshold = np.partition(scores, len(scores) - k)[len(scores) - k]
        # All passages as good as the k-th stay in, so that pids decide between equals.
        found = np.flatnonzero((scores >= threshold) & (scores > 0))
        listed = [ScoredPassage(self._pids[i], float(scores[i])) for i in found]
        return sorted(listed, key=lambda passage: (-passage.score, passage.pid))[:k]

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Writes the index; the passages themselves stay in their store."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / _HEADER).unlink(missing_ok=True)
        if self._model is not None:
            self._model.save(folder)
        header = {
            "format": _FORMAT,
            "version": _VERSION,
            "settings": asdict(self._settings),
            "passages": len(self._pids),
            "pids": _digest(self._pids),
            "words": len(self._vocabulary),
        }
        (folder / _HEADER).write_text(json.dumps(header, indent=2) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, folder: str | os.PathLike[str], store: PassageStore) -> Bm25Index:
        """Opens a saved index of this store; its arrays are memory mapped.

        Raises FileNotFoundError when there is none, ValueError when it is not whole or was made
        from other passages.
        """
        folder = Path(folder)
        header = _read_header(folder / _HEADER)
        pids = store.pids
        if header["passages"] != len(pids) or header["pids"] != _digest(pids):
            raise ValueError(
                f"{folder}: got an index of {header['passages']} passages that are not the "
                f"{len(pids)} of this corpus; make the index again"
            )
        settings = Bm25(**header["settings"])
        if not header["words"]:
            return cls(settings, None, {}, pids)
        try:
            model = _bm25s().BM25.load(folder, mmap=True)
        except (OSError, ValueError, EOFError, KeyError) as error:
            raise ValueError(f"{folder}: not whole ({error}); make the index again") from None
        return cls(settings, model, model.vocab_dict, pids)


def _bm25s() -> ModuleType:
    """The library; it would log its steps whatever the level of the program."""
    import bm25s

    logging.getLogger("bm25s").setLevel(logging.WARNING)
    return bm25s


def _words(settings: Bm25) -> Callable[[str], Iterable[str]]:
    """Text -> its words: lower case, two characters and more, no stop words, stemmed on demand."""
    from bm25s.tokenization import Tokenizer

    try:
        stop_words = frozenset(Tokenizer(stopwords=settings.stop_words or None).stopwords or ())
    except ValueError as error:
        raise ValueError(f"Bm25.stop_words = {settings.stop_words!r}: {error}") from None
    stem = _stemmer(settings.stemmer)

    def words(text: str) -> Iterable[str]:
        kept = [word for word in _WORD.findall(text.lower()) if word not in stop_words]
        return stem(kept) if stem else kept

    return words


def _stemmer(language: str) -> Callable[[list[str]], list[str]] | None:
    if not language:
        return None
    try:
        import Stemmer
    except ImportError:
        raise ImportError("Bm25.stemmer needs PyStemmer: pip install PyStemmer") from None
    try:
        return Stemmer.Stemmer(language).stemWords
    except KeyError:
        raise ValueError(
            f"Bm25.stemmer = {language!r}, expected one of {sorted(Stemmer.algorithms())}"
        ) from None


def _digest(pids: list[str]) -> str:
    digest = hashlib.sha256()
    for pid in pids:
        digest.update(pid.encode() + b"\n")
    return digest.hexdigest()


def _read_header(path: Path) -> dict[str, Any]:
    if not path.exists():
        raise FileNotFoundError(f"{path.parent}: no BM25 index here ({path.name} is missing)")
    try:
        header = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not a BM25 index header: {error}") from None
    made_by = (header.get("format"), header.get("version")) if isinstance(header, dict) else None
    if made_by != (_FORMAT, _VERSION):
        raise ValueError(f"{path}: expected {_FORMAT!r} version {_VERSION}; make the index again")
    return header
