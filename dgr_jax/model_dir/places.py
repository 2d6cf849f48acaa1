"""Which MODEL_DIR, and which stage of it, a file belongs to."""

from __future__ import annotations

from pathlib import Path

RECORD = "stage.json"  # in the folder of a stage
INDEX = "index"  # folder of a MODEL_DIR, see index_versions


def stage_of(path: Path) -> Path | None:
    """The folder of the stage that a file belongs to; None for a file of no stage."""
    return next((parent for parent in path.parents if (parent / RECORD).is_file()), None)


def model_dir_of(path: Path) -> Path | None:
    """The MODEL_DIR of a file; None for a file of no stage and of no index."""
    stage = stage_of(path)
    if stage is None:
        above = (parent.parent for parent in path.parents if parent.name == INDEX)
        return next((folder for folder in above if (folder / "prepare").is_dir()), None)
    return stage.parent.parent if stage.parent.name == "previous" else stage.parent
