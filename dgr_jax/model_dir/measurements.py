"""What was measured of a finished run, kept beside it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def read_kept(path: Path) -> dict[str, Any]:
    """What was measured of a finished run, {} where there is nothing that can be read."""
    try:
        kept = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError, RecursionError):
        return {}
    return kept if isinstance(kept, dict) else {}


def write_kept(path: Path, measured: Mapping[str, Any]) -> None:
    """Keeps what was measured beside the run; a file appears whole or not at all."""
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text(json.dumps(measured, indent=1), encoding="utf-8")
    partial.replace(path)
