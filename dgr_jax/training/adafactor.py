"""Adafactor (Shazeer & Stern 2018) in few passes over memory: numbers and state of optax's.

A CPU is as slow at this as its memory. XLA for CPUs writes an array down before it is summed, and
again before each use of what is costly to compute, such as a quotient. So everything here is
arranged that an array of a parameter's size is written twice, its squares and its update, and read
no more often than needed; `lax.optimization_barrier` tells the compiler where to keep apart what it
would join. The arithmetic of an element is that of `optax.adafactor`, operation by operation.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.lax import optimization_barrier

_LEAST_SQUARE = 1e-30  # added to squares of gradients
_LEAST_SCALE = 1e-3  # of a parameter, to which its steps are relative


class _Changed(NamedTuple):
    """What becomes of a parameter: its update, and moments as `optax.FactoredState` has them."""

    update: jax.Array
    v_row: jax.Array
    v_col: jax.Array
    v: jax.Array


@dataclass(frozen=True)
class FewPasses:
    """`optax.adafactor` without momentum, steps relative to the parameters' sizes.

    rate: learning rate of a step, counted from 0. The others are those of `optimizers.Adafactor`.
    """

    rate: Callable[[jax.Array], jax.Array]
    decay_rate: float
    clipping_threshold: float
    factor_from: int

    def init(self, params: Any) -> Any:
        """The state of `optax.adafactor`."""
        return optax.adafactor(
            learning_rate=self.rate,
            min_dim_size_to_factor=self.factor_from,
            decay_rate=self.decay_rate,
            multiply_by_parameter_scale=True,
            clipping_threshold=self.clipping_threshold,
            momentum=None,
        ).init(params)

    def update(
        self, sums: Any, state: Any, params: Any, weight: jax.Array | None = None
    ) -> tuple[Any, Any]:
        """Updates by the gradient, which is `sums` divided by `weight` (None: by 1), and state."""
        factored, clipping, scheduled, *rest = state
        beta = 1.0 - jnp.float32(factored.count + 1) ** -self.decay_rate
        rate = jnp.float32(self.rate(scheduled.count))

        def changed(total: jax.Array, param: jax.Array, *moments: jax.Array) -> _Changed:
            return self._changed(total, weight, param, beta, rate, _Changed(total, *moments))

        moments = factored.v_row, factored.v_col, factored.v
        leaves = jax.tree.map(changed, sums, params, *moments)
        update, *moments = (
            jax.tree.map(lambda leaf, i=i: leaf[i], leaves, is_leaf=lambda x: type(x) is _Changed)
            for i in range(len(_Changed._fields))
        )
        factored = optax.FactoredState(optax.safe_increment(factored.count), *moments)
        scheduled = scheduled._replace(count=optax.safe_increment(scheduled.count))
        return update, (factored, clipping, scheduled, *rest)

    def _changed(
        self,
        total: jax.Array,
        weight: jax.Array | None,
        param: jax.Array,
        beta: jax.Array,
        rate: jax.Array,
        before: _Changed,
    ) -> _Changed:
        divided = lambda x: x if weight is None else x / weight
        square = jnp.square(divided(total)) + _LEAST_SQUARE
        # The quotient is computed a second time, and not kept from the first.
        grad = divided(optimization_barrier(total))
        mixed = lambda old, new: beta * old + (1.0 - beta) * new
        axes = _factored_axes(param.shape, self.factor_from)
        if axes is None:
            moments = before._replace(v=mixed(before.v, square))
            update = grad * moments.v**-0.5
        else:
            row, column = axes
            v_row = mixed(before.v_row, jnp.mean(square, axis=column))
            v_col = mixed(before.v_col, jnp.mean(square, axis=row))
            moments = before._replace(v_row=v_row, v_col=v_col)
            mean = jnp.mean(v_row, axis=row - (row > column), keepdims=True)
            update = grad * jnp.expand_dims((v_row / mean) ** -0.5, column)
            update = update * jnp.expand_dims(v_col**-0.5, row)
        # Written once, for its size and for the parameter.
        update = optimization_barrier(update)
        size = jnp.maximum(1.0, _root_mean_square(update) / self.clipping_threshold)
        scale = jnp.maximum(_LEAST_SCALE, _root_mean_square(param))
        return moments._replace(update=-(update / size * rate * scale))


def _root_mean_square(x: jax.Array) -> jax.Array:
    return jnp.sqrt(jnp.mean(jnp.square(x)))


def _factored_axes(shape: tuple[int, ...], factor_from: int) -> tuple[int, int] | None:
    """The second largest and the largest axis, over whose parts the moment is factored; None where
    one of them is shorter than `factor_from`."""
    if len(shape) < 2:
        return None
    *_, row, column = np.argsort(shape)
    return None if shape[row] < factor_from else (int(row), int(column))
