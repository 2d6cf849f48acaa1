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
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

from dgr_jax import partitioning, processes
from dgr_jax.checkpoints import Checkpoints
from dgr_jax.training import validation as validations
from dgr_jax.training.metrics import MetricsWriter, Progress, Speed, progress_line, read_jsonl
from dgr_jax.training.objectives import Objective
from dgr_jax.training.optimizers import Optimizer
from dgr_jax.training.source import Prefetch, Source
from dgr_jax.training.step import TrainState, abstract_state, init_state, make_train_step
from dgr_jax.training.validation import Standing, Validation

logger = logging.getLogger(__name__)

EXIT_PREEMPTED = processes.EXIT_STOPPED  # saved, run the same command again
IN_FLIGHT = 2  # steps that the host may be ahead of the device
_JUDGED = 20  # steps after which it is said when a loss did not fall
_CHANCE = 0.98  # share of the loss of one who knows nothing, from which on nothing was learned


def train(
    *,
    name: str,
    folder: str | Path,
    model: Any,
    objective: Objective,
    optimizer: Optimizer,
    source: Source,
    mesh: jax.sharding.Mesh,
    total_steps: int,
    seed: int = 0,
    initial_params: Any = None,
    microbatches: int = 1,
    log_every: int = 50,
    checkpoint_every: int = 500,
    keep_checkpoints: int = 2,
    rules: Any = partitioning.RULES,
    validation: Validation | None = None,
) -> TrainState:
    """Trains until `total_steps`, going on from the newest checkpoint in `folder`.

    Writes folder/checkpoints, folder/metrics.jsonl and, where installed, folder/tensorboard.

    Args:
      name: of the stage, for the progress line and errors.
      source: gives the batch of any step.
      keep_checkpoints: how many of the newest stay.
      initial_params: where step 0 starts; random by default. Not read when a checkpoint is there.
      rules: how parameters and activations are cut over the mesh, see `partitioning.LAYOUTS`.
      validation: search for held-out questions meanwhile; it may end the run early. The checkpoint
        that it chooses is the one that `checkpoints.restore_params` reads.

    Returns the last state. Raises ValueError on settings that cannot work, FloatingPointError when
    the loss is not a finite number, OSError when a checkpoint cannot be written, SystemExit(75)
    after SIGTERM and SystemExit(130) after Ctrl-C, once the state is saved.
    """
    _check(total_steps=total_steps, log_every=log_every, checkpoint_every=checkpoint_every)
    folder = Path(folder)
    transformation = optimizer.transformation(total_steps)
    saved = Checkpoints(folder / "checkpoints", keep=keep_checkpoints)
    with saved, processes.Stop(name) as stop:
        abstract = abstract_state(model, transformation, mesh, rules)
        state, position = _restore(saved, abstract, name=name, total_steps=total_steps, seed=seed)
        if state is None:
            state = init_state(
                model, transformation, mesh, seed=seed, params=initial_params, rules=rules
            )
        at_random, initial_params = initial_params is None, None  # which are large
        step = make_train_step(
            objective, model, transformation, mesh, abstract, microbatches=microbatches, rules=rules
        )
        rate = optimizer.learning_rate.schedule(total_steps)
        with _Report(name, folder, position["step"], total_steps, rate) as report:
            run = _Run(
                name, position, total_steps, log_every, checkpoint_every, saved, stop, report,
                validation, Standing.of(position),
            )  # fmt: skip
            state = run.through(step, state, functools.partial(_make_batch, source, mesh))
            report.conclude(model, at_random=at_random)
    return state


@dataclass
class _Run:
    """What is done between the steps: to log, to validate, to save and to stop.

    position: that of the newest checkpoint, or of the start; standing: of the validations so far.
    """

    name: str
    position: dict[str, Any]
    total: int
    log_every: int
    checkpoint_every: int
    saved: Checkpoints
    stop: processes.Stop
    report: _Report
    validation: Validation | None
    standing: Standing | None

    @property
    def end(self) -> int:
        """The last step; a run that ended early, and is called again, has no step left."""
        ended = self.validation is not None and self.validation.ends(self.standing)
        return self.position["step"] if ended else self.total

    def through(
        self,
        step: Callable[[TrainState, Any], tuple[TrainState, Any]],
        state: TrainState,
        make_batch: Callable[[int], Any],
    ) -> TrainState:
        """Takes all steps that are left; returns the last state."""
        begin = self.position["step"]
        with Prefetch(make_batch, begin, self.end) as batches:
            for now, batch in enumerate(batches, start=begin + 1):
                state, metrics = step(state, batch)
                self.report.add(now, metrics, batch)
                if self.ends_after(now, state):
                    break
        self._conclude()
        return state

    def ends_after(self, now: int, state: TrainState) -> bool:
        """Does what is due after a step; whether the run ends there. Raises SystemExit after a
        signal, once the state is saved."""
        last, validation = now == self.total, self.validation
        validates = validation is not None and (last or now % validation.every == 0)
        stopped = not last and self.stop.requested(now)
        saves = last or stopped or now % self.checkpoint_every == 0
        if saves or validates or now % self.log_every == 0:
            self.report.log(now)  # raises on a loss that is not finite: none is saved
        better = False
        if validation is not None and validates:
            better = self._validate(validation, now, state)
            last |= validation.ends(self.standing)
        if saves or better or last:
            self._save(now, state)
        if stopped:
            self.saved.wait()
            self.report.end_line()
            _say_stopped(self.name, now, self.stop.status)
            raise SystemExit(self.stop.status)
        return last

    def _validate(self, validation: Validation, now: int, state: TrainState) -> bool:
        """Whether this is the best student so far, and the best is to be kept."""
        standing = self.standing = validation.after(self.standing, now, state.params)
        self.report.write(now, {validations.METRIC: standing.last})
        self.report.end_line()
        logger.info(
            "%s: step %d: %s %.4f of %d questions held out of training; the best is %.4f, of step "
            "%d", self.name, now, validations.MEASURE, standing.last, validation.questions,
            standing.best, standing.best_step,
        )  # fmt: skip
        self.report.look(now)
        return validation.keeps_best and standing.best_step == now

    def _save(self, now: int, state: TrainState) -> None:
        self.position = {"step": now, "seed": self.position["seed"]}
        if self.validation is not None and self.standing is not None:
            self.position |= self.validation.position(self.standing)
        self.saved.save(now, state, self.position)

    def _conclude(self) -> None:
        """Leaves what was chosen beside the checkpoints."""
        if self.validation is None or self.standing is None:
            return
        last = self.position["step"]
        if last < self.total:
            logger.info(
                "%s: ended early at step %d of %d: %d searches in a row found no better %s",
                *(self.name, last, self.total, self.standing.since, validations.MEASURE),
            )
        if processes.first():
            report = self.validation.report(self.standing, last, self.total)
            validations.write_report(self.saved.folder.parent, report)


def _say_stopped(name: str, step: int, status: int) -> None:
    if status == EXIT_PREEMPTED:
        logger.warning("%s: SIGTERM: saved step %d, stopping", name, step)
    else:
        logger.warning(
            "%s: interrupted: saved step %d; the same command goes on from there", name, step
        )


def _restore(
    saved: Checkpoints, abstract: TrainState, *, name: str, total_steps: int, seed: int
) -> tuple[TrainState | None, dict[str, Any]]:
    """(state, position) of the newest checkpoint; (None, that of step 0) when there is none."""
    restored = saved.restore_latest(abstract)
    if restored is None:
        return None, {"step": 0, "seed": seed}
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
    return state, position


def _make_batch(source: Source, mesh: jax.sharding.Mesh, step: int) -> Any:
    """The global batch of a step, on the devices."""
    local = source.batch(step, *partitioning.batch_share(mesh))
    return partitioning.shard_batch(local, mesh)


def _check(**settings: int) -> None:
    for name, value in settings.items():
        if value < 1:
            raise ValueError(f"{name}: got {value}, expected 1 or more")


def _examples(batch: Any) -> int:
    """Examples in a batch: targets, or rows of its first feature; of a nested batch, those of all
    parts."""
    parts = [part for part in batch.values() if isinstance(part, Mapping)]
    if parts or "decoder_target_tokens" not in batch:
        return sum(map(_examples, parts)) if parts else next(iter(batch.values())).shape[0]
    return math.prod(batch["decoder_target_tokens"].shape[:-1])


class _Report:
    """Collects the steps' metrics on the device; fetches, checks and writes them when asked."""

    def __init__(
        self,
        name: str,
        folder: Path,
        begin: int,
        total: int,
        learning_rate: Callable[[int], Any],
    ) -> None:
        self._name, self._total, self._learning_rate = name, total, learning_rate
        self._window: list[tuple[int, Any]] = []
        self._first = begin + 1
        self._loss_before, self._last = _first_loss(folder) if begin else math.nan, {}
        self._examples = 0
        self._speed, self._progress = Speed(), Progress()
        self._writer = None
        if jax.process_index() == 0:
            self._writer = MetricsWriter(folder, after=begin)

    def __enter__(self) -> _Report:
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.close()
        if self._writer is not None:
            self._writer.close()

    def end_line(self) -> None:
        """Ends the line of the progress, so that what is said next has its own."""
        self._progress.close()

    def look(self, step: int) -> None:
        """Starts the clock again: what was done since the step took none of its time."""
        self._speed.look(step)

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
