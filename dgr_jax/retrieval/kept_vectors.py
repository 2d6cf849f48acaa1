"""Where the vectors of passages lie: with the stage that trained their encoder or, once passages
were added or removed, with a version of the index."""

from __future__ import annotations

import json
from pathlib import Path

from dgr_jax.model_dir import kept
from dgr_jax.model_dir.index_versions import ABOUT
from dgr_jax.model_dir.records import SWAP, read_record

_FOLDER, _ABOUT = "vectors", "vectors.json"


def place(index: Path, stage: Path) -> Path:
    """The folder of the vectors of a trained encoder in a version of the index."""
    return index / _FOLDER / stage.name.removesuffix(SWAP)


def encoder(stage: Path) -> str:
    """What tells a trained encoder from others."""
    return str(read_record(stage).get("fingerprint"))


def describe(folder: Path, stage: Path, capacity: int) -> None:
    """Writes whose vectors they are, and for how many there is room on the devices."""
    about = {"encoder": encoder(stage), "capacity": capacity}
    (folder / _ABOUT).write_text(json.dumps(about), encoding="utf-8")


def located(stage: Path, index: Path) -> tuple[Path, int]:
    """The folder of the vectors of the passages in a prepare stage or a version of the index, and
    for how many there is room; 0: for no more.

    Raises ValueError where a version has those of another encoder, or none.
    """
    if not (index / ABOUT).is_file():
        return stage, 0
    folder = place(index, stage)
    if (folder / _ABOUT).is_file():
        with kept.reading(folder / _ABOUT) as path:
            about = kept.read_json(path)
            if about["encoder"] == encoder(stage):
                return folder, int(about["capacity"])
    raise ValueError(
        f"{index}: has no vectors of {stage}, which was trained after this version was made; "
        f"python -m dgr_jax.update --model_dir={stage.parent} --compact makes them"
    )
