"""What the plots show: read off the figures before they are written, and off the PNGs."""

import itertools
import subprocess
import sys

import numpy as np
import pytest

from dgr_jax import plots

GENERATE = [{"step": s, "loss": 1 / s, "examples_per_second": 9.0} for s in range(1, 101)]
DISTILL = [{"step": s, "loss": 9.0, "rank_loss": 2.0, "generation_loss": 0.5} for s in (30, 10, 20)]
SUCCESS = {
    "bm25": {1: 0.5, 5: 0.8, 10: 0.85, 20: 0.9, 50: 0.93, 100: 0.95},
    "generate": {100: 0.79, 1: 0.3, 5: 0.5, 10: 0.6, 20: 0.7, 50: 0.75},
    "distill": {1: 0.4, 5: 0.6, 10: 0.7, 20: 0.73, 50: 0.78, 100: 0.8},
}


@pytest.fixture
def figures(monkeypatch):
    """The figures that are saved during a test."""
    saved, save = [], plots._save
    monkeypatch.setattr(plots, "_save", lambda fig, path: saved.append(fig) or save(fig, path))
    return saved


def picture(path):
    from matplotlib.image import imread

    return imread(path)


def test_training_curves_draw_every_loss_of_every_stage(figures, tmp_path):
    path = plots.training_curves({"generate": GENERATE, "distill": DISTILL}, tmp_path / "new/a.png")
    assert path == tmp_path / "new/a.png"
    assert path.read_bytes().startswith(b"\x89PNG") and picture(path).shape[1] > 1000
    panels = figures[0].axes
    assert [axes.get_title(loc="left") for axes in panels] == [
        "generate: loss",
        "distill: rank loss",
        "distill: generation loss",
    ]
    assert {axes.get_xlabel() for axes in panels} == {"step"}
    units = ["nats per token", "score units", "nats per token"]
    assert [axes.get_ylabel() for axes in panels] == units
    for axes, top in zip(panels, (1.0, 2.0, 0.5), strict=True):
        assert axes.get_ylim() == pytest.approx((0, 1.08 * top))  # no line at the edge
    light, mean = panels[0].get_lines()
    np.testing.assert_allclose(light.get_ydata(), [1 / s for s in range(1, 101)])
    assert len(mean.get_ydata()) == 100 and light.get_alpha() < 0.5
    assert mean.get_ydata()[50] == pytest.approx(np.mean([1 / s for s in range(49, 54)]))
    np.testing.assert_array_equal(panels[1].get_lines()[0].get_xdata(), [10, 20, 30])


def test_training_curves_leave_out_what_is_missing_or_not_finite(figures, tmp_path):
    rows = [
        {"step": 1, "loss": 3.0},
        {"step": 2, "learning_rate": 0.1},
        {"step": 3, "loss": float("nan")},
        {"step": 4, "loss": 2.0},
        {"loss": 1.0},
    ]
    plots.training_curves({"generate": rows, "distill": []}, tmp_path / "a.png")
    (axes,) = figures[0].axes
    (line,) = axes.get_lines()
    assert line.get_xydata().tolist() == [[1, 3], [4, 2]]


def test_what_was_measured_on_held_out_questions_has_its_own_panel(figures, tmp_path):
    measured = [{"step": s, "validation_RR@10": s / 100} for s in (20, 40)]
    rows = {"generate": [*GENERATE, *measured], "distill": DISTILL}
    plots.training_curves(rows, tmp_path / "a.png")
    titles = [axes.get_title(loc="left") for axes in figures[0].axes]
    assert titles == [
        "generate: loss",
        "generate: validation RR@10",
        "distill: rank loss",
        "distill: generation loss",
    ]
    panel = figures[0].axes[1]
    assert panel.get_ylabel() == "RR@10"
    assert panel.get_lines()[0].get_xydata().tolist() == [[20, 0.2], [40, 0.4]]


def test_a_stage_without_losses_keeps_its_colour(figures, tmp_path):
    plots.training_curves({"bm25": (), "generate": GENERATE}, tmp_path / "a.png")
    (axes,) = figures[0].axes
    assert {line.get_color() for line in axes.get_lines()} == {plots.COLOURS[1]}


def test_one_row_is_visible(tmp_path):
    path = plots.training_curves({"generate": [{"step": 5, "loss": 2.0}]}, tmp_path / "a.png")
    coloured = np.ptp(picture(path)[..., :3], axis=-1) > 0.3
    assert coloured.sum() > 20


def test_training_curves_without_losses_say_so(tmp_path):
    with pytest.raises(ValueError) as caught:
        plots.training_curves({"generate": [{"step": 1, "accuracy": 0.5}]}, tmp_path / "a.png")
    assert str(caught.value) == (
        "no losses to draw in the stages ['generate']: expected rows with 'step' and a finite "
        "value whose name is 'loss' or ends in 'loss'"
    )


def test_success_at_k_draws_and_names_every_system(figures, tmp_path):
    path = plots.success_at_k(SUCCESS, tmp_path / "s.png", title="Success@k, 980 questions")
    assert path.read_bytes().startswith(b"\x89PNG")
    (axes,) = figures[0].axes
    assert axes.get_title(loc="left") == "Success@k, 980 questions"
    assert [t.get_text() for t in axes.get_xticklabels()] == ["1", "5", "10", "20", "50", "100"]
    assert axes.get_xscale() == "log" and axes.get_ylim() == (0.2, 1.0)
    lines = {line.get_label(): line for line in axes.get_lines()}
    assert list(lines) == list(SUCCESS)
    for name, values in SUCCESS.items():
        assert lines[name].get_xydata().tolist() == [[k, values[k]] for k in sorted(values)]
    assert len({line.get_color() for line in lines.values()}) == 3
    names = {text.get_text(): text for text in axes.texts}
    assert {n: t.get_color() for n, t in names.items()} == {
        n: line.get_color() for n, line in lines.items()
    }


def test_names_of_lines_that_end_together_do_not_overlap(figures, tmp_path):
    close = {f"system {i}": {1: 0.5, 10: 0.99 - 0.001 * i} for i in range(8)}
    plots.success_at_k(close, tmp_path / "s.png")
    texts = figures[0].axes[0].texts
    boxes = sorted((t.get_window_extent() for t in texts), key=lambda box: box.y0)
    assert len(boxes) == 8
    assert all(low.y1 <= high.y0 for low, high in itertools.pairwise(boxes))
    assert boxes[-1].x1 <= figures[0].bbox.x1  # inside the picture


def test_spread_keeps_order_and_what_is_already_apart():
    np.testing.assert_allclose(plots._spread([0.9, 0.2, 0.5], 0.1, 1.0), [0.9, 0.2, 0.5])
    np.testing.assert_allclose(plots._spread([0.50, 0.52], 0.1, 1.0), [0.46, 0.56])
    np.testing.assert_allclose(plots._spread([1.0, 1.0, 0.99], 0.1, 1.0), [0.9, 1.0, 0.8])


@pytest.mark.parametrize(
    ("systems", "names"), [({}, "all"), ({"bm25": {1: 0.5}, "distill": {}}, "['distill']")]
)
def test_success_at_k_without_values_says_so(systems, names, tmp_path):
    with pytest.raises(ValueError) as caught:
        plots.success_at_k(systems, tmp_path / "s.png")
    assert str(caught.value) == f"expected {{system: {{k: value}}}}; without values: {names}"


def test_plots_import_no_matplotlib_and_draw_without_pyplot(tmp_path):
    code = (
        "import sys; from dgr_jax import plots; assert 'matplotlib' not in sys.modules;"
        f"plots.success_at_k({{'a': {{1: 0.5, 10: 0.6}}}}, {str(tmp_path / 's.png')!r});"
        "assert 'matplotlib.pyplot' not in sys.modules"
    )
    # Other packages may be warned of what is deprecated in one another.
    strict = ["-W", "error::UserWarning", "-W", "ignore::DeprecationWarning"]
    subprocess.run([sys.executable, *strict, "-c", code], check=True)
