"""Files of measurements, kept beside the run that they are of."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def read_kept(path: Path) -> dict[str, Any]:
    """The measurements in a file; {} where it is missing or cannot be read."""
    try:
        kept = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError, RecursionError):
        return {}
    return kept if isinstance(kept, dict) else {}


def write_kept(path: Path, measured: Mapping[str, Any]) -> None:
    """Writes measurements to a file, which appears whole or not at all."""
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text(json.dumps(measured, indent=1), encoding="utf-8")
    partial.replace(path)
