"""Rank lists as features: the teach stage writes them, the task `<name>_rank_lists` reads them.

This module does not need TensorFlow.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np

from dgr_jax.data.vocabulary import VIEWS, Vocabulary

# The features of lists of identifiers of several views, beside tokens and weights.
VIEW_FEATURES = ("identifier_views", "identifier_counts", "spans", "span_starts")


class DocidTable(Protocol):
    """The parts of an identifier table that this module needs."""

    tokens: np.ndarray

    def rows_of_passages(self) -> np.ndarray: ...


def identifiers_of(table: DocidTable, passages: np.ndarray) -> np.ndarray:
    """The identifier of each passage: int32 [...] -> int32 [..., T], padding where it is -1."""
    row = table.rows_of_passages()[passages]
    known = (passages >= 0) & (row >= 0)
    return np.where(known[..., None], np.asarray(table.tokens)[np.maximum(row, 0)], 0)


def examples(
    texts: Sequence[str],
    passages: np.ndarray,
    teacher_scores: np.ndarray,
    positives: np.ndarray,
    table: DocidTable,
) -> Iterator[dict[str, Any]]:
    """Task features of each query, with one identifier for each passage (K = 1).

    texts: n queries. passages: int32 [n, L], -1 where a list is shorter. teacher_scores: f32
    [n, L]. positives: int32 [n], the passage whose identifier is the generation target.
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
    table: DocidTable,
    vocabulary: Vocabulary,
    query_length: int,
) -> dict[str, np.ndarray]:
    """Model features [n, ...] of rank lists, as RankListConverter makes them from `examples`."""
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


class ViewIdentifiers(NamedTuple):
    """Identifiers of the passages of n rank lists, as decoding.passage_scoring needs them.

    tokens: int32 [n, L, K, T], 0 at padding. views: int32 [n, L, K], places in VIEWS. counts: int32
    [n, L, K], occurrences of the identifier in the corpus. spans and starts tell where body spans
    occur in a passage: spans: int32 [n, L, E], 1 + the k of the identifier, 0 at padding. starts:
    int32 [n, L, E], the position in the passage where this occurrence begins.
    """

    tokens: np.ndarray
    views: np.ndarray
    counts: np.ndarray
    spans: np.ndarray
    starts: np.ndarray


def view_examples(
    texts: Sequence[str],
    named: ViewIdentifiers,
    teacher_scores: np.ndarray,
    positives: np.ndarray,
    corpus_tokens: int,
) -> Iterator[dict[str, Any]]:
    """Task features of each rank list.

    positives: int32 [n], the column of the positive, whose first identifier is the generation
    target. teacher_scores: f32 [n, L]. corpus_tokens: number of tokens in the corpus.
    """
    for i, text in enumerate(texts):
        tokens, views, counts, spans, starts = (leaf[i] for leaf in named)
        yield {
            "inputs": text,
            "targets": tokens[positives[i], 0],
            "identifiers": tokens,
            "identifier_weights": tokens.any(axis=-1).astype(np.float32),
            "teacher_scores": teacher_scores[i],
            "identifier_views": views,
            "identifier_counts": counts,
            "spans": spans,
            "span_starts": starts,
            "corpus_tokens": np.array([corpus_tokens], np.float32),
        }


def view_features(
    texts: Sequence[str],
    named: ViewIdentifiers,
    teacher_scores: np.ndarray,
    positives: np.ndarray,
    corpus_tokens: int,
    *,
    vocabulary: Vocabulary,
    query_length: int,
) -> dict[str, np.ndarray]:
    """Model features [n, ...] of rank lists, as ViewListConverter makes them from `view_examples`.

    encoder_input_tokens int32 [n, 3, Q] is the query with the marker of each of VIEWS, 0 in place
    of a marker that the vocabulary lacks.
    """
    plain = vocabulary.encode_inputs(texts, query_length - 1)
    marked = np.repeat(np.pad(plain, ((0, 0), (1, 0)))[:, None], len(VIEWS), axis=1)
    marked[:, :, 0] = [vocabulary.marker(v) if v in vocabulary.views else 0 for v in VIEWS]
    targets = named.tokens[np.arange(len(texts)), positives, 0]
    used = named.tokens.any(axis=-1)
    return {
        "encoder_input_tokens": marked,
        "decoder_input_tokens": np.pad(targets[:, :-1], [(0, 0), (1, 0)]),
        "decoder_target_tokens": targets,
        "decoder_loss_weights": (targets > 0).astype(np.float32),
        "identifier_tokens": named.tokens,
        "identifier_weights": used.astype(np.float32),
        "teacher_scores": np.asarray(teacher_scores, np.float32),
        "passage_mask": used.any(axis=-1),
        "identifier_views": named.views,
        "identifier_counts": named.counts,
        "spans": named.spans,
        "span_starts": named.starts,
        "corpus_tokens": np.full((len(texts), 1), corpus_tokens, np.float32),
    }
