"""Optimizers and learning rate schedules as settings that make optax transformations."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import optax

from dgr_jax import ranges
from dgr_jax.models.stacking import LAYERS, LAYERS_AXIS
from dgr_jax.training.adafactor import FewPasses

NOT_DECAYED = ("scale", "bias", "rel_embedding")
_GRAD_NORM = ranges.optional(ranges.above(0))


def _warmup(step: jax.Array, warmup_steps: int) -> jax.Array:
    """Rises to 1 at the step numbered `warmup_steps`; the first step already moves."""
    return jnp.minimum(1.0, (step + 1.0) / max(1, warmup_steps))


def _check(schedule: Any) -> None:
    ranges.check(schedule, peak=ranges.above(0), warmup_steps=ranges.at_least(0))


@dataclass(frozen=True)
class Constant:
    """`peak` at every step after a linear warmup. T5 fine-tuning: 1e-3, no warmup."""

    peak: float = 1e-3
    warmup_steps: int = 0

    def __post_init__(self) -> None:
        _check(self)

    def schedule(self, total_steps: int) -> Callable[[jax.Array], jax.Array]:
        """Learning rate of a step, counted from 0."""
        return lambda step: self.peak * _warmup(step, self.warmup_steps)


@dataclass(frozen=True)
class ReciprocalSqrt:
    """peak * sqrt(timescale / max(n, timescale)), n = 1, 2, ... (Raffel et al. 2020).

    T5 pre-training is peak 0.01 with timescale 10,000: 1 / sqrt(max(n, 10^4)).
    """

    peak: float = 0.01
    timescale: int = 10_000
    warmup_steps: int = 0

    def __post_init__(self) -> None:
        _check(self)
        ranges.check(self, timescale=ranges.at_least(1))

    def schedule(self, total_steps: int) -> Callable[[jax.Array], jax.Array]:
        """Learning rate of a step, counted from 0."""

        def rate(step: jax.Array) -> jax.Array:
            decay = jnp.sqrt(self.timescale / jnp.maximum(step + 1.0, self.timescale))
            return self.peak * decay * _warmup(step, self.warmup_steps)

        return rate


def _progress(step: jax.Array, warmup_steps: int, total_steps: int) -> jax.Array:
    """Share of the steps after warmup that are done before `step`: 0 .. 1."""
    return jnp.clip((step - warmup_steps) / max(1, total_steps - warmup_steps), 0.0, 1.0)


@dataclass(frozen=True)
class _Decay:
    """After a linear warmup to `peak`, down to `final` * peak at the last step."""

    peak: float = 1e-3
    warmup_steps: int = 0
    final: float = 0.0

    def __post_init__(self) -> None:
        _check(self)
        ranges.check(self, final=ranges.at_least(0))

    def schedule(self, total_steps: int) -> Callable[[jax.Array], jax.Array]:
        """Learning rate of a step, counted from 0."""

        def rate(step: jax.Array) -> jax.Array:
            decay = self._decay(_progress(step, self.warmup_steps, total_steps))
            return self.peak * decay * _warmup(step, self.warmup_steps)

        return rate

    def _decay(self, done: jax.Array) -> jax.Array:
        """Share of the peak when this share of the steps after warmup is done."""
        raise NotImplementedError


class Linear(_Decay):
    """After a linear warmup to `peak`, a straight line to `final` * peak at the last step."""

    def _decay(self, done: jax.Array) -> jax.Array:
        return 1.0 - (1.0 - self.final) * done


class Cosine(_Decay):
    """After a linear warmup, half a cosine to `final` * peak (Loshchilov & Hutter 2017)."""

    def _decay(self, done: jax.Array) -> jax.Array:
        return self.final + (1.0 - self.final) * 0.5 * (1.0 + jnp.cos(math.pi * done))


class Schedule(Protocol):
    """How the learning rate goes over a run."""

    def schedule(self, total_steps: int) -> Callable[[Any], Any]:
        """Learning rate of a step, counted from 0."""


class Optimizer(Protocol):
    """How a training run minimises: settings that make an optax transformation."""

    @property
    def learning_rate(self) -> Schedule:
        """By which the transformation goes, and which is among the metrics."""

    def transformation(self, total_steps: int) -> optax.GradientTransformation:
        """The transformation of a run of `total_steps` steps."""


class Gradient(NamedTuple):
    """The gradient of a step as its microbatches add it up: `sums` divided by `weight`; its norm.

    Optimizers here take it as their extra argument `gradient` in place of the quotients, which then
    are not written to memory. Others are given the quotients, as `updates`.
    """

    sums: Any
    weight: jax.Array
    norm: jax.Array


def _scaled(max_grad_norm: float) -> optax.GradientTransformationExtraArgs:
    """The gradient with a global norm of at most `max_grad_norm`."""

    def update(
        updates: Any, state: Any, params: Any = None, *, gradient: Gradient | None = None, **_: Any
    ) -> tuple[Any, Any]:
        if gradient is None:
            gradient = Gradient(updates, jnp.ones(()), optax.global_norm(updates))
        scale = max_grad_norm / jnp.maximum(gradient.norm, max_grad_norm) / gradient.weight
        return jax.tree.map(lambda leaf: leaf * scale, gradient.sums), state

    return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)


def _each_layer_apart(optimizer: FewPasses) -> optax.GradientTransformationExtraArgs:
    """`optimizer`, for which every layer in a stacked parameter is a parameter of its own.

    Norms and means over a parameter, and the choice of its factored dimensions, then do not depend
    on whether layers are scanned (t5x's Adafactor does so for the logical axis 'layers'). The state
    of stacked parameters has the axis of layers where the parameters have it.
    """

    def axes(params: Any) -> Any:
        """Of each leaf the axis of layers, or -1: not stacked."""
        is_stacked = lambda path: any(getattr(key, "key", None) == LAYERS for key in path)
        return jax.tree_util.tree_map_with_path(
            lambda path, _: LAYERS_AXIS if is_stacked(path) else -1, params
        )

    def over(axes: Any) -> Any:
        return jax.tree.map(lambda axis: None if axis < 0 else axis, axes)

    def state_axes(params: Any, axes: Any) -> Any:
        layer = jax.tree.map(
            lambda p, axis: (
                p if axis < 0 else jax.ShapeDtypeStruct(_without(p.shape, axis), p.dtype)
            ),
            params,
            axes,
        )
        state = jax.eval_shape(optimizer.init, layer)
        return optax.tree_utils.tree_map_params(
            optimizer, lambda _, axis: axis, state, axes, transform_non_params=lambda _: -1
        )

    def init(params: Any) -> Any:
        layer_axes = axes(params)
        if max(jax.tree.leaves(layer_axes), default=-1) < 0:
            return optimizer.init(params)
        out = over(state_axes(params, layer_axes))
        return jax.vmap(optimizer.init, in_axes=(over(layer_axes),), out_axes=out)(params)

    def update(
        updates: Any, state: Any, params: Any, *, gradient: Gradient | None = None, **_: Any
    ) -> tuple[Any, Any]:
        sums, weight = (updates, None) if gradient is None else (gradient.sums, gradient.weight)
        layer_axes = axes(params)
        one_by_one = functools.partial(optimizer.update, weight=weight)
        if max(jax.tree.leaves(layer_axes), default=-1) < 0:
            return one_by_one(sums, state, params)
        own, of_state = over(layer_axes), over(state_axes(params, layer_axes))
        apart = jax.vmap(one_by_one, in_axes=(own, of_state, own), out_axes=(own, of_state))
        return apart(sums, state, params)

    return optax.GradientTransformationExtraArgs(init, update)


def _without(shape: tuple[int, ...], axis: int) -> tuple[int, ...]:
    return shape[:axis] + shape[axis + 1 :]


@dataclass(frozen=True)
class Adafactor:
    """Adafactor with T5's settings (Shazeer & Stern 2018): no momentum, steps relative to the
    parameter's own size, second moments factored where both dimensions reach `factor_from`.
    Layers that are scanned are updated each by itself.
    """

    learning_rate: Schedule = Constant()
    decay_rate: float = 0.8
    clipping_threshold: float = 1.0
    factor_from: int = 128
    max_grad_norm: float | None = None

    def __post_init__(self) -> None:
        ranges.check(
            self,
            decay_rate=ranges.above(0),
            clipping_threshold=ranges.above(0),
            factor_from=ranges.at_least(1),
            max_grad_norm=_GRAD_NORM,
        )

    def transformation(self, total_steps: int) -> optax.GradientTransformation:
        """The optax transformation of a run of `total_steps` steps."""
        rate = self.learning_rate.schedule(total_steps)
        adafactor = _each_layer_apart(
            FewPasses(rate, self.decay_rate, self.clipping_threshold, self.factor_from)
        )
        if self.max_grad_norm is None:
            return adafactor
        scaled = optax.GradientTransformation(adafactor.init, adafactor.update)  # not the sums
        return optax.chain(_scaled(self.max_grad_norm), scaled)


def decayed(params: Any) -> Any:
    """True at the leaves that weight decay shrinks: not norm scales, biases, relative positions."""

    def is_decayed(path: Any, _: Any) -> bool:
        return getattr(path[-1], "key", None) not in NOT_DECAYED

    return jax.tree_util.tree_map_with_path(is_decayed, params)


@dataclass(frozen=True)
class AdamW:
    """Adam with decoupled weight decay (Loshchilov & Hutter 2019)."""

    learning_rate: Schedule = Linear(peak=3e-4)
    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.01
    max_grad_norm: float | None = 1.0

    def __post_init__(self) -> None:
        ranges.check(
            self,
            b1=ranges.from_to_below(0, 1),
            b2=ranges.from_to_below(0, 1),
            eps=ranges.above(0),
            weight_decay=ranges.at_least(0),
            max_grad_norm=_GRAD_NORM,
        )

    def transformation(self, total_steps: int) -> optax.GradientTransformation:
        """The optax transformation of a run of `total_steps` steps."""
        adamw = optax.adamw(
            learning_rate=self.learning_rate.schedule(total_steps),
            b1=self.b1,
            b2=self.b2,
            eps=self.eps,
            weight_decay=self.weight_decay,
            mask=decayed,
        )
        if self.max_grad_norm is None:
            return adamw
        return optax.chain(_scaled(self.max_grad_norm), adamw)
