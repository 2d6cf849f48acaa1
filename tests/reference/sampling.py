"""Which tokens a sample may go on with."""

from __future__ import annotations


def legal_tokens(logits, written, top_k):
    """The top_k most likely of the token ids `written`, best first; logits [V]."""
    return sorted(written, key=lambda token: (-logits[token], token))[:top_k]
