"""A stage from outside of the package: one file, which every command knows once it is listed."""

from __future__ import annotations

import dataclasses
import json
import logging

import gin
import pytest

from dgr_jax import plan, train
from dgr_jax.config import cli, gin_files
from dgr_jax.corpora.store import PassageStore
from dgr_jax.experiments.stage import Stage, after, listed
from dgr_jax.experiments.study import Study
from dgr_jax.stages import pipeline
from dgr_jax.studies import outstanding, results, runner
from dgr_jax.studies.grid import Grid
from tests import test_dense_experiment, test_experiment
from tests.conftest import TINY


def word_count(least: int = 1, read: tuple[str, ...] = ()) -> Stage:
    """How many words of at least so many letters the passages have."""

    def make(experiment, folder):
        stored = PassageStore(folder.parent / "prepare" / "passages") if read else None
        passages = stored or experiment.collection.passages()
        words = [word for passage in passages for word in passage.text.split()]
        (folder / "words.json").write_text(json.dumps(sum(len(word) >= least for word in words)))

    def check(experiment):
        if least < 1:
            raise ValueError(f"word_count.least: got {least}, expected at least 1")

    return Stage(
        "words", make, settings=lambda _: {"least": least}, upstream=after(*read), check=check
    )


@pytest.fixture
def flags(tmp_path, monkeypatch):
    """What a gin file says of the stage."""
    monkeypatch.setattr(cli, "_configure_logging", lambda verbose: None)
    if "word_count" not in gin.config._REGISTRY:
        gin.external_configurable(word_count)
    return (*TINY, "--gin.Experiment.further=(@word_count(),)", f"--model_dir={tmp_path / 'm'}")


def counted(tmp_path):
    return int((tmp_path / "m" / "words" / "words.json").read_text())


def said(caplog):
    lines = [line.partition(":")[::2] for line in caplog.messages]
    caplog.clear()
    return [text.strip() for stage, text in lines if stage == "words"]


def test_it_is_made_and_skipped_and_made_again(flags, tmp_path, caplog):
    caplog.set_level(logging.INFO, logger="dgr_jax")
    alone = (*flags, "--stages=words")
    train.command(alone)
    every = counted(tmp_path)
    assert said(caplog)[0] == "started"
    train.command(alone)
    assert said(caplog) == ["done already, from the same configuration; skipped"]
    train.command((*alone, "--gin.word_count.least=7"))
    assert said(caplog)[0] == "settings changed (least); made again"
    assert 0 < counted(tmp_path) < every
    train.command(alone)
    assert said(caplog)[-1] == "taken back from an earlier run of the same configuration"
    assert counted(tmp_path) == every
    with pytest.raises(ValueError, match="word_count.least: got 0, expected at least 1"):
        train.command((*alone, "--gin.word_count.least=0"))


def test_a_plan_of_such_an_experiment(flags, capsys):
    plan.command([*flags, "--topology=h100:1", "--programs=generate"])
    assert "generate" in capsys.readouterr().out


def test_a_study_plans_it_and_shares_it(flags, tmp_path, capsys):
    axes = {"steps": {"a": {"GENERATE_STEPS": 1}, "b": {"GENERATE_STEPS": 2}}}
    grid = Study(("quickstart.gin",), axes, bindings={"Experiment.further": "(@word_count(),)"})
    outstanding.show(Grid(grid, str(tmp_path / "study"), gin_files.from_flags))
    first, second = capsys.readouterr().out.splitlines()[:2]
    assert "words ?" in first and "words ?" not in second


def test_it_belongs_to_an_experiment_of_any_kind():
    for base in (test_experiment.BASE, test_dense_experiment.BASE):
        own = word_count(3, ("prepare",))
        experiment = dataclasses.replace(base, further=(own,))
        assert list(experiment.stages) == [*base.stages, "words"]
        settings = pipeline.settings_of(experiment, ["words"])
        assert list(settings) == ["prepare", "words"]
        assert settings["words"] == {"least": 3, "prepare": settings["prepare"]}
        before, now = (pipeline.settings_of(one, ["evaluate"]) for one in (base, experiment))
        assert before == now
    with pytest.raises(ValueError, match="got two stages 'words', expected different names"):
        listed(own, own)


@pytest.mark.slow
def test_a_whole_study_with_it(flags, tmp_path, monkeypatch, caplog):
    """In one process, as other processes do not know the stage."""
    caplog.set_level(logging.INFO, logger="dgr_jax")
    bindings = {"Experiment.further": "(@word_count(),)", "word_count.read": ("prepare",)}
    axes = {"steps": {"a": {"DISTILL_STEPS": 1}, "b": {"DISTILL_STEPS": 2}}}
    grid = Study(("quickstart.gin",), axes, bindings=bindings, measures=("RR@10",))
    tiny = [flag.removeprefix("--gin.").replace("=", " = ", 1) for flag in TINY[1:]]
    other = ("DISTILL_STEPS", "LIST_BATCH_SIZE", "Mesh")  # the batches of eight devices
    tiny = [*(b for b in tiny if not b.startswith(other)), "LIST_BATCH_SIZE = 8"]
    runs = Grid(grid, str(tmp_path / "study"), gin_files.from_flags, tiny)

    def in_process(_, run):
        train.command([*run.flags, f"--model_dir={run.folder}"])
        return ""

    monkeypatch.setattr(runner, "_train", in_process)
    assert runner.run(runs) == []
    assert said(caplog).count("started") == 1
    assert len(list((tmp_path / "study" / "stages").glob("words-*/words.json"))) == 1
    assert {row.labels["steps"] for row in results.rows(runs)} == {"a", "b"}
