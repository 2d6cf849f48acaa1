"""A finished experiment, opened to answer questions."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from dgr_jax import partitioning
from dgr_jax.corpora.store import PassageStore
from dgr_jax.corpora.types import ScoredPassage
from dgr_jax.data.vocabulary import Vocabulary
from dgr_jax.decoding import trie
from dgr_jax.decoding.selection import check_k
from dgr_jax.identifiers.table import IdentifierTable
from dgr_jax.model_dir import kept, records
from dgr_jax.model_dir.records import STUDENT
from dgr_jax.models.t5 import T5Config, Transformer
from dgr_jax.retrieval import trained
from dgr_jax.retrieval.batching import BLOCK, Found, scored_passages
from dgr_jax.retrieval.bm25 import Bm25
from dgr_jax.retrieval.generative import Decoder, Search
from dgr_jax.retrieval.planned import PlannedDecoder
from dgr_jax.retrieval.reranking import rerank
from dgr_jax.retrieval.simultaneous import Lexical, Plan

if TYPE_CHECKING:
    from dgr_jax.models.dual_encoder import DualEncoderConfig
    from dgr_jax.retrieval.dense import DenseSearch, Searcher
    from dgr_jax.retrieval.multiview.search import MultiviewDecoder, MultiviewSearch
logger = logging.getLogger(__name__)


_PLANNED = "distill"  # the student of the system `planned`
SYSTEMS = ("planned", "distill", "control", "generate", "refresh", "dense")
PLAN = "plan.json"  # in the folder of an evaluation with a plan
_PLANS = {plan.__name__: plan for plan in (Lexical,)}
_TRIES = 3  # times that a MODEL_DIR is opened which changes while it is read


@dataclass(frozen=True)
class Hit:
    """One found passage: score is the log-probability of its identifier; where it has many, their
    passage score, and `identifier` is the one of most weight. Of a dense retriever it is the
    product of the vectors, and `identifier` is blank. With a plan it is plan_score + weight *
    log_prob, -inf where the identifier was not written; both are None otherwise."""

    rank: int
    pid: str
    score: float
    title: str
    text: str
    identifier: str
    plan_score: float | None = None
    log_prob: float | None = None


class Retriever:
    """A finished experiment that answers questions."""

    def __init__(
        self,
        decoder: Decoder | MultiviewDecoder | Searcher,
        vocabulary: Vocabulary,
        store: PassageStore,
    ) -> None:
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

        system: 'planned', 'distill', 'control' or 'generate', or of a dense retriever 'refresh' or
          'dense'; None: the first of these that is finished. 'planned' is 'distill' with the plan
          that the experiment was evaluated with.
        mesh: how all devices share queries and parameters; None: one device does it all.
        settings: fields of its `Search` (or `MultiviewSearch`, `DenseSearch`), and of its plan,
          that replace those of the experiment, such as num_beams.
        While the student, or the prepare stage that it was trained on, is made again, their last
        whole versions answer (`records.answering`); a warning says so, and where a better student
        is to be expected.
        Raises FileNotFoundError when no trained student is there, ValueError for settings that it
        does not have, and where the identifiers that it was trained on are gone.
        """
        names = {None: SYSTEMS[1:], "planned": (_PLANNED,)}
        systems = names.get(system, (system,))
        if mesh is None:
            devices = partitioning.make_mesh(devices=jax.devices()[:1])
        else:
            devices = partitioning.make_mesh(mesh)
        rules = partitioning.RULES if mesh is None else mesh.rules
        for _ in range(_TRIES):
            answering = records.answering(Path(model_dir), systems)
            try:
                plan = _plan_of(Path(model_dir), system, answering.student.name)
                retriever = cls._open(answering, devices, rules, settings, plan)
            except (FileNotFoundError, ValueError):
                if answering.unchanged:
                    raise
                continue
            if answering.unchanged:
                if answering.aside:
                    logger.warning("%s: %s", answering.student, answering.aside)
                return retriever
        raise ValueError(f"{model_dir} was changed each time that it was read; ask again")

    @classmethod
    def _open(
        cls,
        answering: records.Answering,
        devices: jax.sharding.Mesh,
        rules: partitioning.Rules,
        settings: dict[str, Any],
        plan: Plan | None,
    ) -> Retriever:
        """The retriever of a student and the prepare stage that it was trained on."""
        folder, prepared = answering.student, answering.prepared
        described = _described(folder / STUDENT)
        usual = described["search"] | (asdict(plan) if plan else {})
        if unknown := sorted(settings.keys() - usual.keys()):
            raise ValueError(
                f"{', '.join(unknown)}: the {folder.name} retriever of {folder.parent} has no "
                f"such setting, expected some of {', '.join(usual)}"
            )
        _check_sizes(settings, usual)
        if plan:
            own = {name: value for name, value in settings.items() if hasattr(plan, name)}
            plan = replace(plan, **own)
            settings = {k: v for k, v in settings.items() if k in described["search"]}
        vocabulary, store = Vocabulary.load(prepared), PassageStore(prepared / "passages")
        # Their files are opened now: what lies in their place later may be another version.
        vocabulary.encode("")
        store.pids, store[0]
        if "t5" in described["model"]:
            from dgr_jax.retrieval import dense

            search = described["search"] | settings
            searcher = dense.load(folder, described["model"], search, devices, rules)
            return cls(searcher, vocabulary, store)
        with kept.reading(folder / STUDENT):
            config = T5Config(**described["model"])
        params = trained.params(folder, Transformer(config), devices, rules)
        if vocabulary.views:
            from dgr_jax.retrieval.multiview import search as multiview

            search = multiview.MultiviewSearch.of(described["search"] | settings)
            indexes = multiview.ViewIndexes.load(prepared, vocabulary)
            decoder = multiview.MultiviewDecoder.of(config, params, indexes, search, devices, rules)
        else:
            search = Search(**described["search"] | settings)
            index = trie.load(prepared / "trie")
            table = IdentifierTable.load(prepared / "identifiers")
            decoder = Decoder(config, params, index, table, search, devices, rules=rules)
            if plan:
                planner = plan.planner(store, prepared / "plans")
                decoder = PlannedDecoder.of(decoder, plan, planner)
        return cls(decoder, vocabulary, store)

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
            [self._hit(rank, *hit) for rank, hit in enumerate(hits[:k], start=1)]
            for hits in self.decoder.hits(encoded)
        ]

    def run(self, queries: dict[str, str]) -> dict[str, list[ScoredPassage]]:
        """qid -> text in, qid -> passages out, at the depth of the settings."""
        found = self._found(list(queries.values()))
        return scored_passages(list(queries), *found, self.store.pids)

    def rerank(
        self,
        queries: Mapping[str, str],
        run: Mapping[str, Sequence[ScoredPassage]],
        *,
        weight: float | None = None,
    ) -> dict[str, list[ScoredPassage]]:
        """The passages of a run in the order of the student, see `reranking.rerank`."""
        return rerank(self.decoder, self.vocabulary, self.store, queries, run, weight)

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

    def _hit(self, rank: int, index: int, score: float, tokens: np.ndarray, *parts: float) -> Hit:
        passage = self.store[index]
        identifier = self.vocabulary.decode(tokens[tokens > 0].tolist())
        return Hit(rank, passage.pid, score, passage.title, passage.text, identifier, *parts)


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


def write_student(
    folder: Path,
    config: T5Config | DualEncoderConfig,
    search: Search | MultiviewSearch | DenseSearch,
) -> None:
    """Leave beside a student's checkpoints what `Retriever.load` needs to know."""
    described = {"model": asdict(config), "search": asdict(search)}
    (folder / STUDENT).write_text(json.dumps(described, indent=1), encoding="utf-8")


def _plan_of(model_dir: Path, system: str | None, student: str) -> Plan | None:
    """The plan that a student of MODEL_DIR answers with, where it was asked for, or nothing was."""
    if system not in (None, "planned") or student != _PLANNED:
        return None
    plan = read_plan(model_dir / "evaluate")
    if plan is None and system == "planned":
        raise ValueError(
            f"{model_dir / 'evaluate'}: has no {PLAN}, which the evaluation of an experiment with "
            "Experiment.plan leaves there"
        )
    return plan


def write_plan(folder: Path, plan: Plan) -> None:
    """Leave in the folder of an evaluation the plan that the student answers with."""
    described = {"is": type(plan).__name__, **asdict(plan)}
    (folder / PLAN).write_text(json.dumps(described, indent=1), encoding="utf-8")


def read_plan(folder: Path) -> Plan | None:
    """What `write_plan` wrote; None where it has written nothing."""
    if not (folder / PLAN).is_file():
        return None
    with kept.reading(folder / PLAN):
        described = kept.read_json(folder / PLAN)
        kind = _PLANS[described.pop("is")]
        return kind(**described | {"bm25": Bm25(**described["bm25"])})


def _described(path: Path) -> dict[str, dict[str, Any]]:
    """What `write_student` wrote."""
    with kept.reading(path):
        described = kept.read_json(path)
        return {name: dict(described[name]) for name in ("model", "search")}
