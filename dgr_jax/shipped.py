"""Folders that travel with the package: gin files and SeqIO tasks."""

from __future__ import annotations

from pathlib import Path

PACKAGE = Path(__file__).resolve().parent


def resources(name: str) -> Path:
    """Folder `gin_configs` or `tasks`: inside the installed package, or beside it in a checkout."""
    inside = PACKAGE / name
    return inside if inside.is_dir() else PACKAGE.parent / name
