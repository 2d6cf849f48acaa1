"""Multiview identifiers: their tokens, tables and body, and the examples made from them."""

import json
import logging
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dgr_jax.corpora import store as stores
from dgr_jax.corpora.types import Passage
from dgr_jax.data import views as data_views
from dgr_jax.data.examples import features
from dgr_jax.data.views import Body, SpanSampler, ViewMixture, Views
from dgr_jax.data.vocabulary import VIEWS, SentencePiece, Vocabulary
from dgr_jax.decoding import suffix_array, trie
from dgr_jax.identifiers import multiview
from dgr_jax.identifiers.multiview import Multiview
from dgr_jax.identifiers.scheme import Material
from tests.reference import multiview_identifiers as reference
from tests.reference import suffix_array as spans_reference

PASSAGES = [
    Passage("p0", "Bees make honey in the hive. They dance to show the way to flowers.", "Bees"),
    Passage("p1", "A glacier is a slow river of ice. It carves valleys as it moves.", "Glaciers"),
    Passage("p2", "Owls fly in silence. Their soft feathers break up the sound.", "Bees"),
    Passage("p3", "Москва стоит на реке.", "Москва"),
    Passage("p4", "東京は日本の首都です。", "東京"),
    Passage("p5", "Honey", ""),
    Passage("p6", "Bees make honey in the hive. They dance to show the way to flowers.", "Bees"),
    Passage("p7", " ", " "),
    Passage("p8", "the hive and the honey " * 1000, "Long"),
]
PSEUDO = [(0, "who makes honey"), (0, "why do bees dance"), (1, "what carves valleys"),
          (6, "who makes honey"), (0, "who makes honey"), (4, "日本の首都")]  # fmt: skip


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory):
    folder = tmp_path_factory.mktemp("vocabulary")
    texts = [p.contents[:200] for p in PASSAGES] + [text for _, text in PSEUDO]
    SentencePiece(size=200).write(folder, texts)
    made = Vocabulary.create(folder, views=VIEWS)
    made.save()
    return made


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return stores.write(PASSAGES, tmp_path_factory.mktemp("passages"))


@pytest.fixture(scope="module")
def built(vocabulary, store):
    """(titles, pseudo-queries, index, body counts) of the passages."""
    scheme, counts = Multiview(), Counter()
    material = Material(
        store, vocabulary.encode, marker=vocabulary.marker, pseudo_queries=lambda: PSEUDO
    )
    titles, queries = scheme.tables(material)
    text = scheme.text_tokens(material, counts)
    return titles, queries, suffix_array.build(text, vocab_size=vocabulary.size), counts


def table_of(view, passages, encode, pairs=(), marker=7, **settings):
    """The table of a view, and its report."""
    material = Material(passages, encode, marker=lambda _: marker, pseudo_queries=lambda: pairs)
    (made,) = Multiview(views=(view,), **settings).tables(material)
    return made, made.report()


def bodies_of(passages, encode, counts):
    return list(Multiview().text_tokens(Material(passages, encode), counts))


@pytest.fixture(scope="module")
def made_views(vocabulary, built):
    titles, queries, index, _ = built
    return Views(vocabulary, titles, queries, Body(index.tokens, index.starts))


def words(first=40):
    """A vocabulary of words: the first one seen is `first`, and so on."""
    known = {}
    return lambda text: [known.setdefault(word, first + len(known)) for word in text.split()]


def listed(made):
    """Unpadded rows of a table."""
    return [tuple(made.tokens[u, : made.lengths[u]].tolist()) for u in range(len(made))]


# ---- special ids


def test_markers_stand_between_text_and_codes(vocabulary):
    first = vocabulary.first_view_id
    assert first % 128 == 0 and first >= vocabulary.text_size
    assert [vocabulary.marker(view) for view in VIEWS] == [first, first + 1, first + 2]
    assert vocabulary.first_code_id == vocabulary.size == first + 128
    assert Vocabulary.load(vocabulary.folder) == vocabulary
    assert vocabulary.decode([first, *vocabulary.encode("bees"), 1]) == "<title> bees"
    with_codes = Vocabulary(vocabulary.folder, vocabulary.text_size, 12, VIEWS)
    assert with_codes.first_code_id == first + 128 and with_codes.size == first + 256
    assert with_codes.decode([first + 128 + 3]) == "<3>"


def test_a_vocabulary_without_views_has_the_ids_it_had(vocabulary, tmp_path):
    plain = Vocabulary(vocabulary.folder, vocabulary.text_size, 12)
    assert plain.first_code_id == vocabulary.first_view_id
    assert plain.size == plain.first_code_id + 128
    assert plain.decode([plain.first_code_id + 3, 1]) == "<3>"
    with pytest.raises(ValueError, match=r"view 'title': the vocabulary in .* has markers of \(\)"):
        plain.marker("title")
    old = {"text_size": 300, "num_code_tokens": 7}
    (tmp_path / "vocabulary.json").write_text(json.dumps(old))
    assert Vocabulary.load(tmp_path) == Vocabulary(tmp_path, 300, 7)


def test_the_marker_stands_before_the_query(vocabulary):
    plain = vocabulary.encode_inputs(["bees make honey in the hive", ""], 8)
    marked = vocabulary.encode_inputs(["bees make honey in the hive", ""], 9, view="body")
    assert (marked[:, 0] == vocabulary.marker("body")).all()
    np.testing.assert_array_equal(marked[:, 1:], plain)


def test_word_starts(vocabulary):
    starts = vocabulary.word_starts()
    assert starts.dtype == bool and starts.shape == (vocabulary.size,)
    ids = vocabulary.encode("show the way")
    assert starts[ids].sum() == 3 and starts[ids[0]]
    assert not starts[[0, 1, 2]].any() and not starts[vocabulary.text_size :].any()


def test_views_are_the_same_in_all_layers():
    assert VIEWS == multiview.VIEWS


# ---- tables and body


def test_the_example_of_the_module():
    ids = {"Bees": 40, "bees": 40, "make": 41, "honey": 42, "in": 43, "the": 44, "hive": 45,
           ".": 9, "who": 50, "makes": 51, "how": 60, "do": 61}  # fmt: skip
    encode = lambda text: [ids[word] for word in text.split()]
    passages = [Passage("p", "Bees make honey in the hive .", "Bees")]
    titles, _ = table_of("title", passages, encode, marker=1024)
    queries, _ = table_of("query", passages, encode, [(0, "who makes honey")], marker=1026)
    assert listed(titles) == [(1024, 40, 1)]
    assert listed(queries) == [(1026, 50, 51, 42, 1)]
    (tokens,) = bodies_of(passages, encode, Counter())
    assert tokens.tolist() == [40, 41, 42, 43, 44, 45, 9]
    assert (1, (41, 42, 43, 44)) in reference.spans(tokens.tolist(), 4)


def test_titles_are_marked_cut_closed_and_shared(vocabulary, store, built):
    titles, *_ = built
    report = titles.report()
    by_row = {row: titles.passages_of(u).tolist() for u, row in enumerate(listed(titles))}
    expected = {}
    for index, passage in enumerate(PASSAGES):
        if tokens := vocabulary.encode(passage.title):
            row = reference.row(vocabulary.marker("title"), tokens, 15)
            expected.setdefault(row, []).append(index)
    assert by_row == expected
    assert by_row[reference.row(titles.tokens[0, 0], vocabulary.encode("Bees"), 15)] == [0, 2, 6]
    assert report["blank"] == report["passages_without_identifier"] == 2
    assert report["passages_sharing_an_identifier"] == 3
    assert (report["cut"], report["with_unknown"]) == (0, 0)


def test_long_titles_and_pseudo_queries_are_cut():
    encode = words()
    texts = [" ".join(f"w{i}" for i in range(n)) for n in (14, 15, 16, 40)]
    passages = [Passage(f"p{i}", "", title) for i, title in enumerate(texts)]
    titles, report = table_of("title", passages, encode)
    assert titles.tokens.shape == (2, 17) and titles.tokens[:, 0].tolist() == [7, 7]
    assert [titles.passages_of(u).tolist() for u in range(2)] == [[0], [1, 2, 3]]
    assert report["cut"] == 2
    queries, report = table_of("query", passages, encode, list(enumerate(texts)))
    assert queries.lengths.max() == 32 and report["cut"] == 1


def test_pseudo_queries_of_some_passages(vocabulary, built, caplog):
    _, queries, *_ = built
    report = queries.report()
    expected = {}
    for index, text in PSEUDO:
        row = reference.row(vocabulary.marker("query"), vocabulary.encode(text), 30)
        expected.setdefault(row, set()).add(index)
    assert dict(zip(listed(queries), map(set, map(queries.passages_of, range(len(queries)))),
                    strict=True)) == expected  # fmt: skip
    assert report["passages_without_identifier"] == 5
    assert report["passages_sharing_an_identifier"] == 2
    with caplog.at_level(logging.WARNING):
        table_of("query", PASSAGES[:3], words(), [(1, "a b"), (1, " ")])
    assert "2 of 3 passages have no query" in caplog.text


def test_the_body_holds_the_text_alone(vocabulary, built):
    *_, index, counts = built
    passages = [vocabulary.encode(passage.text) for passage in PASSAGES]
    lengths = Body(index.tokens, index.starts).lengths
    assert lengths.tolist() == [len(passage) for passage in passages]
    assert lengths[7] == 0 and lengths[8] >= 5000
    for i, passage in enumerate(passages):
        held = index.tokens[index.starts[i] :][: len(passage)]
        assert held.tolist() == passage
    assert counts["tokens"] == sum(map(len, passages)) and counts["longest"] == len(passages[8])
    assert counts["passages_without_body"] == 1 and counts["unknown_tokens"] == 0
    assert counts["passages_shorter_than_a_span"] == sum(0 < len(p) < 10 for p in passages)
    # equal passages count twice, as a span's occurrences do
    found = np.array(passages[0][:10])
    lo, hi = index.find(found)
    assert hi - lo == 2 and index.locate(int(lo), int(hi), 10).tolist() == [0, 6]


def test_a_trie_holds_the_tables(vocabulary, built):
    titles, queries, *_ = built
    for made in (titles, queries):
        index = trie.build(
            np.asarray(made.tokens), np.asarray(made.lengths), vocab_size=vocabulary.size
        )
        rows, lengths = index.rows()
        assert [tuple(row[:n]) for row, n in zip(rows.tolist(), lengths, strict=True)] == listed(
            made
        )


text = st.lists(st.sampled_from("abcd"), max_size=5).map(" ".join)


@settings(max_examples=60, deadline=None)
@given(
    titles=st.lists(text, min_size=1, max_size=4),
    bodies=st.lists(text, max_size=4),
    limit=st.booleans(),
)
def test_no_view_continues_as_another(titles, bodies, limit):
    encode = words(first=3)
    passages = [Passage(f"p{i}", "", title) for i, title in enumerate([*titles, "a"])]
    cut = {"title_tokens": 2 if limit else 15}
    made, _ = table_of("title", passages, encode, marker=100, **cut)
    asked, _ = table_of("query", passages, encode, list(enumerate([*titles, "a"])), marker=102)
    spans = {
        tuple(tokens[at:end])
        for tokens in map(encode, bodies)
        for at in range(len(tokens))
        for end in range(at + 1, len(tokens) + 1)
    }
    kinds = [listed(made), listed(asked), sorted(spans)]
    for i, kind in enumerate(kinds):
        for j, other in enumerate(kinds):
            for a in kind:
                same_view = i == j
                begins = {b for b in other if reference.is_prefix(a, b)}
                if not same_view:
                    assert not begins
                elif i < 2:  # of body spans every prefix is one
                    assert begins == {a}


def test_text_that_the_vocabulary_lacks_is_counted(tmp_path):
    SentencePiece(size=60).write(tmp_path, ["bees make honey in the hive"] * 3)
    latin = Vocabulary.create(tmp_path, views=VIEWS)
    passages = [
        Passage("p0", "東京 bees", "東京"),
        Passage("p1", "日本", "日本"),
        Passage("p2", "bees", "bees"),
    ]
    titles, report = table_of("title", passages, latin.encode)
    assert report["with_unknown"] == 2 and report["largest_group"] == 2
    counts = Counter()
    bodies = bodies_of(passages, latin.encode, counts)
    assert counts["unknown_tokens"] == 2 == sum((tokens == 2).sum() for tokens in bodies)
    assert len(titles) == 2


def test_text_that_nobody_sees_names_no_passage(tmp_path, caplog):
    """A joiner has the token of unknown characters; as an identifier it would be found
    for every query."""
    SentencePiece(size=60).write(tmp_path, ["bees make honey in the hive"] * 3)
    latin = Vocabulary.create(tmp_path, views=VIEWS)
    passages = [Passage("p0", "bees", "bees"), Passage("p1", "\u200d", " \u200b\u200d")]
    assert len(latin.encode("\u200d"))
    titles, report = table_of("title", passages, latin.encode)
    assert report["blank"] == 1 == len(titles)
    pairs = [(0, "bees"), (0, "\u200d"), (1, "\ufeff"), (1, "bees \u6771")]
    _, report = table_of("query", passages, latin.encode, pairs)
    assert (report["blank"], report["with_unknown"]) == (2, 1)
    assert "1 of 2 texts of the view 'query' have characters that the vocabulary" in caplog.text
    counts = Counter()
    bodies = bodies_of(passages, latin.encode, counts)
    assert counts["passages_without_body"] == 1 and not len(bodies[1])


def test_text_of_other_scripts_comes_back(vocabulary, built):
    titles, *_ = built
    named = {i: u for u in range(len(titles)) for i in titles.passages_of(u)}
    assert vocabulary.decode(titles.tokens[named[3]]) == "<title> москва"
    assert vocabulary.decode(titles.tokens[named[4]]) == "<title> 東京"


def test_coverage_warns_of_passages_that_nothing_names(built, caplog):
    titles, queries, index, _ = built
    lengths = Body(index.tokens, index.starts).lengths
    with caplog.at_level(logging.WARNING):
        found = multiview.coverage((titles, queries), lengths)
    assert found == {"title": 7, "query": 4, "body": 8, "none": 1}
    assert "1 of 9 passages have no identifier in any view (title, query, body)" in caplog.text
    caplog.clear()
    assert multiview.coverage((titles,), np.ones(9, int))["none"] == 0 and not caplog.text
    with pytest.raises(ValueError, match=r"got views of \{'title': 9, 'body': 2\} passages"):
        multiview.coverage((titles,), np.ones(2, int))


def test_settings_and_views_without_text_are_refused():
    with pytest.raises(ValueError, match=r"Multiview.views: got \('page',\), expected some of"):
        Multiview(views=("page",))
    with pytest.raises(ValueError, match="expected some of"):
        Multiview(views=())
    with pytest.raises(ValueError, match=r"Multiview.views: got .* expected each view once"):
        Multiview(views=("body", "body"))
    with pytest.raises(ValueError, match="Multiview.span_tokens: got 0, expected at least 1"):
        Multiview(span_tokens=0)
    untitled = [Passage("p0", "text")]
    with pytest.raises(ValueError, match="none of 1 passages has a title; .* leave 'title' out"):
        table_of("title", untitled, words())
    with pytest.raises(ValueError, match="no passage has a pseudo-query; .*pseudo_query_path"):
        table_of("query", untitled, words())
    with pytest.raises(ValueError, match=r"passage index 3 is outside 0\.\.1"):
        table_of("query", untitled * 2, words(), [(3, "a")])


# ---- spans of training examples

token = st.integers(2, 9)
corpora = st.lists(st.lists(token, max_size=12), min_size=1, max_size=4).filter(any)


def sampler(passages, encode, length, number=3, preference=4.0, opening=None):
    flat = [token for passage in passages for token in (*passage, 0)]
    starts = np.cumsum([0, *(len(passage) + 1 for passage in passages[:-1])])
    body = Body(np.array(flat, np.uint16), starts.astype(np.int32))
    return SpanSampler(body, encode, length, number, preference, body.rarity(10), opening)


@settings(max_examples=80, deadline=None)
@given(
    passages=corpora,
    length=st.integers(1, 5),
    queries=st.lists(st.lists(token, max_size=4), min_size=1, max_size=5),
    data=st.data(),
)
def test_weights_equal_the_slow_twin(passages, length, queries, data):
    pair = np.array([data.draw(st.integers(0, len(passages) - 1)) for _ in queries])
    texts = ["".join(map(str, query)) for query in queries]
    made = sampler(passages, lambda text: [int(c) for c in text], length)
    np.testing.assert_allclose(made.rarity, reference.rarity(passages, 10))
    found, offset, log_weights = made.log_weights(texts, pair)
    expected = [
        (q, at, 4.0 * share)
        for q, query in enumerate(queries)
        for at, share in reference.shares(
            passages[pair[q]], length, query, set(query), made.rarity
        ).items()
    ]
    assert [(q, at) for q, at, _ in expected] == list(zip(found, offset, strict=True))
    np.testing.assert_allclose(log_weights, [w for *_, w in expected], atol=1e-12)


def test_a_query_is_compared_in_every_case():
    ids = {"Bees": 3, "bees": 4, "make": 5, "Honey": 6, "honey": 7, "x": 8}
    encode = lambda text: [ids.get(word, 2) for word in text.split()]
    made = sampler([[3, 8, 8, 7], [8]], encode, 1)
    pair, offset, log_weights = made.log_weights(["bees make Honey"], np.array([0]))
    shares = reference.shares([3, 8, 8, 7], 1, [4, 5, 6], {3, 4, 5, 6, 7}, made.rarity)
    np.testing.assert_allclose(log_weights / 4.0, list(shares.values()))
    assert (log_weights[[0, 3]] > 0).all() and (log_weights[[1, 2]] == 0).all()


def test_unknown_pieces_are_shared_with_nothing():
    made = sampler([[2, 3], [8]], lambda text: [2, 3], 1)
    _, _, log_weights = made.log_weights(["?? known"], np.array([0]))
    assert log_weights.tolist() == [0.0, 4.0]


def test_spans_that_share_words_are_drawn_as_often_as_their_weights_say():
    passage = [3, 4, 5, 6, 7, 8, 3, 3, 9]
    made = sampler([passage, [3], [8]], lambda text: [5, 6, 9], 2, number=1, preference=3.0)
    rng = np.random.default_rng(0)
    draws = 4000
    pair, tokens = made(["q"] * draws, np.zeros(draws, int), rng)
    assert pair.tolist() == list(range(draws))
    shares = reference.shares(passage, 2, [5, 6, 9], {5, 6, 9}, made.rarity)
    chances = np.exp([3.0 * share for share in shares.values()])
    chances /= chances.sum()
    spans = [span for _, span in reference.spans(passage, 2)]
    found = [np.mean((tokens == span).all(axis=1)) for span in spans]
    np.testing.assert_allclose(found, chances, atol=4 * 0.5 / draws**0.5)
    assert found[2] > 2 * found[0]  # (5, 6) holds two of three, (3, 4) nothing


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.lists(st.integers(0, 6), min_size=1, max_size=6),
    number=st.integers(1, 4),
    seed=st.integers(0, 99),
)
def test_drawing_is_without_replacement(sizes, number, seed):
    group = np.repeat(np.arange(len(sizes)), sizes)
    log_weights = np.random.default_rng(seed).normal(size=len(group))
    drawn = data_views.draw(group, log_weights, number, np.random.default_rng(seed))
    assert (np.diff(drawn) > 0).all()
    assert np.bincount(group[drawn], minlength=len(sizes)).tolist() == [
        min(number, size) for size in sizes
    ]


def test_spans_of_short_blank_and_long_passages():
    passages = [[5], [], [3, 4, 5], list(range(3, 10)) * 800, [3, 4, 5, 6]]
    made = sampler(passages, lambda text: [5], 4, number=3)
    pair, tokens = made(["q"] * 5, np.arange(5), np.random.default_rng(0))
    assert pair.tolist() == [0, 2, 3, 3, 3, 4]
    assert tokens.dtype == np.int32
    assert tokens[[0, 1, 5]].tolist() == [[5, 0, 0, 0], [3, 4, 5, 0], [3, 4, 5, 6]]
    for span in tokens[2:5].tolist():
        assert spans_reference.occurrences([passages[3]], span)


def test_spans_begin_where_the_search_lets_them():
    opening = np.isin(np.arange(10), [3, 6])
    passage = [3, 4, 5, 6, 7, 8, 3]
    made = sampler([passage], lambda text: [5], 2, number=9, opening=opening)
    _, tokens = made(["q"], np.array([0]), np.random.default_rng(0))
    assert sorted(tokens.tolist()) == [[3, 4], [6, 7]]  # the last 3 is too near to the end


# ---- examples

PAIRS = [
    ("how do bees make honey", 0, "q0"),
    ("what is a glacier", 1, "q1"),
    ("東京", 4, "q2"),
    ("sweet", 5, "q3"),
    ("nothing", 7, "q4"),
    ("the hive", 8, "q5"),
]


def made_blocks(made_views, pairs=PAIRS, seed=0, mixture=ViewMixture(), counts=None):
    counts = Counter() if counts is None else counts
    return list(data_views.blocks(pairs, mixture, made_views, seed=seed, counts=counts))


def test_every_target_is_an_identifier_of_the_passage(made_views, built, vocabulary, store):
    titles, queries, *_ = built
    counts = Counter()
    made = list(data_views.examples(made_blocks(made_views, counts=counts), store.pids))
    for example in made:
        index, targets = store.index_of(example["pid"]), example["targets"]
        assert targets.dtype == np.int32 and (targets > 0).all()
        if example["view"] == "body":
            text = vocabulary.encode(PASSAGES[index].text)
            assert len(targets) == min(10, len(text))
            assert spans_reference.occurrences([text], tuple(targets.tolist()))
        else:
            kind = titles if example["view"] == "title" else queries
            assert index in kind.passages_of(int(kind.lookup(targets)))
    per_pair = Counter((example["qid"], example["view"]) for example in made)
    assert per_pair["q0", "title"] == 3 and per_pair["q0", "query"] == 2
    assert per_pair["q3", "body"] == 1 and per_pair["q3", "title"] == 0
    assert per_pair["q5", "body"] == 10 and not [e for e in made if e["qid"] == "q4"]
    assert made[0]["inputs"] == "how do bees make honey"
    assert counts["pairs"] == 6
    assert (counts["title"], counts["pairs_without_title"], counts["pairs_with_fewer_title"]) == (
        12, 2, 0,
    )  # fmt: skip
    assert (counts["query"], counts["pairs_without_query"], counts["pairs_with_fewer_query"]) == (
        4, 3, 3,
    )  # fmt: skip
    assert counts["pairs_without_body"] == 1
    assert counts["body"] == sum(n for (_, view), n in per_pair.items() if view == "body")


def test_examples_are_those_of_their_seed(made_views):
    pairs = [PAIRS[i % 6] for i in range(300)]
    first, again, other = (made_blocks(made_views, pairs, seed=seed) for seed in (1, 1, 2))
    assert len(first) == 2
    for a, b in zip(first, again, strict=True):
        np.testing.assert_array_equal(a.targets, b.targets)
    assert any((a.targets != b.targets).any() for a, b in zip(first, other, strict=True))


def test_features_are_the_arrays_of_the_examples(made_views, vocabulary, store):
    made = made_blocks(made_views)
    written = list(data_views.examples(made, store.pids))
    arrays = features(written, vocabulary, 8, made[0].targets.shape[1])
    for i, example in enumerate(written):
        inputs = vocabulary.encode_inputs([example["inputs"]], 8, view=example["view"])[0]
        np.testing.assert_array_equal(arrays["encoder_input_tokens"][i], inputs)
        n = len(example["targets"])
        target = arrays["decoder_target_tokens"][i]
        np.testing.assert_array_equal(target[:n], example["targets"])
        assert not target[n:].any()
        np.testing.assert_array_equal(arrays["decoder_input_tokens"][i], [0, *target[:-1]])
        np.testing.assert_array_equal(arrays["decoder_loss_weights"][i], target > 0)
    assert {name: values.dtype.name for name, values in arrays.items()} == {
        "encoder_input_tokens": "int32",
        "decoder_input_tokens": "int32",
        "decoder_target_tokens": "int32",
        "decoder_loss_weights": "float32",
    }


def test_views_that_are_not_asked_for_give_nothing(made_views, vocabulary):
    counts = Counter()
    mixture = ViewMixture(titles=0, spans=2, pseudo_queries=0)
    (made,) = made_blocks(made_views, mixture=mixture, counts=counts)
    assert set(made.view) == {1} and made.targets.shape[1] == 10 and "title" not in counts
    with pytest.raises(ValueError, match="got no view that it asks for"):
        made_blocks(Views(vocabulary))
    plain = Vocabulary(vocabulary.folder, vocabulary.text_size)
    with pytest.raises(ValueError, match=r"view 'title': the vocabulary in .*Multiview.views"):
        made_blocks(Views(plain, made_views.title))


def test_wrong_mixtures_are_refused():
    with pytest.raises(ValueError, match="got 0 titles, spans and pseudo_queries, expected"):
        ViewMixture(titles=0, spans=0, pseudo_queries=0)
    with pytest.raises(ValueError, match="^ViewMixture.titles: got -1, expected at least 0$"):
        ViewMixture(titles=-1)
    with pytest.raises(ValueError, match="ViewMixture.preference: got -1, expected at least 0"):
        ViewMixture(preference=-1)


# ---- pseudo-query files


def test_copies_of_test_queries_are_left_out_and_counted(tmp_path, store):
    path = tmp_path / "pseudo.tsv"
    path.write_text(
        "p2\tWhich  bird hunts at night?\np0\tWHO MAKES HONEY\np1\twho makes honey now\n"
        "p0\twho makes “honey”?\n",
        encoding="utf-8",
    )
    counts = Counter()
    tests = ["who makes honey?", "what else"]
    kept = list(data_views.pseudo_queries(str(path), store, copies_of=tests, counts=counts))
    assert kept == [(2, "Which  bird hunts at night?"), (1, "who makes honey now")]
    assert counts == {"pseudo_queries": 2, "copies_of_test_queries": 2}
    path.write_text("p2\twhich bird\np99\twhich bee\n", encoding="utf-8")
    counts = Counter()
    kept = list(data_views.pseudo_queries(str(path), store, counts=counts))
    assert kept == [(2, "which bird")] and counts == {"pseudo_queries": 1}


@pytest.mark.parametrize(
    "one, other, same",
    [
        ("Who makes HONEY ?", "who  makes honey", True),
        ("Ｔｏｋｙｏ", "tokyo", True),  # full width
        ("Straße", "STRASSE", True),
        ("東京は？", "東京は", True),
        ("cafe\u0301", "café", True),
        ("कि", "क", False),  # vowel signs are part of the word
        ("C++", "C", True),
        ("?!", "...", False),
        ("bees 1", "bees 2", False),
    ],
)
def test_what_makes_two_queries_the_same(one, other, same):
    assert (data_views.normalised(one) == data_views.normalised(other)) == same
