"""The records of a MODEL_DIR's stages: stage.json in the folder of each.

While a stage is made again with other settings, its last finished version lies in
MODEL_DIR/previous, where readers find it.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dgr_jax.model_dir import writer_lock
from dgr_jax.settings import fingerprint

RECORD = "stage.json"
PREVIOUS = "previous"
SWAP = ".swap"  # ends the name of a stage in PREVIOUS while two versions change places
STUDENT = "student.json"  # beside a trained model's checkpoints: what a reader needs to know of it

_SWAPPING = 1.0  # seconds within which a writer has exchanged two versions of a stage
_PAUSE = 0.05


def read_record(folder: Path) -> dict[str, Any]:
    """The contents of a folder's stage.json; {} when there is none or it cannot be read."""
    try:
        record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError, ValueError, RecursionError):
        return {}
    return record if isinstance(record, dict) else {}


def write_record(folder: Path, **values: Any) -> None:
    """Replaces stage.json as a whole."""
    temporary = folder / f"{RECORD}.partial"
    temporary.write_text(json.dumps(values, indent=1, sort_keys=True), encoding="utf-8")
    temporary.replace(folder / RECORD)


def is_made_from(record: dict[str, Any], settings: Any) -> bool:
    """Whether a stage, finished or not, was made from these settings."""
    if not record:
        return False
    asked = as_recorded(settings, record.get("settings"))
    return record.get("fingerprint") in (fingerprint(settings), fingerprint(asked))


def is_done(folder: Path, settings: Any) -> bool:
    """Whether the folder holds a finished stage that was made from these settings."""
    record = read_record(folder)
    return record.get("status") == "done" and is_made_from(record, settings)


def as_recorded(settings: Any, recorded: Any) -> Any:
    """The settings in the form in which an older stage may have recorded them.

    They lack the signatures of files that were not yet signed when the stage was made, and name
    losses by their full names, where the record does.
    """
    if isinstance(settings, list) and isinstance(recorded, list) and len(settings) == len(recorded):
        return [as_recorded(*pair) for pair in zip(settings, recorded, strict=True)]
    if isinstance(settings, str) and str(recorded).startswith("dgr_jax.losses."):
        return recorded if str(recorded).rpartition(".")[2] == settings else settings
    if not isinstance(settings, dict):
        return settings
    recorded = recorded if isinstance(recorded, dict) else {}
    of_stage = "is" not in settings  # a collection may have a setting of this name
    asked = {}
    for name, value in settings.items():
        if name != "files" or not of_stage or not isinstance(value, dict):
            asked[name] = as_recorded(value, recorded.get(name))
            continue
        signed = recorded.get("files") or {}
        if kept := {file: mark for file, mark in value.items() if file in signed}:
            asked["files"] = kept
    return asked


def are_same(old: Any, new: Any) -> bool:
    """Whether two stages have the same settings; files count that both have signed."""
    return fingerprint(as_recorded(old, new)) == fingerprint(as_recorded(new, old))


def changed_settings(old: Any, new: Any) -> list[str]:
    """Names of the settings that differ, as paths such as 'prepare.sources.labelled'.

    Of files, only those count that both have signed.
    """
    return _changed(as_recorded(old, new), as_recorded(new, old))


def _changed(old: Any, new: Any, at: str = "") -> list[str]:
    if not (isinstance(old, dict) and isinstance(new, dict)):
        return [] if old == new else [at]
    changed = []
    for key in sorted(old.keys() | new.keys()):
        path = f"{at}.{key}" if at else key
        changed += _changed(old.get(key), new.get(key), path)
    return changed


@dataclass(frozen=True)
class Answering:
    """A trained student and the prepare stage that it was trained on.

    aside: the reason why they are not those of the newest settings, or why a better student does
      not answer; blank where there is none.
    """

    student: Path
    prepared: Path
    aside: str = ""
    _seen: tuple[str, str] = ("", "")

    @property
    def unchanged(self) -> bool:
        """Whether both folders still hold what they held when they were looked for."""
        return self._seen == (_mark(self.student), _mark(self.prepared))


def answering(model_dir: Path, systems: Sequence[str], file: str = STUDENT) -> Answering:
    """The first of these systems, best first, that is trained, with the prepare stage that it was
    trained on.

    Both are looked for in MODEL_DIR and, while one of them is made again, in MODEL_DIR/previous.
    file: what a stage leaves that can answer.
    Raises FileNotFoundError where none is trained, and ValueError where the identifiers that they
    were trained on do not exist any more; both messages name a process that writes meanwhile.
    """
    deadline = time.monotonic() + _SWAPPING
    while True:
        strangers: list[Path] = []
        for name in systems:
            if answer := _whole(model_dir, name, systems, strangers, file):
                return answer
        # A writer that exchanges two versions of a stage moves two folders, one after the other.
        if not (writer := writer_lock.holder(model_dir)) or time.monotonic() > deadline:
            break
        time.sleep(_PAUSE)
    meanwhile = f". MODEL_DIR is being written by {writer}" if writer else ""
    command = f"python -m dgr_jax.train --model_dir={model_dir}"
    if strangers:
        raise ValueError(f"{_stranger(strangers[0], model_dir / 'prepare', command)}{meanwhile}")
    wanted = ", ".join(f"{name}/{file}" for name in systems)
    raise FileNotFoundError(
        f"no trained student in {model_dir}: looked for {wanted}; train one with {command}"
        f"{meanwhile}"
    )


def _stranger(student: Path, prepared: Path, command: str) -> str:
    """A message on why a student cannot answer, and which command mends it."""
    record = read_record(prepared)
    was = _prepare_settings(read_record(student).get("settings"))
    if record.get("status") != "done" and are_same(record.get("settings"), was):
        return f"{prepared}: is not whole, and {student} was trained on it; {command} completes it"
    return (
        f"{student}: was trained on other identifiers than {prepared} holds"
        f"{_differences(student, prepared)}; {command} trains it again"
    )


def _whole(
    model_dir: Path, name: str, systems: Sequence[str], strangers: list[Path], file: str
) -> Answering | None:
    """The newest finished version of a system whose prepare stage exists; versions whose prepare
    stage does not are added to `strangers`."""
    for student in finished(model_dir, name, file):
        prepared = _trained_on(model_dir, read_record(student))
        if prepared is None:
            strangers.append(student)
            continue
        aside = _aside(model_dir, name, systems, student, prepared)
        return Answering(student, prepared, aside, (_mark(student), _mark(prepared)))
    return None


def finished(model_dir: Path, stage: str, file: str) -> Iterator[Path]:
    """The folders of a stage and of its earlier versions, of those that are done and left a file;
    the newest first."""
    for folder in _versions(model_dir, stage):
        if leaves(folder, file) and read_record(folder).get("status", "done") == "done":
            yield folder


def leaves(folder: Path, file: str) -> bool:
    """Whether a stage has left a file, which may have been lost since."""
    return (folder / file).is_file() or file in (read_record(folder).get("files_made") or {})


def _versions(model_dir: Path, stage: str) -> tuple[Path, ...]:
    """The folders that may hold a stage or an earlier version of it."""
    aside = model_dir / PREVIOUS
    return model_dir / stage, aside / stage, aside / f"{stage}{SWAP}"


def _trained_on(model_dir: Path, record: dict[str, Any]) -> Path | None:
    """The folder with the prepare stage that a stage was made from."""
    settings = _prepare_settings(record.get("settings"))
    folders = _versions(model_dir, "prepare")
    if settings is None:  # made without a pipeline, so that there is nothing to compare
        return folders[0]
    for folder in folders:
        prepared = read_record(folder)
        if prepared.get("status") == "done" and are_same(prepared.get("settings"), settings):
            return folder
    return None


def is_current(student: Path) -> bool:
    """Whether a stage was made from the prepare stage that lies beside it."""
    return _trained_on(student.parent, read_record(student)) == student.parent / "prepare"


def _prepare_settings(settings: Any) -> dict[str, Any] | None:
    """The settings of the prepare stage within those of a later stage.

    A stage's settings hold those of all stages before it, each under its name.
    """
    if not isinstance(settings, dict):
        return None
    own = settings.get("prepare")
    if isinstance(own, dict) and "collection" in own:
        return own
    nested = (_prepare_settings(value) for value in settings.values())
    return next((inner for inner in nested if inner is not None), None)


def _aside(
    model_dir: Path, name: str, systems: Sequence[str], student: Path, prepared: Path
) -> str:
    """The reason why this student is not the one that a user would expect; blank where it is."""
    reasons = []
    if name != systems[0]:
        reasons.append(f"{name} answers, as {systems[0]} is not trained yet")
    if student != model_dir / name:
        reasons.append(
            f"{name} is being made again with other settings, the version before answers"
        )
    if prepared != model_dir / "prepare":
        changed = _differences(student, model_dir / "prepare")
        reasons.append(
            f"the prepare stage was made again{changed} and {name} was not trained on that yet; it "
            "answers over the identifiers that it knows"
        )
    return "; ".join(reasons)


def _differences(student: Path, prepared: Path) -> str:
    """Names of up to three settings in which the prepare stage that a student was trained on
    differs from the one in a folder, in brackets; blank where none does."""
    was = _prepare_settings(read_record(student).get("settings"))
    now = read_record(prepared).get("settings")
    names = changed_settings(was, now) if was and now else []
    return f" (changed: {', '.join(names[:3])})" if names else ""


def _mark(folder: Path) -> str:
    record = read_record(folder)
    return f"{record.get('fingerprint')} {record.get('status')}"
