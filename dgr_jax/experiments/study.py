"""The settings of a study: a grid of experiments, and what is compared of them."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from dgr_jax import ranges
from dgr_jax.retrieval.prefix_ceiling import SPREAD


@dataclass(frozen=True)
class Study:
    """A grid of experiments.

    gin_files: of every experiment, as given to `python -m dgr_jax.train`.
    bindings: NAME -> value, over these files, for all of them.
    axes: what varies. NAME -> values of this binding, or any name -> {label: {NAME: value, ...}};
      a label may name gin_files of its own, such as those of a dense retriever, and systems.
    cells: what single points of the grid have over this: their labels, in the order of the axes ->
      {NAME: value, ...}, such as more steps over a larger corpus, under each retriever's own name.
    seeds: values of SEED; rows are means over them.
    systems: the rows of each experiment, those that it measures; one or more.
    measures: columns, of Evaluate.measures. split: '' is the first test split.
    baseline: labels of the row that the others are tested against, such as {'system': 'control'};
      what it leaves out is that of the row itself.
    may_differ: of 'examples', 'model', 'decoder' (prefix-adaptive layers), 'start' (initial),
      'vocabulary', 'data' (to learn from) and 'split', what rows may differ in; a study whose rows
      differ in anything else fails.
    apart: axes whose labels are not compared with one another in this, such as the corpus size.
    beams: widths of beam search to compare with scoring every identifier, for every row of docids.
    spread: share of the probability that a student which knows the positives gives to all other
      passages, in the ceiling beside them, see `dgr_jax.retrieval.prefix_ceiling`.
    costs: also training FLOPs, bytes of the index and milliseconds a query, see
      `dgr_jax.analysis.costs`.
    drift: also how far a row's distribution over the whole corpus is from this one, see
      `dgr_jax.analysis.drift`: 'qrels', or the path of a TREC run with a teacher's scores.
    """

    gin_files: tuple[str, ...]
    axes: dict[str, Any] = field(default_factory=dict)
    bindings: dict[str, Any] = field(default_factory=dict)
    cells: dict[tuple[str, ...], dict[str, Any]] = field(default_factory=dict)
    seeds: tuple[int, ...] = (0,)
    systems: tuple[str, ...] = ("distill",)
    measures: tuple[str, ...] = ("Success@1", "Success@5", "Success@10", "RR@10")
    split: str = ""
    baseline: dict[str, str] = field(default_factory=dict)
    may_differ: tuple[str, ...] = ()
    beams: tuple[int, ...] = ()
    spread: float = SPREAD
    apart: tuple[str, ...] = ()
    costs: bool = False
    drift: str = ""

    def __post_init__(self) -> None:
        for axis, values in self.axes.items():
            if not isinstance(values, (tuple, list, dict)) or not values:
                raise ValueError(
                    f"Study.axes: got {values!r} for {axis!r}, expected values (..., ...) or "
                    "{label: {NAME: value}}"
                )
        for name in ("gin_files", "seeds", "systems", "measures"):
            if not getattr(self, name):
                raise ValueError(f"Study.{name}: got (), expected one or more")
        for _, bound in self.points():
            asked = bound.get("systems", self.systems)
            if not isinstance(asked, (tuple, list)) or not asked:
                raise ValueError(f"Study.systems: got {asked!r}, expected names, in a tuple")
        ranges.check(
            self,
            seeds=ranges.each(ranges.SEED),
            beams=ranges.each(ranges.at_least(1)),
            spread=ranges.from_to_below(0, 1),
        )
        for name in ("seeds", "beams"):
            if len(set(getattr(self, name))) < len(getattr(self, name)):
                raise ValueError(
                    f"Study.{name}: got {getattr(self, name)}, expected each number once"
                )
        unknown = set(self.may_differ) - set(FAIR)
        if unknown:
            raise ValueError(f"Study.may_differ: got {sorted(unknown)}, expected some of {FAIR}")
        labels = set(self.axes) | {"system"}
        for name in ("baseline", "apart"):
            if strange := set(getattr(self, name)) - labels:
                raise ValueError(
                    f"Study.{name}: got {sorted(strange)}, expected some of {sorted(labels)}"
                )
        points = [tuple(labels.values()) for labels, _ in self.points()] if self.cells else []
        for cell in self.cells:
            if cell not in points:
                raise ValueError(
                    f"Study.cells: got {cell!r}, expected labels of all axes in their order, such "
                    f"as {points[0]!r}"
                )

    def points(self) -> Iterator[tuple[dict[str, str], dict[str, Any]]]:
        """(axis -> label, NAME -> value) of every point of the grid."""
        sides = [choices(axis, values) for axis, values in self.axes.items()]
        for chosen in itertools.product(*sides):
            labels = {axis: label for axis, (label, _) in zip(self.axes, chosen, strict=True)}
            bound = dict(self.bindings)
            for _, bindings in chosen:
                bound |= bindings
            yield labels, bound | self.cells.get(tuple(labels.values()), {})


def choices(axis: str, values: Any) -> list[tuple[str, dict[str, Any]]]:
    """(label, NAME -> value) of each value of an axis."""
    if isinstance(values, Mapping):
        return [(label, dict(bindings)) for label, bindings in values.items()]
    return [(str(value), {axis: value}) for value in values]


FAIR = ("examples", "model", "decoder", "start", "vocabulary", "data", "split")
