"""Plans: scores of all passages from one pass over a query, before a student writes anything.

The n best passages of a plan are the planned passages of a query: the only ones whose identifiers
the student may write, or whose identifiers it scores (see `retrieval.planned`).

Axis letters: B queries, P passages, n planned passages of a query.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, Protocol, Self

import numpy as np

from dgr_jax import ranges
from dgr_jax.retrieval import kept_postings, plan_sizes
from dgr_jax.retrieval.bm25 import Bm25, places
from dgr_jax.retrieval.kept_postings import KeptPostings, Postings, of_passages
from dgr_jax.retrieval.plan_sizes import PlanSizes
from dgr_jax.settings import unless_default

if TYPE_CHECKING:
    from dgr_jax.corpora.store import PassageStore

PLANNED = 100  # passages of a query, where no number is given
RANKED_BY = ("beams", "identifiers", "plan")

_RARE = 8  # a word is common that stands in more than one of so many passages


class PlannedPassages(NamedTuple):
    """passages int32 [B, n], best first, and their plan scores f32 [B, n]; -1 and -inf where fewer
    are planned."""

    passages: np.ndarray
    scores: np.ndarray


class Planner(Protocol):
    """A plan of a corpus, ready to score its passages."""

    @property
    def nbytes(self) -> int: ...

    def scores(self, texts: Sequence[str]) -> np.ndarray:
        """f32 [B, P]: the plan score of every passage."""

    def best(
        self, texts: Sequence[str], count: int, allowed: np.ndarray | None = None
    ) -> PlannedPassages:
        """The `count` best passages of each query, equal ones in the order of their pids; among
        those allowed, bool [P]."""


class Plan(Protocol):
    """Settings of a plan, and of what is done with it: see `Lexical`, whose first four they are.

    of_any_student: whether students with identifiers of several views may have it too.
    """

    of_any_student: ClassVar[bool]

    @property
    def planned(self) -> int | None: ...
    @property
    def ranked_by(self) -> str: ...
    @property
    def num_beams(self) -> int: ...
    @property
    def weight(self) -> float | None: ...

    @property
    def most(self) -> int:
        """Passages that are planned for a query, at most."""

    def of_corpus(self, num_passages: int) -> Self:
        """These settings with a number of planned passages that so many passages have."""

    @property
    def searched(self) -> tuple[str, ...]:
        """The settings that whoever opens a system with it may give; all others are of training."""

    def once_trained(self) -> Self:
        """The settings without those of training alone, which are not kept with a system."""

    def sizes(self, passages: int, words: float, sample: Sequence[str] = ()) -> PlanSizes:
        """What a plan of so many passages would need, of so many words each; sample: texts of some
        of them, evenly spread, or of all, which make it exact."""


def check_plan(plan: Any) -> None:
    """Raises ValueError where what is done with a plan cannot be."""
    ranges.check(
        plan,
        planned=ranges.optional(ranges.at_least(1)),
        ranked_by=ranges.one_of(*RANKED_BY),
        num_beams=ranges.at_least(1),
        weight=ranges.optional(ranges.above(0)),
    )
    name = type(plan).__name__
    if plan.ranked_by == "beams" and plan.num_beams > plan.most:
        raise ValueError(
            f"{name}.num_beams: got {plan.num_beams}, expected at most {plan.most}, "
            f"{name}.planned: beams write identifiers of planned passages alone"
        )


def of_corpus(plan: Any, num_passages: int) -> Any:
    """See Plan."""
    if plan.planned is not None:
        return plan
    planned = min(PLANNED, num_passages)
    return replace(plan, planned=planned, num_beams=min(plan.num_beams, planned))


@dataclass(frozen=True)
class Lexical:
    """A plan by the words that passages share with the query: BM25. There is nothing to train.

    planned: passages that are planned for each query, at most: those that share a word with it.
      Where there are fewer (of several views: fewer than beams), the student searches all passages
      too, and the others count 0 here.
      None: 100, or all passages of a smaller corpus.
    ranked_by: what they are ranked by:
      'beams': plan score + weight * log p(identifier), of those whose identifiers a beam search
        writes that the plan guides; the other ones come after these, in the order of the plan. Of
        a student of several views, whose body spans are not guided: plan score + weight * the root
        of its passage score (Scoring.exponent), of the passages of both;
      'identifiers': the same, of all: their identifiers are scored in one pass of the decoder;
      'plan': the plan score alone, without the student.
    num_beams: identifiers that are written, in each view where there are several. With as many as
      are planned, all are.
    weight: of the log-probability. The default is a number that held-out training questions of two
      small collections agreed on (.2 to .3 on SQuAD, .1 to .2 on the embedded one, where .05 to .7
      differ by .015 RR@10); it is not fitted to others. None: an evaluation chooses the weight on
      the questions held out of training (`Prepare.validation`), and says on how many.
    bm25: what words are, and what they count.
    grams, grams_weight: the plan score is that of words + grams_weight * BM25 of n-grams of so many
      characters (`Bm25.grams`), which meet where words are spelled or put together otherwise. On
      held-out training questions of SQuAD 5 of weight .2 gain .02 RR@10 beside a student; on the
      embedded collection nothing. They take several times the memory and time of words. 0: none.
    queries_weight: what words and n-grams of the training queries count that passages are positives
      of (`Bm25.queries_weight`). 0: passages alone.
    sentences_weight: of the best sentence of a passage by the same words and n-grams, which is
      added (`Bm25.sentences`). 0: passages alone. See docs/studies.md for what each of them gains.
    """

    planned: int | None = None
    ranked_by: str = "beams"
    num_beams: int = 10
    weight: float | None = 0.2
    bm25: Bm25 = Bm25()
    grams: int = unless_default(0)
    grams_weight: float = unless_default(0.2)
    queries_weight: float = unless_default(0.0)
    sentences_weight: float = unless_default(0.0)

    searched: ClassVar[tuple[str, ...]] = (
        *("planned", "ranked_by", "num_beams", "weight", "bm25", "grams", "grams_weight"),
        *("queries_weight", "sentences_weight"),
    )
    of_any_student: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_plan(self)
        ranges.check(
            self,
            grams=ranges.at_least(0),
            grams_weight=ranges.above(0),
            queries_weight=ranges.at_least(0),
            sentences_weight=ranges.at_least(0),
        )

    @property
    def most(self) -> int:
        """See Plan."""
        return PLANNED if self.planned is None else self.planned

    def of_corpus(self, num_passages: int) -> Lexical:
        """See Plan."""
        return of_corpus(self, num_passages)

    def once_trained(self) -> Lexical:
        """See Plan."""
        return self

    def planner(
        self, store: PassageStore, folder: Path | None = None, *, keep: bool = False
    ) -> LexicalPlanner:
        """The plan of a corpus: one that is kept in `folder`, or made now; keep: it stays there.

        Raises ValueError for a kept one of another corpus.
        """
        return LexicalPlanner(
            [(bm25, _postings(bm25, store, folder, keep), weight) for bm25, weight in self._summed],
            store.pids,
        )

    @property
    def _summed(self) -> tuple[tuple[Bm25, float], ...]:
        """What the plan score is the sum of, and by which weights."""
        passages = self.bm25
        if self.queries_weight:
            passages = replace(passages, queries_weight=self.queries_weight)
        of = [(passages, 1.0)]
        if self.sentences_weight:
            sentences = replace(self.bm25, queries_weight=0.0, sentences=True)
            of.append((sentences, self.sentences_weight))
        if self.grams:
            of += [(replace(b, grams=self.grams), self.grams_weight * weight) for b, weight in of]
        return tuple(of)

    def sizes(self, passages: int, words: float, sample: Sequence[str] = ()) -> PlanSizes:
        """See Plan."""
        planned = self.of_corpus(passages).planned or 0
        return plan_sizes.summed(
            plan_sizes.of_words(
                bm25.reader(alone=True),
                sample,
                passages,
                words,
                planned,
                _RARE,
                grams=bm25.grams,
                sentences=bm25.sentences,
            )
            for bm25, _ in self._summed
        )


def _postings(bm25: Bm25, store: PassageStore, folder: Path | None, keep: bool) -> Postings:
    """Those that are kept in a folder, or made now; keep: they stay there."""
    own = folder and kept_postings.place(folder, bm25)
    held = KeptPostings.load(own, store.pids) if own else None
    if held is None:
        held = bm25.fit(store).kept()
        if own and keep:
            held.save(own, bm25, store.pids)
    return held.postings


class LexicalPlanner:
    """The words of a corpus, and its n-grams, and what each adds to the scores of passages.

    of: settings, postings and weight of each BM25 that is summed.
    """

    def __init__(self, of: Sequence[tuple[Bm25, Postings, float]], pids: Sequence[str]) -> None:
        self._pids = pids
        self._parts = [_Part(*part, num_passages=len(pids)) for part in of]

    @property
    def nbytes(self) -> int:
        """Bytes of what a search reads."""
        return sum(part.nbytes for part in self._parts)

    def scores(self, texts: Sequence[str]) -> np.ndarray:
        """See Planner; 0 for passages without a word of the query."""
        scores = np.zeros((len(texts), len(self._pids)), np.float32)
        for row, text in zip(scores, texts, strict=True):
            self._add(text, row)
        return scores

    def best(
        self, texts: Sequence[str], count: int, allowed: np.ndarray | None = None
    ) -> PlannedPassages:
        """See Planner."""
        passages = np.full((len(texts), count), -1, np.int32)
        best = np.full((len(texts), count), -np.inf, np.float32)
        scores = np.zeros(len(self._pids), np.float32)
        for place, text in enumerate(texts):
            self._add(text, scores)
            chosen = places(scores if allowed is None else scores * allowed, count, self._pids)
            passages[place, : len(chosen)] = chosen
            best[place, : len(chosen)] = scores[chosen]
            scores[:] = 0
        return PlannedPassages(passages, best)

    def _add(self, text: str, scores: np.ndarray) -> None:
        """Adds to scores f32 [P] what a text counts."""
        for part in self._parts:
            part.add(text, scores)


class _Part:
    """What one BM25 adds: kept by word and passage (postings), of words in more than every eighth
    passage as one number for each passage too, which is added several times as fast."""

    def __init__(self, bm25: Bm25, postings: Postings, weight: float, num_passages: int) -> None:
        if weight != 1:
            postings = postings._replace(impacts=postings.impacts * np.float32(weight))
        self._postings = postings
        self._words_of = bm25.reader()
        self._word = {word: i for i, word in enumerate(postings.words)}
        self._count = count = num_passages if postings.sizes is None else int(postings.sizes.sum())
        common = np.flatnonzero(np.diff(postings.starts) > count / _RARE)
        self._common = {i: np.zeros(count, np.float32) for i in common.tolist()}
        for i, row in self._common.items():
            part = slice(postings.starts[i], postings.starts[i + 1])
            row[postings.passages[part]] = postings.impacts[part]

    @property
    def nbytes(self) -> int:
        postings = self._postings
        arrays = [array for array in postings[1:] if array is not None]
        arrays += self._common.values()
        return sum(array.nbytes for array in arrays) + sum(map(len, postings.words))

    def add(self, text: str, scores: np.ndarray) -> None:
        """Adds to scores f32 [P] what the words of a text count."""
        if self._postings.sizes is None:
            self._add(text, scores)
        else:
            of_sentences = np.zeros(self._count, np.float32)
            self._add(text, of_sentences)
            scores += of_passages(of_sentences, self._postings.sizes)

    def _add(self, text: str, scores: np.ndarray) -> None:
        """The same, to scores of what `Postings.passages` are."""
        _, starts, passages, impacts, _ = self._postings
        for word in self._words_of(text):
            i = self._word.get(word)
            if i in self._common:
                scores += self._common[i]
            elif i is not None:
                part = slice(starts[i], starts[i + 1])
                np.add.at(scores, passages[part], impacts[part])
