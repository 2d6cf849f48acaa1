"""Teachers order candidates; recipes cut rank lists from their order.

A teacher gets queries and, for each, candidate passages (what the student retrieved). The judged
passages are always scored with them. It returns `qid -> [ScoredPassage]`, best first; a passage
that the teacher cannot score stays out of the list, for a made-up score would teach a made-up
order. A recipe then makes the arrays that distillation reads.
"""

from __future__ import annotations

import itertools
import logging
import zlib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from dgr_jax.corpora import lines, trec
from dgr_jax.corpora.types import RankList, ScoredPassage
from dgr_jax.identifiers.embeddings import load_sentence_transformer, load_vectors
from dgr_jax.retrieval.bm25 import Bm25

if TYPE_CHECKING:
    from dgr_jax.corpora.store import PassageStore

_log = logging.getLogger(__name__)

_BLOCK = 256  # queries that a neural teacher scores together

Ranked = dict[str, list[ScoredPassage]]
Queries = Mapping[str, str]
Candidates = Mapping[str, Sequence[str]]
Qrels = Mapping[str, Mapping[str, int]]


@dataclass(frozen=True, kw_only=True)
class Teacher(ABC):
    """What all teachers share.

    judged_first: positives of the qrels come first, higher grades before lower ones, whatever the
    teacher says of them, and also where it says nothing. A positive whose score is not above the
    next passage's gets that score plus the mean gap between neighbours of the list.
    """

    judged_first: bool = False

    def rank(
        self,
        queries: Queries,
        candidates: Candidates,
        store: PassageStore,
        qrels: Qrels,
        *,
        min_relevance: int = 1,
    ) -> Ranked:
        """The teacher's lists, in the order of `queries`; logs the report."""
        ranked, report = self.rank_and_report(
            queries, candidates, store, qrels, min_relevance=min_relevance
        )
        _log.info("%s: %s", type(self).__name__, report)
        return ranked

    def rank_and_report(
        self,
        queries: Queries,
        candidates: Candidates,
        store: PassageStore,
        qrels: Qrels,
        *,
        min_relevance: int = 1,
    ) -> tuple[Ranked, dict[str, float]]:
        """`rank`, and how far the teacher covers the candidates and agrees with the qrels.

        The report is that of `report`, on the teacher's own order: before judged passages are
        moved to the front. Queries without candidates and positives get an empty list.
        """
        positives = {qid: _positives(qrels.get(qid, {}), store, min_relevance) for qid in queries}
        pools = {
            qid: list(dict.fromkeys(itertools.chain(candidates.get(qid, ()), positives[qid])))
            for qid in queries
        }
        own: Ranked = {qid: [] for qid in queries}
        own.update(self._order(queries, pools, store))
        summary = report(own, candidates, positives)
        if not self.judged_first:
            return own, summary
        return {qid: judged_first(own[qid], positives[qid]) for qid in queries}, summary

    @abstractmethod
    def _order(
        self, queries: Queries, pools: Mapping[str, list[str]], store: PassageStore
    ) -> Iterable[tuple[str, list[ScoredPassage]]]:
        """(qid, passages of its pool that the teacher can score, best first)."""


@dataclass(frozen=True)
class RunTeacher(Teacher):
    """An order made elsewhere: a TREC run (six columns) or a table qid, pid, score; also .gz.

    pool: "candidates" orders those candidates (and judged passages) that the run holds; "run" takes
    the run's own lists, whatever the student found: for runs too short to hold the student's
    candidates. Passages that are not in the corpus are left out. Equal scores of a run keep the
    order of its ranks.
    """

    path: str
    pool: str = "candidates"

    def _order(
        self, queries: Queries, pools: Mapping[str, list[str]], store: PassageStore
    ) -> Iterator[tuple[str, list[ScoredPassage]]]:
        if self.pool not in ("candidates", "run"):
            raise ValueError(f"RunTeacher.pool = {self.pool!r}, expected 'candidates' or 'run'")
        found = unknown = 0
        for rank_list in _read_run(self.path):
            if rank_list.qid not in pools:
                continue
            found += 1
            listed = rank_list.passages
            if self.pool == "candidates":
                wanted = set(pools[rank_list.qid])
                yield rank_list.qid, [p for p in listed if p.pid in wanted]
                continue
            known = [p for p in listed if _is_known(store, p.pid)]
            unknown += len(listed) - len(known)
            yield rank_list.qid, known
        if unknown:
            _log.warning("%s: left out %d passages not in the corpus", self.path, unknown)
        if not found:
            raise ValueError(
                f"RunTeacher.path = {self.path!r}: none of the {len(pools)} queries is in this run"
            )


@dataclass(frozen=True)
class Bm25Teacher(Teacher):
    """BM25 over the whole corpus; by default with the judged passages first."""

    bm25: Bm25 = field(default_factory=Bm25)
    judged_first: bool = field(default=True, kw_only=True)

    def _order(
        self, queries: Queries, pools: Mapping[str, list[str]], store: PassageStore
    ) -> Iterator[tuple[str, list[ScoredPassage]]]:
        index = self.bm25.fit(store)
        for qid, pids in pools.items():
            rows = [store.index_of(pid) for pid in pids]
            yield qid, best_first(pids, index.scores(queries[qid])[rows])


@dataclass(frozen=True)
class CrossEncoderTeacher(Teacher):
    """A sentence-transformers cross-encoder (extra `encoders`).

    model: a local folder or a hub id. max_length: tokens of query and passage together.
    """

    model: str = "cross-encoder/ms-marco-MiniLM-L-6-v2"
    batch_size: int = 64
    max_length: int = 512

    def _order(
        self, queries: Queries, pools: Mapping[str, list[str]], store: PassageStore
    ) -> Iterator[tuple[str, list[ScoredPassage]]]:
        encoder = self._load()
        for block in _blocks(pools):
            pairs = [
                (queries[qid], store[store.index_of(pid)].contents)
                for qid in block
                for pid in pools[qid]
            ]
            if not pairs:
                continue
            scores = np.asarray(
                encoder.predict(pairs, batch_size=self.batch_size, show_progress_bar=False)
            )
            if scores.shape != (len(pairs),):
                raise ValueError(
                    f"CrossEncoderTeacher.model = {self.model!r}: got scores of shape "
                    f"{scores.shape} for {len(pairs)} pairs, expected one number a pair"
                )
            first = 0
            for qid in block:
                last = first + len(pools[qid])
                yield qid, best_first(pools[qid], scores[first:last])
                first = last

    def _load(self) -> Any:
        try:
            from sentence_transformers import CrossEncoder
        except ImportError:
            raise ImportError(
                "CrossEncoderTeacher.model needs the extra 'dgr_jax[encoders]': "
                "pip install 'dgr_jax[encoders]'"
            ) from None
        try:
            return CrossEncoder(self.model, max_length=self.max_length)
        except (OSError, ValueError) as error:
            raise ValueError(
                f"CrossEncoderTeacher.model = {self.model!r} cannot be loaded: give a local folder "
                f"of a cross-encoder, or a hub id where the network can be reached ({error})"
            ) from error


@dataclass(frozen=True)
class BiEncoderTeacher(Teacher):
    """Dot products of a sentence-transformers encoder (extra `encoders`).

    Every distinct candidate is encoded once: f32 [candidates, D] is held in memory.
    query_prefix, passage_prefix: what the model expects before its texts ("query: ").
    normalise: scale the vectors to length 1.
    """

    model: str = "sentence-transformers/all-MiniLM-L6-v2"
    batch_size: int = 64
    query_prefix: str = ""
    passage_prefix: str = ""
    normalise: bool = True

    def _order(
        self, queries: Queries, pools: Mapping[str, list[str]], store: PassageStore
    ) -> Iterator[tuple[str, list[ScoredPassage]]]:
        encoder = load_sentence_transformer(self.model, "BiEncoderTeacher.model")
        rows = {pid: row for row, pid in enumerate(dict.fromkeys(itertools.chain(*pools.values())))}
        texts = (self.passage_prefix + store[store.index_of(pid)].contents for pid in rows)
        parts = [self._encode(encoder, part) for part in _batched(texts, 4096)]
        passages = np.concatenate(parts) if parts else np.zeros((0, 1), np.float32)
        for block in _blocks(pools):
            vectors = self._encode(encoder, [self.query_prefix + queries[qid] for qid in block])
            for qid, vector in zip(block, vectors, strict=True):
                listed = [rows[pid] for pid in pools[qid]]
                yield qid, best_first(pools[qid], passages[listed] @ vector)

    def _encode(self, encoder: Any, texts: list[str]) -> np.ndarray:
        vectors = encoder.encode(
            texts,
            batch_size=self.batch_size,
            normalize_embeddings=self.normalise,
            convert_to_numpy=True,
            show_progress_bar=False,
        )
        return np.asarray(vectors, np.float32)


@dataclass(frozen=True)
class VectorTeacher(Teacher):
    """Dot products of vectors computed elsewhere.

    passages_path: .npy [P, D], rows in corpus order. queries_path: .npy [queries, D].
    query_ids_path: a text file whose first column holds the qids in the order of the query
    vectors (BEIR qrels with their header serve: a qid that comes again counts once).
    Float16 or float32; queries without a vector get an empty list.
    """

    passages_path: str
    queries_path: str
    query_ids_path: str

    def _order(
        self, queries: Queries, pools: Mapping[str, list[str]], store: PassageStore
    ) -> Iterator[tuple[str, list[ScoredPassage]]]:
        passages, vectors, rows = self._open(len(store))
        for qid, pids in pools.items():
            if qid in rows and pids:
                listed = passages[[store.index_of(pid) for pid in pids]]
                vector = np.asarray(vectors[rows[qid]], np.float32)
                yield qid, best_first(pids, np.asarray(listed, np.float32) @ vector)

    def _open(self, num_passages: int) -> tuple[np.ndarray, np.ndarray, dict[str, int]]:
        passages = load_vectors(self.passages_path, "VectorTeacher.passages_path")
        vectors = load_vectors(self.queries_path, "VectorTeacher.queries_path")
        rows = {qid: row for row, qid in enumerate(_first_column(self.query_ids_path))}
        if len(passages) != num_passages:
            raise ValueError(
                f"VectorTeacher.passages_path = {self.passages_path!r}: got {len(passages)} "
                f"vectors, expected one for each of {num_passages} passages"
            )
        if passages.shape[1] != vectors.shape[1]:
            raise ValueError(
                f"VectorTeacher.queries_path = {self.queries_path!r}: got {vectors.shape[1]} "
                f"dimensions, expected {passages.shape[1]} as in the passages"
            )
        if len(rows) != len(vectors):
            raise ValueError(
                f"VectorTeacher.query_ids_path = {self.query_ids_path!r}: got {len(rows)} "
                f"different qids, expected one for each of {len(vectors)} query vectors"
            )
        return passages, vectors, rows


def best_first(pids: Sequence[str], scores: np.ndarray) -> list[ScoredPassage]:
    """Passages by falling score, ties by pid; those with a score of nan are left out."""
    listed = [
        ScoredPassage(pid, score)
        for pid, score in zip(pids, scores.tolist(), strict=True)
        if score == score
    ]
    return sorted(listed, key=lambda passage: (-passage.score, passage.pid))


def judged_first(
    listed: Sequence[ScoredPassage], positives: Mapping[str, int]
) -> list[ScoredPassage]:
    """The list with positives (pid -> grade) moved or added to its front; see `Teacher`."""
    if not positives:
        return list(listed)
    others = [p for p in listed if p.pid not in positives]
    front: list[tuple[str, float]] = [(p.pid, p.score) for p in listed if p.pid in positives]
    scored = {pid for pid, _ in front}
    front += [(pid, float("-inf")) for pid in positives if pid not in scored]
    front.sort(key=lambda item: -positives[item[0]])  # stable: the teacher's order within a grade
    gap = 1.0
    if len(listed) > 1 and listed[0].score > listed[-1].score:
        gap = (listed[0].score - listed[-1].score) / (len(listed) - 1)
        # Not less than float32 can tell apart.
        gap = max(gap, 1e-6 * max(abs(listed[0].score), abs(listed[-1].score)))
    below = others[0].score if others else None
    lifted: list[ScoredPassage] = []
    for pid, score in reversed(front):
        if below is None:
            score = max(score, 0.0) if score == float("-inf") else score
        elif score <= below:
            score = below + gap
        lifted.append(ScoredPassage(pid, score))
        below = score
    return lifted[::-1] + others


def report(
    ranked: Ranked, candidates: Candidates, positives: Mapping[str, Mapping[str, int]]
) -> dict[str, float]:
    """Coverage of a teacher's lists and their agreement with the qrels.

    Counts: queries, those with a scored passage, those with a positive. Shares: of candidates that
    the teacher scored; of queries with a positive, those whose candidates hold one
    (`positive_in_candidates`) and whose list does (`positive_scored`). Success@1 and RR@10 are the
    teacher's own, over the queries with a positive; a list without one counts 0.
    """
    scored = total = in_candidates = in_list = 0
    success = reciprocal = 0.0
    for qid, listed in ranked.items():
        pids = {passage.pid for passage in listed}
        wanted = candidates.get(qid, ())
        total += len(wanted)
        scored += sum(pid in pids for pid in wanted)
        relevant = positives.get(qid, {})
        if not relevant:
            continue
        in_candidates += any(pid in relevant for pid in wanted)
        ranks = [rank for rank, p in enumerate(listed, start=1) if p.pid in relevant]
        if ranks:
            in_list += 1
            success += ranks[0] == 1
            reciprocal += 1.0 / ranks[0] if ranks[0] <= 10 else 0.0
    judged = sum(bool(positives.get(qid)) for qid in ranked)
    share = lambda part, whole: part / whole if whole else 0.0
    return {
        "queries": len(ranked),
        "queries_scored": sum(bool(listed) for listed in ranked.values()),
        "queries_with_positive": judged,
        "candidates": total,
        "candidates_scored": share(scored, total),
        "positive_in_candidates": share(in_candidates, judged),
        "positive_scored": share(in_list, judged),
        "Success@1": share(success, judged),
        "RR@10": share(reciprocal, judged),
    }


@dataclass(frozen=True, eq=False)
class RankLists:
    """n rank lists of at most L passages, in the teacher's order (best first).

    query_rows: int32 [n], places in the sequence of qids. passages: int32 [n, L], passage
    indices, -1 for free places. teacher_scores: f32 [n, L], 0 at free places. positives: int32
    [n], the column of the generation target. report: counts of what was made and left out.
    """

    query_rows: np.ndarray
    passages: np.ndarray
    teacher_scores: np.ndarray
    positives: np.ndarray
    report: dict[str, int]

    @property
    def positive_passages(self) -> np.ndarray:
        """int32 [n]: the passage index of the generation target."""
        return self.passages[np.arange(len(self.passages)), self.positives]


@dataclass(frozen=True)
class TopM:
    """The plain recipe: the first `size` passages of the teacher's list as it is.

    The best positive (the highest grade, then the teacher's order) takes the last place where it
    is not among them. Shorter lists are padded; a list of one passage is left out.
    """

    size: int = 5

    def select(
        self,
        ranked: Ranked,
        *,
        qids: Sequence[str],
        store: PassageStore,
        qrels: Qrels,
        candidates: Candidates | None = None,
        seed: int = 0,
        min_relevance: int = 1,
    ) -> RankLists:
        """One list for each of `qids` where possible; nothing is drawn."""
        del candidates, seed
        if self.size < 2:
            raise ValueError(f"TopM.size = {self.size}, expected 2 or more")
        made = _Builder(self.size, store)
        for row, qid in enumerate(qids):
            listed = ranked.get(qid, [])
            best = made.best_positive(listed, qrels.get(qid, {}), min_relevance)
            if best is None:
                continue
            if len(listed) < 2:
                made.count("too_few_negatives")
                continue
            top = listed[: self.size]
            if best not in top:
                top[-1] = best
            made.add(row, top, best)
        return made.arrays(len(qids))


@dataclass(frozen=True)
class TwoLists:
    """The published recipe (DGR, Li et al. 2024): two lists a query with the same negatives.

    List A holds the best positive, list B a random one (the same, where there is no other), each
    with `negatives` passages that are not positive: the student's first, the others drawn from the
    student's first `depth`. Passages stand in the teacher's order; negatives that the teacher has
    not scored cannot be drawn.
    """

    negatives: int = 4
    depth: int = 200

    def select(
        self,
        ranked: Ranked,
        *,
        qids: Sequence[str],
        store: PassageStore,
        qrels: Qrels,
        candidates: Candidates,
        seed: int = 0,
        min_relevance: int = 1,
    ) -> RankLists:
        """Two lists for each of `qids` where possible; candidates are the student's, best first.

        Draws depend on the seed and the qid alone, so a query gets the same lists in any company.
        """
        if self.negatives < 1 or self.depth < self.negatives:
            raise ValueError(
                f"TwoLists.negatives = {self.negatives} and TwoLists.depth = {self.depth}, "
                "expected 1 or more negatives and a depth of at least as many"
            )
        made = _Builder(self.negatives + 1, store)
        for row, qid in enumerate(qids):
            listed, grades = ranked.get(qid, []), qrels.get(qid, {})
            best = made.best_positive(listed, grades, min_relevance)
            if best is None:
                continue
            rng = np.random.default_rng([seed, zlib.crc32(qid.encode())])
            place = {passage.pid: i for i, passage in enumerate(listed)}
            eligible = [
                place[pid]
                for pid in dict.fromkeys(candidates.get(qid, ())[: self.depth])
                if pid in place and grades.get(pid, 0) < min_relevance
            ]
            if len(eligible) < self.negatives:
                made.count("too_few_negatives")
                continue
            drawn = rng.choice(len(eligible) - 1, self.negatives - 1, replace=False) + 1
            negatives = [eligible[0], *(eligible[i] for i in drawn)]
            others = [i for i, p in enumerate(listed) if grades.get(p.pid, 0) >= min_relevance]
            for positive in (place[best.pid], int(rng.choice(others))):
                chosen = [listed[i] for i in sorted([positive, *negatives])]
                made.add(row, chosen, listed[positive])
        return made.arrays(len(qids))


class _Builder:
    """Collects rank lists of one width, and counts what is left out."""

    def __init__(self, width: int, store: PassageStore) -> None:
        self._width = width
        self._store = store
        self._rows: list[int] = []
        self._passages: list[list[int]] = []
        self._scores: list[list[float]] = []
        self._positives: list[int] = []
        self._left_out = {"without_positive": 0, "positive_not_scored": 0, "too_few_negatives": 0}

    def best_positive(
        self, listed: Sequence[ScoredPassage], grades: Mapping[str, int], min_relevance: int
    ) -> ScoredPassage | None:
        """The highest grade, then the teacher's order; None is counted."""
        positives = [p for p in listed if grades.get(p.pid, 0) >= min_relevance]
        if positives:
            return max(positives, key=lambda p: grades[p.pid])
        judged = any(grade >= min_relevance for grade in grades.values())
        self.count("positive_not_scored" if judged else "without_positive")
        return None

    def count(self, reason: str) -> None:
        self._left_out[reason] += 1

    def add(self, row: int, listed: Sequence[ScoredPassage], positive: ScoredPassage) -> None:
        free = self._width - len(listed)
        self._rows.append(row)
        self._passages.append([self._store.index_of(p.pid) for p in listed] + [-1] * free)
        self._scores.append([p.score for p in listed] + [0.0] * free)
        self._positives.append(listed.index(positive))

    def arrays(self, num_queries: int) -> RankLists:
        summary = {"queries": num_queries, "lists": len(self._rows), **self._left_out}
        if any(self._left_out.values()):
            _log.warning("queries left out of the rank lists: %s", self._left_out)
        return RankLists(
            query_rows=np.array(self._rows, np.int32),
            passages=np.array(self._passages, np.int32).reshape(-1, self._width),
            teacher_scores=np.array(self._scores, np.float32).reshape(-1, self._width),
            positives=np.array(self._positives, np.int32),
            report=summary,
        )


def _positives(grades: Mapping[str, int], store: PassageStore, least: int) -> dict[str, int]:
    """pid -> grade of the positives that are in the corpus."""
    return {pid: grade for pid, grade in grades.items() if grade >= least and _is_known(store, pid)}


def _is_known(store: PassageStore, pid: str) -> bool:
    try:
        store.index_of(pid)
    except KeyError:
        return False
    return True


def _read_run(path: str) -> Iterator[RankList]:
    """A run of six columns or a table of three, told apart by the first line that is not empty."""
    for _, text in lines.read(path):
        columns = len(text.split())
        if columns:
            return trec.scores(path) if columns == 3 else trec.runs(path, ties="rank")
    raise ValueError(f"RunTeacher.path = {path!r}: the file is empty, expected a run")


def _first_column(path: str) -> dict[str, None]:
    """The different values of the first column, in order; a BEIR header is passed over."""
    values = (text.split()[0] for _, text in lines.read(path) if text.strip())
    return dict.fromkeys(value for value in values if value not in ("query-id", "qid"))


def _blocks(pools: Mapping[str, Any]) -> Iterator[list[str]]:
    return _batched(pools, _BLOCK)


def _batched(items: Iterable[Any], size: int) -> Iterator[list[Any]]:
    iterator = iter(items)
    while block := list(itertools.islice(iterator, size)):
        yield block
