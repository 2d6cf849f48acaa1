"""IncDSI (Kishore et al. 2023): the row of the output embedding by which a student that is not
trained any more writes the token of a passage that comes later.

Axis letters: C old passages, with room for more; N new ones; Q queries of each; D width.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax

from dgr_jax import ranges


@dataclass(frozen=True)
class IncDSI:
    """The problem whose solution is a row, and how it is solved.

    weight: of the new passage's queries, 0 to 1; the rest is that of the old passages' queries.
    new_margin: by how much the new row is to be ahead of all old ones for its own queries, in
      logits; old_margin: by how much it is to be behind for those of old passages.
    l2: of the squared length of the row.
    iterations: of L-BFGS.
    queries: texts of a new passage at most.
    block: passages that are solved together; they do not know of each other.

    The weight, the margins and l2 were chosen by questions of the training split about passages of
    the quickstart collection that were held out, and by how much the others were still found.
    """

    weight: float = 0.9
    new_margin: float = 2.0
    old_margin: float = 0.0
    l2: float = 1e-3
    iterations: int = 30
    queries: int = 16
    block: int = 16

    def __post_init__(self) -> None:
        counts = ("iterations", "queries", "block")
        ranges.check(
            self,
            **dict.fromkeys(counts, ranges.at_least(1)),
            weight=ranges.between(0, 1),
            new_margin=ranges.at_least(0),
            old_margin=ranges.at_least(0),
            l2=ranges.above(0),
        )


@functools.partial(jax.jit, static_argnums=0)
def solve(
    settings: IncDSI,
    rows: jax.Array,
    states: jax.Array,
    there: jax.Array,
    queries: jax.Array,
    given: jax.Array,
) -> jax.Array:
    """The rows f32 [N, D] of new passages, each of which minimises

        weight * sum_q relu(new_margin + max_j w_j.q - v.q)^2
        + (1 - weight) * sum_j relu(old_margin + v.z_j - w_j.z_j)^2 + l2 * |v|^2

    which is convex, from the old row that is the best one for the mean of its queries.
    rows, states: w and z f32 [C, D], the row of each old passage and the decoder's state of one
    of its queries; there: bool [C], which places are filled. queries: q f32 [N, Q, D], states too;
    given: bool [N, Q], at least one of each.
    """
    own = (rows * states).sum(-1)

    def solved(queries: jax.Array, given: jax.Array) -> jax.Array:
        best = jnp.where(there, queries @ rows.T, -jnp.inf).max(-1)
        mean = jnp.where(given[:, None], queries, 0.0).sum(0)
        start = rows[jnp.where(there, rows @ mean, -jnp.inf).argmax()]

        def objective(row: jax.Array) -> jax.Array:
            missed = jax.nn.relu(settings.new_margin + best - queries @ row)
            lost = jax.nn.relu(settings.old_margin + states @ row - own)
            missed, lost = jnp.where(given, missed, 0.0), jnp.where(there, lost, 0.0)
            old = (1 - settings.weight) * (lost**2).sum()
            return settings.weight * (missed**2).sum() + old + settings.l2 * (row**2).sum()

        return _least(objective, start, settings.iterations)

    return jax.vmap(solved)(queries, given)


def _least(
    objective: Callable[[jax.Array], jax.Array], start: jax.Array, iterations: int
) -> jax.Array:
    """Where L-BFGS (Liu & Nocedal 1989) arrives from `start`."""
    solver = optax.lbfgs()
    value_and_grad = optax.value_and_grad_from_state(objective)

    def step(carry: Any, _: None) -> tuple[Any, None]:
        row, state = carry
        value, grad = value_and_grad(row, state=state)
        updates, state = solver.update(grad, state, row, value=value, grad=grad, value_fn=objective)
        return (optax.apply_updates(row, updates), state), None

    (row, _), _ = jax.lax.scan(step, (start, solver.init(start)), length=iterations)
    return row
