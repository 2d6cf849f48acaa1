"""Several processes of CPU devices on this host, as on several hosts of a pod."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from dgr_jax import cli, partitioning, processes
from dgr_jax.processes import EXIT_LOST, EXIT_STOPPED
from tests.conftest import ROOT, TINY

JOINED = ("--coordinator_address=a:1", "--num_processes=2", "--process_id=0")


@pytest.fixture(autouse=True)
def no_environment(monkeypatch):
    for name in (*processes.VARIABLES.values(), "SLURM_STEP_NUM_TASKS"):
        monkeypatch.delenv(name, raising=False)


# What is asked for.


def test_flags_and_environment(monkeypatch):
    assert processes.settings({}) is None
    given = {"coordinator_address": "host:80", "num_processes": "2", "process_id": "1"}
    expected = {"coordinator_address": "host:80", "num_processes": 2, "process_id": 1}
    assert processes.settings(given) == expected
    for name, variable in processes.VARIABLES.items():
        monkeypatch.setenv(variable, given[name])
    assert processes.settings({}) == expected
    assert processes.settings({"process_id": "0"}) == expected | {"process_id": 0}
    assert processes.settings({"num_processes": "1", "process_id": "0"}) is None


def test_a_slurm_step_of_several_tasks(monkeypatch):
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "1")
    assert processes.settings({}) is None
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "4")
    assert processes.settings({}) == {}


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (JOINED[:1], "--num_processes (JAX_NUM_PROCESSES) and --process_id (JAX_PROCESS_ID) must"),
        (("--coordinator_address=a", *JOINED[1:]), "got 'a', expected HOST:PORT"),
        ((*JOINED[:2], "--process_id=x"), "--process_id: got 'x', expected a number"),
        ((*JOINED[:2], "--process_id=2"), "got 2, expected a number below --num_processes=2"),
    ],
)
def test_what_cannot_be(flags, message):
    parser = cli.parser("train", "")
    cli.several(parser)
    args, bindings = cli.parse(parser, ["--gin_file=quickstart.gin", *flags])
    with pytest.raises(cli.Mistake) as raised:
        cli.load_experiment(args, bindings)
    assert message in str(raised.value)


def test_alone():
    assert (processes.count(), processes.first(), processes.agree(3)) == (1, True, 3)
    processes.wait()
    with pytest.raises(SystemExit), processes.leaving():
        raise SystemExit(2)


# Rows of a batch.


@dataclasses.dataclass(frozen=True)
class Owned:
    """A sharding of which this process has some of the rows."""

    rows: tuple[int, ...]

    def addressable_devices_indices_map(self, shape):
        return {row: (slice(row, row + 1),) for row in self.rows}


@pytest.mark.parametrize(
    ("rows", "share"),
    [
        ((0, 1, 2, 3), (0, 1)),
        ((2, 3), (1, 2)),
        ((3,), (3, 4)),
        ((1, 2), (0, 1)),  # across the parts of others
        ((0, 2), (0, 1)),  # not together
    ],
)
def test_share_of_a_batch(monkeypatch, rows, share):
    mesh = partitioning.make_mesh(partitioning.Mesh(data=4), jax.devices()[:4])
    monkeypatch.setattr(partitioning, "batch_sharding", lambda mesh: Owned(rows))
    assert partitioning.batch_share(mesh) == share


def test_placed_rows_are_where_they_were():
    mesh = partitioning.make_mesh(partitioning.Mesh(data=4, model=2), jax.devices()[:8])
    rows = np.arange(24, dtype=np.int32).reshape(8, 3)
    placed = partitioning.shard_batch({"a": rows}, mesh)["a"]
    np.testing.assert_array_equal(placed, rows)
    assert placed.sharding == partitioning.batch_sharding(mesh)


# Whole runs.


class Run:
    """`train` as `number` processes, each with an equal part of the devices."""

    def __init__(self, shared: Path, folder: Path, number: int, *arguments: str) -> None:
        with socket.socket() as free:
            free.bind(("localhost", 0))
            port = free.getsockname()[1]
        devices = 4 // number if number > 2 else 2 // number
        settings = {
            "PYTHONPATH": str(ROOT),
            "XLA_FLAGS": "--xla_backend_optimization_level=0 "
            f"--xla_force_host_platform_device_count={devices}",
            "JAX_COMPILATION_CACHE_DIR": str(shared / f"compiled-{number}"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.1",
        }
        if number > 1:
            settings["JAX_COORDINATOR_ADDRESS"] = f"localhost:{port}"
            settings["JAX_NUM_PROCESSES"] = str(number)
        self.folder = folder
        self.logs = [folder.with_name(f"{folder.name}.{i}.log") for i in range(number)]
        self.processes = []
        for i, log in enumerate(self.logs):
            joined = [f"--process_id={i}"] if number > 1 else []
            command = [sys.executable, "-m", "dgr_jax.train", *TINY, "--gin.Mesh.data=-1"]
            with log.open("w") as out:
                self.processes.append(
                    subprocess.Popen(
                        [*command, *arguments, f"--model_dir={folder}", *joined],
                        env=os.environ | settings,
                        cwd=shared,
                        stdout=out,
                        stderr=subprocess.STDOUT,
                    )
                )

    def wait_for(self, path: str) -> None:
        deadline = time.monotonic() + 120
        while not (self.folder / path).exists():
            assert time.monotonic() < deadline and self.processes[0].poll() is None, self.said()
            time.sleep(0.02)

    def codes(self) -> list[int]:
        try:
            return [process.wait(timeout=120) for process in self.processes]
        finally:
            for process in self.processes:
                process.kill()

    def said(self) -> list[str]:
        return [log.read_text() for log in self.logs]


@pytest.fixture(scope="module")
def begin(tiny_model_dir, tmp_path_factory):
    """begin(name, number, ...) -> a Run, whose collection is prepared already."""
    shared = tmp_path_factory.mktemp("processes")

    def start(name: str, number: int, *arguments: str) -> Run:
        folder = shared / name
        if not folder.exists():
            shutil.copytree(tiny_model_dir / "prepare", folder / "prepare")
        return Run(shared, folder, number, *arguments)

    return start


def losses(folder: Path, system: str) -> list[tuple[int, float]]:
    rows = (folder / system / "metrics.jsonl").read_text().splitlines()
    return [(row["step"], row["loss"]) for row in map(json.loads, rows) if "loss" in row]


def assert_alike(found: Path, expected: Path, systems: tuple[str, ...]) -> None:
    for system in systems:
        mine, theirs = losses(found, system), losses(expected, system)
        assert [step for step, _ in mine] == [step for step, _ in theirs]
        np.testing.assert_allclose(mine, theirs, rtol=1e-6)


@pytest.mark.slow
def test_two_processes_are_as_one(begin):
    alone = begin("one", 1)
    assert alone.codes() == [0], alone.said()
    both = begin("two", 2)
    assert both.codes() == [0, 0], both.said()
    systems = ("generate", "control", "distill")
    assert_alike(both.folder, alone.folder, systems)
    for system in ("bm25", *systems):
        run = f"evaluate/{system}.test.trec"
        assert (both.folder / run).read_bytes() == (alone.folder / run).read_bytes()
    found, expected = (np.load(r.folder / "candidates/candidates.npz") for r in (both, alone))
    for name in ("passages", "scores"):
        np.testing.assert_array_equal(found[name], expected[name])
    assert "evaluate: done" in both.said()[0]
    assert "done" not in both.said()[1] and "Success@1" not in both.said()[1]


LONG = ("--stages=generate", "--gin.GENERATE_STEPS=30")


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_one_dies_and_the_restart_goes_on(begin, victim):
    run = begin(f"dies{victim}", 2, *LONG)
    run.wait_for("generate/checkpoints/6")
    run.processes[victim].kill()
    killed = time.monotonic()
    codes = run.codes()
    assert time.monotonic() - killed < 60
    assert codes[victim] == -signal.SIGKILL and codes[1 - victim] == EXIT_LOST, run.said()
    last = run.said()[1 - victim].splitlines()[-1]
    assert last.startswith(f"error: process {victim} ({socket.gethostname()}) died: no sign of")
    assert "goes on from the newest checkpoint" in last


@pytest.mark.slow
def test_four_processes_stop_at_one_step_and_go_on(begin):
    run = begin("four", 4, *LONG)
    run.wait_for("generate/checkpoints/6")
    run.processes[2].terminate()
    assert run.codes() == [EXIT_STOPPED] * 4, run.said()
    (said,) = [line for line in run.said()[0].splitlines() if "SIGTERM" in line]
    step = int(said.split("saved step ")[1].split(",")[0])
    assert (run.folder / f"generate/checkpoints/{step}").is_dir()
    again = begin("four", 4, *LONG)
    assert again.codes() == [0] * 4, again.said()
    assert f"goes on from step {step} of 30" in again.said()[0]
    whole = begin("dies1", 2, *LONG)  # goes on, too
    assert whole.codes() == [0, 0], whole.said()
    assert "goes on from step" in whole.said()[0]
    assert_alike(again.folder, whole.folder, ("generate",))
