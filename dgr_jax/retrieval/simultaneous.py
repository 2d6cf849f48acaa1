"""Plans: scores of all passages from one pass over a query, before a student writes anything.

The n best passages of a plan are the planned passages of a query: the only ones whose identifiers
the student may write, or whose identifiers it scores (see `retrieval.planned`).

Axis letters: B queries, P passages, n planned passages of a query.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np

from dgr_jax import ranges
from dgr_jax.decoding import array_folder
from dgr_jax.retrieval.bm25 import Bm25, Postings

if TYPE_CHECKING:
    from dgr_jax.corpora.store import PassageStore

RANKED_BY = ("beams", "identifiers", "plan")

_FORMAT, _VERSION = "dgr_jax.lexical_plan", 1


class Planned(NamedTuple):
    """passages int32 [B, n], best first, and their plan scores f32 [B, n]; -1 and -inf where fewer
    are planned."""

    passages: np.ndarray
    scores: np.ndarray


class Planner(Protocol):
    """A plan of a corpus, ready to score its passages."""

    nbytes: int

    def save(self, folder: Path) -> None:
        """For `Plan.planner`."""

    def scores(self, texts: Sequence[str]) -> np.ndarray:
        """f32 [B, P]: the plan score of every passage."""

    def best(self, texts: Sequence[str], count: int, allowed: np.ndarray | None = None) -> Planned:
        """The `count` best passages of each query, equal ones in the order of the corpus; among
        those allowed, bool [P]."""


class Plan(Protocol):
    """Settings of a plan, and of what is done with it: see `Lexical`, whose first four they are."""

    planned: int
    ranked_by: str
    beams: int
    weight: float

    def planner(self, store: PassageStore, folder: Path | None = None) -> Planner:
        """The plan of a corpus: the one that was saved in a folder, or made now where none was.

        Raises ValueError for one that was saved of another corpus or by other settings.
        """


@dataclass(frozen=True)
class Lexical:
    """A plan by the words that passages share with the query: BM25. There is nothing to train.

    planned: passages that are planned for each query, at most: those that share a word with it.
    ranked_by: what they are ranked by:
      'beams': plan score + weight * log p(identifier), of those whose identifiers a beam search
        writes that the plan guides; the other ones come after these, in the order of the plan;
      'identifiers': the same, of all: their identifiers are scored in one pass of the decoder;
      'plan': the plan score alone, without the student.
    beams: identifiers that are written. With as many as are planned, all are.
    weight: of the log-probability. On held-out training questions of SQuAD .2 to .3 was best for
      the impacts of BM25; .25 is not fitted to other collections.
    bm25: what words are, and what they count.
    """

    planned: int = 100
    ranked_by: str = "beams"
    beams: int = 10
    weight: float = 0.25
    bm25: Bm25 = Bm25()

    def __post_init__(self) -> None:
        ranges.check(
            self,
            planned=ranges.at_least(1),
            ranked_by=ranges.one_of(*RANKED_BY),
            beams=ranges.at_least(1),
            weight=ranges.above(0),
        )
        if self.ranked_by == "beams" and self.beams > self.planned:
            raise ValueError(
                f"Lexical.beams: got {self.beams}, expected at most {self.planned}, "
                "Lexical.planned: beams write identifiers of planned passages alone"
            )

    def planner(self, store: PassageStore, folder: Path | None = None) -> LexicalPlanner:
        corpus = hashlib.sha256("\n".join(store.pids).encode()).hexdigest()
        made_of = {"bm25": asdict(self.bm25), "passages": len(store), "pids": corpus}
        if folder is None or not folder.exists():
            postings = self.bm25.fit(store).postings()
        else:
            postings = _load(folder, made_of)
        return LexicalPlanner(self.bm25, postings, made_of)


class LexicalPlanner:
    """The words of a corpus, and what each adds to the scores of passages."""

    def __init__(self, bm25: Bm25, postings: Postings, made_of: dict[str, Any]) -> None:
        """made_of: JSON that tells settings and corpora apart."""
        self._postings, self._made_of = postings, made_of
        self._words_of = bm25.reader()
        self._word = {word: i for i, word in enumerate(postings.words)}
        self._num_passages = made_of["passages"]

    @property
    def nbytes(self) -> int:
        """Of what a search reads."""
        postings = self._postings
        return sum(a.nbytes for a in postings[1:]) + sum(len(word) for word in postings.words)

    def scores(self, texts: Sequence[str]) -> np.ndarray:
        """See Planner; 0 for passages without a word of the query."""
        scores = np.zeros((len(texts), self._num_passages), np.float32)
        for row, text in zip(scores, texts, strict=True):
            self._add(text, row)
        return scores

    def best(self, texts: Sequence[str], count: int, allowed: np.ndarray | None = None) -> Planned:
        """See Planner."""
        passages = np.full((len(texts), count), -1, np.int32)
        best = np.full((len(texts), count), -np.inf, np.float32)
        scores = np.zeros(self._num_passages, np.float32)
        for place, text in enumerate(texts):
            self._add(text, scores)
            chosen = _largest(scores if allowed is None else scores * allowed, count)
            passages[place, : len(chosen)] = chosen
            best[place, : len(chosen)] = scores[chosen]
            scores[:] = 0
        return Planned(passages, best)

    def _add(self, text: str, scores: np.ndarray) -> None:
        """Adds to scores f32 [P] what the words of a text count."""
        _, starts, passages, impacts = self._postings
        for word in self._words_of(text):
            if (i := self._word.get(word)) is not None:
                part = slice(starts[i], starts[i + 1])
                scores[passages[part]] += impacts[part]  # a passage stands once in it

    def save(self, folder: Path) -> None:
        """See Planner."""
        words = np.frombuffer("\n".join(self._postings.words).encode(), np.uint8)
        arrays = self._postings._asdict() | {"words": words}
        settings = {"made_of": self._made_of}
        array_folder.save(folder, arrays, kind=_FORMAT, version=_VERSION, settings=settings)


def _load(folder: Path, made_of: dict[str, Any]) -> Postings:
    needed = {"made_of": made_of, "sha256": Postings._fields}
    arrays, header = array_folder.load(folder, kind=_FORMAT, version=_VERSION, needed=needed)
    for name, expected in made_of.items():
        if (saved := header["made_of"][name]) != expected:
            raise ValueError(
                f"{folder}: is a plan of other {name} than these: got {saved}, expected "
                f"{expected}; remove the folder to make it again"
            )
    words = arrays.pop("words").tobytes().decode()
    return Postings(words=words.split("\n") if words else [], **arrays)


def _largest(scores: np.ndarray, count: int) -> np.ndarray:
    """Places of the `count` largest scores above 0, largest first, equal ones in their order."""
    least = np.float32(0)
    if count < len(scores):
        least = np.partition(scores, len(scores) - count)[len(scores) - count]
    places = np.flatnonzero((scores >= least) & (scores > 0))
    return places[np.argsort(-scores[places], kind="stable")[:count]]
