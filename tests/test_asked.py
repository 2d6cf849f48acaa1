import types

import numpy as np
import pytest

from dgr_jax.experiments.generative import Candidates
from dgr_jax.retrieval.generative import Search
from dgr_jax.stages import asked, candidates, npz
from dgr_jax.teaching.places import Places
from dgr_jax.training import arrays

WORDS = ["The Otter", "a weir", "owls; otters", "Ärger", ""]  # one text of each passage


@pytest.fixture
def of_sources(monkeypatch):
    """(Candidates.max_queries, ids of labelled queries) -> what is asked of two sources."""

    def pairs(settings, source, *_, **__):
        return iter([(text, index, "") for index, text in enumerate(WORDS)])

    def make(max_queries=0, labelled=("q1",), sources=("labelled", "passages")):
        monkeypatch.setattr(asked, "source_pairs", pairs)
        monkeypatch.setattr(asked.judged, "test_texts", lambda *_: frozenset())
        monkeypatch.setattr(asked.judged, "self_hits", lambda *_: frozenset())
        vocabulary = types.SimpleNamespace(
            views=(),
            encode_all=lambda texts: [text.lower().split() for text in texts],
            decode=" ".join,
        )
        queries = {qid: types.SimpleNamespace(text=f"text of {qid}") for qid in labelled}
        prepared = types.SimpleNamespace(
            vocabulary=vocabulary,
            folder=None,
            store=types.SimpleNamespace(pids=["p0", "p1", "p2", "p3", "p4"]),
            queries=lambda _: queries,
            qrels=lambda _: {qid: {"p3": 2, "p1": 0} for qid in labelled},
        )
        experiment = types.SimpleNamespace(
            prepare=types.SimpleNamespace(query_length=2, min_relevance=1, train_split="train"),
            candidates=Candidates(Search(), sources=sources, max_queries=max_queries),
        )
        return asked.training_queries(experiment, prepared)

    return make


def test_queries_of_all_sources_are_cut_and_named_by_their_places(of_sources):
    queries = of_sources()
    expected = {"q1": "text of q1", "passages:0": "the", "passages:1": "a"}
    expected |= {"passages:2": "owls;", "passages:3": "ärger", "passages:4": ""}
    assert dict(queries.texts) == expected
    assert len(queries.texts) == 6
    assert queries.qrels["q1"] == {"p3": 2, "p1": 0}
    assert queries.qrels["passages:3"] == {"p3": 1}
    assert dict(queries.by_source({"labelled": "L", "passages": "P"})) == {
        qid: "L" if qid == "q1" else "P" for qid in expected
    }
    for absent in ("passages:5", "passages:04", "passages:x", "passages", "q2", "other:1"):
        assert absent not in queries.texts and absent not in queries.qrels


def test_as_many_as_are_wanted_are_drawn_and_keep_their_places(of_sources):
    queries = of_sources(max_queries=2, sources=("passages",))
    drawn = np.sort(np.random.default_rng(0).choice(5, 2, replace=False))
    assert list(queries.texts) == [f"passages:{place}" for place in drawn]
    assert [queries.qrels[q] for q in queries.texts] == [{f"p{place}": 1} for place in drawn]


def test_a_query_with_the_id_of_a_text_is_named(of_sources):
    with pytest.raises(ValueError, match="split 'train': got a query of the id 'passages:2'"):
        of_sources(labelled=("q1", "passages:2"))


def test_arrays_in_blocks_are_as_written_whole(tmp_path):
    numbers = np.arange(12, dtype=np.float32).reshape(6, 2)
    names = np.array(["a", "bcd", "", "ä", "ee", "f"])
    blocks = [np.array(["a"]), np.array(["bcd", "", "ä"]), np.array(["ee", "f"])]
    columns = {
        "numbers": npz.Rows(numbers.dtype, numbers.shape, [numbers[:4], numbers[4:]]),
        "names": npz.Rows(names.dtype, names.shape, blocks),
    }
    npz.write(tmp_path / "a.npz", columns)
    np.savez(tmp_path / "b.npz", numbers=numbers, names=names)
    with np.load(tmp_path / "a.npz") as ours, np.load(tmp_path / "b.npz") as whole:
        assert ours.files == whole.files
        for name in whole.files:
            assert ours[name].dtype == whole[name].dtype
            assert np.array_equal(ours[name], whole[name])
    with pytest.raises(RuntimeError, match="got 4 rows of numbers, expected 6"):
        npz.write(
            tmp_path / "c.npz", {"numbers": columns["numbers"]._replace(blocks=[numbers[:4]])}
        )


def test_parts_are_joined_with_their_keys(tmp_path):
    rng, parts, paths = np.random.default_rng(0), [], []
    for count in (4, 3):
        part = {
            "passages": rng.integers(0, 9, (count, 2), np.int32),
            "scores": rng.random((count, 2), np.float32),
            "keys": rng.integers(0, 9, (count, 2, 3), np.int32),
            "members": rng.integers(0, 9, (count, 2), np.int32),
        }
        parts.append(part)
        paths.append(tmp_path / f"part-{len(paths)}.npz")
        np.savez(paths[-1], **part)
    candidates._join(tmp_path, paths, 7)
    with np.load(tmp_path / "candidates.npz") as joined:
        assert joined.files == ["passages", "scores"]
        joined = dict(joined) | arrays.read_arrays(tmp_path / "keys")
    assert joined.keys() == parts[0].keys()
    for name, values in joined.items():
        assert np.array_equal(values, np.concatenate([part[name] for part in parts]))


def test_places_are_found_in_order_and_out_of_it():
    ids = ["a", "b", "c", "d"]
    for order in ("abcd", "aabdd", "acab", "dcba"):
        places = Places(ids)
        assert [places.of(name) for name in order] == ["abcd".index(name) for name in order]
        with pytest.raises(KeyError, match="x"):
            places.of("x")
        assert places.of("b") == 1
