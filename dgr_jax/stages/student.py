"""Stages generate and control: the student learns to write identifiers."""

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
from dgr_jax.experiments.stage import Stage, after, fields
from dgr_jax.model_dir import kept
from dgr_jax.models.initial import Pretrained
from dgr_jax.models.t5 import T5Config, Transformer
from dgr_jax.retrieval import set_identifiers
from dgr_jax.retrieval.kinds import write_student
from dgr_jax.retrieval.student_plans import Learned, OnePass
from dgr_jax.settings import describe
from dgr_jax.stages import start, validation
from dgr_jax.stages.prepared import PREPARE, Prepared
from dgr_jax.stages.systems import assembled, params
from dgr_jax.stages.training_run import Later, check_batches, train, validated
from dgr_jax.training.plan_losses import WithSets
from dgr_jax.training.source import MixtureSource, Source, read_arrays
from dgr_jax.training.together import grouped

logger = logging.getLogger(__name__)

PRETRAIN = "pretrain"  # the stage before, where there is one
_OWN, _ENOUGH = "passages_with_codes_of_their_own", 0.9


def generate(experiment: Experiment, folder: Path) -> None:
    """Learn to generate identifiers."""
    if isinstance(experiment.plan, OnePass):
        _say_of_own_codes(Path(experiment.model_dir) / PREPARE / "report.json")
    prepared = Prepared.load(experiment.model_dir)
    if PRETRAIN in experiment.stages:
        initial = params(experiment, PRETRAIN, prepared)
    else:
        initial = beginning(experiment, prepared, experiment.generate.seed)
    source = mixture(experiment, experiment.generate)
    train_student(experiment, folder, experiment.generate, source, initial)


def beginning(experiment: Experiment, prepared: Prepared, seed: int) -> Any:
    """Parameters before any training; None: random by the seed of what trains them."""
    if experiment.initial is None:
        return None
    config = experiment.sized(prepared.vocabulary.size)
    if start.STAGE.name in experiment.stages:
        return start.parameters(experiment, Transformer(config), seed)
    return initial_params(experiment, config, prepared.vocabulary)


def _say_of_own_codes(report: Path) -> None:
    """Logs how many passages one pass over all codes can tell apart, a warning where few."""
    with kept.reading(report):
        said = kept.read_json(report)["identifiers"]
        passages = int(said["passages"])
        own = passages - int(said["passages_without_identifier"])
        own = int(said.get(_OWN, own - int(said["passages_sharing_an_identifier"])))
    logger.log(
        logging.INFO if own >= _ENOUGH * passages else logging.WARNING,
        "OnePass: %s of %s passages (%.1f%%) have codes of their own, before those that break "
        "ties; one pass needs %.0f%% or more",
        *(f"{own:,}", f"{passages:,}", 100 * own / passages, 100 * _ENOUGH),
    )


def initial_params(
    experiment: Experiment | DenseExperiment, config: T5Config, vocabulary: Vocabulary
) -> Any:
    """Published weights as the start of a student of these sizes."""
    assert isinstance(experiment.initial, Pretrained)  # as there is no stage start
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
    """Trains generation alone, from the checkpoint that distillation starts from and on as many
    examples. They are the same ones where those of distillation are the mixture's."""
    settings = _control(experiment)
    source = later(experiment, settings)
    train_student(experiment, folder, settings, source, generated(experiment))


def _control(experiment: Experiment) -> Training:
    return dataclasses.replace(
        experiment.distill,
        objective=experiment.generate.objective,
        batch_size=experiment.distill.examples,
    )


def _control_settings(experiment: Experiment) -> dict[str, Any]:
    """The steps of distillation, without what only its rank lists need."""
    settings = describe(_control(experiment))
    for name in ("objective", "list_batch_size"):
        del settings[name]
    return {"distill": settings, "generate": experiment.generate}


def generated(experiment: Experiment) -> Any:
    """Parameters of the student that has learned to generate."""
    return params(experiment, GENERATE.name, Prepared.load(experiment.model_dir))


def mixture(experiment: Experiment, settings: Training) -> Source:
    """The examples of the generation objective."""
    arrays = Path(experiment.model_dir) / PREPARE / "arrays"
    rates = experiment.prepare.sources.rates()
    together = settings.examples_per_query
    if together == 1:
        tasks: dict[str, Any] = {name: (arrays / name, rate) for name, rate in rates.items()}
    else:
        tasks = {
            name: (grouped(read_arrays(arrays / name), together), rate)
            for name, rate in rates.items()
        }
    source = MixtureSource(tasks, settings.batch_size // together, settings.seed)
    return with_sets(experiment, source)


def with_sets(experiment: Experiment, source: Source) -> Source:
    """The source, whose batches bring along set identifiers where the plan is trained on them."""
    if not isinstance(experiment.plan, Learned):
        return source
    prepared = Prepared.load(experiment.model_dir)
    folder, size = prepared.folder / "plans", experiment.plan.set_size
    sets = set_identifiers.opened(
        *(prepared.store, prepared.vocabulary, size, folder), keep=processes.first()
    )
    return WithSets(source, prepared.table, sets)


def later(experiment: Experiment, settings: Training) -> Source:
    """The same examples, from where the stage that learns to generate has left them."""
    return Later(mixture(experiment, settings), experiment.generate.steps)


def train_student(
    experiment: Experiment, folder: Path, settings: Training, source: Source, initial: Any
) -> None:
    """One training run, which leaves what `Retriever.load` needs."""
    prepared = Prepared.load(experiment.model_dir)
    config = experiment.sized(prepared.vocabulary.size)
    opened = lambda params, search: assembled(experiment, folder, params, search, prepared)
    measured = validation.of(experiment, settings, prepared, validation.reopened(opened))
    model = Transformer(config)
    train(
        *(experiment, folder, folder.name, settings, model, source, initial, measured),
        text_tokens=prepared.vocabulary.first_view_id,
        pack_queries=settings.pack_queries,
    )
    if processes.first():
        systems = experiment.systems
        write_student(folder, experiment.kind, config, experiment.evaluate.search, systems)


def _before(experiment: Any) -> tuple[str, ...]:
    pretrained = (PRETRAIN,) if PRETRAIN in experiment.stages else ()
    return (*start.after_start(PREPARE)(experiment), *pretrained)


GENERATE = Stage(
    "generate",
    generate,
    settings=validated(fields("model", "generate", "initial"), "generate"),
    upstream=_before,
    check=lambda e: check_batches(e, "generate", e.generate, "batch_size"),
    batches=lambda e: mixture(e, e.generate),
)
CONTROL = Stage(
    "control",
    control,
    settings=validated(_control_settings, "distill", "generate"),
    upstream=after(GENERATE.name),
    check=lambda e: check_batches(e, "control", _control(e), "batch_size"),
    batches=lambda e: later(e, _control(e)),
)
