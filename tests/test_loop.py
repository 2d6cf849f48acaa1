"""The loop: what it writes, and that stopping it anywhere changes nothing."""

import contextlib
import functools
import io
import itertools
import json
import logging
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
import types
from pathlib import Path
from unittest import mock

import jax
import numpy as np
import pytest

from dgr_jax import checkpoints, partitioning
from dgr_jax.partitioning import LAYOUTS, Mesh, make_mesh
from dgr_jax.training import loop, metrics, validation
from dgr_jax.training.objectives import Generation
from dgr_jax.training.optimizers import Linear
from dgr_jax.training.source import ArraySource
from dgr_jax.training.validation import METRIC, Validation
from tests import toy

STEPS = 10


def run(folder, **changes):
    """A short training run with dropout, as a user would start it again and again."""
    settings = {
        "name": "generate",
        "folder": folder,
        "model": toy.Toy(dropout_rate=0.1),
        "objective": Generation(),
        "optimizer": toy.Sgd(0.05, momentum=0.9),
        "source": ArraySource(toy.generation_examples(20), 8, 0),
        "mesh": make_mesh(Mesh(), toy.devices(1)),
        "total_steps": STEPS,
        "seed": 5,
        "initial_params": toy.params(),
        "log_every": 4,
        "checkpoint_every": 3,
    }
    with mock.patch.object(metrics, "_summary_writers", lambda: None):
        return loop.train(**(settings | changes))


def at_each_step(act, every=1, **settings):
    """A validation that calls act(number of the search), whose value, if there is one, counts."""
    numbers = itertools.count(1)
    return Validation(lambda params: act(next(numbers)) or 0.0, 12, every, **settings)


def wait_at(folder, step, now):
    """Stops for good at a step, once the rest of the world can see that it is there."""
    if now == step:
        (Path(folder) / "here").touch()
        time.sleep(600)


def test_parameters_lie_as_the_layout_says(tmp_path):
    """Cut over `data` too with two parameter dimensions; and trained alike."""
    mesh = {"mesh": make_mesh(Mesh(data=2), toy.devices(2)), "model": toy.Toy(), "total_steps": 2}
    plain = run(tmp_path / "plain", **mesh)
    cut = run(tmp_path / "cut", rules=LAYOUTS[2, 1], **mesh)
    assert plain.params["kernel"].sharding.is_fully_replicated
    assert not cut.params["kernel"].sharding.is_fully_replicated
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6),
        jax.device_get(cut.params),
        jax.device_get(plain.params),
    )


class Counting:
    """Generation that counts how often its loss is traced."""

    def __init__(self):
        self.traces = 0

    def loss_fn(self, model):
        loss = Generation().loss_fn(model)

        def counted(params, batch, rng):
            self.traces += 1
            return loss(params, batch, rng)

        return counted


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Folder and last state of an uninterrupted run, which compiles its step once."""
    folder, objective = tmp_path_factory.mktemp("whole"), Counting()
    state = run(folder, objective=objective)
    assert objective.traces == 1
    return folder, jax.device_get(state)


def _assert_equal(got, expected):
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(got), expected)


def _rows(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def _losses(folder):
    return {row["step"]: row["loss"] for row in _rows(folder) if "loss" in row}


def test_a_run_learns_and_writes(whole):
    folder, state = whole
    assert int(state.step) == STEPS
    rows = _rows(folder)
    assert [row["step"] for row in rows] == [3, 4, 6, 8, 9, 10]
    assert rows[-1]["loss"] < 0.7 * rows[0]["loss"]
    assert {"loss", "grad_norm", "token_accuracy", "examples_per_second"} <= rows[-1].keys()
    assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == ["10", "9"]


def test_a_finished_run_does_nothing(whole):
    folder, state = whole
    before = (folder / "metrics.jsonl").read_text()
    _assert_equal(run(folder, source=None), state)
    assert (folder / "metrics.jsonl").read_text() == before


def test_a_loss_that_does_not_fall_is_told(tmp_path, caplog):
    rises = {"optimizer": toy.Sgd(-0.3), "total_steps": 20}
    run(tmp_path / "rises", **rises)
    assert "generate: the loss is" in caplog.text and "it did not fall" in caplog.text
    assert "look at the learning rate (its `peak`)" in caplog.text
    caplog.clear()
    run(tmp_path / "falls", total_steps=20)
    run(tmp_path / "few", **(rises | {"total_steps": 5}))
    assert "did not fall" not in caplog.text and "nothing was learned" not in caplog.text


@pytest.mark.parametrize(
    ("losses", "resumed", "at_random", "said"),
    [
        ((9.0, 8.3), "", True, "a token costs 8.3 in the end, as one of 4000 that are all equally"),
        ((9.0, 3.0), "", True, ""),
        (
            (2.0, 2.5),
            "",
            True,
            "the loss is 2.5 in the end and was 2 at the start: it did not fall",
        ),
        ((2.0, 2.5), "", False, ""),
        ((2.0, 3.5), "", False, "the loss is 3.5 in the end and was 2 at the start"),
        ((2.0, 2.1), "5.0", True, ""),  # of the part that ran before
    ],
)
def test_what_is_told_in_the_end(tmp_path, caplog, losses, resumed, at_random, said):
    """Learning rates that are too high leave the loss at ln V."""
    begin = 0
    if resumed:
        begin, row = 10, f'{{"step": 5, "loss": {resumed}}}'
        (tmp_path / "metrics.jsonl").write_text(row + "\n")
    model = types.SimpleNamespace(config=types.SimpleNamespace(vocab_size=4000))
    no_files = mock.patch.object(metrics, "_summary_writers", lambda: None)
    with no_files, loop._Report("generate", tmp_path, begin, 100, lambda step: 0.1) as report:
        for step, loss in enumerate(losses, start=begin + 1):
            one = {name: (np.float32(loss), np.float32(1)) for name in ("loss", "grad_norm")}
            measured = one | {"token_accuracy": (np.float32(0), np.float32(1))}
            report.add(step, measured, {"tokens": np.zeros((8, 2))})
            report.log(step)
        report.conclude(model, at_random=at_random)
    warned = [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]
    assert len(warned) == bool(said) and said in "".join(warned)


@pytest.mark.slow
def test_killed_and_started_again(tmp_path, whole):
    """SIGKILL in the middle, then the same call: the same parameters bit for bit."""
    code = (
        "import functools; from tests import test_loop as t; "
        f"wait = functools.partial(t.wait_at, {str(tmp_path)!r}, 7); "
        f"t.run({str(tmp_path)!r}, validation=t.at_each_step(wait))"
    )
    child = subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=Path(__file__).parent.parent,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
    )
    deadline = time.monotonic() + 120
    while not (tmp_path / "here").exists():
        assert child.poll() is None, "the child ended by itself"
        assert time.monotonic() < deadline
        time.sleep(0.05)
    child.kill()
    assert child.wait() == -signal.SIGKILL
    state = run(tmp_path)
    _assert_equal(state, whole[1])
    # Rows after the restored step were written anew, none twice.
    losses = [(row["step"], row["loss"]) for row in _rows(tmp_path) if "loss" in row]
    assert losses == sorted(set(losses)) and losses[-1][0] == STEPS


KILLS = 20


def mortal(folder, seed):
    """Trains until it has been killed KILLS times at random moments, then to the end.

    Every life is a fork of this process, which has imported all and started no device, so that it
    costs a fraction of a second. Writes what it saw to folder/lives.json.
    """
    folder, delays = Path(folder), random.Random(seed)
    begun, seen = folder / "begun", {"killed": 0, "saving": 0, "steps": []}
    settings = {"total_steps": LONG, "checkpoint_every": 1}
    while seen["killed"] < KILLS:
        begun.unlink(missing_ok=True)
        child = os.fork()
        if not child:
            signal.alarm(60)  # no life outlasts a test that was stopped
            with contextlib.suppress(BaseException):
                run(folder, validation=at_each_step(functools.partial(mark, begun)), **settings)
            os._exit(0)
        deadline = time.monotonic() + 60
        steps = delays.randint(2, 4)  # each waits for the save of the step before it
        while not begun.exists() or begun.stat().st_size < steps:
            assert time.monotonic() < deadline
            time.sleep(0.002)
        time.sleep(delays.uniform(0, 0.05))
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        assert os.waitstatus_to_exitcode(status) == -signal.SIGKILL, "it ended by itself"
        names = [path.name for path in (folder / "checkpoints").iterdir()]
        seen["killed"] += 1
        seen["saving"] += any("tmp" in name for name in names)
        seen["steps"].append(max((int(name) for name in names if name.isdecimal()), default=0))
    state = run(folder, total_steps=LONG, checkpoint_every=LONG)
    np.savez(folder / "end.npz", *jax.tree.leaves(jax.device_get(state)))
    (folder / "lives.json").write_text(json.dumps(seen))


LONG = 200  # steps, more than all lives together reach


def mark(path, now):
    with path.open("a") as file:
        file.write(".")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_killed_twenty_times_at_random(tmp_path):
    """Among them during saves, which follow each other without a pause."""
    code = f"from tests import test_loop; test_loop.mortal({str(tmp_path)!r}, seed=4)"
    settings = {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "--xla_backend_optimization_level=0",
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path / "compiled"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=Path(__file__).parent.parent,
        env=os.environ | settings,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    seen = json.loads((tmp_path / "lives.json").read_text())
    assert seen["killed"] == KILLS and seen["saving"] >= 1
    assert 0 < seen["steps"][-1] < LONG and seen["steps"] == sorted(seen["steps"])
    expected = jax.device_get(run(tmp_path / "whole", total_steps=LONG, checkpoint_every=LONG))
    with np.load(tmp_path / "end.npz") as end:
        got = list(end.values())
    for one, other in zip(got, jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(one, other)
    names = [path.name for path in (tmp_path / "checkpoints").iterdir()]
    assert max(map(int, names)) == LONG  # all of them whole: no damage, nothing left behind


def test_sigterm_saves_and_leaves(tmp_path, whole):
    def preempt(now):
        if now == 5:
            os.kill(os.getpid(), signal.SIGTERM)

    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as leaving:
        run(tmp_path, validation=at_each_step(preempt))
    assert leaving.value.code == loop.EXIT_PREEMPTED == 75
    assert signal.getsignal(signal.SIGTERM) == before
    with checkpoints.Checkpoints(tmp_path / "checkpoints") as saved:
        assert saved.latest() in (5, 6)  # Python runs the handler between two instructions
    _assert_equal(run(tmp_path), whole[1])
    assert _losses(tmp_path)[STEPS] == _losses(whole[0])[STEPS]


class Warming(toy.Sgd):
    learning_rate = Linear(peak=0.4, warmup_steps=4)


def test_the_learning_rate_is_among_the_metrics(tmp_path):
    run(tmp_path, model=toy.Toy(), optimizer=Warming(0.05), total_steps=8, checkpoint_every=100)
    rates = {row["step"]: row["learning_rate"] for row in _rows(tmp_path)}
    assert rates == {
        4: pytest.approx(0.4),
        8: pytest.approx(0.1),
    }  # of the step before it is counted


# What is chosen on held-out questions.

VALUES = {3: 0.9, 6: 0.5, 9: 0.9, 10: 0.2}  # of the search at a step


def by_values(every=3, **settings):
    """A validation of a run from its start, whose searches give VALUES."""
    steps = [step for step in range(1, STEPS + 1) if step % every == 0 or step == STEPS]
    value = lambda number: VALUES.get(steps[number - 1], 0.1)
    return at_each_step(value, every, **settings)


def _validated(folder):
    return {row["step"]: row[METRIC] for row in _rows(folder) if METRIC in row}


def _read(folder):
    abstract = partitioning.abstract_params(toy.Toy(), make_mesh(Mesh(), toy.devices(1)))
    return checkpoints.restore_params(folder / "checkpoints", abstract)


def _steps(folder):
    return sorted(int(path.name) for path in (folder / "checkpoints").iterdir())


def test_a_validation_changes_no_step(tmp_path, whole, caplog):
    with caplog.at_level(logging.INFO):
        state = run(tmp_path, validation=by_values())
    _assert_equal(state, whole[1])
    assert _losses(tmp_path)[STEPS] == _losses(whole[0])[STEPS]
    assert _validated(tmp_path) == VALUES
    assert (
        "generate: step 9: RR@10 0.9000 of 12 questions held out of training; the best is 0.9000, "
        "of step 3" in caplog.messages
    )
    assert _steps(tmp_path) == [9, 10]  # the last one counts
    _assert_equal(_read(tmp_path), whole[1].params)
    assert json.loads((tmp_path / "validation.json").read_text()) == {
        "measure": "RR@10", "questions": 12, "keep": "last", "step": 10, "value": 0.2,
        "last_step": 10, "total_steps": 10,
    }  # fmt: skip
    assert validation.readable(tmp_path) == ""  # nothing was chosen


def test_the_best_is_kept_and_is_what_counts(tmp_path):
    """Between two checkpoints too; of equal values the first."""
    third = jax.device_get(run(tmp_path / "three", total_steps=3)).params
    run(tmp_path / "ten", validation=by_values(keep="best"), checkpoint_every=100)
    assert _steps(tmp_path / "ten") == [3, 10]
    _assert_equal(_read(tmp_path / "ten"), third)
    assert validation.readable(tmp_path / "ten") == (
        "step 3 of 10 was chosen by RR@10 0.9000 of 12 questions held out of training"
    )
    searches = []
    state = run(tmp_path / "ten", validation=at_each_step(searches.append, keep="best"))
    assert int(state.step) == STEPS and not searches  # a finished run does nothing


def test_patience_ends_a_run_for_good(tmp_path, caplog):
    state = run(tmp_path, validation=by_values(keep="best", patience=2), total_steps=STEPS)
    assert int(state.step) == 9 and _validated(tmp_path) == {3: 0.9, 6: 0.5, 9: 0.9}
    before = (tmp_path / "metrics.jsonl").read_text()
    with caplog.at_level(logging.INFO):
        again = run(tmp_path, validation=by_values(keep="best", patience=2))
    assert int(again.step) == 9 and (tmp_path / "metrics.jsonl").read_text() == before
    assert (
        "generate: ended early at step 9 of 10: 2 searches in a row found no better RR@10"
        in caplog.messages
    )
    assert validation.readable(tmp_path) == (
        "step 3 of 10 was chosen by RR@10 0.9000 of 12 questions held out of training, ended early "
        "at step 9"
    )


def _outcome(folder):
    rows = [{k: v for k, v in row.items() if k != "examples_per_second"} for row in _rows(folder)]
    return rows, (folder / "validation.json").read_text(), _read(folder)


class Killed(Exception):
    pass


@pytest.fixture(scope="module")
def chosen(tmp_path_factory):
    """The outcome of an uninterrupted run that keeps its best, by a value of its parameters."""
    folder = tmp_path_factory.mktemp("chosen")
    run(folder, validation=Validation(_value, 12, 2, "best", 3), log_every=1)
    return _outcome(folder)


def _value(params):
    """Rises and falls with the parameters."""
    return float(np.sin(40 * np.abs(jax.device_get(params)["kernel"]).sum()))


@pytest.mark.parametrize("searches", [1, 2, 4])
def test_cut_off_in_a_validation_and_started_again(tmp_path, chosen, searches):
    """Rows, choice and parameters are those of the run that nobody cut off."""
    left = itertools.count(searches, -1)

    def dies(params):
        if not next(left):
            raise Killed
        return _value(params)

    with pytest.raises(Killed):
        run(tmp_path, validation=Validation(dies, 12, 2, "best", 3), log_every=1)
    run(tmp_path, validation=Validation(_value, 12, 2, "best", 3), log_every=1)
    rows, report, params = _outcome(tmp_path)
    assert (rows, report) == chosen[:2]
    _assert_equal(params, jax.device_get(chosen[2]))


def test_without_its_best_a_checkpoint_is_of_no_use(tmp_path, caplog):
    run(tmp_path, validation=by_values(keep="best"), checkpoint_every=2, keep_checkpoints=9)
    assert _steps(tmp_path) == [2, 3, 4, 6, 8, 10]
    before = _outcome(tmp_path)[1]
    shutil.rmtree(tmp_path / "checkpoints" / "3")
    run(tmp_path, validation=by_values(keep="best"), keep_checkpoints=9)
    assert "the best checkpoint before it, of step 3, is gone" in caplog.text
    names = {path.name for path in (tmp_path / "checkpoints").iterdir()}
    assert {"2", "3", "4.damaged", "6.damaged", "8.damaged", "10.damaged"} <= names
    assert _outcome(tmp_path)[1] == before


class Poisoned:
    """A source whose batch of step 4 gives a loss that is not a number."""

    def __init__(self, source):
        self.source = source

    def batch(self, step, process_index=0, process_count=1):
        batch = self.source.batch(step, process_index, process_count)
        if step == 4:
            batch["decoder_loss_weights"][0, 0] = np.nan
        return batch


def test_a_loss_that_is_not_a_number(tmp_path):
    source = Poisoned(ArraySource(toy.generation_examples(20), 8, 0))
    with pytest.raises(FloatingPointError) as error:
        run(tmp_path, model=toy.Toy(), source=source)
    assert str(error.value) == (
        "generate: loss is nan at step 5; lower the learning rate (its `peak`) or clip gradients "
        "(`max_grad_norm`), and look for examples without targets; the last checkpoint is from "
        "before"
    )
    with checkpoints.Checkpoints(tmp_path / "checkpoints") as saved:
        assert saved.latest() == 3


def test_errors(tmp_path, whole):
    for name in ("total_steps", "log_every", "checkpoint_every"):
        with pytest.raises(ValueError) as error:
            run(tmp_path, **{name: 0})
        assert str(error.value) == f"{name}: got 0, expected 1 or more"
    with pytest.raises(ValueError) as error:
        run(whole[0], seed=6)
    assert str(error.value) == (
        "seed: got 6, expected 5, that of the checkpoint: batches would come in another order; "
        "set it back or give another folder (MODEL_DIR)"
    )
    with pytest.raises(ValueError) as error:
        run(whole[0], total_steps=4)
    assert str(error.value) == (
        "total_steps: got 4, expected 10 or more, the step of the newest checkpoint; set it back "
        "or give another folder (MODEL_DIR)"
    )


def test_means_weigh_by_weight():
    window = [{"loss": (6.0, 2.0), "first": (0.0, 0.0)}, {"loss": (1.0, 8.0), "first": (0.0, 0.0)}]
    assert loop._means(window) == {"loss": 0.7}


# What the loop writes with.


def test_metrics_file_after_a_restart(tmp_path, monkeypatch):
    monkeypatch.setattr(metrics, "_summary_writers", lambda: None)
    with metrics.MetricsWriter(tmp_path) as writer:
        for step in (2, 4, 6):
            writer.write(step, {"loss": step / 2})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 8, "lo')  # killed while writing
    with metrics.MetricsWriter(tmp_path, after=4) as writer:
        writer.write(6, {"loss": float("nan")})
    assert _rows(tmp_path) == [
        {"step": 2, "loss": 1.0},
        {"step": 4, "loss": 2.0},
        {"step": 6, "loss": None},
    ]


def test_without_tensorflow_there_is_still_the_file(tmp_path, monkeypatch, caplog):
    """And it is said once, not by every stage."""
    monkeypatch.setitem(sys.modules, "clu", None)
    monkeypatch.setattr(
        metrics, "_summary_writers", functools.cache(metrics._summary_writers.__wrapped__)
    )
    with caplog.at_level(logging.INFO), metrics.MetricsWriter(tmp_path) as writer:
        writer.write(1, {"loss": 1.0})
    with caplog.at_level(logging.INFO), metrics.MetricsWriter(tmp_path, after=1) as writer:
        pass
    assert _rows(tmp_path) == [{"step": 1, "loss": 1.0}]
    messages = [r.getMessage() for r in caplog.records if r.name == "dgr_jax.training.metrics"]
    assert len(messages) == 1
    assert messages[0].startswith("no TensorBoard summaries (")
    assert not (tmp_path / "tensorboard").exists()


@pytest.mark.slow
def test_tensorboard_summaries(tmp_path):
    pytest.importorskip("tensorflow")
    with metrics.MetricsWriter(tmp_path) as writer:
        writer.write(3, {"loss": 1.5})
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.util.tensor_util import make_ndarray

    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    (event,) = events.Tensors("loss")
    assert (event.step, float(make_ndarray(event.tensor_proto))) == (3, 1.5)


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0:00"), (42, "0:42"), (61.6, "1:02"), (3700, "1:01:40")]
)
def test_duration(seconds, text):
    assert metrics.duration(seconds) == text


def test_progress_line():
    line = metrics.progress_line("generate", 300, 600, 1.2344, 512.3, 42.2)
    assert line == "generate 300/600 | loss 1.234 | 512 examples/s | 0:42 left"
    line = metrics.progress_line("distill", 1, 9, 12345.6, 1.234, 7200)
    assert line == "distill 1/9 | loss 1.235e+04 | 1.2 examples/s | 2:00:00 left"


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_progress_on_a_terminal_and_elsewhere(caplog):
    terminal, file = Terminal(), io.StringIO()
    for stream in (terminal, file):
        progress = metrics.Progress(stream)
        with caplog.at_level(logging.INFO):
            progress.show("one")
            progress.show("two")
        progress.close()
    assert re.split(r"\r\x1b\[2K", terminal.getvalue()) == ["", "one", "two\n"]
    assert file.getvalue() == ""
    assert [record.getMessage() for record in caplog.records] == ["one", "two"]
