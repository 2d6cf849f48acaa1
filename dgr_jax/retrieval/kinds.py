"""Kinds of systems, and how each is written and opened: student.json beside the checkpoints of a
trained one, systems.json of an evaluation for those that no stage trains."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax

from dgr_jax import partitioning
from dgr_jax.data.vocabulary import Vocabulary
from dgr_jax.model_dir import kept, records
from dgr_jax.model_dir.records import PREVIOUS, STUDENT
from dgr_jax.retrieval import bm25, kept_rows, planned, student_planned, trained
from dgr_jax.retrieval.dense import Searcher
from dgr_jax.retrieval.generative import Decoder
from dgr_jax.retrieval.multiview.planned import PlannedViews
from dgr_jax.retrieval.multiview.search import MultiviewDecoder
from dgr_jax.retrieval.simultaneous import Plan
from dgr_jax.retrieval.system import System, SystemSettings, Trained, TrainedSystem
from dgr_jax.settings import restored

# These are in the two tables of kinds once they are imported; those from elsewhere come to them.
SHIPPED = (
    *(Decoder, MultiviewDecoder, Searcher, bm25.Bm25Baseline, planned.Planned),
    *(PlannedViews, student_planned.PlannedByLearned, student_planned.PlannedByOnePass),
)
TRAINED = TrainedSystem.kinds

EVALUATION, SYSTEMS = "evaluate", "systems.json"  # stage, and what it leaves

# The systems of an experiment, of which older files say nothing; _OPTIONAL: those that are there.
_OLD = {
    "docid": ("generate", "control", "distill"),
    "multiview": ("generate", "control", "distill"),
    "dense": ("dense", "refresh"),
}
_OPTIONAL = ("control", "refresh")


@dataclass(frozen=True)
class Student:
    """What student.json says of a trained system: its kind, its settings as JSON, and the systems
    that its experiment trains, the best one last.

    began: of one that has learned passages which came later, the name of the student that it began
      from, and the fingerprint of its stage; (): of all others.
    """

    kind: str
    model: dict[str, Any]
    search: dict[str, Any]
    systems: tuple[str, ...]
    began: tuple[str, ...] = ()


def write_student(
    folder: Path,
    kind: str,
    model: Any,
    search: Any,
    systems: Sequence[str],
    began: tuple[str, ...] = (),
) -> None:
    """Leave beside the checkpoints of a trained system what is needed to open it."""
    settings = dataclasses.asdict(model), dataclasses.asdict(search)
    described = dataclasses.asdict(Student(kind, *settings, tuple(systems), began))
    (folder / STUDENT).write_text(json.dumps(described, indent=1), encoding="utf-8")


def read_student(folder: Path) -> Student:
    """What `write_student` wrote; of a folder that an older version wrote, what it must have been.

    Raises kept.Damaged where it cannot be read.
    """
    with kept.reading(folder / STUDENT) as path:
        said = kept.read_json(path)
        model, search = dict(said["model"]), dict(said["search"])
        old = "dense" if "t5" in model else "multiview" if "scoring" in search else "docid"
        kind = said.get("kind", old)
        if kind not in TRAINED:
            raise ValueError(f"got kind {kind!r}, expected one of {', '.join(sorted(TRAINED))}")
        there = [n for n in _OLD[old] if n not in _OPTIONAL or (folder.parent / n).is_dir()]
        began = tuple(map(str, said.get("began", ())))
        return Student(kind, model, search, tuple(said.get("systems", there)), began)


def best_first(model_dir: Path) -> tuple[str, ...]:
    """The systems that the experiments of a MODEL_DIR train, the best one first: of several
    experiments, that of the prepare stage which is there now. A refreshed one is not among them
    once the student that it began from was trained again. One that cannot be read, and which no
    other names, comes first: whoever opens it is told so."""
    said, lost = [], []
    for folder in (*model_dir.glob("*"), *model_dir.glob(f"{PREVIOUS}/*")):
        if not records.leaves(folder, STUDENT):
            continue
        try:
            student = read_student(folder)
            if _goes_back(model_dir, student) is not None:
                said.append(student.systems[::-1])
        except (OSError, ValueError):
            if folder.parent == model_dir and records.read_record(folder).get("status") == "done":
                lost.append(folder.name)
    orders = list(dict.fromkeys(said)) or [order[::-1] for order in _OLD.values()]
    if len(orders) > 1 and said:
        orders.sort(key=lambda order: (_is_current(model_dir, order), len(order)), reverse=True)
    names = tuple(dict.fromkeys(name for order in orders for name in order))
    return (*(name for name in lost if name not in names), *names)


def _is_current(model_dir: Path, order: Sequence[str]) -> bool:
    """Whether the first of these systems that is there was trained on the prepare stage that is."""
    there = (model_dir / name for name in order if (model_dir / name / STUDENT).is_file())
    return any(records.is_current(student) for student in itertools.islice(there, 1))


def refreshed(model_dir: Path, system: str) -> tuple[str, ...]:
    """The refreshed students that go back to a trained system, the best one first."""
    names = []
    for name in best_first(model_dir):
        with contextlib.suppress(OSError, ValueError):
            student = read_student(model_dir / name)
            if student.began and _goes_back(model_dir, student) == system:
                names.append(name)
    return tuple(names)


def _goes_back(model_dir: Path, student: Student) -> str | None:
    """The name of the trained system that a refreshed student goes back to, through all that were
    refreshed before; blank for one that was not; None where one of them was trained again."""
    name = ""
    while student.began:
        name, mark = student.began
        record = records.read_record(model_dir / name)
        if record.get("status") == "done" and record.get("fingerprint") != mark:
            return None
        try:
            student = read_student(model_dir / name)
        except (OSError, ValueError):
            break
    return name


def params_of(
    student: Student, folder: Path, mesh: jax.sharding.Mesh, rules: partitioning.Rules
) -> Any:
    """The parameters of a trained system, placed on the mesh."""
    kind = TRAINED[student.kind]
    with kept.reading(folder / STUDENT):
        model = restored(kind.model_settings, student.model)
    return trained.params(folder, kind.network(model), mesh, rules)


def open_student(
    student: Student,
    folder: Path,
    prepared: Path,
    vocabulary: Vocabulary,
    mesh: jax.sharding.Mesh,
    rules: partitioning.Rules,
    settings: Mapping[str, Any],
    params: Any,
) -> System:
    """A trained system, from the folder of its stage and that of the prepare stage, or of a version
    of the index.

    settings: of its search, which replace those that it was written with. params: see
    `params_of`.
    """
    kind = TRAINED[student.kind]
    with kept.reading(folder / STUDENT):
        model = restored(kind.model_settings, student.model)
        search = restored(kind.search_settings, student.search)
    search = dataclasses.replace(search, **settings)
    source = Trained(folder, prepared, vocabulary, model, search, mesh, rules)
    return kind.opened(source, kept_rows.opened(params, prepared, folder))


def write_untrained(model_dir: Path, settings: Iterable[SystemSettings], depth: int) -> None:
    """Leave with an evaluation what is needed to open the systems that no stage trains."""
    said = {
        system.name: {
            "kind": type(system).__name__,
            "settings": dataclasses.asdict(system),
            "depth": depth,
        }
        for system in settings
    }
    path = model_dir / EVALUATION / SYSTEMS
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(said, indent=1), encoding="utf-8")
    partial.replace(path)


def untrained(model_dir: Path) -> Mapping[str, Any]:
    """What `write_untrained` wrote, by name; {} where nothing was evaluated, or by a version that
    left no such file. While an evaluation is made again, the last whole one counts."""
    for folder in records.finished(model_dir, EVALUATION, records.RECORD):
        if not (folder / SYSTEMS).is_file():
            return {}
        with contextlib.suppress(FileNotFoundError), kept.reading(folder / SYSTEMS) as path:
            return dict(kept.read_json(path))
    return {}


def planned_by(plan: Plan) -> SystemSettings:
    """The settings of the system `planned`, with a plan."""
    return planned.PlannedSystem.of_plans[type(plan)]("planned", plan.once_trained())


def settings_of(said: Mapping[str, Any]) -> SystemSettings:
    """The settings of a system that no stage trains, from what `untrained` says of it.

    Raises ValueError for a kind that nothing which was imported defines.
    """
    if said["kind"] not in SystemSettings.kinds:
        raise ValueError(
            f"got a system of kind {said['kind']!r}, expected one of "
            f"{', '.join(SystemSettings.kinds)}: import the module that defines it"
        )
    return restored(SystemSettings.kinds[said["kind"]], said["settings"])
