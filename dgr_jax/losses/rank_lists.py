"""What the losses of rank lists share: checked scores, and who stands above whom."""

from __future__ import annotations

import jax
import jax.numpy as jnp

LOWEST = float(jnp.finfo(jnp.float32).min)


def clean(student, teacher, mask):
    """The three as float32, float32 and bool, with scores 0 where masked, so that no computation
    meets an arbitrary value there; ValueError where their shapes differ."""
    if not student.shape == teacher.shape == mask.shape:
        raise ValueError(
            "student, teacher and mask must have one shape [..., L]; got "
            f"{student.shape}, {teacher.shape} and {mask.shape}"
        )
    mask = mask.astype(bool)
    student = jnp.where(mask, student.astype(jnp.float32), 0.0)
    teacher = jnp.where(mask, jax.lax.stop_gradient(teacher).astype(jnp.float32), 0.0)
    return student, teacher, mask


def differences(x):
    """x_i - x_j at [..., i, j]."""
    return x[..., :, None] - x[..., None, :]


def ordered(teacher, mask):
    """bool [..., i, j]: neither is masked and the teacher puts i strictly above j."""
    above = teacher[..., :, None] > teacher[..., None, :]
    return above & mask[..., :, None] & mask[..., None, :]


def position(teacher, mask):
    """f32 [..., L]: how many passages the teacher puts strictly above each; 0 where masked."""
    return jnp.sum(ordered(teacher, mask), axis=-2, dtype=jnp.float32)


def mean(term, counted, axis):
    """The mean of the counted terms, 0 where no term is counted."""
    total = jnp.sum(jnp.where(counted, term, 0.0), axis)
    return total / jnp.maximum(jnp.sum(counted, axis), 1)


def check_positive(name, value):
    if not value > 0:
        raise ValueError(f"{name} must be above 0; got {value!r}")


def check_one_of(name, value, allowed):
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}; got {value!r}")
