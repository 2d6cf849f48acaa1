import dataclasses
import logging
import sys
import types
from pathlib import Path

import numpy as np
import pytest

from dgr_jax.corpora import store as stores
from dgr_jax.corpora.types import Passage
from dgr_jax.identifiers import embeddings, kmeans, rq
from dgr_jax.identifiers.atomic import Atomic
from dgr_jax.identifiers.embeddings import FromFile, SentenceEncoder, TfidfSvd
from dgr_jax.identifiers.multiview import Multiview
from dgr_jax.identifiers.rq import ResidualQuantization
from dgr_jax.identifiers.scheme import Addition, CorpusSize, Material
from dgr_jax.identifiers.semantic import KMeansTree
from dgr_jax.identifiers.string import NaiveString
from dgr_jax.identifiers.table import IdentifierTable
from dgr_jax.identifiers.title import Title
from dgr_jax.settings import describe
from tests.reference import identifiers as reference

FIRST_CODE = 1000
SUBJECTS = ["bees honey hive queen", "ships sails mast rope", "bread dough yeast oven"]


def encode(text):
    """A vocabulary of characters, ids 3 and above."""
    return [3 + ord(c) % 500 for c in text]


class ListStore(list):
    """Passages in memory with the face of a PassageStore."""

    @property
    def pids(self):
        return [passage.pid for passage in self]


def corpus(texts, titles=None):
    titles = titles or [""] * len(texts)
    return ListStore(
        Passage(f"p{i}", text, title)
        for i, (text, title) in enumerate(zip(texts, titles, strict=True))
    )


def mixed_corpus(size, seed=0):
    """Three subjects, some equal passages, a blank one."""
    rng = np.random.default_rng(seed)
    texts = [
        " ".join(rng.choice(SUBJECTS[i % 3].split(), 5)) + f" word{i % 7}" for i in range(size)
    ]
    return corpus([*texts, texts[0], texts[0], ""])


def build(scheme, store, seed=0):
    table = scheme.build(store, encode=encode, first_code_id=FIRST_CODE, seed=seed)
    return table


def rows(table):
    """Tokens of every passage."""
    return table.tokens[table.rows_of_passages()]


class Vectors:
    """Embeddings made beforehand."""

    def __init__(self, vectors):
        self.vectors = np.asarray(vectors, np.float32)

    def embed(self, store, seed):
        return self.vectors


SCHEMES = [
    ResidualQuantization(num_codes=2, codebook_size=4, embeddings=TfidfSvd(dim=8)),
    ResidualQuantization(num_codes=2, codebook_size=4, embeddings=TfidfSvd(dim=8), spread=0),
    KMeansTree(branching=3, leaf_size=5, embeddings=TfidfSvd(dim=8)),
    NaiveString(),
    NaiveString(by_position=True),
    Atomic(),
    Title(max_tokens=6),
]
DOCIDS = SCHEMES[:-1]


@pytest.mark.parametrize("scheme", SCHEMES, ids=repr)
def test_the_same_seed_gives_the_same_table(scheme):
    store = mixed_corpus(40)
    first, second = build(scheme, store), build(scheme, store)
    np.testing.assert_array_equal(first.tokens, second.tokens)
    np.testing.assert_array_equal(first.passages, second.passages)
    assert first.num_code_tokens == second.num_code_tokens


@pytest.mark.parametrize("scheme", DOCIDS, ids=repr)
@pytest.mark.parametrize("size", [0, 1, 2, 9, 60])
def test_docids_are_one_to_one_and_stay_in_their_block(scheme, size):
    store = mixed_corpus(size) if size else corpus([""])
    table = build(scheme, store)
    tokens = rows(table)
    assert len({tuple(row) for row in tokens.tolist()}) == len(store) == len(table)
    codes = tokens[tokens > 1]
    assert codes.min() >= FIRST_CODE
    assert codes.max() < FIRST_CODE + table.num_code_tokens
    assert not reference.has_prefix([tuple(r for r in row if r) for row in tokens.tolist()])


@pytest.mark.parametrize("scheme", SCHEMES, ids=repr)
def test_an_empty_corpus_is_refused(scheme):
    with pytest.raises(ValueError, match="the corpus has no passages to"):
        build(scheme, corpus([]))


def test_schemes_read_a_real_store(tmp_path):
    store = stores.write(mixed_corpus(20), tmp_path)
    for scheme in SCHEMES:
        assert build(scheme, store).num_passages == len(store)


# Residual quantisation.


def test_rq_rows_are_codes_by_level_and_a_tie_code():
    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(50, 6))
    vectors[10:15] = vectors[10]
    scheme = ResidualQuantization(
        num_codes=3, codebook_size=4, embeddings=Vectors(vectors), spread=0
    )
    codebooks = scheme.train(scheme.embeddings.vectors, seed=3)
    codes = reference.residual_codes(scheme.embeddings.vectors, codebooks)
    np.testing.assert_array_equal(scheme.quantize(scheme.embeddings.vectors, codebooks), codes)
    ties = reference.ties(codes)
    table = build(scheme, corpus(["x"] * 50), seed=3)
    expected = np.column_stack([codes + np.arange(3) * 4, ties + 12]) + FIRST_CODE
    np.testing.assert_array_equal(rows(table), expected)
    assert table.num_code_tokens == 12 + ties.max() + 1
    assert ties[10:15].tolist() == [0, 1, 2, 3, 4]


def test_rq_of_equal_vectors_and_of_fewer_passages_than_codes():
    equal = ResidualQuantization(num_codes=2, codebook_size=4, embeddings=Vectors(np.ones((9, 3))))
    tokens = rows(build(equal, corpus(["x"] * 9))) - FIRST_CODE
    assert len(np.unique(tokens[:, 0])) == 1
    # Nine passages over four codes: three of one code at most, told apart by the tie code.
    assert np.bincount(tokens[:, 1]).max() == 3
    assert tokens[:, 2].max() == 8 + 2
    few = ResidualQuantization(num_codes=1, codebook_size=8, embeddings=Vectors(np.eye(3)))
    tokens = rows(build(few, corpus(["x"] * 3))) - FIRST_CODE
    # Without any collision there is no tie code.
    assert sorted(tokens.tolist()) == [[0], [1], [2]]


def test_spreading_moves_only_groups_that_collide_and_at_the_least_distance():
    codebooks = [np.array([[0.0], [100.0]]), np.array([[0.0], [1.0], [5.0]])]
    codebooks = [c.astype(np.float32) for c in codebooks]
    vectors = np.array([[0.1], [0.2], [4.0], [100.0], [105.0]], np.float32)
    scheme = ResidualQuantization(num_codes=2, codebook_size=3)
    codes = scheme.quantize(vectors, codebooks)
    assert codes.tolist() == [[0, 0], [0, 0], [0, 2], [1, 0], [1, 2]]
    scheme._spread_last_level(codes, vectors, codebooks)
    assert codes.tolist() == [[0, 0], [0, 1], [0, 2], [1, 0], [1, 2]]


def test_spreading_lowers_ties_and_leaves_larger_groups_alone():
    rng = np.random.default_rng(1)
    vectors = rng.normal(size=(300, 8))

    def largest_tie(spread):
        scheme = ResidualQuantization(2, 8, embeddings=Vectors(vectors), spread=spread)
        return rows(build(scheme, corpus(["x"] * 300)))[:, -1].max() - FIRST_CODE - 16

    assert largest_tie(1024) < largest_tie(0)
    assert largest_tie(1) == largest_tie(0)


def test_codebooks_of_a_sample_and_mini_batches_code_every_passage():
    rng = np.random.default_rng(2)
    centres = 10 * np.eye(6)
    vectors = np.repeat(centres, 200, axis=0) + rng.normal(size=(1200, 6)) * 0.1
    for full_batch in (10_000, 100):
        scheme = ResidualQuantization(
            1, 6, embeddings=Vectors(vectors), train_passages=600, full_batch=full_batch
        )
        codes = scheme.quantize(
            scheme.embeddings.vectors, scheme.train(scheme.embeddings.vectors, 0)
        )
        groups = codes.reshape(6, 200)
        assert (groups == groups[:, :1]).all()
        assert len(np.unique(groups[:, 0])) == 6


def test_codes_of_residuals_without_structure_are_used_evenly():
    """A plain k-means++ start leaves nearly all rows to the centroid nearest to the mean."""
    noise = np.random.default_rng(0).normal(size=(2000, 200)).astype(np.float32)
    for full_batch in (10_000, 100):
        counts = np.bincount(
            kmeans.nearest(noise, kmeans.fit(noise, 32, seed=0, full_batch=full_batch)),
            minlength=32,
        )
        assert counts.max() < 0.15 * len(noise)
        assert counts.min() > 0


def test_quantisation_is_the_same_in_pieces(monkeypatch):
    vectors = np.random.default_rng(3).normal(size=(100, 5)).astype(np.float32)
    scheme = ResidualQuantization(2, 8)
    codebooks = scheme.train(vectors, 0)
    whole = scheme.quantize(vectors, codebooks)
    monkeypatch.setattr(kmeans, "_CHUNK_BYTES", 7 * 4 * 8)
    np.testing.assert_array_equal(scheme.quantize(vectors, codebooks), whole)


def test_tie_codes_match_the_twin():
    codes = np.random.default_rng(4).integers(0, 3, size=(200, 3)).astype(np.int32)
    np.testing.assert_array_equal(rq.tie_codes(codes), reference.ties(codes))


@pytest.mark.parametrize(
    ("scheme", "message"),
    [
        (
            ResidualQuantization(embeddings=Vectors([[1.0], [np.nan]])),
            "embeddings: got values that are not finite",
        ),
        (
            KMeansTree(leaf_size=1, embeddings=Vectors([[1.0], [np.inf]])),
            "embeddings: got values that are not finite",
        ),
    ],
)
def test_bad_settings_are_named(scheme, message):
    with pytest.raises(ValueError, match=message):
        build(scheme, corpus(["a word", "b word"]))


@pytest.mark.parametrize(
    ("passages", "expected"),
    [(1, (1, 16)), (31, (1, 32)), (40, (2, 16)), (1000, (2, 64)), (10_000, (2, 256)),
     (20_000, (3, 128)), (100_000, (3, 256)), (1_000_000, (4, 256)), (8_841_823, (5, 256))],
)  # fmt: skip
def test_number_and_size_of_codes_follow_from_the_number_of_passages(passages, expected):
    sized = ResidualQuantization().sized(passages)
    assert (sized.num_codes, sized.codebook_size) == expected


def test_codes_that_are_set_stay():
    assert ResidualQuantization(3, 64).sized(10**9) == ResidualQuantization(3, 64)
    assert ResidualQuantization(num_codes=4).sized(100_000).codebook_size == 128
    assert ResidualQuantization(codebook_size=64).sized(60).num_codes == 1
    assert ResidualQuantization(codebook_size=64).sized(100_000).num_codes == 5
    # What other numbers would need is not taken.
    assert ResidualQuantization(num_codes=2).sized(10**6).codebook_size == 256


def test_codes_grow_in_number_and_in_size_alike():
    sizes = lambda passages, **settings: [
        (s.num_codes, s.codebook_size) for s in ResidualQuantization(**settings)._choices(passages)
    ]
    assert sizes(1000) == [(2, 64), (2, 128), (2, 256), (3, 256)]
    assert sizes(20_000) == [(3, 128), (3, 256), (4, 256), (5, 256)]
    assert sizes(10**6) == [(4, 256), (5, 256), (6, 256), (7, 256)]
    assert sizes(1000, num_codes=2) == [(2, 64), (2, 128), (2, 256)]
    assert sizes(1000, codebook_size=64) == [(2, 64), (3, 64), (4, 64), (5, 64)]
    assert sizes(10**6, num_codes=3, codebook_size=64) == [(3, 64)]


def clustered(size, seed=0):
    """Vectors as those of texts: clusters of very different sizes, in other directions inside."""
    rng = np.random.default_rng(seed)
    centres = rng.normal(size=(50, 32))
    drawn = rng.choice(50, size, p=1 / np.arange(1, 51) / (1 / np.arange(1, 51)).sum())
    return centres[drawn] + rng.normal(size=(size, 32))


@pytest.mark.parametrize("size", [20, 40, 1000, 6000])
def test_nearly_all_passages_have_codes_of_their_own(size, caplog):
    scheme = ResidualQuantization(embeddings=Vectors(clustered(size)))
    with caplog.at_level(logging.WARNING):
        report = build(scheme, corpus(["x"] * size)).report()
    assert report["passages_with_codes_of_their_own"] >= 0.95 * size
    assert not caplog.text
    for level in report["levels"][: scheme.sized(size).num_codes]:
        assert level["codes"] > 1, "a code that is always the same says nothing"
        assert level["perplexity"] > 0.5 * level["codes"]


def test_few_codes_of_their_own_are_warned_of(caplog):
    scheme = ResidualQuantization(1, 16, embeddings=Vectors(clustered(1000)))
    with caplog.at_level(logging.WARNING):
        report = build(scheme, corpus(["x"] * 1000)).report()
    assert report["passages_with_codes_of_their_own"] == 0
    assert "rq: 1 codes of 16: 0.0% of 1,000 passages have codes of their own, expected 90%" in (
        caplog.text
    )
    assert "num_codes and codebook_size, left unset, would be 2 and 64" in caplog.text


@pytest.mark.parametrize(("alike", "other"), [(30, 30), (100, 10), (200, 0)])
def test_passages_much_alike_get_more_codes(alike, other, caplog):
    vectors = np.random.default_rng(0).normal(size=(alike + other, 8))
    vectors[:alike] = vectors[0]
    scheme = ResidualQuantization(embeddings=Vectors(vectors))
    with caplog.at_level(logging.WARNING):
        table = build(scheme, corpus(["x"] * len(vectors)))
    assert table.report()["passages_with_codes_of_their_own"] >= 0.95 * len(vectors)
    assert not caplog.text
    # What is set stays, and is warned of.
    build(dataclasses.replace(scheme, codebook_size=16, num_codes=2), corpus(["x"] * len(vectors)))
    assert ("expected 90% or more" in caplog.text) == (alike > 16)


def test_more_passages_of_one_vector_than_are_spread_are_warned_of(caplog):
    scheme = ResidualQuantization(embeddings=Vectors(np.ones((1100, 2))))
    table = build(scheme, corpus(["x"] * 1100))
    assert table.lengths.max() == 3, "growing did not help, so the first choice stays"
    assert "1,100 tokens that says nothing" in caplog.text
    assert "look whether many passages are the same" in caplog.text


@pytest.mark.parametrize(
    ("scheme", "settings", "message"),
    [
        (ResidualQuantization, {"num_codes": 0}, "num_codes: got 0, expected at least 1, or None"),
        (
            ResidualQuantization,
            {"codebook_size": 1},
            "codebook_size: got 1, expected 2 to 1,000,000,000 tokens, .*, or None",
        ),
        (KMeansTree, {"branching": 1}, "branching: got 1, expected 2 to 1,.*"),
        (KMeansTree, {"leaf_size": 0}, "leaf_size: got 0, expected at least 1"),
        (Title, {"max_tokens": 0}, "max_tokens: got 0, expected at least 1"),
        (TfidfSvd, {"dim": 0}, "dim: got 0, expected at least 1"),
        (
            Title,
            {"max_tokens": 64},
            "max_tokens: got 64, expected at most 63, which an index can .*",
        ),
        (ResidualQuantization, {"num_codes": 64}, "num_codes: got 64, expected at most 63.* None"),
        (Multiview, {"query_tokens": 63}, "query_tokens: got 63, expected at most 62, which .*"),
    ],
)
def test_sizes_that_no_scheme_has_are_refused_at_once(scheme, settings, message):
    with pytest.raises(ValueError, match=f"^{scheme.__name__}.{message}$"):
        scheme(**settings)


# The k-means tree.


def test_tree_separates_clusters_and_numbers_leaves_in_corpus_order():
    vectors = np.repeat(10 * np.eye(3), 4, axis=0)
    scheme = KMeansTree(branching=3, leaf_size=4, embeddings=Vectors(vectors))
    tokens = rows(build(scheme, corpus(["x"] * 12))) - FIRST_CODE
    assert tokens.shape == (12, 2), "one cluster and one place; equal lengths carry no EOS"
    clusters = tokens[:, 0].reshape(3, 4)
    assert (clusters == clusters[:, :1]).all()
    assert sorted(clusters[:, 0].tolist()) == [0, 1, 2]
    assert tokens[:, 1].reshape(3, 4).tolist() == [[3, 4, 5, 6]] * 3


def test_tree_leaves_of_different_depth_end_with_eos():
    vectors = np.concatenate([np.full((2, 1), 100.0), np.linspace(0, 1, 9)[:, None]])
    scheme = KMeansTree(branching=2, leaf_size=5, embeddings=Vectors(vectors))
    table = build(scheme, corpus(["x"] * 11))
    lengths = table.lengths[table.rows_of_passages()]
    assert lengths[:2].tolist() == [3, 3]
    assert (lengths[2:] == 4).all()
    assert (rows(table)[np.arange(11), lengths - 1] == 1).all()
    levels = rows(table)[:, :2] - FIRST_CODE
    assert set(levels[:, 0].tolist()) == {0, 1}
    assert set(levels[2:, 1].tolist()) == {2, 3}, "the second level has a block of its own"


def test_tree_of_equal_vectors_ends():
    scheme = KMeansTree(branching=2, leaf_size=3, embeddings=Vectors(np.ones((20, 2))))
    table = build(scheme, corpus(["x"] * 20))
    assert table.lengths.max() <= 5  # 20 -> 10 -> 5 -> 2 or 3, and the place


def test_tree_over_a_sample_splits_every_passage():
    rng = np.random.default_rng(5)
    scheme = KMeansTree(4, 10, embeddings=Vectors(rng.normal(size=(200, 4))), train_passages=50)
    levels, depths, places = scheme.cluster(scheme.embeddings.vectors, 0)
    groups = {}
    for passage in range(200):
        path = tuple(int(level[passage]) for level in levels[: depths[passage]])
        groups.setdefault(path, []).append(places[passage])
    assert all(sorted(group) == list(range(len(group))) for group in groups.values())
    assert max(map(len, groups.values())) <= 10


def test_a_tree_of_one_leaf_is_warned_of(caplog):
    build(KMeansTree(embeddings=Vectors(np.eye(5))), corpus(["x"] * 5))
    assert "KMeansTree.leaf_size = 100 holds all 5 passages" in caplog.text


# Titles, strings, atoms.


def test_title_rows_and_fallback(caplog):
    store = corpus(
        ["a b", "c d e f g h i", "x", "  ", "q"], ["Bee", " ", "Bee", "", "Beehive of glass"]
    )
    with caplog.at_level(logging.WARNING):
        table = build(Title(max_tokens=5), store)
    assert "1 of 5 passages have no title" in caplog.text
    assert "1 of 5 passages have neither a title nor a text" in caplog.text
    named = table.rows_of_passages()
    shown = [[t for t in table.tokens[row] if t] for row in named]
    assert shown[0] == shown[2] == [*encode("Bee"), 1]
    assert shown[1] == [*encode("c d e"), 1]
    assert named[3] == -1, "no identifier, rather than one that is found for every query"
    assert shown[4] == [*encode("Beehi"), 1]
    assert table.num_code_tokens == 0 and table.num_passages == 5
    report = table.report()
    assert report["passages_sharing_an_identifier"] == 2
    assert report["passages_without_identifier"] == report["blank"] == 1
    assert "levels" not in report


def latin(text):
    """As `encode`, of a vocabulary that lacks Chinese, joiners and variation selectors."""
    return [2 if c > "\u1000" else 3 + ord(c) for c in text if c != "\u200b"]


def test_the_text_stands_for_a_title_that_no_token_writes(caplog):
    # A joiner has a token, that of what the vocabulary lacks, and is not seen.
    texts = ["kettle", "\u200b \u200b sings", "\u200d", "attic", "attic"]
    titles = ["\u200b", "\u200b\u200d", "\u200b", "\u6771a", "\u4eaca"]
    store = corpus(texts, titles)
    with caplog.at_level(logging.WARNING):
        (table,) = Title(max_tokens=4).tables(Material(store, latin))
    named = table.rows_of_passages()
    shown = [[t for t in table.tokens[row].tolist() if t] for row in named]
    assert shown[0] == [*latin("kett"), 1]
    assert shown[1] == [*latin("sing"), 1]
    assert named[2] == -1 and [1] not in table.tokens[:, :1].tolist()
    assert shown[3] == shown[4] == [2, *latin("a"), 1]
    report = table.report()
    assert report["passages_sharing_an_identifier"] == 2
    assert (report["without_title"], report["blank"], report["with_unknown"]) == (2, 1, 2)
    assert "2 of 5 passages have characters in their identifier that the vocab" in caplog.text
    with pytest.raises(
        ValueError, match="Title: none of 1 passages has a title or a text of which"
    ):
        Title().tables(Material(corpus([" "], ["\u200b"]), latin))


def test_string_digits_are_zero_padded():
    table = build(NaiveString(), corpus(["x"] * 101))
    tokens = rows(table) - FIRST_CODE
    assert tokens[7].tolist() == [0, 0, 7]
    assert tokens[100].tolist() == [1, 0, 0]
    assert table.num_code_tokens == 10
    assert build(NaiveString(), corpus(["x"] * 100)).tokens.shape == (100, 2)


def test_string_digits_by_position_are_other_tokens():
    table = build(NaiveString(by_position=True), corpus(["x"] * 101))
    tokens = rows(table) - FIRST_CODE
    assert tokens[7].tolist() == [0, 10, 27]
    assert tokens[100].tolist() == [1, 10, 20]
    assert table.num_code_tokens == 30


@pytest.mark.parametrize(
    "scheme",
    [scheme for scheme in SCHEMES if scheme.codes_by_position],
    ids=repr,
)
def test_a_code_that_another_follows_stands_at_one_position(scheme):
    tokens = rows(build(scheme, mixed_corpus(60)))
    followed = tokens[:, :-1] * (tokens[:, 1:] > 1)
    places = [set(column[column > 0]) for column in followed.T]
    assert sum(map(len, places)) == len(set().union(*places)) > 2


def test_which_schemes_have_codes_by_position():
    found = [scheme.codes_by_position for scheme in SCHEMES]
    assert found == [True, True, True, False, True, False, False]


def test_atomic_tokens_follow_the_corpus():
    table = build(Atomic(), corpus(["x"] * 4))
    assert rows(table).tolist() == [[1000], [1001], [1002], [1003]]
    assert table.num_code_tokens == 4
    table = build(Atomic(reserve=3), corpus(["x"] * 4))
    assert rows(table).tolist() == [[1000], [1001], [1002], [1003]]
    assert table.num_code_tokens == 7
    assert Atomic(reserve=3).sizes(CorpusSize(4, 1, 1, 1)).codes == 7
    assert describe(Atomic()) == {"is": "Atomic"}
    more = Addition(corpus(["y"] * 2), table, list, 1000, Path())
    assert Atomic(reserve=3).rows(more).tolist() == [[1004], [1005]]


# Embeddings.


def test_tfidf_rows_are_unit_vectors_and_near_for_equal_subjects():
    store = mixed_corpus(30)
    vectors = TfidfSvd(dim=6).embed(store, 0)
    assert vectors.dtype == np.float32
    assert vectors.shape == (33, 6)
    np.testing.assert_allclose((vectors**2).sum(axis=1), 1.0, atol=1e-5)
    np.testing.assert_allclose(vectors[0], vectors[30], atol=1e-6)
    assert vectors[32].tolist() == [1, 0, 0, 0, 0, 0], "a blank passage"
    near = (vectors[0:30:3] @ vectors[3]).mean()
    assert near > (vectors[1:30:3] @ vectors[3]).mean() + 0.3


@pytest.mark.parametrize("texts", [["alpha"], ["alpha", "alpha"], ["", " "], ["a", "of the"]])
def test_tfidf_of_corpora_smaller_than_its_dimensions(texts):
    vectors = TfidfSvd(dim=16).embed(corpus(texts), 0)
    assert vectors.shape == (len(texts), 16)
    np.testing.assert_allclose((vectors**2).sum(axis=1), 1.0, atol=1e-5)


def test_tfidf_fitted_on_a_sample_projects_all(monkeypatch):
    store = mixed_corpus(60)
    sampled = TfidfSvd(dim=6, fit_passages=30).embed(store, 0)
    np.testing.assert_array_equal(sampled, TfidfSvd(dim=6, fit_passages=30).embed(store, 0))
    np.testing.assert_allclose((sampled**2).sum(axis=1), 1.0, atol=1e-5)
    assert (sampled[0:60:3] @ sampled[3]).mean() > (sampled[1:60:3] @ sampled[3]).mean() + 0.3


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_vectors_from_a_file(tmp_path, dtype):
    path = tmp_path / "v.npy"
    np.save(path, np.eye(3, dtype=dtype))
    vectors = FromFile(str(path)).embed(corpus(["x"] * 3), 0)
    assert isinstance(vectors, np.memmap)
    table = build(ResidualQuantization(1, 3, embeddings=FromFile(str(path))), corpus(["x"] * 3))
    assert len(table) == 3
    with pytest.raises(ValueError, match="got 3 vectors, expected one for each of 4 passages"):
        FromFile(str(path)).embed(corpus(["x"] * 4), 0)


def test_bad_vector_files_are_named(tmp_path):
    path = tmp_path / "v.npy"
    with pytest.raises(FileNotFoundError, match=r"FromFile\.path = .*no such file"):
        FromFile(str(path)).embed(corpus(["x"]), 0)
    path.write_bytes(b"text")
    with pytest.raises(ValueError, match=r"FromFile\.path = .*not a whole \.npy array"):
        FromFile(str(path)).embed(corpus(["x"]), 0)
    np.save(path, np.ones((1, 1), np.float32))
    path.write_bytes(path.read_bytes().replace(b", 'fortran", b",\"'fortran"))
    with pytest.raises(ValueError, match=r"FromFile\.path = .*not a whole \.npy array \("):
        FromFile(str(path)).embed(corpus(["x"]), 0)
    np.save(path, np.arange(3))
    with pytest.raises(ValueError, match=r"got int64 of shape \(3,\), expected float16 or float32"):
        FromFile(str(path)).embed(corpus(["x"]), 0)


class FakeSentenceTransformer:
    """Encodes a text as (its length, 1), scaled on demand."""

    def __init__(self, model):
        if model == "unreachable":
            raise OSError("no route to host")
        self.model = model

    def encode(self, texts, *, batch_size, normalize_embeddings, **settings):
        vectors = np.array([[len(text), 1.0] for text in texts])
        if normalize_embeddings:
            vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
        return vectors


def test_sentence_encoder_with_a_stand_in(monkeypatch):
    fake = types.ModuleType("sentence_transformers")
    fake.SentenceTransformer = FakeSentenceTransformer
    monkeypatch.setitem(sys.modules, "sentence_transformers", fake)
    monkeypatch.setattr(embeddings._text_chunks, "__defaults__", (2,))
    vectors = SentenceEncoder("local/folder", prefix="passage: ").embed(
        corpus(["a", "bb", "ccc"]), 0
    )
    expected = np.array([[10, 1], [11, 1], [12, 1]], np.float32)
    expected /= np.linalg.norm(expected, axis=1, keepdims=True)
    assert vectors.dtype == np.float32
    np.testing.assert_allclose(vectors, expected, rtol=1e-6)
    with pytest.raises(ValueError, match=r"SentenceEncoder\.model = 'unreachable' cannot be loa"):
        SentenceEncoder("unreachable").embed(corpus(["a"]), 0)


def test_sentence_encoder_without_its_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)
    with pytest.raises(
        ImportError,
        match=r"SentenceEncoder\.model needs the extra 'dgr_jax\[encoders\]': pip",
    ):
        SentenceEncoder().embed(corpus(["a"]), 0)


def test_many_rows_match_numpy():
    rng = np.random.default_rng(0)
    codes = rng.integers(0, 40, size=(300_000, 4)).astype(np.int32)
    table = IdentifierTable.from_rows(codes + 5, view="rq", num_code_tokens=40)
    np.testing.assert_array_equal(table.tokens[table.rows_of_passages()], codes + 5)
    assert len(table) == len(np.unique(codes @ (64 ** np.arange(4))))
