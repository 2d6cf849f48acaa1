"""The folder of a stage: begun, gone on with, put aside, taken back, cleared."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import shutil
from pathlib import Path
from typing import Any

from dgr_jax.model_dir import kept
from dgr_jax.model_dir.records import (
    PREVIOUS,
    RECORD,
    SWAP,
    changed_settings,
    is_done,
    is_made_from,
    read_record,
    write_record,
)
from dgr_jax.settings import fingerprint

logger = logging.getLogger(__name__)

BEFORE = "files_before"  # in stage.json: what a damaged stage had made, while it is made again
_LEFTOVER = re.compile(r"\.partial(-\d+|\.npz|\.trec)?$|\.part$|\.old-\d+$|\.tmp(\.npy)?$")


def is_made(folder: Path, settings: Any) -> bool:
    """Whether the stage need not run: it is done, in its place or aside."""
    return is_done(folder, settings) or is_done(_aside(folder), settings)


def _aside(folder: Path) -> Path:
    """Where the output of other settings is put."""
    return folder.parent / PREVIOUS / folder.name


def damage(folder: Path, settings: Any) -> kept.Damaged | None:
    """What is wrong with the files of a stage that is done."""
    try:
        if is_done(folder, settings):
            kept.whole(folder)
    except kept.Damaged as damage:
        return damage
    return None


def begin(folder: Path, settings: Any) -> bool:
    """Whether the stage must be made. Then its folder is there, and its record says so."""
    if is_done(folder, settings) and not _cleared(folder, settings):
        logger.info("%s: done already, from the same configuration; skipped", folder.name)
        return False
    _make_room(folder, settings)
    if is_done(folder, settings) and not _cleared(folder, settings):
        logger.info("%s: taken back from an earlier run of the same configuration", folder.name)
        return False
    folder.mkdir(parents=True, exist_ok=True)
    remove_leftovers(folder.parent)
    record, mark = read_record(folder), fingerprint(settings)
    before = record.get(BEFORE, record.get(kept.KEY))  # of a stage that was damaged
    more = {BEFORE: before} if before else {}
    write_record(folder, status="running", fingerprint=mark, settings=settings, **more)
    return True


def _cleared(folder: Path, settings: Any) -> bool:
    """Whether files of a stage were damaged; then it is not done any more, and has none of them."""
    damaged = damage(folder, settings)
    if damaged is None:
        return False
    logger.warning("%s: %s; made again", folder.name, damaged.what)
    kept.clear(folder)
    write_record(folder, **{**read_record(folder), "status": "damaged"})
    return True


def remove_leftovers(model_dir: Path) -> None:
    """Removes what killed runs had half written, or half put aside, in any stage. Only for the one
    process that writes in MODEL_DIR; what else lies there is not looked into."""
    for top in model_dir.iterdir():
        if top.name.startswith(("config.gin.partial", f"{kept.MEMORY}.partial")):
            top.unlink(missing_ok=True)
        if top.name != PREVIOUS and not (top / RECORD).is_file():
            continue
        for folder, folders, files in os.walk(top):  # a study's stages are links
            for name in filter(_LEFTOVER.search, folders):
                shutil.rmtree(Path(folder) / name, ignore_errors=True)
            for name in filter(_LEFTOVER.search, files):
                (Path(folder) / name).unlink(missing_ok=True)


def _make_room(folder: Path, settings: Any) -> None:
    """Put the output of other settings aside, and take back what these settings made before."""
    record = read_record(folder)
    if is_made_from(record, settings):
        if record.get("status") == "running":
            logger.info("%s: was cut off; goes on", folder.name)
        return
    aside = _aside(folder)
    back = is_made_from(read_record(aside), settings)
    if not folder.exists():
        if back:
            aside.rename(folder)
        return
    if not record and (folder / RECORD).exists():
        logger.warning("%s: %s cannot be read; made again", folder.name, folder / RECORD)
    if record:
        names = changed_settings(record.get("settings"), settings)
        logger.info("%s: settings changed (%s); made again", folder.name, ", ".join(names[:5]))
    aside.parent.mkdir(parents=True, exist_ok=True)
    if back:  # a process that is killed between these is followed by `put_back`
        swap = aside.with_name(f"{folder.name}{SWAP}")
        folder.rename(swap)
        aside.rename(folder)
        swap.rename(aside)
    else:
        _replace(aside, folder)


def _replace(aside: Path, folder: Path) -> None:
    """Puts a folder in the place of what lies aside, which is removed: under a name of leftovers,
    so that it is never there in part."""
    old = aside.with_name(f"{aside.name}.old-{os.getpid()}")
    shutil.rmtree(old, ignore_errors=True)
    if aside.exists():
        aside.rename(old)
    folder.rename(aside)
    shutil.rmtree(old, ignore_errors=True)


def put_back(model_dir: Path) -> None:
    """Ends what a process that was killed in `_make_room` had begun: a folder that it was moving
    goes back to its place or, where that is taken, aside. One that older versions left there gives
    way to what was put aside later."""
    for swap in (model_dir / PREVIOUS).glob(f"*{SWAP}"):
        stage = swap.name.removesuffix(SWAP)
        folder, aside = model_dir / stage, swap.with_name(stage)
        with contextlib.suppress(OSError):  # a MODEL_DIR that cannot be written stays as it is
            if not folder.exists():
                swap.rename(folder)
            elif read_record(aside).get("status") != "done":
                _replace(aside, swap)
            else:
                shutil.rmtree(swap)
