"""Dense retrieval end to end on random weights, and the mining of negatives."""

import dataclasses
import functools

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dgr_jax import partitioning
from dgr_jax.corpora import store as passage_store
from dgr_jax.corpora.types import Passage
from dgr_jax.models.dual_encoder import DualEncoder
from dgr_jax.partitioning import Mesh
from dgr_jax.retrieval import batching, dense, exact_search
from dgr_jax.retrieval.dense import DenseSearch, Encoder, Searcher
from dgr_jax.retrieval.exact_search import ExactSearch, Index
from dgr_jax.teaching.negatives import mine
from tests import students, toy
from tests.reference import exact_search as twin
from tests.test_dual_encoder import CONFIG as PLAIN
from tests.test_dual_encoder import params

slow = pytest.mark.slow
CONFIG = dataclasses.replace(PLAIN, temperature=0.5)
SEARCH = DenseSearch(
    depth=5,
    query_length=8,
    passage_length=8,
    batch_size=8,
    min_length=8,
)


@functools.cache
def encoder(data=1, model=1):
    mesh = partitioning.make_mesh(Mesh(data, model), toy.devices(data * model))
    abstract = partitioning.abstract_params(DualEncoder(CONFIG), mesh)
    placed = jax.tree.map(lambda x, to: jax.device_put(x, to.sharding), params(CONFIG), abstract)
    return Encoder(CONFIG, placed, mesh)


def encode_inputs(texts, length):
    """A word of the passages below is a token id."""
    tokens = np.zeros((len(texts), length), np.int32)
    for row, text in zip(tokens, texts, strict=True):
        ids = [int(word) for word in text.split()][: length - 1] + [1]
        row[: len(ids)] = ids
    return tokens


@pytest.fixture(scope="module")
def embedded(tmp_path_factory):
    """(store, file of its vectors): 21 passages, some with a title."""
    folder = tmp_path_factory.mktemp("dense")
    random = np.random.default_rng(4)
    passages = []
    for i in range(21):
        words = [str(word) for word in random.integers(3, 90, random.integers(1, 9))]
        title = words.pop() if i % 3 == 0 else ""
        passages.append(Passage(f"p{i}", " ".join(words), title))
    store = passage_store.write(iter(passages), folder / "passages")
    dense.embed(encoder(), store, encode_inputs, folder / "vectors.npy", SEARCH)
    return store, folder / "vectors.npy"


@functools.cache
def _model():
    """(scores of queries and passages, vectors of passages), from the model alone."""
    apply = DualEncoder(CONFIG).apply
    both = jax.jit(lambda v, q, p: (apply(v, q, p), apply(v, p, method="encode_passages")))
    return functools.partial(both, {"params": params(CONFIG)})


def tokens_of(store):
    return encode_inputs([passage.contents for passage in store], 8)


def test_vectors_of_a_store(embedded, monkeypatch):
    """In the order of the passages, title and text, however they are cut into blocks."""
    store, path = embedded
    vectors = exact_search.open_vectors(path)
    assert isinstance(vectors, np.memmap) and vectors.shape == (21, 16)
    assert [p.name for p in path.parent.glob("*.npy*")] == ["vectors.npy"]
    _, alone = _model()(students.queries(13), tokens_of(store))
    np.testing.assert_allclose(vectors, alone, rtol=1e-4, atol=1e-6)
    monkeypatch.setattr(batching, "BLOCK", 6)
    again = path.with_name("again.npy")
    dense.embed(encoder(), store, encode_inputs, again, SEARCH)
    np.testing.assert_allclose(np.load(again), vectors, rtol=1e-4, atol=1e-6)
    again.unlink()


@slow
def test_short_texts_have_a_shape_of_their_own(embedded):
    store, path = embedded
    tokens = tokens_of(store)
    search = dataclasses.replace(SEARCH, min_length=4, texts_per_shape=4)
    planned = list(batching.batches((tokens > 0).sum(1), search.shapes(8), 8))
    assert {length for length, _ in planned} == {4, 8}
    found = encoder().passages(tokens, search)
    np.testing.assert_allclose(found, np.load(path), rtol=1e-4, atol=1e-6)


def test_passages_found(embedded):
    _, path = embedded
    vectors = exact_search.open_vectors(path)
    queries = students.queries(13)
    wanted = twin.search(encoder().queries(queries, SEARCH), vectors, 5)
    one = Searcher(encoder(), Index(vectors), SEARCH)
    streamed = Index(vectors, ExactSearch(chunk=64, max_device_bytes=1))
    assert streamed.plan.blocks > 1
    for searcher in (one, dataclasses.replace(one, index=streamed)):
        passages, scores = searcher.passages(queries)
        np.testing.assert_array_equal(passages, wanted[0])
        np.testing.assert_allclose(scores, wanted[1], rtol=1e-5)
        assert passages.dtype == np.int32 and scores.dtype == np.float32
        parts = list(searcher.passages_of_blocks(iter([queries[:8], queries[8:]])))
        assert [len(part) for part, _ in parts] == [8, 5]
        alone = searcher.passages(queries[:1])  # which does not wait for a whole batch
        np.testing.assert_array_equal(alone[0], passages[:1])
        np.testing.assert_array_equal(np.concatenate([part for part, _ in parts]), passages)
        assert list(searcher.passages_of_blocks(iter([]))) == []


def test_a_text_alone_does_not_wait_for_a_batch(monkeypatch):
    place, rows = partitioning.place_padded, []

    def placed(tokens, shape, mesh):
        rows.append(shape[0])
        return place(tokens, shape, mesh)

    monkeypatch.setattr(partitioning, "place_padded", placed)
    one = encoder()
    for count in (1, 2, 13):
        one.queries(np.ones((count, 4), np.int32), SEARCH)
    assert rows == [1, 8, 8, 8]


def test_passages_without_text_are_never_found(tmp_path, caplog):
    texts = ["5 6 7", "", "8 9", " \u200b", "10 11 12"]
    passages = (Passage(f"p{i}", text) for i, text in enumerate(texts))
    store, path = passage_store.write(passages, tmp_path / "passages"), tmp_path / "vectors.npy"
    blank_inputs = lambda texts, length: encode_inputs(
        [text.replace("\u200b", "") for text in texts], length
    )
    dense.embed(encoder(), store, blank_inputs, path, SEARCH)
    assert "2 of 5 passages have no text: they get no vector and are never found" in caplog.text
    assert np.load(path)[[1, 3]].any(1).tolist() == [False, False]
    index = dense.open_index(path, ExactSearch(), encoder().mesh)
    searcher = Searcher(encoder(), index, SEARCH)
    queries = np.concatenate([students.queries(3), [[1, 0, 0, 0, 0, 0, 0, 0]]])
    for row in searcher.passages(queries)[0]:
        assert sorted(row) == [-1, -1, 0, 2, 4]
    assert all(len(hits) == 3 for hits in searcher.hits(queries))
    np.save(tmp_path / "blank.npy", np.array([9]))
    with pytest.raises(ValueError, match="blank.npy: cannot be read .*expected passages of 5"):
        dense.open_index(path, ExactSearch(), encoder().mesh)
    # What lay there of a corpus that had some is gone with it.
    whole = passage_store.write(iter([Passage("p0", "5 6")]), tmp_path / "whole")
    dense.embed(encoder(), whole, encode_inputs, path, SEARCH)
    assert sorted(file.name for file in tmp_path.glob("*.npy*")) == ["vectors.npy"]


def test_scores_are_those_of_training(embedded):
    """Temperature and projection included: what the objective sees is what the run says."""
    store, path = embedded
    queries = students.queries(13)
    trained, _ = _model()(queries, tokens_of(store))
    index = Index(exact_search.open_vectors(path))
    passages, scores = Searcher(encoder(), index, SEARCH).passages(queries)
    np.testing.assert_allclose(scores, np.take_along_axis(trained, passages, 1), rtol=1e-4)


@slow
@pytest.mark.parametrize(("data", "model"), [(8, 1), (2, 4)])
def test_the_same_on_a_mesh(embedded, data, model):
    _, path = embedded
    vectors, queries = exact_search.open_vectors(path), students.queries(13)
    shared = encoder(data, model)
    got = Searcher(shared, Index(vectors, mesh=shared.mesh), SEARCH).passages(queries)
    wanted = Searcher(encoder(), Index(vectors), SEARCH).passages(queries)
    np.testing.assert_array_equal(got[0], wanted[0])
    np.testing.assert_allclose(got[1], wanted[1], rtol=1e-4)


def test_errors(embedded):
    with pytest.raises(ValueError) as error:
        encoder().queries(np.ones((2, 9), np.int32), SEARCH)
    assert str(error.value) == (
        "tokens: got a query of 9, expected at most 8, DenseSearch.query_length"
    )
    with pytest.raises(ValueError, match="got a passage of 9, .* DenseSearch.passage_length"):
        encoder().passages(np.ones((2, 9), np.int32), SEARCH)
    with pytest.raises(ValueError) as error:
        Searcher(encoder(), Index(np.ones((3, 4), np.float32)), SEARCH)
    assert str(error.value) == (
        "Searcher: got an index of width 4, expected 16, that of the encoder; embed the passages "
        "again"
    )
    with pytest.raises(ValueError, match="^DenseSearch.depth: got 0, expected at least 1$"):
        DenseSearch(depth=0)


# negatives

row = st.lists(st.integers(-1, 11), min_size=4, max_size=4)


@settings(max_examples=60, deadline=None)
@given(
    candidates=st.lists(st.permutations(range(12)), min_size=1, max_size=4),
    positives=st.data(),
    count=st.integers(0, 14),
    skip=st.integers(0, 3),
    depth=st.integers(0, 6),
)
def test_negatives(candidates, positives, count, skip, depth):
    run = np.array(candidates)[:, :depth]
    run = np.where(np.arange(depth) < 5, run, -1)
    known = np.array([positives.draw(row) for _ in candidates])
    settings = dict(count=count, num_passages=12, skip=skip, seed=3)
    drawn = mine(run, known, **settings)
    assert drawn.dtype == np.int32 and drawn.shape == (len(run), count)
    np.testing.assert_array_equal(drawn, mine(run, known, **settings))
    for listed, relevant, found in zip(run.tolist(), known.tolist(), drawn.tolist(), strict=True):
        usable = [p for p in listed if p >= 0 and p not in relevant][skip:]
        from_run = min(count, len(usable))
        assert set(found[:from_run]) <= set(usable)
        assert sorted(found[:from_run], key=usable.index) == found[:from_run]
        real = [p for p in found if p >= 0]
        assert len(set(real)) == len(real) and not set(real) & set(relevant)
        assert len(real) == min(count, 12 - len(set(relevant) - {-1}))
        assert found[len(real) :] == [-1] * (count - len(real))


def test_every_candidate_has_the_same_chance():
    run = np.tile(np.arange(6), (3000, 1))
    positives = np.tile([[2]], (3000, 1))
    drawn = mine(run, positives, count=2, num_passages=100, skip=1)
    share = np.bincount(drawn.ravel(), minlength=6) / 3000
    assert not share[[0, 2]].any() and (np.abs(share[[1, 3, 4, 5]] - 0.5) < 0.05).all()
    assert (mine(run, positives, count=2, num_passages=100, seed=1) != drawn).any()
    random = mine(run[:, :0], positives, count=3, num_passages=1000)
    assert len(np.unique(random)) > 900 and not (random == 2).any()


def test_negatives_of_another_corpus():
    with pytest.raises(ValueError) as error:
        mine(np.array([[3, 7]]), np.array([[1]]), count=1, num_passages=7)
    assert str(error.value) == (
        "mine: candidates: got passage index 7, expected less than 7, the passages of the corpus"
    )
    with pytest.raises(ValueError) as error:
        mine(np.array([[3, 7]]), np.array([1]), count=1, num_passages=9)
    assert str(error.value) == (
        "mine: positives: got shape [1], expected [n, ...] for the same n queries as candidates"
    )
    with pytest.raises(ValueError, match="^mine: got count=-1, skip=0, expected 0 or more$"):
        mine(np.array([[3]]), np.array([[1]]), count=-1, num_passages=9)
