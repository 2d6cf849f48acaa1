"""A finished experiment, opened to answer questions."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

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
from dgr_jax.retrieval.sources import Sources
from dgr_jax.retrieval.system import Opening, System, SystemHit

USUAL_K = 10  # passages of a query, where nobody says how many
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
    """A finished experiment that answers questions.

    version: of the index (see `living.update`); 0: the passages that it was trained on.
    """

    def __init__(
        self,
        decoder: System,
        vocabulary: Vocabulary,
        store: PassageStore,
        opened: _Opened | None = None,
    ) -> None:
        """opened: what it was opened from, where that is a MODEL_DIR."""
        self._index = _Index(decoder.by_pid(store.pid_of), store, opened)
        self.vocabulary = vocabulary

    @property
    def decoder(self) -> System:
        """What answers."""
        return self._index.decoder

    @property
    def store(self) -> PassageStore:
        """The passages that it answers with."""
        return self._index.store

    @property
    def version(self) -> int:
        """The version of the index that answers."""
        return self._index.opened.sources.version if self._index.opened else 0

    @classmethod
    def load(
        cls,
        model_dir: str | Path,
        *,
        system: str | None = None,
        mesh: partitioning.Mesh | None = None,
        beside: Iterable[Retriever] = (),
        **settings: Any,
    ) -> Retriever:
        """Open a MODEL_DIR.

        system: one that the experiment trains, such as 'distill', or that it measures beside, such
          as 'bm25' or 'planned'; None: 'planned', where the experiment was evaluated with a plan,
          otherwise the best trained one that is finished.
        mesh: how all devices share queries and parameters; None: one device does it all.
        beside: retrievers that are open; parameters of theirs are not read again, and not kept
          twice, where the devices are the same.
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
        known: dict[records.Answering, Any] = {}
        for _, _, opened in (retriever._index for retriever in beside):
            if opened and (opened.asked.devices, opened.asked.rules) == (devices, rules):
                known |= opened.params
        return cls._load(_Asked(Path(model_dir), system, devices, rules, settings), known)

    @classmethod
    def _load(cls, asked: _Asked, known: Mapping[records.Answering, Any]) -> Retriever:
        """known: parameters of trained systems, which are not read again."""
        for _ in range(_TRIES):
            sources = Sources.of(asked.model_dir, asked.system)
            try:
                retriever = cls._open(asked, sources, known)
            except (FileNotFoundError, ValueError):
                if sources.unchanged:
                    raise
                continue
            if sources.unchanged:
                sources.warn()
                return retriever
        raise ValueError(f"{asked.model_dir} was changed each time that it was read; ask again")

    @classmethod
    def _open(
        cls, asked: _Asked, sources: Sources, known: Mapping[records.Answering, Any]
    ) -> Retriever:
        """The retriever of a system and the prepare stage that it was trained on."""
        students = {n: kinds.read_student(a.student) for n, a in sources.trained.items()}
        settings, untrained = asked.settings, None
        if sources.said:
            untrained = kinds.settings_of(sources.said)
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
        index, vocabulary = sources.index, Vocabulary.load(sources.prepared)
        store = PassageStore(index / "passages", sources.prepared / "passages")
        # Their files are opened now: what lies in their place later may be another version.
        vocabulary.encode("")
        store.pids, store[0]
        params: dict[records.Answering, Any] = {}

        def trained(name: str) -> System:
            student, answering = students[name], sources.trained[name]
            searched = {k: v for k, v in settings.items() if k in student.search}
            on = asked.devices, asked.rules
            params[answering] = known.get(answering)
            if params[answering] is None:
                params[answering] = kinds.params_of(student, answering.student, *on)
            placed = answering.student, index, vocabulary, *on, searched
            return kinds.open_student(student, *placed, params[answering])

        opened = _Opened(asked, sources, params)
        if untrained is None:
            return cls(trained(sources.name), vocabulary, store, opened)
        depth = settings.get("depth", sources.said["depth"])
        opening = Opening(index, store, depth, asked.devices, asked.rules, trained)
        given = {k: v for k, v in settings.items() if k in own}
        return cls(untrained.replaced(**given).open(opening), vocabulary, store, opened)

    def add(self, passages: Iterable[Passage]) -> int:
        """Adds passages to the index of MODEL_DIR, where one of the same pid is replaced; from then
        on this retriever answers with them. -> the version of the index.

        Nothing is trained, and nothing is compiled again as long as the index stays in its size
        class. Raises ValueError, and changes nothing, for what `living.update.update` refuses.
        """
        return self._changed(added=passages)

    def remove(self, pids: Iterable[str]) -> int:
        """Removes passages from the index of MODEL_DIR, as `add` adds them."""
        return self._changed(removed=pids)

    def newest(self) -> Retriever:
        """This retriever or, where there is another version of the index or another student by now,
        one of these, with the same settings; parameters that stay are not read again."""
        opened = self._opened("newest")
        if Sources.of(opened.asked.model_dir, opened.asked.system) == opened.sources:
            return self
        return self._load(opened.asked, opened.params)

    def _changed(self, **changes: Any) -> int:
        from dgr_jax.retrieval.living import update  # which a question has no use for

        opened = self._opened("add" if "added" in changes else "remove")
        version = update.update(opened.sources.versions, **changes).version
        self._index = self.newest()._index
        return version

    def _opened(self, asked: str) -> _Opened:
        """What this was opened from; ValueError where it has no index of its own."""
        if self._index.opened is None:
            raise ValueError(
                f"{asked}: this retriever was opened from no MODEL_DIR, or finds only some "
                "passages; expected one of Retriever.load"
            )
        return self._index.opened

    def restrict(self, passages: Iterable[str] | Callable[[Passage], bool]) -> Retriever:
        """A retriever that finds only some passages of those that this one finds; the model stays
        where it is, and nothing is compiled again.

        passages: their pids; or what says of a Passage whether it may be found, by its `pid`,
          `title`, `text` and `metadata`.
        Raises ValueError for pids that are not in the corpus, and where no passage is left.
        """
        if isinstance(passages, str):
            raise ValueError(f"passages: got one string {passages!r}, expected a list of pids")
        decoder, store, _ = self._index
        if callable(passages):
            mask = np.fromiter((bool(passages(p)) for p in store), bool, len(store))
        else:
            pids = list(dict.fromkeys(passages))
            if unknown := [pid for pid in pids if pid not in store]:
                more = f" and {len(unknown) - 3:,} more" if len(unknown) > 3 else ""
                raise ValueError(
                    f"passages: got {', '.join(map(repr, unknown[:3]))}{more}, expected pids of "
                    f"the {len(store):,} passages of the corpus"
                )
            mask = np.zeros(len(store), bool)
            mask[[store.index_of(pid) for pid in pids]] = True
        if not mask.any():
            raise ValueError("passages: got none of the corpus, expected one or more")
        some = copy.copy(self)
        some._index = _Index(decoder.restrict(mask), store, None)
        return some

    def save(self, folder: str | Path, **card: Any) -> Path:
        """Writes what answers into a new folder, without what only training reads, see `hub`.

        card: license and datasets, for the model card, by the names of the Hugging Face Hub.
        Of the index, the version that answers is written, and the prepare stage.
        Raises ValueError for a retriever that no student of a MODEL_DIR is a part of.
        """
        from dgr_jax.retrieval import hub

        opened = self._index.opened
        if opened is None or not opened.sources.trained:
            raise ValueError(
                "Retriever.save: got one that was restricted, made by hand, or has no trained "
                "student, expected what Retriever.load returns for a trained one"
            )
        return hub.save(opened.asked.model_dir, opened.sources.trained, folder, **card)

    def push_to_hub(
        self,
        repo: str,
        *,
        private: bool = False,
        message: str = "A retriever of dgr_jax",
        **card: Any,
    ) -> str:
        """Uploads what `save` writes to a repository of the Hugging Face Hub -> its address. The
        passages, and config.gin with the paths in it, are published with it. A push that was cut
        off goes on when it is asked again."""
        from dgr_jax.retrieval import hub

        with tempfile.TemporaryDirectory(prefix="dgr_jax-") as folder:
            saved = self.save(Path(folder) / "retriever", **card)
            return hub.push(saved, repo, private=private, message=message)

    @classmethod
    def from_hub(
        cls, repo: str | Path, *, revision: str | None = None, **settings: Any
    ) -> Retriever:
        """Opens a repository of the Hugging Face Hub, or a folder that `save` wrote, and runs
        nothing of it; settings: those of `load`."""
        from dgr_jax.retrieval import hub

        return cls.load(hub.fetch(repo, revision), **settings)

    def search(self, queries: Sequence[str], k: int | None = None) -> list[list[Hit]]:
        """The best k passages of each query; fewer where the beam found fewer. None: ten, or as
        many as can be found.

        Raises ValueError for a k that is no whole number of at least 1, or that the settings do not
        reach, and for a query that is no text.
        """
        if isinstance(queries, str):
            raise ValueError(f"queries: got one string {queries!r}, expected a list of strings")
        for query in queries:
            if not is_text(query):
                raise ValueError(f"queries: got {query!r:.80}, expected text that can be written")
        decoder, store, _ = self._index
        if k is None:
            k = min(USUAL_K, decoder.most_passages)
        check_k(k)
        if k > decoder.most_passages:
            limits = decoder.limits.items()
            told = " and ".join(f"{name} ({limit})" for name, limit in limits if name != "passages")
            raise ValueError(
                f"k: got {k}, expected at most {decoder.most_passages}: set {told} in "
                "Retriever.load"
            )
        encoded = decoder.encode(self.vocabulary, queries)
        return [
            [self._hit(store, rank, hit) for rank, hit in enumerate(hits[:k], start=1)]
            for hits in decoder.hits(encoded)
        ]

    def run(self, queries: dict[str, str]) -> dict[str, list[ScoredPassage]]:
        """qid -> text in, qid -> passages out, at the depth of the settings."""
        decoder, store, _ = self._index
        ranked = self._retrieved(decoder, list(queries.values()))
        return scored_passages(list(queries), *ranked, store.pids)

    def rerank(
        self,
        queries: Mapping[str, str],
        run: Mapping[str, Sequence[ScoredPassage]],
        *,
        weight: float | None = None,
    ) -> dict[str, list[ScoredPassage]]:
        """The passages of a run in the order of the student, see `reranking.rerank`."""
        decoder, store, _ = self._index
        return rerank(decoder, self.vocabulary, store, queries, run, weight)

    def explain(self, query: str, pid: str | None = None) -> Explanation:
        """What the search for a query has looked at, and at which step it lost a passage; see
        `explanation.explain`."""
        decoder, store, _ = self._index
        return explain(decoder, self.vocabulary, store, query, pid)

    def _retrieved(self, decoder: System, texts: Sequence[str]) -> Found:
        blocks = (
            decoder.encode(self.vocabulary, texts[start : start + BLOCK])
            for start in range(0, max(1, len(texts)), BLOCK)
        )
        if len(texts) <= BLOCK:
            return decoder.passages(next(blocks))
        parts = zip(*decoder.passages_of_blocks(blocks), strict=True)
        passages, scores = (np.concatenate(part) for part in parts)
        return passages, scores

    def _hit(self, store: PassageStore, rank: int, hit: SystemHit) -> Hit:
        passage = store[hit.passage]
        identifier = self.vocabulary.decode(hit.tokens[hit.tokens > 0].tolist())
        named = passage.pid, hit.score, passage.title, passage.text, identifier
        return Hit(rank, *named, dict(hit.parts))


@dataclass(frozen=True)
class _Asked:
    """What `Retriever.load` was asked for."""

    model_dir: Path
    system: str | None
    devices: jax.sharding.Mesh
    rules: partitioning.Rules
    settings: dict[str, Any]


class _Opened(NamedTuple):
    """What a retriever was asked for, what it was opened from, and the parameters of its trained
    systems."""

    asked: _Asked
    sources: Sources
    params: Mapping[records.Answering, Any]


class _Index(NamedTuple):
    """What changes together when passages come or go; opened: None where they cannot."""

    decoder: System
    store: PassageStore
    opened: _Opened | None


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
