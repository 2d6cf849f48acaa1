"""Stages generate, control and distill: training runs of the student."""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path
from typing import Any

from dgr_jax import processes
from dgr_jax.data.vocabulary import Vocabulary
from dgr_jax.experiments.common import Training
from dgr_jax.experiments.dense import DenseExperiment
from dgr_jax.experiments.generative import Experiment
from dgr_jax.model_dir import kept
from dgr_jax.models.t5 import T5Config, Transformer
from dgr_jax.retrieval.kinds import write_student
from dgr_jax.stages import validation
from dgr_jax.stages.prepared import Prepared
from dgr_jax.stages.start import parameters as corpus_params
from dgr_jax.stages.systems import assembled, params
from dgr_jax.stages.training_run import Later, _Together, train
from dgr_jax.training import packing
from dgr_jax.training.source import ArraySource, MixtureSource, Source

logger = logging.getLogger(__name__)


def generate(experiment: Experiment, folder: Path) -> None:
    """Learn to generate identifiers."""
    start = None
    if experiment.initial is not None:
        vocabulary = Prepared.load(experiment.model_dir).vocabulary
        config = experiment.sized(vocabulary.size)
        if "start" in experiment.stages:
            start = corpus_params(experiment, Transformer(config), experiment.generate.seed)
        else:
            start = initial_params(experiment, config, vocabulary)
    _train(experiment, folder, "generate", experiment.generate, start)


def initial_params(
    experiment: Experiment | DenseExperiment, config: T5Config, vocabulary: Vocabulary
) -> Any:
    """Published weights as the start of a student of these sizes."""
    if not experiment.prepare.vocabulary.path:
        logger.warning(
            "%s with a vocabulary of this corpus: its pieces are others than those of the weights; "
            "SentencePiece.path: got '', expected the vocabulary of the weights",
            type(experiment.initial).__name__,
        )
    return experiment.initial.params(
        config, pieces=vocabulary.pieces, text_tokens=vocabulary.first_view_id
    )


def control(experiment: Experiment, folder: Path) -> None:
    """Generation alone, from the checkpoint of distillation and on as many examples: the same ones
    where those are the mixture's."""
    start = params(experiment, "generate", Prepared.load(experiment.model_dir))
    _train(experiment, folder, "control", _control(experiment), start)


def distill(experiment: Experiment, folder: Path) -> None:
    """Rank lists and generation examples, from the generation student."""
    start = params(experiment, "generate", Prepared.load(experiment.model_dir))
    _train(experiment, folder, "distill", experiment.distill, start)


def _control(experiment: Experiment) -> Training:
    return dataclasses.replace(
        experiment.distill,
        objective=experiment.generate.objective,
        batch_size=experiment.distill.examples,
    )


def batches(experiment: Experiment, stage: str) -> Source:
    """What a training stage learns from, step by step."""
    if stage == "generate":
        return _mixture(experiment, experiment.generate)
    before = experiment.generate.steps
    if stage == "control":
        return Later(_mixture(experiment, _control(experiment)), before)
    settings = experiment.distill
    parts = {"rank_list": _rank_lists(experiment, settings)}
    if settings.batch_size:
        parts["generation"] = Later(_mixture(experiment, settings), before)
    return _Together(parts)


def _rank_lists(experiment: Experiment, settings: Training) -> Source:
    folder = Path(experiment.model_dir) / "teach"
    lists = ArraySource(folder / "rank_lists", settings.list_batch_size, settings.seed)
    if "identifier_views" not in lists.features:
        return lists
    tokens, views = (lists.features[f"identifier_{name}"] for name in ("tokens", "views"))
    with kept.reading(folder / "report.json"):
        counted = int(kept.read_json(folder / "report.json")["keys"].get("packed_rows", 0))
    # The teach stage of an older version did not count them.
    rows = counted or packing.rows_needed(tokens, views)
    return packing.PackedLists(lists, tokens.shape[1:], rows)


def _mixture(experiment: Experiment, settings: Training) -> MixtureSource:
    arrays = Path(experiment.model_dir) / "prepare" / "arrays"
    rates = experiment.prepare.sources.rates()
    return MixtureSource(
        {name: (arrays / name, rate) for name, rate in rates.items()},
        settings.batch_size,
        settings.seed,
    )


def _train(
    experiment: Experiment,
    folder: Path,
    name: str,
    settings: Training,
    start: Any,
) -> None:
    made = Prepared.load(experiment.model_dir)
    config = experiment.sized(made.vocabulary.size)
    opened = lambda params, search: assembled(experiment, folder, params, search, made)
    validated = validation.of(experiment, settings, made, validation.reopened(opened))
    source = batches(experiment, name)
    train(experiment, folder, name, settings, Transformer(config), source, start, validated)
    if processes.first():
        systems = experiment.systems
        write_student(folder, experiment.kind, config, experiment.evaluate.search, systems)
