"""The page at `/`: one HTML file, and what it may do in a browser."""

from __future__ import annotations

import base64
import hashlib
import re
from importlib import resources

HTML = (resources.files("dgr_jax.serving") / "page.html").read_text(encoding="utf-8")


def _hash(tag: str) -> str:
    """The hash of what the one element of a tag holds, as a policy names it."""
    (inside,) = re.findall(rf"<{tag}>(.*?)</{tag}>", HTML, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(inside.encode()).digest()).decode()
    return f"'sha256-{digest}'"


# Only the script and the style of the file, and only this host.
POLICY = "; ".join(
    [
        "default-src 'none'",
        f"script-src {_hash('script')}",
        f"style-src {_hash('style')}",
        "connect-src 'self'",
        "img-src data:",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
    ]
)
