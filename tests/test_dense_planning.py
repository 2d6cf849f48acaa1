"""Plans of a dense retriever: its train step, and exact search on chips that are not here."""

import functools

import pytest

from dgr_jax import plan
from dgr_jax.capacity import chips, disk
from dgr_jax.capacity import dense as dense_plans
from dgr_jax.capacity.chips import GIB, Topology
from dgr_jax.capacity.sizes import state_bytes
from dgr_jax.config import cli, gin_files
from dgr_jax.identifiers.scheme import CorpusSize
from dgr_jax.partitioning import Mesh
from tests.test_planning import _mesh

SMALL = (
    "--gin_file=models/tiny.gin", "--gin.T5Config.scan_layers=True", "--gin.BATCH_SIZE=8",
    "--gin.QUERY_LENGTH=8", "--gin.PASSAGE_LENGTH=16", "--gin.NEGATIVES=bm25",
    "--gin.ExactSearch.batch_size=8", "--gin.DEPTH=20", "--gin.ExactSearch.storage=bfloat16",
)  # fmt: skip
H100, ONE = chips.topology("h100:1"), Mesh(data=1, model=1)


@functools.cache
def experiment(*bindings):
    flags = ["--gin_file=dense.gin", *bindings]
    return gin_files.load_experiment(*cli.parse(cli.parser("plan", ""), flags), keep=False)


def search(*bindings, topology=H100, mesh=ONE):
    made = experiment("--gin_file=models/base.gin", *bindings)
    found = dense_plans.plan("search", made, 8_800_000, topology, mesh)
    return found, dense_plans.advice(found, made, 8_800_000)


def test_vectors_of_a_large_corpus_on_one_gpu():
    """8.8M x 768: 12.6 GiB in bfloat16 pass the limit, until it is raised."""
    found, say = search("--gin.ExactSearch.storage=bfloat16")
    assert found.fits and found.parts["vectors"] < 8 * GIB
    assert say[0].startswith("vectors pass through in 4 blocks")
    assert say[1] == "--gin.ExactSearch.max_device_bytes=17179869184 keeps them on the chips"
    raised = "--gin.ExactSearch.max_device_bytes=17179869184"
    resident, say = search("--gin.ExactSearch.storage=bfloat16", raised)
    assert say == [] and resident.fits
    assert resident.parts["vectors"] == pytest.approx(8.8e6 * 768 * 2, rel=0.01)
    assert resident.flops == pytest.approx(2 * 256 * 8.8e6 * 768, rel=0.01)
    assert found.flops == pytest.approx(resident.flops, rel=0.01)  # all blocks are searched
    small, _ = search("--gin.ExactSearch.storage=int8", raised)
    assert small.parts["vectors"] == pytest.approx(8.8e6 * (768 + 4), rel=0.01)
    exact, _ = search("--gin.ExactSearch.max_device_bytes=34359738368")
    assert exact.flops == pytest.approx(resident.flops, rel=0.01)
    slower = exact.times["compute"] / resident.times["compute"]
    assert slower == pytest.approx(989 / 67, rel=0.01)  # no tensor core computes float32 exactly


def test_vectors_that_do_not_fit():
    topology = chips.topology("v5e:1x1")
    made = experiment(
        "--gin_file=models/base.gin", "--gin.ExactSearch.max_device_bytes=1099511627776"
    )
    found = dense_plans.plan("search", made, 8_800_000, topology, ONE, compile=False)
    assert not found.fits
    assert dense_plans.advice(found, made, 8_800_000) == [
        "--gin.ExactSearch.storage=bfloat16", "a larger --topology: vectors are cut over all chips",
    ]  # fmt: skip
    four = chips.topology("v5e:2x2")
    cut = dense_plans.plan("search", made, 8_800_000, four, Mesh(4, 1), compile=False)
    assert cut.fits and cut.sent["all-gather"] == 8 * 256 * 100 * 3


def test_the_command(capsys):
    plan.command(["--gin_file=dense.gin", "--topology=h100:8", "--mesh=8,1", *SMALL[:3]])
    out = capsys.readouterr().out
    assert "8,800,000 vectors of 128 in float32: 4.20 GiB; top 100" in out
    for line in ("parameters", "optimizer", "vectors", "temporaries", "bound by network"):
        assert line in out
    flags = ["--gin_file=dense.gin", "--topology=h100:1"]
    with pytest.raises(
        ValueError, match="--programs: got 'decode', expected some of dense, search"
    ):
        plan.command([*flags, "--programs=decode"])
    with pytest.raises(
        ValueError, match="--sweep: got a retriever of kind .dense., expected one that writes"
    ):
        plan.command([*flags, "--sweep"])


def test_checkpoints_hold_the_optimizer_too():
    made = experiment("--gin_file=runs/refresh.gin", "--gin.Training.keep_checkpoints=3")
    model = dense_plans.encoder(made)
    parameters, optimizer = state_bytes(model, made.train)
    assert optimizer > 0
    lines = {
        (line.stage, line.what): line for line in disk.lines(made, CorpusSize(5000, 50, 300, 2))
    }
    assert lines["dense", "3 checkpoints"].size == 3 * (parameters + optimizer)
    assert lines["refresh", "3 checkpoints"].size == 3 * sum(state_bytes(model, made.refresh))
    assert lines["evaluate", "parameters"].on_device == parameters


@pytest.mark.slow
@pytest.mark.parametrize("name", dense_plans.PROGRAMS)
def test_the_formula_counts_what_the_program_does(name, monkeypatch):
    """Compiled for host devices in place of TPUs."""
    made, chips = experiment(*SMALL), Topology("v5e", (2, 4))
    mesh = Mesh(data=2, model=4)
    formula = dense_plans.plan(name, made, 5000, chips, mesh, compile=False)
    monkeypatch.setattr(Topology, "devices", lambda self: _mesh().devices.ravel().tolist())
    found = dense_plans.plan(name, made, 5000, chips, mesh)
    assert found.source == "compiled" and formula.source == "formula"
    assert found.flops == pytest.approx(formula.flops, rel=0.15)
    assert {**found.parts, "temporaries": 0} == {**formula.parts, "temporaries": 0}
    assert found.queries == 8
