"""Token arrays on disk, sources by step, mixtures, and the prefetch thread."""

import json
import threading
import time
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dgr_jax.training import arrays
from dgr_jax.training.source import (
    ArraySource,
    MixtureSource,
    Prefetch,
    blocks_of,
    read_arrays,
    write_arrays,
)


def _numbered(count, first=0):
    numbers = np.arange(first, first + count)
    return {
        "tokens": np.stack([numbers, numbers + 1], axis=1).astype(np.int32),
        "weight": numbers.astype(np.float32),
    }


def _examples(source, steps, **share):
    return np.concatenate([source.batch(step, **share)["weight"] for step in range(steps)])


# Arrays on disk.


def test_round_trip(tmp_path):
    features = _numbered(1000)
    blocks = ({k: v[i : i + 300] for k, v in features.items()} for i in range(0, 1000, 300))
    assert write_arrays(tmp_path / "task", blocks) == 1000
    read = read_arrays(tmp_path / "task", verify=True)
    assert isinstance(read["tokens"], np.memmap)
    for name, values in features.items():
        assert read[name].dtype == values.dtype
        np.testing.assert_array_equal(read[name], values)
    header = json.loads((tmp_path / "task" / "arrays.json").read_text())
    assert (header["count"], sorted(header["features"])) == (1000, ["tokens", "weight"])
    assert [path.name for path in tmp_path.iterdir()] == ["task"]


def test_examples_become_blocks():
    examples = [{"a": np.full(2, i), "b": np.float32(i)} for i in range(5)]
    blocks = list(blocks_of(examples, size=2))
    assert [block["a"].shape for block in blocks] == [(2, 2), (2, 2), (1, 2)]
    assert [float(x) for block in blocks for x in block["b"]] == [0, 1, 2, 3, 4]


def test_writing_takes_the_memory_of_a_block(tmp_path):
    block = {"tokens": np.zeros((1000, 50), np.int32)}  # 200 kB, 40 MB in all
    tracemalloc.start()
    write_arrays(tmp_path / "task", (block for _ in range(200)))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2_000_000
    assert read_arrays(tmp_path / "task")["tokens"].shape == (200_000, 50)


def test_a_failed_write_leaves_what_was_there(tmp_path):
    write_arrays(tmp_path / "task", [_numbered(3)])

    def broken():
        yield _numbered(5)
        raise RuntimeError("disk is gone")

    with pytest.raises(RuntimeError, match="disk is gone"):
        write_arrays(tmp_path / "task", broken())
    assert len(read_arrays(tmp_path / "task")["weight"]) == 3
    assert [path.name for path in tmp_path.iterdir()] == ["task"]
    write_arrays(tmp_path / "task", [_numbered(4)])
    assert len(read_arrays(tmp_path / "task")["weight"]) == 4


def test_write_errors(tmp_path):
    with pytest.raises(ValueError) as error:
        write_arrays(tmp_path / "none", [])
    assert str(error.value).endswith("got no examples, expected at least one")
    with pytest.raises(ValueError) as error:
        write_arrays(tmp_path / "task", [_numbered(2), {"tokens": np.zeros((2, 2), np.int32)}])
    assert str(error.value) == (
        "block from example 2: got tokens of shape [2, 2]; expected tokens, weight with equally "
        "many rows"
    )
    longer = dict(_numbered(2), tokens=np.zeros((2, 3), np.int32))
    with pytest.raises(ValueError) as error:
        write_arrays(tmp_path / "task", [_numbered(2), longer])
    assert str(error.value) == (
        "feature 'tokens' of examples 2 to 4: got int32 (3,), expected int32 (2,) as in the first"
    )
    assert list(tmp_path.iterdir()) == []


def test_read_errors(tmp_path):
    folder = tmp_path / "task"
    with pytest.raises(FileNotFoundError, match=r"arrays.json: expected the header of exported"):
        read_arrays(folder)
    write_arrays(folder, [_numbered(100)])
    path = folder / "tokens.npy"
    data = path.read_bytes()
    path.write_bytes(data[:-9])
    with pytest.raises(
        ValueError, match=r"tokens.npy: cannot be read \(.*\); truncated or damaged"
    ):
        read_arrays(folder)
    path.write_bytes(data[:-1] + b"\x7f")
    read_arrays(folder)
    with pytest.raises(ValueError, match=r"tokens.npy: its data differ from the checksum"):
        read_arrays(folder, verify=True)
    np.save(path, np.zeros((100, 3), np.int32))
    with pytest.raises(ValueError, match=r"got int32 \(100, 3\), expected int32 \(100, 2\)"):
        read_arrays(folder)
    header = json.loads((folder / arrays.HEADER).read_text()) | {"format": 9}
    (folder / arrays.HEADER).write_text(json.dumps(header))
    with pytest.raises(ValueError, match=r"arrays.json: got format 9, expected 1"):
        read_arrays(folder)


# One task.


@settings(max_examples=40, deadline=None)
@given(count=st.integers(1, 30), batch=st.integers(1, 40), seed=st.integers(0, 5))
def test_every_epoch_has_every_example_once(count, batch, seed):
    source = ArraySource(_numbered(count), batch, seed)
    steps = -(-3 * count // batch)
    seen = _examples(source, steps)
    for epoch in range(3):
        part = seen[epoch * count : (epoch + 1) * count]
        assert sorted(part.tolist()) == list(range(count))


def test_batches_are_by_step_and_shuffled():
    source = ArraySource(_numbered(50), 8, 3)
    in_order = [source.batch(step)["weight"] for step in range(20)]
    again = ArraySource(_numbered(50), 8, 3)
    for step in (19, 3, 11, 0):
        np.testing.assert_array_equal(again.batch(step)["weight"], in_order[step])
    first, second = np.concatenate(in_order)[:50], np.concatenate(in_order)[50:100]
    assert not np.array_equal(first, second) and not np.array_equal(first, np.arange(50))
    assert not np.array_equal(ArraySource(_numbered(50), 8, 4).batch(0)["weight"], in_order[0])
    batch = source.batch(2)
    np.testing.assert_array_equal(batch["tokens"][:, 0], batch["weight"])


def test_source_reads_a_folder(tmp_path):
    write_arrays(tmp_path / "task", [_numbered(10)])
    from_disk, in_memory = ArraySource(tmp_path / "task", 4, 0), ArraySource(_numbered(10), 4, 0)
    for step in range(4):
        np.testing.assert_array_equal(
            from_disk.batch(step)["tokens"], in_memory.batch(step)["tokens"]
        )


def _mixture(batch_size=12, seed=0, sizes=(7, 30, 11), rates=(1.0, 2.5, 0.5)):
    starts = (0, 1000, 2000)
    tasks = {
        name: (_numbered(size, start), rate)
        for name, size, start, rate in zip("abc", sizes, starts, rates, strict=True)
    }
    return MixtureSource(tasks, batch_size, seed)


@pytest.mark.parametrize("source", [ArraySource(_numbered(10), 12, 0), _mixture()])
def test_processes_share_one_global_batch(source):
    for step in (0, 5):
        whole = source.batch(step)
        parts = [source.batch(step, process_index=i, process_count=3) for i in range(3)]
        for name, values in whole.items():
            np.testing.assert_array_equal(np.concatenate([p[name] for p in parts]), values)
    with pytest.raises(ValueError) as error:
        source.batch(0, 0, 5)
    assert str(error.value) == (
        "batch_size: got 12, expected a multiple of 5, the number of processes"
    )


# Mixtures.


@settings(max_examples=25, deadline=None)
@given(
    batch=st.integers(1, 20),
    seed=st.integers(0, 3),
    rates=st.lists(st.floats(0.01, 10), min_size=3, max_size=3),
)
def test_mixture_keeps_rates_and_each_tasks_epochs(batch, seed, rates):
    source = _mixture(batch, seed, rates=tuple(rates))
    steps = 60
    seen = _examples(source, steps)
    share = np.array(rates) / sum(rates)
    for i, (start, size) in enumerate(zip((0, 1000, 2000), (7, 30, 11), strict=True)):
        own = seen[(seen >= start) & (seen < start + 1000)] - start
        assert len(own) == source.counts(steps)[i]
        uses = np.bincount(own.astype(int), minlength=size)
        # Epochs are whole but for the last step, whose rows are shuffled.
        assert uses.max() - uses.min() <= 1
        # A task's part of a batch is its rate up to one example; phi is uniform over steps.
        assert abs(len(own) - share[i] * batch * steps) <= 5 * np.sqrt(steps)


def test_mixture_counts_match_the_batches_at_any_step():
    source, fresh = _mixture(), _mixture()
    totals = np.zeros(3, int)
    for step in range(40):
        np.testing.assert_array_equal(source.counts(step), totals)
        batch = source.batch(step)["weight"]
        totals += np.bincount((batch // 1000).astype(int), minlength=3)
    for step in (39, 7, 20):  # as a resumed run asks
        np.testing.assert_array_equal(fresh.batch(step)["weight"], source.batch(step)["weight"])


def test_mixture_counts_are_the_same_in_chunks():
    expected = _mixture().counts(1000)
    source = _mixture()
    source._CHUNK = 64
    np.testing.assert_array_equal(source.counts(1000), expected)
    assert expected.sum() == 12 * 1000


def test_mixture_shuffles_within_the_batch():
    tasks = [tuple(_mixture().batch(step)["weight"] // 1000) for step in range(20)]
    assert sum(list(order) != sorted(order) for order in tasks) == 20
    assert len(set(tasks)) > 10  # another order each step


def test_mixture_errors():
    with pytest.raises(ValueError) as error:
        MixtureSource({"a": (_numbered(3), 0.0)}, 4, 0)
    assert str(error.value) == "mixture: got rate 0.0 of task 'a', expected above 0"
    with pytest.raises(ValueError) as error:
        MixtureSource({}, 4, 0)
    assert str(error.value) == "mixture: got no tasks, expected at least one"
    other = {"tokens": np.zeros((3, 5), np.int32)}
    with pytest.raises(ValueError) as error:
        MixtureSource({"a": (_numbered(3), 1.0), "b": (other, 1.0)}, 4, 0)
    assert str(error.value) == (
        "mixture: task 'b' has features tokens int32[5], expected tokens int32[2], weight "
        "float32[] as task 'a'; set equal lengths"
    )


def test_source_errors():
    with pytest.raises(ValueError) as error:
        ArraySource(_numbered(3), 0, 0)
    assert str(error.value) == "batch_size: got 0, expected 1 or more"
    uneven = dict(_numbered(3), weight=np.zeros(4))
    with pytest.raises(ValueError) as error:
        ArraySource(uneven, 2, 0)
    assert str(error.value) == (
        "token arrays: got 3 tokens, 4 weight, expected equally many examples of each"
    )


# The thread.


def _threads():
    return [thread for thread in threading.enumerate() if thread.name == "prefetch"]


def test_prefetch_keeps_order_and_ends():
    with Prefetch(lambda step: step * 10, 2, 7) as items:
        assert list(items) == [20, 30, 40, 50, 60]
        assert list(items) == []
    assert not _threads()


def test_prefetch_runs_ahead_but_not_far():
    made = []
    with Prefetch(lambda step: made.append(step) or step, 0, 100, depth=2) as items:
        assert next(items) == 0
        deadline = time.monotonic() + 5
        while len(made) < 4 and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(0.1)
        assert made == [0, 1, 2, 3]  # one taken, two waiting, one in hand
    assert not _threads()


def test_prefetch_raises_in_the_reader():
    def make(step):
        if step == 2:
            raise OSError("disk is gone")
        return step

    with Prefetch(make, 0, 5) as items:
        assert [next(items), next(items)] == [0, 1]
        with pytest.raises(OSError, match="disk is gone"):
            next(items)
    assert not _threads()
