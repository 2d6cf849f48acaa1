"""Stage distill: the student learns the order of the teacher's rank lists."""

from __future__ import annotations

from pathlib import Path

from dgr_jax.experiments.generative import Experiment
from dgr_jax.experiments.stage import Stage, after, fields
from dgr_jax.model_dir import kept
from dgr_jax.stages import teach
from dgr_jax.stages.student import generated, later, train_student, with_sets
from dgr_jax.stages.training_run import _Together, check_batches, validated
from dgr_jax.training import packing
from dgr_jax.training.source import ArraySource, Source


def distill(experiment: Experiment, folder: Path) -> None:
    """Rank lists and generation examples, from the generation student."""
    source = batches(experiment)
    train_student(experiment, folder, experiment.distill, source, generated(experiment))


def batches(experiment: Experiment) -> Source:
    """What the stage learns from, step by step."""
    settings = experiment.distill
    parts = {"rank_list": _rank_lists(experiment)}
    if settings.batch_size:
        parts["generation"] = later(experiment, settings)
    return _Together(parts)


def _rank_lists(experiment: Experiment) -> Source:
    folder, settings = Path(experiment.model_dir) / teach.STAGE.name, experiment.distill
    lists = ArraySource(folder / "rank_lists", settings.list_batch_size, settings.seed)
    tokens, views = lists.features["identifier_tokens"], lists.features.get("identifier_views")
    if views is None:
        if not getattr(settings.objective, "pack_docids", False):
            return with_sets(experiment, lists)
        return packing.PackedLists(lists, tokens.shape[1:], packing.rows_needed(tokens))
    with kept.reading(folder / "report.json"):
        counted = int(kept.read_json(folder / "report.json")["keys"].get("packed_rows", 0))
    # The teach stage of an older version did not count them.
    rows = counted or packing.rows_needed(tokens, views)
    return packing.PackedLists(lists, tokens.shape[1:], rows)


STAGE = Stage(
    "distill",
    distill,
    settings=validated(fields("distill"), "distill"),
    upstream=after(teach.STAGE.name),
    check=lambda e: check_batches(e, "distill", e.distill, "batch_size", "list_batch_size"),
    batches=batches,
)
