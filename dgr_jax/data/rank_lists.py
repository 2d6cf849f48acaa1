"""Rank lists as features: what the teach stage writes, `<name>_rank_lists` reads. No TensorFlow."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import numpy as np

from dgr_jax.data.vocabulary import Vocabulary


class Table(Protocol):
    """What is asked of an identifier table."""

    tokens: np.ndarray

    def rows_of_passages(self) -> np.ndarray: ...


def identifiers_of(table: Table, passages: np.ndarray) -> np.ndarray:
    """Identifier of each passage int32 [...]: -> int32 [..., T], padding where passage is -1."""
    row = table.rows_of_passages()[passages]
    known = (passages >= 0) & (row >= 0)
    return np.where(known[..., None], np.asarray(table.tokens)[np.maximum(row, 0)], 0)


def examples(
    texts: Sequence[str],
    passages: np.ndarray,
    teacher_scores: np.ndarray,
    positives: np.ndarray,
    table: Table,
) -> Iterator[dict[str, Any]]:
    """Task features of each query, one identifier a passage (K = 1).

    texts: n queries; passages int32 [n, L] (-1: free place) and teacher_scores f32 [n, L];
    positives int32 [n]: passage of the generation target.
    """
    for text, listed, scores, positive in zip(
        texts, passages, teacher_scores, positives, strict=True
    ):
        tokens = identifiers_of(table, listed)[:, None, :]
        used = tokens.any(axis=-1)
        yield {
            "inputs": text,
            "targets": identifiers_of(table, positive),
            "identifiers": tokens.astype(np.int32),
            "identifier_weights": used.astype(np.float32),
            "teacher_scores": np.where(listed >= 0, scores, 0.0).astype(np.float32),
        }


def features(
    texts: Sequence[str],
    passages: np.ndarray,
    teacher_scores: np.ndarray,
    positives: np.ndarray,
    table: Table,
    vocabulary: Vocabulary,
    query_length: int,
) -> dict[str, np.ndarray]:
    """Model features [n, ...] of the same rank lists: as RankListConverter makes of `examples`."""
    tokens = identifiers_of(table, passages)[:, :, None, :].astype(np.int32)
    targets = identifiers_of(table, positives).astype(np.int32)
    used = tokens.any(axis=-1)
    return {
        "encoder_input_tokens": vocabulary.encode_inputs(texts, query_length),
        "decoder_input_tokens": np.pad(targets[:, :-1], [(0, 0), (1, 0)]),
        "decoder_target_tokens": targets,
        "decoder_loss_weights": (targets > 0).astype(np.float32),
        "identifier_tokens": tokens,
        "identifier_weights": used.astype(np.float32),
        "teacher_scores": np.where(passages >= 0, teacher_scores, 0.0).astype(np.float32),
        "passage_mask": used.any(axis=-1),
    }
