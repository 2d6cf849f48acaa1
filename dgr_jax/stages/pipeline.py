"""Runs the stages of an experiment in order, skips what is done, and resumes what was cut off.

Each stage has a folder in MODEL_DIR with a stage.json: what it was asked to do (with everything
before it), a fingerprint of that, and whether it was finished. A stage whose settings changed
starts again; what it had made is kept aside in MODEL_DIR/previous until the next change, and is
taken back when the settings are. Files that a stage reads from elsewhere belong to its settings:
their contents do, or size and time of change where they are large. stage.json of a stage that is
done also says what files it has made (see `dgr_jax.model_dir.kept`): where one is damaged or
missing, the stage is made again.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Container, Iterable, Mapping
from pathlib import Path
from typing import Any

import jax

from dgr_jax import interrupts, processes
from dgr_jax.experiments.stage import Stage
from dgr_jax.model_dir import kept, versions, writer_lock
from dgr_jax.model_dir.records import is_done, read_record, write_record
from dgr_jax.settings import describe, fingerprint, folders_of
from dgr_jax.stages import folders
from dgr_jax.stages.inputs import missing, signatures

logger = logging.getLogger(__name__)

Changed = Callable[[Stage], Stage]


def run(
    experiment: Any,
    stages: Iterable[str] | None = None,
    *,
    named: Container[str] = (),
    changed: Changed = lambda stage: stage,
) -> None:
    """Run `stages` (None: all) and every stage that they read, in order.

    named: files and folders that must be there also where what is read of them is made already.
    changed: a stage -> the stage that runs in its place, to the same output.
    Raises FileNotFoundError or ValueError, before any stage starts, where one of them could only
    fail: it would lack a file, not know a measure, or measure on what it has learned;
    writer_lock.Locked where another process writes into MODEL_DIR.
    """
    alone = writer_lock.held(experiment.model_dir)
    with alone if processes.first() else contextlib.nullcontext():
        if processes.first():
            folders.put_back(Path(experiment.model_dir))
        settings = processes.agree(settings_of(experiment, stages) if processes.first() else None)
        if processes.count() > 1:
            jax.device_count()  # the first look at devices is one of all processes together
        wanted = [changed(experiment.stages[name]) for name in settings]
        if processes.first():
            for stage in wanted:
                _check(experiment, stage, settings[stage.name], named)
            _say_other_versions(experiment, settings)
        for stage in wanted:
            _run_stage(experiment, stage, settings[stage.name])


def settings_of(experiment: Any, stages: Iterable[str] | None = None) -> dict[str, dict[str, Any]]:
    """What `stages` (None: all), and every stage that they read, are asked to do, in their order;
    with what tells whether the files that they read have changed."""
    known = experiment.stages
    wanted = _with_upstream(experiment, known if stages is None else stages)
    files = {name: signatures(experiment, known[name]) for name in known if name in wanted}
    return {name: stage_settings(experiment, name, files) for name in files}


def stage_settings(
    experiment: Any, name: str, files: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """What a stage and all stages before it were asked to do.

    files: stage -> what tells whether the files that it reads have changed.
    """
    stage = experiment.stages[name]
    own = {setting: describe(value) for setting, value in stage.settings(experiment).items()}
    if files and files.get(name):
        own["files"] = files[name]
    before = stage.upstream(experiment)
    return own | {other: stage_settings(experiment, other, files) for other in before}


def _with_upstream(experiment: Any, stages: Iterable[str]) -> set[str]:
    known, wanted, pending = experiment.stages, set(), list(stages)
    while pending:
        name = pending.pop()
        if name not in known:
            raise ValueError(f"unknown stage {name!r}, expected one of {tuple(known)}")
        if name not in wanted:
            wanted.add(name)
            pending += known[name].upstream(experiment)
    return wanted


def _check(experiment: Any, stage: Stage, settings: Any, named: Container[str]) -> None:
    """Raises FileNotFoundError or ValueError where a stage could only fail."""
    folder = Path(experiment.model_dir) / stage.name
    damage = folders.damage(folder, settings)
    is_made = damage is None and folders.is_made(folder, settings)
    is_asked = lambda path: not is_made or path in named
    try:
        own = tuple(stage.settings(experiment).values())
        if not is_made or any(map(is_asked, folders_of(own))):
            stage.check(experiment)
        for name, path in missing(experiment, stage).items():
            if is_asked(path):
                raise FileNotFoundError(
                    f"{name}: no file at {path!r}; name another with --gin.{name}=FILE"
                )
    except (OSError, ValueError) as error:
        if damage is None:
            raise
        what = f"{damage.what}; {stage.name} cannot be made again: {error}"
        raise ValueError(what) from error


def _say_other_versions(experiment: Any, settings: Mapping[str, Any]) -> None:
    """Says which finished stages were made by other versions of this package or its libraries; they
    are used as they are."""
    others: dict[str, list[str]] = {}
    for stage, asked in settings.items():
        folder = Path(experiment.model_dir) / stage
        if is_done(folder, asked):
            changes = versions.changes(read_record(folder).get("versions", {}))
            others.setdefault(", ".join(changes), []).append(stage)
    others.pop("", None)
    for changes, stages in others.items():
        logger.warning(
            "%s: made by %s, and used as they are; remove their folders to make them again",
            ", ".join(stages),
            changes,
        )


def _run_stage(experiment: Any, stage: Stage, settings: Any) -> None:
    folder, first = Path(experiment.model_dir) / stage.name, processes.first()
    if not processes.agree(folders.begin(folder, settings) if first else None):
        return
    logger.info("%s: started", stage.name)
    interrupts.goes_on(stage.name)
    start = time.perf_counter()
    if first or not stage.alone:
        stage.make(experiment, folder)
    processes.wait()
    seconds = time.perf_counter() - start
    if first:
        signed = kept.sign(folder)
        if stage.alone:
            before = read_record(folder).get(folders.BEFORE)
            _say_other_contents(experiment, stage.name, before, signed)
        write_record(
            folder,
            status="done",
            fingerprint=fingerprint(settings),
            settings=settings,
            seconds=round(seconds, 1),
            versions=versions.here(),
            files_made=signed,
        )
    logger.info("%s: done in %.1f s", stage.name, seconds)


def _say_other_contents(
    experiment: Any, stage: str, before: kept.Listed | None, signed: kept.Listed
) -> None:
    """Says where a damaged stage was made again otherwise, and which finished stages were made from
    what it was."""
    differ = [name for name, entry in signed.items() if before and before.get(name) != entry]
    later = [
        other
        for other in experiment.stages
        if other != stage and stage in _with_upstream(experiment, [other])
        if read_record(Path(experiment.model_dir) / other).get("status") == "done"
    ]
    if differ and later:
        logger.warning(
            "%s: was made again with other contents than before (%s), as by other versions of "
            "libraries; %s were made from those before, and do not fit: remove their folders",
            *(stage, ", ".join(differ[:3]), ", ".join(later)),
        )
