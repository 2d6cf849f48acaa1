"""Grids of experiments: what is run, shared and compared."""

from __future__ import annotations

import csv
import dataclasses
import json
import os
import shutil
import subprocess
import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest
from matplotlib import image

from dgr_jax import plots
from dgr_jax import study as study_command
from dgr_jax.analysis import beam_losses, costs
from dgr_jax.config import cli, gin_files
from dgr_jax.config.mistakes import Failure, Mistake
from dgr_jax.corpora import trec
from dgr_jax.corpora.types import Query, RankList, ScoredPassage
from dgr_jax.data.examples import Sources
from dgr_jax.experiments.common import Evaluate
from dgr_jax.experiments.dense import Lists
from dgr_jax.experiments.study import Study
from dgr_jax.losses import contrastive
from dgr_jax.model_dir import records
from dgr_jax.models.initial import Corpus
from dgr_jax.retrieval.exhaustive import Lost
from dgr_jax.retrieval.generative import Search
from dgr_jax.settings import describe
from dgr_jax.stages import pipeline
from dgr_jax.stages.evaluate import chosen_queries
from dgr_jax.stages.prepared import Prepared
from dgr_jax.studies import outstanding, report, results
from dgr_jax.studies import runner as studies
from dgr_jax.studies.grid import Grid
from dgr_jax.studies.rows import (
    Row,
    check_fair,
    fairness,
    interval,
    markdown,
    values_of,
)
from tests import test_experiment
from tests.conftest import TINY
from tests.test_dependent import is_running

SETTINGS = tuple(
    flag.removeprefix("--gin.").replace("=", " = ", 1)
    for flag in TINY[1:]
    if flag.startswith("--gin.")
)


def grid_of(grid, folder, bindings=()):
    return Grid(grid, folder, gin_files.from_flags, bindings)


def study(**fields):
    return Study(**{"gin_files": ("quickstart.gin",), "systems": ("distill", "bm25")} | fields)


def test_points_of_a_grid():
    grid = study(
        axes={"SEED_OF_X": (1, 2), "loss": {"a": {"LOSS": "@listnet()"}, "b": {"LOSS": "@x()"}}},
        bindings={"DEPTH": 8},
    )
    points = list(grid.points())
    assert [labels for labels, _ in points] == [
        {"SEED_OF_X": "1", "loss": "a"}, {"SEED_OF_X": "1", "loss": "b"},
        {"SEED_OF_X": "2", "loss": "a"}, {"SEED_OF_X": "2", "loss": "b"},
    ]  # fmt: skip
    assert points[2][1] == {"DEPTH": 8, "SEED_OF_X": 2, "LOSS": "@listnet()"}
    assert list(study().points()) == [({}, {})]
    own = dataclasses.replace(grid, cells={("1", "b"): {"LOSS": "@y()", "STEPS": 3}})
    assert [bound for _, bound in own.points()] == [
        points[0][1], {"DEPTH": 8, "SEED_OF_X": 1, "LOSS": "@y()", "STEPS": 3},
        points[2][1], points[3][1],
    ]  # fmt: skip


def test_runs_have_a_folder_and_flags_each(tmp_path):
    grid = study(axes={"TopM.size": (4, 8)}, seeds=(0, 1), bindings={"DEPTH": 8})
    runs = grid_of(grid, str(tmp_path), ["Bm25.k1 = 0.9"]).runs
    assert [run.folder.name for run in runs] == [
        "TopM.size=4-seed=0", "TopM.size=4-seed=1", "TopM.size=8-seed=0", "TopM.size=8-seed=1",
    ]  # fmt: skip
    assert runs[3].flags == (
        "--gin_file=quickstart.gin", "--gin.DEPTH=8", "--gin.TopM.size=8", "--gin.SEED=1",
        "--gin.Bm25.k1=0.9",
    )  # fmt: skip
    with pytest.raises(ValueError, match="labels that make the same name"):
        grid_of(study(axes={"x": {"a b": {}, "a_b": {}}}), str(tmp_path)).runs  # noqa: B018


def test_systems_that_no_row_has_are_refused(tmp_path):
    grid = grid_of(study(systems=("dense", "refresh")), str(tmp_path), ["MODEL_DIR = x"])
    with pytest.raises(ValueError, match=r"got \('dense', 'refresh'\) for .*\('bm25', 'generate'"):
        outstanding.show(grid)


def test_a_system_of_none_of_the_experiments_is_refused(tmp_path):
    for systems in (("distil", "bm25"), ("dense", "distill")):
        grid = grid_of(study(systems=systems), str(tmp_path), ["MODEL_DIR = x"])
        for refused in (outstanding.show, studies.run):
            with pytest.raises(ValueError, match=f"Study.systems: got '{systems[0]}', expected so"):
                refused(grid)


def test_wrong_grids_are_refused():
    with pytest.raises(ValueError, match="Study.axes: got 3 for 'x', expected values"):
        study(axes={"x": 3})
    with pytest.raises(ValueError, match=r"Study.seeds: got \(\), expected one or more"):
        study(seeds=())
    with pytest.raises(ValueError, match=r"Study.may_differ: got \['date'\], expected some of"):
        study(may_differ=("date",))
    message = "Study.systems: got 'distill', expected names, in a tuple"
    with pytest.raises(ValueError, match=message):
        study(systems="distill")
    with pytest.raises(ValueError, match=message):
        study(axes={"x": {"a": {}, "b": {"systems": "distill"}}})
    with pytest.raises(ValueError, match=r"Study.baseline: got \['loss'\], expected some of"):
        study(baseline={"loss": "a"})
    with pytest.raises(
        ValueError, match=r"Study.cells: got \('b', '1'\), expected .* \('1', 'a'\)"
    ):
        study(axes={"x": (1,), "y": {"a": {}, "b": {}}}, cells={("b", "1"): {}})


def row(value, **fair):
    return Row({"x": str(value)}, [{"RR@10": np.array([value, 1.0])}], fair)


def test_rows_that_are_not_comparable_are_refused():
    rows = [row(1, examples=10, model="a"), row(2, examples=10, model="a"), row(3)]
    check_fair(rows)
    rows.append(row(4, examples=20, model="a"))
    with pytest.raises(ValueError, match="the examples of {'x': '1'} is 10, that of {'x': '4'} is"):
        check_fair(rows)
    check_fair(rows, ("examples",))
    rows.append(row(5, examples=10, model="b"))
    with pytest.raises(ValueError, match="Study.may_differ: the model of"):
        check_fair(rows, ("examples",))


def test_rows_of_axes_apart_are_not_compared():
    rows = [row(1, data="a"), row(2, data="b")]
    with pytest.raises(ValueError, match="the data of {'x': '1'} is a"):
        check_fair(rows)
    check_fair(rows, apart=("x",))
    rows.append(dataclasses.replace(row(2, data="c"), labels={"x": "2", "y": "1"}))
    with pytest.raises(ValueError, match="the data of {'x': '2'} is b"):
        check_fair(rows, apart=("x",))
    with pytest.raises(ValueError, match=r"Study.apart: got \['y'\], expected some of \['system'"):
        study(apart=("y",))


def test_a_query_that_finds_nothing_counts_where_some_are_drawn(tmp_path, monkeypatch):
    queries = {f"q{i}": Query(f"q{i}", "text") for i in range(6)}
    qrels = {qid: {"p": 1} for qid in queries}
    made = SimpleNamespace(queries=lambda split: queries, qrels=lambda split: qrels)
    monkeypatch.setattr(Prepared, "load", lambda *_, **__: made)
    evaluated = Evaluate(Search(), max_queries=3)
    experiment = dataclasses.replace(test_experiment.BASE, evaluate=evaluated)
    first, *_ = chosen_queries(experiment, made, "test")
    run = [RankList(first, (ScoredPassage("p", 1.0),))]
    trec.write_run(tmp_path / "evaluate/distill.test.trec", run, "t")
    found = values_of(experiment, tmp_path, "distill", "test", ("RR@10",))
    assert sorted(found["RR@10"]) == [0.0, 0.0, 1.0]


def test_rows_of_other_rules_for_judgements_are_not_the_same():
    grid = SimpleNamespace(study=SimpleNamespace(split="test"), experiment=lambda run: run)
    base = test_experiment.BASE
    for rule, same in (("self_hits", False), ("shared_queries", True)):
        value = {"self_hits": "keep", "shared_queries": "drop"}[rule]
        other = dataclasses.replace(
            base, prepare=dataclasses.replace(base.prepare, **{rule: value})
        )
        assert (results._asked(grid, base) == results._asked(grid, other)) == same
        fair = [fairness(one, None, "bm25", "test") for one in (base, other)]
        assert (fair[0] == fair[1]) == same
        assert (base.compared("generate") == other.compared("generate")) != same


def shipped(name, tmp_path, *more, data=("--data_dir=d",)):
    flags = (f"--gin_file=studies/{name}.gin", f"--model_dir={tmp_path}", *data, *more)
    args, bindings = cli.parse(cli.parser("study", ""), flags)
    own = gin_files.load_experiment(args, [], ("Study",), keep=False)
    return grid_of(own, str(tmp_path), [b for b in bindings if not b.startswith("MODEL_DIR")])


def test_generative_and_dense_rows_of_the_shipped_study_are_comparable(tmp_path):
    grid = shipped("gr_vs_dr", tmp_path)
    ours = [run for run in grid.runs if run.seed == 0 and run.labels["Subset.size"] == "4000"]
    found = {run.labels["retriever"]: grid.experiment(run) for run in ours}
    compared = [
        found[name].compared(system)
        for name, system in (("rq", "distill"), ("title", "control"), ("dense", "dense"),
                             ("dense bm25 64", "dense"))
    ]  # fmt: skip
    assert all(one == compared[0] for one in compared)
    labelled = dataclasses.replace(
        found["dense"].prepare,
        sources=dataclasses.replace(found["dense"].prepare.sources, passages=0.0),
    )
    fewer = dataclasses.replace(found["dense"], prepare=labelled).compared("dense")
    assert {name for name, value in fewer.items() if value != compared[0][name]} == {"data"}
    assert found["dense bm25 64"].model.dim == 64 and found["rq"].collection.core == 1000
    vocabularies = {json.dumps(describe(one.prepare.vocabulary)) for one in found.values()}
    assert len(vocabularies) == 1


@pytest.mark.parametrize("name", ["dense_negatives", "dense_negatives_cpu"])
def test_rows_of_every_kind_of_negatives_are_comparable(name, tmp_path):
    grid = shipped(name, tmp_path)
    found = {run.labels["negatives"]: run for run in grid.runs if run.seed == 0}
    made = {label: grid.experiment(run) for label, run in found.items()}
    compared = [one.compared(found[label].systems[0]) for label, one in made.items()]
    assert all(one == compared[0] for one in compared)
    assert [run.systems for run in found.values()] == [
        ("refresh",) if label == "own" else ("dense", "bm25") for label in found
    ]
    taught = [made[f"bm25, {loss}"].train.objective for loss in ("kl", "margin_mse")]
    losses = [json.dumps(describe(one.teacher_loss)) for one in taught]
    assert "kl_divergence" in losses[0] and "margin_mse" in losses[1]


def test_sizes_of_both_retrievers_are_comparable(tmp_path):
    grid = shipped("gr_vs_dr_models_cpu", tmp_path)
    of_size = {}
    for run in grid.runs:
        system = "dense" if "dense" in run.labels["retriever"] else "distill"
        compared = grid.experiment(run).compared(system)
        of_size.setdefault(run.labels["T5Config.emb_dim"], []).append(compared)
    for compared in of_size.values():
        assert len(compared) == 6 and all(one == compared[0] for one in compared)
    models = [compared[0].pop("model") for compared in of_size.values()]
    assert len({json.dumps(model) for model in models}) == 3
    assert len({json.dumps(compared[0]) for compared in of_size.values()}) == 1


def test_positives_and_losses_of_the_shipped_study(tmp_path):
    grid = shipped("positives", tmp_path)
    assert len(grid.runs) == 5 * 4 * 2
    run = next(run for run in grid.runs if run.labels == {"loss": "lse_pair", "POSITIVES": "8"})
    experiment = grid.experiment(run)
    assert experiment.lists == Lists(positives=8)
    assert experiment.train.objective.loss.func is contrastive.lse_pair


@pytest.mark.parametrize("name", ["positives_labels", "positives_labels_cpu"])
def test_label_mixtures_share_what_is_prepared(name, tmp_path):
    grid = shipped(name, tmp_path)
    found = [grid.experiment(run) for run in grid.runs if run.seed == 0]
    assert len(grid.runs) == 2 * 5 * 4
    assert len({pipeline.fingerprint(pipeline.settings_of(one)["prepare"]) for one in found}) == 1
    compared = [one.compared("dense") for one in found]
    assert all(one == compared[0] for one in compared) and found[0].lists.positives == 4
    unlabelled = dataclasses.replace(
        found[0].prepare, train_splits=(), sources=Sources(passages=1.0)
    )
    lists = dataclasses.replace(found[0].lists, weights=())
    without = dataclasses.replace(found[0], prepare=unlabelled, lists=lists)
    assert without.compared("dense")["data"][0] == ""
    phases = {
        run.labels["labels"]: one.lists.phases(2)
        for run, one in zip(grid.runs[::2], found, strict=True)
    }
    assert phases == {
        "human": [(1.0, (1.0, 0.0))], "weak": [(1.0, (0.0, 1.0))], "both": [(1.0, (1.0, 1.0))],
        "weak, then human": [(0.5, (0.0, 1.0)), (0.5, (1.0, 0.0))],
    }  # fmt: skip


def test_the_small_studies_of_distillation_share_their_generation(tmp_path):
    """Losses, teachers, margins, lengths of lists: all students learn to generate once a seed."""
    files = [f"--gin.VectorTeacher.{name}_path={name}" for name in
             ("passages", "queries", "query_ids", "passage_ids")]  # fmt: skip
    made = {}
    for name, number in (("dgr_cpu", 8), ("dgr_teachers_cpu", 3), ("margins_cpu", 9)):
        grid = shipped(name, tmp_path, *(files if "teachers" in name else ()))
        assert len(grid.runs) == 2 * number
        for run in grid.runs[::2]:  # of one seed
            made |= {(name, *run.labels.values()): grid.experiment(run)}
    settings = (pipeline.settings_of(one)["generate"] for one in made.values())
    assert len({pipeline.fingerprint(one) for one in settings}) == 1
    with pytest.raises(Mistake, match="needs --gin.VectorTeacher"):
        bare = shipped("dgr_teachers_cpu", tmp_path)
        bare.experiment(next(run for run in bare.runs if run.labels["teacher"] == "vectors"))
    fusion = made["dgr_teachers_cpu", "BM25 and vectors"].teach.teacher
    assert fusion.judged_first and fusion.weights == (0.7, 12.0)
    assert fusion.teachers[1].passage_ids_path == "passage_ids"
    assert made["margins_cpu", "300.0", "8"].teach.lists.negatives == 8
    rate = made["dgr_cpu", "ListMLE"].distill.objective
    assert rate.loss.keywords == {"temperature": 100.0} and rate.generation_weight == 5.0


@pytest.mark.parametrize(
    ("name", "number", "varied"),
    [
        ("scaling", 3 * 5 * 2, "identifiers"),
        ("scaling_documents", 3 * 6 * 2, "documents"),
        ("scaling_models", 3 * 4 * 2 * 2, "identifiers"),
        ("scaling_search", 3 * 3 * 2 * 2, "search"),
    ],
)
def test_rows_of_the_shipped_scaling_studies_differ_in_what_they_vary(
    name, number, varied, tmp_path
):
    file = "--gin.Sources.pseudo_query_path=queries.tsv"
    grid = shipped(name, tmp_path, *([file] if name == "scaling_documents" else []))
    assert len(grid.runs) == number
    usual = {"Subset.size": "4000", "model": "mini"}
    usual |= {"identifiers": "rq"} if varied == "search" else {}
    found = {
        run.labels[varied]: grid.experiment(run)
        for run in grid.runs
        if run.seed == 1 and all(run.labels.get(axis, v) == v for axis, v in usual.items())
    }
    compared = [one.compared("generate") for one in found.values()]
    differs = {k for one in compared for k, v in one.items() if v != compared[0][k]}
    assert differs == set(grid.study.may_differ)
    assert {one.prepare.query_length for one in found.values()} == {64}
    settings = {
        json.dumps(describe((one.prepare, one.model, one.evaluate))) for one in found.values()
    }
    assert len(settings) == len(found)
    if name == "scaling_documents":
        assert [one.prepare.sources.max_pseudo_queries for one in found.values()] == [
            0, 0, 0, 10, 40, 100,
        ]  # fmt: skip
        with pytest.raises(Mistake, match="needs --gin.Sources.pseudo_query_path="):
            bare = shipped(name, tmp_path)
            bare.experiment(next(r for r in bare.runs if r.labels["documents"] == "10 queries"))


def test_intervals_hold_their_mean():
    values = np.random.default_rng(0).uniform(size=400)
    mean, low, high = interval(Row({}, [{"RR@10": values}], {}), "RR@10")
    assert low < mean == values.mean() < high
    assert high - low == pytest.approx(2 * 1.96 * values.std() / 20, rel=0.15)


def test_markdown():
    assert markdown([{"a": 1, "b": 0.5}, {"a": 2, "b": ""}]) == (
        "| a | b |\n| --- | --- |\n| 1 | 0.5 |\n| 2 |  |\n"
    )


def test_lines_of_a_plot_say_what_they_are(tmp_path, monkeypatch):
    grid = study(axes={"x.gap": (0.0, 9.0), "TopM.size": (4, 8), "loss": {"a": {}}})
    values = {name: np.ones(2) for name in grid.measures}
    rows = [
        Row({"x.gap": gap, "TopM.size": size, "loss": "a", "system": "distill"}, [values], {})
        for gap in ("0.0", "9.0")
        for size in ("4", "8")
    ]
    drawn = []
    monkeypatch.setattr(plots, "measures_over", lambda *given: drawn.append(given))
    report._plot(grid_of(grid, str(tmp_path)), "x.gap", rows)
    ((series, axis, *_),) = drawn
    assert axis == "x.gap" and list(series) == ["size 4, a, distill", "size 8, a, distill"]
    assert [x for x, _ in series["size 4, a, distill"]] == [0.0, 9.0]
    control = {"x.gap": "0.0", "TopM.size": "4", "loss": "a", "system": "control"}
    same = [{**control, "TopM.size": "8"}, {**control, "x.gap": "9.0"}]
    report._plot(grid_of(grid, str(tmp_path)), "x.gap", [Row(control, [values], {}, again=same)])
    assert [x for x, _ in drawn[1][0]["a, control"]] == [0.0, 9.0]


def test_a_shared_baseline_is_not_tested_against_itself(tmp_path):
    grid = study(axes={"loss": {"a": {}, "b": {}}}, baseline={"system": "control", "loss": "b"})
    values = {name: np.ones(2) for name in grid.measures}
    labels = {"loss": "a", "system": "control"}
    control = Row(labels, [values], {}, again=[labels | {"loss": "b"}])
    distill = Row({"loss": "b", "system": "distill"}, [values], {})
    grid, rows = grid_of(grid, str(tmp_path)), [control, distill]
    assert report._baseline(grid, control, rows) is None
    assert report._baseline(grid, distill, rows) is control


def test_axes_of_numbers_are_plotted(tmp_path, monkeypatch):
    sizes = {"64": {"T5Config.emb_dim": 64}, "128": {}}
    axes = {"TopM.size": (4, 8), "T5Config.emb_dim": sizes, "loss": {"a": {}, "8 b": {}}}
    grid = grid_of(study(axes=axes), str(tmp_path))
    values = {name: np.ones(2) for name in grid.study.measures}
    labels = [{**labels, "system": "distill"} for labels, _ in grid.study.points()]
    monkeypatch.setattr(results, "rows", lambda _: [Row(one, [values], {}) for one in labels])
    report.write(grid)
    assert sorted(file.name for file in tmp_path.glob("*.png")) == [
        "T5Config.emb_dim.png", "TopM.size.png",
    ]  # fmt: skip


@pytest.mark.parametrize("values, scale", [((1, 8), "log"), ((0, 8), "linear"), ((2, 8), "linear")])
def test_wide_ranges_lie_on_a_log_scale(values, scale, tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(plots, "_save", lambda figure, path: drawn.append(figure))
    points = [(value, {"RR@10": (0.5, 0.4, 0.6)}) for value in values]
    plots.measures_over({"a": points}, "size", ("RR@10",), tmp_path / "x.png")
    (axes,) = drawn[0].axes
    assert axes.get_xscale() == scale
    if scale == "log":
        assert [tick.get_text() for tick in axes.get_xticklabels()] == ["1", "8"]


def test_a_plot_of_measures(tmp_path):
    points = [(x, {"RR@10": (x / 9, x / 9 - 0.1, x / 9 + 0.1)}) for x in (4, 2, 8)]
    path = plots.measures_over({"a": points, "b": points}, "margin", ("RR@10",), tmp_path / "x.png")
    assert image.imread(path).std() > 0.05
    with pytest.raises(ValueError, match="got no point"):
        plots.measures_over({}, "margin", ("RR@10",), tmp_path / "x.png")


@pytest.fixture
def finished(tiny_model_dir, tmp_path):
    """A study of one experiment that is done, and of one that is not."""
    grid = study(
        axes={"TopM.size": (16, 3)},
        systems=("control", "distill", "bm25"),
        measures=("Success@1", "RR@10"),
        baseline={"system": "control"},
    )
    grid = grid_of(grid, str(tmp_path / "study"), SETTINGS)
    for stage, settings in pipeline.settings_of(grid.experiment(grid.runs[0])).items():
        mark = records.read_record(tiny_model_dir / stage)["fingerprint"]
        assert mark == pipeline.fingerprint(settings)
        kept = tmp_path / "study" / "stages" / f"{stage}-{mark}"
        kept.parent.mkdir(parents=True, exist_ok=True)
        kept.symlink_to(tiny_model_dir / stage)
    return grid


def test_what_is_left_to_do(finished, capsys):
    outstanding.show(finished)
    said = capsys.readouterr().out.splitlines()
    assert said[0] == "TopM.size=16-seed=0: done"
    assert said[1].startswith("TopM.size=3-seed=0: teach ") and "distill" in said[1]
    assert "prepare" not in said[1] and "control" not in said[1]
    expected = costs.expected_flops(finished.experiment(finished.runs[1]))["distill"]
    assert f"distill {expected / 1e15:.3g} PFLOP " in said[1] and " s" in said[1].split("PFLOP")[1]
    assert said[2].startswith(f"2 experiments; {expected / 1e15:.3g} PFLOP of training, ")
    assert said[2].endswith(" minutes to go")  # the times of the stages that are done


def test_stages_that_an_older_version_has_named_are_found(finished):
    """It knew nothing of the file in tasks/, which belongs to the settings now."""
    (kept,) = (finished.folder / "stages").glob("prepare-*")
    settings = records.read_record(kept)["settings"]
    assert list(settings["files"]) == ["tasks/quickstart.py"]
    older = {name: value for name, value in settings.items() if name != "files"}
    made, mark = kept.resolve(), pipeline.fingerprint(older)
    kept.unlink()
    kept = kept.with_name(f"prepare-{mark}")
    shutil.copytree(made, kept)
    records.write_record(kept, status="done", fingerprint=mark, settings=older, seconds=1.0)
    assert finished.state(finished.runs[0])["prepare"] == (True, kept)
    records.write_record(kept, status="running", fingerprint=mark, settings=older)
    assert finished.state(finished.runs[0])["prepare"] == (False, kept)


def test_the_table_of_what_is_finished(finished):
    report.write(finished)
    with (finished.folder / "table.csv").open(encoding="utf-8") as file:
        table = list(csv.DictReader(file))
    assert [line["system"] for line in table] == ["control", "distill", "bm25"]
    assert list(table[0]) == [
        "TopM.size", "system", "seeds", "Success@1", "Success@1 p", "RR@10", "RR@10 p",
    ]  # fmt: skip
    assert table[0]["RR@10 p"] == "" and 0 < float(table[2]["RR@10 p"]) <= 1
    assert (finished.folder / "table.md").read_text().count("\n") == 5
    assert image.imread(finished.folder / "TopM.size.png").std() > 0.01
    other = dataclasses.replace(finished.study, systems=("generate", "distill"))
    with pytest.raises(ValueError, match="Study.may_differ: the examples of"):
        report.write(grid_of(other, str(finished.folder), SETTINGS))


@pytest.mark.slow
def test_what_beam_search_loses_and_what_rows_cost(finished, command, tmp_path):
    """The widest beam holds every identifier; a query has one positive, which nothing hides."""
    file = tmp_path / "beams.gin"
    file.write_text(
        "Study.gin_files = ('quickstart.gin',)\n"
        "Study.axes = {'TopM.size': (16, 3)}\n"
        "Study.systems = ('distill', 'bm25')\n"
        "Study.measures = ('RR@10',)\n"
        "Study.beams = (1, 8, 240)\n"
        "Study.costs = True\n"
        "Study.drift = 'qrels'\n"
    )
    command("dgr_jax.study", f"--gin_file={file}", f"--model_dir={finished.folder}", *TINY[1:],
            "--table_only")  # fmt: skip
    with (finished.folder / "beams.csv").open(encoding="utf-8") as file:
        table = list(csv.DictReader(file))
    assert [(line["system"], line["beams"]) for line in table] == [
        ("distill", "1"), ("distill", "8"), ("distill", "240"),
    ]  # fmt: skip
    lost = [float(line["passages"]) for line in table]
    assert lost[0] >= 0.875 > lost[1] > lost[2] == 0.0
    assert {line["ceiling"] for line in table} == {"1.0"}
    assert table[2]["recall"] == table[2]["exhaustive_recall"]
    assert image.imread(finished.folder / "beams.png").std() > 0.01
    with (finished.folder / "table.csv").open(encoding="utf-8") as file:
        distill, bm25 = ([line[name] for name in costs.COLUMNS] for line in csv.DictReader(file))
    assert bm25 == [""] * 5 and all(float(value) > 0 for value in distill)
    # What is kept is taken; nothing could be measured on the devices of this test.
    drift = Study(finished.study.gin_files, finished.study.axes, drift="qrels")
    row = results.rows(grid_of(drift, str(finished.folder), SETTINGS))[0]
    assert row.costs == [{"drift": pytest.approx(float(distill[-1]), rel=1e-3)}]


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere its parent is watched")
@pytest.mark.parametrize("killed", [False, True])
def test_a_study_that_is_stopped_stops_what_it_runs(killed, tmp_path):
    """The child would end by itself after a minute. What the user sets, the study does not."""
    ran = tmp_path / "log.txt"
    child = (
        "import os; print(os.getpid(), os.environ['GIVEN'], os.environ['SET'], flush=True);"
        "import time; time.sleep(60)"
    )
    settings = {"GIVEN": "by the study", "SET": "by the study"}
    study = (
        "import sys; from dgr_jax.studies import runner as r; output = open(sys.argv[1], 'w');"
        f"sys.exit(r._status([sys.executable, '-c', {child!r}], output, {settings}))"
    )
    environment = {**os.environ, "SET": "by the user"}
    running = subprocess.Popen([sys.executable, "-c", study, str(ran)], env=environment)
    begun = time.monotonic()
    while not (ran.is_file() and ran.read_text().strip()):
        assert running.poll() is None and time.monotonic() < begun + 60
        time.sleep(0.05)
    number, _, told = ran.read_text().partition(" ")
    assert told == "by the study by the user\n" and is_running(int(number))
    if killed:
        running.kill()
        running.wait(30)
    else:
        running.terminate()
        assert running.wait(30) == 75
    while is_running(int(number)):
        assert time.monotonic() < begun + 60
        time.sleep(0.05)


def test_a_dry_run_writes_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cli, "_configure_logging", lambda verbose: None)
    asked = ["--dry_run", "--model_dir=m", "--data_dir=d"]
    study_command.command(["--gin_file=studies/dense_negatives_cpu.gin", *asked])
    said = capsys.readouterr().out
    assert said.count(" PFLOP ") == 14 + 1 and "? PFLOP" not in said and "not among" not in said
    study_command.command(["--gin_file=studies/margins_cpu.gin", *asked])
    said = capsys.readouterr().out.splitlines()
    assert "generate ? PFLOP ?" in said[0] and "distill ? PFLOP ?" in said[1]
    assert said[-1].startswith("not among them: the PFLOP of 22 training stages, whose identifiers")
    study_command.command(["--gin_file=studies/dgr_teachers_cpu.gin", *asked[:2]])
    assert "6 experiments; " in capsys.readouterr().out  # without the files that it needs
    study_command.command(["--gin_file=studies/planning_cpu.gin", *asked[:2]])
    assert capsys.readouterr().out.count("evaluate (plan of 146 kB) ?") == 2 * 2 * 4
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("unfair", ["", "Study.may_differ: the examples of a is 1, that of b is 2"])
def test_experiments_that_fail_are_named_beside_the_table_of_the_others(
    finished, monkeypatch, unfair
):
    """Here the second of two, whose command says why before it ends."""

    def status(command, output, settings):
        assert command[-1].endswith("TopM.size=3-seed=0")
        output.write("teach: started\nerror: no teacher\n(--verbose shows where)\n")
        output.flush()
        return 2

    monkeypatch.setattr(studies, "_status", status)
    monkeypatch.setattr(
        gin_files, "load_experiment", once(finished.study, gin_files.load_experiment)
    )
    monkeypatch.setattr(cli, "_configure_logging", lambda verbose: None)
    flags = [f"--gin.{binding.replace(' = ', '=', 1)}" for binding in SETTINGS]

    def check(rows, *asked):
        if unfair:
            raise ValueError(unfair)

    monkeypatch.setattr(report, "check_fair", check)
    with pytest.raises(Failure) as error:
        study_command.command([f"--model_dir={finished.folder}", *flags])
    assert error.value.status == 1
    log = finished.folder / "runs" / "TopM.size=3-seed=0" / "log.txt"
    assert str(error.value).splitlines() == [
        "1 of 2 experiments failed; the same command tries them again",
        f"TopM.size=3-seed=0 failed: no teacher ({log})",
        *[f"the others cannot be reported: {unfair}"] * bool(unfair),
    ]
    if not unfair:
        with (finished.folder / "table.csv").open(encoding="utf-8") as file:
            systems = [line["system"] for line in csv.DictReader(file)]
        assert systems == ["control", "distill", "bm25"]
    assert (finished.folder / "runs" / "TopM.size=16-seed=0" / "config.gin").is_file()
    assert not list(finished.folder.rglob(".lock"))


def once(first, then):
    """A function that returns `first`, and from then on what `then` returns."""
    left = [first]
    return lambda *args, **settings: left.pop() if left else then(*args, **settings)


def test_an_experiment_that_cannot_be_stops_a_study_before_it_starts(tmp_path, monkeypatch):
    monkeypatch.setattr(studies, "_status", None)  # would be called for the first one
    grid = grid_of(study(axes={"TopM.size": (4, 1)}), str(tmp_path), SETTINGS)
    with pytest.raises(Mistake, match="TopM.size: got 1, expected at least 2"):
        studies.run(grid)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("log", "status", "reason"),
    [
        ("fine\n", 0, ""),
        ("a\nerror: x\n(--verbose shows where)\n", 2, "x"),
        ("Traceback\nKeyError: 1\n\n", 1, "KeyError: 1"),
        ("", 3, "exit status 3"),
        ("step 5\n", -9, "ended by SIGKILL"),
    ],
)
def test_why_an_experiment_failed(log, status, reason):
    assert studies._reason(log, status) == reason


def test_what_beam_search_loses_is_kept_width_by_width(tmp_path, monkeypatch):
    (tmp_path / "evaluate").mkdir()
    asked = []

    def measure(experiment, system, beams, split, spread):
        for width in beams:
            asked.append(width)
            if width == 8:
                raise KeyboardInterrupt
            values = np.array([1.0 / width, 0.5])
            yield Lost(width, values, values, values, values, np.zeros(0))

    monkeypatch.setattr(beam_losses, "measure", measure)
    measured = lambda *beams: beam_losses.measured(None, tmp_path, "distill", beams, "test", 0.9)
    with pytest.raises(KeyboardInterrupt):
        measured(1, 8)
    four, one = measured(4, 1)
    assert asked == [1, 8, 4] and (four.num_beams, one.num_beams) == (4, 1)
    assert {k: v.tolist() for k, v in four.values().items()} == {
        "passages": [0.25, 0.5], "first": [0.25, 0.5], "recall": [0.25, 0.5],
        "exhaustive_recall": [0.25, 0.5],
    }  # fmt: skip
    (tmp_path / "evaluate" / "beams-distill.json").write_text("{")
    measured(4)
    assert asked == [1, 8, 4, 4]


def test_a_study_of_nothing_has_no_table(tmp_path):
    with pytest.raises(ValueError, match="no experiment of the study is finished"):
        report.write(grid_of(study(), str(tmp_path), SETTINGS))


@pytest.mark.slow
def test_a_study_runs_what_is_missing(finished, command):
    folder, flags = finished.folder, [flag for flag in TINY if flag.startswith("--gin.")]
    gin = folder.parent / "grid.gin"
    gin.write_text(
        "Study.gin_files = ('quickstart.gin',)\nStudy.axes = {'TopM.size': (16, 1, 3)}\n"
        "Study.systems = ('control', 'distill')\nStudy.baseline = {'system': 'control'}\n"
        "Study.measures = ('RR@10',)\n",
        encoding="utf-8",
    )
    asked = ["dgr_jax.study", f"--gin_file={gin}", f"--model_dir={folder}", *flags]
    done = command(*asked, check=False)
    assert done.returncode == 2 and "TopM.size: got 1, expected at least 2" in done.stderr
    gin.write_text(gin.read_text().replace("16, 1, 3", "16, 3"), encoding="utf-8")
    done = command(*asked)
    assert done.stdout.count("\n") == 2 + 3, done.stdout  # one control, two distilled
    with (folder / "table.csv").open(encoding="utf-8") as file:
        tested = [bool(line["RR@10 p"]) for line in csv.DictReader(file)]
    assert tested == [False, True, True]  # each against this one
    assert "2/2 TopM.size=3-seed=0" in done.stderr and "1/2" not in done.stderr
    log = (folder / "runs" / "TopM.size=3-seed=0" / "log.txt").read_text()
    assert "generate: done already" in log and "distill: done in" in log


def test_rows_of_a_plan(tmp_path, monkeypatch):
    """A plan of other settings is another row of the same student; there are none without."""
    plans = {"none": {"PLAN": None}, "a": {"PLAN": "@Lexical()"}}
    plans["b"] = plans["a"] | {"Lexical.weight": 0.5}
    grid = grid_of(study(systems=("distill", "planned"), axes={"plan": plans}), tmp_path)
    state = {"distill": (True, "as trained"), "evaluate": (True, "")}
    monkeypatch.setattr(grid, "finished", lambda: [[run] for run in grid.runs])
    monkeypatch.setattr(grid, "state", lambda run: state)
    monkeypatch.setattr(grid, "link", lambda run: None)
    monkeypatch.setattr(results, "_row", lambda grid, labels, runs: Row(labels, [], {}, []))
    found = [row.labels for row in results.rows(grid)]
    assert found == [
        {"plan": "none", "system": "distill"},
        {"plan": "a", "system": "planned"},
        {"plan": "b", "system": "planned"},
    ]
    alone = grid_of(study(systems=("planned",), axes={"plan": plans}), tmp_path)
    with pytest.raises(ValueError, match=r"Study.systems: got \('planned',\) for .*none, expected"):
        alone.experiment(alone.runs[0])


@pytest.mark.parametrize("name", ["start", "start_cpu", "start_laptop_cpu"])
def test_rows_of_the_shipped_studies_of_starts_differ_in_their_start_alone(name, tmp_path):
    grid = shipped(name, tmp_path, data=() if name == "start_cpu" else ("--data_dir=d",))
    assert len(grid.runs) == 5 * 3 * 2
    for identifiers in ("rq", "semantic", "atomic", "title", "multiview"):
        runs = [run for run in grid.runs if run.labels["identifiers"] == identifiers]
        experiments = [grid.experiment(run) for run in runs if run.seed == 1]
        assert [e.initial for e in experiments] == [None, Corpus(), Corpus(shuffled=True)]
        compared = [e.compared("generate") for e in experiments]
        assert {k for one in compared for k in one if one[k] != compared[0][k]} == {"start"}
        prepared = {json.dumps(describe(e.prepare)) for e in experiments}
        assert len(prepared) == 1
