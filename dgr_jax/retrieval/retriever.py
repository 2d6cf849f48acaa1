"""A finished experiment, opened to answer questions."""

from __future__ import annotations

import contextlib
import copy
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import numpy as np

from dgr_jax import partitioning
from dgr_jax.corpora.store import PassageStore
from dgr_jax.corpora.types import Passage, ScoredPassage
from dgr_jax.data.vocabulary import Vocabulary
from dgr_jax.decoding.selection import check_k
from dgr_jax.model_dir import records
from dgr_jax.retrieval import kinds
from dgr_jax.retrieval.batching import BLOCK, Found, scored_passages
from dgr_jax.retrieval.explanation import Explanation, explain
from dgr_jax.retrieval.reranking import rerank
from dgr_jax.retrieval.system import Opening, System, SystemHit

logger = logging.getLogger(__name__)

_TRIES = 3  # times that a MODEL_DIR is opened which changes while it is read
_OF_ALL = {"depth": 0, "batch_size": 0}  # settings that every system takes


@dataclass(frozen=True)
class Hit:
    """One found passage: score is the log-probability of its identifier; where it has many, their
    passage score, and `identifier` is the one of most weight. Of a dense retriever it is the
    product of the vectors, and `identifier` is blank. parts: name -> what the score is the sum of,
    where the system adds scores."""

    rank: int
    pid: str
    score: float
    title: str
    text: str
    identifier: str
    parts: Mapping[str, float] = field(default_factory=dict)


class Retriever:
    """A finished experiment that answers questions."""

    def __init__(self, decoder: System, vocabulary: Vocabulary, store: PassageStore) -> None:
        self.decoder = decoder.by_pid(store.pid_of)
        self.vocabulary = vocabulary
        self.store = store

    @classmethod
    def load(
        cls,
        model_dir: str | Path,
        *,
        system: str | None = None,
        mesh: partitioning.Mesh | None = None,
        **settings: Any,
    ) -> Retriever:
        """Open a MODEL_DIR.

        system: one that the experiment trains, such as 'distill', or that it measures beside, such
          as 'bm25' or 'planned'; None: 'planned', where the experiment was evaluated with a plan,
          otherwise the best trained one that is finished.
        mesh: how all devices share queries and parameters; None: one device does it all.
        settings: fields of its `Search` (or `MultiviewSearch`, `DenseSearch`) that replace those of
          the experiment, such as num_beams; of a system that no stage trains, its own and those of
          the trained ones that it is made of.
        While the student, or the prepare stage that it was trained on, is made again, their last
        whole versions answer (`records.answering`); a warning says so, and where a better student
        is to be expected.
        Raises FileNotFoundError when no trained student is there, ValueError for settings that it
        does not have, and where the identifiers that it was trained on are gone.
        """
        if mesh is None:
            devices = partitioning.make_mesh(devices=jax.devices()[:1])
        else:
            devices = partitioning.make_mesh(mesh)
        rules = partitioning.RULES if mesh is None else mesh.rules
        for _ in range(_TRIES):
            sources = _Sources.of(Path(model_dir), system)
            try:
                retriever = cls._open(sources, devices, rules, settings)
            except (FileNotFoundError, ValueError):
                if sources.unchanged:
                    raise
                continue
            if sources.unchanged:
                for answering in sources.answering:
                    if answering.aside:
                        logger.warning("%s: %s", answering.student, answering.aside)
                return retriever
        raise ValueError(f"{model_dir} was changed each time that it was read; ask again")

    @classmethod
    def _open(
        cls,
        sources: _Sources,
        devices: jax.sharding.Mesh,
        rules: partitioning.Rules,
        settings: dict[str, Any],
    ) -> Retriever:
        """The retriever of a system and the prepare stage that it was trained on."""
        students = {n: kinds.read_student(a.student) for n, a in sources.trained.items()}
        untrained = kinds.settings_of(sources.said) if sources.said else None
        own = untrained.given() if untrained else {}
        usual = _OF_ALL | own if untrained else {}
        for student in students.values():
            usual |= student.search
        if unknown := sorted(settings.keys() - usual.keys()):
            raise ValueError(
                f"{', '.join(unknown)}: the {sources.name} retriever of {sources.model_dir} has no "
                f"such setting, expected some of {', '.join(usual)}"
            )
        _check_sizes(settings, usual)
        prepared = sources.prepared
        vocabulary, store = Vocabulary.load(prepared), PassageStore(prepared / "passages")
        # Their files are opened now: what lies in their place later may be another version.
        vocabulary.encode("")
        store.pids, store[0]

        def trained(name: str) -> System:
            student = students[name]
            searched = {k: v for k, v in settings.items() if k in student.search}
            placed = sources.trained[name].student, prepared, vocabulary, devices, rules
            return kinds.open_student(student, *placed, searched)

        if untrained is None:
            return cls(trained(sources.name), vocabulary, store)
        depth = settings.get("depth", sources.said["depth"])
        opening = Opening(prepared, store, depth, devices, rules, trained)
        given = {k: v for k, v in settings.items() if k in own}
        return cls(untrained.replaced(**given).open(opening), vocabulary, store)

    def restrict(self, passages: Iterable[str] | Callable[[Passage], bool]) -> Retriever:
        """A retriever that finds only some passages of those that this one finds; the model stays
        where it is, and nothing is compiled again.

        passages: their pids; or what says of a Passage whether it may be found, by its `pid`,
          `title` and `text`, which is all that a MODEL_DIR keeps of a passage.
        Raises ValueError for pids that are not in the corpus, and where no passage is left.
        """
        if isinstance(passages, str):
            raise ValueError(f"passages: got one string {passages!r}, expected a list of pids")
        if callable(passages):
            mask = np.fromiter((bool(passages(p)) for p in self.store), bool, len(self.store))
        else:
            pids = list(dict.fromkeys(passages))
            if unknown := [pid for pid in pids if pid not in self.store]:
                more = f" and {len(unknown) - 3:,} more" if len(unknown) > 3 else ""
                raise ValueError(
                    f"passages: got {', '.join(map(repr, unknown[:3]))}{more}, expected pids of "
                    f"the {len(self.store):,} passages of the corpus"
                )
            mask = np.zeros(len(self.store), bool)
            mask[[self.store.index_of(pid) for pid in pids]] = True
        if not mask.any():
            raise ValueError("passages: got none of the corpus, expected one or more")
        some = copy.copy(self)
        some.decoder = self.decoder.restrict(mask)
        return some

    def search(self, queries: Sequence[str], k: int = 10) -> list[list[Hit]]:
        """The best k passages of each query; fewer where the beam found fewer.

        Raises ValueError for a k that is no whole number of at least 1, or that the settings do not
        reach, and for a query that is no text.
        """
        if isinstance(queries, str):
            raise ValueError(f"queries: got one string {queries!r}, expected a list of strings")
        for query in queries:
            if not is_text(query):
                raise ValueError(f"queries: got {query!r:.80}, expected text that can be written")
        check_k(k)
        if k > self.decoder.most_passages:
            limits = self.decoder.limits.items()
            told = " and ".join(f"{name} ({limit})" for name, limit in limits if name != "passages")
            raise ValueError(
                f"k: got {k}, expected at most {self.decoder.most_passages}: set {told} in "
                "Retriever.load"
            )
        encoded = self.decoder.encode(self.vocabulary, queries)
        return [
            [self._hit(rank, hit) for rank, hit in enumerate(hits[:k], start=1)]
            for hits in self.decoder.hits(encoded)
        ]

    def run(self, queries: dict[str, str]) -> dict[str, list[ScoredPassage]]:
        """qid -> text in, qid -> passages out, at the depth of the settings."""
        ranked = self._found(list(queries.values()))
        return scored_passages(list(queries), *ranked, self.store.pids)

    def rerank(
        self,
        queries: Mapping[str, str],
        run: Mapping[str, Sequence[ScoredPassage]],
        *,
        weight: float | None = None,
    ) -> dict[str, list[ScoredPassage]]:
        """The passages of a run in the order of the student, see `reranking.rerank`."""
        return rerank(self.decoder, self.vocabulary, self.store, queries, run, weight)

    def explain(self, query: str, pid: str | None = None) -> Explanation:
        """What the search for a query has looked at, and at which step it lost a passage; see
        `explanation.explain`."""
        return explain(self.decoder, self.vocabulary, self.store, query, pid)

    def _found(self, texts: Sequence[str]) -> Found:
        blocks = (
            self.decoder.encode(self.vocabulary, texts[start : start + BLOCK])
            for start in range(0, max(1, len(texts)), BLOCK)
        )
        if len(texts) <= BLOCK:
            return self.decoder.passages(next(blocks))
        parts = zip(*self.decoder.passages_of_blocks(blocks), strict=True)
        passages, scores = (np.concatenate(part) for part in parts)
        return passages, scores

    def _hit(self, rank: int, hit: SystemHit) -> Hit:
        passage = self.store[hit.passage]
        identifier = self.vocabulary.decode(hit.tokens[hit.tokens > 0].tolist())
        named = passage.pid, hit.score, passage.title, passage.text, identifier
        return Hit(rank, *named, dict(hit.parts))


@dataclass(frozen=True)
class _Sources:
    """What a system is opened from: trained ones by name, each with the prepare stage that it was
    trained on; said: of a system that no stage trains, what `kinds.untrained` says of it;
    answering: the trained ones or, where it is made of passages alone, the evaluation."""

    name: str
    model_dir: Path
    trained: Mapping[str, records.Answering]
    prepared: Path
    said: Mapping[str, Any]
    answering: tuple[records.Answering, ...]

    @classmethod
    def of(cls, model_dir: Path, system: str | None) -> _Sources:
        """The sources of a system, or of the best one."""
        untrained, names = kinds.untrained(model_dir), kinds.best_first(model_dir)
        if system is not None and system in untrained:
            return cls._made_of(model_dir, system, untrained[system])
        if system not in (None, *names):
            raise ValueError(
                f"system: got {system!r}, expected one of {', '.join([*names, *untrained])}, those "
                f"of {model_dir}"
            )
        for name, said in untrained.items() if system is None else ():
            with contextlib.suppress(FileNotFoundError, ValueError):  # a lesser one answers
                if kinds.settings_of(said).preferred:
                    return cls._made_of(model_dir, name, said)
        answering = records.answering(model_dir, names if system is None else (system,))
        name = answering.student.name.removesuffix(records.SWAP)
        return cls(name, model_dir, {name: answering}, answering.prepared, {}, (answering,))

    @classmethod
    def _made_of(cls, model_dir: Path, system: str, said: Mapping[str, Any]) -> _Sources:
        names = kinds.settings_of(said).made_of
        trained = {name: records.answering(model_dir, (name,)) for name in names}
        answering = tuple(trained.values()) or (
            records.answering(model_dir, (kinds.EVALUATION,), kinds.SYSTEMS),
        )
        prepared = {answer.prepared for answer in answering}
        if len(prepared) > 1:
            raise ValueError(
                f"{model_dir}: {' and '.join(names)}, of which {system} is made, were trained on "
                "different identifiers; train them again"
            )
        return cls(system, model_dir, trained, prepared.pop(), said, answering)

    @property
    def unchanged(self) -> bool:
        """Whether everything is still what it was when it was looked for."""
        return all(answering.unchanged for answering in self.answering)


def _check_sizes(settings: Mapping[str, Any], usual: Mapping[str, Any]) -> None:
    """Raises ValueError for a setting that is no whole number where it usually is one."""
    for name, value in settings.items():
        if type(usual[name]) is int and (
            isinstance(value, bool) or not isinstance(value, (int, np.integer))
        ):
            raise ValueError(f"{name}: got {value!r}, expected a whole number")


def is_text(value: Any) -> bool:
    """Whether it is a string without halves of surrogate pairs, which no encoding can write."""
    return isinstance(value, str) and not any("\ud800" <= c <= "\udfff" for c in value)
