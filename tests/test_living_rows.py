"""Rows of the output embedding for passages that come after training, by IncDSI."""

from __future__ import annotations

import dataclasses
import math

import jax
import numpy as np
import pytest
import scipy.optimize

from dgr_jax.model_dir import records
from dgr_jax.models.t5 import Transformer
from dgr_jax.retrieval import kept_rows
from dgr_jax.retrieval.kept_rows import KeptRows
from dgr_jax.retrieval.living import rows
from dgr_jax.retrieval.living.incdsi import IncDSI, solve
from tests import students


def objective(settings: IncDSI, row, old, states, queries) -> float:
    """The problem in plain words."""
    missed = [max(0, settings.new_margin + max(old @ q) - row @ q) ** 2 for q in queries]
    lost = [
        max(0, settings.old_margin + row @ z - w @ z) ** 2 for w, z in zip(old, states, strict=True)
    ]
    own = settings.weight * sum(missed) + (1 - settings.weight) * sum(lost)
    return own + settings.l2 * row @ row


@pytest.mark.parametrize("weight", [0.2, 0.8])
def test_rows_are_those_of_a_solver_of_another_library(weight):
    random, settings = np.random.default_rng(0), IncDSI(weight, l2=0.1)
    old = random.normal(size=(12, 5)).astype("f4")
    states = random.normal(size=(12, 5)).astype("f4")
    queries = random.normal(size=(3, 4, 5)).astype("f4")
    given = np.array([[True] * 4, [True] * 3 + [False], [True] + [False] * 3])
    wide = [np.pad(array, ((0, 4), (0, 0)), constant_values=9) for array in (old, states)]
    solved = np.asarray(solve(settings, *wide, np.arange(16) < 12, queries, given))
    for row, asked, mask in zip(solved, queries, given, strict=True):
        problem = lambda v, q=asked[mask]: objective(settings, v, old, states, q)
        best = scipy.optimize.minimize(problem, np.zeros(5), method="BFGS")
        assert problem(row) == pytest.approx(best.fun, rel=1e-4)
        np.testing.assert_allclose(row, best.x, atol=0.01)


def test_nothing_is_compiled_for_other_passages_of_the_same_shapes():
    random, settings = np.random.default_rng(0), IncDSI()
    asked = lambda: (
        *(random.normal(size=(8, 3)).astype("f4") for _ in range(2)),
        random.random(8) < 0.7, random.normal(size=(2, 4, 3)).astype("f4"), np.ones((2, 4), bool),
    )  # fmt: skip
    solve(settings, *asked())
    compiled = solve._cache_size()
    for _ in range(3):
        solve(settings, *asked())
    assert solve._cache_size() == compiled


@pytest.mark.parametrize("field", [f.name for f in dataclasses.fields(IncDSI)])
def test_every_number_is_checked(field):
    for value in (-1, math.nan, math.inf):
        with pytest.raises(ValueError, match=rf"^IncDSI\.{field}: got {value}, expected "):
            IncDSI(**{field: value})


@pytest.mark.parametrize("tied", [False, True])
def test_states_times_rows_are_logits_and_rows_are_put_where_logits_come_from(tied):
    config = dataclasses.replace(
        students.CONFIG, vocab_size=128, emb_dim=8, logits_via_embedding=tied
    )
    tokens = np.array([[5, 6, 1, 0], [7, 1, 0, 0]], np.int32)
    start, model = np.zeros((2, 1), np.int32), Transformer(config)
    params = jax.device_put(students.parameters(config))
    states = np.asarray(rows._states_fn(config)(params, tokens))
    logits = np.asarray(jax.jit(model.apply)({"params": params}, tokens, start))[:, 0]
    np.testing.assert_allclose(states @ kept_rows.of(params).T, logits, atol=1e-4)
    random = np.random.default_rng(0)
    new, at = random.normal(size=(5, 8)).astype("f4"), np.array([90, 101, 92, 93, 127])
    changed = kept_rows.put(params, at, new)
    table = kept_rows.of(params).copy()
    table[at] = new
    np.testing.assert_array_equal(kept_rows.of(changed), table)
    put = lambda count: kept_rows.put(params, np.arange(count), np.ones((count, 8), "f4"))
    put(17)
    compiled = kept_rows._set._cache_size()
    put(20)
    assert kept_rows._set._cache_size() == compiled, "of the same size class"


def test_rows_belong_to_a_student(tmp_path):
    index, stage = tmp_path / "index", tmp_path / "generate"
    stage.mkdir()
    records.write_record(stage, status="done", fingerprint="first")
    assert kept_rows.load(index, stage) is None
    held = KeptRows(np.array([7]), np.ones((1, 3), "f4"), np.zeros((4, 3), "f4"))
    held.save(index, stage)
    for one, other in zip(kept_rows.load(index, stage), held, strict=True):
        np.testing.assert_array_equal(one, other)
    records.write_record(stage, status="done", fingerprint="second")
    with pytest.raises(ValueError, match=r"has no rows of .*generate, which was trained after"):
        kept_rows.load(index, stage)
