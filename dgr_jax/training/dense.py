"""The objective of a dual encoder; its contract is that of `training.objectives`.

Axis letters: B queries, Q query length, L passages of a query's list, S passage length, R ignored
passages of a query, N = B * L passages of the batch.

A batch:

    encoder_input_tokens int32 [B, Q]
    passage_tokens       int32 [B, L, S]  the query's positives and negatives, in any order
    passage_mask         bool  [B, L]     real passages
    positive_mask        bool  [B, L]     which of them are positives, up to P of them
    passages             int32 [B, L]     passage index, -1 where there is none
    ignored_passages     int32 [B, R]     optional: passages that are no negatives of the query,
                                          such as its other positives; -1: free place
    teacher_scores       f32   [B, L]     where there is a teacher loss

The negatives of a query are those of its own list and, in the batch, all passages of all other
lists. The batch is the global one: vectors, not tokens, are gathered over all devices, and the
result is that of one device. A microbatch is a batch of its own here: B / microbatches lists meet.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from dgr_jax import ranges
from dgr_jax.models import activations
from dgr_jax.training.objectives import Batch, LossFn, Metrics

Contrastive = Callable[..., jax.Array]
Ranking = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]


@dataclass(frozen=True)
class Dense:
    """A contrastive loss, a teacher's order of each list, or both.

    The value is mean over the queries of contrastive loss + teacher_weight * teacher loss;
    loss_sum is the sum, weight_sum B. Queries without a positive or a negative add 0 to the first,
    lists of fewer than two passages to the second; metrics count them.

    Attributes:
      loss: f(scores [B,N], positive_mask, mask, key) -> [B], see `losses.contrastive`; None: none.
      in_batch: the passages of other queries are negatives too; False: each list by itself.
      teacher_loss: f(student [B,L], teacher [B,L], mask [B,L]) -> [B] such as kl_divergence or
        margin_mse of `losses.ranking`, over each list by itself; None: none.
      teacher_weight: of the teacher loss.
    """

    loss: Contrastive | None = None
    in_batch: bool = True
    teacher_loss: Ranking | None = None
    teacher_weight: float = 1.0

    def __post_init__(self) -> None:
        ranges.check(self, teacher_weight=ranges.at_least(0))
        if self.loss is None and self.teacher_loss is None:
            raise ValueError(
                "Dense: got neither Dense.loss nor Dense.teacher_loss, expected one or both"
            )

    def loss_fn(self, model: Any) -> LossFn:
        """f over a batch as the module describes; `model` encodes as a `DualEncoder`."""

        def loss(params: Any, batch: Batch, rng: jax.Array) -> Any:
            _check(batch, self.teacher_loss is not None)
            encode_rng, draw_rng = jax.random.split(rng)
            queries, passages = _encode(model, params, batch, encode_rng)
            size = queries.shape[0]
            loss_sum, metrics = jnp.float32(0.0), {}
            if self.loss is not None:
                if self.in_batch:
                    scored = _in_batch(queries, passages, batch)
                else:
                    scored = _in_list(queries, passages, batch)
                values = self.loss(*scored, draw_rng)
                loss_sum += jnp.sum(values)
                metrics |= _contrastive_metrics(values, *scored)
            if self.teacher_loss is not None:
                student, _, mask = _in_list(queries, passages, batch)
                values = self.teacher_loss(student, batch["teacher_scores"], mask)
                valid = jnp.sum(mask, axis=-1) >= 2
                values = jnp.where(valid, values, 0.0)
                loss_sum += self.teacher_weight * jnp.sum(values)
                metrics["teacher_loss"] = (jnp.sum(values), jnp.float32(size))
                metrics["valid_lists"] = (_count(valid), jnp.float32(size))
            return loss_sum, jnp.float32(size), metrics

        return loss


def _encode(model: Any, params: Any, batch: Batch, rng: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Vectors of the queries f32 [B, d] and of their lists f32 [B, L, d]."""
    lists = batch["passage_tokens"]
    rngs = jax.random.split(rng)

    def encode(tokens: jax.Array, method: str, key: jax.Array) -> jax.Array:
        return model.apply(
            {"params": params}, tokens, deterministic=False, method=method, rngs={"dropout": key}
        )

    queries = encode(batch["encoder_input_tokens"], "encode_queries", rngs[0])
    passages = encode(lists.reshape(-1, lists.shape[-1]), "encode_passages", rngs[1])
    return queries, passages.reshape(*lists.shape[:2], -1)


def _in_batch(queries: jax.Array, passages: jax.Array, batch: Batch) -> tuple[jax.Array, ...]:
    """(scores f32 [B, N], positive_mask, mask bool [B, N]) over the passages of all lists.

    Only the columns of a query's own list are positives. A column of another list is masked where
    it holds one of the query's positives or ignored passages.
    """
    size, length = batch["passages"].shape
    everywhere = activations.cut(passages.reshape(size * length, -1), (None, None))
    scores = jnp.einsum("bd,nd->bn", queries, everywhere, precision=jax.lax.Precision.HIGHEST)
    own = jnp.repeat(jnp.eye(size, dtype=bool), length, axis=1)
    positive = own & batch["positive_mask"].reshape(1, -1)
    taken = jnp.where(batch["positive_mask"] & batch["passage_mask"], batch["passages"], -1)
    if "ignored_passages" in batch:
        taken = jnp.concatenate([taken, batch["ignored_passages"]], axis=1)
    same = batch["passages"].reshape(1, -1, 1) == taken[:, None, :]
    known = jnp.any(same & (taken >= 0)[:, None, :], axis=-1)
    mask = batch["passage_mask"].reshape(1, -1) & (own | ~known)
    return activations.cut(scores, ("batch", None)), positive, mask


def _in_list(queries: jax.Array, passages: jax.Array, batch: Batch) -> tuple[jax.Array, ...]:
    """(scores f32 [B, L], positive_mask, mask bool [B, L]) over each query's own list."""
    scores = jnp.einsum("bd,bld->bl", queries, passages, precision=jax.lax.Precision.HIGHEST)
    return scores, batch["positive_mask"], batch["passage_mask"]


def _contrastive_metrics(
    values: jax.Array, scores: jax.Array, positive: jax.Array, mask: jax.Array
) -> Metrics:
    """Mean loss; share of queries with a positive and a negative; of these, the share with a
    positive on top, and the mean number of negatives."""
    positive = positive & mask
    negative = mask & ~positive
    usable = jnp.any(positive, -1) & jnp.any(negative, -1)
    best = lambda chosen: jnp.max(jnp.where(chosen, scores, -jnp.inf), -1)
    first = usable & (best(positive) > best(negative))
    size = jnp.float32(values.shape[0])
    return {
        "contrastive_loss": (jnp.sum(values), size),
        "usable_queries": (_count(usable), size),
        "positive_first": (_count(first), _count(usable)),
        "negatives": (_count(negative & usable[:, None]), _count(usable)),
    }


def _count(chosen: jax.Array) -> jax.Array:
    return jnp.sum(chosen, dtype=jnp.float32)


def _check(batch: Batch, with_teacher: bool) -> None:
    """Features that are there, with one shape [B, L]; ValueError where not."""
    tokens = batch["passage_tokens"].shape
    names = ["passage_mask", "positive_mask", "passages"] + ["teacher_scores"] * with_teacher
    for name in names:
        if name not in batch:
            raise ValueError(f"Dense: the batch lacks {name}, expected it of shape {tokens[:2]}")
        if batch[name].shape != tokens[:2]:
            raise ValueError(
                f"Dense: {name}: got shape {batch[name].shape}, expected {tokens[:2]}, as "
                f"passage_tokens {tokens}"
            )
