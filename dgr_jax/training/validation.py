"""A search for questions held out of training, while a run goes on: what is chosen is chosen on it.

The student that counts may be the best by this measure in place of the last, and a run may end
early when it gets no better. What is known of the searches so far is a part of every checkpoint,
so that a run that is cut off goes on to the same choice.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dgr_jax import checkpoints
from dgr_jax.model_dir import kept

MEASURE = "RR@10"
METRIC = f"validation_{MEASURE}"  # its name among the metrics of a run
REPORT = "validation.json"  # in the folder of a run that has ended


@dataclass(frozen=True)
class Standing:
    """The searches so far: the best value and its step, the last value, and how many searches came
    after the best."""

    best: float
    best_step: int
    last: float
    since: int = 0

    @classmethod
    def of(cls, position: Mapping[str, Any]) -> Standing | None:
        """The standing that a checkpoint keeps; None before the first search."""
        known = {name: position[name] for name in cls.__dataclass_fields__ if name in position}
        return cls(**known) if known else None


@dataclass(frozen=True)
class Validation:
    """How a run is validated, see `experiments.common.Training`.

    measure: parameters of the model -> MEASURE, the mean over the questions; the same on every
      process, all of which call it together.
    questions: how many they are.
    every: steps from one search to the next; there is one at the last step too.
    keep: the student that counts, 'last' or 'best'.
    patience: searches without a better value after which the run ends; 0: it does not.
    """

    measure: Callable[[Any], float]
    questions: int
    every: int
    keep: str = "last"
    patience: int = 0

    @property
    def keeps_best(self) -> bool:
        return self.keep == "best"

    def after(self, standing: Standing | None, step: int, params: Any) -> Standing:
        """The standing after a search at this step; of equal values the first is the best."""
        value = self.measure(params)
        if standing is None or value > standing.best:
            return Standing(value, step, value)
        return Standing(standing.best, standing.best_step, value, standing.since + 1)

    def ends(self, standing: Standing | None) -> bool:
        """Whether patience is at its end."""
        return bool(self.patience) and standing is not None and standing.since >= self.patience

    def position(self, standing: Standing) -> dict[str, Any]:
        """What a checkpoint keeps, see `Checkpoints.save`."""
        return asdict(standing) | (
            {checkpoints.BEST: standing.best_step} if self.keeps_best else {}
        )

    def report(self, standing: Standing, last_step: int, total_steps: int) -> dict[str, Any]:
        """What was chosen, and on how many questions, for REPORT."""
        best = self.keeps_best
        return {
            "measure": MEASURE,
            "questions": self.questions,
            "keep": self.keep,
            "step": standing.best_step if best else last_step,
            "value": standing.best if best else standing.last,
            "last_step": last_step,
            "total_steps": total_steps,
        }


def write_report(folder: Path, report: Mapping[str, Any]) -> None:
    (folder / REPORT).write_text(json.dumps(report, indent=1), encoding="utf-8")


def readable(folder: Path) -> str:
    """What was chosen of a run that has ended, in a line; '' where nothing was."""
    if not (folder / REPORT).is_file():
        return ""
    with kept.reading(folder / REPORT):
        report = kept.read_json(folder / REPORT)
        by = f"{report['measure']} {report['value']:.4f} of {report['questions']:,} questions"
        ended = report["last_step"] < report["total_steps"]
        if report["keep"] != "best" and not ended:
            return ""
        early = f", ended early at step {report['last_step']}" if ended else ""
        return (
            f"step {report['step']} of {report['total_steps']} was chosen by {by} held out of "
            f"training{early}"
        )
