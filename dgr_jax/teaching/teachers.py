"""The teachers: an order made elsewhere, BM25, encoders, vectors, and a sum of several.

`teacher` says what they share.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from dgr_jax import ranges
from dgr_jax.corpora import checks, files, lines, trec
from dgr_jax.corpora.types import RankList, ScoredPassage
from dgr_jax.identifiers.embeddings import load_sentence_transformer, load_vectors
from dgr_jax.retrieval.bm25 import Bm25
from dgr_jax.teaching.teacher import Queries, Teacher, best_first

if TYPE_CHECKING:
    from dgr_jax.corpora.store import PassageStore

_log = logging.getLogger(__name__)

_BLOCK = 256  # how many queries a neural teacher scores together


@dataclass(frozen=True)
class RunTeacher(Teacher):
    """An order made elsewhere: a TREC run (six columns) or a table qid, pid, score; also .gz.

    pool: "candidates" orders the student's candidates (and judged passages) that the run holds;
    "run" takes the run's own lists, whatever the student retrieved, which suits runs too short to
    hold the student's candidates. Passages that are not in the corpus are left out. Passages with
    equal scores keep the order of their ranks.
    """

    path: str
    pool: str = "candidates"

    def __post_init__(self) -> None:
        if self.pool not in ("candidates", "run"):
            raise ValueError(f"RunTeacher.pool = {self.pool!r}, expected 'candidates' or 'run'")

    def order(
        self, queries: Queries, pools: Mapping[str, list[str]], store: PassageStore
    ) -> Iterator[tuple[str, list[ScoredPassage]]]:
        known_queries = places = unknown = 0
        for rank_list in _read_run(self.path):
            if rank_list.qid not in pools:
                continue
            known_queries += 1
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
        if not known_queries:
            raise ValueError(
                f"RunTeacher.path = {self.path!r}: none of the {len(pools)} queries is in this run"
            )


@dataclass(frozen=True)
class Bm25Teacher(Teacher):
    """BM25 over the whole corpus; by default with the judged passages first.

    own: how many of BM25's best passages are added to the student's candidates, so that the student
    can learn to retrieve passages that it misses.
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
            places = [store.index_of(pid) for pid in pids]
            if not self.own:
                scores = index.scores_of(queries[qid], np.array(places, np.int64))
                yield qid, best_first(pids, scores)
                continue
            of_all = index.scores(queries[qid])
            places = list(dict.fromkeys([*places, *index.places(of_all, self.own)]))
            yield qid, best_first([store.pids[i] for i in places], of_all[places])


@dataclass(frozen=True)
class CrossEncoderTeacher(Teacher):
    """A sentence-transformers cross-encoder (extra `encoders`).

    model: a local folder or a hub id. max_length: the most tokens of query and passage together.
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

    Every distinct candidate is encoded once, and f32 [candidates, D] is held in memory.
    query_prefix, passage_prefix: what the model expects before its texts, such as "query: ".
    normalise: True scales the vectors to length 1.
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
        parts = [self._encode(encoder, part) for part in batched(texts, 4096)]
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

    passages_path: .npy [P, D], rows in corpus order. queries_path: .npy [queries, D]. Both are
      float16 or float32. Queries without a vector get an empty list.
    passage_ids_path: needed where there are vectors of more passages than the corpus has: a file
      with their pids in order, BEIR's corpus.jsonl or a text file with pids in the first column.
    query_ids_path: a text file whose first column holds the qids in the order of the query vectors.
      A repeated qid counts once, so BEIR qrels with their header can serve.
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

    A passage has a score where every teacher gives it one; a query that one of them does not know
    gets an empty list. The setting judged_first of the single teachers has no effect.

    weights: one for each teacher; None takes 1 for each. Scores are taken as they are, so that the
    weights must also bring them to one scale.
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
        waiting: dict[str, list[dict[str, float]]] = {}  # few, if teachers work in one order
        for scored_queries in itertools.zip_longest(*streams):
            for qid, scores in filter(None, scored_queries):
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


def _read_run(path: str) -> Iterator[RankList]:
    """A run with six columns or a table with three; the first line that is not empty decides."""
    with files.rereadable(path):
        for _, text in lines.read(path):
            columns = len(text.split())
            if columns:
                yield from trec.scores(path) if columns == 3 else trec.runs(path, ties="rank")
                return
    raise ValueError(f"RunTeacher.path = {path!r}: the file is empty, expected a run")


def _first_column(path: str) -> dict[str, None]:
    """The different values of the first column, in order, or of '_id' in a .jsonl file.

    A header is passed over. Raises ValueError naming file and line of a value that is no id.
    """
    where = lines.place(path)
    if where.suffix == ".jsonl":
        records = lines.json_objects(where, "'_id'")
        return dict.fromkeys(checks.id_field(r, "_id", where, n, "row") for n, r in records)
    return dict.fromkeys(
        checks.checked_id(text.split(maxsplit=1)[0], where, n, "row")
        for n, text in lines.read(where)
        if text.strip() and not (n == 1 and checks.is_header(text.split()))
    )


def _blocks(pools: Mapping[str, list[str]]) -> Iterator[dict[str, list[str]]]:
    """The pools of `_BLOCK` queries at a time."""
    return map(dict, batched(pools.items(), _BLOCK))


def batched(items: Iterable[Any], size: int) -> Iterator[list[Any]]:
    """Lists of `size` items, the last one shorter."""
    iterator = iter(items)
    while block := list(itertools.islice(iterator, size)):
        yield block
