"""What had another place in version 0.1: the old names work until 0.3, with a warning.

What stood in one module and now stands in several is looked for in these, in their order.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.util
import sys
import warnings
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

NAMES = {  # old module -> new ones, separated by blanks
    "cli": "config.cli config.gin_files config.mistakes shipped",
    "configurables": "config.configurables",
    "costs": "analysis.costs",
    "counting": "capacity.counting",
    "dense_experiment": "experiments.dense",
    "dense_planning": "capacity.dense",
    "dependent": "studies.dependent",
    "experiment": "experiments.generative experiments.common settings stages.pipeline",
    "hlo": "capacity.hlo capacity.hlo_text",
    "kept": "model_dir.kept",
    "limits": "analysis.beam_losses",
    "models.start": "models.initial",
    "outlook": "capacity.disk",
    "pipeline": "stages.pipeline stages.folders stages.labels stages.inputs",
    "plan_tables": "capacity.tables capacity.planning",
    "planning": "capacity.planning capacity.chips capacity.sizes capacity.programs"
    " capacity.formulas",
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
    "retrieval.teacher": "teaching.teachers teaching.teacher",
    "retrieval.view_indexes": "retrieval.multiview.view_indexes",
    "stages.ask": "serving.ask",
    "stages.students": "stages.student stages.distill stages.training_run experiments.common",
    "study_grid": "experiments.study",
    "study_rows": "studies.rows model_dir.measurements",
    "versions": "model_dir.versions",
    "writer_lock": "model_dir.writer_lock",
}


def names(module: str, **homes: str) -> Callable[[str], Any]:
    """The `__getattr__` of a module from which some names have moved: name -> where it is now."""

    def get(name: str) -> Any:
        if name not in homes:
            raise AttributeError(f"module {module!r} has no attribute {name!r}")
        home = f"dgr_jax.{homes[name]}"
        warnings.warn(f"{module}.{name} is now in {home}", DeprecationWarning, stacklevel=2)
        return getattr(importlib.import_module(home), name)

    return get


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name.removeprefix("dgr_jax.") not in NAMES or not name.startswith("dgr_jax."):
            return None
        return ModuleSpec(name, self)

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        """A module that has everything of those that took its place."""
        homes = [f"dgr_jax.{name}" for name in NAMES[spec.name.removeprefix("dgr_jax.")].split()]
        warnings.warn(f"{spec.name} is now {homes[0]}", DeprecationWarning, stacklevel=2)
        module = ModuleType(spec.name, f"See {', '.join(homes)}.")

        def get(name: str) -> Any:
            for home in homes:
                if hasattr(importlib.import_module(home), name):
                    return getattr(importlib.import_module(home), name)
            raise AttributeError(f"module {spec.name!r} has no attribute {name!r}")

        vars(module)["__getattr__"] = get
        return module

    def exec_module(self, module: ModuleType) -> None:
        """Nothing is left to do."""


def install() -> None:
    """Makes the old names importable."""
    sys.meta_path.append(_Finder())
