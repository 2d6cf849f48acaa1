"""Modules that had another name in version 0.1: the old names work until 0.3, with a warning."""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.util
import sys
import warnings
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType

NAMES = {
    "cli": "config.cli",
    "configurables": "config.configurables",
    "costs": "analysis.costs",
    "counting": "capacity.counting",
    "dense_experiment": "experiments.dense",
    "dense_planning": "capacity.dense",
    "dependent": "studies.dependent",
    "experiment": "experiments.generative",
    "hlo": "capacity.hlo",
    "kept": "model_dir.kept",
    "limits": "analysis.beam_losses",
    "models.start": "models.initial",
    "outlook": "capacity.disk",
    "pipeline": "stages.pipeline",
    "plan_tables": "capacity.tables",
    "planning": "capacity.planning",
    "query_generator": "experiments.pseudo_queries",
    "records": "model_dir.records",
    "requirements": "config.requirements",
    "retrieval.drift": "analysis.drift",
    "retrieval.inspection": "analysis.inspection",
    "retrieval.multiview_keys": "retrieval.multiview.keys",
    "retrieval.multiview_search": "retrieval.multiview.search",
    "retrieval.negatives": "teaching.negatives",
    "retrieval.recipes": "teaching.list_recipes",
    "retrieval.speed": "analysis.speed",
    "retrieval.teacher": "teaching.teachers",
    "retrieval.view_indexes": "retrieval.multiview.view_indexes",
    "stages.ask": "serving.ask",
    "stages.students": "stages.student",
    "study_grid": "experiments.study",
    "study_rows": "studies.rows",
    "versions": "model_dir.versions",
    "writer_lock": "model_dir.writer_lock",
}


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name.removeprefix("dgr_jax.") not in NAMES or not name.startswith("dgr_jax."):
            return None
        return ModuleSpec(name, self)

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        """A module that has everything of the one that took its place."""
        new = f"dgr_jax.{NAMES[spec.name.removeprefix('dgr_jax.')]}"
        warnings.warn(f"{spec.name} is now {new}", DeprecationWarning, stacklevel=2)
        module = ModuleType(spec.name, f"See {new}.")
        module.__getattr__ = importlib.import_module(new).__getattribute__  # type: ignore[method-assign]
        return module

    def exec_module(self, module: ModuleType) -> None:
        """Nothing is left to do."""


def install() -> None:
    """Makes the old names importable."""
    sys.meta_path.append(_Finder())
