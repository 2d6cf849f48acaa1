"""Training on passages that came later, without forgetting those that a student has learned.

Axis letters: B queries, T identifier length, C codes of a level, V vocabulary, D width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from dgr_jax import ranges
from dgr_jax.losses import generation, levels
from dgr_jax.special_tokens import PAD_ID
from dgr_jax.training.list_decoding import decoded_examples
from dgr_jax.training.objectives import Batch, LossFn, _sum, _tokens_right
from dgr_jax.training.optimizers import Optimizer, Schedule
from dgr_jax.training.source import Source

LEVELS, OLD = "level_tokens", "old_log_probs"  # features of a batch


@dataclass(frozen=True)
class LevelGeneration:
    """Cross entropy of an identifier's codes, and how far the student is from the old one.

    A batch is one of generation with LEVELS, int32 [B, T, C], the codes that passages have at each
    position, and OLD, f32 [B, T, C], the log-probabilities that the student had before.

    level_softmax: whether a code competes with those of its level alone, or with all tokens.
    old_weight: of the mean over levels of KL(old student || new student), both over the codes of
      the level (MixLoRA-DSI, Huynh et al. 2025); 0: OLD is not read.
    """

    level_softmax: bool = True
    old_weight: float = 0.1

    def __post_init__(self) -> None:
        ranges.check(self, old_weight=ranges.at_least(0))

    def loss_fn(self, model: Any) -> LossFn:
        """f over such a batch; weight: the number of codes."""

        def loss(params: Any, batch: Batch, rng: jax.Array) -> Any:
            logits, _ = decoded_examples(model, params, batch, rng, None)
            targets, weights = batch["decoder_target_tokens"], batch["decoder_loss_weights"]
            log_probs = levels.level_log_probs(logits, batch[LEVELS])
            if self.level_softmax:
                of_codes = levels.cross_entropy(log_probs, batch[LEVELS], targets)
                loss_sum = _sum(of_codes * weights)
            else:
                loss_sum, _ = generation.cross_entropy(logits, targets, weights)
            metrics = _tokens_right(logits, targets, weights)
            metrics["generation_loss"] = loss_sum, _sum(weights)
            if self.old_weight:
                apart = _sum(levels.divergence(batch[OLD], log_probs) * weights)
                metrics["old_divergence"] = apart, _sum(weights)
                loss_sum += self.old_weight * apart
            return loss_sum, _sum(weights), metrics

        return loss


@dataclass(frozen=True)
class WithLevels:
    """A source whose batches bring along the codes of each level: `codes`, int32 [T, C]."""

    source: Source
    codes: np.ndarray

    def batch(self, step: int, process_index: int = 0, process_count: int = 1) -> dict[str, Any]:
        """See Source."""
        batch = self.source.batch(step, process_index, process_count)
        rows = len(batch["decoder_target_tokens"])
        return batch | {LEVELS: np.broadcast_to(self.codes, (rows, *self.codes.shape))}


@dataclass(frozen=True, eq=False)
class SlowRows:
    """An optimizer by which rows of the embeddings move at rates of their own, f32 [V]: those of
    the input, and of the output where it has its own. 0: a row stays as it is.

    The rates scale updates and not gradients: Adafactor and Adam divide a gradient by its own
    size, so that scaling it would change nothing.
    """

    optimizer: Optimizer
    rates: np.ndarray

    @property
    def learning_rate(self) -> Schedule:
        """See Optimizer: that of everything else."""
        return self.optimizer.learning_rate

    def transformation(self, total_steps: int) -> optax.GradientTransformation:
        """See Optimizer."""

        def scaled(path: Any, update: jax.Array) -> jax.Array:
            names = [getattr(key, "key", "") for key in path]
            if "token_embedder" in names:
                return update * jnp.asarray(self.rates)[:, None]
            if "logits_dense" in names:
                return update * jnp.asarray(self.rates)
            return update

        def slow(updates: Any, _: Any) -> Any:
            return jax.tree_util.tree_map_with_path(scaled, updates)

        return optax.chain(self.optimizer.transformation(total_steps), optax.stateless(slow))


def codes_of(tokens: np.ndarray) -> np.ndarray:
    """Identifiers int32 [U, T] -> the tokens that they have at each position, int32 [T, C]."""
    by_level = [np.setdiff1d(column, PAD_ID) for column in tokens.T]
    most = max(map(len, by_level))
    return np.stack([np.pad(codes, (0, most - len(codes))) for codes in by_level]).astype(np.int32)
