"""Batches of a dual encoder: lists of positives and negatives, drawn by step. NumPy only.

Axis letters: B queries, R positives of a query, D negatives to draw from, P positives and M
negatives of a list, S passage length.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from dgr_jax.training.arrays import Features
from dgr_jax.training.source import Source


class ListSource:
    """Queries with lists as `training.dense` describes them, [B, P + M].

    Positives and negatives of a query are drawn anew at each step, without repeats; the same seed
    and step give the same lists, however many processes read them.
    """

    def __init__(
        self,
        queries: Source,
        passage_tokens: np.ndarray,
        *,
        positives: int,
        negatives: int = 0,
        seed: int = 0,
        fixed: bool = False,
        grade_weights: Sequence[float] = (),
    ) -> None:
        """Args:
        queries: gives encoder_input_tokens, positives int32 [B, R] (passage indices, the highest
          grades first; -1: free), grades int32 [B, R] and, for negatives, negatives int32 [B, D];
          own int32 [B, 1], where queries are passages, is the one that is neither.
        passage_tokens: int32 [passages, S].
        positives, negatives: P and M.
        fixed: the first P positives, none drawn.
        grade_weights: what the chance of a positive is proportional to, of grade 1, 2 ...; one of
          weight 0 is never drawn, and no negative either.
        """
        self._queries, self._tokens = queries, passage_tokens
        self._positives, self._negatives = positives, negatives
        self._seed, self._fixed = seed, fixed
        self._weights = np.asarray(tuple(grade_weights) or (1.0,), np.float64)

    def batch(self, step: int, process_index: int = 0, process_count: int = 1) -> Features:
        """See `source.Source`."""
        queries = self._queries.batch(step, process_index, process_count)
        size = len(queries["positives"])
        random = np.random.default_rng([self._seed, 5, step])
        own = slice(process_index * size, (process_index + 1) * size)
        keys = lambda of: random.random((size * process_count, of.shape[1]))[own]
        relevant = queries["positives"]
        grades = np.clip(queries["grades"], 1, len(self._weights))
        order = keys(relevant)
        if self._fixed:
            order = np.broadcast_to(np.arange(relevant.shape[1]), relevant.shape)
        weights = self._weights[grades - 1]
        drawn = np.where(weights > 0, relevant, -1)
        parts = [_chosen(drawn, order, self._positives, weights)]
        if self._negatives:
            others = queries["negatives"]
            parts.append(_chosen(others, keys(others), self._negatives, 1.0))
        passages = np.concatenate(parts, axis=1)
        listed = _listed(passages, self._tokens)
        first = np.arange(passages.shape[1]) < self._positives
        batch = {
            "encoder_input_tokens": queries["encoder_input_tokens"],
            **listed,
            "positive_mask": listed["passage_mask"] & first,
        }
        if relevant.shape[1] > self._positives or not self._weights.all():
            batch["ignored_passages"] = relevant
        if "own" in queries:
            batch["ignored_passages"] = np.hstack([relevant, queries["own"]])
        return batch


class TaughtLists:
    """Queries with a teacher's rank lists, [B, L], as `training.dense` describes them."""

    def __init__(self, lists: Source, passage_tokens: np.ndarray) -> None:
        """Args:
        lists: gives encoder_input_tokens, positives int32 [B, R] and, -1 where a place is free,
          passages int32 [B, L] with teacher_scores f32 [B, L].
        passage_tokens: int32 [passages, S].
        """
        self._lists, self._tokens = lists, passage_tokens

    def batch(self, step: int, process_index: int = 0, process_count: int = 1) -> Features:
        """See `source.Source`."""
        lists = self._lists.batch(step, process_index, process_count)
        passages, relevant = lists["passages"], lists["positives"]
        listed = _listed(passages, self._tokens)
        positive = (passages[:, :, None] == relevant[:, None, :]).any(-1)
        return {
            "encoder_input_tokens": lists["encoder_input_tokens"],
            **listed,
            "positive_mask": positive & listed["passage_mask"],
            "ignored_passages": relevant,
            "teacher_scores": lists["teacher_scores"],
        }


def _listed(passages: np.ndarray, tokens: np.ndarray) -> Features:
    """The passages int32 [B, L] with their tokens."""
    mask = passages >= 0
    texts = np.where(mask[..., None], tokens[np.maximum(passages, 0)], 0)
    return {"passages": passages, "passage_tokens": texts, "passage_mask": mask}


def _chosen(
    passages: np.ndarray, uniform: np.ndarray, count: int, weights: np.ndarray | float
) -> np.ndarray:
    """`count` of each row, -1 where there are no more: those of the lowest -log(1 - u) / weight,
    which is weighted sampling without replacement (Efraimidis and Spirakis 2006).

    uniform: u in [0, 1); whole numbers instead give the order as it is.
    """
    if uniform.dtype.kind == "f":
        with np.errstate(divide="ignore", invalid="ignore"):  # weight 0, of a free place
            uniform = -np.log1p(-uniform) / weights
    last = np.where(passages >= 0, uniform, np.inf)
    order = np.lexsort((last, passages < 0))[:, :count]
    chosen = np.take_along_axis(passages, order, axis=1)
    missing = count - chosen.shape[1]
    return np.pad(chosen, ((0, 0), (0, max(0, missing))), constant_values=-1).astype(np.int32)


class Phases:
    """Sources one after another, each for a number of steps; the last one goes on."""

    def __init__(self, parts: Sequence[tuple[int, Source]]) -> None:
        self._parts = list(parts)

    def batch(self, step: int, process_index: int = 0, process_count: int = 1) -> Features:
        """See `source.Source`."""
        for steps, source in self._parts[:-1]:
            if step < steps:
                return source.batch(step, process_index, process_count)
            step -= steps
        return self._parts[-1][1].batch(step, process_index, process_count)
