"""A study of a corpus that grows.

    MODEL_DIR/seed-0/base       the experiment on the first part, whose index grows
    MODEL_DIR/seed-0/<label>    a copy of it, whose student is refreshed at each step
    MODEL_DIR/seed-0/dense      a dense retriever, whose index grows
    MODEL_DIR/seed-0/rebuilt-4  the experiment with all passages until step 4
    MODEL_DIR/seed-0/values     what was measured: a file for each way to answer and step

What is there is not made again, so a study that was killed goes on where it was.
"""

from __future__ import annotations

import dataclasses
import logging
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dgr_jax import evaluation
from dgr_jax.analysis import costs
from dgr_jax.corpora.subset import Subset
from dgr_jax.corpora.types import Passage
from dgr_jax.experiments.generative import Experiment
from dgr_jax.experiments.living_study import LivingStudy
from dgr_jax.experiments.refresh import Refresh
from dgr_jax.model_dir import writer_lock
from dgr_jax.model_dir.measurements import read_kept, write_kept
from dgr_jax.retrieval import self_hits
from dgr_jax.retrieval.living import update
from dgr_jax.retrieval.retriever import Retriever
from dgr_jax.settings import describe, fingerprint
from dgr_jax.stages import judged, pipeline, refreshed
from dgr_jax.studies.grid import slug, written

logger = logging.getLogger(__name__)

BASE, DENSE, REBUILT = "base", "dense", "rebuilt"

Load = Callable[[Sequence[str], bool], Any]


@dataclass(frozen=True)
class Way:
    """A way to answer: name in the table; folder: its MODEL_DIR under a seed; system: None is the
    refreshed student of each step; steps: after which it is measured; label: of the refreshed
    student, by default the name."""

    name: str
    folder: str
    system: str | None
    steps: tuple[int, ...]
    label: str = ""

    @property
    def is_refreshed(self) -> bool:
        """Whether a student is trained at each step."""
        return self.folder not in (BASE, DENSE, REBUILT)

    @property
    def student(self) -> str:
        """The label of the refreshed student."""
        return self.label or self.name


class Living:
    """A study in a folder.

    load: flags of `train` -> the experiment that they describe; True: it is also written into its
      folder. bindings: of all experiments, over those of the study. load_refresh: flags of `update
      --refresh` -> its settings.
    """

    def __init__(
        self,
        study: LivingStudy,
        model_dir: str,
        load: Load,
        bindings: Sequence[str] = (),
        search_paths: str = "",
        load_refresh: Callable[[Sequence[str]], Refresh] | None = None,
    ) -> None:
        self.study, self.folder, self._load = study, Path(model_dir), load
        self._load_refresh = load_refresh
        paths = [f"--gin_search_paths={search_paths}"] if search_paths else []
        self._given = *paths, *(f"--gin.{b.replace(' = ', '=', 1)}" for b in bindings)
        self._loaded: dict[tuple[str, ...], Any] = {}
        self._made: set[str] = set()

    def ways(self) -> list[Way]:
        """All ways to answer, in the order of the table."""
        study, every = self.study, tuple(range(self.study.parts + 1))
        ways = [Way(f"{name}, index only", BASE, name, every) for name in study.systems]
        for label in study.refreshed:
            ways.append(Way(label, slug(label), None, every))
            others = ((f"{label}, {name}", name) for name in study.refreshed_systems)
            ways += [Way(name, slug(label), system, every, label) for name, system in others]
        if study.dense_gin_files:
            ways.append(Way("dense, index only", DENSE, DENSE, every))
        if study.rebuilt:
            ways.append(Way(REBUILT, REBUILT, self.best(study.seeds[0]), tuple(study.rebuilt)))
        return ways

    def best(self, seed: int) -> str:
        """The best system that the experiment trains, from which students are refreshed."""
        return self.experiment(seed, BASE, 0).systems[-1]

    def experiment(self, seed: int, name: str, step: int, *, keep: bool = False) -> Any:
        """An experiment with the passages until a step. keep: also write it into its folder."""
        study, dense = self.study, name == DENSE
        files = study.dense_gin_files if dense else study.gin_files
        own = study.dense_bindings if dense else study.bindings
        bound = own | {
            "Subset.size": study.sizes[step],
            "Subset.core": study.sizes[0],
            "SEED": seed,
        }
        folder = self.of(seed, f"{name}-{step}" if name == REBUILT else name)
        flags = (
            *(f"--gin_file={file}" for file in files),
            *(f"--gin.{key}={written(value)}" for key, value in bound.items()),
            *self._given,
            f"--model_dir={folder}",
        )
        if keep or flags not in self._loaded:
            self._loaded[flags] = self._load(flags, keep)
            writer_lock.release(folder)
        return self._loaded[flags]

    def of(self, seed: int, name: str) -> Path:
        """A folder under a seed."""
        return self.folder / f"seed-{seed}" / name

    def check(self) -> None:
        """Raises ValueError where the study cannot be."""
        experiment = self.experiment(self.study.seeds[0], BASE, 0)
        if not isinstance(experiment.collection, Subset):
            raise ValueError(
                f"LivingStudy.bindings: got the collection {type(experiment.collection).__name__}, "
                "expected 'COLLECTION': '@Subset()', whose size the study sets"
            )
        if unknown := [name for name in self.study.systems if name not in experiment.measured]:
            raise ValueError(
                f"LivingStudy.systems: got {unknown[0]!r}, expected some of "
                f"{', '.join(experiment.measured)}"
            )

    def outstanding(self) -> Iterator[tuple[int, Way, int]]:
        """(seed, way, step) of what was not measured yet, the earlier steps first."""
        for seed in self.study.seeds:
            for step in range(self.study.parts + 1):
                for way in self.ways():
                    if step in way.steps and not self._kept(seed, way, step):
                        yield seed, way, step

    def run(self) -> None:
        """Makes and measures what is outstanding."""
        for seed, way, step in list(self.outstanding()):
            logger.info("study: seed %d, %s, step %d", seed, way.name, step)
            measured = self._measured(seed, way, step)
            place = self._place(seed, way, step)
            place.parent.mkdir(exist_ok=True)
            write_kept(place, measured | {"asked": self._asked(seed, way)})

    def values(self, seed: int, way: Way) -> dict[str, np.ndarray]:
        """Measure -> f64 [steps, parts], NaN where nothing is measured."""
        size = self.study.parts + 1
        table = {name: np.full((size, size), np.nan) for name in self.study.measures}
        for step in way.steps:
            kept = self._kept(seed, way, step)
            for part, values in enumerate(kept.get("parts", ())):
                for name in self.study.measures:
                    table[name][step, part] = values[name]
        return table

    def flops(self, seed: int, way: Way) -> list[float]:
        """Training FLOPs of each step that was measured."""
        kept = (self._kept(seed, way, step) for step in way.steps)
        return [float(of["training_flops"]) for of in kept if of]

    def _place(self, seed: int, way: Way, step: int) -> Path:
        return self.of(seed, "values") / f"{slug(way.name)}-{step}.json"

    def _kept(self, seed: int, way: Way, step: int) -> dict[str, Any]:
        """What was measured; {} where nothing was. Raises ValueError for what was measured with
        other settings of the study."""
        place = self._place(seed, way, step)
        kept: dict[str, Any] = read_kept(place)
        if kept and kept.get("asked") != self._asked(seed, way):
            raise ValueError(
                f"{place}: was measured with other settings of the study, expected the same; give "
                f"another --model_dir, or remove {self.of(seed, '')}"
            )
        return kept

    def _asked(self, seed: int, way: Way) -> str:
        """What tells the settings that a value depends on from others."""
        study = self.study
        apart = ("seeds", "systems", "refreshed", "rebuilt", "dense_gin_files", "dense_bindings")
        own = {k: v for k, v in describe(study).items() if k not in apart}
        dense = way.folder == DENSE and (study.dense_gin_files, study.dense_bindings)
        return fingerprint(
            [own, study.refreshed.get(way.student), describe(dense), self._given, seed]
        )

    def _measured(self, seed: int, way: Way, step: int) -> dict[str, Any]:
        """What a way answers after a step, and what its training took."""
        system = way.system or self.best(seed)
        if way.is_refreshed and step == 0:  # as whoever is to be refreshed
            same = (w for w in self.ways() if (w.folder, w.system) == (BASE, system))
            if (alike := next(same, None)) and (kept := self._kept(seed, alike, 0)):
                return kept
        experiment = self._trained(seed, way, step)
        folder = Path(experiment.model_dir)
        flops = 0.0
        if way.folder == REBUILT or step == 0:
            trained = experiment.made_of(system)
            flops = costs.training_flops(experiment, trained[-1]) if trained else 0.0
        if way.is_refreshed:
            folder = self.of(seed, way.folder)
            self._copied(Path(experiment.model_dir), folder)
        if way.folder != REBUILT:
            self._grown(seed, folder, step)
        if way.is_refreshed and step:
            settings = self._refresh(seed, way, folder)
            student = refreshed.refresh(settings)
            system = way.system or student.name
            flops = costs.refresh_flops(student, settings.training)
        parts = self._of_parts(seed, folder, system, experiment, step)
        return {"parts": parts, "training_flops": flops}

    def _refresh(self, seed: int, way: Way, folder: Path) -> Refresh:
        """How a student is refreshed."""
        assert self._load_refresh is not None  # as the study runs
        bound = {"SEED": seed} | self.study.refreshed[way.student]
        files = (f"--gin_file={file}" for file in self.study.refresh_gin_files)
        flags = (f"--gin.{key}={written(value)}" for key, value in bound.items())
        return self._load_refresh([*files, *flags, f"--model_dir={folder}"])

    def _trained(self, seed: int, way: Way, step: int) -> Any:
        """The experiment that a way begins from, with all that it trains."""
        name = way.folder if way.folder in (DENSE, REBUILT) else BASE
        step = step if name == REBUILT else 0
        experiment = self.experiment(seed, name, step)
        if experiment.model_dir not in self._made:
            pipeline.run(self.experiment(seed, name, step, keep=True))
            self._made.add(experiment.model_dir)
        return experiment

    def _copied(self, base: Path, folder: Path) -> None:
        """Copies a MODEL_DIR without its index, where that was not done."""
        if folder.is_dir():
            return
        partial = folder.with_name(f"{folder.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        shutil.copytree(base, partial, ignore=shutil.ignore_patterns("index", ".lock"))
        partial.rename(folder)

    def _grown(self, seed: int, folder: Path, step: int) -> None:
        """Lets the index answer that has the parts until a step, and adds those that are not
        there."""
        versions = update.versions(folder)
        newest = max([version.version for version in versions.all()], default=0)
        if newest:
            versions.switch(min(step, newest))
        for now in range(newest + 1, step + 1):
            update.update(versions, self.part(seed, now))

    def part(self, seed: int, step: int) -> list[Passage]:
        """The passages of a part."""
        collection = self.experiment(seed, BASE, 0).collection
        sizes = self.study.sizes
        before = _pids(collection, sizes[step - 1]) if step else set()
        whole = dataclasses.replace(collection, size=sizes[step])
        return [passage for passage in whole.passages() if passage.pid not in before]

    def questions(self, seed: int, part: int) -> tuple[dict[str, str], dict[str, dict[str, int]]]:
        """(qid -> text, qid -> pid -> grade) of the questions that passages of a part answer, and
        none of another part."""
        experiment: Experiment = self.experiment(seed, BASE, 0)
        collection: Any = experiment.collection
        least, study = experiment.evaluate.min_relevance, self.study
        own = {passage.pid for passage in self.part(seed, part)}
        texts: dict[str, str] = {}
        qrels: dict[str, dict[str, int]] = {}
        for split in (*study.splits, *(study.unlearned if part else ())):
            grades: dict[str, dict[str, int]] = {}
            for qrel in collection.collection.qrels(split):
                if qrel.relevance >= least:
                    grades.setdefault(qrel.qid, {})[qrel.pid] = qrel.relevance
            asked = {qid: of for qid, of in grades.items() if of.keys() <= own}
            for query in collection.collection.queries(split):
                if query.qid in asked:
                    texts[query.qid], qrels[query.qid] = query.text, asked[query.qid]
        qids = sorted(texts)
        if study.max_questions and len(qids) > study.max_questions:
            drawn = np.random.default_rng(0).permutation(len(qids))[: study.max_questions]
            qids = [qids[i] for i in sorted(drawn)]
        return {qid: texts[qid] for qid in qids}, {qid: qrels[qid] for qid in qids}

    def _of_parts(
        self, seed: int, folder: Path, system: str, experiment: Any, step: int
    ) -> list[dict[str, float]]:
        """The measures of each part that is there after a step, by a system of a MODEL_DIR; as in
        an evaluation, questions that are passages do not find themselves."""
        parts = [self.questions(seed, part) for part in range(step + 1)]
        asked = {qid: text for texts, _ in parts for qid, text in texts.items()}
        grades = {qid: of for _, qrels in parts for qid, of in qrels.items()}
        there = _pids(self.experiment(seed, BASE, 0).collection, self.study.sizes[step])
        own = judged.self_hits(experiment.prepare, asked, there, grades)
        search = experiment.evaluate.search
        changed = _changed(search, search.deeper()) if own else {}
        if system in experiment.untrained:
            changed = {name: changed[name] for name in changed.keys() & {"depth"}}
        run = Retriever.load(folder, system=system, **changed).run(asked)
        if own:
            run = self_hits.without(run, own, search.depth)
        least, measures = experiment.evaluate.min_relevance, self.study.measures
        measured = []
        for part, (_, qrels) in enumerate(parts):
            if not qrels:
                raise ValueError(
                    f"LivingStudy.splits: got no question that part {part} answers, expected one "
                    "or more: larger parts (LivingStudy.parts), or other splits"
                )
            values = evaluation.evaluate(run, qrels, measures, min_relevance=least)
            measured.append({**values, "questions": float(len(qrels))})
        return measured


def _changed(before: Any, after: Any) -> dict[str, Any]:
    """The settings that differ, by name, as they are after."""
    names = (setting.name for setting in dataclasses.fields(after))
    now = {name: getattr(after, name) for name in names}
    return {name: value for name, value in now.items() if value != getattr(before, name)}


def _pids(collection: Subset, size: int) -> set[str]:
    part = dataclasses.replace(collection, size=size)
    return {passage.pid for passage in part.passages()}
