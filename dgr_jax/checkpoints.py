"""Checkpoints of a training run, its state and the position in its data, through orbax.

A folder holds one sub-folder for each step, with three items: `params` (which search needs),
`training` (the rest of the state) and `position` (JSON: how far the data was read, and which
checkpoint is the best). A step's folder gets its name when it is whole, so that a killed process
leaves none half written. Then it gets a files_made.json (see `dgr_jax.model_dir.kept`). A folder
that lacks it, because the process was killed in between, is read all the same.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import shutil
import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from dgr_jax.array_trees import NotFinite, check_finite, check_shapes
from dgr_jax.model_dir import kept
from dgr_jax.saved_params import BEST, first_line, read_unlisted, reading, restore_params

__all__ = ["BEST", "Checkpoints", "restore_params"]

logger = logging.getLogger(__name__)


@dataclass
class _NewestAndBest(ocp.checkpoint_managers.PreservationPolicy):
    """Keeps the newest checkpoints, `newest` of them, and the best one, once it is known."""

    newest: int
    best: int | None = None

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> Sequence[bool]:
        older = max(0, len(checkpoints) - self.newest)
        return [i >= older or c.step == self.best for i, c in enumerate(checkpoints)]


class Checkpoints:
    """The checkpoints of one folder. Use as a context manager: leaving waits for the last save."""

    def __init__(self, folder: str | Path, *, keep: int = 2) -> None:
        """Args:
        folder: created if it is absent.
        keep: how many of the newest stay; with 2 or more, training survives a damaged newest one.
        """
        if keep < 1:
            raise ValueError(f"keep_checkpoints: got {keep}, expected 1 or more")
        self.folder = Path(folder).absolute()
        self._preserved = _NewestAndBest(keep)
        self._writes: int | None = None  # the step whose save was begun last
        self._signer: threading.Thread | None = None
        self._written = threading.Event()
        self._manager = self._open()

    def _open(self) -> ocp.CheckpointManager:
        return ocp.CheckpointManager(
            self.folder,
            options=ocp.CheckpointManagerOptions(
                preservation_policy=self._preserved, cleanup_tmp_directories=True
            ),
            item_handlers=_handlers(),
        )

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Waits for a running save, then frees the threads. Raises OSError as `save` does."""
        with self._writing(), self._signing():
            self._manager.close()

    def wait(self) -> None:
        """Returns when the last save is on disk. Raises OSError as `save` does."""
        with self._writing(), self._signing():
            self._manager.wait_until_finished()

    @contextlib.contextmanager
    def _signing(self) -> Iterator[None]:
        """Waits for the last save; after the block, its checkpoint has a manifest."""
        try:
            yield
        finally:
            if self._signer is not None:
                self._written.set()
                self._signer.join()
                self._signer = None

    def _sign(self, step: int) -> None:
        """Gives a step's folder its manifest as soon as it is whole, while training goes on."""
        folder = self.folder / str(step)
        while not folder.is_dir() and not self._written.wait(0.05):
            pass
        try:
            if folder.is_dir():
                kept.write_manifest(folder)
        except OSError as error:
            logger.warning("checkpoint %s has no manifest (%s)", folder, first_line(error))

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        """Adds to an error which checkpoint failed, and which ones exist; a write's error may come
        with the next save."""
        try:
            yield
        except (OSError, ValueError, RuntimeError) as error:  # ValueError: from tensorstore
            raise OSError(
                f"checkpoint {self.folder / str(self._writes)} could not be written "
                f"({first_line(error)}): is the disk full, or not writable? {self._left()}"
            ) from error

    def _check_room(self, state: Any) -> None:
        """Raises OSError where a write would fail. Orbax's threads, and so the process, would run
        on for minutes after such a failure."""
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

    def save(self, step: int, state: Any, position: Mapping[str, Any]) -> None:
        """Copies the state to the host, then writes it while the caller goes on.

        Args:
          state: a dataclass with a field `params`.
          position: how far the data was read at this step, as JSON. It may hold BEST, the step
            whose parameters are used: its checkpoint stays beside the newest.

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
        self.wait()
        self._preserved.best = position.get(BEST)
        with self._writing():
            self._writes = step
            self._check_room(state)
            self._manager.save(step, args=items)
        if jax.process_index() == 0:
            self._written.clear()
            self._signer = threading.Thread(target=self._sign, args=(step,), daemon=True)
            self._signer.start()

    def restore_latest(self, abstract: Any) -> tuple[Any, dict[str, Any]] | None:
        """The newest whole state and its data position; None when the folder has no checkpoint.

        A checkpoint that cannot be read, or whose BEST is gone, is renamed to `<step>.damaged`,
        with a warning, when an older one can be used.

        Args:
          abstract: the state as `jax.ShapeDtypeStruct` with shardings.

        Raises ValueError when the model's shapes differ, naming both, and when no checkpoint is
        readable.
        """
        damaged: dict[int, Exception] = {}
        for step in sorted(self._manager.all_steps(), reverse=True):
            try:
                restored = self._restore(step, abstract)
            except (kept.Damaged, NotFinite) as error:
                damaged[step] = error
                if jax.process_count() > 1:  # other processes may be able to read it
                    raise _unreadable(self.folder, damaged) from error
                continue
            self._set_aside(damaged)
            return restored
        if damaged:
            raise _unreadable(self.folder, damaged)
        return None

    def _restore(self, step: int, abstract: Any) -> tuple[Any, dict[str, Any]]:
        """Raises kept.Damaged where a checkpoint cannot be read."""
        folder, rest = self.folder / str(step), abstract.replace(params=None)
        kept.whole(folder)
        with reading(folder):
            for item in ("params", "training"):
                read_unlisted(folder / item)
            metadata = self._manager.item_metadata(step)
            there = metadata["params"].tree, metadata["training"].tree
        check_shapes(there[0], abstract.params, f"checkpoint {folder}")
        check_shapes(there[1], rest, f"checkpoint {folder}")
        with reading(folder):
            items = self._manager.restore(
                step,
                args=ocp.args.Composite(
                    params=ocp.args.StandardRestore(abstract.params),
                    training=ocp.args.StandardRestore(rest),
                    position=ocp.args.JsonRestore(),
                ),
            )
        check_finite(items["params"], f"checkpoint {folder}")
        best = items["position"].get(BEST, step)
        if best not in self._manager.all_steps():
            raise kept.Damaged(folder, f"the best checkpoint before it, of step {best}, is gone")
        return items["training"].replace(params=items["params"]), items["position"]

    def _set_aside(self, damaged: Mapping[int, Exception]) -> None:
        if not damaged:
            return
        if jax.process_count() > 1:
            raise _unreadable(self.folder, damaged)
        self._manager.close()
        for step, error in damaged.items():
            folder = self.folder / str(step)
            aside = kept.set_aside(folder)
            logger.warning(
                "checkpoint %s cannot be read (%s): set aside as %s, an older one is used",
                folder,
                first_line(error),
                aside.name,
            )
        self._manager = self._open()


def _handlers() -> dict[str, Any]:
    return {
        "params": ocp.StandardCheckpointHandler(),
        "training": ocp.StandardCheckpointHandler(),
        "position": ocp.JsonCheckpointHandler(),
    }


def _unreadable(folder: Path, damaged: Mapping[int, Exception]) -> ValueError:
    reasons = ", ".join(f"{step} ({first_line(error)})" for step, error in damaged.items())
    return ValueError(
        f"checkpoints in {folder}: cannot read step {reasons}; remove these folders to go on "
        f"without them"
    )
