"""Grain as a source of batches: the bytes and the order of the token arrays."""

import sys

import numpy as np
import pytest

from dgr_jax.training.grain_source import GrainSource, examples
from dgr_jax.training.source import ArraySource

ARRAYS = {
    "encoder_input_tokens": np.arange(7 * 3, dtype=np.int32).reshape(7, 3),
    "weights": np.linspace(0, 1, 7, dtype=np.float32),
}


def test_batches_are_those_of_the_arrays_to_the_byte():
    """Past the end of epochs, for each process, and from any step."""
    pytest.importorskip("grain")
    ours = ArraySource(ARRAYS, 4, seed=3)
    theirs = GrainSource(examples(ARRAYS, 3, epochs=5), 4)
    for step in (0, 1, 7, 3):
        for process in (0, 1):
            one, other = ours.batch(step, process, 2), theirs.batch(step, process, 2)
            assert one.keys() == other.keys()
            for name, values in one.items():
                assert values.dtype == other[name].dtype
                assert values.tobytes() == other[name].tobytes()


def test_a_dataset_of_ones_own_begins_again_after_its_end():
    grain = pytest.importorskip("grain")
    dataset = grain.MapDataset.source([{"x": np.int32(i)} for i in range(3)]).map(
        lambda example: {"x": example["x"] * 10}
    )
    assert GrainSource(dataset, 2).batch(1)["x"].tolist() == [20, 0]
    with pytest.raises(
        ValueError, match="^batch_size: got 2, expected a multiple of 3, the number"
    ):
        GrainSource(dataset, 2).batch(0, 0, 3)
    filtered = dataset.filter(lambda example: example["x"] > 10)
    with pytest.raises(ValueError, match="^dataset: got one whose examples are filtered, expected"):
        GrainSource(filtered, 2).batch(0)


def test_what_is_no_dataset_is_refused():
    grain = pytest.importorskip("grain")
    dataset = grain.MapDataset.source([{"x": np.int32(1)}])
    with pytest.raises(ValueError, match="^dataset: got list, expected a grain.MapDataset, whose"):
        GrainSource([], 2)
    with pytest.raises(ValueError, match="^batch_size: got 0, expected 1 or more$"):
        GrainSource(dataset, 0)
    with pytest.raises(ValueError, match="^dataset: got one without examples, expected at least"):
        GrainSource(dataset[:0], 1)


def test_where_grain_is_missing_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "grain", None)
    with pytest.raises(ImportError, match=r"need the extra 'dgr_jax\[grain\]': pip install"):
        examples(ARRAYS, 0)
