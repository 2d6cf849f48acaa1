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
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from dgr_jax import partitioning, prepare, processes
from dgr_jax.config import cli, gin_files
from dgr_jax.config.mistakes import Mistake
from dgr_jax.interrupts import EXIT_INTERRUPTED
from dgr_jax.process_group import EXIT_LOST, EXIT_STOPPED
from dgr_jax.stages import pipeline
from tests.conftest import ROOT, TINY

JOINED = ("--coordinator_address=a:1", "--num_processes=2", "--process_id=0")


@pytest.fixture(autouse=True)
def no_environment(monkeypatch):
    for name in (*processes.VARIABLES.values(), "SLURM_STEP_NUM_TASKS"):
        monkeypatch.delenv(name, raising=False)


# What is asked for.


@pytest.mark.parametrize(("first", "exported"), [(True, ["away"]), (False, [])])
def test_one_process_exports_for_all(first, exported, monkeypatch):
    targets = []
    monkeypatch.setattr(gin_files, "load_experiment", lambda *_: SimpleNamespace())
    monkeypatch.setattr(pipeline, "run", lambda *_, **__: None)
    exporter = SimpleNamespace(export=lambda _, target: targets.append(target))
    monkeypatch.setitem(sys.modules, "dgr_jax.stages.prepared", exporter)
    monkeypatch.setattr(processes, "first", lambda: first)
    prepare.command(["--model_dir=model", "--export=away"])
    assert targets == exported


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
    with pytest.raises(Mistake) as raised:
        gin_files.load_experiment(args, bindings)
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


# Of many steps, by the script that each of several processes runs.

STEPS = """
import os, sys, time
from dgr_jax import processes

index, number = int(sys.argv[1]), int(sys.argv[2])
with processes.leaving():
    address = f"localhost:{sys.argv[3]}"
    given = {"coordinator_address": address, "num_processes": number, "process_id": index}
    processes.start(given)
    assert processes.agree(index) == 0 and processes.count() == number
    processes.wait()
    print("joined", flush=True)
    if sys.argv[4] == "fails" and index == 1:
        sys.exit(2)
    with processes.blaming(), processes.Stop() as stop:
        for step in range(1, 5000):
            time.sleep(0.01 + 0.01 * index)  # not in step
            if sys.argv[4] == "ends" and step == 5:
                break
            if stop.requested(step):
                print("stopped at", step, flush=True)
                sys.exit(stop.status)
    processes.wait()
"""


class Started:
    """Processes, and the files that they write to."""

    def __init__(self, commands, logs: list[Path], **settings) -> None:
        self.logs, self.processes = logs, []
        for command, log in zip(commands, logs, strict=True):
            with log.open("w") as out:
                self.processes.append(
                    subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, **settings)
                )

    def wait_for(self, there) -> None:
        deadline = time.monotonic() + 300
        while not there():
            assert time.monotonic() < deadline and self.processes[0].poll() is None, self.said()
            time.sleep(0.02)

    def codes(self) -> list[int]:
        try:
            return [process.wait(timeout=300) for process in self.processes]
        finally:
            for process in self.processes:
                process.kill()

    def said(self) -> list[str]:
        return [log.read_text() for log in self.logs]


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return free.getsockname()[1]


def environment(devices: int = 1) -> dict[str, str]:
    flags = "--xla_backend_optimization_level=0 --xla_force_host_platform_device_count="
    return os.environ | {"PYTHONPATH": str(ROOT), "XLA_FLAGS": f"{flags}{devices}"}


@pytest.fixture
def steps(tmp_path):
    """steps(number, what) -> processes that have joined."""

    def start(number: int, what: str = "") -> Started:
        port, script = str(free_port()), [sys.executable, "-c", STEPS]
        commands = [[*script, str(i), str(number), port, what] for i in range(number)]
        run = Started(commands, [tmp_path / f"{i}" for i in range(number)], env=environment())
        if not what:
            run.wait_for(lambda: all("joined" in said for said in run.said()))
        return run

    return start


@pytest.mark.slow
def test_they_end_together(steps):
    assert steps(2, "ends").codes() == [0, 0]
    failed = steps(2, "fails")
    assert failed.codes() == [2, 2]
    said = f"error: process 1 ({socket.gethostname()}) ended with exit status 2, see there"
    assert said in failed.said()[0]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "status"), [(signal.SIGTERM, EXIT_STOPPED), (signal.SIGINT, EXIT_INTERRUPTED)]
)
def test_four_stop_after_the_same_step(steps, number, status):
    run = steps(4)
    run.processes[2].send_signal(number)
    assert run.codes() == [status] * 4, run.said()
    (last,) = {said.splitlines()[-1] for said in run.said()}
    assert last.startswith("stopped at ")


def assert_named(run: Started, victim: int) -> None:
    """The other processes soon say which one was killed."""
    killed, codes = time.monotonic(), run.codes()
    assert time.monotonic() - killed < 60
    for i, (code, said) in enumerate(zip(codes, run.said(), strict=True)):
        if i == victim:
            assert code == -signal.SIGKILL
            continue
        assert code == EXIT_LOST, said
        last = said.splitlines()[-1]
        assert last.startswith(f"error: process {victim} ({socket.gethostname()}) died: no sign of")
        assert last.endswith("goes on from the newest checkpoint")


@pytest.mark.slow
def test_the_first_dies(steps):
    run = steps(3)
    run.processes[0].kill()
    assert_named(run, 0)


# Whole experiments.

SMALL = (
    *TINY,
    "--gin.Mesh.data=-1",
    "--gin.Experiment.control=False",
    "--gin.Evaluate.bm25=False",
    "--gin.Candidates.sources=('labelled',)",
)


@pytest.fixture(scope="module")
def experiment(tiny_model_dir, tmp_path_factory):
    """experiment(name, number): `train` as so many processes, of two devices together; its
    collection is prepared already."""
    shared = tmp_path_factory.mktemp("processes")

    def start(name: str, number: int) -> Started:
        folder = shared / name
        if not folder.exists():
            shutil.copytree(tiny_model_dir / "prepare", folder / "prepare")
        command = [sys.executable, "-m", "dgr_jax.train", *SMALL, f"--model_dir={folder}"]
        settings = environment(2 // number)
        settings["JAX_COMPILATION_CACHE_DIR"] = str(shared / f"compiled-{number}")
        settings["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.1"
        if number > 1:
            settings["JAX_COORDINATOR_ADDRESS"] = f"localhost:{free_port()}"
            settings["JAX_NUM_PROCESSES"] = str(number)
        commands = [
            [*command, f"--process_id={i}"] if number > 1 else command for i in range(number)
        ]
        logs = [shared / f"{name}.{i}.log" for i in range(number)]
        run = Started(commands, logs, env=settings, cwd=shared)
        run.folder = folder
        return run

    return start


def losses(folder: Path, system: str) -> list[tuple[int, float]]:
    rows = map(json.loads, (folder / system / "metrics.jsonl").read_text().splitlines())
    return [(row["step"], row["loss"]) for row in rows if "loss" in row]


@pytest.mark.slow
def test_two_processes_killed_and_gone_on_are_as_one(experiment):
    """The same losses, the same candidates and, byte by byte, the same runs."""
    alone = experiment("one", 1)
    assert alone.codes() == [0], alone.said()
    killed = experiment("two", 2)
    killed.wait_for((killed.folder / "generate/checkpoints/3").exists)
    killed.processes[1].kill()
    assert_named(killed, 1)
    both = experiment("two", 2)
    assert both.codes() == [0, 0], both.said()
    for system in ("generate", "distill"):
        mine, theirs = (dict(losses(run.folder, system)) for run in (both, alone))
        for step in mine.keys() & theirs.keys():
            assert mine[step] == pytest.approx(theirs[step], rel=1e-6)
        assert mine and max(mine) == max(theirs)
        run = f"evaluate/{system}.test.trec"
        assert (both.folder / run).read_bytes() == (alone.folder / run).read_bytes()
    found, expected = (np.load(r.folder / "candidates/candidates.npz") for r in (both, alone))
    for name in ("passages", "scores"):
        np.testing.assert_array_equal(found[name], expected[name])
    assert "evaluate: done" in both.said()[0]
    assert "done" not in both.said()[1] and "Success@1" not in both.said()[1]
