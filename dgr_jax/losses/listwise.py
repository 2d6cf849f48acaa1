"""Losses of the distribution over a whole rank list; `ranking` says what holds for all."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from dgr_jax.losses import rank_lists
from dgr_jax.losses.rank_lists import LOWEST


def listnet(
    student: jax.Array,
    teacher: jax.Array,
    mask: jax.Array,
    *,
    temperature: float = 1.0,
    teacher_temperature: float | None = None,
) -> jax.Array:
    """ListNet (Cao et al. 2007): cross entropy of the top-one probabilities.

        - sum over i of softmax(t / teacher_temperature)_i * log softmax(s / temperature)_i

    At its best it equals the entropy of the teacher's distribution, not 0.

    Args:
      student, teacher, mask: [..., L], see `ranking`.
      temperature: divides the student's scores.
      teacher_temperature: divides the teacher's scores; None takes `temperature`. The scales of
        teachers differ by orders of magnitude: scores that spread over 20 give a one-hot target,
        scores that spread over 0.1 a flat one.

    Returns:
      f32 [...].
    """
    teacher_temperature = _temperatures(temperature, teacher_temperature)
    student, teacher, mask = rank_lists.clean(student, teacher, mask)
    log_p = _log_softmax(teacher / teacher_temperature, mask)
    log_q = _log_softmax(student / temperature, mask)
    return -jnp.sum(_probabilities(log_p, mask) * log_q, -1)


def kl_divergence(
    student: jax.Array,
    teacher: jax.Array,
    mask: jax.Array,
    *,
    temperature: float = 1.0,
    teacher_temperature: float | None = None,
) -> jax.Array:
    """KL(teacher || student) of the softmax distributions over the list (Hinton et al. 2015).

    ListNet minus the entropy of the teacher: the same gradient, and 0 where both agree. The loss
    is not multiplied by temperature ** 2.

    Args:
      student, teacher, mask: [..., L], see `ranking`.
      temperature, teacher_temperature: as in `listnet`.

    Returns:
      f32 [...], never below 0 but for rounding.
    """
    teacher_temperature = _temperatures(temperature, teacher_temperature)
    student, teacher, mask = rank_lists.clean(student, teacher, mask)
    log_p = _log_softmax(teacher / teacher_temperature, mask)
    log_q = _log_softmax(student / temperature, mask)
    return jnp.sum(_probabilities(log_p, mask) * (log_p - log_q), -1)


def listmle(
    student: jax.Array, teacher: jax.Array, mask: jax.Array, *, temperature: float = 1.0
) -> jax.Array:
    """ListMLE (Xia et al. 2008): -log probability of the teacher's order under Plackett-Luce.

        sum over i of   log(sum over j not above i of exp(s_j / temperature)) - s_i / temperature

    Passages tied in the teacher are in each other's sums (Breslow's rule for ties), which draws
    their scores together; the loss of a list with ties does not reach 0. As a sum it grows with the
    length of the list, to hundreds at 100 passages.

    Args:
      student, teacher, mask: [..., L], see `ranking`.
      temperature: divides the student's scores.

    Returns:
      f32 [...].
    """
    rank_lists.check_positive("temperature", temperature)
    student, teacher, mask = rank_lists.clean(student, teacher, mask)
    student = student / temperature
    left = (
        mask[..., :, None] & mask[..., None, :] & (teacher[..., None, :] <= teacher[..., :, None])
    )
    scores = jnp.where(left, student[..., None, :], LOWEST)
    term = jax.nn.logsumexp(scores, axis=-1) - student
    return jnp.sum(jnp.where(mask, term, 0.0), -1)


def _log_softmax(x, mask):
    """Log-softmax over the real passages; 0 where masked."""
    return jnp.where(mask, jax.nn.log_softmax(jnp.where(mask, x, LOWEST), -1), 0.0)


def _probabilities(log_p, mask):
    return jnp.where(mask, jnp.exp(log_p), 0.0)


def _temperatures(temperature, teacher_temperature):
    rank_lists.check_positive("temperature", temperature)
    if teacher_temperature is None:
        return temperature
    rank_lists.check_positive("teacher_temperature", teacher_temperature)
    return teacher_temperature
