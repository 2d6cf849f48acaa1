"""The settings of a study of a corpus that grows."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from dgr_jax import ranges


@dataclass(frozen=True)
class LivingStudy:
    """A retriever is trained on a part of a collection; then further parts of it are added, step by
    step, and each way to answer is measured on the questions of each part after each step.

    gin_files, bindings: of the experiment, as in `Study`; its collection is a `Subset`, whose size
      is set here, and whose splits in `Subset.core_splits` keep the judgements of the first part.
    passages: of all parts together. first: share of them in the first part. parts: how many parts
      of equal size are added, one at each step.
    systems: of the experiment, measured with the index alone: nothing is trained after the first
      part.
    refreshed: label -> {NAME: value} over refresh_gin_files: a student that is trained on each part
      when it is added, by `python -m dgr_jax.update --refresh`. refreshed_systems: further systems
      of the experiment that are measured with this student in the place of the first one.
    rebuilt: steps after which the experiment is made anew with all passages until then.
    dense_gin_files, dense_bindings: of a dense retriever, whose vectors are added; (): none.
    seeds: values of SEED.
    measures: of each part; the first one is drawn over the steps.
    splits: whose questions are asked. unlearned: further splits whose questions about added parts
      are asked too: nobody learns from them, as the experiment knows those of the first part alone.
    max_questions: of a part at most (0: all), drawn by seed 0.
    """

    gin_files: tuple[str, ...]
    passages: int
    bindings: dict[str, Any] = field(default_factory=dict)
    first: float = 0.9
    parts: int = 4
    systems: tuple[str, ...] = ("distill", "planned", "bm25")
    refreshed: dict[str, Any] = field(default_factory=dict)
    refreshed_systems: tuple[str, ...] = ()
    refresh_gin_files: tuple[str, ...] = ("runs/living.gin",)
    rebuilt: tuple[int, ...] = ()
    dense_gin_files: tuple[str, ...] = ()
    dense_bindings: dict[str, Any] = field(default_factory=dict)
    seeds: tuple[int, ...] = (0,)
    measures: tuple[str, ...] = ("R@10", "RR@10")
    splits: tuple[str, ...] = ("test",)
    unlearned: tuple[str, ...] = ()
    max_questions: int = 0

    def __post_init__(self) -> None:
        ranges.check(
            self,
            passages=ranges.at_least(2),
            first=ranges.between(0, 1),
            parts=ranges.at_least(1),
            rebuilt=ranges.each(ranges.between(1, self.parts)),
            seeds=ranges.each(ranges.SEED),
            max_questions=ranges.at_least(0),
        )
        for name in ("gin_files", "seeds", "measures", "splits"):
            if not getattr(self, name):
                raise ValueError(f"LivingStudy.{name}: got (), expected one or more")
        if len(set(self.sizes)) <= self.parts or self.sizes[0] < 2:
            raise ValueError(
                f"LivingStudy.passages: got {self.passages} in a first part of {self.sizes[0]} and "
                f"{self.parts} others, expected a passage or more in each, two in the first"
            )

    @property
    def sizes(self) -> tuple[int, ...]:
        """How many passages there are after each step; the first number is that before."""
        first = round(self.first * self.passages)
        added = self.passages - first
        return tuple(first + round(added * step / self.parts) for step in range(self.parts + 1))
