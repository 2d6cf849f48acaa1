"""The words of a corpus and what they count by BM25: kept in a folder, changed with the corpus."""

from __future__ import annotations

import hashlib
import logging
from array import array
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

from dgr_jax.corpora.words import RULES
from dgr_jax.decoding import array_folder
from dgr_jax.model_dir import kept
from dgr_jax.settings import fingerprint

logger = logging.getLogger(__name__)

PLANS = "plans"  # folder of the prepare stage, and of a version of the index
_FORMAT, _VERSION = "dgr_jax.lexical_plan", 1


class Postings(NamedTuple):
    """Word w of `words` adds impacts[i] to passage passages[i], for i from starts[w] on, below
    starts[w + 1].

    sizes: int32 [P], sentences of each passage, where these count one by one: `passages` are
    sentences then, in the order of the passages, and the best one is the score of a passage.
    """

    words: list[str]
    starts: np.ndarray
    passages: np.ndarray
    impacts: np.ndarray
    sizes: np.ndarray | None = None

    @classmethod
    def none(cls, sizes: np.ndarray | None = None) -> Postings:
        """Those of no word."""
        arrays = np.zeros(1, np.int64), np.zeros(0, np.int32), np.zeros(0, np.float32)
        return cls([], *arrays, sizes)


def of_passages(scores: np.ndarray, sizes: np.ndarray | None) -> np.ndarray:
    """The scores of passages, f32 [P], of those of what `Postings.passages` are."""
    if sizes is None:
        return scores
    return np.maximum.reduceat(scores, np.cumsum(sizes, dtype=np.int64) - sizes)


class Weighing(Protocol):
    """What is used here of the settings of BM25, a dataclass."""

    @property
    def k1(self) -> float: ...
    @property
    def b(self) -> float: ...


@dataclass(frozen=True)
class KeptPostings:
    """Postings, and what passages that come later are weighed with.

    idf: inverse document frequency of each word, f32; mean_words: words of a passage on average,
    None where an older version kept the postings, or none are there yet.
    """

    postings: Postings
    idf: np.ndarray
    mean_words: float | None

    @classmethod
    def of(cls, postings: Postings, passages: int, mean_words: float) -> KeptPostings:
        """Those of so many passages, of so many words on average."""
        return cls(postings, _idf(np.diff(postings.starts), passages), mean_words)

    def changed(
        self, bm25: Weighing, stay: np.ndarray, added: Iterable[Sequence[Mapping[str, float]]]
    ) -> KeptPostings:
        """Those of the passages that stay, bool [P], and then of others: word -> occurrences, of
        each of their sentences, or of the passage as one.

        What a known word counts, and the average length, stay as they were; without one, it is
        that of the others. A new word counts what it would among all passages.
        """
        known, sizes = len(self.postings.words), self.postings.sizes
        places = {word: i for i, word in enumerate(self.postings.words)}
        words, counts, distinct, cut = array("i"), array("d"), array("i"), array("i")
        for of in added:
            cut.append(len(of))
            for counted in of:
                words.extend(places.setdefault(word, len(places)) for word in counted)
                counts.extend(counted.values())
                distinct.append(len(counted))
        word, count = np.frombuffer(words, np.int32), np.frombuffer(counts)
        owner = np.repeat(np.arange(len(distinct), dtype=np.int32), distinct)
        if sizes is not None:
            stay, before = np.repeat(stay, sizes), sizes[stay]
            sizes = np.concatenate([before, np.array(cut, np.int32)])
        staying = int(np.count_nonzero(stay))
        frequency = np.bincount(word[word >= known] - known, minlength=len(places) - known)
        idf = np.append(self.idf, _idf(frequency, staying + len(distinct))).astype(np.float32)
        length, mean = np.bincount(owner, count, len(distinct)), self.mean_words
        mean = float(length.mean()) if mean is None else mean
        norm = bm25.k1 * (1 - bm25.b + bm25.b * length / max(mean, 1e-9))
        impacts = (idf[word] * count / (norm[owner] + count)).astype(np.float32)
        merged = _merged(self.postings, stay, list(places), (word, owner + staying, impacts))
        return KeptPostings(merged._replace(sizes=sizes), idf, mean)

    def save(self, folder: Path, bm25: Weighing, pids: Sequence[str]) -> None:
        """Writes them to `folder`, of the passages with these pids."""
        words = np.frombuffer("\n".join(self.postings.words).encode(), np.uint8)
        arrays = self.postings._asdict() | {"words": words, "idf": self.idf}
        if arrays["sizes"] is None:
            del arrays["sizes"]
        settings = {
            "corpus": _corpus(pids),
            "mean_words": self.mean_words,
            "rules": RULES,
            "bm25": _described(bm25),
        }
        array_folder.save(folder, arrays, kind=_FORMAT, version=_VERSION, settings=settings)

    @classmethod
    def load(cls, folder: Path, pids: Sequence[str]) -> KeptPostings | None:
        """What was kept in a folder; None where nothing whole is there, or words by other rules.

        Raises ValueError where it is of another corpus.
        """
        if not (folder / "header.json").is_file():
            return None
        corpus = _corpus(pids)
        needed = {"corpus": corpus, "sha256": ("words", "starts", "passages", "impacts")}
        try:
            arrays, header = array_folder.load(
                folder, kind=_FORMAT, version=_VERSION, needed=needed
            )
        except kept.Damaged as damage:
            logger.warning("%s; the plan is made again", damage.what)
            return None
        if header["corpus"] != corpus:
            raise ValueError(
                f"{folder}: is the plan of another corpus: got one of "
                f"{header['corpus']['passages']:,} passages, expected the {corpus['passages']:,} "
                "that are prepared; remove the folder to make it again"
            )
        words = arrays.pop("words").tobytes().decode()
        if header.get("rules", 1) != RULES and not words.isascii():
            logger.info("%s: has words by the rules of another version; made again", folder)
            return None
        idf = arrays.pop("idf", None)
        postings = Postings(words=words.split("\n") if words else [], **arrays)
        if idf is None:
            idf = _idf(np.diff(postings.starts), len(pids))
        return cls(postings, idf, header.get("mean_words"))


def place(folder: Path, bm25: Weighing) -> Path:
    """Where the postings of these settings are kept below `folder`."""
    return folder / f"lexical-{fingerprint(_described(bm25))}"


def _merged(
    old: Postings, stay: np.ndarray, words: list[str], added: tuple[np.ndarray, ...]
) -> Postings:
    """The entries of passages that stay, renumbered, and those that are added: word, passage and
    impact, by passage; the words of `old` come first among `words`."""
    keep = stay[old.passages]
    of_old = np.repeat(np.arange(len(old.words)), np.diff(old.starts))[keep]
    sizes = np.bincount(of_old, minlength=len(words))
    word, passage, impact = added
    order = np.argsort(word, kind="stable")
    ends = np.cumsum(sizes)[word[order]]
    number = (np.cumsum(stay) - 1).astype(old.passages.dtype)
    passages = np.insert(number[old.passages[keep]], ends, passage[order])
    impacts = np.insert(old.impacts[keep], ends, impact[order])
    starts = np.append(0, np.cumsum(sizes + np.bincount(word, minlength=len(words))))
    return Postings(words, starts.astype(np.int64), passages, impacts)


def _idf(frequency: np.ndarray, passages: int) -> np.ndarray:
    """f32: log(1 + (N - n + .5) / (n + .5)) of words in n of N passages (Lucene)."""
    return np.log1p((passages - frequency + 0.5) / (frequency + 0.5)).astype(np.float32)


def _described(bm25: Any) -> dict[str, Any]:
    """The settings as JSON; without those that came later, where they have no effect."""
    later = ("grams", "queries_weight", "sentences")
    return {name: value for name, value in asdict(bm25).items() if name not in later or value}


def _corpus(pids: Sequence[str]) -> dict[str, Any]:
    return {"passages": len(pids), "pids": hashlib.sha256("\n".join(pids).encode()).hexdigest()}
