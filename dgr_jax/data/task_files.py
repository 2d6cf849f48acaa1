"""Files of tasks/, which register the SeqIO tasks of a data set."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

from dgr_jax.shipped import resources


def _task_path(name: str) -> Path:
    folder = resources("tasks")
    there = sorted(f.stem for f in folder.glob("[a-z]*.py"))
    if name not in there:
        raise ValueError(f"Prepare.tasks: got {name!r}, expected one of {', '.join(there)}")
    return folder / f"{name}.py"


def task_file(name: str) -> ModuleType:
    """The module tasks/`name`.py, from the package or the checkout."""
    path = _task_path(name)
    spec = importlib.util.spec_from_file_location(f"dgr_jax.tasks.{name}", path)
    assert spec is not None and spec.loader is not None  # of every .py file
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
