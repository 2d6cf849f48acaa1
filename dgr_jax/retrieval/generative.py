"""Queries -> passages, by writing identifiers with a constrained beam search."""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

from dgr_jax import checkpoints, partitioning
from dgr_jax.corpora.store import PassageStore
from dgr_jax.corpora.types import ScoredPassage
from dgr_jax.data.vocabulary import Vocabulary
from dgr_jax.decoding import trie
from dgr_jax.decoding.beam_search import BeamResult, beam_search
from dgr_jax.identifiers.table import IdentifierTable
from dgr_jax.models.t5 import T5Config, Transformer

SYSTEMS = ("distill", "control", "generate")


@dataclass(frozen=True)
class Search:
    """Settings of retrieval.

    num_beams: identifiers kept a query; at least as many as passages wanted.
    batch_size: queries decoded together; the last batch is padded, so decoding compiles once.
    depth: passages a query in a run.
    query_length: tokens of a query, EOS counted; longer ones are cut.
    renormalise: log-probabilities over the legal tokens instead of the whole vocabulary.
    """

    num_beams: int = 100
    batch_size: int = 32
    depth: int = 100
    query_length: int = 32
    renormalise: bool = False

    def __post_init__(self) -> None:
        for name in ("num_beams", "batch_size", "depth", "query_length"):
            if getattr(self, name) < 1:
                raise ValueError(f"Search.{name}: got {getattr(self, name)}, expected at least 1")


@functools.lru_cache(maxsize=8)
def decode_fn(config: T5Config, num_beams: int, length: int):
    """The compiled search: (params, constraint, int32 [B, Q]) -> BeamResult with M = num_beams.

    A query is encoded once; its cross-attention keys and values are shared by all beams.
    """
    model = Transformer(config)

    def decode(params: Any, constraint: Any, tokens: jax.Array) -> BeamResult:
        apply = functools.partial(model.apply, {"params": params})
        encoded = apply(tokens, method="encode")
        cross = apply(encoded, method="cross")
        cache = apply(encoded, num_beams, length, method="init_cache")

        def step(last: jax.Array, cache: Any, position: jax.Array) -> tuple[jax.Array, Any]:
            return apply(last, cache, position, cross, tokens, method="step")

        return beam_search(
            step,
            constraint,
            cache,
            batch_size=tokens.shape[0],
            num_beams=num_beams,
            max_length=length,
        )

    return jax.jit(decode)


def rank_passages(
    rows: np.ndarray, log_probs: np.ndarray, table: IdentifierTable, depth: int
) -> tuple[np.ndarray, np.ndarray]:
    """Passages of the identifiers found, best first: passage index int32 and score f32 [B, depth].

    rows: rows of the table int [B, M], -1 where nothing was found; log_probs f32 [B, M], best
    first. The passages of one identifier share its score and stand in corpus order; a passage
    counts once, at its best identifier. Free places hold -1 and -inf.
    """
    passages = np.full((len(rows), depth), -1, np.int32)
    scores = np.full((len(rows), depth), -np.inf, np.float32)
    sizes = np.diff(table.offsets)
    for query, (found, values) in enumerate(zip(rows, log_probs, strict=True)):
        keep = found >= 0
        found, values = found[keep], values[keep]
        owners = np.concatenate([table.passages_of(row) for row in found] or [[]]).astype(np.int32)
        values = np.repeat(values, sizes[found])
        _, first = np.unique(owners, return_index=True)
        best = np.sort(first)[:depth]
        passages[query, : len(best)] = owners[best]
        scores[query, : len(best)] = values[best]
    return passages, scores


@dataclass
class Decoder:
    """Parameters, index and settings ready to answer token batches."""

    config: T5Config
    params: Any
    index: trie.Trie
    table: IdentifierTable
    search: Search
    mesh: jax.sharding.Mesh

    def __post_init__(self) -> None:
        self._constraint = self.index.constraint(renormalise=self.search.renormalise)
        self._decode = decode_fn(self.config, self.search.num_beams, self.table.tokens.shape[1])

    def passages(self, tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """int32 [n, Q] -> passage index int32 and score f32 [n, depth]; see `rank_passages`.

        The next batch is on the device while the host ranks the one before.
        """
        size = self.search.batch_size
        results, parts = None, []
        for start in range(0, len(tokens), size):
            batch = tokens[start : start + size]
            padded = np.pad(batch, [(0, size - len(batch)), (0, 0)])
            device = partitioning.shard_batch({"tokens": padded}, self.mesh)["tokens"]
            ahead = self._decode(self.params, self._constraint, device), len(batch)
            if results:
                parts.append(self._rank(*results))
            results = ahead
        if results:
            parts.append(self._rank(*results))
        if not parts:
            depth = self.search.depth
            return np.zeros((0, depth), np.int32), np.zeros((0, depth), np.float32)
        return tuple(np.concatenate(part) for part in zip(*parts, strict=True))

    def _rank(self, result: BeamResult, count: int) -> tuple[np.ndarray, np.ndarray]:
        rows = self.index.table_rows(np.asarray(result.rows)[:count])
        return rank_passages(
            rows, np.asarray(result.log_probs)[:count], self.table, self.search.depth
        )


@dataclass(frozen=True)
class Hit:
    """One found passage: score is the log-probability of its identifier."""

    rank: int
    pid: str
    score: float
    title: str
    text: str
    identifier: str


class Retriever:
    """A finished experiment that answers questions."""

    def __init__(self, decoder: Decoder, vocabulary: Vocabulary, store: PassageStore) -> None:
        self.decoder = decoder
        self.vocabulary = vocabulary
        self.store = store
        self._rows = decoder.table.rows_of_passages()

    @classmethod
    def load(
        cls, model_dir: str | Path, *, system: str | None = None, **settings: Any
    ) -> Retriever:
        """Open a MODEL_DIR.

        system: 'distill', 'control' or 'generate'; None: the first of these that is finished.
        settings: fields of `Search` that replace those of the experiment, such as num_beams.
        Raises FileNotFoundError when no trained student is there.
        """
        model_dir = Path(model_dir)
        folder = _finished(model_dir, system)
        described = json.loads((folder / "student.json").read_text(encoding="utf-8"))
        config = T5Config(**described["model"])
        search = Search(**described["search"] | settings)
        mesh = partitioning.make_mesh(devices=jax.devices()[:1])
        params = checkpoints.restore_params(
            folder / "checkpoints", partitioning.abstract_params(Transformer(config), mesh)
        )
        prepared = model_dir / "prepare"
        decoder = Decoder(
            config,
            params,
            trie.load(prepared / "trie"),
            IdentifierTable.load(prepared / "identifiers"),
            search,
            mesh,
        )
        return cls(decoder, Vocabulary.load(prepared), PassageStore(prepared / "passages"))

    def search(self, queries: Sequence[str], k: int = 10) -> list[list[Hit]]:
        """The best k passages of each query; fewer where the beam found fewer."""
        if isinstance(queries, str):
            raise ValueError(f"queries: got one string {queries!r}, expected a list of strings")
        beams = self.decoder.search.num_beams
        depth = self.decoder.search.depth
        if k > min(beams, depth):
            raise ValueError(
                f"k: got {k}, expected at most {min(beams, depth)}: set num_beams ({beams}) and "
                f"depth ({depth}) in Retriever.load"
            )
        tokens = self.vocabulary.encode_inputs(queries, self.decoder.search.query_length)
        found = self.decoder.passages(tokens)
        return [
            [self._hit(rank, i, s) for rank, (i, s) in enumerate(_pairs(p, v, k), start=1)]
            for p, v in zip(*found, strict=True)
        ]

    def run(self, queries: dict[str, str]) -> dict[str, list[ScoredPassage]]:
        """qid -> text in, qid -> passages out, at the depth of the settings."""
        tokens = self.vocabulary.encode_inputs(
            list(queries.values()), self.decoder.search.query_length
        )
        found = self.decoder.passages(tokens)
        return scored_passages(list(queries), *found, self.store.pids)

    def _hit(self, rank: int, index: int, score: float) -> Hit:
        passage = self.store[index]
        table = self.decoder.table
        row = self._rows[index]
        identifier = self.vocabulary.decode(table.tokens[row, : table.lengths[row]].tolist())
        return Hit(rank, passage.pid, score, passage.title, passage.text, identifier)


def _pairs(passages: np.ndarray, scores: np.ndarray, k: int) -> list[tuple[int, float]]:
    return [(int(i), float(s)) for i, s in zip(passages[:k], scores[:k], strict=True) if i >= 0]


def scored_passages(
    qids: Sequence[str], passages: np.ndarray, scores: np.ndarray, pids: Sequence[str]
) -> dict[str, list[ScoredPassage]]:
    """Arrays [n, depth] of `Decoder.passages` as a run in memory."""
    return {
        qid: [ScoredPassage(pids[i], s) for i, s in _pairs(found, values, len(found))]
        for qid, found, values in zip(qids, passages, scores, strict=True)
    }


def write_student(folder: Path, config: T5Config, search: Search) -> None:
    """Leave beside a student's checkpoints what `Retriever.load` needs to know."""
    described = {"model": asdict(config), "search": asdict(search)}
    (folder / "student.json").write_text(json.dumps(described, indent=1), encoding="utf-8")


def _finished(model_dir: Path, system: str | None) -> Path:
    names = SYSTEMS if system is None else (system,)
    for name in names:
        if (model_dir / name / "student.json").is_file():
            return model_dir / name
    wanted = ", ".join(f"{name}/student.json" for name in names)
    raise FileNotFoundError(
        f"no trained student in {model_dir}: looked for {wanted}; train one with "
        "python -m dgr_jax.train"
    )
