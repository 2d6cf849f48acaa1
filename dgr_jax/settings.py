"""What settings are to the stages that are made from them."""

from __future__ import annotations

import hashlib
import json
from typing import Any


def fingerprint(settings: Any) -> str:
    """Hash of settings as JSON."""
    text = json.dumps(settings, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
