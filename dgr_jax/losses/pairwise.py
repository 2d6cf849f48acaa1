"""Losses that compare the passages of a rank list in pairs; `ranking` says what holds for all."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

from dgr_jax.losses import rank_lists
from dgr_jax.losses.rank_lists import LOWEST

POSITION_WEIGHTS = ("reciprocal", "uniform")
GAINS = ("rank", "exponential")


def distilled_ranknet(
    student: jax.Array,
    teacher: jax.Array,
    mask: jax.Array,
    *,
    margin: float = 1.0,
    margin_gap: float = 0.5,
    first_weight: float = 3.0,
    position_weights: str = "reciprocal",
) -> jax.Array:
    """Distilled RankNet (DGR, Li et al. 2024): a hinge whose margin grows with the rank distance.

    With the passages counted from 1 in the teacher's order,

        mean over pairs i < j with a positive term of
            v_i * max(0, s_j - s_i + margin + (j - i - 1) * margin_gap)

    and 0 where no term is positive. Passages tied in the teacher share the position 1 + (number of
    passages strictly above), and pairs of them do not count. A strict order gives the published
    loss.

    Args:
      student, teacher, mask: [..., L], see `ranking`.
      margin: margin between neighbours in the teacher's order. 1 suits log-probabilities of docids,
        the published 300 suits multiview scores.
      margin_gap: what every passage between the two adds to their margin (published: 100). Both are
        meant for short lists: the first and the last of 100 passages get a margin 98 gaps wider.
      first_weight: v_1, the weight of the pairs of the teacher's first passage.
      position_weights: 'reciprocal' (v_i = 1/i for the other passages, as published) or 'uniform'
        (v_i = 1 for every passage, the first too; first_weight is then not used).

    Returns:
      f32 [...].
    """
    rank_lists.check_one_of("position_weights", position_weights, POSITION_WEIGHTS)
    student, teacher, mask = rank_lists.clean(student, teacher, mask)
    position = rank_lists.position(teacher, mask)
    if position_weights == "uniform":
        weight = jnp.ones_like(student)
    else:
        weight = jnp.where(position == 0, first_weight, 1.0 / (position + 1.0))
    gap = position[..., None, :] - position[..., :, None] - 1.0
    term = weight[..., :, None] * (margin + margin_gap * gap - rank_lists.differences(student))
    counted = rank_lists.ordered(teacher, mask) & (term > 0)
    return rank_lists.mean(term, counted, axis=(-2, -1))


def ltrgr(
    student: jax.Array,
    teacher: jax.Array,
    mask: jax.Array,
    *,
    margin: float = 1.0,
    margin_gap: float = 0.5,
    positive_above: float | None = None,
) -> jax.Array:
    """LTRGR's two hinges (Li et al. 2023), between positives p and negatives n of the list.

        0.5 * max(0, s(n_top) - s(p_top) + margin)
      + 0.5 * E[max(0, s(n_rand) - s(p_rand) + margin + margin_gap)]

    Positive are the passages that the teacher scores strictly above `positive_above`, which is 0
    for relevance grades; with None, which needs no scale, those that share the teacher's highest
    score. The rest of the list is negative. 'top' is the passage that the student scores highest.
    The published second term draws one random positive and one random negative; this one is its
    expectation, the mean over all pairs of a positive and a negative. On average that is the same
    loss; it needs no random key and has less noise. A list without a positive or without a negative
    gives 0.

    Args:
      student, teacher, mask: [..., L], see `ranking`.
      margin, margin_gap: as in `distilled_ranknet`.
      positive_above: teacher score that a positive must exceed, or None.

    Returns:
      f32 [...].
    """
    student, teacher, mask = rank_lists.clean(student, teacher, mask)
    if positive_above is None:
        positive = mask & (rank_lists.position(teacher, mask) == 0)
    else:
        positive = mask & (teacher > positive_above)
    negative = mask & ~positive
    top = _highest(student, negative) - _highest(student, positive) + margin
    usable = jnp.any(positive, -1) & jnp.any(negative, -1)
    top = jnp.where(usable & (top > 0), top, 0.0)
    random = margin + margin_gap - rank_lists.differences(student)
    random = jnp.where(random > 0, random, 0.0)
    pairs = positive[..., :, None] & negative[..., None, :]
    return 0.5 * top + 0.5 * rank_lists.mean(random, pairs, axis=(-2, -1))


def ranknet(
    student: jax.Array, teacher: jax.Array, mask: jax.Array, *, temperature: float = 1.0
) -> jax.Array:
    """RankNet (Burges et al. 2005): mean over the teacher's ordered pairs of a logistic loss.

        mean over i above j of   log(1 + exp((s_j - s_i) / temperature))

    Args:
      student, teacher, mask: [..., L], see `ranking`.
      temperature: divides the student's score differences.

    Returns:
      f32 [...].
    """
    rank_lists.check_positive("temperature", temperature)
    student, teacher, mask = rank_lists.clean(student, teacher, mask)
    term = jax.nn.softplus(-rank_lists.differences(student) / temperature)
    return rank_lists.mean(term, rank_lists.ordered(teacher, mask), axis=(-2, -1))


def lambda_loss(
    student: jax.Array,
    teacher: jax.Array,
    mask: jax.Array,
    *,
    gains: str = "rank",
    temperature: float = 1.0,
) -> jax.Array:
    """LambdaLoss (Wang et al. 2018) with LambdaRank's weights: how a swap of a pair changes nDCG.

        sum over i above j of   |dnDCG(i, j)| * log2(1 + exp((s_j - s_i) / temperature))
        |dnDCG(i, j)| = (G_i - G_j) / maxDCG * |1 / log2(1 + r_i) - 1 / log2(1 + r_j)|

    r is the student's own rank from 1, through which no gradient flows. Passages that the student
    scores equally get the ranks of the worst order, the teacher's reversed, so that a tie still has
    a gradient.

    Args:
      student, teacher, mask: [..., L], see `ranking`.
      gains: 'rank' (G = number of passages that the teacher puts strictly below; for scores of any
        scale) or 'exponential' (G = 2^t - 1; for relevance grades, of which one below 0 counts
        as 0).
      temperature: divides the student's score differences.

    Returns:
      f32 [...]; 0 where every gain is 0.
    """
    rank_lists.check_one_of("gains", gains, GAINS)
    rank_lists.check_positive("temperature", temperature)
    student, teacher, mask = rank_lists.clean(student, teacher, mask)
    gain = _gains(teacher, mask, gains)
    ideal = jnp.sum(gain / jnp.log2(2.0 + _strict_position(gain, gain, mask)), -1)
    rank = _strict_position(jax.lax.stop_gradient(student), -teacher, mask)
    discount = 1.0 / jnp.log2(2.0 + rank)
    change = jnp.abs(rank_lists.differences(gain) * rank_lists.differences(discount))
    weight = change / jnp.where(ideal > 0, ideal, 1.0)[..., None, None]
    term = weight * jax.nn.softplus(-rank_lists.differences(student) / temperature) / math.log(2.0)
    return jnp.sum(jnp.where(rank_lists.ordered(teacher, mask), term, 0.0), (-2, -1))


def margin_mse(
    student: jax.Array,
    teacher: jax.Array,
    mask: jax.Array,
    *,
    teacher_temperature: float = 1.0,
) -> jax.Array:
    """Margin-MSE (Hofstaetter et al. 2020) over all pairs of the list.

        mean over pairs {i, j} of   ((s_i - s_j) - (t_i - t_j) / teacher_temperature)^2

    A pair tied in the teacher counts here: its margin to learn is 0.

    Args:
      student, teacher, mask: [..., L], see `ranking`.
      teacher_temperature: divides the teacher's margins, to bring them to the student's scale.

    Returns:
      f32 [...]; 0 with fewer than two passages.
    """
    rank_lists.check_positive("teacher_temperature", teacher_temperature)
    student, teacher, mask = rank_lists.clean(student, teacher, mask)
    term = jnp.square(
        rank_lists.differences(student) - rank_lists.differences(teacher) / teacher_temperature
    )
    both = mask[..., :, None] & mask[..., None, :] & ~jnp.eye(mask.shape[-1], dtype=bool)
    return rank_lists.mean(term, both, axis=(-2, -1))


def _strict_position(score, tie_break, mask):
    """f32 [..., L]: ranks from 0, best first; ties by `tie_break`, then by place in the list."""
    place = jnp.arange(mask.shape[-1])
    keys = (score, tie_break, jnp.broadcast_to(-place, mask.shape))
    above = jnp.zeros((), bool)
    for key in reversed(keys):
        i, j = key[..., :, None], key[..., None, :]
        above = (i > j) | ((i == j) & above)
    both = mask[..., :, None] & mask[..., None, :]
    return jnp.sum(above & both, axis=-2, dtype=jnp.float32)


def _gains(teacher, mask, gains):
    """f32 [..., L], 0 where masked: the gains of nDCG.

    A common factor of all gains does not change nDCG, so the exponential ones are divided by 2^max,
    for 2^t overflows float32 at t = 128.
    """
    if gains == "rank":
        return jnp.sum(rank_lists.ordered(teacher, mask), axis=-1, dtype=jnp.float32)
    grade = jnp.maximum(teacher, 0.0)
    top = jnp.max(grade, -1, keepdims=True)
    return jnp.where(mask, jnp.exp2(grade - top) - jnp.exp2(-top), 0.0)


def _highest(x, chosen):
    """The highest chosen entry; 0 where none is chosen."""
    highest = jnp.max(jnp.where(chosen, x, LOWEST), -1)
    return jnp.where(jnp.any(chosen, -1), highest, 0.0)
