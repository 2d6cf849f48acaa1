"""The training loop: restore, then step, log, save until the end.

A run can be stopped at any time and started again with the same call. SIGTERM (a preempted
machine) saves and leaves with exit code 75, "try again", and so does Ctrl-C, with 130; after
SIGKILL the last checkpoint counts.
"""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax

from dgr_jax import partitioning, processes
from dgr_jax.checkpoints import Checkpoints
from dgr_jax.training.metrics import MetricsWriter, Progress, Speed, progress_line, read_jsonl
from dgr_jax.training.source import Prefetch, Source
from dgr_jax.training.step import TrainState, abstract_state, init_state, make_train_step

logger = logging.getLogger(__name__)

EXIT_PREEMPTED = processes.EXIT_STOPPED  # saved, run the same command again
IN_FLIGHT = 2  # steps that the host may be ahead of the device
_JUDGED = 20  # steps, from which on a loss that did not fall is told
_CHANCE = 0.98  # share of the loss of one who knows nothing, from which on nothing was learned

Hook = Callable[[int, TrainState], Mapping[str, float]]


def train(
    *,
    name: str,
    folder: str | Path,
    model: Any,
    objective: Any,
    optimizer: optax.GradientTransformation,
    source: Source,
    mesh: jax.sharding.Mesh,
    total_steps: int,
    seed: int = 0,
    initial_params: Any = None,
    microbatches: int = 1,
    log_every: int = 50,
    checkpoint_every: int = 500,
    keep_checkpoints: int = 2,
    keep_best: int = 0,
    best_metric: str = "loss",
    best_is: str = "lowest",
    hooks: Sequence[Hook] = (),
    hook_every: int = 0,
    learning_rate: Callable[[int], Any] | None = None,
    rules: Any = partitioning.RULES,
    tensorboard: bool = True,
) -> TrainState:
    """Trains until `total_steps`, going on from the newest checkpoint in `folder`.

    Writes folder/checkpoints, folder/metrics.jsonl and, where installed, folder/tensorboard.

    Args:
      name: of the stage, for the progress line and errors.
      objective: see `objectives`; optimizer: see `optimizers`, `.transformation(total_steps)`.
      source: gives the batch of any step.
      keep_checkpoints: how many of the newest stay; keep_best: how many of the best beside them, by
        `best_metric`, one of the metrics or of the hooks', of which the best `best_is` 'lowest' or
        'highest'. Found again by `checkpoints.best_step`.
      initial_params: where step 0 starts; random by default. Not read when a checkpoint is there.
      hooks: called as hook(step, state) every `hook_every` steps and at the end (0: at the end
        only); what they return joins the metrics. The state dies in the next step: keep no
        reference to it.
      learning_rate: schedule to log beside the metrics.
      rules: how parameters and activations are cut over the mesh, see `partitioning.LAYOUTS`.

    Returns the last state. Raises ValueError on settings that cannot work, FloatingPointError when
    the loss is not a finite number, OSError when a checkpoint cannot be written, SystemExit(75)
    after SIGTERM and SystemExit(130) after Ctrl-C, once the state is saved.
    """
    _check(total_steps=total_steps, log_every=log_every, checkpoint_every=checkpoint_every)
    folder = Path(folder)
    saved = Checkpoints(
        folder / "checkpoints", keep=keep_checkpoints, keep_best=keep_best, best_is=best_is
    )
    with saved, processes.Stop(name) as stop:
        abstract = abstract_state(model, optimizer, mesh, rules)
        begin, state = _restore(saved, abstract, name=name, total_steps=total_steps, seed=seed)
        if state is None:
            state = init_state(
                model, optimizer, mesh, seed=seed, params=initial_params, rules=rules
            )
        at_random = initial_params is None
        del initial_params
        step = make_train_step(
            objective, model, optimizer, mesh, abstract, microbatches=microbatches, rules=rules
        )
        make = functools.partial(_make_batch, source, mesh)
        with (
            _Report(name, folder, begin, total_steps, learning_rate, tensorboard) as report,
            Prefetch(make, begin, total_steps) as batches,
        ):
            for now, batch in enumerate(batches, start=begin + 1):
                state, metrics = step(state, batch)
                report.add(now, metrics, batch)
                last = now == total_steps
                stopped = not last and stop.requested(now)
                saves = last or stopped or now % checkpoint_every == 0
                found: dict[str, float] = {}
                if saves or now % log_every == 0:
                    found |= report.log(now)  # raises on a loss that is not finite: none is saved
                if last or (hook_every and now % hook_every == 0):
                    for hook in hooks:
                        values = hook(now, state)
                        report.write(now, values)
                        found |= values
                if saves:
                    if keep_best and not stopped:
                        _check_metric(best_metric, found, now)
                    position = {"step": now, "seed": seed}
                    saved.save(now, state, position, metric=found.get(best_metric))
                if stopped:
                    saved.wait()
                    report.end_line()
                    _say_stopped(name, now, stop.status)
                    raise SystemExit(stop.status)
            report.conclude(model, at_random=at_random)
    return state


def _say_stopped(name: str, step: int, status: int) -> None:
    if status == EXIT_PREEMPTED:
        logger.warning("%s: SIGTERM: saved step %d, stopping", name, step)
    else:
        logger.warning(
            "%s: interrupted: saved step %d; the same command goes on from there", name, step
        )


def _restore(
    saved: Checkpoints, abstract: TrainState, *, name: str, total_steps: int, seed: int
) -> tuple[int, TrainState | None]:
    """(steps done, state) of the newest checkpoint; (0, None) when there is none."""
    restored = saved.restore_latest(abstract)
    if restored is None:
        return 0, None
    state, position = restored
    begin, other = position["step"], "or give another folder (MODEL_DIR)"
    if position["seed"] != seed:
        raise ValueError(
            f"seed: got {seed}, expected {position['seed']}, that of the checkpoint: batches would "
            f"come in another order; set it back {other}"
        )
    if begin > total_steps:
        raise ValueError(
            f"total_steps: got {total_steps}, expected {begin} or more, the step of the newest "
            f"checkpoint; set it back {other}"
        )
    logger.info("%s: goes on from step %d of %d", name, begin, total_steps)
    return begin, state


def _make_batch(source: Source, mesh: jax.sharding.Mesh, step: int) -> Any:
    """The global batch of a step, on the devices."""
    local = source.batch(step, *partitioning.batch_share(mesh))
    return partitioning.shard_batch(local, mesh)


def _check(**settings: int) -> None:
    for name, value in settings.items():
        if value < 1:
            raise ValueError(f"{name}: got {value}, expected 1 or more")


def _check_metric(name: str, found: Mapping[str, float], step: int) -> None:
    if name not in found:
        raise ValueError(
            f"best_metric: got {name!r}, expected one of those at step {step}, {sorted(found)}; a "
            "hook's are there when hook_every divides checkpoint_every"
        )


def _examples(batch: Any) -> int:
    """Examples in a batch: rows of its first feature; of a nested batch, those of all parts."""
    parts = [part for part in batch.values() if isinstance(part, Mapping)]
    return sum(map(_examples, parts)) if parts else next(iter(batch.values())).shape[0]


class _Report:
    """Collects the steps' metrics on the device; fetches, checks and writes them when asked."""

    def __init__(
        self,
        name: str,
        folder: Path,
        begin: int,
        total: int,
        learning_rate: Callable[[int], Any] | None,
        tensorboard: bool,
    ) -> None:
        self._name, self._total, self._learning_rate = name, total, learning_rate
        self._window: list[tuple[int, Any]] = []
        self._first = begin + 1
        self._loss_before, self._last = _first_loss(folder) if begin else math.nan, {}
        self._examples = 0
        self._speed, self._progress = Speed(), Progress()
        self._writer = None
        if jax.process_index() == 0:
            self._writer = MetricsWriter(folder, after=begin, tensorboard=tensorboard)

    def __enter__(self) -> _Report:
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.close()
        if self._writer is not None:
            self._writer.close()

    def end_line(self) -> None:
        """Ends the line of the progress, so that what is said next has its own."""
        self._progress.close()

    def add(self, step: int, metrics: Any, batch: Any) -> None:
        """Keeps a step's metrics; waits only for the step before the last few."""
        self._window.append((step, metrics))
        self._examples = _examples(batch)
        if step == self._first:  # compiled now: the clock starts here
            jax.block_until_ready(metrics)
            self._speed.look(step)
        elif len(self._window) > IN_FLIGHT:
            jax.block_until_ready(self._window[-1 - IN_FLIGHT][1])

    def log(self, step: int) -> dict[str, float]:
        """Writes and returns the means of the steps since the last call; raises on a loss not
        finite."""
        if not self._window:
            return {}
        window = jax.device_get(self._window)
        self._window = []
        for at, metrics in window:
            self._check_finite(at, metrics)
        seconds = self._speed.look(step)
        values = self._last = _means([metrics for _, metrics in window])
        if math.isnan(self._loss_before):
            self._loss_before = _means([window[0][1]]).get("loss", math.nan)
        rate = self._examples / seconds if seconds else math.nan
        values["examples_per_second"] = rate
        if self._learning_rate is not None:
            values["learning_rate"] = float(self._learning_rate(step - 1))
        self.write(step, values)
        if self._writer is not None:
            left = 0.0 if math.isnan(seconds) else seconds * (self._total - step)
            self._progress.show(
                progress_line(self._name, step, self._total, values["loss"], rate, left)
            )
        return values

    def conclude(self, model: Any, *, at_random: bool) -> None:
        """Warns where nothing was learned: the loss of the last steps is not below that of the
        first, or not below that of one who takes all tokens for equally likely.

        at_random: how the parameters began. Others may start near the best that there is: their
        loss must have grown by half.
        """
        last, before = self._last.get("loss", math.nan), self._loss_before
        if self._total < _JUDGED or math.isnan(last) or jax.process_index():
            return
        advice = (
            "; look at the learning rate (its `peak`), which may be too high, at the number of "
            "steps, and at what is learned from"
        )
        tokens = _token_loss(self._last)
        size = getattr(getattr(model, "config", None), "vocab_size", 0) or 1
        if tokens is not None and tokens >= _CHANCE * math.log(size) > 0:
            logger.warning(
                "%s: a token costs %.4g in the end, as one of %d that are all equally likely "
                "(%.4g): nothing was learned%s",
                *(self._name, tokens, size, math.log(size), advice),
            )
        elif last >= before * (1 if at_random else 1.5):
            logger.warning(
                "%s: the loss is %.4g in the end and was %.4g at the start: it did not fall%s",
                *(self._name, last, before, advice),
            )

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """One row of metrics; none if there are no values."""
        if values and self._writer is not None:
            self._writer.write(step, values)

    def _check_finite(self, step: int, metrics: Any) -> None:
        for name in ("loss", "grad_norm"):
            total, _ = metrics[name]
            if not np.isfinite(total):
                raise FloatingPointError(
                    f"{self._name}: {name} is {float(total)} at step {step}; lower the learning "
                    f"rate (its `peak`) or clip gradients (`max_grad_norm`), and look for examples "
                    f"without targets; the last checkpoint is from before"
                )


def _first_loss(folder: Path) -> float:
    """The first loss that an earlier part of this run wrote; NaN where there is none."""
    path = folder / "metrics.jsonl"
    rows = read_jsonl(path) if path.is_file() else []
    return next((row["loss"] for row in rows if row.get("loss") is not None), math.nan)


def _token_loss(metrics: Mapping[str, float]) -> float | None:
    """The cross entropy of tokens among the metrics, where an objective has one."""
    if "generation_loss" in metrics:
        return metrics["generation_loss"]
    alone = "token_accuracy" in metrics and "rank_loss" not in metrics
    return metrics.get("loss") if alone else None


def _means(window: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Sum over steps of each metric's sums divided by that of its weights; weightless: left out."""
    means = {}
    for name in window[0]:
        total = sum(float(metrics[name][0]) for metrics in window)
        weight = sum(float(metrics[name][1]) for metrics in window)
        if weight:
            means[name] = total / weight
    return means
