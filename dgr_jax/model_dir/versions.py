"""Versions of the libraries behind a result: kept with it, and compared when it is used again."""

from __future__ import annotations

import functools
import platform
from collections.abc import Mapping
from importlib import metadata

import dgr_jax

LIBRARIES = (
    "jax", "jaxlib", "flax", "optax", "numpy", "scipy", "scikit-learn", "sentencepiece", "bm25s",
    "PyStemmer", "seqio", "tensorflow", "ir_measures",
)  # fmt: skip


@functools.cache
def here() -> dict[str, str]:
    """Name -> version of this package, of Python and of each library that is installed."""
    versions = {"dgr_jax": dgr_jax.__version__, "python": platform.python_version()}
    for library in LIBRARIES:
        try:
            versions[library] = metadata.version(library)
        except metadata.PackageNotFoundError:
            continue
    return versions


def changes(before: Mapping[str, str]) -> list[str]:
    """The libraries whose version is another now than before, such as "jax 0.9 (now 0.10)".

    A library that is not installed now has no part in what comes, and is left out.
    """
    now = here()
    return [
        f"{name} {version} (now {now[name]})"
        for name, version in before.items()
        if name in now and now[name] != version
    ]
