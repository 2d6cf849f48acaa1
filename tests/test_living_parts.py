"""What a new version of an index is made of, scheme by scheme and part by part."""

from __future__ import annotations

import dataclasses
import errno
import math
import os
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dgr_jax.corpora import store
from dgr_jax.corpora.types import Passage
from dgr_jax.data.vocabulary import SentencePiece, Vocabulary
from dgr_jax.decoding import suffix_array, suffix_array_expand, trie
from dgr_jax.experiments.generative import Prepare
from dgr_jax.identifiers import embeddings
from dgr_jax.identifiers.atomic import Atomic
from dgr_jax.identifiers.embeddings import FromFile, TfidfSvd
from dgr_jax.identifiers.multiview import Multiview
from dgr_jax.identifiers.rq import ResidualQuantization
from dgr_jax.identifiers.scheme import Addition, Material
from dgr_jax.identifiers.semantic import KMeansTree
from dgr_jax.identifiers.string import NaiveString
from dgr_jax.identifiers.table import IdentifierTable
from dgr_jax.identifiers.title import Title
from dgr_jax.model_dir import records
from dgr_jax.model_dir.index_versions import Versions
from dgr_jax.retrieval import dense, exact_search, kept_vectors
from dgr_jax.retrieval.bm25 import Bm25
from dgr_jax.retrieval.exact_search import ExactSearch, Index
from dgr_jax.retrieval.kept_postings import KeptPostings
from dgr_jax.retrieval.living import update, vectors
from dgr_jax.retrieval.living.change import Change
from dgr_jax.retrieval.multiview.view_indexes import ViewIndexes
from dgr_jax.settings import describe
from dgr_jax.stages import identifiers

WORDS = "bee honey whale ocean moon crater tea leaf bread oven river stone wind cloud".split()
LSA = TfidfSvd(dim=8)
SCHEMES = {
    "rq": ResidualQuantization(embeddings=LSA),
    "rq with ties": ResidualQuantization(1, 8, LSA, spread=0, reserve=40),
    "semantic": KMeansTree(branching=3, leaf_size=8, embeddings=LSA, reserve=30),
    "semantic, one leaf": KMeansTree(embeddings=LSA, reserve=30),
    "title": Title(),
    "string": NaiveString(),
    "string by position": NaiveString(by_position=True, reserve=41),
}


def drawn(count: int, seed: int, prefix: str = "p") -> list[Passage]:
    """Passages of twelve words, of two topics each."""
    random, passages = np.random.default_rng(seed), []
    for number in range(count):
        topics = random.choice(len(WORDS), 2, replace=False)
        text = " ".join(WORDS[topic] for topic in random.choice(topics, 12))
        passages.append(Passage(f"{prefix}{number}", text, f"{WORDS[topics[0]]} {number}"))
    return passages


def prepared(folder: Path, scheme: object, passages: list[Passage], **settings: object) -> Versions:
    """What the prepare stage leaves for readers."""
    place = folder / "prepare"
    held = store.write(passages, place / "passages")
    prepare = Prepare("none", identifiers=scheme, vocabulary=SentencePiece(size=120), **settings)
    prepare.vocabulary.write(place, (passage.contents for passage in passages))
    identifiers.build(prepare, place, held, ())
    settings = {"prepare": describe(prepare)}
    records.write_record(place, status="done", fingerprint="drawn", settings=settings)
    return Versions.of(folder, place)


@pytest.mark.parametrize("name", SCHEMES)
def test_passages_that_come_later_get_identifiers_that_are_known(tmp_path, name):
    passages = drawn(60, 0)
    versions = prepared(tmp_path, SCHEMES[name], passages)
    before = IdentifierTable.load(versions.prepared / "identifiers")
    copy = dataclasses.replace(passages[7], pid="copy")
    update.update(versions, [*drawn(20, 1, "new"), copy], ["p3", "p59"])
    table = IdentifierTable.load(versions.at(1) / "identifiers")
    assert (table.num_passages, table.view) == (79, before.view)
    assert table.num_code_tokens == before.num_code_tokens
    if name != "title":
        table.require_docids()
    rows, old_rows = table.rows_of_passages(), before.rows_of_passages()
    stay = [i for i in range(60) if i not in (3, 59)]
    for now, was in enumerate(stay):
        assert table.tokens[rows[now]].tolist()[: before.tokens.shape[1]] == (
            before.tokens[old_rows[was]].tolist()
        )
    for position, column in enumerate(table.tokens.T):
        known = before.tokens[:, position] if position < before.tokens.shape[1] else [0, 1]
        if name in ("rq", "semantic") and position == 0:
            assert set(column) <= set(known)
    assert table.tokens.max() < Vocabulary.load(versions.prepared).size
    first = table.tokens[rows[78]][0]
    if "string" not in name and name != "semantic, one leaf":
        assert first == before.tokens[old_rows[7]][0], "the same text begins with the same code"
    if "string" in name:
        assert table.tokens.shape[1] == len(str(60 + SCHEMES[name].reserve - 1))
    index = trie.load(versions.at(1) / "trie")
    tokens, lengths = index.rows()
    np.testing.assert_array_equal(tokens[:, : table.tokens.shape[1]], table.tokens)
    np.testing.assert_array_equal(lengths, table.lengths)


def test_codes_are_those_of_the_nearest_free_cell(tmp_path):
    """Against a search of all cells, one passage after another."""
    passages, new = drawn(40, 0), drawn(24, 1, "new")
    scheme = ResidualQuantization(2, 4, LSA)
    held = store.write(passages, tmp_path / "passages")
    (table,) = scheme.tables(Material(held, list, 3, keep=tmp_path / "kept"))
    rows = scheme.rows(Addition(new, table, list, 3, tmp_path / "kept"))
    books = [np.load(tmp_path / "kept" / "codebooks" / f"{level}.npy") for level in (0, 1)]
    ties = table.num_code_tokens - 8
    taken = {tuple(row) for row in (table.tokens - [3, 7, 11]).tolist()}
    later = embeddings.later(LSA, [p.contents for p in new], tmp_path / "kept")
    for row, vector in zip(rows, later, strict=True):
        near = sorted(range(4), key=lambda c: np.sum((vector - books[0][c]) ** 2))
        for first in near:
            left = vector - books[0][first]
            counts = [sum(cell[:2] == (first, c) for cell in taken) for c in range(4)]
            free = [c for c in range(4) if counts[c] < ties]
            if free:
                last = min(free, key=lambda c: (counts[c], np.sum((left - books[1][c]) ** 2)))
                break
        tie = next(t for t in range(ties) if (first, last, t) not in taken)
        taken.add((first, last, tie))
        assert (row - [3, 7, 11]).tolist() == [first, last, tie]


def test_the_kept_model_embeds_as_the_one_that_was_fitted(tmp_path):
    held = store.write(drawn(60, 0), tmp_path / "passages")
    fitted = embeddings.embedded(LSA, held, 0, tmp_path)
    np.testing.assert_array_equal(fitted, LSA.embed(held, 0))
    texts = [passage.contents for passage in held]
    np.testing.assert_allclose(embeddings.later(LSA, texts, tmp_path), fitted, atol=1e-6)
    unknown = embeddings.later(LSA, ["xyzzy"], tmp_path)
    np.testing.assert_array_equal(unknown, np.eye(8)[:1])


@pytest.mark.parametrize(
    ("scheme", "count", "expected"),
    [
        (
            NaiveString(),
            41,
            "NaiveString: got 41 passages, expected at most 40: so many numbers of 2 digits are "
            "left; prepare and train again with all passages, or with NaiveString.reserve",
        ),
        (
            ResidualQuantization(1, 64, LSA),
            10,
            "no identifier is left for 70 passages with 1 codes",
        ),
        (KMeansTree(leaf_size=60, embeddings=LSA), 1, "KMeansTree: no identifier is left for 61"),
        (
            Atomic(),
            1,
            "Atomic: got 1 passages, expected at most 0: so many of the 0 rows of Atomic.r",
        ),
        (Atomic(reserve=5), 6, "Atomic: got 6 passages, expected at most 5: so many of the 5 rows"),
    ],
)
def test_where_no_identifier_is_left_nothing_is_changed(tmp_path, scheme, count, expected):
    versions = prepared(tmp_path, scheme, drawn(60, 0))
    with pytest.raises(ValueError, match=expected):
        update.update(versions, drawn(count, 1, "new"))
    assert versions.current() == 0
    assert [path.name for path in versions.folder.iterdir()] == ["current.json"]


def test_vectors_of_a_file_are_none_for_later_passages(tmp_path):
    np.save(tmp_path / "v.npy", np.eye(60, 8, dtype=np.float32))
    scheme = ResidualQuantization(embeddings=FromFile(str(tmp_path / "v.npy")))
    versions = prepared(tmp_path, scheme, drawn(60, 0))
    with pytest.raises(ValueError, match="FromFile has no vectors for passages that come later; e"):
        update.update(versions, drawn(1, 1, "new"))


def test_a_passage_without_an_identifier_is_named(tmp_path, monkeypatch):
    versions = prepared(tmp_path, Title(), drawn(60, 0))
    monkeypatch.setattr(Vocabulary, "encode", lambda self, text: [])
    with pytest.raises(ValueError, match="'new0' can have no identifier of Title: the vocabulary"):
        update.update(versions, drawn(1, 1, "new"))


def test_sentences_come_and_go_with_their_passages(tmp_path):
    bm25 = Bm25(sentences=True)
    texts = ["Bees dance. A whale sings.", "The moon.", "Whales swim. Bees fly. Moons rise."]
    held = [Passage(str(i), text) for i, text in enumerate(texts)]
    index = bm25.fit(store.write(held, tmp_path / "0"))
    new = [Passage("3", "A zebra runs! Bees."), Passage("4", "")]
    stay = np.array([False, True, True])
    grown = index.kept().changed(bm25, stay, list(bm25.counts(new, {})))
    assert grown.postings.sizes.tolist() == [1, 3, 2, 1]
    grown.save(tmp_path / "kept", bm25, ["1", "2", "3", "4"])
    grown = KeptPostings.load(tmp_path / "kept", ["1", "2", "3", "4"])
    index_now = bm25.reopened(grown.postings, ["1", "2", "3", "4"])
    before, now = index.scores("moon whale"), index_now.scores("moon whale")
    np.testing.assert_array_equal(now[:2], before[1:])
    assert (now[2:] == 0).all() and index_now.scores("zebra").argmax() == 2


def test_sentences_come_to_passages_without_words(tmp_path):
    bm25, pids = Bm25(sentences=True), ["0", "1", "2"]
    held = [Passage(pid, "?") for pid in pids[:2]]
    kept = bm25.fit(store.write(held, tmp_path / "0")).kept()
    added = bm25.counts([Passage("2", "A zebra. Runs!")], {})
    grown = kept.changed(bm25, np.array([True, True]), added)
    assert bm25.reopened(grown.postings, pids).scores("zebra").argmax() == 2


def test_words_are_weighed_as_they_were_and_new_ones_by_all_passages():
    bm25 = Bm25(stemmer="", stop_words="")
    texts = ["bee bee honey", "whale ocean", "bee whale whale moon"]
    new = ["zebra zebra bee", "zebra moon"]
    held = [Passage(str(i), text) for i, text in enumerate(texts)]
    pids = SimpleNamespace(pids=["0", "1", "2"])
    index = bm25.fit(type("Store", (list,), vars(pids))(held))
    stay = np.array([True, False, True])
    grown = index.kept().changed(bm25, stay, [[Counter(text.split())] for text in new]).postings
    counts = [Counter(text.split()) for text in (texts[0], texts[2], *new)]
    frequency = Counter(word for text in texts for word in set(text.split()))
    for word, start, stop in zip(grown.words, grown.starts[:-1], grown.starts[1:], strict=True):
        n, of = (2, 4) if word == "zebra" else (frequency[word], 3)
        idf = math.log(1 + (of - n + 0.5) / (n + 0.5))
        expected = {
            i: idf * c[word] / (0.9 * (0.6 + 0.4 * c.total() / 3) + c[word])
            for i, c in enumerate(counts)
            if c[word]
        }
        part = dict(
            zip(grown.passages[start:stop].tolist(), grown.impacts[start:stop], strict=True)
        )
        assert part == pytest.approx(expected, rel=1e-6), word
        assert list(part) == sorted(part)


def rows_of(count: int, seed: int) -> np.ndarray:
    return np.unique(np.random.default_rng(seed).integers(3, 60, (count, 4)), axis=0)


def test_a_trie_keeps_its_shapes_as_long_as_the_rows_fit():
    first = trie.build(rows_of(1000, 0), vocab_size=64)
    grown = trie.build(rows_of(1030, 1), vocab_size=64, like=first)
    assert (grown.capacity, grown.layout) == (first.capacity, first.layout)
    alone = trie.build(rows_of(1030, 1), vocab_size=64)
    np.testing.assert_array_equal(grown.rows()[0], alone.rows()[0])
    outgrown = trie.build(rows_of(4000, 2), vocab_size=64, like=grown)
    assert outgrown.capacity["edge_tokens"][0] > first.capacity["edge_tokens"][0]
    more = trie.build(rows_of(4600, 3), vocab_size=64, like=outgrown)
    assert more.capacity == outgrown.capacity, "there is room for a quarter more"
    shapes = [leaf.shape for leaf in jax.tree.leaves(outgrown.constraint())]
    assert [leaf.shape for leaf in jax.tree.leaves(more.constraint())] == shapes
    longer = np.pad(rows_of(50, 4), ((0, 0), (0, 1)), constant_values=61)
    assert trie.build(longer, vocab_size=64, like=first).layout != first.layout


def test_a_suffix_array_keeps_its_shapes_as_long_as_the_text_fits(monkeypatch):
    for name, sizes in {"_BUDGETS": (64,), "_CHUNKS": (8, 8)}.items():  # quick to compile
        monkeypatch.setattr(suffix_array_expand, name, sizes)
    random = np.random.default_rng(0)
    texts = [random.integers(1, 9, 40) for _ in range(300)]
    exact = suffix_array.build(texts, vocab_size=9, max_length=4)
    padded = exact.like(exact)
    more = suffix_array.build([*texts, texts[0]], vocab_size=9, max_length=4).like(padded)
    assert more.capacity == padded.capacity
    shapes = lambda index: [leaf.shape for leaf in jax.tree.leaves(index.constraint(max_length=4))]
    assert shapes(padded) == shapes(more)
    assert shapes(exact) != shapes(padded)
    one, other = (index.constraint(max_length=4) for index in (exact, padded))
    scores = jnp.asarray(random.normal(size=(2, 3, 9)), jnp.float32)
    step = jax.jit(lambda c, s, prior: c.expand(s, scores, prior, width=3))
    results = []
    for constraint in (one, other):
        state = jax.tree.map(lambda leaf: jnp.tile(leaf[:, None], (1, 3)), constraint.init(2))
        prior = jnp.where(jnp.arange(3) == 0, 0.0, -jnp.inf)[None].repeat(2, 0)
        for _ in range(4):
            found = step(constraint, state, prior)
            state, prior = found.next_state, found.log_probs
        results.append(found)
    jax.tree.map(np.testing.assert_array_equal, *results)
    spans, lengths = jnp.asarray([[1, 2, 3], [4, 4, 0]]), jnp.asarray([3, 2])
    find = jax.jit(lambda constraint: constraint.find(spans, lengths))
    jax.tree.map(np.testing.assert_array_equal, find(one), find(other))


@pytest.mark.parametrize("views", [("title", "body", "query"), ("title",), ("body",)])
def test_titles_spans_and_sentences_join_the_others(tmp_path, views):
    passages, new = drawn(60, 0), drawn(20, 1, "new")
    versions = prepared(tmp_path / "one", Multiview(views), passages)
    update.update(versions, new, ["p3"])
    update.update(
        versions, [Passage("no-title", "whale whale ocean moon")] * ("body" in views), ["p4"]
    )
    vocabulary = Vocabulary.load(versions.prepared)
    grown = ViewIndexes.load(versions.at(2), vocabulary)
    left = [p for p in [*passages, *new] if p.pid not in ("p3", "p4")]
    left += [Passage("no-title", "whale whale ocean moon")] * ("body" in views)
    anew = prepared(tmp_path / "two", Multiview(views), passages).prepared
    held = store.write(left, anew / "passages")
    settings = Prepare("none", identifiers=Multiview(views))
    identifiers.build(settings, anew, held, ())
    expected = ViewIndexes.load(anew, vocabulary)
    for view, table in expected.tables.items():
        for name in ("tokens", "offsets", "passages"):
            np.testing.assert_array_equal(getattr(grown.tables[view], name), getattr(table, name))
        np.testing.assert_array_equal(grown.tries[view].rows()[0], expected.tries[view].rows()[0])
    if "body" in views:
        np.testing.assert_array_equal(grown.text.tokens, expected.text.tokens)
        np.testing.assert_array_equal(grown.text.suffixes, expected.text.suffixes)
    assert grown.num_tokens == expected.num_tokens or "body" not in views
    assert (grown.opening is None) == (expected.opening is None)


def test_a_full_disk_under_the_suffix_array_changes_nothing(tmp_path, monkeypatch):
    versions = prepared(tmp_path, Multiview(("title", "body")), drawn(60, 0))
    made = update.update(versions, drawn(2, 1, "new"))
    text = suffix_array.load(versions.at(1) / "text")
    suffixes, save = text.suffixes.copy(), suffix_array.SuffixArray.save

    def full(index: suffix_array.SuffixArray, folder: Path) -> None:
        save(index, folder)
        (folder / "suffixes.npy").write_bytes(b"")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(suffix_array.SuffixArray, "save", full)
        with pytest.raises(OSError, match="the disk is full .*; nothing was changed, version 1 an"):
            update.update(versions, drawn(2, 2, "more"), ["p3"])
    assert [*versions.all(), versions.current()] == [made, 1]
    np.testing.assert_array_equal(suffix_array.load(versions.at(1) / "text").suffixes, suffixes)
    assert update.update(versions, drawn(2, 2, "more"), ["p3"]).passages == 63


def test_a_passage_of_no_view_is_named(tmp_path):
    versions = prepared(tmp_path, Multiview(("title",)), drawn(60, 0))
    with pytest.raises(ValueError, match=r"'x' has no identifier in any view \(title\); nothing w"):
        update.update(versions, [Passage("x", "whale")])


class Encoded:
    """An encoder whose vector counts a few letters."""

    config = SimpleNamespace(dim=3)
    search = dense.DenseSearch(passage_length=8)

    def __init__(self, stage: Path) -> None:
        self.encoder = self

    def passages(self, tokens: np.ndarray, search: object) -> np.ndarray:
        return np.stack([(tokens == t).sum(1) for t in (3, 4, 5)], 1).astype(np.float32) + 0.5


def test_vectors_come_and_go_and_belong_to_their_encoder(tmp_path, monkeypatch):
    passages = [*drawn(60, 0), Passage("blank", " ")]
    versions = prepared(tmp_path, Title(), passages)
    stage = tmp_path / "dense"
    stage.mkdir()
    records.write_record(stage, status="done", fingerprint="first")
    monkeypatch.setattr(Change, "students", lambda change, kind: [stage] * (kind == "dense"))
    monkeypatch.setattr(vectors, "_Student", Encoded)
    encode = Vocabulary.load(versions.prepared).encode_inputs
    held = store.PassageStore(versions.prepared / "passages")
    dense.embed(Encoded(stage), held, encode, stage / dense.VECTORS, Encoded.search)
    assert kept_vectors.located(stage, versions.prepared) == (stage, 0)
    new = drawn(5, 1, "new")
    update.update(versions, new, ["p0"])
    folder, capacity = kept_vectors.located(stage, versions.at(1))
    grown = exact_search.open_vectors(folder / dense.VECTORS)
    old = exact_search.open_vectors(stage / dense.VECTORS)
    np.testing.assert_array_equal(grown[:60], old[1:])
    tokens = encode([p.contents for p in new], 8)
    np.testing.assert_array_equal(grown[60:], Encoded(stage).passages(tokens, None))
    assert dense.open_blank(folder / dense.VECTORS, 65).tolist() == [59]
    assert capacity == 96
    update.update(versions, drawn(9, 2, "more"))
    assert kept_vectors.located(stage, versions.at(2))[1] == 96
    records.write_record(stage, status="done", fingerprint="second")
    with pytest.raises(ValueError, match=r"has no vectors of .*dense, which was trained after th"):
        kept_vectors.located(stage, versions.at(2))
    update.compact(versions)
    made = kept_vectors.located(stage, versions.at(3))[0] / dense.VECTORS
    assert len(exact_search.open_vectors(made)) == 74


def test_an_index_of_vectors_has_room_for_more():
    random = np.random.default_rng(0)
    held, queries = random.normal(size=(300, 4)).astype("f4"), random.normal(size=(2, 4))
    exact, wide = Index(held, ExactSearch()), Index(held, ExactSearch(), capacity=500)
    for one, other in zip(exact.search(queries, 9), wide.search(queries, 9), strict=True):
        np.testing.assert_array_equal(one, other)
    step = exact_search._step(wide.mesh, "float32", 1, 9)
    compiled = step._cache_size()
    more = Index(random.normal(size=(450, 4)).astype("f4"), ExactSearch(), capacity=500)
    more.search(queries, 9)
    assert step._cache_size() == compiled
