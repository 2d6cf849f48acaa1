"""A study: a grid of experiments, and one table of what came out.

    MODEL_DIR/stages/<stage>-<fingerprint>   every stage that any experiment needs, made once
    MODEL_DIR/runs/<experiment>/<stage>      links to its stages, so that it is a MODEL_DIR itself
    MODEL_DIR/compiled/<host>                programs that several experiments run, compiled once
    MODEL_DIR/table.csv table.md *.png       what came out
    MODEL_DIR/beams.csv beams.md beams.png   with Study.beams, what beam search loses

Experiments run one after another, each in a process of its own.
"""

from __future__ import annotations

import csv
import itertools
import logging
import os
import platform
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np

from dgr_jax import evaluation, interrupts, plots, processes
from dgr_jax.analysis import beam_losses, costs
from dgr_jax.display import harmless
from dgr_jax.experiments.generative import Experiment
from dgr_jax.experiments.study import Study, choices
from dgr_jax.model_dir import records, writer_lock
from dgr_jax.model_dir.measurements import read_kept, write_kept
from dgr_jax.retrieval import kinds
from dgr_jax.settings import describe, fingerprint
from dgr_jax.stages import pipeline
from dgr_jax.stages.evaluate import first_test_split
from dgr_jax.studies import dependent
from dgr_jax.studies.rows import (
    Row,
    check_fair,
    fairness,
    interval,
    markdown,
    values_of,
)

logger = logging.getLogger(__name__)

LOG = "log.txt"  # of each run, what its experiment said


def _is_number(label: str) -> bool:
    try:
        float(label)
    except ValueError:
        return False
    return True


@dataclass(frozen=True)
class Run:
    """One experiment of a study."""

    labels: dict[str, str]
    seed: int
    flags: tuple[str, ...]
    folder: Path
    systems: tuple[str, ...]


class _Planned(NamedTuple):
    """A stage of a run, where it is kept, whether it trains, its training FLOPs where they are
    known, and whether it is done."""

    run: Run
    stage: str
    kept: Path
    trains: bool
    flops: float | None
    done: bool

    @property
    def work(self) -> list[str]:
        """Its training FLOPs in words; none of a stage that does not train."""
        if not self.trains:
            return []
        return ["? PFLOP" if self.flops is None else f"{self.flops / 1e15:.3g} PFLOP"]

    @property
    def kind(self) -> tuple[str, bool]:
        """Stages of one kind take times in proportion to their FLOPs, or the same."""
        return self.stage, self.flops is not None


class Runner:
    """A study and where it is written.

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
        made = []
        for labels, bindings in self.study.points():
            for seed in self.study.seeds:
                of_all = {"gin_files": self.study.gin_files, "systems": self.study.systems}
                bound = {**of_all, **bindings, "SEED": seed}
                files, systems = (bound.pop(name) for name in of_all)
                flags = (
                    *(f"--gin_file={file}" for file in files),
                    *self._paths,
                    *(f"--gin.{k}={_written(v)}" for k, v in bound.items()),
                    *self._given,
                )
                name = "-".join([*(_slug(f"{k}={v}") for k, v in labels.items()), f"seed={seed}"])
                folder = self.folder / "runs" / name
                made.append(Run(labels, seed, flags, folder, systems))
        if len({run.folder for run in made}) < len(made):
            raise ValueError("Study.axes: got labels that make the same name, expected others")
        return made

    def experiment(self, run: Run) -> Experiment:
        """What the gin files and bindings of a run describe; nothing is written."""
        if run.folder not in self._experiments:
            self._experiments[run.folder] = self._load(run)
        return self._experiments[run.folder]

    def _load(self, run: Run, *, keep: bool = False) -> Experiment:
        """keep: also write it into the folder of the run."""
        flags = [*run.flags, f"--model_dir={run.folder}"]
        made = self._load_flags(flags, keep)
        if not set(made.measured) & set(run.systems):
            raise ValueError(
                f"Study.systems: got {run.systems} for {_shown(run.labels)}, expected some of "
                f"{made.measured}"
            )
        return made

    def check(self) -> None:
        """Raises ValueError where an experiment cannot be, or a system is one of none of them."""
        known = dict.fromkeys(name for run in self.runs for name in self.experiment(run).measured)
        asked = dict.fromkeys(name for run in self.runs for name in run.systems)
        if unknown := [name for name in asked if name not in known]:
            raise ValueError(
                f"Study.systems: got {unknown[0]!r}, expected some of {', '.join(known)}"
            )

    def run(self) -> list[str]:
        """Runs what has not been run; -> a line for each experiment that failed.

        Raises before anything starts where one of them cannot be. SIGTERM stops the experiment that
        runs, and ends this process with the status of one told to stop.
        """
        self.check()
        failures = []
        for number, run in enumerate(self.runs, start=1):
            self._link(run)
            if all(done for done, _ in self._state(run).values()):
                continue
            logger.info("study: %d/%d %s", number, len(self.runs), run.folder.name)
            if why := self._train(run):
                failures.append(f"{run.folder.name} failed: {why} ({run.folder / LOG})")
                logger.error("study: %s", failures[-1])
        return failures

    def _train(self, run: Run) -> str:
        """Runs one experiment, which ends when this process does; -> why it failed, or blank."""
        # Of a host: another's processor may lack instructions of what was compiled here.
        compiled = self.folder / "compiled" / platform.node()
        shared = {"JAX_COMPILATION_CACHE_DIR": str(compiled)}
        command = [sys.executable, "-m", "dgr_jax.train", *run.flags]
        with (run.folder / LOG).open("a", encoding="utf-8") as output:
            begins = output.tell()
            status = _status([*command, f"--model_dir={run.folder}"], output, shared)
        if status in (processes.EXIT_STOPPED, interrupts.EXIT_INTERRUPTED):
            sys.exit(status)
        with (run.folder / LOG).open("rb") as log:
            log.seek(begins)
            return _reason(log.read().decode("utf-8", "replace"), status)

    def _state(self, run: Run) -> dict[str, tuple[bool, Path]]:
        """stage -> (whether it is done, where it is kept)."""
        state = {}
        for stage, settings in pipeline.settings_of(self.experiment(run)).items():
            kept = self._kept(stage, settings)
            state[stage] = records.is_done(kept, settings), kept
        return state

    def _kept(self, stage: str, settings: Any) -> Path:
        """Where a stage is kept, which an older version may have named by fewer settings."""
        stages = self.folder / "stages"
        kept = stages / f"{stage}-{fingerprint(settings)}"
        older = () if kept.exists() else sorted(stages.glob(f"{stage}-*"))
        same = [o for o in older if records.is_made_from(records.read_record(o), settings)]
        return max(same, key=lambda o: records.is_done(o, settings), default=kept)

    def _link(self, run: Run) -> None:
        """Links the stages of a run to where they are kept, and makes its folder a MODEL_DIR."""
        for stage, settings in pipeline.settings_of(self.experiment(run)).items():
            kept, link = self._kept(stage, settings), run.folder / stage
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

    def show_plan(self) -> None:
        """Prints the experiments, what of them is still to be made, and what that costs.

        PFLOP: of training, by `costs.expected_flops`. Times are those of finished stages of the
        same kind in this study, of training for as many FLOPs; '?' where there is none.
        """
        self.check()
        stages = list(self._stages())
        seconds: dict[tuple[str, bool], list[float]] = {}
        for one in stages:
            if one.done:
                took = records.read_record(one.kept)["seconds"]
                seconds.setdefault(one.kind, []).append(took / (one.flops or 1))
        total, unknown, missing = 0.0, 0, {run.folder: [] for run in self.runs}
        for one in (one for one in stages if not one.done):
            rates = seconds.get(one.kind)
            took = np.mean(rates) * (one.flops or 1) if rates else None
            told = [one.stage, *one.work, f"{took:.0f} s" if rates else "?"]
            missing[one.run.folder].append(" ".join(told))
            total, unknown = total + (took or 0.0), unknown + (not rates)
        for folder, told in missing.items():
            sys.stdout.write(harmless(f"{folder.name}: {', '.join(told) or 'done'}\n"))
        flops = sum(one.flops or 0.0 for one in stages if not one.done)
        more = f" and {unknown} stages of unknown time" if unknown else ""
        sys.stdout.write(
            f"{len(self.runs)} experiments; {flops / 1e15:.3g} PFLOP of training, "
            f"{total / 60:.0f} minutes{more} to go\n"
        )
        if uncounted := sum(one.trains and one.flops is None for one in stages if not one.done):
            sys.stdout.write(
                f"not among them: the PFLOP of {uncounted} training stages, {costs.UNCOUNTED}\n"
            )

    def _stages(self) -> Iterator[_Planned]:
        """Every stage, once, with the first run that needs it."""
        seen = set()
        for run in self.runs:
            experiment = self.experiment(run)
            flops = costs.expected_flops(experiment)
            trained = {
                name for system in experiment.systems for name in experiment.training(system)
            }
            for stage, settings in pipeline.settings_of(experiment).items():
                kept = self._kept(stage, settings)
                if kept not in seen:
                    seen.add(kept)
                    done = records.is_done(kept, settings)
                    yield _Planned(run, stage, kept, stage in trained, flops.get(stage), done)

    def finished(self) -> Iterator[list[Run]]:
        """The runs of each point of the grid that is finished under every seed."""
        for _, group in itertools.groupby(self.runs, key=lambda run: run.labels):
            runs = list(group)
            if all(self._state(run)["evaluate"][0] for run in runs):
                yield runs

    def rows(self) -> list[Row]:
        """The rows that are finished under every seed, each stage of a system once."""
        rows: dict[Any, Row] = {}
        for group in self.finished():
            labels, states = group[0].labels, [self._state(run) for run in group]
            for run in group:
                self._link(run)
            evaluate = self.experiment(group[0]).evaluate
            for system in group[0].systems:
                if system not in self.experiment(group[0]).measured:
                    continue
                trained = experiment.made_of(system)
                asked = fingerprint(describe(evaluate)) if trained else self._asked(group[0])
                made_of = (asked, *(state[name][1] for name in trained for state in states))
                made_of += (system,) if system in experiment.untrained else ()
                named = {**labels, "system": system}
                if made_of in rows:
                    rows[made_of].again.append(named)
                else:
                    rows[made_of] = self._row(named, group)
        return list(rows.values())

    def _asked(self, run: Run) -> str:
        """What BM25 is asked, and of what: the same in experiments of every kind."""
        experiment = self.experiment(run)
        split = self.study.split or first_test_split(experiment)
        asked = (experiment.evaluate.max_queries, experiment.evaluate.min_relevance)
        rules = experiment.prepare.rules_of_measures
        return fingerprint([describe(experiment.collection), split, *asked, *rules])

    def _row(self, labels: dict[str, str], runs: Sequence[Run]) -> Row:
        values, fair, cost = [], {}, []
        measures = self.study.measures
        for run in runs:
            experiment = self.experiment(run)
            split = self.study.split or first_test_split(experiment)
            values.append(values_of(experiment, run.folder, labels["system"], split, measures))
            fair = fairness(experiment, run.folder, labels["system"], split)
            cost.append(self._costs(experiment, run.folder, labels["system"]))
        return Row(labels, values, fair, cost)

    def _costs(self, experiment: Experiment, folder: Path, system: str) -> dict[str, float]:
        """What `dgr_jax.analysis.costs` measures, once: it is kept beside the runs."""
        trained = experiment.made_of(system)
        if not trained or not (self.study.costs or self.study.drift):
            return {}
        path = folder / "evaluate" / f"costs-{system}.json"
        asked = {"split": self.study.split, "drift": self.study.drift}
        kept = read_kept(path)
        if kept.get("asked") != asked:
            logger.info("study: costs of %s, %s", folder.name, system)
            found = costs.measure(experiment, system, self.study.split, self.study.drift)
            kept = {"asked": asked, "found": found}
            write_kept(path, kept)
        found = kept["found"]
        return found if self.study.costs else {"drift": found["drift"]}

    def report(self) -> None:
        """Writes table.csv, table.md and plots, and prints the table.

        Raises ValueError where no experiment is finished, or rows are not comparable.
        """
        rows = self.rows()
        if not rows:
            raise ValueError(f"{self.folder}: no experiment of the study is finished")
        check_fair(rows, self.study.may_differ, self.study.apart)
        baselines = [self._baseline(row, rows) for row in rows]
        if self.study.baseline and not any(baselines):
            logger.warning(
                "study: no row to test against, Study.baseline %s", _shown(self.study.baseline)
            )
        table = [self._cells(*pair) for pair in zip(rows, baselines, strict=True)]
        self._write_table("table", table)
        for axis, values in self.study.axes.items():
            if all(_is_number(label) for label, _ in choices(axis, values)):
                self._plot(axis, rows)
        if self.study.beams:
            self._report_limits()

    def _report_limits(self) -> None:
        """Writes beams.csv, beams.md and beams.png, and prints the table: what beam search of each
        width loses, and what it could find at best."""
        table, series = [], {}
        for labels, group in itertools.groupby(self.runs, key=lambda run: run.labels):
            runs = [run for run in group if self._state(run)["evaluate"][0]]
            runs = [run for run in runs if kinds.TRAINED[self.experiment(run).kind].writes]
            known = self.experiment(runs[0]).systems if runs else ()
            systems = [s for s in runs[0].systems if s in known] if runs else []
            for system in systems:
                row = {**labels, "system": system}
                asked = (system, self.study.beams, self.study.split, self.study.spread)
                found = [beam_losses.measured(self.experiment(r), r.folder, *asked) for r in runs]
                for losses in zip(*found, strict=True):
                    values = [loss.values() for loss in losses]
                    means = {name: interval(Row(row, values, {}), name) for name in values[0]}
                    cells = {name: round(mean, 4) for name, (mean, _, _) in means.items()}
                    table.append({**row, "beams": losses[0].num_beams, **cells})
                    line = series.setdefault(", ".join(row.values()), [])
                    line.append((float(losses[0].num_beams), means))
        if not table:
            raise ValueError("Study.beams: got no student that writes identifiers, expected one")
        self._write_table("beams", table)
        names = list(next(iter(series.values()))[0][1])
        plots.measures_over(series, "beams", names, self.folder / "beams.png")

    def _write_table(self, name: str, table: Sequence[Mapping[str, Any]]) -> None:
        with (self.folder / f"{name}.csv").open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, table[0].keys())
            writer.writeheader()
            writer.writerows(
                {key: harmless(v) if isinstance(v, str) else v for key, v in row.items()}
                for row in table
            )
        text = markdown(table)
        (self.folder / f"{name}.md").write_text(text, encoding="utf-8")
        sys.stdout.write(text)

    def _baseline(self, row: Row, rows: Sequence[Row]) -> Row | None:
        if not self.study.baseline:
            return None
        wanted = row.labels | self.study.baseline
        found = next((one for one in rows if wanted in (one.labels, *one.again)), None)
        return None if found is row else found

    def _cells(self, row: Row, baseline: Row | None) -> dict[str, Any]:
        cells: dict[str, Any] = {**row.labels, "seeds": len(row.values)}
        for measure in self.study.measures:
            found = row.of(measure)
            cells[measure] = round(float(found.mean()), 4)
            if len(found) > 1:
                cells[f"{measure} sd"] = round(float(found.std(ddof=1)), 4)
            if self.study.baseline:
                a, b = (np.mean([v[measure] for v in r.values], 0) for r in (row, baseline or row))
                compared = evaluation.compare(measure, a, b)
                cells[f"{measure} p"] = "" if baseline is None else round(compared.p_value, 4)
        return cells | self._cost_cells(row)

    def _cost_cells(self, row: Row) -> dict[str, Any]:
        """Means over the seeds, to four digits; blank for BM25, which has no student."""
        names = [name for name in costs.COLUMNS if self.study.costs and name != "drift"]
        names += ["drift"] * bool(self.study.drift)
        means = {name: [found[name] for found in row.costs if found] for name in names}
        return {n: float(f"{np.mean(found):.4g}") if found else "" for n, found in means.items()}

    def _named(self, axis: str, label: str) -> str:
        """A label that says what it is of: values do not, names do."""
        is_value = axis in self.study.axes and not isinstance(self.study.axes[axis], Mapping)
        return f"{axis.rpartition('.')[-1]} {label}" if is_value else label

    def _plot(self, axis: str, rows: Sequence[Row]) -> None:
        """One panel a measure: its mean over an axis of numbers, a line for each of the others."""
        series: dict[str, list[tuple[float, dict[str, plots.Interval]]]] = {}
        for row in rows:
            alike = [row.labels, *row.again]
            rest = [(k, v) for k, v in row.labels.items() if k != axis]
            told = (self._named(k, v) for k, v in rest if all(one[k] == v for one in alike))
            found = {measure: interval(row, measure) for measure in self.study.measures}
            line = series.setdefault(", ".join(told), [])
            line.extend((float(value), found) for value in dict.fromkeys(o[axis] for o in alike))
        plots.measures_over(series, axis, self.study.measures, self.folder / f"{_slug(axis)}.png")


def _status(command: Sequence[str], output: IO[str], settings: Mapping[str, str]) -> int:
    """Runs a command to its end, which is that of this process at the latest, with environment
    variables that this process does not set.

    SIGTERM and Ctrl-C are handed on to it, and make the status that of a process told to stop.
    """
    told: list[int] = []
    environment = {**settings, **os.environ}
    bound = dependent.command(command)
    with subprocess.Popen(bound, stdout=output, stderr=output, env=environment) as child:

        def stop(number: int, _: Any) -> None:
            told.append(number)
            child.send_signal(number)

        heard = [signal.SIGTERM, signal.SIGINT]
        if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
            heard.remove(signal.SIGINT)
        before = {number: signal.signal(number, stop) for number in heard}
        try:
            with interrupts.held("waits for the experiment, which saves its last step"):
                status = child.wait()
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
    if told:
        return interrupts.EXIT_INTERRUPTED if signal.SIGINT in told else processes.EXIT_STOPPED
    return status


def _reason(log: str, status: int) -> str:
    """Why an experiment failed, from what it said; blank where it did not."""
    if not status:
        return ""
    if status < 0:
        return f"ended by {signal.Signals(-status).name}"
    lines = [line for line in log.splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("error: ")]
    return (errors or lines or [f"exit status {status}"])[-1].removeprefix("error: ")


def _written(value: Any) -> str:
    """A value as --gin.NAME=VALUE takes it."""
    return value if isinstance(value, str) else repr(value)


def _shown(labels: Mapping[str, str]) -> str:
    return ", ".join(f"{axis} = {label}" for axis, label in labels.items()) or "the experiment"


def _slug(text: str) -> str:
    return re.sub(r"[^\w.=+-]+", "_", text).strip("_")
