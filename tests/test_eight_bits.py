"""Kernels of 8 bits: products against NumPy, whole models against float32, and searches."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dgr_jax.models import eight_bits
from dgr_jax.models.stacking import stack_layers
from dgr_jax.retrieval.generative import Search
from dgr_jax.retrieval.multiview.search import MultiviewSearch
from dgr_jax.retrieval.system import Trained
from tests import students


def test_a_product_is_that_of_whole_numbers_and_their_scales():
    random = np.random.default_rng(0)
    x, kernel = random.normal(size=(2, 3, 8)), random.normal(size=(8, 5))
    x[0, 1] = 0
    of_row, of_column = np.abs(x).max(-1, keepdims=True) / 127, np.abs(kernel).max(0) / 127
    whole = np.round(x / np.where(of_row > 0, of_row, 1)) @ np.round(kernel / of_column)
    module = eight_bits.rounded({"out": {"kernel": jnp.asarray(kernel, jnp.float32)}})["out"]
    assert module["values"].shape == (5, 8) and module["values"].dtype == jnp.int8
    found = eight_bits.product(jnp.asarray(x, jnp.float32), module["values"], module["scale"])
    np.testing.assert_allclose(found, whole * of_row * of_column, rtol=1e-5, atol=1e-6)
    assert np.abs(found - x @ kernel).max() < 0.05


def test_layers_are_rounded_one_by_one_as_they_are_in_a_stack():
    params = students.parameters(students.CONFIG)
    rounded = jax.jit(eight_bits.rounded)
    stacked = rounded(stack_layers(params))
    assert stacked["decoder"]["layers"]["mlp"]["wo"]["values"].shape == (16, 1, 32)
    jax.tree.map(np.testing.assert_array_equal, stacked, stack_layers(rounded(params)))


@pytest.mark.slow
def test_a_student_is_opened_with_the_kernels_that_its_search_names(tmp_path):
    rows, queries = np.unique(students.codes(40), axis=0), students.queries(3)
    student = students.decoder(rows, Search(num_beams=5, depth=5, query_length=8))
    student.table.save(tmp_path / "identifiers")
    student.index.save(tmp_path / "trie")
    search = dataclasses.replace(student.search, kernels="int8")
    settings = (student.config, search, student.mesh, student.rules)
    opened = type(student).opened(Trained(tmp_path, tmp_path, None, *settings), student.params)
    of_logits = opened.params["decoder"]["logits_dense"]
    assert of_logits["values"].shape == (students.VOCAB, 16)
    (passages, scores), (expected, exact) = opened.passages(queries), student.passages(queries)
    np.testing.assert_array_equal(passages[:, 0], expected[:, 0])
    np.testing.assert_allclose(scores, exact, atol=0.5)
    assert (scores != exact).any()


@pytest.mark.parametrize("settings", [Search, MultiviewSearch])
def test_kernels_that_are_not_known_are_refused(settings):
    expected = rf"{settings.__name__}.kernels: got 'int4', expected one of 'float', 'int8'"
    with pytest.raises(ValueError, match=expected):
        settings(kernels="int4")
