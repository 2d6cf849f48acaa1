"""A study: a grid of experiments, and one table of what came out.

    MODEL_DIR/stages/<stage>-<fingerprint>   every stage that any experiment needs, made once
    MODEL_DIR/runs/<experiment>/<stage>      links to its stages, so that it is a MODEL_DIR itself
    MODEL_DIR/compiled/<host>                programs that several experiments run, compiled once
    MODEL_DIR/table.csv table.md *.png       what came out
    MODEL_DIR/beams.csv beams.md beams.png   with Study.beams, what beam search loses

Experiments run one after another, each in a process of its own.
"""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from dgr_jax.experiments.generative import Experiment
from dgr_jax.experiments.study import Study
from dgr_jax.model_dir import records, writer_lock
from dgr_jax.settings import fingerprint
from dgr_jax.stages import evaluate, pipeline


@dataclass(frozen=True)
class Run:
    """One experiment of a study."""

    labels: dict[str, str]
    seed: int
    flags: tuple[str, ...]
    folder: Path
    systems: tuple[str, ...]


class Grid:
    """The experiments of a study, and where their stages lie.

    load: flags of `train` -> the experiment that they describe; True: it is also written into its
      folder. bindings: over those of the study.
    """

    def __init__(
        self,
        study: Study,
        model_dir: str,
        load: Callable[[Sequence[str], bool], Experiment],
        bindings: Sequence[str] = (),
        search_paths: str = "",
    ) -> None:
        self.study, self.folder = study, Path(model_dir)
        self._load_flags = load
        self._experiments: dict[Path, Experiment] = {}
        self._given = tuple(f"--gin.{b.replace(' = ', '=', 1)}" for b in bindings)
        self._paths = (f"--gin_search_paths={search_paths}",) if search_paths else ()

    @cached_property
    def runs(self) -> list[Run]:
        """Every experiment, point by point."""
        runs = []
        for labels, bindings in self.study.points():
            for seed in self.study.seeds:
                of_all = {"gin_files": self.study.gin_files, "systems": self.study.systems}
                bound = {**of_all, **bindings, "SEED": seed}
                files, systems = (bound.pop(name) for name in of_all)
                flags = (
                    *(f"--gin_file={file}" for file in files),
                    *self._paths,
                    *(f"--gin.{k}={written(v)}" for k, v in bound.items()),
                    *self._given,
                )
                name = "-".join([*(slug(f"{k}={v}") for k, v in labels.items()), f"seed={seed}"])
                folder = self.folder / "runs" / name
                runs.append(Run(labels, seed, flags, folder, systems))
        if len({run.folder for run in runs}) < len(runs):
            raise ValueError("Study.axes: got labels that make the same name, expected others")
        return runs

    def experiment(self, run: Run) -> Experiment:
        """What the gin files and bindings of a run describe; nothing is written."""
        if run.folder not in self._experiments:
            self._experiments[run.folder] = self._load(run)
        return self._experiments[run.folder]

    def _load(self, run: Run, *, keep: bool = False) -> Experiment:
        """keep: also write it into the folder of the run."""
        flags = [*run.flags, f"--model_dir={run.folder}"]
        experiment = self._load_flags(flags, keep)
        if not set(experiment.measured) & set(run.systems):
            raise ValueError(
                f"Study.systems: got {run.systems} for {shown(run.labels)}, expected some of "
                f"{experiment.measured}"
            )
        return experiment

    def check(self) -> None:
        """Raises ValueError where an experiment cannot be, or a system is one of none of them."""
        known = dict.fromkeys(name for run in self.runs for name in self.experiment(run).measured)
        unknown = [name for run in self.runs for name in run.systems if name not in known]
        if unknown:
            raise ValueError(
                f"Study.systems: got {unknown[0]!r}, expected some of {', '.join(known)}"
            )

    def state(self, run: Run) -> dict[str, tuple[bool, Path]]:
        """stage -> (whether it is done, where it is kept)."""
        state = {}
        for stage, settings in pipeline.settings_of(self.experiment(run)).items():
            kept = self.kept_in(stage, settings)
            state[stage] = records.is_done(kept, settings), kept
        return state

    def kept_in(self, stage: str, settings: Any) -> Path:
        """Where a stage is kept, which an older version may have named by fewer settings."""
        stages = self.folder / "stages"
        kept = stages / f"{stage}-{fingerprint(settings)}"
        older = () if kept.exists() else sorted(stages.glob(f"{stage}-*"))
        same = [o for o in older if records.is_made_from(records.read_record(o), settings)]
        return max(same, key=lambda o: records.is_done(o, settings), default=kept)

    def link(self, run: Run) -> None:
        """Links the stages of a run to where they are kept, and makes its folder a MODEL_DIR."""
        for stage, settings in pipeline.settings_of(self.experiment(run)).items():
            kept, link = self.kept_in(stage, settings), run.folder / stage
            if not kept.exists():
                kept.mkdir(parents=True)
                mark = fingerprint(settings)
                records.write_record(kept, status="running", fingerprint=mark, settings=settings)
            link.parent.mkdir(parents=True, exist_ok=True)
            target = os.path.relpath(kept, run.folder)
            if link.is_symlink() and os.readlink(link) != target:
                link.unlink()
            if not link.is_symlink():
                link.symlink_to(target, target_is_directory=True)
        self._load(run, keep=True)
        writer_lock.release(run.folder)

    def finished(self) -> Iterator[list[Run]]:
        """The runs of each point of the grid that is finished under every seed."""
        for _, group in itertools.groupby(self.runs, key=lambda run: run.labels):
            runs = list(group)
            if all(self.state(run)[evaluate.STAGE.name][0] for run in runs):
                yield runs


def written(value: Any) -> str:
    """A value as --gin.NAME=VALUE takes it."""
    return value if isinstance(value, str) else repr(value)


def shown(labels: Mapping[str, str]) -> str:
    return ", ".join(f"{axis} = {label}" for axis, label in labels.items()) or "the experiment"


def slug(text: str) -> str:
    return re.sub(r"[^\w.=+-]+", "_", text).strip("_")
