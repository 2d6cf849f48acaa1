"""What an experiment needs of a machine that is not here: memory, FLOPs, network, time at best.

The programs that would run, the two train steps and the search with its trie, are built from shapes
alone and compiled for a TPU topology by libtpu, which needs no TPU. `hlo` reads what they do. For
GPUs, and to rank meshes, `analytic` counts by formula.

Estimated, as no data is read: the size of the vocabulary and of the trie, from the settings and the
number of passages, as if these were spread evenly over all codes.
"""

from __future__ import annotations

import dataclasses
import logging
import math
import re
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import jax

from dgr_jax import partitioning
from dgr_jax.capacity import hlo
from dgr_jax.capacity.chips import GIB, Topology
from dgr_jax.capacity.formulas import (
    forward_flops,
    moved_bytes,
    passes,
    sent_bytes,
    temporary_bytes,
    tokens_together,
)
from dgr_jax.capacity.programs import Program, program
from dgr_jax.capacity.sizes import PreparedSizes, model_config
from dgr_jax.experiments.generative import Experiment
from dgr_jax.models.t5 import T5Config

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class CapacityPlan:
    """One program on one mesh, a chip's share of it.

    parts: bytes by name, `temporaries` included. sent: bytes by collective. products: what most of
    the FLOPs are, one of PRODUCTS. source: 'compiled', 'formula', or what the compiler said when it
    did not fit.
    """

    program: str
    mesh: Mapping[str, int]
    topology: Topology
    parts: Mapping[str, float]
    flops: float
    moved: float
    sent: Mapping[str, float]
    queries: int
    products: str = "bfloat16"
    source: str = "formula"
    seconds: float = 0.0

    @property
    def total(self) -> float:
        return sum(self.parts.values())

    @property
    def fits(self) -> bool:
        return self.total <= self.topology.chip.memory

    @property
    def times(self) -> dict[str, float]:
        """Least seconds of a run, by what bounds it; all three at once at best."""
        chip = self.topology.chip
        far = chip.near and self.topology.size > chip.near
        network = chip.far_network if far else chip.network
        return {
            "compute": self.flops / chip.peak(self.products)[0],
            "memory": self.moved / chip.bandwidth,
            "network": sum(self.sent.values()) / network,
        }

    @property
    def bound(self) -> str:
        return max(self.times, key=self.times.__getitem__)

    @property
    def queries_per_second(self) -> float:
        """At best: as many as the tightest bound lets through."""
        return self.queries / max(max(self.times.values()), 1e-12)


def compiled(program: Program, formula: CapacityPlan) -> CapacityPlan:
    """Compiles a program and reads what it does; formula: the same by formula."""
    start = time.monotonic()
    logger.info("plan: compiling %s for %s", program.name, formula.topology)
    try:
        executable = program.lower().compile()
    except jax.errors.JaxRuntimeError as error:
        used = re.search(r"Used ([\d.]+)([KMGT]) of", str(error))
        if "RESOURCE_EXHAUSTED" not in str(error) or used is None:
            raise
        total = float(used[1]) * 1024 ** ("KMGT".index(used[2]) + 1)
        parts = {**program.parts, "temporaries": max(0.0, total - sum(program.parts.values()))}
        source = "too large to compile; FLOPs and bytes by formula"
        return dataclasses.replace(formula, parts=parts, source=source)
    memory = executable.memory_analysis()
    arguments = memory.argument_size_in_bytes
    total = arguments + memory.temp_size_in_bytes
    total += memory.output_size_in_bytes - memory.alias_size_in_bytes
    parts = {**program.parts, "temporaries": max(0.0, total - sum(program.parts.values()))}
    done = hlo.cost(executable.as_text(), unknown_trips=program.shape.looped)
    return dataclasses.replace(
        formula,
        parts=parts,
        flops=done.flops,
        moved=done.bytes,
        sent=done.sent(),
        source="compiled",
        seconds=time.monotonic() - start,
    )


def analytic(program: Program, mesh: Any, topology: Topology, config: T5Config) -> CapacityPlan:
    """The plan of a program by formula: products of matrices, what layers keep, Megatron's
    all-reduces of activations (Shoeybi et al. 2019), all-reduce of gradients, all-gather where
    fully sharded."""
    axes = dict(mesh.shape)
    chips = topology.size
    shape, training = program.shape, not program.shape.beams
    runs = passes(config) if training else 1
    flops = runs * forward_flops(config, shape) / chips
    tokens = tokens_together(shape, partitioning.batch_shards(mesh))
    temporaries = temporary_bytes(config, shape, axes["model"], tokens)
    gathered = 1 if training else axes["fsdp"] / 2
    temporaries += program.parts["parameters"] * gathered  # gradients, or all kernels in bfloat16
    return CapacityPlan(
        program=program.name,
        mesh=axes,
        topology=topology,
        parts={**program.parts, "temporaries": temporaries},
        flops=flops,
        moved=moved_bytes(config, program, temporaries, runs),
        sent=sent_bytes(config, program, axes, tokens, runs),
        queries=shape.queries,
        products=config.dtype,
    )


def meshes(topology: Topology, config: T5Config, rows: int) -> Iterator[partitioning.Mesh]:
    """Meshes of all chips that cut heads, MLP and batch evenly, with and without fsdp."""
    for model in (n for n in range(1, topology.size + 1) if topology.size % n == 0):
        if config.num_heads % model or config.mlp_dim % model:
            continue
        rest = topology.size // model
        if rows % rest == 0:
            yield partitioning.Mesh(data=rest, model=model)
            if rest > 1:
                yield partitioning.Mesh(data=1, model=model, fsdp=rest)


def abstract_mesh(mesh: partitioning.Mesh, topology: Topology) -> Any:
    """The mesh without devices, for formulas."""
    sizes = partitioning.mesh_sizes(mesh, topology.size)
    auto = (jax.sharding.AxisType.Auto,) * len(sizes)
    return jax.sharding.AbstractMesh(tuple(sizes.values()), tuple(sizes), axis_types=auto)


def plan(
    name: str,
    experiment: Experiment,
    sizes: PreparedSizes,
    topology: Topology,
    mesh: partitioning.Mesh,
    *,
    compile: bool = True,
) -> CapacityPlan:
    """The plan of one program: compiled where the topology is of TPUs, by formula otherwise."""
    if compile and topology.is_tpu:
        config = model_config(experiment, sizes)
        on = partitioning.make_mesh(mesh, topology.devices())
        planned = program(name, experiment, sizes, on, mesh.rules)
        formula = analytic(planned, on, topology, config)
        return compiled(planned, formula)
    # The same bytes, and one layer to trace in place of all.
    scanned = dataclasses.replace(experiment.model, scan_layers=True)
    experiment = dataclasses.replace(experiment, model=scanned)
    on = abstract_mesh(mesh, topology)
    planned = program(name, experiment, sizes, on, mesh.rules)
    return analytic(planned, on, topology, model_config(experiment, sizes))


def assumptions(experiment: Experiment, sizes: PreparedSizes, topology: Topology) -> str:
    """What the plan takes for granted."""
    config = experiment.model
    levels = sizes.identifiers.tables[0].levels if sizes.identifiers.tables else ()
    codes = f"{len(levels)} codes of {levels[0]}" if len({*levels}) == 1 else f"{levels}"
    return (
        f"{topology.size} chips of {topology.name}, {topology.chip.memory / GIB:.0f} GiB each; "
        f"T5 of width {config.emb_dim}, {config.num_encoder_layers} + {config.num_decoder_layers} "
        f"layers, {config.dtype}, remat {config.remat}, layers "
        f"{'scanned' if config.scan_layers else 'not scanned'}\n"
        f"estimated: {sizes.corpus.passages:,} passages, vocabulary of {sizes.vocab_size:,}, "
        f"identifiers of {sizes.length} tokens ({codes}, used evenly)"
        f"{_bound(experiment)}"
    )


def _bound(experiment: Experiment) -> str:
    """What is said of training steps whose short queries and identifiers share rows."""
    generate, distill = experiment.generate, experiment.distill
    packed = {
        "Training.pack_queries": generate.pack_queries or distill.pack_queries,
        "Distillation.pack_docids": getattr(distill.objective, "pack_docids", False),
    }
    if not any(packed.values()):
        return ""
    names = ", ".join(name for name, is_packed in packed.items() if is_packed)
    return (
        "\nupper bounds of training steps: each query and identifier counts as the longest, though "
        f"short ones share rows ({names})"
    )


def sweep(
    name: str, experiment: Experiment, sizes: PreparedSizes, topology: Topology
) -> list[tuple[partitioning.Mesh, CapacityPlan]]:
    """Every mesh by formula, those that fit first, the fastest first."""
    settings = experiment.generate if name == "decode" else getattr(experiment, name)
    rows = settings.batch_size if name != "decode" else experiment.evaluate.search.batch_size
    if name == "distill":
        rows = math.gcd(rows, settings.list_batch_size)
    rows = rows // settings.microbatches if name != "decode" else 10**6 * topology.size
    plans = [
        (mesh, plan(name, experiment, sizes, topology, mesh, compile=False))
        for mesh in meshes(topology, model_config(experiment, sizes), rows)
    ]
    key = lambda pair: (not pair[1].fits, -pair[1].queries_per_second, pair[1].total)
    return sorted(plans, key=key)


def advice(planned: CapacityPlan, experiment: Experiment) -> list[str]:
    """What to change where a plan does not fit, or waits for the network."""
    config, parts = experiment.model, planned.parts
    say: list[str] = []
    if planned.fits:
        if planned.bound == "network" and planned.mesh["model"] > 1:
            say.append("the network bounds it: a smaller --mesh model axis, or a larger batch")
        return say
    if planned.program == "decode":
        if parts["temporaries"] > parts["parameters"]:
            say.append("--gin.Search.batch_size or --gin.NUM_BEAMS smaller")
        if parts["trie"] > 0.1 * planned.total:
            say.append("--gin.Search.max_replicated_bytes smaller, so that the trie is cut")
        return [*say, "more chips in the model axis of --mesh"]
    if parts["temporaries"] > parts["parameters"] + parts["optimizer"]:
        if config.remat != "full":
            stronger = "minimal" if config.remat == "none" else "full"
            say.append(f"--gin.T5Config.remat={stronger}")
        if config.dtype != "bfloat16":
            say.append("--gin.T5Config.dtype=bfloat16")
        say.append("--gin.Training.microbatches larger, or --gin.BATCH_SIZE smaller")
    if parts["optimizer"] > parts["parameters"]:
        say.append("Adafactor in place of AdamW")
    if not config.scan_layers:
        say.append("--gin.T5Config.scan_layers=True")
    more = planned.mesh["model"] * 2
    if config.num_heads % more == 0 and planned.mesh["data"] > 1:
        say.append(f"--mesh={planned.mesh['data'] // 2},{more}: parameters cut over {more} chips")
    if planned.mesh["fsdp"] == 1 and planned.mesh["data"] > 1:
        say.append(
            f"--mesh=1,{planned.mesh['model']},{planned.mesh['data']}: parameters cut over the "
            "data shards as well (fsdp)"
        )
    return say or ["a larger --topology"]
