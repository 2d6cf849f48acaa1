"""The packages that every experiment needs, TensorFlow not among them: whether they are here.

setup.py asks for the same ones; a test compares the two.
"""

from __future__ import annotations

import importlib.util
import re
from importlib import metadata

PACKAGES = {  # what is imported -> what is installed, in its first version that will do
    "Stemmer": "PyStemmer>=3.1",
    "bm25s": "bm25s>=0.2.5",
    "flatbuffers": "flatbuffers>=25.12.19",
    "flax": "flax>=0.10",
    "gin": "gin-config>=0.5",
    "ir_measures": "ir_measures>=0.3.6",
    "jax": "jax>=0.8",
    "matplotlib": "matplotlib>=3.8.4",
    "numpy": "numpy>=2.0",
    "optax": "optax>=0.2.4",
    "orbax": "orbax-checkpoint>=0.11.22",
    "rich": "rich>=13",
    "sklearn": "scikit-learn>=1.4.2",
    "scipy": "scipy>=1.13",
    "sentencepiece": "sentencepiece>=0.2",
    "tensorstore": "tensorstore>=0.1.86",
}


def problem() -> str:
    """'' where nothing is missing; or a line that names all packages that are missing or too old,
    and installs them."""
    lacks = lacking()
    if not lacks:
        return ""
    named = (f"{_split(package)[0]} {version or 'missing'}" for package, version in lacks.items())
    line = " ".join(f"'{package}'" for package in lacks)
    return f"needs other packages than are here ({', '.join(named)}): pip install {line}"


def lacking() -> dict[str, str]:
    """Those of PACKAGES that cannot be used -> the version that is here, '' where there is none."""
    lacks = {}
    for module, package in PACKAGES.items():
        name, least = _split(package)
        if not _is_here(module):
            lacks[package] = ""
        elif (version := _version(name)) and _numbers(version) < _numbers(least):
            lacks[package] = version
    return lacks


def _split(package: str) -> tuple[str, str]:
    name, _, least = package.partition(">=")
    return name, least


def _is_here(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except (ImportError, ValueError):
        return False


def _version(name: str) -> str:
    """'' of what was not installed as a package, such as a checkout on the path."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return ""


def _numbers(version: str) -> tuple[int, ...]:
    """'0.11.18.dev3' -> (0, 11, 18): three numbers, which are compared."""
    numbers = [int(digits) for digits in re.findall(r"\d+", version)[:3]]
    return tuple(numbers + [0] * (3 - len(numbers)))
