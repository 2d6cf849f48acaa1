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
import dataclasses
import hashlib
import logging
import math
import os
import re
import shutil
import time
from collections.abc import Callable, Container, Iterable, Mapping
from pathlib import Path
from typing import Any

import jax

from dgr_jax import evaluation, interrupts, partitioning, processes, shipped
from dgr_jax.corpora import lines
from dgr_jax.data.rules import TRAIN_SPLIT, check_apart
from dgr_jax.experiments.generative import Experiment
from dgr_jax.model_dir import kept, versions, writer_lock
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
from dgr_jax.settings import describe, fingerprint, paths

logger = logging.getLogger(__name__)

_LEFTOVER = re.compile(r"\.partial(-\d+|\.npz|\.trec)?$|\.part$|\.old-\d+$|\.tmp(\.npy)?$")
READING = ("prepare", "teach")  # stages that read files from elsewhere
ALONE = ("prepare", "start", "teach")  # stages that one process does, while the others wait
_NO_SPLIT = {"train_split": "", "train_splits": (), "test_splits": ()}
_BEFORE = "files_before"  # in stage.json: what a damaged stage had made, while it is made again
LARGE = 64 << 20  # bytes from which a file's contents are not looked at


def run(
    experiment: Experiment,
    makers: dict[str, Callable[[Experiment, Path], None]],
    stages: Iterable[str] = ("evaluate",),
    *,
    named: Container[str] = (),
) -> None:
    """Run `stages` and every stage that they read, in order.

    makers: stage -> function(experiment, folder) that makes the stage's output, or completes what
    an earlier call with the same settings began.
    named: files and folders that must be there also where what is read of them is made already.
    Raises FileNotFoundError or ValueError, before any stage starts, where one of them could only
    fail: it would lack a file, not know a measure, or measure on what it has learned;
    writer_lock.Locked where another process writes into MODEL_DIR.
    """
    alone = writer_lock.held(experiment.model_dir)
    with alone if processes.first() else contextlib.nullcontext():
        check_apart(experiment.prepare)
        if processes.first():
            _put_back(Path(experiment.model_dir))
        settings = processes.agree(settings_of(experiment, stages) if processes.first() else None)
        wanted = list(settings)
        if processes.count() > 1:
            jax.device_count()  # the first look at devices is one of all processes together
        if processes.first():
            for stage in wanted:
                _check(experiment, stage, settings[stage], named)
            _check_devices(
                experiment, [s for s in wanted if not _is_made(experiment, s, settings[s])]
            )
            _say_other_versions(experiment, settings)
        for stage in experiment.stages:
            if stage in wanted:
                _run_stage(experiment, stage, settings[stage], makers[stage])


def _say_other_versions(experiment: Experiment, settings: dict[str, Any]) -> None:
    """Says which finished stages were made by other versions of this package or its libraries; they
    are used as they are."""
    others: dict[str, list[str]] = {}
    for stage, asked in settings.items():
        folder = Path(experiment.model_dir) / stage
        if is_done(folder, asked):
            changes = versions.changes(read_record(folder).get("versions", {}))
            others.setdefault(", ".join(changes), []).append(stage)
    others.pop("", None)
    for changes, made in others.items():
        logger.warning(
            "%s: made by %s, and used as they are; remove their folders to make them again",
            ", ".join(made),
            changes,
        )


def settings_of(
    experiment: Experiment, stages: Iterable[str] = ("evaluate",)
) -> dict[str, dict[str, Any]]:
    """What `stages`, and every stage that they read, are asked to do, in their order; with what
    tells whether the files that they read have changed."""
    wanted = _with_upstream(experiment, stages)
    files = {stage: _signatures(experiment, stage) for stage in READING if stage in wanted}
    return {
        stage: stage_settings(experiment, stage, files)
        for stage in experiment.stages
        if stage in wanted
    }


def _with_upstream(experiment: Experiment, stages: Iterable[str]) -> set[str]:
    wanted: set[str] = set()
    pending = list(stages)
    while pending:
        stage = pending.pop()
        if stage not in experiment.stages:
            known = tuple(experiment.stages)
            raise ValueError(f"unknown stage {stage!r}, expected one of {known}")
        if stage not in wanted:
            wanted.add(stage)
            pending += upstream(experiment, stage)
    return wanted


def _signatures(experiment: Experiment, stage: str) -> dict[str, Any]:
    """What the files that a stage reads hold now; of a missing one, what it held when it was read,
    so that MODEL_DIR goes on where the data is not."""
    read = read_record(Path(experiment.model_dir) / stage).get("settings", {}).get("files", {})
    signed: dict[str, Any] = {}
    if stage == "prepare":
        found = experiment.collection.inputs(experiment.prepare.splits)
        whole = all(found.values())
        now = {name: _signature(path) for name, path in found.items() if whole and path}
        signed["collection"] = now if whole and now else read.get("collection")
        tasks = getattr(experiment.prepare, "tasks", "")
        if (file := shipped.resources("tasks") / f"{tasks}.py").is_file():
            signed[f"tasks/{file.name}"] = _signature(file)
    for owner in experiment.stages[stage].settings:
        for name, path in paths(getattr(experiment, owner)).items():
            there = lines.place(path)
            signed[name] = _signature(there) if there.is_file() else read.get(name)
    return {name: value for name, value in signed.items() if value}


def _signature(path: Path) -> dict[str, Any]:
    """Tells whether a file has changed, wherever it lies."""
    status = path.stat()
    if status.st_size > LARGE:
        return {"bytes": status.st_size, "modified": int(status.st_mtime)}
    with path.open("rb") as file:
        return {"bytes": status.st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def _is_made(experiment: Experiment, stage: str, settings: Any) -> bool:
    """Whether the stage need not run: it is done, in its place or aside."""
    folder = Path(experiment.model_dir)
    return is_done(folder / stage, settings) or is_done(folder / PREVIOUS / stage, settings)


def _damage(folder: Path, settings: Any) -> kept.Damaged | None:
    """What is wrong with the files of a stage that is done."""
    try:
        if is_done(folder, settings):
            kept.whole(folder)
    except kept.Damaged as damage:
        return damage
    return None


def _check(experiment: Experiment, stage: str, settings: Any, named: Container[str]) -> None:
    """Raises FileNotFoundError or ValueError where a stage could only fail."""
    damage = _damage(Path(experiment.model_dir) / stage, settings)
    made = damage is None and _is_made(experiment, stage, settings)
    try:
        _check_files(experiment, stage, named if made else None)
        if not made and stage == "evaluate":
            _check_measures(experiment)
    except (OSError, ValueError) as error:
        if damage is None:
            raise
        raise ValueError(f"{damage.what}; {stage} cannot be made again: {error}") from error


def _check_files(experiment: Experiment, stage: str, named: Container[str] | None) -> None:
    """Raises FileNotFoundError naming the files that a stage would lack.

    named: only those of them that are named are looked for; None: all.
    """
    asked = lambda path: named is None or path in named
    if stage == "prepare" and asked(_folder(experiment.collection)):
        if splits := experiment.prepare.splits:
            experiment.collection.check(splits)
        else:
            next(iter(experiment.collection.passages()))
    for owner in experiment.stages[stage].settings if stage in READING else ():
        for name, path in paths(getattr(experiment, owner)).items():
            if asked(path) and not lines.place(path).is_file():
                raise FileNotFoundError(
                    f"{name}: no file at {path!r}; name another with --gin.{name}=FILE"
                )


def _folder(collection: Any) -> str | None:
    """Where a collection lies, which may be a part of another one; None: in no folder."""
    while hasattr(collection, "collection"):
        collection = collection.collection
    return getattr(collection, "folder", None)


def _check_measures(experiment: Experiment) -> None:
    """Raises ValueError for measures that evaluation does not know, or cannot take of these
    queries."""
    settings = experiment.evaluate
    evaluation.check(settings.measures, min_relevance=settings.min_relevance)
    _check_answers(experiment)


def _check_devices(experiment: Experiment, stages: Iterable[str]) -> None:
    """Raises ValueError where the devices that are here cannot share the batches of stages."""
    systems = getattr(experiment, "systems", ())
    trained = {k: v for system in systems for k, v in experiment.training(system).items()}
    for stage in stages:
        if stage in trained:
            mesh = partitioning.mesh_sizes(experiment.mesh, jax.device_count())
            shards = math.prod(mesh[axis] for axis in partitioning.BATCH_AXES)
            trained[stage].check_shards(stage, shards)


def _check_answers(experiment: Experiment) -> None:
    """Raises ValueError for a measure of answers that the collection's queries lack, where the
    collection is at hand; what was prepared of it is checked when it is measured."""
    collection, splits = experiment.collection, experiment.prepare.test_splits
    measures = experiment.evaluate.measures
    of_answers = any(evaluation.answer_cutoff(name) is not None for name in measures)
    if of_answers and all(collection.inputs(splits).values()):
        for split in splits:
            evaluation.require_answers(measures, collection.queries(split), split)


def _run_stage(
    experiment: Experiment, stage: str, settings: Any, make: Callable[[Experiment, Path], None]
) -> None:
    folder = Path(experiment.model_dir) / stage
    first = processes.first()
    if not processes.agree(_begin(folder, stage, settings) if first else None):
        return
    logger.info("%s: started", stage)
    interrupts.goes_on(stage)
    start = time.perf_counter()
    if first or stage not in ALONE:
        make(experiment, folder)
    processes.wait()
    seconds = time.perf_counter() - start
    if first:
        mark, signed = fingerprint(settings), kept.sign(folder)
        if stage in ALONE:
            _say_other_contents(experiment, stage, read_record(folder).get(_BEFORE), signed)
        write_record(
            folder,
            status="done",
            fingerprint=mark,
            settings=settings,
            seconds=round(seconds, 1),
            versions=versions.here(),
            files_made=signed,
        )
    logger.info("%s: done in %.1f s", stage, seconds)


def _begin(folder: Path, stage: str, settings: Any) -> bool:
    """Whether the stage must be made; then its folder is there, and says so."""
    if is_done(folder, settings) and not _cleared(folder, stage, settings):
        logger.info("%s: done already, from the same configuration; skipped", stage)
        return False
    _make_room(folder, stage, settings)
    if is_done(folder, settings) and not _cleared(folder, stage, settings):
        logger.info("%s: taken back from an earlier run of the same configuration", stage)
        return False
    folder.mkdir(parents=True, exist_ok=True)
    remove_leftovers(folder.parent)
    record, mark = read_record(folder), fingerprint(settings)
    before = record.get(_BEFORE, record.get(kept.KEY))  # of a stage that was damaged
    more = {_BEFORE: before} if before else {}
    write_record(folder, status="running", fingerprint=mark, settings=settings, **more)
    return True


def _say_other_contents(
    experiment: Experiment, stage: str, before: kept.Listed | None, signed: kept.Listed
) -> None:
    """Says where a damaged stage was made again otherwise, and which finished stages were made from
    what it was."""
    changed = [name for name, entry in signed.items() if before and before.get(name) != entry]
    later = [
        other
        for other in experiment.stages
        if other != stage and stage in _with_upstream(experiment, [other])
        if read_record(Path(experiment.model_dir) / other).get("status") == "done"
    ]
    if changed and later:
        logger.warning(
            "%s: was made again with other contents than before (%s), as by other versions of "
            "libraries; %s were made from those before, and do not fit: remove their folders",
            *(stage, ", ".join(changed[:3]), ", ".join(later)),
        )


def _cleared(folder: Path, stage: str, settings: Any) -> bool:
    """Whether files of a stage were damaged; then it is not done any more, and has none of them."""
    damage = _damage(folder, settings)
    if damage is None:
        return False
    logger.warning("%s: %s; made again", stage, damage.what)
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


def _make_room(folder: Path, stage: str, settings: Any) -> None:
    """Put the output of other settings aside, and take back what these settings made before."""
    record = read_record(folder)
    if is_made_from(record, settings):
        if record.get("status") == "running":
            logger.info("%s: was cut off; goes on", stage)
        return
    aside = folder.parent / PREVIOUS / stage
    back = is_made_from(read_record(aside), settings)
    if not folder.exists():
        if back:
            aside.rename(folder)
        return
    if not record and (folder / RECORD).exists():
        logger.warning("%s: %s cannot be read; made again", stage, folder / RECORD)
    if record:
        names = changed_settings(record.get("settings"), settings)
        logger.info("%s: settings changed (%s); made again", stage, ", ".join(names[:5]))
    aside.parent.mkdir(parents=True, exist_ok=True)
    if back:  # a process that is killed between these is followed by `_put_back`
        swap = aside.with_name(f"{stage}{SWAP}")
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


def _put_back(model_dir: Path) -> None:
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


def without_labels(experiment: Experiment) -> Experiment:
    """The experiment as it goes on where its collection has no judgements to learn from.

    Where the settings name no split but 'train', and the collection lacks it and has a test split,
    or no queries at all, the student learns from passages and pseudo-queries. Without queries there
    is nothing to measure either. A prepare stage that is done decides where the collection is not
    at hand, and goes on where its split is gone.
    """
    changed = processes.agree(_without_labels(experiment) if processes.first() else None)
    if not changed:
        return experiment
    prepare = dataclasses.replace(experiment.prepare, **{name: _NO_SPLIT[name] for name in changed})
    return dataclasses.replace(experiment, prepare=prepare)


def _without_labels(experiment: Experiment) -> list[str]:
    """The settings of prepare that name no split then; [] where there are labels, or no texts."""
    prepare, collection = experiment.prepare, experiment.collection
    if prepare.train_splits != (TRAIN_SPLIT,) or not hasattr(collection, "lacking"):
        return []
    record = read_record(Path(experiment.model_dir) / "prepare")
    before = record.get("settings", {}).get("prepare", {}) if record.get("status") == "done" else {}
    lacking, has_queries = collection.lacking(prepare.splits), collection.has_queries
    if before.get("train_split") or before.get("train_splits"):
        return []
    if before and lacking is None:
        lacking, has_queries = (TRAIN_SPLIT,), bool(before.get("test_splits"))
    tested = lacking is not None and not set(prepare.test_splits) <= set(lacking)
    if TRAIN_SPLIT not in (lacking or ()) or has_queries and not tested:
        return []
    if not prepare.sources.rates().keys() - {"labelled"}:
        logger.warning(
            "there is no split %r: to learn without labels, give Sources.passages or "
            "Sources.pseudo_queries a rate, such as 0.5",
            TRAIN_SPLIT,
        )
        return []
    learned = next(name for name in ("train_split", "train_splits") if name in vars(prepare))
    return [learned] if has_queries else [learned, "test_splits"]


# Settings of a Training that only rank lists need.
_RANK_LISTS = ("objective", "list_batch_size")


def upstream(experiment: Experiment, stage: str) -> tuple[str, ...]:
    """The stages of this experiment whose output a stage reads."""
    return experiment.stages[stage].upstream


def stage_settings(
    experiment: Experiment, stage: str, files: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """What a stage and all stages before it were asked to do.

    files: stage -> what tells whether the files that it reads have changed.
    """
    own = {name: describe(getattr(experiment, name)) for name in experiment.stages[stage].settings}
    if stage == "control":  # the steps of distillation, not its objective
        own["distill"] = {k: v for k, v in own["distill"].items() if k not in _RANK_LISTS}
        own["distill"]["batch_size"] = experiment.distill.examples
    trained = (getattr(experiment, name) for name in experiment.stages[stage].settings)
    if any(getattr(settings, "validate_every", 0) for settings in trained):
        own["validation_search"] = describe(experiment.evaluate.validation_search)
    if files and files.get(stage):
        own["files"] = files[stage]
    return own | {up: stage_settings(experiment, up, files) for up in upstream(experiment, stage)}
