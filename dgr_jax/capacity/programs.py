"""The compiled programs of training and search, lowered for devices that need not be there."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from dgr_jax import partitioning
from dgr_jax.capacity.sizes import PreparedSizes, abstract_trie, held_bytes, model_config
from dgr_jax.decoding.trie_expand import TrieConstraint
from dgr_jax.experiments.common import Training
from dgr_jax.experiments.generative import Experiment
from dgr_jax.models.t5 import T5Config, Transformer
from dgr_jax.retrieval.generative import Search
from dgr_jax.retrieval.search_programs import decode_fn
from dgr_jax.training import plan_losses
from dgr_jax.training.step import abstract_state, make_train_step

PROGRAMS = ("generate", "distill", "decode")


def programs_of(experiment: Experiment) -> tuple[str, ...]:
    """The programs that are planned: of several views, how many identifiers a list has, and how
    many a search writes, is known once they are made."""
    return PROGRAMS[:1] if experiment.prepare.identifiers.views else PROGRAMS


@dataclass(frozen=True)
class ProgramShape:
    """What the formulas need to know of a program. queries of Q tokens are encoded; each has
    `targets` sequences of T tokens. beams: of a search, 0: training; ahead: tokens at the end of a
    search that one pass scores (TrieConstraint.completion_width)."""

    queries: int
    query_length: int
    targets: float
    target_length: int
    beams: int = 0
    microbatches: int = 1
    ahead: int = 1

    @property
    def steps(self) -> int:
        """Passes of the decoder that a search makes, the first, of one beam, among them."""
        return self.target_length - self.ahead + 1

    @property
    def looped(self) -> int:
        """How many `steps` are runs of its loop: not the first, nor the one that scores ahead."""
        return max(1, self.steps - 1 - (self.ahead > 1))


@dataclass(frozen=True)
class Program:
    """One program on a mesh. parts: bytes that a chip holds all the time, by name."""

    name: str
    shape: ProgramShape
    parts: Mapping[str, int]
    lower: Callable[[], Any]


def abstract(
    mesh: Any, shape: tuple[int, ...], dtype: Any, *, sharding: Any = None
) -> jax.ShapeDtypeStruct:
    sharding = sharding or partitioning.batch_sharding(mesh)
    return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)


def _generation_batch(mesh: Any, rows: int, query_length: int, length: int) -> dict[str, Any]:
    return {
        "encoder_input_tokens": abstract(mesh, (rows, query_length), jnp.int32),
        "decoder_input_tokens": abstract(mesh, (rows, length), jnp.int32),
        "decoder_target_tokens": abstract(mesh, (rows, length), jnp.int32),
        "decoder_loss_weights": abstract(mesh, (rows, length), jnp.float32),
    }


def _list_batch(mesh: Any, rows: int, lists: int, query_length: int, length: int) -> dict[str, Any]:
    return _generation_batch(mesh, rows, query_length, length) | {
        "identifier_tokens": abstract(mesh, (rows, lists, 1, length), jnp.int32),
        "identifier_weights": abstract(mesh, (rows, lists, 1), jnp.float32),
        "teacher_scores": abstract(mesh, (rows, lists), jnp.float32),
        "passage_mask": abstract(mesh, (rows, lists), jnp.bool_),
    }


def abstract_batch(
    name: str, experiment: Experiment, sizes: PreparedSizes, mesh: Any
) -> dict[str, Any]:
    """A batch of the stage 'generate', 'control' or 'distill' in shape, of one identifier a
    passage."""
    settings = experiment.generate if name == "generate" else experiment.distill
    shape = experiment.prepare.query_length, sizes.length
    generation = _generation_batch(mesh, settings.examples, *shape)
    plan = getattr(settings.objective, "plan", None)
    members = plan.members if plan else 0  # of each passage, which the batch brings along
    if members:
        rows = settings.examples, members
        generation[plan_losses.MEMBERS] = abstract(mesh, rows, jnp.int32)
    if name != "distill":
        return generation
    rows, size = settings.list_batch_size, experiment.teach.lists.length
    of_lists = _list_batch(mesh, rows, size, *shape)
    if members:
        of_lists[plan_losses.MEMBERS] = abstract(mesh, (rows, members), jnp.int32)
        of_lists[plan_losses.LIST_MEMBERS] = abstract(mesh, (rows, size, members), jnp.int32)
    lists = {"rank_list": of_lists}
    # Without examples of their own, the target of each list's query.
    return lists | ({"generation": generation} if settings.batch_size else {})


def program(
    name: str, experiment: Experiment, sizes: PreparedSizes, mesh: Any, rules: Any
) -> Program:
    """'generate' or 'distill', one step of training; 'decode', one batch of a search.

    mesh: of devices, or abstract, where the program is not compiled.
    """
    config = model_config(experiment, sizes)
    if name == "decode":
        return _search(experiment, config, sizes, mesh, rules)
    settings = getattr(experiment, name)
    query_length = experiment.prepare.query_length
    batch = abstract_batch(name, experiment, sizes, mesh)
    shape = ProgramShape(settings.batch_size, query_length, 1, sizes.length)
    if name == "distill":
        rows, size = settings.list_batch_size, experiment.teach.lists.length
        both = rows + settings.batch_size
        targets = (rows * size + settings.examples) / both
        shape = ProgramShape(both, query_length, targets, sizes.length)
    shape = dataclasses.replace(shape, microbatches=settings.microbatches)
    check_rows(batch, settings, mesh, name)
    return step_program(name, settings, Transformer(config), batch, shape, mesh, rules)


def check_rows(batch: Any, settings: Training, mesh: Any, name: str) -> None:
    shards = partitioning.batch_shards(mesh) * settings.microbatches
    for leaf in jax.tree.leaves(batch):
        if leaf.shape[0] % shards:
            raise ValueError(
                f"{name}: got a batch of {leaf.shape[0]}, expected a multiple of {shards}, "
                "microbatches x data shards of the mesh; set BATCH_SIZE, LIST_BATCH_SIZE or --mesh"
            )


def step_program(
    name: str,
    settings: Training,
    model: Any,
    batch: Any,
    shape: ProgramShape,
    mesh: Any,
    rules: Any,
) -> Program:
    """A train step of a model on batches of these shapes."""
    optimizer = settings.optimizer.transformation(settings.steps)
    state = abstract_state(model, optimizer, mesh, rules)
    parts = {
        "parameters": held_bytes(state.params),
        "optimizer": held_bytes(state.opt_state),
        "batch": held_bytes(batch),
    }

    def lower() -> Any:
        step: Any = make_train_step(
            *(settings.objective, model, optimizer, mesh, state),
            microbatches=settings.microbatches,
            rules=rules,
        )
        return step.lower(state, batch)

    return Program(name, shape, parts, lower)


def _search(
    experiment: Experiment, config: T5Config, sizes: PreparedSizes, mesh: Any, rules: Any
) -> Program:
    search = experiment.evaluate.search
    assert isinstance(search, Search)  # of other kinds no search is planned
    rows = partitioning.shared_rows(search.batch_size, mesh)
    (table,) = sizes.identifiers.tables
    arrays, layout = abstract_trie(table, sizes.vocab_size)
    places = partitioning.index_shardings(
        dict(arrays.items()), mesh, max_replicated_bytes=search.max_replicated_bytes
    )
    put: dict[str, Any] = {
        k: abstract(mesh, a.shape, a.dtype, sharding=places[k]) for k, a in arrays.items()
    }
    constraint = TrieConstraint(
        **put, layout=layout, vocab_size=sizes.vocab_size, renormalise=search.renormalise
    )
    params = partitioning.abstract_params(Transformer(config), mesh, rules)
    tokens = abstract(mesh, (rows, search.query_length), jnp.int32)
    parts = {
        "parameters": held_bytes(params),
        "trie": held_bytes(constraint),
        "batch": held_bytes(tokens),
    }

    def lower() -> Any:
        decode = decode_fn(config, search.num_beams, layout.max_length, mesh, rules=rules)
        return decode.lower(params, constraint, tokens)

    shape = ProgramShape(
        *(rows, search.query_length, search.num_beams, sizes.length, search.num_beams),
        ahead=max(1, constraint.completion_width),
    )
    return Program("decode", shape, parts, lower)
