"""What a step minimises: `loss_fn(model) -> f(params, batch, rng)`.

`f` returns (loss_sum, weight_sum, metrics). The step adds both sums over microbatches and divides
once, so an objective never divides by a number that differs between microbatches. `metrics` maps a
name to a pair (sum, weight), added up the same way; its value is sum / weight.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import jax
import jax.numpy as jnp

from dgr_jax import moved, ranges
from dgr_jax.decoding import passage_scoring
from dgr_jax.decoding.passage_scoring import BODY, Identifiers, Scoring
from dgr_jax.losses import generation, ranking
from dgr_jax.settings import unless_default
from dgr_jax.special_tokens import EOS_ID, PAD_ID
from dgr_jax.training.list_decoding import decoded_examples, decoded_lists, pad_to
from dgr_jax.training.plan_losses import PlanLoss

Batch = Mapping[str, Any]
Metrics = dict[str, tuple[jax.Array, jax.Array]]
LossFn = Callable[[Any, Batch, jax.Array], tuple[jax.Array, jax.Array, Metrics]]


class Objective(Protocol):
    """What a training run minimises."""

    def loss_fn(self, model: Any) -> LossFn:
        """f(params, batch, rng) as the module describes, of a model and its batches."""


def _sum(values: jax.Array) -> jax.Array:
    return jnp.sum(values.astype(jnp.float32))


def _first_best(logits: jax.Array) -> jax.Array:
    """argmax over the last axis, [..., V] -> int32 [...], by two reductions that XLA for CPUs runs
    side by side, as it does not the one of pairs that `jnp.argmax` is."""
    size = logits.shape[-1]
    best = logits == jnp.max(logits, axis=-1, keepdims=True)
    return jnp.min(jnp.where(best, jnp.arange(size), size), axis=-1)


def _tokens_right(logits: jax.Array, targets: jax.Array, weights: jax.Array) -> Metrics:
    """Share of tokens, and of whole identifiers, that the model would write by itself."""
    counted = weights > 0
    right = (_first_best(logits) == targets) | ~counted
    return {
        "token_accuracy": (_sum(right & counted), _sum(counted)),
        "identifier_accuracy": (
            _sum(jnp.all(right, axis=-1) & jnp.any(counted, axis=-1)),
            _sum(jnp.any(counted, axis=-1)),
        ),
    }


@dataclass(frozen=True)
class Generation:
    """Cross entropy of an identifier's tokens given the query; weight: the number of tokens.

    plan: also what trains a plan of the student, an example as heavy as its tokens. It is that of
      Experiment.plan.
    """

    label_smoothing: float = 0.0
    z_loss: float = 0.0
    plan: PlanLoss | None = unless_default(None)

    def __post_init__(self) -> None:
        ranges.check(self, label_smoothing=ranges.from_to_below(0, 1), z_loss=ranges.at_least(0))

    def loss_fn(self, model: Any) -> LossFn:
        """f over a generation batch."""

        def loss(params: Any, batch: Batch, rng: jax.Array) -> Any:
            logits, table = decoded_examples(model, params, batch, rng, self.plan)
            targets, weights = batch["decoder_target_tokens"], batch["decoder_loss_weights"]
            loss_sum, _ = generation.cross_entropy(
                logits,
                targets,
                weights,
                label_smoothing=self.label_smoothing,
                z_loss=self.z_loss,
            )
            metrics = _tokens_right(logits, targets, weights)
            if self.plan is not None:
                plan_loss = _sum(self.plan.of_examples(table, batch) * jnp.sum(weights, -1))
                loss_sum += self.plan.weight * plan_loss
                metrics["plan_loss"] = plan_loss, _sum(weights)
            return loss_sum, _sum(weights), metrics

        return loss


def passage_scores(log_probs: jax.Array, tokens: jax.Array, weights: jax.Array) -> jax.Array:
    """Score of a passage: sum over its identifiers k of weight_k * log p(identifier k | query).

    Args:
      log_probs: float32 [B, L, K, T], log-softmax at each identifier token.
      tokens: int32 [B, L, K, T]; padding counts 0.
      weights: float32 [B, L, K].

    Returns float32 [B, L].
    """
    kept = jnp.where(tokens != PAD_ID, log_probs, 0.0)
    return jnp.einsum("blkt,blk->bl", kept, weights)


def multiview_scores(log_probs: jax.Array, lists: Batch, scoring: Scoring) -> jax.Array:
    """Score of a passage from its identifiers of several views, float32 [B, L]: that of search.

    log_probs: float32 [B, L, K, T], log-softmax at each identifier token. lists: see
    `data.rank_lists.view_features`. Only log_probs carry a gradient.
    """
    tokens, views = lists["identifier_tokens"], lists["identifier_views"]
    kept = jnp.where(tokens != PAD_ID, log_probs, 0.0)
    # Titles and pseudo-queries begin with their marker and close with EOS: neither is text.
    marker = (views != BODY)[..., None] & (jnp.arange(tokens.shape[-1]) == 0)
    identifiers = Identifiers(
        log_probs=jnp.sum(kept, -1),
        counts=lists["identifier_counts"],
        tokens=jnp.where(marker | (tokens == EOS_ID), PAD_ID, tokens),
        views=views,
        mask=lists["identifier_weights"] > 0,
        spans=lists["spans"] - 1,
        starts=lists["span_starts"],
    )
    corpus_tokens = lists["corpus_tokens"][:, :, None]
    return passage_scoring.passage_scores(identifiers, corpus_tokens, scoring, special_ids=())


def _rankable(lists: Batch) -> jax.Array:
    """bool [B, L]: passages that have an identifier and share it with no better one.

    Passages with the same identifiers have the same score whatever the student does.
    """
    tokens, weights = lists["identifier_tokens"], lists["identifier_weights"]
    used = jnp.where((weights != 0)[..., None], tokens, PAD_ID)
    flat = used.reshape(*used.shape[:2], -1)
    mask = lists["passage_mask"] & jnp.any(flat != PAD_ID, axis=-1)
    return ranking.distinct_prefixes(flat, lists["teacher_scores"], mask, flat.shape[-1])


def _check_prefixes(lengths: tuple[int, ...], shape: tuple[int, ...]) -> None:
    identifiers, longest = shape[-2:]
    if identifiers != 1:
        raise ValueError(
            f"Distillation.prefix_lengths: got {identifiers} identifiers a passage, expected 1: "
            f"the prefix form is for docids; leave prefix_lengths empty"
        )
    if max(lengths) >= longest:
        raise ValueError(
            f"Distillation.prefix_lengths: got {max(lengths)}, expected less than {longest}, the "
            f"identifiers' length"
        )


def _ordered_pairs(student: jax.Array, teacher: jax.Array, mask: jax.Array) -> Any:
    """Pairs of a list that the student orders as the teacher does: (right, all pairs)."""
    pairs = (teacher[:, :, None] > teacher[:, None, :]) & mask[:, :, None] & mask[:, None, :]
    right = pairs & (student[:, :, None] > student[:, None, :])
    return _sum(right), _sum(pairs)


def _positive_first(
    student: jax.Array, mask: jax.Array, tokens: jax.Array, target: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Lists whose best student score is that of a passage with the target identifier [B, T].

    Returns (such lists, lists that hold such a passage).
    """
    length = max(tokens.shape[-1], target.shape[-1])
    same = pad_to(tokens, length) == pad_to(target, length)[:, None, None, :]
    positive = jnp.any(jnp.all(same, axis=-1), axis=-1) & mask
    best = jnp.argmax(jnp.where(mask, student, -jnp.inf), axis=-1)
    first = jnp.take_along_axis(positive, best[:, None], axis=-1)[:, 0]
    return _sum(first), _sum(jnp.any(positive, axis=-1))


@dataclass(frozen=True)
class Distillation:
    """A ranking loss on the teacher's rank lists plus `generation_weight` times cross entropy.

    The batch is {"rank_list": ..., "generation": ... (optional)}. The value is
        mean over the queries of rank_loss  +  generation_weight * mean over the generation
        examples of their mean token loss,
    so it does not depend on how a batch is cut into microbatches: loss_sum is
    sum_b rank_loss_b + generation_weight * (B / G) * sum_g generation_loss_g for B queries and G
    generation examples, weight_sum is B, and all microbatches have the same B and G.

    Without "generation" the target is the best positive of each query, from the decoder features
    beside its rank list: G = B, and both losses share one encoding and one decoder pass.

    Passages without an identifier, or with that of a better one, are left out. A list is valid when
    two or more are left. Other lists add 0 to the rank loss and still count in B; the metric
    `valid_lists` is the share of the valid.

    Attributes:
      loss: f(student [B,L], teacher [B,L], mask [B,L]) -> [B], see `losses.ranking`.
      generation_weight: lambda.
      label_smoothing: of the generation loss.
      prefix_lengths: also apply `loss` to the score of the first t tokens, for each t here (see
        `losses.ranking.prefix_loss`); rising, below the identifier length.
      prefix_weights: weight of each; the whole identifier has weight 1.
      scoring: how search scores passages of identifiers of several views; such lists also have
        the features of `data.rank_lists.view_features`, and the query once a view. With those of
        `training.packing` beside them the identifiers are decoded side by side.
      plan: also what trains a plan of the student: its loss of the lists, or `loss` where it has
        none, and that of the generation examples. It is that of Experiment.plan.
      pack_docids: docids of a list are decoded side by side in rows, as identifiers of several
        views always are: faster where the longest is several times as long as most, slower where
        all are short. Scores and gradients are the same; dropout draws other numbers.
    """

    loss: Callable[[jax.Array, jax.Array, jax.Array], jax.Array]
    generation_weight: float = 1.0
    label_smoothing: float = 0.0
    prefix_lengths: tuple[int, ...] = ()
    prefix_weights: tuple[float, ...] = ()
    scoring: Scoring = Scoring()
    plan: PlanLoss | None = unless_default(None)
    pack_docids: bool = unless_default(False)

    def __post_init__(self) -> None:
        if self.plan is not None and self.pack_docids:
            raise ValueError(
                "Distillation.pack_docids: got True with a plan that is trained, expected False"
            )
        ranges.check(
            self,
            generation_weight=ranges.at_least(0),
            label_smoothing=ranges.from_to_below(0, 1),
            prefix_lengths=ranges.each(ranges.at_least(1)),
            prefix_weights=ranges.each(ranges.at_least(0)),
        )
        if sorted(set(self.prefix_lengths)) != list(self.prefix_lengths):
            raise ValueError(
                f"Distillation.prefix_lengths: got {self.prefix_lengths}, expected rising numbers"
            )
        if len(self.prefix_lengths) != len(self.prefix_weights):
            raise ValueError(
                f"Distillation.prefix_weights: got {len(self.prefix_weights)} weights, expected "
                f"{len(self.prefix_lengths)}, one for each of Distillation.prefix_lengths"
            )

    def loss_fn(self, model: Any) -> LossFn:
        """f over {"rank_list": rank-list batch, "generation": generation batch (optional)}."""

        def loss(params: Any, batch: Batch, rng: jax.Array) -> Any:
            lists = batch["rank_list"]
            encode_rng, decode_rng, generation_rng = jax.random.split(rng, 3)
            shared = "generation" not in batch
            with_target = shared and self.generation_weight != 0
            log_probs, logits, table = decoded_lists(
                model, params, lists, with_target, encode_rng, decode_rng, self.plan
            )
            rank_loss, metrics = self._rank_loss(log_probs, lists)
            if self.plan is not None:
                plan_loss, more = self._plan_loss(self.plan, table, lists)
                rank_loss, metrics = rank_loss + self.plan.weight * plan_loss, metrics | more
            queries = rank_loss.shape[0]
            loss_sum = jnp.sum(rank_loss)
            if self.generation_weight:
                examples = lists if shared else batch["generation"]
                if not shared:
                    logits, table = decoded_examples(
                        model, params, examples, generation_rng, self.plan
                    )
                assert logits is not None
                per_example, more = self._generation_loss(logits, examples)
                if self.plan is not None:
                    plan_loss = jnp.mean(self.plan.of_examples(table, examples))
                    per_example += self.plan.weight * plan_loss
                    more["plan_loss"] = plan_loss, jnp.float32(1)
                loss_sum += self.generation_weight * queries * per_example
                metrics |= more
            return loss_sum, jnp.float32(queries), metrics

        return loss

    def _rank_loss(self, log_probs: jax.Array, lists: Batch) -> tuple[jax.Array, Metrics]:
        """Log-probabilities [B, L, K, T] of the identifiers' tokens -> rank loss of a query [B]."""
        tokens, weights = lists["identifier_tokens"], lists["identifier_weights"]
        teacher = lists["teacher_scores"]
        if "identifier_views" in lists:
            student = multiview_scores(log_probs, lists, self.scoring)
        else:
            student = passage_scores(log_probs, tokens, weights)
        mask = _rankable(lists)
        valid = jnp.sum(mask, axis=-1) >= 2
        loss = self.loss(student, teacher, mask)
        if self.prefix_lengths:
            _check_prefixes(self.prefix_lengths, tokens.shape)
            loss += ranking.prefix_loss(
                self.loss,
                log_probs[:, :, 0] * weights,
                tokens[:, :, 0],
                teacher,
                mask,
                prefix_lengths=self.prefix_lengths,
                prefix_weights=self.prefix_weights,
            )
        loss = jnp.where(valid, loss, 0.0)
        mask &= valid[:, None]
        metrics = {
            "rank_loss": (_sum(loss), jnp.float32(loss.size)),
            "pairs_right": _ordered_pairs(student, teacher, mask),
            "valid_lists": (_sum(valid), jnp.float32(loss.size)),
        }
        if "decoder_target_tokens" in lists:
            target = lists["decoder_target_tokens"]
            metrics["positive_first"] = _positive_first(student, mask, tokens, target)
        return loss, metrics

    def _plan_loss(self, plan: PlanLoss, table: Any, lists: Batch) -> tuple[jax.Array, Metrics]:
        """The table of each query -> loss of the plan's scores of its list [B]."""
        student, mask = plan.of_lists(table, lists), _rankable(lists)
        mask &= jnp.sum(mask, axis=-1, keepdims=True) >= 2
        loss = (plan.loss or self.loss)(student, lists["teacher_scores"], mask)
        return loss, {
            "plan_rank_loss": (_sum(loss), jnp.float32(loss.size)),
            "plan_pairs_right": _ordered_pairs(student, lists["teacher_scores"], mask),
        }

    def _generation_loss(self, logits: jax.Array, batch: Batch) -> tuple[jax.Array, Metrics]:
        """Logits [G, T, V] -> mean over examples of their mean token loss, []."""
        targets, weights = batch["decoder_target_tokens"], batch["decoder_loss_weights"]
        tokens = jnp.sum(weights, axis=-1, keepdims=True)
        shares = weights / jnp.where(tokens > 0, tokens, 1.0)
        loss_sum, _ = generation.cross_entropy(
            logits, targets, shares, label_smoothing=self.label_smoothing, z_loss=0.0
        )
        examples = math.prod(targets.shape[:-1])
        metrics = {"generation_loss": (loss_sum, jnp.float32(examples))}
        return loss_sum / examples, metrics | _tokens_right(logits, targets, weights)


__getattr__ = moved.names(__name__, shift_right="training.list_decoding")
