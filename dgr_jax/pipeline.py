"""Runs the stages of an experiment in order, skips what is done, and resumes what was cut off.

Each stage has a folder in MODEL_DIR with a stage.json: what it was asked to do (with everything
before it), a fingerprint of that, and whether it was finished. A stage whose settings changed starts
again; what it had made is kept aside in MODEL_DIR/previous until the next change, and is taken back
when the settings are.
"""

from __future__ import annotations

import json
import logging
import shutil
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from dgr_jax import experiment as experiments
from dgr_jax.experiment import Experiment, fingerprint, stage_settings

logger = logging.getLogger(__name__)

RECORD = "stage.json"


def read_record(folder: Path) -> dict[str, Any]:
    """stage.json of a folder, {} when it has none or an unreadable one."""
    try:
        return json.loads((folder / RECORD).read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError, json.JSONDecodeError):
        return {}


def write_record(folder: Path, **values: Any) -> None:
    """Replace stage.json whole."""
    temporary = folder / f"{RECORD}.partial"
    temporary.write_text(json.dumps(values, indent=1, sort_keys=True), encoding="utf-8")
    temporary.replace(folder / RECORD)


def is_done(folder: Path, settings: Any) -> bool:
    """Whether the folder holds the finished output of these settings."""
    record = read_record(folder)
    return record.get("status") == "done" and record.get("fingerprint") == fingerprint(settings)


def changed_settings(old: Any, new: Any, at: str = "") -> list[str]:
    """Names of the settings that differ, as paths such as 'prepare.sources.labelled'."""
    if not (isinstance(old, dict) and isinstance(new, dict)):
        return [] if old == new else [at]
    found = []
    for key in sorted(old.keys() | new.keys()):
        path = f"{at}.{key}" if at else key
        found += changed_settings(old.get(key), new.get(key), path)
    return found


def run(
    experiment: Experiment,
    makers: dict[str, Callable[[Experiment, Path], None]],
    stages: Iterable[str] = experiments.STAGES,
) -> None:
    """Run `stages` and every stage that they read, in order.

    makers: stage -> function(experiment, folder) that makes the stage's output, or completes what
    an earlier call with the same settings began.
    """
    wanted = _with_upstream(experiment, stages)
    for stage in experiments.STAGES:
        if stage in wanted:
            _run_stage(experiment, stage, makers[stage])


def _with_upstream(experiment: Experiment, stages: Iterable[str]) -> set[str]:
    wanted: set[str] = set()
    pending = list(stages)
    while pending:
        stage = pending.pop()
        if stage not in experiments.STAGES:
            raise ValueError(f"unknown stage {stage!r}, expected one of {experiments.STAGES}")
        if stage not in wanted:
            wanted.add(stage)
            pending += experiments.UPSTREAM[stage]
    if not experiment.control:
        wanted.discard("control")
    return wanted


def _run_stage(
    experiment: Experiment, stage: str, make: Callable[[Experiment, Path], None]
) -> None:
    folder = Path(experiment.model_dir) / stage
    settings = stage_settings(experiment, stage)
    if is_done(folder, settings):
        logger.info("%s: done already, from the same configuration; skipped", stage)
        return
    _make_room(folder, stage, settings)
    if is_done(folder, settings):
        logger.info("%s: taken back from an earlier run of the same configuration", stage)
        return
    folder.mkdir(parents=True, exist_ok=True)
    mark = fingerprint(settings)
    write_record(folder, status="running", fingerprint=mark, settings=settings)
    logger.info("%s: started", stage)
    start = time.perf_counter()
    make(experiment, folder)
    seconds = time.perf_counter() - start
    write_record(
        folder, status="done", fingerprint=mark, settings=settings, seconds=round(seconds, 1)
    )
    logger.info("%s: done in %.1f s", stage, seconds)


def _make_room(folder: Path, stage: str, settings: Any) -> None:
    """Put the output of other settings aside, and take back what these settings made before."""
    record = read_record(folder)
    if record.get("fingerprint") == fingerprint(settings):
        logger.info("%s: was cut off; goes on", stage)
        return
    aside = folder.parent / "previous" / stage
    back = read_record(aside).get("fingerprint") == fingerprint(settings)
    if folder.exists():
        if record:
            names = changed_settings(record.get("settings"), settings)
            logger.info("%s: settings changed (%s); made again", stage, ", ".join(names[:5]))
        swap = folder.parent / "previous" / f"{stage}.swap"
        swap.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(swap, ignore_errors=True)
        folder.rename(swap)
        if back:
            aside.rename(folder)
        else:
            shutil.rmtree(aside, ignore_errors=True)
        swap.rename(aside)
    elif back:
        aside.rename(folder)
