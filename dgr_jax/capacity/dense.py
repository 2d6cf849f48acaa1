"""What a dense retriever needs of a machine that is not here; see `planning`.

Two programs: 'dense', a step of training with its lists; 'search', a batch of query vectors against
those of all passages. Encoding the passages, once, and the queries is not among them. Products of a
search in float32 are exact, see `chips.PRODUCTS`.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax.numpy as jnp

from dgr_jax import partitioning
from dgr_jax.capacity import chips, formulas, planning, programs
from dgr_jax.capacity.chips import Topology
from dgr_jax.capacity.planning import CapacityPlan
from dgr_jax.capacity.programs import Program, ProgramShape, abstract
from dgr_jax.capacity.sizes import text_size
from dgr_jax.experiments.dense import DenseExperiment
from dgr_jax.models.dual_encoder import DualEncoder, DualEncoderConfig
from dgr_jax.retrieval import exact_search

PROGRAMS = ("dense", "search")


def vocabulary_size(experiment: DenseExperiment) -> int:
    """Tokens, from the settings: a text vocabulary is taken to be full."""
    return experiment.model.t5.vocab_size or text_size(experiment.prepare.vocabulary)


def encoder(experiment: DenseExperiment, **changed: Any) -> DualEncoder:
    """The model with its vocabulary; changed: other settings of its T5."""
    t5 = dataclasses.replace(experiment.model.t5, vocab_size=vocabulary_size(experiment), **changed)
    return DualEncoder(dataclasses.replace(experiment.model, t5=t5))


def plan(
    name: str,
    experiment: DenseExperiment,
    passages: int,
    topology: Topology,
    mesh: partitioning.Mesh,
    *,
    compile: bool = True,
) -> CapacityPlan:
    """The plan of one program: compiled where the topology is of TPUs, by formula otherwise."""
    compile = compile and topology.is_tpu
    if compile:
        on = partitioning.make_mesh(mesh, topology.devices())
    else:
        on = planning.abstract_mesh(mesh, topology)
    if name == "search":
        return _search(experiment, passages, topology, on, compile)
    return _training(experiment, topology, on, mesh.rules, compile)


def _training(
    experiment: DenseExperiment, topology: Topology, mesh: Any, rules: Any, compile: bool
) -> CapacityPlan:
    settings = experiment.train
    # Scanned, it has the same bytes, and one layer to trace in place of all.
    model = encoder(experiment, **{} if compile else {"scan_layers": True})
    t5 = model.config.t5
    batch = abstract_batch(experiment, mesh)
    programs.check_rows(batch, settings, mesh, "dense")
    tokens = math.prod(batch["encoder_input_tokens"].shape)
    tokens += math.prod(batch["passage_tokens"].shape)
    texts = settings.batch_size * (1 + batch["passages"].shape[1])
    shape = ProgramShape(texts, round(tokens / texts), 0, 0, microbatches=settings.microbatches)
    program = programs.step_program("dense", settings, model, batch, shape, mesh, rules)
    alone = dataclasses.replace(t5, num_decoder_layers=1)  # which writes nothing
    formula = planning.analytic(program, mesh, topology, alone)
    read = (batch[name].shape for name in ("encoder_input_tokens", "passage_tokens"))
    flops = sum(formulas.encoder_flops(t5, math.prod(s[:-1]), s[-1]) for s in read)
    formula = dataclasses.replace(
        formula,
        flops=formulas.passes(t5) * flops / topology.size,
        queries=settings.batch_size,
    )
    return planning.compiled(program, formula) if compile else formula


def abstract_batch(experiment: DenseExperiment, mesh: Any, stage: str = "dense") -> dict[str, Any]:
    """A batch of `training.dense` in shape, of the stage 'dense' or 'refresh'."""
    prepare, is_refresh = experiment.prepare, stage == "refresh"
    rows = experiment.training(stage)[stage].batch_size
    negatives = experiment.mined if is_refresh else experiment.negatives
    teach = None if is_refresh else experiment.teach
    length = experiment.lists.positives
    if teach is not None:
        length = teach.lists.length
    elif negatives.source != "in_batch":
        length += negatives.count
    read = {
        "encoder_input_tokens": ((rows, prepare.query_length), jnp.int32),
        "passage_tokens": ((rows, length, prepare.passage_length), jnp.int32),
        "passage_mask": ((rows, length), jnp.bool_),
        "positive_mask": ((rows, length), jnp.bool_),
        "passages": ((rows, length), jnp.int32),
    }
    if teach is not None:
        read["teacher_scores"] = ((rows, length), jnp.float32)
    return {name: abstract(mesh, *spec) for name, spec in read.items()}


def _search(
    experiment: DenseExperiment, passages: int, topology: Topology, mesh: Any, compile: bool
) -> CapacityPlan:
    settings, k = experiment.evaluate.search.index, experiment.evaluate.search.depth
    dim, chips = experiment.model.dim, topology.size
    index = exact_search.BlockPlan.of(passages, dim, settings, chips)
    queries, rows = settings.batch_size, index.rows
    scores = 4.0 * queries * rows / index.chunks  # of a chunk, kept twice
    held = rows * settings.row_bytes(dim)
    parts = {"vectors": index.device_bytes, "batch": queries * (4 * dim + 8 * k)}
    formula = CapacityPlan(
        program="search",
        mesh=dict(mesh.shape),
        topology=topology,
        parts={**parts, "temporaries": 2 * scores},
        flops=2.0 * queries * rows * dim,
        moved=held + 2 * scores * index.chunks,
        sent={"all-gather": 8.0 * queries * k * (chips - 1)} if chips > 1 else {},
        queries=queries,
        products="exact float32" if settings.storage == "float32" else "bfloat16",
    )

    def lower() -> Any:
        step, given = exact_search.abstract_step(mesh, settings, passages, dim, k)
        return step.lower(*given)

    if compile:
        shape = ProgramShape(queries, 0, 0, 0)
        program = Program("search", shape, {**parts, "vectors": held}, lower)
        formula = planning.compiled(program, formula)
        formula = dataclasses.replace(formula, parts={**formula.parts, **parts})
    blocks = index.blocks  # each is searched, one after another
    sent = {kind: blocks * size for kind, size in formula.sent.items()}
    return dataclasses.replace(
        formula, flops=blocks * formula.flops, moved=blocks * formula.moved, sent=sent
    )


def advice(planned: CapacityPlan, experiment: DenseExperiment, passages: int) -> list[str]:
    """What to change where a plan does not fit, or is slower than it could be."""
    if planned.program != "search":
        if planned.fits:
            return []
        say = ["--gin.Training.microbatches larger, or --gin.BATCH_SIZE smaller"]
        if experiment.model.t5.remat != "full":
            say.append("--gin.T5Config.remat=full")
        return say
    settings, memory = experiment.evaluate.search.index, planned.topology.chip.memory
    index = exact_search.BlockPlan.of(
        passages, experiment.model.dim, settings, planned.topology.size
    )
    each = settings.row_bytes(experiment.model.dim) * -(-passages // planned.topology.size)
    say = []
    if index.blocks > 1:
        say.append(
            f"vectors pass through in {index.blocks} blocks, each sent from the host, which is not "
            "in these times"
        )
        if each < 0.8 * memory:
            most = 1 << math.ceil(math.log2(each))
            say.append(f"--gin.ExactSearch.max_device_bytes={most} keeps them on the chips")
    if (index.blocks > 1 or not planned.fits) and settings.storage != "int8":
        smaller = "bfloat16" if settings.storage == "float32" else "int8"
        say.append(f"--gin.ExactSearch.storage={smaller}")
    if not planned.fits:
        say.append("a larger --topology: vectors are cut over all chips")
    return say


def assumptions(experiment: DenseExperiment, passages: int, topology: Topology) -> str:
    """What the plan takes for granted."""
    model: DualEncoderConfig = experiment.model
    size = passages * experiment.evaluate.search.index.row_bytes(model.dim)
    return (
        f"{topology.size} chips of {topology.name}, {topology.chip.memory / chips.GIB:.0f} GiB "
        f"each; encoder of width {model.t5.emb_dim}, {model.t5.num_encoder_layers} layers, "
        f"{model.t5.dtype}, {'one tower' if model.shared else 'two towers'}\n"
        f"{passages:,} vectors of {model.dim} in {experiment.evaluate.search.index.storage}: "
        f"{size / chips.GIB:.2f} GiB; top {experiment.evaluate.search.depth}; vocabulary of "
        f"{vocabulary_size(experiment):,}"
    )
