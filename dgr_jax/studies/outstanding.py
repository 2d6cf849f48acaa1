"""What of a study is still to be made, and what that costs."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from dgr_jax.analysis import costs
from dgr_jax.capacity.disk import readable
from dgr_jax.display import harmless
from dgr_jax.model_dir import records
from dgr_jax.stages import evaluate, pipeline
from dgr_jax.studies.grid import Grid, Run


class _Planned(NamedTuple):
    """A stage of a run, where it is kept, whether it trains, its training FLOPs where they are
    known, whether it is done, and the bytes on disk of a plan that it needs."""

    run: Run
    stage: str
    kept: Path
    trains: bool
    flops: float | None
    done: bool
    plan_bytes: float = 0.0

    @property
    def work(self) -> list[str]:
        """Its training FLOPs in words, or the index of its plan; nothing of other stages."""
        if not self.trains:
            return [f"(plan of {readable(self.plan_bytes)})"] * (self.plan_bytes > 0)
        return ["? PFLOP" if self.flops is None else f"{self.flops / 1e15:.3g} PFLOP"]

    @property
    def kind(self) -> tuple[str, bool]:
        """Stages of one kind take times in proportion to their FLOPs, or the same."""
        return self.stage, self.flops is not None


def show(grid: Grid) -> None:
    """Prints the experiments, what of them is still to be made, and what that costs.

    PFLOP: of training, by `costs.expected_flops`. Times are those of finished stages of the
    same kind in this study, of training for as many FLOPs; '?' where there is none.
    """
    grid.check()
    stages = list(_stages(grid))
    seconds: dict[tuple[str, bool], list[float]] = {}
    for stage in stages:
        if stage.done:
            took = records.read_record(stage.kept)["seconds"]
            seconds.setdefault(stage.kind, []).append(took / (stage.flops or 1))
    total, unknown, missing = 0.0, 0, {run.folder: [] for run in grid.runs}
    for stage in (stage for stage in stages if not stage.done):
        rates = seconds.get(stage.kind)
        took = np.mean(rates) * (stage.flops or 1) if rates else None
        told = [stage.stage, *stage.work, f"{took:.0f} s" if rates else "?"]
        missing[stage.run.folder].append(" ".join(told))
        total, unknown = total + (took or 0.0), unknown + (not rates)
    for folder, told in missing.items():
        sys.stdout.write(harmless(f"{folder.name}: {', '.join(told) or 'done'}\n"))
    flops = sum(stage.flops or 0.0 for stage in stages if not stage.done)
    more = f" and {unknown} stages of unknown time" if unknown else ""
    sys.stdout.write(
        f"{len(grid.runs)} experiments; {flops / 1e15:.3g} PFLOP of training, padding counted, "
        f"{total / 60:.0f} minutes{more} to go\n"
    )
    if uncounted := sum(stage.trains and stage.flops is None for stage in stages if not stage.done):
        sys.stdout.write(
            f"not among them: the PFLOP of {uncounted} training stages, {costs.UNCOUNTED}\n"
        )


def _stages(grid: Grid) -> Iterator[_Planned]:
    """Every stage, once, with the first run that needs it."""
    seen, corpora = set(), {}
    for run in grid.runs:
        experiment = grid.experiment(run)
        collection = repr((experiment.collection, experiment.prepare.sources))
        if collection not in corpora:
            corpora[collection] = costs.planned_corpus(experiment)
        flops = costs.expected_flops(experiment, corpora[collection])
        plan, corpus = experiment.plan, corpora[collection]
        index = plan.sizes(corpus.passages, corpus.words).disk if plan else 0.0
        trains = {name for name, stage in experiment.stages.items() if stage.batches}
        for stage, settings in pipeline.settings_of(experiment).items():
            kept = grid.kept_in(stage, settings)
            if kept not in seen:
                seen.add(kept)
                done = records.is_done(kept, settings)
                needed = index * (stage == evaluate.STAGE.name)
                yield _Planned(run, stage, kept, stage in trains, flops.get(stage), done, needed)
