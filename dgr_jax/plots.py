"""PNGs of an experiment (how training went, how good its systems are) and of a study.

matplotlib is imported when a plot is drawn, and used without pyplot: no window, no global state.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from dgr_jax.display import plot_label

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# The colours of Okabe and Ito (2008), which people of any colour vision can tell apart, without the
# yellow, which is too light for lines.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")

# Of a stage that reports no parts, `loss` is that of generation.
UNITS = {
    "loss": "nats per token",
    "generation_loss": "nats per token",
    "rank_loss": "score units",
    "contrastive_loss": "nats a query",
    "teacher_loss": "score units",
}
_MANY = 5  # lines, from which on their names stand beside the plot
VALIDATION = "validation_"  # begins the name of what is measured on held-out questions


def training_curves(
    stages: Mapping[str, Sequence[Mapping[str, float]]],
    path: str | Path,
    *,
    units: Mapping[str, str] = UNITS,
) -> Path:
    """Draws the losses of each stage over its steps, and what was measured on held-out questions:
    one panel a stage and curve.

    Every key of a row that is `loss`, ends in `loss` or begins with `validation_` is a curve. Where
    a stage reports the parts of its loss (those that `units` names), their weighted sum `loss` is
    left out: it mixes units.
    Points are drawn light; a running mean stands over them where there are 40 or more.

    Args:
      stages: {stage: rows}, each row with 'step' and the measures of that step, in any order. A row
        may lack a loss; values that are not finite are left out.
      path: the PNG to write; its folder is made.
      units: what to write on the vertical axis, by loss.

    Returns:
      The path.

    Raises:
      ValueError: no stage has a row with a step and a finite loss.
    """
    panels = [
        (stage, name, *points)
        for stage, rows in stages.items()
        for name in (*_losses(rows, units), *_validations(rows))
        if len((points := _points(rows, name))[0])
    ]
    if not panels:
        raise ValueError(
            f"no losses to draw in the stages {sorted(stages)}: expected rows with 'step' and a "
            "finite value whose name is 'loss' or ends in 'loss'"
        )
    columns = 2 if len(panels) == 4 else min(len(panels), 3)
    lines = math.ceil(len(panels) / columns)
    figure = _figure(width=max(3.6 * columns, 4.8), height=3.0 * lines)
    colours = dict(zip(stages, _cycle(COLOURS, len(stages)), strict=True))
    for place, (stage, name, steps, values) in enumerate(panels, start=1):
        axes = figure.add_subplot(lines, columns, place)
        _curve(axes, steps, values, colours[stage])
        title = name.replace("_", " ")
        unit = units.get(name, title.removeprefix(VALIDATION.replace("_", " ")))
        axes.set_title(plot_label(f"{stage}: {title}"), loc="left", fontsize=10, fontweight="bold")
        axes.set_xlabel("step")
        axes.set_ylabel(plot_label(unit))
    return _save(figure, path)


def success_at_k(
    systems: Mapping[str, Mapping[int, float]],
    path: str | Path,
    *,
    title: str = "Success@k",
) -> Path:
    """Draws the share of queries with a relevant passage among the first k, one line a system.

    Args:
      systems: {system: {k: value in 0..1}}, in the order of the legend.
      path: the PNG to write; its folder is made.
      title: stands above the plot.

    Returns:
      The path.

    Raises:
      ValueError: no system, or one without values.
    """
    empty = [name for name, values in systems.items() if not values]
    if not systems or empty:
        raise ValueError(f"expected {{system: {{k: value}}}}; without values: {empty or 'all'}")
    figure = _figure(width=6.4, height=4.0)
    axes = figure.add_subplot()
    looks = zip(_cycle(COLOURS, len(systems)), _cycle(MARKERS, len(systems)), strict=True)
    for (name, values), (colour, marker) in zip(systems.items(), looks, strict=True):
        ks = sorted(values)
        heights = [values[k] for k in ks]
        axes.plot(
            ks, heights, color=colour, marker=marker, markersize=5.5, linewidth=1.8,
            label=plot_label(name),
            markeredgecolor="white", markeredgewidth=0.8, clip_on=False, zorder=3,
        )  # fmt: skip
    _success_axes(axes, sorted({k for values in systems.values() for k in values}))
    axes.set_title(plot_label(title), loc="left", fontsize=11, fontweight="bold")
    _name_the_lines(axes)
    return _save(figure, path)


Interval = tuple[float, float, float]


def measures_over(
    series: Mapping[str, Sequence[tuple[float, Mapping[str, Interval]]]],
    axis: str,
    measures: Sequence[str],
    path: str | Path,
) -> Path:
    """Draws measures over a setting: a panel for each measure, a line and, as a lighter band, its
    interval for each system.

    The axis is logarithmic where all values are positive and the largest is at least eight times
    the smallest.

    series: {name: [(value of the setting, {measure: (mean, low, high)}), ...]}; the name may be
      blank where there is only one. axis: the label of the horizontal axis.

    Returns the path. Raises ValueError without any point.
    """
    if not any(series.values()):
        raise ValueError("expected {name: [(value, {measure: (mean, low, high)})]}; got no point")
    values = sorted({value for points in series.values() for value, _ in points})
    figure = _figure(width=3.6 * len(measures), height=3.4)
    for panel, measure in enumerate(measures, start=1):
        axes = figure.add_subplot(1, len(measures), panel)
        looks = zip(_cycle(COLOURS, len(series)), _cycle(MARKERS, len(series)), strict=True)
        for place, (name, points) in enumerate(series.items()):
            (colour, marker), again = next(looks), place >= len(COLOURS)
            points = sorted(points, key=lambda point: point[0])
            at = [value for value, _ in points]
            means, lows, highs = zip(*(intervals[measure] for _, intervals in points), strict=True)
            axes.fill_between(at, lows, highs, color=colour, alpha=0.15, linewidth=0)
            axes.plot(
                at, means, color=colour, marker=marker, linewidth=1.8, label=plot_label(name),
                linestyle="--" if again else "-",
            )  # fmt: skip
        axes.set_title(plot_label(measure), loc="left", fontsize=11, fontweight="bold")
        axes.set_xlabel(plot_label(axis))
        if 0 < 8 * values[0] <= values[-1]:
            _log_scale(axes, values)
    if len(series) > _MANY:
        lines, names = axes.get_legend_handles_labels()
        figure.set_figwidth(figure.get_figwidth() + 2.4)
        figure.legend(lines, names, frameon=False, fontsize=9, loc="outside right upper")
    elif len(series) > 1:
        axes.legend(frameon=False, fontsize=9)
    return _save(figure, path)


def _log_scale(axes: Axes, values: Sequence[float]) -> None:
    axes.set_xscale("log")
    axes.set_xticks(values, labels=[f"{value:g}" for value in values])
    axes.set_xticks([], minor=True)


def _success_axes(axes: Axes, ks: Sequence[int]) -> None:
    _log_scale(axes, ks)
    axes.set_xlim(ks[0] * 0.93, ks[-1])
    lowest = min(np.asarray(line.get_ydata()).min() for line in axes.get_lines())
    axes.set_ylim(max(0.0, math.floor(lowest * 10 - 0.5) / 10), 1.0)
    axes.set_xlabel("k (passages looked at)")
    axes.set_ylabel("share of queries with a hit")


def _name_the_lines(axes: Axes) -> None:
    """Writes each system's name at the end of its line, moved apart where lines end together."""
    lines = axes.get_lines()
    low, high = axes.get_ylim()
    heights = _spread(
        [np.asarray(line.get_ydata())[-1] for line in lines], 0.052 * (high - low), high
    )
    right = max(np.asarray(line.get_xdata()).max() for line in lines)
    for line, height in zip(lines, heights, strict=True):
        axes.annotate(
            str(line.get_label()), (right, height), xytext=(9, 0), textcoords="offset points",
            va="center", color=line.get_color(), fontweight="bold", annotation_clip=False,
        )  # fmt: skip


def _spread(heights: Sequence[float], apart: float, ceiling: float) -> np.ndarray:
    """Moves heights until neighbours are `apart`; each group that is too close is spread about its
    middle."""
    order = np.argsort(heights, kind="stable")
    crowds = []  # [middle, size], lowest first
    for height in np.asarray(heights, np.float64)[order]:
        crowds.append([min(height, ceiling), 1])
        while len(crowds) > 1:
            (below, n), (above, m) = crowds[-2:]
            if above - below >= apart * (n + m) / 2:
                break
            middle = (below * n + above * m) / (n + m)
            crowds[-2:] = [[min(middle, ceiling - apart * (n + m - 1) / 2), n + m]]
    spread = np.empty(len(heights))
    spread[order] = [
        middle + apart * (i - (size - 1) / 2) for middle, size in crowds for i in range(size)
    ]
    return spread


def _losses(rows: Sequence[Mapping[str, float]], units: Mapping[str, str]) -> list[str]:
    names = list(dict.fromkeys(name for row in rows for name in row if name.endswith("loss")))
    has_parts = any(name in units for name in names if name != "loss")
    return [name for name in names if name != "loss" or not has_parts]


def _validations(rows: Sequence[Mapping[str, float]]) -> list[str]:
    return list(dict.fromkeys(name for row in rows for name in row if name.startswith(VALIDATION)))


def _points(rows: Sequence[Mapping[str, float]], name: str) -> tuple[np.ndarray, np.ndarray]:
    pairs = [(row["step"], row[name]) for row in rows if "step" in row and name in row]
    points = np.array(pairs, np.float64).reshape(-1, 2)
    points = points[np.isfinite(points).all(axis=1)]
    return tuple(points[np.argsort(points[:, 0], kind="stable")].T)


def _curve(axes: Axes, steps: np.ndarray, values: np.ndarray, colour: str) -> None:
    smooth = len(values) >= 40
    marker = "o" if len(values) == 1 else None
    axes.plot(steps, values, color=colour, linewidth=1.0 if smooth else 1.8, marker=marker,
              alpha=0.3 if smooth else 1.0)  # fmt: skip
    if smooth:
        width = len(values) // 20 | 1
        padded = np.pad(values, width // 2, mode="reflect")
        mean = np.convolve(padded, np.full(width, 1 / width), mode="valid")
        axes.plot(steps, mean, color=colour, linewidth=1.8)
    low, high = min(0.0, float(values.min())), max(0.0, float(values.max()))
    room = 0.08 * (high - low or 1.0)
    axes.set_ylim(low - room if low < 0 else 0.0, high + room)
    axes.margins(x=0.02)


def _figure(width: float, height: float) -> Figure:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _save(figure: Figure, path: str | Path) -> Path:
    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
        axes.spines[["left", "bottom"]].set_color("#999999")
        axes.tick_params(color="#999999", labelsize=9)
        axes.grid(color="#e4e4e4", linewidth=0.8)
        axes.set_axisbelow(True)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, format="png", facecolor="white")
    return path


def _cycle(looks: Sequence[str], count: int) -> list[str]:
    return [looks[i % len(looks)] for i in range(count)]
