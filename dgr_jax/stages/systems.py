"""Opens what is trained, to retrieve with it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dgr_jax import partitioning, processes
from dgr_jax.decoding import trie
from dgr_jax.experiments.generative import Experiment
from dgr_jax.experiments.pseudo_queries import PseudoQueries
from dgr_jax.models.t5 import T5Config, Transformer
from dgr_jax.retrieval import trained
from dgr_jax.retrieval.generative import Decoder, Search
from dgr_jax.retrieval.multiview.search import MultiviewDecoder, MultiviewSearch
from dgr_jax.retrieval.planned import PlannedDecoder
from dgr_jax.stages.prepared import Prepared
from dgr_jax.stages.training_run import with_vocabulary


def model_config(experiment: Experiment | PseudoQueries, vocab_size: int) -> T5Config:
    """The student's sizes with the experiment's vocabulary, unless T5Config.vocab_size is set."""
    return with_vocabulary(experiment.model, vocab_size)


def _trained(experiment: Experiment, system: str) -> Any:
    """Parameters of a finished student on the experiment's mesh."""
    vocabulary = Prepared.load(experiment.model_dir).vocabulary
    model = Transformer(model_config(experiment, vocabulary.size))
    mesh = partitioning.make_mesh(experiment.mesh)
    folder = Path(experiment.model_dir) / system
    return trained.params(folder, model, mesh, experiment.mesh.rules)


def open_system(
    experiment: Experiment, system: str, search: Search | MultiviewSearch, made: Prepared
) -> Decoder | MultiviewDecoder | PlannedDecoder:
    """What is measured as `system`, ready to retrieve: a student, or one with the plan."""
    if system != "planned":
        return decoder(experiment, system, search, made)
    plans, keep = made.folder / "plans", processes.first()
    planner = experiment.plan.planner(made.store, plans, keep=keep)
    student = decoder(experiment, "distill", search, made)
    return PlannedDecoder.of(student, experiment.plan, planner)


def decoder(
    experiment: Experiment, system: str, search: Search | MultiviewSearch, made: Prepared
) -> Decoder | MultiviewDecoder:
    """A finished student, see `assembled`."""
    return assembled(experiment, _trained(experiment, system), search, made)


def assembled(
    experiment: Experiment, params: Any, search: Search | MultiviewSearch, made: Prepared
) -> Decoder | MultiviewDecoder:
    """A student with these parameters, ready to retrieve; equal scores by pid."""
    config = model_config(experiment, made.vocabulary.size)
    mesh, rules = partitioning.make_mesh(experiment.mesh), experiment.mesh.rules
    if made.indexes is not None:
        views = MultiviewDecoder.of(config, params, made.indexes, search, mesh, rules)
        return views.by_pid(made.store.pid_of)
    index = trie.load(made.folder / "trie")
    docids = Decoder(config, params, index, made.table, search, mesh, rules=rules)
    return docids.by_pid(made.store.pid_of)
