"""Exact search against brute force: ties, chunks, blocks from a file, devices, storage."""

import dataclasses
import logging

import jax
import numpy as np
import pytest

from dgr_jax.partitioning import Mesh, make_mesh
from dgr_jax.retrieval import exact_search
from dgr_jax.retrieval.exact_search import BlockPlan, ExactSearch, Index
from tests import toy
from tests.reference import exact_search as twin

WIDTH = 6
slow = pytest.mark.slow


def tied(count, *, seed=0, dtype=np.float32):
    """Small whole numbers: products are exact, and most scores occur many times."""
    return np.random.default_rng(seed).integers(-2, 3, (count, WIDTH)).astype(dtype)


def same(index, vectors, queries, k):
    passages, scores = index.search(queries, k)
    assert passages.dtype == np.int32 and scores.dtype == np.float32
    wanted = twin.search(queries, vectors, k)
    np.testing.assert_array_equal(passages, wanted[0])
    np.testing.assert_array_equal(scores, wanted[1])


CASES = [
    # passages, k, chunk, bytes of a device, (data, model, fsdp), queries
    pytest.param(1000, 7, 128, 1 << 30, (1, 1, 1), 9, id="chunks"),
    pytest.param(1000, 7, 64, 4096, (2, 2, 2), 9, id="streamed-to-eight"),
    pytest.param(5, 7, 64, 1 << 30, (8, 1, 1), 1, id="few-passages-on-eight", marks=slow),
    pytest.param(1000, 300, 256, 1 << 30, (1, 1, 1), 3, id="k-above-a-chunk", marks=slow),
    pytest.param(700, 5, 4096, 1 << 30, (8, 1, 1), 4, id="eight", marks=slow),
    pytest.param(700, 1, 64, 1 << 30, (2, 4, 1), 33, id="batches", marks=slow),
    pytest.param(9000, 3, 9000, 1 << 30, (1, 1, 1), 3, id="groups-of-groups", marks=slow),
    pytest.param(1000, 9, 512, 1 << 30, (1, 1, 1), 17, id="few-scores", marks=slow),
    pytest.param(1000, 40, 64, 1, (1, 1, 1), 3, id="a-row-is-too-large", marks=slow),
]


@pytest.mark.parametrize(("passages", "k", "chunk", "most", "axes", "asked"), CASES)
def test_equal_to_brute_force(passages, k, chunk, most, axes, asked):
    vectors, queries = tied(passages), tied(asked, seed=1)
    settings = ExactSearch("float32", 16, chunk, 16 * 300, most)
    mesh = make_mesh(Mesh(*axes), toy.devices(int(np.prod(axes))))
    same(Index(vectors, settings, mesh), vectors, queries, k)


@pytest.mark.parametrize(
    ("storage", "most", "devices"),
    [
        ("float32", 1 << 30, 1),
        ("float32", 4096, 2),
        pytest.param("int8", 1 << 30, 1, marks=slow),
        pytest.param("bfloat16", 1 << 30, 8, marks=slow),
    ],
)
def test_hidden_rows_are_never_found(storage, most, devices):
    """Hidden rows are never found; where too few others exist, places stay empty."""
    vectors, queries = tied(500), tied(9, seed=1)
    hidden = np.flatnonzero(np.random.default_rng(2).random(500) < 0.3)
    left = np.setdiff1d(np.arange(500), hidden)
    vectors[hidden] = 2 * queries[0]  # they would come first
    settings = ExactSearch(storage, 16, 64, 16 * 300, most)
    mesh = make_mesh(Mesh(devices), toy.devices(devices))
    found, scores = Index(vectors, settings, mesh, hidden).search(queries, 400)
    wanted, best = Index(vectors[left], settings, mesh).search(queries, 400)
    np.testing.assert_array_equal(found, np.where(wanted < 0, -1, left[wanted]))
    np.testing.assert_array_equal(scores, best)
    assert (found[:, -1] == -1).all() and np.isneginf(scores[:, -1]).all()


@pytest.mark.parametrize("size, k", [(6400, 3), (4160, 5), pytest.param(20000, 9, marks=slow)])
def test_top_of_many(size, k):
    """Groups lose no entry although values tie everywhere, within groups and between them."""
    values = np.random.default_rng(0).integers(0, size // 40, (16, size)).astype(np.float32)
    values[0] = 1.0
    values[1], values[2] = np.arange(size), -np.arange(size)
    values[3, : size // 2] = -np.inf
    visible = (np.arange(size) < size - 37) & (np.arange(size) % 11 > 0)
    found, places = jax.jit(lambda x, seen: exact_search._top(x, k, seen))(values, visible)
    left = np.flatnonzero(visible)
    order = left[np.argsort(-values[:, left], axis=1, kind="stable")[:, :k]]
    np.testing.assert_array_equal(places, order)
    np.testing.assert_array_equal(found, np.take_along_axis(values, order, 1))


@pytest.mark.parametrize("streamed", [False, True])
def test_a_restricted_index_finds_what_is_left_and_compiles_nothing(streamed):
    """Also of one that was restricted before; the whole index stays as it is."""
    vectors, queries = tied(300), tied(4, seed=1)
    settings = ExactSearch(chunk=64, **({"max_device_bytes": 4096} if streamed else {}))
    index = Index(vectors, settings, hidden=[5])
    index.search(queries, 7)
    step = exact_search._step(index.mesh, "float32", *_chunks_and_k(index, len(queries), 7))
    compiled = step._cache_size()
    mask, second = np.arange(300) % 3 != 0, np.arange(300) % 2 == 0
    for some, left in (
        (index.restrict(mask), mask),
        (index.restrict(mask).restrict(second), mask & second),
    ):
        left = left & (np.arange(300) != 5)
        wanted, best = Index(vectors[left], settings).search(queries, 7)
        found, scores = some.search(queries, 7)
        np.testing.assert_array_equal(found, np.flatnonzero(left)[wanted])
        np.testing.assert_allclose(scores, best, rtol=1e-6)
    assert step._cache_size() == compiled
    assert len(index.restrict(np.arange(300) < 2).search(queries, 7)[0]) == 4
    few, scores = index.restrict(np.arange(300) < 2).search(queries, 7)
    assert (few[:, 2:] == -1).all() and np.isneginf(scores[:, 2:]).all()
    assert index.search(queries, 300)[0].max() == 299


def _chunks_and_k(index, queries, k):
    size = min(index.settings.batch_size, exact_search._power_of_two(queries))
    chunks = min(index.plan.chunks, exact_search._chunks(index.plan.rows, index.settings, size))
    return chunks, k


def test_a_file_is_streamed_and_never_read_whole(tmp_path, caplog, monkeypatch):
    vectors, queries = tied(300, dtype=np.float16), tied(4, seed=1)
    np.save(tmp_path / "vectors.npy", vectors)
    settings = ExactSearch(chunk=64, max_device_bytes=4096)
    read = []
    stored = exact_search._stored
    monkeypatch.setattr(exact_search, "_stored", lambda x, s: read.append(len(x)) or stored(x, s))
    with caplog.at_level(logging.INFO, "dgr_jax"):
        index = Index(exact_search.open_vectors(tmp_path / "vectors.npy"), settings)
    assert caplog.messages == [
        "300 vectors of 6 are streamed in 4 blocks; ExactSearch.max_device_bytes=4096"
    ]
    assert read == []
    same(index, vectors, queries, 7)
    assert sum(read) == 300 and max(read) <= 4096 // 2 // (4 * WIDTH) + 64
    same(index, vectors, queries, 7)  # the file is read again
    step = exact_search._step(index.mesh, "float32", index.plan.chunks, 7)
    assert step._cache_size() == 1  # compiled once for all blocks


@pytest.mark.parametrize("storage", ["bfloat16", "int8", pytest.param("float32", marks=slow)])
def test_storage(storage):
    random = np.random.default_rng(0)
    vectors = random.normal(size=(500, WIDTH)).astype(np.float32) * 10 ** random.normal(
        size=(500, 1)
    )
    vectors = vectors.astype(np.float32)
    vectors[3] = 0
    queries = random.normal(size=(4, WIDTH)).astype(np.float32)
    index = Index(vectors, ExactSearch(storage=storage, chunk=128))
    passages, scores = index.search(queries, 20)
    _, wanted = twin.search(queries, vectors, 20, storage)
    np.testing.assert_allclose(scores, wanted, rtol=1e-5)
    both = twin.stored(queries, vectors, storage)
    np.testing.assert_allclose(
        np.take_along_axis(both[0] @ both[1].T, passages, 1), wanted, rtol=1e-5
    )
    exact = twin.search(queries, vectors, 20)[1]
    apart = np.abs(scores / exact - 1).max()
    assert apart < {"float32": 1e-6, "bfloat16": 0.02, "int8": 0.05}[storage]
    assert all(len(set(row)) == 20 for row in passages.tolist())


def test_no_queries():
    passages, scores = Index(tied(3)).search(np.zeros((0, WIDTH)), 5)
    assert passages.shape == scores.shape == (0, 5)


def test_plan():
    half = ExactSearch(storage="bfloat16", max_device_bytes=60 << 30)
    one = BlockPlan.of(8_841_823, 768, half, 1)
    assert one.blocks == 1 and one.rows >= 8_841_823
    assert one.device_bytes == pytest.approx(8_841_823 * 768 * 2, rel=1e-3)
    chip = dataclasses.replace(half, max_device_bytes=12 << 30)
    assert BlockPlan.of(8_841_823, 768, chip, 1).blocks == 3
    eight = BlockPlan.of(8_841_823, 768, chip, 8)
    assert eight.blocks == 1 and eight.device_bytes == pytest.approx(one.device_bytes / 8, rel=1e-2)
    streamed = BlockPlan.of(8_841_823, 768, chip, 1)
    assert streamed.device_bytes <= 12 << 30
    assert streamed.blocks * streamed.rows >= 8_841_823
    for plan in (one, eight, streamed):
        assert plan.rows % (plan.chunks * 64) == 0 and plan.chunks & (plan.chunks - 1) == 0


def test_errors(tmp_path):
    index = Index(tied(3))
    cases = [
        (lambda: index.search(np.zeros((2, 5)), 1), "queries: got shape [2, 5], expected [n, 6], "
         "the width of the passage vectors"),
        (lambda: index.search(np.zeros((2, 6)), 0), "k: got 0, expected at least 1"),
        (lambda: Index(np.zeros((3, 4))), "vectors: got float64 [3, 4], expected float32 or "
         "float16 [P, d], P and d above 0"),
        (lambda: ExactSearch(storage="int4"), "ExactSearch.storage: got 'int4', expected one of "
         "'float32', 'bfloat16', 'int8'"),
        (lambda: ExactSearch(chunk=0), "ExactSearch.chunk: got 0, expected at least 1"),
    ]  # fmt: skip
    for wrong, message in cases:
        with pytest.raises(ValueError) as error:
            wrong()
        assert str(error.value) == message
    path = tmp_path / "flat.npy"
    np.save(path, np.zeros(3, np.float32))
    with pytest.raises(ValueError) as error:
        exact_search.open_vectors(path)
    assert str(error.value).startswith(f"{path}: got float32 [3], expected float32 or float16")
