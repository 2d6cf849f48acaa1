"""Checkpoints of a training run: state and data position, through orbax.

A folder holds one sub-folder a step with three items: `params` (what search needs), `training` (the
rest of the state) and `position` (JSON: where the data stands); a fourth, `metrics`, where the best
are kept. A step's folder gets its name when it is whole, so a killed process leaves none half
written.
"""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

logger = logging.getLogger(__name__)


def _named_leaves(tree: Any) -> dict[str, Any]:
    """Leaves by path; lists and tuples, dicts and dataclasses of the same names are alike."""

    def name(key: Any) -> str:
        for attribute in ("key", "name", "idx"):
            if hasattr(key, attribute):
                return str(getattr(key, attribute))
        return str(key)

    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {"/".join(name(key) for key in path): leaf for path, leaf in leaves}


def check_shapes(got: Any, expected: Any, where: str) -> None:
    """Raises ValueError at the first leaf whose name or shape differs between the trees."""
    got, expected = _named_leaves(got), _named_leaves(expected)
    advice = "set the model and optimizer back, or give another folder (MODEL_DIR)"
    for name in expected:
        if name not in got:
            raise ValueError(f"{where}: {name} is missing; {advice}")
        if tuple(got[name].shape) != tuple(expected[name].shape):
            raise ValueError(
                f"{where}: {name}: got shape {tuple(got[name].shape)}, expected "
                f"{tuple(expected[name].shape)}, that of the configured model; {advice}"
            )
    extra = [name for name in got if name not in expected]
    if extra:
        raise ValueError(f"{where}: {extra[0]} is not part of the configured model; {advice}")


class Checkpoints:
    """The checkpoints of one folder. Use as a context manager: leaving waits for the last save."""

    def __init__(
        self, folder: str | Path, *, keep: int = 2, keep_best: int = 0, best_is: str = "lowest"
    ) -> None:
        """Args:
        folder: made if absent.
        keep: how many of the newest stay; 2 or more survive a damaged newest.
        keep_best: how many stay beside them, those of the best metric.
        best_is: 'lowest' or 'highest'.
        """
        if keep < 1:
            raise ValueError(f"keep_checkpoints: got {keep}, expected 1 or more")
        if keep_best < 0:
            raise ValueError(f"keep_best: got {keep_best}, expected 0 or more")
        if best_is not in ("lowest", "highest"):
            raise ValueError(f"best_is: got {best_is!r}, expected 'lowest' or 'highest'")
        self.folder = Path(folder).absolute()
        self._keep, self._keep_best, self._best_is = keep, keep_best, best_is
        self._writes: int | None = None  # the step whose save was begun last
        self._manager = self._open()

    def _open(self) -> ocp.CheckpointManager:
        policies = ocp.checkpoint_managers
        newest = policies.LatestN(self._keep)
        best = policies.BestN(
            get_metric_fn=_metric,
            reverse=self._best_is == "lowest",
            n=self._keep_best,
            keep_checkpoints_without_metrics=False,
        )
        return ocp.CheckpointManager(
            self.folder,
            options=ocp.CheckpointManagerOptions(
                preservation_policy=policies.AnyPreservationPolicy([newest, best]),
                best_fn=_metric if self._keep_best else None,  # else none are written
                cleanup_tmp_directories=True,
            ),
            item_handlers=_handlers(),
        )

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Waits for a running save, then frees the threads. Raises OSError as `save` does."""
        with self._writing():
            self._manager.close()

    def wait(self) -> None:
        """Returns when the last save is on disk. Raises OSError as `save` does."""
        with self._writing():
            self._manager.wait_until_finished()

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        """Says what failed, and what is left: a write's error may come with the next save."""
        try:
            yield
        except (OSError, ValueError, RuntimeError) as error:  # ValueError: from tensorstore
            raise OSError(
                f"checkpoint {self.folder / str(self._writes)} could not be written "
                f"({_first_line(error)}): is the disk full, or not writable? {self._left()}"
            ) from error

    def _check_room(self, state: Any) -> None:
        """Raises OSError where a write would fail: orbax's threads outlive one by minutes, and the
        process with them."""
        with tempfile.TemporaryFile(dir=self.folder):
            pass
        free = shutil.disk_usage(self.folder).free
        needed = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
        if free < needed:
            said = os.strerror(errno.ENOSPC)
            raise OSError(errno.ENOSPC, f"{said}: {free} bytes are free, {needed} needed")

    def _left(self) -> str:
        try:
            os.listdir(self.folder)
        except OSError:
            return "What is in the folder cannot be read either"
        steps = ocp.utils.checkpoint_steps(self.folder)
        if not steps:
            return "There is none before it; run the same command once that is mended"
        return (
            f"The last whole one is of step {max(steps)}; once that is mended, the same command "
            "goes on from there"
        )

    def latest(self) -> int | None:
        """The newest step, or None."""
        return self._manager.latest_step()

    def best(self) -> int | None:
        """The step of the best metric of those that are kept; None where none has one."""
        return best_step(self.folder, best_is=self._best_is)

    def save(
        self, step: int, state: Any, position: Mapping[str, Any], *, metric: float | None = None
    ) -> None:
        """Copies the state to the host, then writes it while the caller goes on.

        Args:
          state: a dataclass with a field `params`.
          position: JSON: where the data stands at this step.
          metric: what `keep_best` compares; without, the checkpoint is none of the best.

        Raises OSError when this or the save before it cannot be written (a full disk, a lost
        permission); the checkpoints before it stay as they are.
        """
        if step in self._manager.all_steps():
            return
        items = ocp.args.Composite(
            params=ocp.args.StandardSave(state.params),
            training=ocp.args.StandardSave(state.replace(params=None)),
            position=ocp.args.JsonSave(dict(position)),
        )
        metrics = None if metric is None or not self._keep_best else {"best": float(metric)}
        with self._writing():
            self._manager.wait_until_finished()
            self._writes = step
            self._check_room(state)
            self._manager.save(step, args=items, metrics=metrics)

    def restore_latest(self, abstract: Any) -> tuple[Any, dict[str, Any]] | None:
        """The newest whole state and its data position; None when the folder has none.

        A checkpoint that cannot be read is set aside as `<step>.damaged` with a warning when an
        older one can be.

        Args:
          abstract: the state as `jax.ShapeDtypeStruct` with shardings.

        Raises ValueError when the model's shapes differ, naming both, and when no checkpoint is
        readable.
        """
        damaged: dict[int, Exception] = {}
        for step in sorted(self._manager.all_steps(), reverse=True):
            where = f"checkpoint {self.folder / str(step)}"
            try:
                metadata = self._manager.item_metadata(step)
                params, rest = metadata["params"].tree, metadata["training"].tree
            except _DAMAGE as error:
                damaged[step] = error
                continue
            check_shapes(params, abstract.params, where)
            check_shapes(rest, abstract.replace(params=None), where)
            try:
                restored = self._restore(step, abstract)
            except _DAMAGE as error:
                damaged[step] = error
                continue
            self._set_aside(damaged)
            return restored
        if damaged:
            raise _unreadable(self.folder, damaged)
        return None

    def _restore(self, step: int, abstract: Any) -> tuple[Any, dict[str, Any]]:
        items = self._manager.restore(
            step,
            args=ocp.args.Composite(
                params=ocp.args.StandardRestore(abstract.params),
                training=ocp.args.StandardRestore(abstract.replace(params=None)),
                position=ocp.args.JsonRestore(),
            ),
        )
        return items["training"].replace(params=items["params"]), items["position"]

    def _set_aside(self, damaged: Mapping[int, Exception]) -> None:
        if not damaged:
            return
        if jax.process_count() > 1:
            raise _unreadable(self.folder, damaged)
        self._manager.close()
        for step, error in damaged.items():
            folder = self.folder / str(step)
            aside = _free_name(self.folder / f"{step}.damaged")
            logger.warning(
                "checkpoint %s cannot be read (%s): set aside as %s, an older one is used",
                folder,
                _first_line(error),
                aside.name,
            )
            folder.rename(aside)
        self._manager = self._open()


# What reading a truncated or missing file raises. Not MemoryError, not the device's own errors.
_DAMAGE = (ValueError, OSError, KeyError, TypeError, AttributeError)


def _metric(metrics: Mapping[str, float]) -> float:
    return metrics["best"]


def best_step(folder: str | Path, *, best_is: str = "lowest") -> int | None:
    """The step of the best metric among the checkpoints of a folder; None where none has one."""
    folder = Path(folder).absolute()
    metrics = {}
    for step in ocp.utils.checkpoint_steps(folder) if folder.is_dir() else []:
        file = folder / str(step) / "metrics" / "metrics"
        if file.is_file():
            metrics[step] = _metric(json.loads(file.read_text(encoding="utf-8")))
    if not metrics:
        return None
    sign = -1 if best_is == "lowest" else 1
    return max(metrics, key=lambda step: (sign * metrics[step], step))


def _handlers() -> dict[str, Any]:
    return {
        "params": ocp.StandardCheckpointHandler(),
        "training": ocp.StandardCheckpointHandler(),
        "position": ocp.JsonCheckpointHandler(),
    }


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}"


def _free_name(path: Path) -> Path:
    taken = 1
    free = path
    while free.exists():
        taken += 1
        free = path.with_name(f"{path.name}.{taken}")
    return free


def _unreadable(folder: Path, damaged: Mapping[int, Exception]) -> ValueError:
    found = ", ".join(f"{step} ({_first_line(error)})" for step, error in damaged.items())
    return ValueError(
        f"checkpoints in {folder}: cannot read step {found}; remove these folders to go on "
        f"without them"
    )


def restore_params(folder: str | Path, abstract: Any, *, step: int | None = None) -> Any:
    """The parameters alone, for search or as the start of another stage.

    Args:
      folder: a folder of checkpoints; nothing in it is changed.
      abstract: parameters as `jax.ShapeDtypeStruct` with shardings.
      step: which; the newest by default.

    Raises FileNotFoundError when there is no checkpoint, ValueError when the model's shapes differ.
    """
    folder = Path(folder).absolute()
    steps = ocp.utils.checkpoint_steps(folder) if folder.is_dir() else []
    if not steps or (step is not None and step not in steps):
        wanted = "a checkpoint" if step is None else f"step {step}, found {sorted(steps)}"
        raise FileNotFoundError(f"{folder}: expected {wanted}; has the stage been trained?")
    path = folder / str(max(steps) if step is None else step) / "params"
    # The handler reads the item's own metadata; a checkpointer would look for a step's there.
    found = ocp.StandardCheckpointHandler().metadata(path).tree
    check_shapes(found, abstract, f"checkpoint {path.parent}")
    with ocp.StandardCheckpointer() as checkpointer:
        return checkpointer.restore(path, abstract)
