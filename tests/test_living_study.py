"""A study of a corpus that grows."""

from __future__ import annotations

import csv
import functools
from types import SimpleNamespace

import numpy as np
import pytest

from dgr_jax import study as study_command
from dgr_jax.config import cli, gin_files
from dgr_jax.corpora.types import ScoredPassage
from dgr_jax.experiments.living_study import LivingStudy
from dgr_jax.model_dir.measurements import read_kept, write_kept
from dgr_jax.retrieval.retriever import Retriever
from dgr_jax.studies import forgetting
from dgr_jax.studies.living import Living, Way
from tests.conftest import TINY

NAN = np.nan


def test_three_numbers_of_what_is_kept_and_learned():
    values = np.array([[0.8, NAN, NAN], [0.9, 0.5, NAN], [0.6, 0.7, 0.4]])
    assert forgetting.average(values) == pytest.approx((0.6 + 0.7 + 0.4) / 3)
    assert forgetting.average(values, 1) == pytest.approx(0.7)
    assert forgetting.forgetting(values) == pytest.approx(((0.9 - 0.6) + (0.5 - 0.7)) / 2)
    assert forgetting.learning(values) == pytest.approx((0.5 + 0.4) / 2)
    last = np.where(np.arange(3)[:, None] == 2, values, NAN)
    assert forgetting.average(last) == forgetting.average(values)
    assert np.isnan(forgetting.forgetting(last)) and np.isnan(forgetting.learning(last))


def test_sizes_of_the_parts():
    sizes = lambda **given: LivingStudy(("a.gin",), **given).sizes
    assert sizes(passages=240) == (216, 222, 228, 234, 240)
    assert sizes(passages=20963) == (18867, 19391, 19915, 20439, 20963)
    for given, message in [
        ({"passages": 30}, "got 30 in a first part of 27 and 4 others, expected a passage or more"),
        ({"passages": 240, "seeds": ()}, r"LivingStudy.seeds: got \(\), expected one or more"),
        ({"passages": 240, "rebuilt": (5,)}, r"LivingStudy.rebuilt: got \(5,\), expected each 1 t"),
    ]:
        with pytest.raises(ValueError, match=message):
            LivingStudy(("a.gin",), **given)


def living(folder, *bindings: str, name: str = "living_cpu", data=()) -> Living:
    flags = (f"--gin_file=studies/{name}.gin", f"--model_dir={folder}", *data)
    args, bound = cli.parse(cli.parser("study", ""), flags)
    study = gin_files.load_experiment(args, [], study_command.KINDS, keep=False)
    load = functools.partial(gin_files.from_flags, fill=True)
    refresh = functools.partial(gin_files.from_flags, kinds=("Refresh",))
    others = [b for b in bound if not b.startswith("MODEL_DIR")]
    return Living(study, str(folder), load, [*others, *bindings], load_refresh=refresh)


@pytest.mark.parametrize(("name", "data"), [("living", ("--data_dir=d",)), ("living_cpu", ())])
def test_shipped_studies_are_whole(name, data, tmp_path, monkeypatch):
    monkeypatch.setattr(cli, "_configure_logging", lambda verbose: None)
    given = living(tmp_path, name=name, data=data)
    given.check()
    seeds, ways = given.study.seeds, given.ways()
    assert [way.name for way in ways] == [
        "distill, index only", "planned, index only", "bm25, index only", "refresh",
        "refresh, planned", "plain fine-tuning", "plain fine-tuning, planned",
        "dense, index only", "rebuilt",
    ]  # fmt: skip
    assert len(list(given.outstanding())) == len(seeds) * (8 * 5 + 1)
    dense, last = given.experiment(0, "dense", 0), given.experiment(0, "rebuilt", 4)
    first = given.experiment(0, "base", 0)
    assert dense.collection == first.collection
    assert last.collection.core == first.collection.size < last.collection.size
    plain = given._refresh(1, ways[5], tmp_path)
    assert (plain.replay, plain.docid_rate, plain.text_rate) == (0.0, 1.0, 1.0)
    assert not plain.training.objective.level_softmax
    assert given._refresh(1, ways[3], tmp_path).training.seed == 1


def test_parts_and_their_questions(tmp_path, monkeypatch):
    monkeypatch.setattr(cli, "_configure_logging", lambda verbose: None)
    given = living(tmp_path)
    parts = [{passage.pid for passage in given.part(0, step)} for step in range(5)]
    assert [len(part) for part in parts] == [216, 6, 6, 6, 6]
    assert len(set().union(*parts)) == 240
    judged = given.experiment(0, "rebuilt", 4).collection.qrels("train")
    learned = {qrel.qid for qrel in judged if qrel.relevance >= 2}
    for step, part in enumerate(parts):
        texts, qrels = given.questions(0, step)
        assert texts.keys() == qrels.keys() and not learned & texts.keys()
        assert {pid for grades in qrels.values() for pid in grades} <= part
        assert len(texts) == (216 if step == 0 else 6 * 7)
    few = living(tmp_path)
    object.__setattr__(few.study, "max_questions", 5)
    assert len(few.questions(0, 0)[0]) == len(few.questions(0, 3)[0]) == 5


@pytest.mark.parametrize(
    ("system", "depth", "expected"),
    [
        ("distill", 3, {"depth": 4}),
        ("distill", 40, {"depth": 41, "num_beams": 33}),
        ("bm25", 40, {"depth": 41}),
    ],
)
def test_a_question_that_is_a_passage_does_not_find_itself(
    system, depth, expected, tmp_path, monkeypatch
):
    monkeypatch.setattr(cli, "_configure_logging", lambda verbose: None)
    given, loads = living(tmp_path, f"DEPTH = {depth}"), []
    own, other = (passage.pid for passage in given.part(0, 1)[:2])
    asked = {own: "why?", "q": "who?"}
    found = [ScoredPassage(own, 2.0), ScoredPassage(other, 1.0)]
    retriever = SimpleNamespace(run=lambda texts: dict.fromkeys(texts, found))
    monkeypatch.setattr(
        Retriever, "load", lambda *of, **settings: loads.append(settings) or retriever
    )
    questions = lambda seed, part: (asked, {qid: {other: 2} for qid in asked})
    monkeypatch.setattr(given, "questions", questions)
    measured = given._of_parts(0, tmp_path, system, given.experiment(0, "base", 0), 1)
    assert loads == [{"system": system} | expected]
    assert measured[1]["RR@10"] == pytest.approx((1 + 1 / 2) / 2)
    del asked[own]
    measured = given._of_parts(0, tmp_path, system, given.experiment(0, "base", 0), 1)
    assert loads[1:] == [{"system": system}] and measured[1]["RR@10"] == 0.5


def test_what_was_measured_otherwise_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(cli, "_configure_logging", lambda verbose: None)
    given = living(tmp_path)
    way = Way("refresh", "refresh", None, (1,))
    place = given._place(0, way, 1)
    place.parent.mkdir(parents=True)
    write_kept(place, {"asked": given._asked(0, way), "parts": [{"R@10": 0.5, "RR@10": 0.25}]})
    assert given.values(0, way)["RR@10"][1, 0] == 0.25
    other = living(tmp_path, "GENERATE_STEPS = 7")
    with pytest.raises(ValueError, match="was measured with other settings of the study, expected"):
        other.values(0, way)


@pytest.mark.slow
def test_a_whole_study(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(cli, "_configure_logging", lambda verbose: None)
    tiny = [flag for flag in TINY[1:] if not flag.startswith(("--gin.PLAN", "--gin.Mesh"))]
    tiny = [flag for flag in tiny if "LIST_BATCH" not in flag]
    asked = (
        "--gin_file=studies/living_cpu.gin", f"--model_dir={tmp_path}", *tiny,
        "--gin.LIST_BATCH_SIZE=8", "--gin.LivingStudy.seeds=(0,)", "--gin.LivingStudy.parts=2",
        "--gin.LivingStudy.rebuilt=(2,)", "--gin.LivingStudy.dense_gin_files=()",
        "--gin.LivingStudy.max_questions=6", "--gin.Lexical.planned=8", "--gin.Lexical.num_beams=8",
        "--gin.LivingStudy.refreshed={'refresh': {'REFRESH_STEPS': 2, 'BATCH_SIZE': 8}}",
    )  # fmt: skip
    study_command.command([*asked, "--dry_run"])
    listed = capsys.readouterr().out
    assert listed.count("\n") == 5 * 3 + 1
    study_command.command(asked)
    with (tmp_path / "table.csv").open(encoding="utf-8") as file:
        rows = {row["answers"]: row for row in csv.DictReader(file)}
    assert list(rows) == [
        "distill, index only", "planned, index only", "bm25, index only", "refresh",
        "refresh, planned", "rebuilt",
    ]  # fmt: skip
    assert rows["bm25, index only"]["R@10 added"] > "0.5"
    assert rows["rebuilt"]["R@10 BWT"] == "" and rows["refresh"]["R@10 BWT"] != ""
    assert 0 < float(rows["refresh"]["TFLOP a step"]) < float(rows["rebuilt"]["TFLOP a step"])
    assert (tmp_path / "steps.png").is_file() and (tmp_path / "parts.md").is_file()
    capsys.readouterr()
    kept = {path: read_kept(path) for path in (tmp_path / "seed-0" / "values").glob("*")}
    study_command.command([*asked, "--dry_run"])
    assert capsys.readouterr().out == ""
    study_command.command([*asked, "--table_only"])
    assert kept == {path: read_kept(path) for path in kept}
