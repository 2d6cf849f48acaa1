"""What CONTRIBUTING.md says of additions: a loss, a teacher and a measure that the package does not
know, through distillation and evaluation."""

import functools
import json
import re
import shutil
from dataclasses import dataclass, fields
from types import SimpleNamespace
from typing import ClassVar

import gin
import jax.numpy as jnp
import pytest

from dgr_jax import train
from dgr_jax.analysis import costs
from dgr_jax.capacity import disk, planners, tables
from dgr_jax.capacity.planner import Line, planner_of
from dgr_jax.config import cli, gin_files
from dgr_jax.corpora.types import ScoredPassage
from dgr_jax.experiments.common import Measured
from dgr_jax.experiments.generative import Experiment
from dgr_jax.identifiers.scheme import CorpusSize
from dgr_jax.retrieval import kinds
from dgr_jax.retrieval.generative import Decoder
from dgr_jax.teaching.teacher import Teacher
from tests.conftest import ROOT, TINY


@dataclass(frozen=True, kw_only=True)
class LongestFirst(Teacher):
    """Longer passages are better."""

    def order(self, queries, candidates, store):
        for qid in queries:
            lengths = {pid: len(store[store.index_of(pid)].text) for pid in candidates[qid]}
            ranked = sorted(lengths, key=lambda pid: (-lengths[pid], pid))
            yield qid, [ScoredPassage(pid, float(lengths[pid])) for pid in ranked]


def _squares(student, teacher, mask):
    """Squares of the student's scores: no order at all, but a loss by its contract."""
    return jnp.where(mask, jnp.square(student), 0.0).sum(-1)


def squares():
    return functools.partial(_squares)


@pytest.mark.slow
def test_a_loss_a_teacher_and_a_measure_from_elsewhere(tmp_path, tiny_model_dir, monkeypatch):
    monkeypatch.setattr(cli, "_configure_logging", lambda verbose: None)
    for addition in (LongestFirst, squares):
        if addition.__name__ not in gin.config._REGISTRY:
            gin.external_configurable(addition)
    folder = tmp_path / "model"
    shutil.copytree(tiny_model_dir, folder)
    before = (folder / "generate" / "stage.json").read_bytes()
    added = ("--gin.TEACHER=@LongestFirst()", "--gin.LOSS=@squares()")
    devices = ("--gin.Mesh.data=8", "--gin.LIST_BATCH_SIZE=8")
    measures = "--gin.Evaluate.measures=('P@3', 'RR@10')"
    train.command([*TINY, *devices, *added, measures, f"--model_dir={folder}"])
    assert (folder / "generate" / "stage.json").read_bytes() == before
    teach = json.loads((folder / "teach" / "stage.json").read_text())
    assert teach["settings"]["teach"]["teacher"]["is"] == "LongestFirst"
    distill = json.loads((folder / "distill" / "stage.json").read_text())
    assert "_squares" in json.dumps(distill["settings"]["distill"]["objective"])
    measured = json.loads((folder / "evaluate" / "metrics.json").read_text())
    assert measured["distill"]["test"].keys() == {"P@3", "RR@10"}


class Rented(Decoder, kind="rented"):
    """A kind of trained system from elsewhere."""


@dataclass(frozen=True)
class RentedExperiment(Experiment):
    """A kind of experiment from elsewhere, with a planner of its own."""

    kind = "rented"
    planner: ClassVar = planners.GENERATIVE._replace(
        sweep=None,
        batches=lambda experiment, sizes, mesh: None,
        lines=lambda experiment, corpus: iter([Line("rent", "a house", 12.0 * corpus.passages)]),
    )


def test_a_kind_of_experiment_from_elsewhere_enters_no_table(tmp_path, capsys):
    shipped = gin_files.from_flags([*TINY, "--model_dir=m"])
    rented = RentedExperiment(**{f.name: getattr(shipped, f.name) for f in fields(shipped)})
    disk.show(rented, CorpusSize(100, 10, 5, 0))
    asked = dict(topology="h100:1", programs="decode", passages=100, mesh=None, sweep=None)
    tables.show(SimpleNamespace(**asked), rented)
    out = capsys.readouterr().out
    assert "a house" in out and "1.2 kB" in out and "decode" in out
    assert costs.expected_flops(rented) == {} != costs.expected_flops(shipped)
    with pytest.raises(ValueError, match="--sweep: got a retriever of kind 'rented'"):
        tables.show(SimpleNamespace(**asked | {"sweep": 0}), rented)
    kinds.write_student(tmp_path, rented.kind, rented.model, rented.evaluate.search, ("distill",))
    assert kinds.TRAINED[kinds.read_student(tmp_path).kind] is Rented


def test_an_experiment_without_a_planner():
    with pytest.raises(ValueError, match="^Measured.planner: got '', expected a Planner, or the"):
        planner_of(Measured())


def test_every_addition_is_shown_by_a_test_that_is_there():
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    table = text.partition("## To add")[2].partition("\n\n`gin`")[0]
    rows = [line for line in table.splitlines() if line.startswith("| ")][1:]
    assert len(rows) >= 6
    for row in rows:
        (shown,) = re.findall(r"`(tests/\w+\.py)` \|$", row)
        assert (ROOT / shown).is_file(), row
        for path in re.findall(r"`((?:config|experiments|losses|identifiers)/\w*(?:\.py)?)`", row):
            assert (ROOT / "dgr_jax" / path).exists(), row
