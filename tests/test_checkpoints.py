"""Saving and restoring: whole, onto another mesh, and past damage."""

import contextlib
import gc
import json
import os
import re
import shutil
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dgr_jax import array_trees, checkpoints, partitioning, saved_params
from dgr_jax.checkpoints import Checkpoints
from dgr_jax.model_dir import kept
from dgr_jax.partitioning import Mesh, make_mesh
from dgr_jax.training.objectives import Generation
from dgr_jax.training.optimizers import Adafactor, AdamW, Constant
from dgr_jax.training.step import abstract_state, init_state, make_train_step
from tests import toy

MODEL = toy.Toy()
OPTIMIZER = AdamW(Constant(0.1)).transformation(10)
ADVICE = "set the model and optimizer back, or give another folder (MODEL_DIR)"


def _mesh(data=1, model=1):
    return make_mesh(Mesh(data, model), toy.devices(data * model))


@pytest.fixture(scope="module")
def step():
    mesh = _mesh()
    return make_train_step(
        Generation(), MODEL, OPTIMIZER, mesh, abstract_state(MODEL, OPTIMIZER, mesh)
    )


@pytest.fixture(scope="module")
def states(step):
    """States after 0, 1, ... 4 steps, on the host."""
    state = init_state(MODEL, OPTIMIZER, _mesh(), seed=0, params=toy.params())
    found = [jax.tree.map(np.array, state)]
    for seed in range(4):
        state, _ = step(state, toy.generation_examples(8, seed))
        found.append(jax.tree.map(np.array, state))
    return found


def _on_device(state, mesh=None):
    abstract = abstract_state(MODEL, OPTIMIZER, mesh or _mesh())
    return jax.tree.map(lambda leaf, like: jax.device_put(leaf, like.sharding), state, abstract)


def _save(folder, states, steps, keep=2):
    with Checkpoints(folder, keep=keep) as saved:
        for step in steps:
            saved.save(step, _on_device(states[step]), {"step": step, "seed": 7})


def _assert_equal(got, expected):
    assert jax.tree.structure(got) == jax.tree.structure(expected)
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(got), expected)


def test_round_trip_onto_another_mesh(tmp_path, states):
    _save(tmp_path, states, [1, 2, 3])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["2", "3"]  # keep=2
    abstract = abstract_state(MODEL, OPTIMIZER, _mesh(2, 4))
    with Checkpoints(tmp_path) as saved:
        assert saved.latest() == 3
        state, position = saved.restore_latest(abstract)
    _assert_equal(state, states[3])
    assert position == {"step": 3, "seed": 7}
    assert state.params["kernel"].sharding == abstract.params["kernel"].sharding
    assert {shard.data.shape for shard in state.params["kernel"].addressable_shards} == {(16, 8)}


def test_the_best_stays_beside_the_newest_and_counts(tmp_path, states):
    abstract = partitioning.abstract_params(MODEL, _mesh())
    best = 2
    with Checkpoints(tmp_path, keep=1) as saved:
        for step in range(5):
            position = {"step": step, "seed": 7, "best_checkpoint": min(step, best)}
            saved.save(step, _on_device(states[step]), position)
    assert sorted(path.name for path in tmp_path.iterdir()) == [str(best), "4"]
    _assert_equal(checkpoints.restore_params(tmp_path, abstract), states[best].params)
    _assert_equal(checkpoints.restore_params(tmp_path, abstract, step=4), states[4].params)
    with Checkpoints(tmp_path, keep=1) as saved:  # after a restart
        assert saved.restore_latest(abstract_state(MODEL, OPTIMIZER, _mesh()))[1]["step"] == 4
        saved.save(5, _on_device(states[3]), {"best_checkpoint": best})
    assert sorted(path.name for path in tmp_path.iterdir()) == [str(best), "5"]
    _assert_equal(checkpoints.restore_params(tmp_path, abstract), states[best].params)
    shutil.rmtree(tmp_path / str(best))
    with pytest.raises(FileNotFoundError, match=f"expected step {best}, found"):
        checkpoints.restore_params(tmp_path, abstract)


def test_an_empty_folder_has_nothing(tmp_path):
    with Checkpoints(tmp_path / "new") as saved:
        assert saved.latest() is None
        assert saved.restore_latest(abstract_state(MODEL, OPTIMIZER, _mesh())) is None


def test_params_alone(tmp_path, states, caplog):
    _save(tmp_path, states, [2, 3])
    caplog.clear()  # of the saves, which may be slow
    abstract = partitioning.abstract_params(MODEL, _mesh(4, 2))
    _assert_equal(checkpoints.restore_params(tmp_path, abstract), states[3].params)
    _assert_equal(checkpoints.restore_params(tmp_path, abstract, step=2), states[2].params)
    with pytest.raises(FileNotFoundError, match=r"expected step 9, found \[2, 3\]; has the stage"):
        checkpoints.restore_params(tmp_path, abstract, step=9)
    with pytest.raises(FileNotFoundError, match="expected a checkpoint; has the stage been train"):
        checkpoints.restore_params(tmp_path / "none", abstract)
    assert caplog.messages == []


def test_a_save_is_not_touched_by_the_steps_after_it(tmp_path, states, step):
    """The step donates the state while the save still runs."""
    state = _on_device(states[0])
    batch = toy.generation_examples(8)
    with Checkpoints(tmp_path) as saved:
        for number in range(1, 4):
            state, _ = step(state, batch)
            if number == 2:
                expected = jax.tree.map(np.array, state)
                saved.save(2, state, {})
    with Checkpoints(tmp_path) as saved:
        restored, _ = saved.restore_latest(abstract_state(MODEL, OPTIMIZER, _mesh()))
    _assert_equal(restored, expected)


def _truncate(folder):
    """Cuts every data file of a checkpoint in half."""
    files = [path for path in folder.rglob("d/*") if path.is_file()]
    assert files
    for path in files:
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def _remove_metadata(folder):
    for path in folder.rglob("_METADATA"):
        path.write_text("{")


@pytest.mark.parametrize("damage", [_truncate, _remove_metadata])
def test_a_damaged_newest_is_set_aside(tmp_path, states, caplog, damage):
    _save(tmp_path, states, [1, 2])
    damage(tmp_path / "2")
    abstract = abstract_state(MODEL, OPTIMIZER, _mesh())
    with Checkpoints(tmp_path) as saved:
        state, position = saved.restore_latest(abstract)
        _assert_equal(state, states[1])
        assert position["step"] == 1
        saved.save(2, _on_device(states[2]), {"step": 2, "seed": 7})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["1", "2", "2.damaged"]
    warnings = [r.getMessage() for r in caplog.records if r.name == "dgr_jax.checkpoints"]
    assert len(warnings) == 1
    assert warnings[0].startswith(f"checkpoint {tmp_path / '2'} cannot be read (")
    assert warnings[0].endswith("): set aside as 2.damaged, an older one is used")
    with Checkpoints(tmp_path) as saved:
        _assert_equal(saved.restore_latest(abstract)[0], states[2])


def test_nothing_readable_is_an_error_and_moves_nothing(tmp_path, states):
    _save(tmp_path, states, [1])
    _truncate(tmp_path / "1")
    with Checkpoints(tmp_path) as saved, pytest.raises(ValueError) as error:
        saved.restore_latest(abstract_state(MODEL, OPTIMIZER, _mesh()))
    assert str(error.value).startswith(f"checkpoints in {tmp_path}: cannot read step 1 (")
    assert str(error.value).endswith("remove these folders to go on without them")
    assert [path.name for path in tmp_path.iterdir()] == ["1"]


def _files(folder):
    return [path for path in sorted(folder.rglob("*")) if path.is_file()]


def _flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


def test_every_file_of_a_checkpoint_is_in_its_manifest(tmp_path, states):
    _save(tmp_path, states, [1, 2, 3])
    for step in ("2", "3"):
        names = json.loads((tmp_path / step / "files_made.json").read_text())["files_made"]
        there = {path.relative_to(tmp_path / step).as_posix() for path in _files(tmp_path / step)}
        assert set(names) == there - {"files_made.json"}
        assert any(name.startswith("training/") for name in names)


def test_the_manifest_comes_while_training_goes_on(tmp_path, states):
    with Checkpoints(tmp_path) as saved:
        saved.save(1, _on_device(states[1]), {})
        deadline = time.monotonic() + 60
        while not (tmp_path / "1" / "files_made.json").is_file():
            assert time.monotonic() < deadline
            time.sleep(0.05)


def test_a_checkpoint_without_a_manifest_is_read(tmp_path, states):
    """The folder of a process that was killed after the save and before the manifest."""
    _save(tmp_path, states, [1, 2])
    (tmp_path / "2" / "files_made.json").unlink()
    with Checkpoints(tmp_path) as saved:
        state, _ = saved.restore_latest(abstract_state(MODEL, OPTIMIZER, _mesh()))
    _assert_equal(state, states[2])
    found = checkpoints.restore_params(tmp_path, partitioning.abstract_params(MODEL, _mesh()))
    _assert_equal(found, states[2].params)


def test_parameters_for_one_device_are_read_without_orbax(tmp_path, states, monkeypatch):
    _save(tmp_path, states, [1])
    spread, alone = (partitioning.abstract_params(MODEL, _mesh(data)) for data in (2, 1))
    by_orbax = checkpoints.restore_params(tmp_path, spread)
    monkeypatch.setattr(saved_params, "_restored", None)
    read = checkpoints.restore_params(tmp_path, alone)
    _assert_equal(read, by_orbax)
    placed = jax.tree.map(lambda leaf, to: leaf.sharding == to.sharding, read, alone)
    assert all(jax.tree.leaves(placed))
    with pytest.raises(TypeError):  # several devices are left to orbax
        checkpoints.restore_params(tmp_path, spread)


def test_a_flipped_bit_in_any_file_is_noticed(tmp_path, states):
    _save(tmp_path, states, [1])
    abstract = partitioning.abstract_params(MODEL, _mesh())
    for path in _files(tmp_path / "1"):
        content = path.read_bytes()
        _flip(path)
        # A list may be wrong about another file.
        named = tmp_path / "1" if path.name == "files_made.json" else path
        with pytest.raises(kept.Damaged, match=re.escape(f"{named}")):
            kept.whole(tmp_path / "1")
        if "params" in path.parts:
            with pytest.raises(kept.Damaged, match=re.escape(f"{path}: ")):
                checkpoints.restore_params(tmp_path, abstract)
        path.write_bytes(content)
    checkpoints.restore_params(tmp_path, abstract)


def test_a_flipped_bit_sets_the_newest_aside(tmp_path, states, caplog):
    _save(tmp_path, states, [1, 2])
    damaged = max(_files(tmp_path / "2" / "training"), key=lambda path: path.stat().st_size)
    _flip(damaged)
    with Checkpoints(tmp_path) as saved:
        state, _ = saved.restore_latest(abstract_state(MODEL, OPTIMIZER, _mesh()))
    _assert_equal(state, states[1])
    assert f"({damaged}: got other contents than the " in caplog.text


def test_of_a_finished_stage_the_last_checkpoint_is_not_replaced_by_an_older(tmp_path, states):
    stage = tmp_path / "model" / "generate"
    _save(stage / "checkpoints", states, [1, 2])
    (stage / "stage.json").write_text(json.dumps({"files_made": kept.sign(stage)}))
    abstract = partitioning.abstract_params(MODEL, _mesh())
    _assert_equal(checkpoints.restore_params(stage / "checkpoints", abstract), states[2].params)
    shutil.copytree(stage / "checkpoints/1", stage / "checkpoints/9")  # nothing that was kept
    _assert_equal(checkpoints.restore_params(stage / "checkpoints", abstract), states[2].params)
    shutil.rmtree(stage / "checkpoints/2")
    with pytest.raises(kept.Damaged) as error:
        checkpoints.restore_params(stage / "checkpoints", abstract)
    assert str(error.value).startswith(f"{stage}/checkpoints/2/files_made.json: is missing")
    assert str(error.value).endswith(
        f"`python -m dgr_jax.train --model_dir={tmp_path / 'model'}` makes it again"
    )


@pytest.mark.parametrize("damage", [_truncate, _remove_metadata])
def test_unreadable_parameters_are_one_line(tmp_path, states, caplog, damage):
    """Damage that no manifest tells of before it is read."""
    _save(tmp_path, states, [1])
    (tmp_path / "1" / "files_made.json").unlink()
    damage(tmp_path / "1")
    with pytest.raises(kept.Damaged) as error:
        checkpoints.restore_params(tmp_path, partitioning.abstract_params(MODEL, _mesh()))
    assert str(error.value).startswith(f"{tmp_path}/1/params: cannot be read (")
    assert "\n" not in str(error.value)
    gc.collect()
    assert not [record for record in caplog.records if record.name == "asyncio"]


def test_parameters_that_are_no_numbers(tmp_path, states, caplog):
    params = {name: np.array(value) for name, value in states[2].params.items()}
    params["kernel"][1, 2] = np.nan
    _save(tmp_path, [*states[:2], states[2].replace(params=params)], [1, 2])
    with pytest.raises(ValueError) as error:
        checkpoints.restore_params(tmp_path, partitioning.abstract_params(MODEL, _mesh()))
    assert str(error.value) == (
        f"checkpoint {tmp_path}/2: kernel, one of 1 such parameters, holds NaN or infinity, "
        "expected finite numbers: its training diverged; lower the learning rate (its `peak`), "
        "and take the folder away to train again"
    )
    with Checkpoints(tmp_path) as saved:
        state, _ = saved.restore_latest(abstract_state(MODEL, OPTIMIZER, _mesh()))
    _assert_equal(state, states[1])
    assert "kernel, one of 1 such parameters, holds NaN" in caplog.text


def test_another_model_size_is_refused(tmp_path, states):
    _save(tmp_path, states, [1, 2])
    other = toy.Toy(width=8)
    message = (
        f"checkpoint {tmp_path / '2'}: embedding: got shape (16, 16), expected (16, 8), that of "
        f"the configured model; {ADVICE}"
    )
    with Checkpoints(tmp_path) as saved, pytest.raises(ValueError) as error:
        saved.restore_latest(abstract_state(other, OPTIMIZER, _mesh()))
    assert str(error.value) == message
    with pytest.raises(ValueError) as error:
        checkpoints.restore_params(tmp_path, partitioning.abstract_params(other, _mesh()))
    assert str(error.value) == message
    assert sorted(path.name for path in tmp_path.iterdir()) == ["1", "2"]  # not called damage


def test_another_optimizer_is_refused(tmp_path, states):
    _save(tmp_path, states, [1, 2])
    adafactor = Adafactor().transformation(10)
    with Checkpoints(tmp_path) as saved, pytest.raises(ValueError) as error:
        saved.restore_latest(abstract_state(MODEL, adafactor, _mesh()))
    assert str(error.value).startswith(f"checkpoint {tmp_path / '2'}: opt_state/")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["1", "2"]


def test_names_that_differ():
    shape = jnp.zeros((2,))
    with pytest.raises(ValueError) as error:
        array_trees.check_shapes({"a": shape}, {"a": shape, "b": {"c": shape}}, "here")
    assert str(error.value) == f"here: b/c is missing; {ADVICE}"
    with pytest.raises(ValueError) as error:
        array_trees.check_shapes({"a": shape, "d": shape}, {"a": shape}, "here")
    assert str(error.value) == f"here: d is not part of the configured model; {ADVICE}"


@contextlib.contextmanager
def _full_disk():
    usage = checkpoints.shutil.disk_usage
    checkpoints.shutil.disk_usage = lambda folder: usage(folder)._replace(free=10)
    try:
        yield
    finally:
        checkpoints.shutil.disk_usage = usage


@contextlib.contextmanager
def _lost_permission(folder):
    """The folder cannot be written; root, who can write all, is another user meanwhile."""
    root = os.geteuid() == 0
    folder.chmod(0o555)
    if root:
        os.seteuid(65534)
    try:
        yield
    finally:
        if root:
            os.seteuid(0)
        folder.chmod(0o755)


@pytest.mark.parametrize("kind", ["full disk", "lost permission"])
def test_a_save_that_fails_names_the_last_good_one(tmp_path, states, kind):
    folder = tmp_path / "checkpoints"
    _save(folder, states, [1])
    broken = _full_disk() if kind == "full disk" else _lost_permission(folder)
    with Checkpoints(folder) as saved, pytest.raises(OSError) as error, broken:
        saved.save(2, _on_device(states[2]), {"step": 2, "seed": 7})
        saved.wait()
    message = str(error.value)
    assert message.startswith(f"checkpoint {folder / '2'} could not be written (")
    needed = sum(leaf.nbytes for leaf in jax.tree.leaves(states[2]))
    full = f"No space left on device: 10 bytes are free, {needed} needed)"
    assert (full if kind == "full disk" else "Permission denied") in message
    other_user = kind == "lost permission" and os.geteuid() == 0  # sees nothing of pytest's folders
    left = "What is in the folder cannot be read either"
    if not other_user:
        left = "The last whole one is of step 1; once that is mended, the same command goes on from"
        left += " there"
    assert message.endswith(f"): is the disk full, or not writable? {left}")
    with Checkpoints(folder) as saved:
        state, position = saved.restore_latest(abstract_state(MODEL, OPTIMIZER, _mesh()))
        _assert_equal(state, states[1])
        assert position["step"] == 1
        saved.save(2, _on_device(states[2]), {"step": 2, "seed": 7})
    assert sorted(path.name for path in folder.iterdir()) == ["1", "2"]  # nothing half written


def test_the_first_save_that_fails(tmp_path, states):
    with Checkpoints(tmp_path) as saved, pytest.raises(OSError) as error, _full_disk():
        saved.save(1, _on_device(states[1]), {})
    assert str(error.value).startswith(f"checkpoint {tmp_path / '1'} could not be written (")
    end = "There is none before it; run the same command once that is mended"
    assert str(error.value).endswith(end)


def test_an_error_of_a_running_save_comes_with_the_next(tmp_path, states, monkeypatch):
    with Checkpoints(tmp_path) as saved:
        saved.save(1, _on_device(states[1]), {})
        saved.wait()
        saved.save(2, _on_device(states[2]), {})
        saved.wait()

        def fails():
            raise ValueError("OUT_OF_RANGE: Error writing local file\nmore")

        monkeypatch.setattr(saved._manager, "wait_until_finished", fails)
        with pytest.raises(OSError) as error:
            saved.save(3, _on_device(states[3]), {})
        monkeypatch.undo()
    assert str(error.value).startswith(
        f"checkpoint {tmp_path / '2'} could not be written (ValueError: OUT_OF_RANGE: Error "
        "writing local file): is the disk full"
    )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"keep": 0}, "keep_checkpoints: got 0, expected 1 or more"),
    ],
)
def test_setting_errors(tmp_path, settings, message):
    with pytest.raises(ValueError) as error:
        Checkpoints(tmp_path, **settings)
    assert str(error.value) == message
