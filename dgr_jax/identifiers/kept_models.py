"""What a scheme keeps with the prepare stage, to give identifiers to passages that come later."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np

from dgr_jax.model_dir import kept

KEPT = "scheme"  # folder of the prepare stage


class Missing(ValueError):
    """Nothing was kept."""


def save(folder: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Writes a .npy file for each array, in place of what the folder holds."""
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("*.npy"):
        old.unlink()
    for name, array in arrays.items():
        np.save(folder / f"{name}.npy", array)


def load(folder: Path, names: Iterable[str]) -> dict[str, np.ndarray]:
    """What `save` wrote, memory-mapped.

    Raises Missing where nothing was kept, as by older versions.
    """
    arrays = {}
    for name in names:
        path = folder / f"{name}.npy"
        if not kept.is_listed(path) and not path.is_file():
            raise Missing(f"{path} is missing: nothing gives identifiers to later passages")
        with kept.reading(path) as file:
            large = file.stat().st_size > 4096
            arrays[name] = np.load(file, mmap_mode="r" if large else None, allow_pickle=False)
    return arrays
