"""A student learns the passages that were added to its index: `python -m dgr_jax.update --refresh`.

MODEL_DIR/refreshed-3 is the student that has learned those of version 3, beside the one that it
began from. It is made as any stage is, and answers once it is done.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import logging
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import jax
import numpy as np

from dgr_jax import partitioning, processes
from dgr_jax.data.examples import SOURCES
from dgr_jax.experiments.refresh import Refresh
from dgr_jax.experiments.stage import Stage
from dgr_jax.identifiers.table import IdentifierTable
from dgr_jax.losses import levels
from dgr_jax.model_dir import records
from dgr_jax.model_dir.index_versions import Versions
from dgr_jax.models.t5 import T5Config, Transformer
from dgr_jax.partitioning import Mesh
from dgr_jax.retrieval import kinds
from dgr_jax.retrieval.generative import Search
from dgr_jax.retrieval.kinds import Student
from dgr_jax.retrieval.living.change import scheme_of
from dgr_jax.retrieval.student_planned import PlannedByStudent
from dgr_jax.retrieval.system import SystemSettings
from dgr_jax.settings import restored
from dgr_jax.stages import added, pipeline
from dgr_jax.stages.added import Slices
from dgr_jax.stages.training_run import check_batches, train
from dgr_jax.training.arrays import Features, write_arrays
from dgr_jax.training.refreshing import OLD, SlowRows, WithLevels, codes_of
from dgr_jax.training.source import MixtureSource, Source

logger = logging.getLogger(__name__)

NAME = "refreshed"
_ARRAYS = "arrays"


def refresh(settings: Refresh) -> Path:
    """Makes the refreshed student of the version of the index that answers; -> its folder.

    Raises FileNotFoundError or ValueError, before work starts, where there is nothing to learn, and
    for a student that cannot be refreshed.
    """
    begun = Begun.of(settings)
    pipeline.run(begun, [begun.name])
    return Path(settings.model_dir) / begun.name


@dataclass(frozen=True)
class Begun:
    """A student that is about to learn the passages of a version: what a pipeline runs.

    began: name of the student that it begins from.
    """

    settings: Refresh
    began: str
    prepared: Path
    versions: Versions
    version: int

    @classmethod
    def of(cls, settings: Refresh) -> Begun:
        """From the best student that has not learned the version of the index that answers."""
        folder = Path(settings.model_dir)
        best = records.answering(folder, kinds.best_first(folder))
        versions = Versions.of(folder, best.prepared)
        version = versions.current()
        names = [name for name in kinds.best_first(folder) if name != f"{NAME}-{version}"]
        answering = records.answering(folder, names)
        for place in (answering.student, answering.prepared):
            if place.parent != folder:
                raise ValueError(
                    f"{place.name}: is being made again, expected a MODEL_DIR whose stages are "
                    f"done: python -m dgr_jax.train --model_dir={folder}"
                )
        return cls(settings, answering.student.name, answering.prepared, versions, version)

    @property
    def name(self) -> str:
        """Of the stage."""
        return f"{NAME}-{self.version}"

    @property
    def model_dir(self) -> str:
        """See Experiment."""
        return self.settings.model_dir

    @property
    def mesh(self) -> Mesh:
        """See Experiment."""
        return self.settings.mesh

    @property
    def stages(self) -> dict[str, Stage]:
        """The one stage, which has read all stages of the student that it begins from."""
        path = self.settings.pseudo_query_path
        reads = {"Refresh.pseudo_query_path": path} if path else {}
        stage = Stage(self.name, make, settings=_asked, reads=lambda _: reads, check=_check)
        return {self.name: stage}

    @cached_property
    def student(self) -> Student:
        """Whom it begins from."""
        return kinds.read_student(self.folder)

    @property
    def folder(self) -> Path:
        """Of the student that it begins from."""
        return Path(self.model_dir) / self.began

    @cached_property
    def slices(self) -> Slices:
        """What it knows, and what it is to learn."""
        prepare = records.read_record(self.prepared).get("settings", {}).get("prepare", {})
        return Slices(self.prepared, self.versions.at(self.version), self.folder, prepare)

    @cached_property
    def codes(self) -> np.ndarray:
        """The codes of each level, int32 [T, C]."""
        return codes_of(np.asarray(self.slices.table.tokens))


def _asked(begun: Begun) -> dict[str, Any]:
    """What the stage is made from: its settings, the version, and all stages of the student before,
    by whose prepare stage readers know the index."""
    given = ("training", "pseudo_query_path", "replay", "recent", "docid_rate", "text_rate")
    own = {name: getattr(begun.settings, name) for name in given}
    about = begun.versions.about(begun.version) if begun.version else None
    version = {"version": begun.version, "made": about.made if about else ""}
    before = records.read_record(begun.folder).get("settings", {})
    return {"refresh": own, "index": version, begun.began: before}


def _check(begun: Begun) -> None:
    """Raises ValueError where there is nothing to learn, or a student that cannot."""
    if processes.count() > 1:
        raise ValueError(f"got {processes.count()} processes, expected one to refresh a student")
    folder, student = begun.model_dir, begun.student
    if student.kind != "docid":
        raise ValueError(
            f"{begun.folder}: is of kind {student.kind!r}, expected 'docid', a student that writes "
            "one identifier a passage; others find passages that were added without training"
        )
    scheme = scheme_of(begun.slices.settings, begun.prepared)
    if not scheme.codes_by_position:
        raise ValueError(
            f"{begun.prepared}: has identifiers of {type(scheme).__name__}, expected some whose "
            "codes are other tokens at every level, such as those of ResidualQuantization or "
            "KMeansTree: only these are refreshed"
        )
    for said in kinds.untrained(Path(folder)).values():
        if issubclass(SystemSettings.kinds.get(said["kind"], SystemSettings), PlannedByStudent):
            raise ValueError(
                f"{folder}: was evaluated with a plan of the student's own ({said['kind']}), "
                "expected none or PLAN=@Lexical(): a refreshed student is not trained for its plan"
            )
    size, expected = int(student.model["vocab_size"]), begun.slices.vocabulary.size
    if size < expected:
        raise ValueError(
            f"{begun.folder}: writes {size:,} tokens, expected at least {expected:,}, those of the "
            f"vocabulary in {begun.prepared}: they do not belong together"
        )
    if not begun.version or (begun.slices.known > 0).all():
        raise ValueError(
            f"{folder}: got no passages that {begun.began} has not learned (version "
            f"{begun.version} of the index answers), expected some: "
            f"python -m dgr_jax.update --model_dir={folder} --add=FILE"
        )
    if begun.settings.replay and not (begun.prepared / "arrays").is_dir():
        raise ValueError(
            f"Refresh.replay: got {begun.settings.replay} without {begun.prepared / 'arrays'}, "
            "which the student has learned from, expected 0 (--gin.REPLAY=0)"
        )
    check_batches(begun, begun.name, begun.settings.training, "batch_size")


def make(begun: Begun, folder: Path) -> None:
    """Writes the examples, trains, and leaves what `Retriever.load` needs."""
    student, settings = begun.student, begun.settings
    config = restored(T5Config, student.model)
    mesh = partitioning.make_mesh(begun.mesh)
    params = kinds.params_of(student, begun.folder, mesh, begun.mesh.rules)
    rates = _write_examples(begun, folder, config, params)
    source = batches(begun, folder, rates)
    slow = SlowRows(settings.training.optimizer, row_rates(begun, config.vocab_size))
    training = dataclasses.replace(settings.training, optimizer=slow)
    run = begun, folder, folder.name, training, Transformer(config), source, params
    train(*run, pack_queries=training.pack_queries)
    (folder / added.LEARNED).write_text(json.dumps(begun.slices.all_learned()), encoding="utf-8")
    began = begun.began, str(records.read_record(begun.folder).get("fingerprint"))
    systems = (*(name for name in student.systems if name != begun.name), begun.name)
    search = restored(Search, student.search)
    kinds.write_student(folder, student.kind, config, search, systems, began)


def batches(begun: Begun, folder: Path, rates: dict[str, float]) -> Source:
    """What is learned, step by step; rates: of `_write_examples`."""
    tasks: dict[str, Any] = {name: (folder / _ARRAYS / name, rate) for name, rate in rates.items()}
    training = begun.settings.training
    return WithLevels(MixtureSource(tasks, training.batch_size, training.seed), begun.codes)


def _write_examples(begun: Begun, folder: Path, config: T5Config, params: Any) -> dict[str, float]:
    """Writes the token arrays of what is learned, with what the student says of it before; -> the
    rate of each. Those that a run before has written stay."""
    rates, counts = {}, {}
    old_log_probs = functools.partial(_log_probs_fn(config), params)
    objective: Any = begun.settings.training.objective
    for name, rate, features in _examples(begun):
        target = folder / _ARRAYS / name
        if not target.is_dir():
            blocks: Iterator[Features] = added.blocks_of(features)
            if objective.old_weight:
                blocks = _with_old(blocks, begun.codes, old_log_probs)
            write_arrays(target, blocks)
        rates[name] = rate
        counts[name] = len(features["decoder_target_tokens"])
    new = int(np.count_nonzero(begun.slices.known == 0))
    report = {"passages": new, "examples": counts, "rates": rates}
    (folder / "report.json").write_text(json.dumps(report, indent=1), encoding="utf-8")
    logger.info(
        "%s: %s passages that %s has not learned; examples: %s",
        *(begun.name, f"{new:,}", begun.began),
        ", ".join(f"{count:,} {name}" for name, count in counts.items()),
    )
    return rates


def _examples(begun: Begun) -> Iterator[tuple[str, float, Features]]:
    """(name, rate, features) of what is learned: of the new passages by source, and replayed."""
    settings, slices = begun.settings, begun.slices
    sources = slices.sources(settings.pseudo_query_path)
    new = slices.of_passages(np.flatnonzero(slices.known == 0), sources)
    if not new:
        raise ValueError(
            f"{begun.name}: got no text of the passages to learn, expected a sentence or more of "
            "them, or questions (--gin.PSEUDO_QUERIES=FILE)"
        )
    rates = {name: sources.rates()[name] for name in new}
    for name, rate in added.shares(rates, 1 - settings.replay).items():
        yield f"new-{name}", rate, new[name]
    if settings.replay:
        yield from _replayed(begun)


def _replayed(begun: Begun) -> Iterator[tuple[str, float, Features]]:
    """The same of what the student has learned before."""
    settings, slices = begun.settings, begun.slices
    later = slices.of_passages(np.flatnonzero(slices.known == 1), slices.sources(""))
    recent = settings.recent * settings.replay if later else 0.0
    if recent:
        rates = {name: slices.sources("").rates()[name] for name in later}
        for name, rate in added.shares(rates, recent).items():
            yield f"later-{name}", rate, later[name]
    share = settings.replay - recent
    if not share:
        return
    training, known = settings.training, slices.settings["sources"]
    rates = {name: known[name] for name in SOURCES if known[name]}
    drawn = added.shares(rates, training.steps * training.batch_size * share)
    old = {n: slices.before(n, math.ceil(count), training.seed) for n, count in drawn.items()}
    there = {name: features for name, features in old.items() if features is not None}
    if not there:
        raise ValueError("Refresh.replay: got no passage that is known and still there, expected 0")
    for name, rate in added.shares({n: rates[n] for n in there}, share).items():
        yield f"old-{name}", rate, there[name]


def _with_old(blocks: Iterator[Features], codes: np.ndarray, log_probs: Any) -> Iterator[Features]:
    """Blocks of examples with the log-probabilities of the student that was, f32 [n, T, C]."""
    for block in blocks:
        yield block | {OLD: old_of(block, codes, log_probs)}


def old_of(features: Features, codes: np.ndarray, log_probs: Any) -> np.ndarray:
    """f32 [n, T, C]: the log-probabilities of all codes of each level, a few examples at a time."""
    parts, batch = [], 64
    asked = [features[name] for name in ("encoder_input_tokens", "decoder_input_tokens")]
    for start in range(0, len(asked[0]), batch):
        part = [tokens[start : start + batch] for tokens in asked]
        more = batch - len(part[0])
        padded = [np.pad(tokens, ((0, more), (0, 0))) for tokens in part]
        parts.append(np.asarray(log_probs(*padded, codes))[: batch - more])
    return np.concatenate(parts)


@functools.lru_cache(maxsize=2)
def _log_probs_fn(config: T5Config) -> Any:
    """The compiled (params, queries [B, Q], inputs [B, T], codes [T, C]) -> f32 [B, T, C]."""

    def log_probs(params: Any, queries: Any, inputs: Any, codes: Any) -> jax.Array:
        logits: Any = Transformer(config).apply({"params": params}, queries, inputs)
        return levels.level_log_probs(logits, codes[None].repeat(len(queries), 0))

    return jax.jit(log_probs)


def row_rates(begun: Begun, size: int) -> np.ndarray:
    """f32 [V]: how fast the embedding of each token moves."""
    first, table = begun.slices.vocabulary.first_code_id, begun.slices.table
    known = table.rows_of_passages()[begun.slices.known > 0]
    before = IdentifierTable.load(begun.prepared / "identifiers").tokens
    learned = np.union1d(before, table.tokens[known[known >= 0]])
    rates = np.full(size, begun.settings.text_rate, np.float32)
    rates[first:] = 1.0
    rates[learned[learned >= first]] = begun.settings.docid_rate
    return rates
