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
import gc
import logging
import os
import shutil
import sys
import tempfile
import threading
import traceback
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
import tensorstore

from dgr_jax.array_trees import NotFinite, check_finite, check_shapes
from dgr_jax.model_dir import kept

logger = logging.getLogger(__name__)

BEST = "best_checkpoint"  # the key, in a position, of the step whose parameters are used


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
            logger.warning("checkpoint %s has no manifest (%s)", folder, _first_line(error))

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        """Adds to an error which checkpoint failed, and which ones exist; a write's error may come
        with the next save."""
        try:
            yield
        except (OSError, ValueError, RuntimeError) as error:  # ValueError: from tensorstore
            raise OSError(
                f"checkpoint {self.folder / str(self._writes)} could not be written "
                f"({_first_line(error)}): is the disk full, or not writable? {self._left()}"
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
        with _reading(folder):
            for item in ("params", "training"):
                _read_unlisted(folder / item)
            metadata = self._manager.item_metadata(step)
            there = metadata["params"].tree, metadata["training"].tree
        check_shapes(there[0], abstract.params, f"checkpoint {folder}")
        check_shapes(there[1], rest, f"checkpoint {folder}")
        with _reading(folder):
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
                _first_line(error),
                aside.name,
            )
        self._manager = self._open()


_DAMAGE = (OSError, *kept.UNREADABLE)


@contextlib.contextmanager
def _reading(folder: Path) -> Iterator[None]:
    """Raises kept.Damaged in place of the errors of reading a truncated, changed or missing file.

    MemoryError and errors of the device stay as they are.
    """
    try:
        yield
    except kept.Damaged:
        raise
    except Exception as error:
        root = error
        while type(root) is Exception and root.__cause__ is not None:  # tensorstore's, from orbax
            root = root.__cause__
        if isinstance(root, jax.errors.JaxRuntimeError) or not isinstance(root, _DAMAGE):
            raise
        said = _first_line(root)[:200]
        damage = kept.Damaged(folder, f"cannot be read ({said}); truncated or damaged")
        _forget_reads(error)
    else:
        return
    raise damage


def _read_unlisted(item: Path) -> None:
    """Reads the arrays of an item one by one where no list vouches for the files of its checkpoint.

    Orbax reads them side by side. Where one cannot be read, the reads under way find their event
    loop closed, which can end the process.
    """
    if (item.parent / kept.MANIFEST).is_file() or not (item / "manifest.ocdbt").is_file():
        return
    store = {"driver": "ocdbt", "base": f"file://{item}/"}
    for key in tensorstore.KvStore.open(store).result().list().result():
        name, _, file = key.decode().rpartition("/")
        if file == ".zarray":
            array = {"driver": "zarr", "kvstore": store | {"path": f"{name}/"}}
            tensorstore.open(array, read=True).result().read().result()


def _forget_reads(error: BaseException) -> None:
    """Frees the other reads that failed or wait beside that of the error.

    Otherwise asyncio would log each of them at length, and Python would report those that raise
    when they are destroyed, until the end of the process.
    """
    asyncio_logger = logging.getLogger("asyncio")
    if _is_logged not in asyncio_logger.filters:
        asyncio_logger.addFilter(_is_logged)
    hook, sys.unraisablehook = sys.unraisablehook, lambda _: None
    try:
        while error is not None:
            traceback.clear_frames(error.__traceback__)
            error.__traceback__ = None
            error = error.__cause__ or error.__context__
        gc.collect()
    finally:
        sys.unraisablehook = hook


def _is_logged(record: logging.LogRecord) -> bool:
    return "exception was never retrieved" not in record.getMessage()


def _chosen(folder: Path, newest: int) -> int:
    """The step whose parameters are used: the one that the newest checkpoint names as the best, or
    else the newest."""
    file = folder / str(newest) / "position" / "metadata"
    return kept.read_json(file).get(BEST, newest) if file.is_file() else newest


def _handlers() -> dict[str, Any]:
    return {
        "params": ocp.StandardCheckpointHandler(),
        "training": ocp.StandardCheckpointHandler(),
        "position": ocp.JsonCheckpointHandler(),
    }


def _first_line(error: Exception) -> str:
    if isinstance(error, kept.Damaged):
        return error.what
    if isinstance(error, NotFinite):
        return str(error)
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}"


def _unreadable(folder: Path, damaged: Mapping[int, Exception]) -> ValueError:
    reasons = ", ".join(f"{step} ({_first_line(error)})" for step, error in damaged.items())
    return ValueError(
        f"checkpoints in {folder}: cannot read step {reasons}; remove these folders to go on "
        f"without them"
    )


def restore_params(folder: str | Path, abstract: Any, *, step: int | None = None) -> Any:
    """The parameters of a checkpoint alone, for search or as the start of another stage.

    Args:
      folder: a folder of checkpoints; nothing in it is changed.
      abstract: parameters as `jax.ShapeDtypeStruct` with shardings.
      step: the step to read; by default the best, where the run kept it, and else the newest.

    Raises FileNotFoundError when there is no checkpoint, ValueError when the model's shapes differ,
    kept.Damaged when a file of the checkpoint was changed since it was written or cannot be read.
    """
    folder = Path(folder).absolute()
    steps = sorted(ocp.utils.checkpoint_steps(folder)) if folder.is_dir() else []
    # A finished stage lists its checkpoints. If the newest of them is lost, none older replaces it.
    listed = {name.partition("/")[0] for name in kept.listed_in(folder)}
    steps = sorted(int(name) for name in listed if name.isdecimal()) or steps
    if step is None and steps:
        step = _chosen(folder, steps[-1])
    if step not in steps:
        wanted = "a checkpoint" if step is None else f"step {step}, found {steps}"
        raise FileNotFoundError(f"{folder}: expected {wanted}; has the stage been trained?")
    path = folder / str(step) / "params"
    kept.opened(path.parent / kept.MANIFEST)
    kept.whole(path)
    where = f"checkpoint {path.parent}"
    with _reading(path):
        _read_unlisted(path)
        # The handler reads the item's own metadata; a checkpointer would look for a step's there.
        there = ocp.StandardCheckpointHandler().metadata(path).tree
    check_shapes(there, abstract, where)
    try:
        params = _restored(path, abstract)
    except kept.Damaged:
        # Its hashes are right, so that a read may have been cut short.
        params = _restored(path, abstract)
    check_finite(params, where)
    return params


def _restored(path: Path, abstract: Any) -> Any:
    """The parameters of an item. Raises kept.Damaged where they cannot be read."""
    with _reading(path), ocp.StandardCheckpointer() as checkpointer:
        return checkpointer.restore(path, abstract)
