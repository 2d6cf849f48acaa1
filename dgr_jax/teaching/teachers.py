"""Teachers order candidates.

A teacher gets queries and, for each, candidate passages (what the student retrieved). The judged
passages are always scored with them. It yields (qid, passages best first); a passage that the
teacher cannot score stays out of the list, for a made-up score would teach a made-up order. A
recipe (dgr_jax.teaching.list_recipes) then makes the arrays that distillation reads.
"""

from __future__ import annotations

import itertools
import logging
import math
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from dgr_jax import ranges
from dgr_jax.corpora import checks, files, lines, trec
from dgr_jax.corpora.types import RankList, ScoredPassage
from dgr_jax.identifiers.embeddings import load_sentence_transformer, load_vectors
from dgr_jax.retrieval.bm25 import Bm25

if TYPE_CHECKING:
    from dgr_jax.corpora.store import PassageStore

_log = logging.getLogger(__name__)

_BLOCK = 256  # queries that a neural teacher scores together
_FLAT = 0.1  # share of the lists without any order, from which on there is a warning

Ranked = Iterable[tuple[str, Sequence[ScoredPassage]]]
Queries = Mapping[str, str]
Candidates = Mapping[str, Sequence[str]]
Qrels = Mapping[str, Mapping[str, int]]


@dataclass(frozen=True, kw_only=True)
class Teacher(ABC):
    """What all teachers share; a further one gives `order`, and its name in
    `dgr_jax.config.configurables`.

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
        coverage: Mapping[str, Coverage] | None = None,
        self_hits: Container[str] = (),
    ) -> Iterator[tuple[str, list[ScoredPassage]]]:
        """(qid, the teacher's list) of every query once, as the teacher comes to them.

        Few lists are in memory at a time, whatever the number of queries. Queries without
        candidates and positives, and those the teacher knows nothing of, get an empty list. Scores
        that are not finite are left out; they are warned of in the end, and so are many lists of
        equal scores, which teach no order.

        coverage: the one of a query is told of the teacher's own order, before judged passages are
          moved to the front.
        self_hits: queries that are passages of the corpus: the passage of their id is left out.
        """
        pools = _Pools(queries, candidates, store, qrels, min_relevance)
        left, counts = dict.fromkeys(queries), Counter()
        for qid, listed in self.order(queries, pools, store):
            del left[qid]
            if qid in self_hits:
                listed = [passage for passage in listed if passage.pid != qid]
            own = [passage for passage in listed if math.isfinite(passage.score)]
            counts["scores"] += len(listed)
            counts["not_finite"] += len(listed) - len(own)
            counts["lists"] += len(own) > 1
            counts["flat"] += flat(own)
            if coverage is not None and qid in coverage:
                coverage[qid].scores_not_finite += len(listed) - len(own)
            yield qid, self._finished(qid, own, candidates, pools, coverage)
        for qid in left:
            yield qid, self._finished(qid, [], candidates, pools, coverage)
        self._warn(counts)

    def _finished(
        self,
        qid: str,
        own: list[ScoredPassage],
        candidates: Candidates,
        pools: _Pools,
        coverage: Mapping[str, Coverage] | None,
    ) -> list[ScoredPassage]:
        positives = pools.positives(qid)
        if coverage is not None and qid in coverage:
            coverage[qid].add(own, candidates.get(qid, ()), positives)
        return judged_first(own, positives) if self.judged_first else own

    def _warn(self, counts: Counter) -> None:
        name = type(self).__name__
        if counts["not_finite"]:
            _log.warning(
                "Teach.teacher=@%s(): %s of %s scores are not finite (NaN or inf) and are left "
                "out; expected real numbers: look at its model or its files",
                *(name, f"{counts['not_finite']:,}", f"{counts['scores']:,}"),
            )
        if counts["flat"] and counts["flat"] >= _FLAT * counts["lists"]:
            _log.warning(
                "Teach.teacher=@%s(): %s of %s lists have one score for all passages: losses "
                "that compare scores learn no order from them",
                *(name, f"{counts['flat']:,}", f"{counts['lists']:,}"),
            )

    @abstractmethod
    def order(
        self, queries: Queries, pools: Mapping[str, list[str]], store: PassageStore
    ) -> Iterable[tuple[str, list[ScoredPassage]]]:
        """(qid, passages of its pool that the teacher can score, best first)."""


class _Pools(Mapping[str, list[str]]):
    """qid -> what the teacher is to score: candidates, then positives; made when asked for."""

    def __init__(
        self,
        queries: Queries,
        candidates: Candidates,
        store: PassageStore,
        qrels: Qrels,
        min_relevance: int,
    ) -> None:
        self._queries, self._candidates, self._store = queries, candidates, store
        self._qrels, self._least = qrels, min_relevance

    def __getitem__(self, qid: str) -> list[str]:
        return list(dict.fromkeys([*self._candidates.get(qid, ()), *self.positives(qid)]))

    def __contains__(self, qid: object) -> bool:
        return qid in self._queries

    def __iter__(self) -> Iterator[str]:
        return iter(self._queries)

    def __len__(self) -> int:
        return len(self._queries)

    def positives(self, qid: str) -> dict[str, int]:
        """pid -> grade of the query's positives that are in the corpus."""
        grades = self._qrels.get(qid, {})
        return {p: g for p, g in grades.items() if g >= self._least and p in self._store}


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

    def __post_init__(self) -> None:
        if self.pool not in ("candidates", "run"):
            raise ValueError(f"RunTeacher.pool = {self.pool!r}, expected 'candidates' or 'run'")

    def order(
        self, queries: Queries, pools: Mapping[str, list[str]], store: PassageStore
    ) -> Iterator[tuple[str, list[ScoredPassage]]]:
        found = places = unknown = 0
        for rank_list in _read_run(self.path):
            if rank_list.qid not in pools:
                continue
            found += 1
            listed = rank_list.passages
            if self.pool == "candidates":
                wanted = set(pools[rank_list.qid])
                yield rank_list.qid, [p for p in listed if p.pid in wanted]
                continue
            known = [p for p in listed if p.pid in store]
            places += len(listed)
            unknown += len(listed) - len(known)
            yield rank_list.qid, known
        if unknown:
            _log.warning(
                "%s: left out %s of %s places of the run: their passages are not in the corpus",
                self.path, f"{unknown:,}", f"{places:,}",
            )  # fmt: skip
        if not found:
            raise ValueError(
                f"RunTeacher.path = {self.path!r}: none of the {len(pools)} queries is in this run"
            )


@dataclass(frozen=True)
class Bm25Teacher(Teacher):
    """BM25 over the whole corpus; by default with the judged passages first.

    own: so many of BM25's best passages join the student's candidates: what the student does not
    find, it can be taught to find.
    """

    bm25: Bm25 = field(default_factory=Bm25)
    own: int = 0
    judged_first: bool = field(default=True, kw_only=True)

    def __post_init__(self) -> None:
        ranges.check(self, own=ranges.at_least(0))

    def order(
        self, queries: Queries, pools: Mapping[str, list[str]], store: PassageStore
    ) -> Iterator[tuple[str, list[ScoredPassage]]]:
        index = self.bm25.fit(store)
        for qid, pids in pools.items():
            scores = index.scores(queries[qid])
            own = index.best(scores, self.own) if self.own else []
            pids = list(dict.fromkeys([*pids, *(passage.pid for passage in own)]))
            yield qid, best_first(pids, scores[[store.index_of(pid) for pid in pids]])


@dataclass(frozen=True)
class CrossEncoderTeacher(Teacher):
    """A sentence-transformers cross-encoder (extra `encoders`).

    model: a local folder or a hub id. max_length: tokens of query and passage together.
    """

    model: str = "cross-encoder/ms-marco-MiniLM-L-6-v2"
    batch_size: int = 64
    max_length: int = 512

    def __post_init__(self) -> None:
        ranges.check(self, batch_size=ranges.at_least(1), max_length=ranges.at_least(1))

    def order(
        self, queries: Queries, pools: Mapping[str, list[str]], store: PassageStore
    ) -> Iterator[tuple[str, list[ScoredPassage]]]:
        encoder = self._load()
        for block in _blocks(pools):
            pairs = [
                (queries[qid], store[store.index_of(pid)].contents)
                for qid, pids in block.items()
                for pid in pids
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
            for qid, pids in block.items():
                last = first + len(pids)
                yield qid, best_first(pids, scores[first:last])
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

    def __post_init__(self) -> None:
        ranges.check(self, batch_size=ranges.at_least(1))

    def order(
        self, queries: Queries, pools: Mapping[str, list[str]], store: PassageStore
    ) -> Iterator[tuple[str, list[ScoredPassage]]]:
        encoder = load_sentence_transformer(self.model, "BiEncoderTeacher.model")
        distinct = dict.fromkeys(itertools.chain.from_iterable(pools.values()))
        rows = {pid: row for row, pid in enumerate(distinct)}
        texts = (self.passage_prefix + store[store.index_of(pid)].contents for pid in rows)
        parts = [self._encode(encoder, part) for part in _batched(texts, 4096)]
        passages = np.concatenate(parts) if parts else np.zeros((0, 1), np.float32)
        for block in _blocks(pools):
            vectors = self._encode(encoder, [self.query_prefix + queries[qid] for qid in block])
            for (qid, pids), vector in zip(block.items(), vectors, strict=True):
                listed = [rows[pid] for pid in pids]
                yield qid, best_first(pids, passages[listed] @ vector)

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
    passage_ids_path: where the vectors are of more passages than the corpus has: a file with their
      pids in order, BEIR's corpus.jsonl or a text file whose first column holds them.
    query_ids_path: a text file whose first column holds the qids in the order of the query
    vectors (BEIR qrels with their header serve: a qid that comes again counts once).
    Float16 or float32; queries without a vector get an empty list.
    """

    passages_path: str
    queries_path: str
    query_ids_path: str
    passage_ids_path: str = ""

    def order(
        self, queries: Queries, pools: Mapping[str, list[str]], store: PassageStore
    ) -> Iterator[tuple[str, list[ScoredPassage]]]:
        row = self._rows(store)
        passages, vectors, rows = self._open(len(row))
        for qid, pids in pools.items():
            if qid in rows and pids:
                listed = passages[[row[pid] for pid in pids]]
                vector = np.asarray(vectors[rows[qid]], np.float32)
                yield qid, best_first(pids, np.asarray(listed, np.float32) @ vector)

    def _rows(self, store: PassageStore) -> dict[str, int]:
        """pid -> row of its vector."""
        if not self.passage_ids_path:
            return {pid: row for row, pid in enumerate(store.pids)}
        rows = {pid: row for row, pid in enumerate(_first_column(self.passage_ids_path))}
        if missing := [pid for pid in store.pids if pid not in rows]:
            raise ValueError(
                f"VectorTeacher.passage_ids_path = {self.passage_ids_path!r}: lacks "
                f"{len(missing)} of the {len(store)} passages, such as {missing[0]!r}"
            )
        return rows

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


@dataclass(frozen=True)
class FusionTeacher(Teacher):
    """A weighted sum of the scores of several teachers.

    A passage has a score where every teacher has one; a query that one of them does not know gets
    an empty list. judged_first of the teachers themselves is not looked at.

    weights: one a teacher; None: 1 each. Scores are taken as they are, so the weights must also
    bring them to one scale.
    """

    teachers: tuple[Teacher, ...]
    weights: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        if len(self.teachers) < 2:
            raise ValueError(
                f"FusionTeacher.teachers: got {len(self.teachers)}, expected 2 or more"
            )
        if self.weights is not None and len(self.weights) != len(self.teachers):
            raise ValueError(
                f"FusionTeacher.weights: got {len(self.weights)}, expected {len(self.teachers)}, "
                "one a teacher"
            )
        ranges.check(self, weights=ranges.optional(ranges.each(ranges.FINITE)))

    def order(
        self, queries: Queries, pools: Mapping[str, list[str]], store: PassageStore
    ) -> Iterator[tuple[str, list[ScoredPassage]]]:
        weights = self.weights or (1.0,) * len(self.teachers)
        members = zip(self.teachers, weights, strict=True)
        streams = [self._weighted(*member, queries, pools, store) for member in members]
        waiting: dict[str, list[dict[str, float]]] = {}  # few, where teachers keep step
        for told in itertools.zip_longest(*streams):
            for qid, scores in filter(None, told):
                parts = waiting.setdefault(qid, [])
                parts.append(scores)
                if len(parts) == len(streams):
                    del waiting[qid]
                    pids = [pid for pid in pools[qid] if all(pid in part for part in parts)]
                    sums = [sum(part[pid] for part in parts) for pid in pids]
                    yield qid, best_first(pids, np.array(sums, np.float64))

    @staticmethod
    def _weighted(
        teacher: Teacher,
        weight: float,
        queries: Queries,
        pools: Mapping[str, list[str]],
        store: PassageStore,
    ) -> Iterator[tuple[str, dict[str, float]]]:
        for qid, listed in teacher.order(queries, pools, store):
            yield qid, {passage.pid: weight * passage.score for passage in listed}


def best_first(pids: Sequence[str], scores: np.ndarray) -> list[ScoredPassage]:
    """Passages by falling score, ties by pid; those with a score of nan come last."""

    def key(passage: ScoredPassage) -> tuple[bool, float, str]:
        unknown = math.isnan(passage.score)
        return unknown, 0.0 if unknown else -passage.score, passage.pid

    return sorted(
        (ScoredPassage(*pair) for pair in zip(pids, scores.tolist(), strict=True)), key=key
    )


def flat(listed: Sequence[ScoredPassage]) -> bool:
    """Whether two passages or more all have the same score: there is no order to learn."""
    return len(listed) > 1 and len({passage.score for passage in listed}) == 1


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


@dataclass
class Coverage:
    """Counts how much of the candidates a teacher scores, and how far it agrees with the qrels."""

    queries: int = 0
    queries_scored: int = 0
    queries_with_positive: int = 0
    candidates: int = 0
    candidates_scored: int = 0
    positive_in_candidates: int = 0
    positive_scored: int = 0
    first_is_positive: int = 0
    reciprocal_ranks: float = 0.0
    lists_of_equal_scores: int = 0
    scores_not_finite: int = 0

    def add(
        self, own: Sequence[ScoredPassage], candidates: Sequence[str], positives: Container[str]
    ) -> None:
        """Counts a query: the teacher's own list, the student's candidates, the positives."""
        scored = {passage.pid for passage in own}
        self.queries += 1
        self.queries_scored += bool(own)
        self.lists_of_equal_scores += flat(own)
        self.candidates += len(candidates)
        self.candidates_scored += sum(pid in scored for pid in candidates)
        if not positives:
            return
        self.queries_with_positive += 1
        self.positive_in_candidates += any(pid in positives for pid in candidates)
        rank = next((n for n, p in enumerate(own, start=1) if p.pid in positives), None)
        if rank:
            self.positive_scored += 1
            self.first_is_positive += rank == 1
            self.reciprocal_ranks += 1.0 / rank if rank <= 10 else 0.0

    def report(self) -> dict[str, float]:
        """Counts: queries, those with a scored passage, those with a positive. Shares: of
        candidates that the teacher scored; of queries with a positive, those whose candidates hold
        one (`positive_in_candidates`) and whose list does (`positive_scored`). Success@1 and RR@10
        are the teacher's own, over the queries with a positive; a list without one counts 0. Where
        there are any, also the lists of one score for all passages and the scores left out."""
        judged = self.queries_with_positive or 1
        faults = ("lists_of_equal_scores", "scores_not_finite")
        return {
            "queries": self.queries,
            "queries_scored": self.queries_scored,
            "queries_with_positive": self.queries_with_positive,
            "candidates": self.candidates,
            "candidates_scored": self.candidates_scored / (self.candidates or 1),
            "positive_in_candidates": self.positive_in_candidates / judged,
            "positive_scored": self.positive_scored / judged,
            "Success@1": self.first_is_positive / judged,
            "RR@10": self.reciprocal_ranks / judged,
            **{name: getattr(self, name) for name in faults if getattr(self, name)},
        }


def _read_run(path: str) -> Iterator[RankList]:
    """A run of six columns or a table of three, told apart by the first line that is not empty."""
    with files.rereadable(path):
        for _, text in lines.read(path):
            columns = len(text.split())
            if columns:
                yield from trec.scores(path) if columns == 3 else trec.runs(path, ties="rank")
                return
    raise ValueError(f"RunTeacher.path = {path!r}: the file is empty, expected a run")


def _first_column(path: str) -> dict[str, None]:
    """The different values of the first column, in order, or of '_id' in a .jsonl file; a BEIR
    header is passed over. ValueError names file and line of what is no id."""
    where = lines.place(path)
    if where.suffix == ".jsonl":
        records = lines.json_objects(where, "'_id'")
        return dict.fromkeys(checks.id_field(r, "_id", where, n, "row") for n, r in records)
    values = (
        checks.checked_id(text.split(maxsplit=1)[0], where, n, "row")
        for n, text in lines.read(where)
        if text.strip()
    )
    return dict.fromkeys(value for value in values if value not in ("query-id", "qid"))


def _blocks(pools: Mapping[str, list[str]]) -> Iterator[dict[str, list[str]]]:
    """The pools of `_BLOCK` queries at a time."""
    return map(dict, _batched(pools.items(), _BLOCK))


def _batched(items: Iterable[Any], size: int) -> Iterator[list[Any]]:
    iterator = iter(items)
    while block := list(itertools.islice(iterator, size)):
        yield block
