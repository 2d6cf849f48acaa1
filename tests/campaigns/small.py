"""What the campaigns share: a small experiment as a command, and what it has made, to compare."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import orbax.checkpoint as ocp

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))

from tests.conftest import TINY  # noqa: E402

# What differs between runs of the same settings: times, versions, and what is only reported.
_TIMED = ("stage.json", "metrics.jsonl", "config.gin", "checked.json")


def start(module: str, *flags: str, folder: Path) -> subprocess.Popen:
    """`python -m module` on one CPU device, in its own session; its words come through stderr."""
    environment = os.environ | {
        "PYTHONPATH": str(ROOT),
        "JAX_PLATFORMS": "cpu",
        "TF_CPP_MIN_LOG_LEVEL": "3",
        "XLA_FLAGS": "--xla_backend_optimization_level=0",
        "JAX_COMPILATION_CACHE_DIR": str(folder / "compiled"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.2",
    }
    return subprocess.Popen(
        [sys.executable, "-m", module, *flags],
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def run(module: str, *flags: str, folder: Path) -> tuple[int, str]:
    """Exit status and words of a command."""
    process = start(module, *flags, folder=folder)
    said = process.communicate()[0]
    return process.returncode, said


def contents(model_dir: Path) -> dict[str, str]:
    """Name -> hash of everything that a finished experiment has made: bytes of files, arrays of
    .npz files and of the newest checkpoint of every student."""
    made: dict[str, str] = {}
    for path in sorted(model_dir.rglob("*")):
        name = path.relative_to(model_dir).as_posix()
        if not path.is_file() or name.startswith(("previous/", ".")) or path.name in _TIMED:
            continue
        if {"checkpoints", "tensorboard"} & set(path.parts) or path.suffix == ".png":
            continue
        if path.suffix == ".npz":
            with np.load(path) as arrays:
                made |= {f"{name}:{key}": _hash(arrays[key].tobytes()) for key in arrays.files}
        else:
            made[name] = _hash(path.read_bytes())
    for folder in sorted(model_dir.glob("*/checkpoints")):
        step = max(ocp.utils.checkpoint_steps(folder))
        params = ocp.StandardCheckpointer().restore((folder / str(step) / "params").absolute())
        for key, value in _leaves(params):
            made[f"{folder.parent.name}/{step}:{key}"] = _hash(np.asarray(value).tobytes())
    return made


def _leaves(tree: object, at: str = ""):
    if isinstance(tree, dict):
        for key, value in sorted(tree.items()):
            yield from _leaves(value, f"{at}/{key}")
    else:
        yield at, tree


def _hash(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]


def differences(got: dict[str, str], expected: dict[str, str]) -> list[str]:
    """Names that differ between two `contents`."""
    return sorted(n for n in got.keys() | expected.keys() if got.get(n) != expected.get(n))


def report(**counts: int) -> None:
    """One line of JSON with what came out."""
    print(json.dumps(counts), flush=True)


__all__ = ["ROOT", "TINY", "contents", "differences", "report", "run", "start"]
