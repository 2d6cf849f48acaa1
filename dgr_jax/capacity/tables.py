"""Plans as tables on the terminal."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.table import Table

from dgr_jax import display, ranges
from dgr_jax.capacity import chips, counting, disk
from dgr_jax.capacity.chips import GIB, Topology
from dgr_jax.capacity.planner import planner_of
from dgr_jax.capacity.planning import CapacityPlan
from dgr_jax.experiments.dense import DenseExperiment
from dgr_jax.experiments.generative import Experiment
from dgr_jax.identifiers.scheme import CorpusSize
from dgr_jax.partitioning import Mesh

if TYPE_CHECKING:
    from rich.console import Console


def show(args: argparse.Namespace, experiment: Experiment | DenseExperiment) -> None:
    """Plans what the flags ask for and prints it.

    Raises ValueError for a topology, mesh, program or number of passages that cannot be.
    """
    console = display.console(soft_wrap=True)
    topology = chips.topology(args.topology)
    planner = planner_of(experiment)
    programs = _programs(args.programs, planner.programs(experiment))
    if args.sweep is not None and planner.sweep is None:
        raise ValueError(
            f"--sweep: got a retriever of kind {experiment.kind!r}, expected one that writes "
            "identifiers"
        )
    corpus, origin = _corpus(args.passages, experiment)
    console.print(f"{corpus.passages:,} passages, {origin}")
    sizes = planner.sizes(experiment, corpus)
    mesh = mesh_of(args.mesh, experiment.mesh)
    console.print(planner.assumptions(experiment, sizes, topology))
    if experiment.plan is not None:
        sample = () if args.passages else counting.sample(experiment)
        needed = experiment.plan.sizes(corpus.passages, corpus.words, sample)
        console.print(f"{disk.plan_in_words(experiment.plan, needed)}, on one core")
    if args.sweep is not None:
        for name in programs:
            _sweep(console, name, experiment, sizes, topology, args.sweep)
        return
    plans = [planner.plan(name, experiment, sizes, topology, mesh) for name in programs]
    console.print(*(table for table in tables(plans)))
    for plan in plans:
        for line in planner.advice(plan, experiment, sizes):
            verdict = "does not fit" if not plan.fits else plan.bound
            console.print(f"{plan.program} ({verdict}): {line}")


def _corpus(
    given: float | None, experiment: Experiment | DenseExperiment
) -> tuple[CorpusSize, str]:
    """The corpus, and how its passages are known. Raises ValueError for a number that none has."""
    if given is not None:
        ranges.require("--passages", given, counting.PASSAGES)
        return counting.TAKEN._replace(passages=int(given)), "as given by --passages"
    corpus, origin = counting.corpus_of(experiment, "--passages")
    return corpus._replace(passages=max(2, corpus.passages)), origin


def _programs(text: str, known: Sequence[str]) -> list[str]:
    asked = [name.strip() for name in text.split(",")] if text else list(known)
    for name in asked:
        if name not in known:
            raise ValueError(f"--programs: got {name!r}, expected some of {', '.join(known)}")
    return asked


def mesh_of(text: str | None, default: Mesh) -> Mesh:
    """'16,4' (data, model) or '16,4,1' (and fsdp) over the experiment's other settings.

    Raises ValueError for anything else.
    """
    if text is None:
        return default
    numbers = text.split(",")
    if len(numbers) not in (2, 3) or not all(n.strip().isdigit() for n in numbers):
        raise ValueError(f"--mesh: got {text!r}, expected DATA,MODEL or DATA,MODEL,FSDP: 16,4")
    data, model, fsdp = (*(int(n) for n in numbers), 1)[:3]
    return Mesh(data, model, fsdp, default.parameter_dims, default.activation_dims)


def tables(plans: Sequence[CapacityPlan]) -> list[Table]:
    """Memory, work and time of each plan."""
    return [_memory(plans), _work(plans), _time(plans)]


def _table(title: str, plans: Sequence[CapacityPlan]) -> Table:
    table = Table(title=title, title_justify="left", box=None, padding=(0, 2, 0, 0))
    table.add_column("a chip" if "time" not in title else "")
    for plan in plans:
        table.add_column(plan.program, justify="right")
    return table


def _memory(plans: Sequence[CapacityPlan]) -> Table:
    table = _table("memory", plans)
    for name in ("parameters", "optimizer", "trie", "vectors", "batch", "temporaries"):
        if any(name in plan.parts for plan in plans):
            table.add_row(name, *(_bytes(plan.parts.get(name, 0)) for plan in plans))
    table.add_row("together", *(_bytes(plan.total) for plan in plans), style="bold")
    table.add_row("of the chip's", *(_share(plan) for plan in plans))
    return table


def _share(plan: CapacityPlan) -> str:
    share = plan.total / plan.topology.chip.memory
    return f"{share:.1%}" if plan.fits else f"{share:.1%}: does not fit"


def _work(plans: Sequence[CapacityPlan]) -> Table:
    table = _table("work of one step, or of one batch of a search", plans)
    table.add_row("counted", *(plan.source for plan in plans))
    table.add_row("FLOPs", *(_scaled(plan.flops) for plan in plans))
    table.add_row("memory moved", *(_bytes(plan.moved) for plan in plans))
    for kind in dict.fromkeys(kind for plan in plans for kind in plan.sent):
        table.add_row(f"{kind} sent", *(_bytes(plan.sent.get(kind, 0)) for plan in plans))
    return table


def _time(plans: Sequence[CapacityPlan]) -> Table:
    table = _table("time at best", plans)
    table.add_row("products in", *(_peak(plan)[1] for plan in plans))
    table.add_row("FLOP/s at best", *(_scaled(_peak(plan)[0]) for plan in plans))
    for name in ("compute", "memory", "network"):
        table.add_row(f"bound by {name}", *(_seconds(plan.times[name]) for plan in plans))
    table.add_row("queries a step", *(f"{plan.queries:,}" for plan in plans))
    table.add_row(
        "queries/s, all chips",
        *(f"{plan.queries_per_second:,.0f}" for plan in plans),
        style="bold",
    )
    if any(plan.seconds for plan in plans):
        table.add_row("compiled in", *(_seconds(plan.seconds) for plan in plans))
    return table


def _peak(plan: CapacityPlan) -> tuple[float, str]:
    return plan.topology.chip.peak(plan.products)


def _sweep(
    console: Console,
    name: str,
    experiment: Experiment | DenseExperiment,
    sizes: Any,
    topology: Topology,
    compiled: int,
) -> None:
    planner = planner_of(experiment)
    assert planner.sweep is not None  # as `show` has checked
    ranked = planner.sweep(name, experiment, sizes, topology)
    console.print(_of_meshes(f"{name}: meshes by formula", ranked))
    if not compiled or not topology.is_tpu:
        return
    best = [mesh for mesh, _ in ranked[:compiled]]
    plans = [(m, planner.plan(name, experiment, sizes, topology, m)) for m in best]
    plans.sort(key=lambda pair: (not pair[1].fits, -pair[1].queries_per_second))
    console.print(_of_meshes(f"{name}: the best of them compiled", plans))


def _of_meshes(title: str, plans: Sequence[tuple[Mesh, CapacityPlan]]) -> Table:
    table = Table(title=title, title_justify="left", box=None)
    for column in ("data,model,fsdp", "GiB a chip", "fits", "bound by", "queries/s at best"):
        table.add_column(column, justify="right")
    for mesh, plan in plans:
        table.add_row(_written(mesh), *_row(plan))
    return table


def _written(mesh: Mesh) -> str:
    return f"{mesh.data},{mesh.model},{mesh.fsdp}"


def _row(plan: CapacityPlan) -> tuple[str, ...]:
    fits = "yes" if plan.fits else "no"
    return (f"{plan.total / GIB:.2f}", fits, plan.bound, f"{plan.queries_per_second:,.0f}")


def _bytes(size: float) -> str:
    for unit, scale in (("GiB", GIB), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if size >= scale:
            return f"{size / scale:.2f} {unit}"
    return f"{size:.0f} B"


def _scaled(value: float) -> str:
    for prefix, scale in (("P", 1e15), ("T", 1e12), ("G", 1e9), ("M", 1e6)):
        if value >= scale:
            return f"{value / scale:.2f} {prefix}"
    return f"{value:.0f}"


def _seconds(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{seconds * 1e3:.2f} ms"


def as_dict(plan: CapacityPlan) -> Mapping[str, object]:
    """A plan as JSON."""
    return {
        "program": plan.program,
        "topology": str(plan.topology),
        "mesh": dict(plan.mesh),
        "bytes": dict(plan.parts),
        "flops": plan.flops,
        "moved": plan.moved,
        "sent": dict(plan.sent),
        "products": plan.products,
        "seconds": plan.times,
        "queries_per_second": plan.queries_per_second,
        "source": plan.source,
        "compiled_in": plan.seconds,
    }


def from_dict(like: CapacityPlan, stored: Mapping[str, Any]) -> CapacityPlan:
    """The plan that `as_dict` has written; `like`: one of the same program, topology and mesh."""
    return dataclasses.replace(
        like,
        parts=stored["bytes"],
        flops=stored["flops"],
        moved=stored["moved"],
        sent=stored["sent"],
        source=stored["source"],
        seconds=stored["compiled_in"],
    )
