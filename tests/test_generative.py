"""Queries -> passages: batches in a few shapes, ranking, restricted collections, speed."""

from __future__ import annotations

import copy
import dataclasses
import json
import re
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dgr_jax import retrieve
from dgr_jax.analysis import speed
from dgr_jax.config import cli
from dgr_jax.decoding import trie
from dgr_jax.decoding.beam_search import BeamResult
from dgr_jax.decoding.sampling import sample
from dgr_jax.identifiers.table import IdentifierTable
from dgr_jax.models.t5 import Transformer
from dgr_jax.retrieval.batching import batches
from dgr_jax.retrieval.generative import Search, rank_passages
from dgr_jax.retrieval.search_programs import decode_fn
from dgr_jax.retrieval.system import TrainedSystem
from dgr_jax.serving import ask
from dgr_jax.settings import describe
from tests import students
from tests.conftest import ROOT
from tests.reference import decoding as reference
from tests.reference.retrieval import rank_passages as slow_rank_passages

slow = pytest.mark.slow
many = settings(max_examples=60, deadline=None)


# settings


@pytest.mark.parametrize(
    ("longest", "shortest", "expected"),
    [
        (32, 8, (8, 16, 32)),
        (32, 32, (32,)),
        (24, 8, (12, 24)),
        (5, 1, (1, 2, 3, 5)),
        (1, 1, (1,)),
        (4, 8, (4,)),
    ],
)
def test_padded_lengths(longest, shortest, expected):
    assert Search(query_length=longest, min_query_length=shortest).shapes.ladder == expected


@pytest.mark.parametrize("name", ["num_beams", "batch_size", "query_length", "min_query_length"])
def test_settings_below_one(name):
    with pytest.raises(ValueError) as error:
        Search(**{name: 0})
    assert str(error.value) == f"Search.{name}: got 0, expected at least 1"


def test_settings_of_speed_make_no_stage_run_again():
    plain = describe(Search())
    assert plain == describe(
        Search(min_query_length=4, queries_per_shape=1, max_replicated_bytes=0)
    )
    assert plain != describe(Search(num_beams=7))


# batches


@many
@given(
    lengths=st.lists(st.integers(1, 16), max_size=60),
    size=st.integers(1, 9),
    per_shape=st.integers(0, 20),
)
def test_batches_hold_every_query_once_in_shapes_that_pay(lengths, size, per_shape):
    search = Search(query_length=16, min_query_length=3, queries_per_shape=per_shape)
    planned = list(batches(np.array(lengths, int), search.shapes, size))
    used = [length for length, _ in planned]
    assert used == sorted(used, reverse=True)
    assert set(used) <= {4, 8, 16}
    places = [place for _, part in planned for place in part.tolist()]
    assert sorted(places) == list(range(len(lengths)))
    assert all(0 < len(part) <= size for _, part in planned)
    for length, part in planned:
        assert max(lengths[place] for place in part) <= length
    for length in {4, 8} & set(used):
        assert sum(len(part) for n, part in planned if n == length) >= max(per_shape, 1)
    for length in set(used):
        assert sum(len(part) < size for n, part in planned if n == length) <= 1
    if per_shape <= 1:
        for length, part in planned:
            assert all(2 * lengths[place] > length or length == 4 for place in part)


def test_a_few_queries_share_one_shape():
    lengths = np.arange(1, 1441) % 12 + 2
    assert {length for length, _ in batches(lengths, Search(query_length=24).shapes, 32)} == {24}
    assert {length for length, _ in batches(np.tile(lengths, 3), Search().shapes, 32)} == {8, 32}


# ranking


@many
@given(st.data())
def test_ranking_against_its_slow_twin(data):
    owner = st.lists(st.integers(0, 6), min_size=12, max_size=12)
    tokens = np.array([[3 + i // 4, 3 + i % 4] for i in range(12)], np.int32)
    table = IdentifierTable.from_rows(
        tokens[data.draw(st.permutations(range(12)))],
        view="test",
        passages=np.array(data.draw(owner)),
        num_passages=7,
    )
    depth, beams = data.draw(st.integers(1, 8)), data.draw(st.integers(1, 6))
    pick = st.lists(st.integers(-1, 11), min_size=beams, max_size=beams)
    rows = np.array(data.draw(st.lists(pick, max_size=3)), int).reshape(-1, beams)
    log_probs = -np.arange(rows.size, dtype=np.float32).reshape(rows.shape)
    allowed = data.draw(st.none() | st.lists(st.booleans(), min_size=7, max_size=7))
    passages, scores = rank_passages(
        rows, log_probs, table, depth, None if allowed is None else np.array(allowed)
    )
    assert (passages.shape, scores.shape) == ((len(rows), depth), (len(rows), depth))
    assert (passages.dtype, scores.dtype) == (np.int32, np.float32)
    owners = [table.passages_of(row).tolist() for row in range(len(table))]
    expected = slow_rank_passages(rows.tolist(), log_probs.tolist(), owners, depth, allowed)
    for query, best in enumerate(expected):
        free = depth - len(best)
        assert passages[query].tolist() == [passage for passage, _ in best] + [-1] * free
        assert scores[query].tolist() == [score for _, score in best] + [-np.inf] * free


# decoding


@pytest.fixture(scope="module")
def decoder():
    """Beams for all 40 identifiers and some more; compiled for batches of 4, and of 1."""
    search = Search(num_beams=50, depth=45, batch_size=4, query_length=8, min_query_length=4)
    return students.decoder(students.texts(40), search)


def short_ones_apart(decoder):
    """The same, which pads queries to the shorter lengths that they fit."""
    search = dataclasses.replace(decoder.search, queries_per_shape=1)
    return dataclasses.replace(decoder, search=search)


QUERIES = students.queries(11)


def model(config, tokens):
    """One student as tests.reference.decoding wants it: (query, prefix) -> logits [V]."""
    params, width = students.parameters(config), 5
    apply = jax.jit(Transformer(config).apply)

    def logits(query, prefix):
        written = np.zeros((1, 1, width), np.int32)
        written[0, 0, 1 : 1 + len(prefix)] = prefix
        return apply({"params": params}, tokens[query : query + 1], written)[0, 0, len(prefix)]

    return logits


def teacher_forced(config, tokens, targets):
    """Log-probabilities [n, R] of target rows [n, R, T] of the queries [n, Q]."""
    shifted = np.pad(targets, [(0, 0), (0, 0), (1, 0)])[..., :-1]
    logits = jax.jit(Transformer(config).apply)(
        {"params": students.parameters(config)}, tokens, shifted
    )
    log_probs = np.array(logits, np.float64)
    log_probs -= np.log(np.exp(log_probs).sum(-1, keepdims=True))
    each = np.take_along_axis(log_probs, targets[..., None], -1)[..., 0]
    return (each * (targets > 0)).sum(-1)


@pytest.mark.slow
def test_with_more_beams_than_identifiers_all_are_found_in_order(decoder):
    passages, scores = decoder.passages(QUERIES)
    assert (passages[:, 40:] == -1).all() and (scores[:, 40:] == -np.inf).all()
    assert (np.sort(passages[:, :40]) == np.arange(40)).all()
    rows = decoder.table.rows_of_passages()[passages[:, :40]]
    expected = teacher_forced(decoder.config, QUERIES, decoder.table.tokens[rows])
    np.testing.assert_allclose(scores[:, :40], expected, atol=1e-4)
    assert (np.diff(scores[:, :40]) <= 0).all()


@slow
def test_lengths_are_mixed_and_padding_changes_nothing(decoder):
    """Two shapes compile, once each; the results are those of one shape, in the order asked."""
    one_shape = decoder.passages(QUERIES)
    before, padded = decoder._decode._cache_size(), decoder
    decoder = short_ones_apart(decoder)
    passages, scores = decoder.passages(QUERIES)
    lengths = (QUERIES > 0).sum(1)
    assert (lengths <= 4).any() and (lengths > 4).any() and (np.diff(lengths) < 0).any()
    compiled = decoder._decode._cache_size()
    assert compiled == before + 1
    np.testing.assert_array_equal(passages, one_shape[0])
    np.testing.assert_allclose(scores, one_shape[1], atol=1e-5)
    order = np.random.default_rng(0).permutation(len(QUERIES))
    mixed = decoder.passages(QUERIES[order])
    np.testing.assert_array_equal(mixed[0], passages[order])
    np.testing.assert_allclose(mixed[1], scores[order], atol=1e-5)
    assert padded._decode._cache_size() == compiled


@pytest.fixture
def shapes(decoder, monkeypatch):
    """The shapes of batches that the decoder searches for, and finds nothing."""
    shapes = []

    def nothing(params, constraint, tokens):
        shapes.append(tokens.shape)
        rows = jnp.full((len(tokens), 50), -1)
        return BeamResult(None, jnp.full(rows.shape, -jnp.inf), None, rows)

    monkeypatch.setattr(decoder, "_decode", nothing)
    return shapes


def test_sizes_that_are_asked_for_and_short_queries_apart_where_there_are_many(decoder, shapes):
    served = copy.copy(decoder)
    served.search = dataclasses.replace(decoder.search, queries_per_shape=1)
    served.pad_to((8, 1, 2, 16))
    queries = np.zeros((11, 8), np.int32)
    queries[:, :4] = 3
    queries[[2, 5], 4:] = 3  # two long ones
    served.passages(queries)
    assert shapes == [(2, 8), (16, 4)]
    shapes.clear()
    served.passages(queries[:9])  # seven short ones are too few
    served.passages(queries[:1])
    assert shapes == [(16, 8), (1, 8)]


def test_a_query_alone_is_a_batch_of_one(decoder, shapes):
    """And all other batches are whole, also the last of a block."""
    for number, expected in ((1, [(1, 8)]), (2, [(4, 8)]), (5, [(4, 8)] * 2)):
        shapes.clear()
        found, _ = decoder.passages(np.full((number, 8), 3))
        assert shapes == expected
        assert found.tolist() == [[-1] * 45] * number
    shapes.clear()
    list(decoder.passages_of_blocks([np.full((4, 8), 3), np.full((1, 5), 3)]))
    assert shapes == [(4, 8), (4, 8)]


def test_blocks_are_tokenised_while_the_device_works(decoder, monkeypatch):
    events, rank = [], type(decoder)._rank

    def note(self, *batch):
        events.append("rank")
        return rank(self, *batch)

    def blocks():
        for start in (0, 4, 8):
            events.append("tokenise")
            yield QUERIES[start : start + 4]

    whole = decoder.passages(QUERIES)
    monkeypatch.setattr(type(decoder), "_rank", note)
    parts = list(decoder.passages_of_blocks(blocks()))
    assert events == ["tokenise", "tokenise", "rank", "tokenise", "rank", "rank"]
    for all_of_it, part in zip(whole, zip(*parts, strict=True), strict=True):
        np.testing.assert_array_equal(all_of_it, np.concatenate(part))


def test_no_queries(decoder):
    passages, scores = decoder.passages(np.zeros((0, 8), np.int32))
    assert passages.shape == scores.shape == (0, 45)
    sizes = [len(p) for p, _ in decoder.passages_of_blocks([QUERIES[:0], QUERIES[:4], QUERIES[:0]])]
    assert sizes == [0, 4, 0]


def test_queries_longer_than_the_setting(decoder):
    with pytest.raises(ValueError) as error:
        decoder.passages(np.ones((1, 9), np.int32))
    assert str(error.value) == ("tokens: got a query of 9, expected at most 8, Search.query_length")


def test_a_restricted_decoder_finds_the_rest_and_does_not_compile(decoder):
    compiled = decoder._decode._cache_size()
    mask = np.arange(40) % 3 == 0
    some = decoder.restrict(mask)
    passages, scores = decoder.passages(QUERIES)
    found, found_scores = some.passages(QUERIES)
    for query in range(len(QUERIES)):
        keep = (passages[query] >= 0) & mask[passages[query]]
        assert found[query].tolist() == passages[query][keep].tolist() + [-1] * (45 - keep.sum())
        np.testing.assert_allclose(
            found_scores[query][: keep.sum()], scores[query][keep], atol=1e-5
        )
    fewer = some.restrict(np.arange(40) < 10).passages(QUERIES[:2])[0]
    assert [sorted(row[row >= 0].tolist()) for row in fewer] == [[0, 3, 6, 9]] * 2
    assert decoder._decode._cache_size() == compiled


def test_of_a_shared_identifier_only_the_allowed_passages_are_returned(decoder):
    rows = np.repeat(students.texts(20, seed=3), 2, 0)
    shared = students.decoder(rows, decoder.search)
    assert len(shared.table) < 21
    found = shared.restrict(np.arange(40) % 2 == 0).passages(QUERIES[:4])[0]
    assert all(sorted(row[row >= 0].tolist()) == list(range(0, 40, 2)) for row in found)


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (np.ones(39, bool), "passage_mask must be bool of shape [40]; got bool of shape (39,)"),
        (np.ones(40), "passage_mask must be bool of shape [40]; got float64 of shape (40,)"),
        (np.zeros(40, bool), "passage_mask leaves no passage"),
    ],
)
def test_masks_that_cannot_be(decoder, mask, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        decoder.restrict(mask)


# the document


def test_the_example_of_the_document_is_what_is_built():
    text = (ROOT / "docs" / "decoding.md").read_text(encoding="utf-8")
    rows = re.findall(r"\bp(\d)  ((?:\d ){3}\d)", text)
    index = trie.build(
        np.array([[int(token) for token in row.split()] for _, row in sorted(rows)]), vocab_size=16
    )
    arrays = dict(index.arrays.items()) | {"row_ids": index.row_ids}
    arrays["level_start"] = arrays["level_start"][:-1]
    shown = re.findall(r"^ {4}(\w+) +(\[[\d, \[\]-]+\])", text, re.MULTILINE)
    assert len(shown) == 8
    for name, values in shown:
        assert arrays[name].tolist() == json.loads(values), name


# the whole student against the definition of the search


def started(decoder, tokens):
    """What beam search makes of a whole batch."""
    return decoder._start(tokens, np.arange(len(tokens)), tokens.shape)


@pytest.mark.parametrize(
    ("beams", "rows"),
    [
        (1, students.texts(200)),
        (7, students.texts(200)),
        (1, students.codes(200)),
        (9, students.codes(200)),
    ],
)
@slow
def test_beams_follow_the_definition(beams, rows):
    """One beam is greedy search."""
    search = Search(num_beams=beams, depth=beams, batch_size=2, query_length=8)
    decoder = students.decoder(rows, search)
    tokens = QUERIES[:2]
    result = started(decoder, tokens)
    legal = reference.unique_rows(
        [row[row > 0].tolist() for row in np.asarray(decoder.table.tokens)]
    )
    for query in range(2):
        best = reference.beam_search(model(decoder.config, tokens), query, legal, beams)
        found = decoder.index.table_rows(result.rows)[query]
        assert [legal[row] for row in found] == [row for row, _ in best]
        np.testing.assert_allclose(result.log_probs[query], [p for _, p in best], atol=1e-4)


@slow
def test_a_thousand_beams():
    search = Search(num_beams=1000, depth=1000, batch_size=1, query_length=8)
    decoder = students.decoder(students.codes(3000), search)
    result = started(decoder, QUERIES[:1])
    assert result.valid.all()
    rows = decoder.index.table_rows(result.rows)[0]
    assert len(set(rows.tolist())) == 1000
    expected = teacher_forced(decoder.config, QUERIES[:1], decoder.table.tokens[rows][None])
    np.testing.assert_allclose(result.log_probs, expected, atol=1e-4)
    assert (np.diff(result.log_probs[0]) <= 0).all()


@slow
def test_bfloat16_activations():
    """Scores are those of the same model read once, and float32."""
    config = dataclasses.replace(students.CONFIG, dtype="bfloat16")
    search = Search(num_beams=10, depth=10, batch_size=2, query_length=8)
    decoder = students.decoder(students.codes(100), search, config=config)
    result = started(decoder, QUERIES[:2])
    assert result.valid.all() and result.log_probs.dtype == jnp.float32
    rows = decoder.index.table_rows(result.rows)
    expected = teacher_forced(config, QUERIES[:2], decoder.table.tokens[rows])
    np.testing.assert_allclose(result.log_probs, expected, atol=0.1)


@slow
def test_equal_scores_are_ordered_by_tokens_every_time(monkeypatch):
    flat = jax.tree.map(np.zeros_like, students.parameters(students.CONFIG))
    monkeypatch.setattr(students, "parameters", lambda config: flat)
    search = Search(num_beams=10, depth=10, batch_size=2, query_length=8)
    decoder = students.decoder(students.codes(100), search)
    first = started(decoder, QUERIES[:2])
    assert decoder.index.table_rows(first.rows).tolist() == [list(range(10))] * 2
    again = started(decoder, QUERIES[:2])
    assert (np.asarray(first.rows) == np.asarray(again.rows)).all()


@slow
def test_samples_take_the_same_step():
    """Cold samples of the student are its greedy identifier; without a mesh, too."""
    search = Search(num_beams=1, depth=1, batch_size=2, query_length=8)
    decoder = students.decoder(students.codes(200), search)
    apply = jax.tree_util.Partial(Transformer(decoder.config).apply, {"params": decoder.params})
    tokens = jnp.asarray(QUERIES[:2])
    encoded = apply(tokens, method="encode")
    cross = apply(encoded, tokens, method="cross")
    drawn = sample(
        lambda last, cache, at: apply(last, cache, at, cross, tokens, method="step"),
        decoder._constraint,
        apply(encoded, 3, 3, method="init_cache"),
        key=jax.random.key(0),
        batch_size=2,
        num_samples=3,
        temperature=1e-4,
    )
    alone = decode_fn(decoder.config, 1, 3)
    greedy = alone(decoder.params, decoder._constraint, tokens)
    assert (drawn.rows == greedy.rows).all()
    assert (started(decoder, QUERIES[:2]).rows == greedy.rows).all()
    np.testing.assert_allclose(drawn.log_probs, np.repeat(greedy.log_probs, 3, 1), atol=1e-4)


@slow
def test_a_search_without_a_constraint_finds_what_is_an_identifier():
    """A beam as wide as all sequences finds the same passages with the same scores."""
    rows = np.unique(students.codes(30, 2, first=86), axis=0)
    bound = Search(num_beams=students.VOCAB**2, depth=20, batch_size=2, query_length=8)
    free = dataclasses.replace(bound, constrained=False)
    expected = students.decoder(rows, bound).passages(QUERIES[:2])
    decoder = students.decoder(rows, free)
    found = decoder.passages(QUERIES[:2])
    np.testing.assert_array_equal(found[0], expected[0])
    np.testing.assert_allclose(found[1], expected[1], atol=1e-5)
    assert decoder.counts == {
        "sequences": 2 * students.VOCAB**2, "unknown": 2 * (students.VOCAB**2 - len(rows))
    }  # fmt: skip


# speed


class Stopwatch:
    """A retriever that takes 3 ms a call and 1 ms a question, of which `now` tells."""

    def __init__(self, batch_size):
        self.now, self.calls = 0.0, []
        mesh = SimpleNamespace(devices=np.array(jax.devices()[:1]), shape={"data": 1})
        student = SimpleNamespace(
            search=Search(num_beams=2), config=SimpleNamespace(dtype="float32"),
            params={"a": np.zeros((3, 4))},
        )  # fmt: skip
        self.decoder = SimpleNamespace(
            batch_size=batch_size,
            mesh=mesh,
            describe=lambda: TrainedSystem.described(student, 2, 3),
        )

    def run(self, queries):
        self.calls.append(list(queries.values()))
        self.now += 0.003 + 0.001 * len(queries)


def test_speed_is_measured_after_a_warm_up(monkeypatch):
    watch = Stopwatch(batch_size=4)
    monkeypatch.setattr(speed.time, "perf_counter", lambda: watch.now)
    report = speed.measure(watch, ["a", "b", "c", "d", "e"])
    full = ["a", "b", "c", "d", "e", "a", "b", "c"]
    assert watch.calls[:3] == [["a"], full[:4], full]
    assert watch.calls[3:] == [["a"], ["b"], ["c"], ["d"], ["e"], full[:4], full[4:], full]
    assert report["alone"] == {
        "batch_size": 1,
        "queries": 5,
        "queries_per_second": 250.0,
        "latency_ms": {"p50": 4.0, "p95": 4.0, "p99": 4.0},
    }
    assert report["batched"] == {
        "batch_size": 4,
        "queries": 8,
        "queries_per_second": 727.273,  # 8 in 11 ms
        "latency_ms": {"p50": 7.0, "p95": 7.0, "p99": 7.0},
    }
    assert (report["identifiers"], report["parameters"], report["num_beams"]) == (2, 12, 2)
    assert report["device"].endswith(" cores")
    assert speed.device_name(SimpleNamespace(platform="gpu", device_kind="GPU X")) == "GPU X"


def test_speed_of_nothing():
    with pytest.raises(ValueError, match="queries: got none, expected one or more"):
        speed.measure(Stopwatch(1), [])


def test_percentiles(monkeypatch):
    summary = speed._summary(1, 100, 2.0, [0.001 * n for n in range(101)])
    assert summary["queries_per_second"] == 50.0
    assert summary["latency_ms"] == {"p50": 50.0, "p95": 95.0, "p99": 99.0}


@pytest.mark.slow
def test_the_command_reports_speed(tiny_model_dir, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(cli, "_configure_logging", lambda verbose: None)
    monkeypatch.setenv("COLUMNS", "200")
    queries, output = tmp_path / "queries.tsv", tmp_path / "speed.json"
    queries.write_text("1\tWhy do bees dance?\n2\tWho built the wall?\n")
    retrieve.command([
        f"--model_dir={tiny_model_dir}", f"--queries={queries}", "--report_speed", "--k=5",
        f"--output={output}", "--batch_size=2",
    ])  # fmt: skip
    printed = capsys.readouterr().out
    report = json.loads(output.read_text())
    assert report["device"] in printed
    assert "p99 ms" in printed and "240 identifiers; 8 beams" in printed
    assert report["mesh"] == {"data": 1, "fsdp": 1, "model": 1}
    for name, size in (("alone", 1), ("batched", 2)):
        found = report[name]
        assert (found["batch_size"], found["queries"]) == (size, 2)
        assert found["queries_per_second"] > 0
        assert 0 < found["latency_ms"]["p50"] <= found["latency_ms"]["p99"]


def test_the_command_asks_for_queries(capsys):
    with pytest.raises(SystemExit):
        retrieve.command(["--report_speed", "--model_dir=m"])
    assert "--report_speed needs --queries" in capsys.readouterr().err


@pytest.mark.parametrize("given", ["4", "4,2,1", "a,b"])
def test_a_mesh_is_two_numbers(given):
    with pytest.raises(ValueError) as error:
        ask._mesh(given)
    assert str(error.value) == f"--mesh: got '{given}', expected DATA,MODEL such as 4,2"
    assert ask._mesh("4,2") == ask.Mesh(data=4, model=2)
