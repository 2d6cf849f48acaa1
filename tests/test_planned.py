"""A plan and a student together, against every planned identifier scored by itself."""

from __future__ import annotations

import dataclasses
from collections import Counter

import numpy as np
import pytest

import dgr_jax.retrieval.multiview.planned  # noqa: F401 - students of several views plan too
from dgr_jax.config import cli, gin_files
from dgr_jax.config.mistakes import Mistake
from dgr_jax.corpora import store as stores
from dgr_jax.corpora.store import PassageStore
from dgr_jax.corpora.types import Passage
from dgr_jax.corpora.words import sentences
from dgr_jax.partitioning import Mesh
from dgr_jax.retrieval import exhaustive
from dgr_jax.retrieval.bm25 import Bm25
from dgr_jax.retrieval.generative import Search
from dgr_jax.retrieval.kept_postings import place
from dgr_jax.retrieval.multiview.search import MultiviewDecoder
from dgr_jax.retrieval.planned import Planned, PlannedDecoder, PlannedQueries, with_identifiers
from dgr_jax.retrieval.reranking import rerank
from dgr_jax.retrieval.simultaneous import Lexical, PlannedPassages
from dgr_jax.retrieval.system import Opening
from dgr_jax.settings import describe
from tests import students, toy

COUNT, PLANNED = 40, 8
QUERIES = students.queries(7)
SEARCH = Search(num_beams=4, depth=6, batch_size=4, query_length=8)
ROWS = {"rq": students.codes(COUNT, seed=3), "text": students.texts(COUNT, seed=3)}
SHARED = np.repeat(students.codes(COUNT // 2, seed=4), 2, 0)  # two passages an identifier


class Drawn:
    """A planner whose scores are drawn."""

    nbytes = 0

    def __init__(self, count=COUNT, seed=0):
        self._drawn = np.random.default_rng(seed).normal(size=(64, count)).astype(np.float32)

    def best(self, texts, count, allowed=None):
        scores = self._drawn[: len(texts)]
        if allowed is not None:
            scores = np.where(allowed, scores, -np.inf)
        order = np.argsort(-scores, 1, kind="stable")[:, :count]
        best = np.take_along_axis(scores, order, 1)
        return PlannedPassages(np.where(best > -np.inf, order, -1).astype(np.int32), best)


def planned_decoder(rows, plan, mesh=Mesh(data=1), devices=1, search=SEARCH):
    student = students.decoder(rows, search, mesh=mesh, devices=devices)
    return PlannedDecoder.of(student, plan, Drawn(len(rows)))


def asked(decoder, queries=QUERIES):
    planned = decoder.planner.best(
        [""] * len(queries), decoder.plan.planned, decoder.student.allowed
    )
    return PlannedQueries(queries, planned)


def expected_hits(decoder, queries):
    """[(passage, score)] of each query: plan score + weight * log p, of all that are planned."""
    student = students.decoder(np.asarray(decoder.student.table.tokens), SEARCH)
    log_probs = np.concatenate(list(exhaustive.identifier_log_probs(student, queries.tokens)))
    rows = decoder.student.table.rows_of_passages()
    for query, (passages, scores) in enumerate(zip(*queries.planned, strict=True)):
        total = {
            int(p): s + decoder.plan.weight * log_probs[query, rows[p]]
            for p, s in zip(passages, scores, strict=True)
            if p >= 0
        }
        yield sorted(total.items(), key=lambda item: (-item[1], item[0]))


@pytest.mark.parametrize(
    ("kind", "ranked_by"),
    [
        ("rq", "identifiers"),
        pytest.param("rq", "beams", marks=pytest.mark.slow),
        pytest.param("text", "identifiers", marks=pytest.mark.slow),
        ("text", "beams"),
    ],
)
def test_plan_and_log_probability_are_added(kind, ranked_by):
    """With as many beams as passages are planned, all of them are written."""
    plan = Lexical(planned=PLANNED, ranked_by=ranked_by, weight=0.5, num_beams=PLANNED)
    decoder = planned_decoder(ROWS[kind], plan)
    queries = asked(decoder)
    passages, scores = decoder.passages(queries)
    for query, expected in enumerate(expected_hits(decoder, queries)):
        expected = expected[: SEARCH.depth]
        assert passages[query].tolist() == [p for p, _ in expected]
        np.testing.assert_allclose(scores[query], [s for _, s in expected], atol=1e-4)
    for query, hits in enumerate(decoder.hits(queries)):
        plan_scores = dict(zip(*(part[query] for part in queries.planned), strict=True))
        for hit in hits:
            assert hit.parts["plan"] == plan_scores[hit.passage]
            assert hit.score == pytest.approx(
                hit.parts["plan"] + 0.5 * hit.parts["log_prob"], abs=1e-5
            )
            assert hit.parts["log_prob"] < 0
            row = decoder.student.table.rows_of_passages()[hit.passage]
            assert hit.tokens.tolist() == decoder.student.table.tokens[row].tolist()


def test_few_beams_find_the_best_of_what_is_planned():
    plan = Lexical(planned=PLANNED, ranked_by="beams", weight=0.5, num_beams=4)
    decoder = planned_decoder(ROWS["rq"], plan)
    queries = asked(decoder)
    passages, scores = decoder.passages(queries)
    for query, expected in enumerate(expected_hits(decoder, queries)):
        exact = dict(expected)
        found = passages[query].tolist()
        np.testing.assert_allclose(scores[query][:4], [exact[p] for p in found[:4]], atol=1e-4)
        # The others stand in the order of the plan, below all that were written.
        left = [p for p in queries.planned.passages[query].tolist() if p not in found[:4]]
        assert found[4:] == left[: SEARCH.depth - 4]
        plan_scores = dict(zip(*(part[query] for part in queries.planned), strict=True))
        assert scores[query][3] - scores[query][4] == pytest.approx(0.5, abs=1e-5)
        assert scores[query][4] - scores[query][5] == pytest.approx(
            plan_scores[found[4]] - plan_scores[found[5]], abs=1e-5
        )
    for hits in decoder.hits(queries):
        assert [np.isfinite(hit.parts["log_prob"]) for hit in hits] == [True] * 4 + [False] * 2
    assert decoder.most_passages == SEARCH.depth


@pytest.mark.parametrize("ranked_by", ["identifiers", "beams"])
def test_passages_of_one_identifier_keep_their_own_plan_scores(ranked_by):
    plan = Lexical(planned=PLANNED, ranked_by=ranked_by, weight=0.5, num_beams=PLANNED)
    decoder = planned_decoder(SHARED, plan)
    queries = asked(decoder)
    passages, scores = decoder.passages(queries)
    for query, expected in enumerate(expected_hits(decoder, queries)):
        assert passages[query].tolist() == [p for p, _ in expected[: SEARCH.depth]]


class Few(Drawn):
    """Of `every` so many queries one has few: two passages where its place is even, or none."""

    def __init__(self, every):
        super().__init__()
        self.every = every

    def best(self, texts, count, allowed=None):
        passages, scores = super().best(texts, count, allowed)
        place = np.arange(len(texts))
        planned = np.where(place % self.every == 0, 2 * (place % 2 == 0), count)
        there = np.arange(count) < planned[:, None]
        return PlannedPassages(np.where(there, passages, -1), np.where(there, scores, -np.inf))


@pytest.mark.parametrize(
    ("ranked_by", "every"),
    [
        ("identifiers", 3),
        pytest.param("identifiers", 1, marks=pytest.mark.slow),
        pytest.param("beams", 3, marks=pytest.mark.slow),
    ],
)
def test_where_few_are_planned_the_student_searches_all(ranked_by, every):
    """For these queries alone; its passages count 0 in the plan."""
    planned = 4 if ranked_by == "beams" else PLANNED  # all of which are written
    plan = Lexical(planned=planned, ranked_by=ranked_by, weight=0.5, num_beams=4)
    decoder = planned_decoder(ROWS["rq"], plan)
    decoder.planner = Few(every)
    queries = asked(decoder)
    student = students.decoder(ROWS["rq"], dataclasses.replace(SEARCH, depth=4))
    alone, log_probs = student.passages(QUERIES)
    passages, scores = decoder.passages(queries)
    for query, expected in enumerate(expected_hits(decoder, queries)):
        if query % every == 0:
            found = dict(zip(alone[query].tolist(), 0.5 * log_probs[query], strict=True))
            expected = sorted((found | dict(expected)).items(), key=lambda item: -item[1])
        expected = expected[: SEARCH.depth]
        count = len(expected)
        assert passages[query].tolist() == [p for p, _ in expected] + [-1] * (SEARCH.depth - count)
        np.testing.assert_allclose(scores[query][:count], [s for _, s in expected], atol=1e-4)
    for query, hits in enumerate(decoder.hits(queries)):
        planned = set(queries.planned.passages[query].tolist())
        assert all((hit.parts["plan"] == 0.0) == (hit.passage not in planned) for hit in hits)


def test_the_plan_alone_asks_no_student():
    plan = Lexical(planned=PLANNED, ranked_by="plan")
    decoder = planned_decoder(ROWS["rq"], plan)
    decoder.student.params = None
    queries = asked(decoder)
    passages, scores = decoder.passages(queries)
    np.testing.assert_array_equal(passages, queries.planned.passages[:, : SEARCH.depth])
    np.testing.assert_array_equal(scores, queries.planned.scores[:, : SEARCH.depth])
    assert all(hit.parts["log_prob"] == -np.inf for hits in decoder.hits(queries) for hit in hits)


@pytest.mark.parametrize("ranked_by", ["identifiers", "beams", "plan"])
def test_only_allowed_passages_are_planned(ranked_by):
    plan = Lexical(planned=PLANNED, ranked_by=ranked_by, num_beams=4)
    decoder = planned_decoder(ROWS["rq"], plan)
    allowed = np.zeros(COUNT, bool)
    allowed[[3, 5, 8]] = True
    few = decoder.restrict(allowed)
    passages, _ = few.passages(asked(few))
    assert [sorted(row[row >= 0].tolist()) for row in passages] == [[3, 5, 8]] * len(QUERIES)
    assert few._score is decoder._score


def test_one_query_and_blocks_give_what_all_together_do():
    plan = Lexical(planned=PLANNED, ranked_by="beams", num_beams=4)
    decoder = planned_decoder(ROWS["rq"], plan)
    queries = asked(decoder)
    whole = decoder.passages(queries)
    parts = [
        PlannedQueries(queries.tokens[part], PlannedPassages(*(x[part] for x in queries.planned)))
        for part in (slice(0, 1), slice(1, 7))
    ]
    passages, scores = map(np.concatenate, zip(*decoder.passages_of_blocks(parts), strict=True))
    np.testing.assert_array_equal(passages, whole[0])
    np.testing.assert_allclose(scores, whole[1], rtol=1e-6)
    alone = decoder.passages(parts[0])
    np.testing.assert_array_equal(alone[0], whole[0][:1])


@pytest.mark.parametrize(
    "ranked_by", [pytest.param("identifiers", marks=pytest.mark.slow), "beams"]
)
def test_the_same_passages_on_a_mesh(ranked_by):
    toy.devices(4)
    plan = Lexical(planned=PLANNED, ranked_by=ranked_by, num_beams=4)
    alone = planned_decoder(ROWS["rq"], plan)
    shared = planned_decoder(ROWS["rq"], plan, Mesh(data=2, model=2), 4)
    expected, found = alone.passages(asked(alone)), shared.passages(asked(shared))
    np.testing.assert_array_equal(found[0], expected[0])
    np.testing.assert_allclose(found[1], expected[1], atol=1e-5)


@pytest.mark.parametrize(
    ("plan", "search", "message"),
    [
        (dict(planned=41), {}, "Lexical.planned: got 41, expected at most 40, the passages of"),
        (dict(planned=10), dict(renormalise=True), "Search.renormalise: got True with a plan"),
        (dict(planned=10), dict(constrained=False), "Search.constrained: got False with a plan"),
        (dict(weight=None), {}, "Lexical.weight: got None, expected a number: only an evaluation"),
    ],
)
def test_plans_that_do_not_fit_are_refused(plan, search, message):
    search = dataclasses.replace(SEARCH, **search)
    with pytest.raises(ValueError, match=message):
        planned_decoder(ROWS["rq"], Lexical(**plan), search=search)


def test_only_students_with_one_identifier_a_passage_have_a_plan():
    student = students.decoder(ROWS["rq"], SEARCH)
    assert with_identifiers(student, "Planned") is student
    message = "Planned: got a Drawn, expected a student with one identifier a passage"
    with pytest.raises(ValueError, match=message):
        with_identifiers(Drawn(), "Planned")


def test_without_a_planner_no_texts_are_read():
    student = students.decoder(ROWS["rq"], SEARCH)
    decoder = PlannedDecoder.of(student, Lexical(planned=PLANNED, num_beams=4), None)
    with pytest.raises(ValueError, match="encode: got no planner, expected one to plan texts"):
        decoder.encode(None, ["a"])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(ranked_by="x"), "Lexical.ranked_by: got 'x', expected one of 'beams', 'identifiers'"),
        (dict(grams_weight=0), "Lexical.grams_weight: got 0, expected above 0"),
        (dict(queries_weight=-1), "Lexical.queries_weight: got -1, expected at least 0"),
        (dict(sentences_weight=-1), "Lexical.sentences_weight: got -1, expected at least 0"),
        (dict(weight=0), "Lexical.weight: got 0, expected above 0, or None"),
        (
            dict(planned=5, num_beams=6),
            "Lexical.num_beams: got 6, expected at most 5, Lexical.planned",
        ),
    ],
)
def test_settings_are_checked(settings, message):
    with pytest.raises(ValueError, match=message):
        Lexical(**settings)


def test_students_of_several_views_do_not_rerank():
    views = MultiviewDecoder.__new__(MultiviewDecoder)
    with pytest.raises(ValueError) as error:
        rerank(views, None, None, {"q": "text"}, {})
    assert str(error.value) == (
        "rerank: got a MultiviewDecoder, expected a student with one identifier a passage"
    )


# plans of words

TEXTS = ["bees dance a waggle dance", "ships sail", "the dance of ships", "mute swans", "swans"]


@pytest.fixture
def store(tmp_path):
    return stored(tmp_path / "store", TEXTS)


def stored(folder, texts):
    passages = (Passage(pid=f"p{i}", title="", text=text) for i, text in enumerate(texts))
    return stores.write(passages, folder)


QUESTIONS = ["Do bees dance?", "a ship dance", "", "zebra", "dance dance"]


def test_a_lexical_plan_is_bm25(store):
    planner = Lexical(planned=3, num_beams=3).planner(store)
    index = Bm25().fit(store)
    np.testing.assert_array_equal(planner.scores(QUESTIONS), [*map(index.scores, QUESTIONS)])
    passages, scores = planner.best(QUESTIONS, 3)
    for query, text in enumerate(QUESTIONS):
        best = index.best(index.scores(text), 3)
        there = passages[query] >= 0
        assert [f"p{i}" for i in passages[query][there]] == [hit.pid for hit in best]
        assert scores[query][there].tolist() == [hit.score for hit in best]
        assert (scores[query][~there] == -np.inf).all()


def test_a_lexical_plan_of_words_and_n_grams_is_their_sum(store, tmp_path):
    plan = Lexical(planned=3, num_beams=3, grams=4, grams_weight=0.5)
    planner = plan.planner(store, tmp_path / "plans", keep=True)
    of_words, of_grams = (Bm25(grams=size).fit(store) for size in (0, 4))
    expected = [of_words.scores(text) + 0.5 * of_grams.scores(text) for text in QUESTIONS]
    np.testing.assert_allclose(planner.scores(QUESTIONS), expected, rtol=1e-6)
    kept = {place(tmp_path / "plans", Bm25(grams=size)) for size in (0, 4)}
    assert set((tmp_path / "plans").iterdir()) == kept
    again = plan.planner(store, tmp_path / "plans")
    np.testing.assert_array_equal(again.scores(QUESTIONS), planner.scores(QUESTIONS))
    alone = Lexical(planned=3, num_beams=3).planner(store)
    assert planner.nbytes > 2 * alone.nbytes
    assert describe(Lexical()).keys().isdisjoint({"grams", "grams_weight"})


def test_a_lexical_plan_counts_the_training_queries_of_passages(store, tmp_path):
    plan = Lexical(planned=3, num_beams=3, queries_weight=0.25)
    with pytest.raises(ValueError, match="Bm25.queries_weight: got 0.25, expected 0: no training"):
        plan.planner(store)
    asked = {"p0": ["Which insects waggle?"], "p3": ["Which ship, which sea?", "zebra"]}
    stores.write_queries(asked, store.folder)
    store = PassageStore(store.folder)
    settings = Bm25(queries_weight=0.25)
    words_of = settings.reader()
    texts = [passage.contents for passage in store]
    counts = [Counter(words_of(text)) for text in texts]
    for pid, queries in asked.items():
        for word in words_of(" ".join(queries)):
            counts[store.index_of(pid)][word] += 0.25
    mean = sum(c.total() for c in counts) / len(counts)
    planner = plan.planner(store, tmp_path / "plans", keep=True)
    questions = [*QUESTIONS, "which insects"]
    for text, scores in zip(questions, planner.scores(questions), strict=True):
        expected = np.zeros(len(counts))
        for word in words_of(text):
            n = sum(word in c for c in counts)
            idf = np.log(1 + (len(counts) - n + 0.5) / (n + 0.5))
            for i, c in enumerate(counts):
                norm = 0.9 * (0.6 + 0.4 * c.total() / mean)
                expected[i] += idf * c[word] / (c[word] + norm) if word in c else 0
        np.testing.assert_allclose(scores, expected, rtol=1e-5)
    again = plan.planner(store, tmp_path / "plans")
    np.testing.assert_array_equal(again.scores(questions), planner.scores(questions))
    assert "queries_weight" not in describe(Lexical())


def test_a_lexical_plan_adds_the_best_sentence_of_each_passage(tmp_path):
    texts = [
        "Bees dance. A dance! The sea is a place for a ship.",
        "Bees.",
        "",
        "A ship? Bees dance",
    ]
    passages = (Passage(f"p{i}", text, "Dance") for i, text in enumerate(texts))
    store = stores.write(passages, tmp_path / "store")
    plan = Lexical(planned=3, num_beams=3, grams=4, grams_weight=0.5, sentences_weight=0.25)
    planner = plan.planner(store, tmp_path / "plans", keep=True)
    cut = [sentences(text) or ["Dance"] for text in texts]
    alone = stored(tmp_path / "cut", [sentence for of in cut for sentence in of])
    owner = np.repeat(np.arange(len(texts)), [len(of) for of in cut])
    expected = (
        Lexical(planned=3, num_beams=3, grams=4, grams_weight=0.5).planner(store).scores(QUESTIONS)
    )
    for size, weight in ((0, 0.25), (4, 0.125)):
        index = Bm25(grams=size).fit(alone)
        for row, text in zip(expected, QUESTIONS, strict=True):
            of_each = index.scores(text)
            row += [weight * of_each[owner == i].max() for i in range(len(texts))]
    np.testing.assert_allclose(planner.scores(QUESTIONS), expected, rtol=1e-5)
    np.testing.assert_array_equal(
        plan.planner(store, tmp_path / "plans").scores(QUESTIONS), planner.scores(QUESTIONS)
    )
    index = Bm25(sentences=True).fit(store)
    some = np.array([0, 3])
    np.testing.assert_array_equal(index.scores_of("ship", some), index.scores("ship")[some])
    assert [hit.pid for hit in index.search({"q": "a ship"}, 5)["q"]] == ["p3", "p0"]
    assert "sentences_weight" not in describe(Lexical())
    with pytest.raises(ValueError, match="queries_weight: got 0.1 with Bm25.sentences, expected 0"):
        Bm25(sentences=True, queries_weight=0.1)


def test_training_queries_without_weight_leave_bm25_as_it_is(store):
    stores.write_queries({"p0": ["Which insects waggle?"]}, store.folder)
    store = PassageStore(store.folder)
    stores.write_queries({}, store.folder)
    none = PassageStore(store.folder)
    scores = [
        Bm25().fit(store).scores("bees dance"),
        Bm25(queries_weight=1.0).fit(none).scores("bees dance"),
    ]
    np.testing.assert_array_equal(*scores)


def test_plans_of_allowed_passages_alone(store):
    allowed = np.array([False, True, True, True, True])
    passages, _ = Lexical(planned=3, num_beams=3).planner(store).best(["bees dance"], 3, allowed)
    assert passages.tolist() == [[2, -1, -1]]


def test_only_students_that_write_identifiers_have_a_plan_by_words(store, tmp_path):
    settings = Planned("planned", Lexical(planned=1, num_beams=1))
    opening = Opening(tmp_path, store, 1, None, None, lambda name: Drawn())
    with pytest.raises(ValueError) as error:
        settings.open(opening)
    assert str(error.value) == (
        "Planned: got a Drawn, expected a student that writes identifiers: Decoder, "
        "MultiviewDecoder"
    )


def test_a_plan_is_kept_and_one_of_another_corpus_refused(store, tmp_path):
    plan, folder = Lexical(planned=3, num_beams=3), tmp_path / "plans"
    made = plan.planner(store, folder)
    assert not folder.exists()
    plan.planner(store, folder, keep=True)
    opened = plan.planner(store, folder)
    assert len(list(folder.iterdir())) == 1
    np.testing.assert_array_equal(opened.scores(QUESTIONS), made.scores(QUESTIONS))
    assert opened.nbytes == made.nbytes > 0
    other = stored(tmp_path / "other", TEXTS[:4])
    message = "is the plan of another corpus: got one of 5 passages, expected the 4 that"
    with pytest.raises(ValueError, match=message):
        plan.planner(other, folder)
    Lexical(planned=3, num_beams=3, bm25=Bm25(k1=2.0)).planner(other, folder, keep=True)
    assert len(list(folder.iterdir())) == 2


@pytest.mark.parametrize("damaged", ["impacts.npy", "header.json"])
def test_a_damaged_plan_is_made_again(store, tmp_path, caplog, damaged):
    plan = Lexical(planned=3, num_beams=3)
    made = plan.planner(store, tmp_path / "plans", keep=True)
    (folder,) = (tmp_path / "plans").iterdir()
    (folder / damaged).write_bytes((folder / damaged).read_bytes()[:-9])
    again = plan.planner(store, tmp_path / "plans", keep=True)
    np.testing.assert_array_equal(again.scores(QUESTIONS), made.scores(QUESTIONS))
    assert "the plan is made again" in caplog.text
    caplog.clear()
    plan.planner(store, tmp_path / "plans")
    assert not caplog.text


def test_a_plan_with_words_by_other_rules_is_made_again(tmp_path, caplog):
    plan = Lexical(planned=2, num_beams=2)
    for texts, again in ((["une allée", "ein Weg"], True), (["a street", "a way"], False)):
        passages, plans = stored(tmp_path / texts[0], texts), tmp_path / f"{texts[0]} plans"
        made = plan.planner(passages, plans, keep=True)
        (header,) = plans.glob("*/header.json")
        header.write_text(header.read_text().replace('"rules": 2', '"rules": 1'))
        with caplog.at_level("INFO"):
            opened = plan.planner(passages, plans, keep=True)
        assert ("words by the rules of another version; made again" in caplog.text) == again
        assert ('"rules": 2' in header.read_text()) == again
        np.testing.assert_array_equal(opened.scores(texts), made.scores(texts))
        caplog.clear()


def test_a_corpus_without_words_plans_nothing(tmp_path):
    plan = Lexical(planned=1, num_beams=1)
    empty = stored(tmp_path / "store", ["", "?"])
    plan.planner(empty, tmp_path / "plans", keep=True)
    planner = plan.planner(empty, tmp_path / "plans")
    assert planner.best(["bees"], 1).passages.tolist() == [[-1]]


LAPTOP = Lexical(grams=5, grams_weight=0.1, queries_weight=0.3, sentences_weight=0.5)


@pytest.mark.parametrize(
    ("name", "shipped"), [("quickstart", Lexical(queries_weight=0.2)), ("laptop", LAPTOP)]
)
def test_shipped_experiments_on_a_cpu_plan_by_words(name, shipped):
    for flags, plan in (((), shipped), (("--gin.PLAN=None",), None)):
        args, bindings = cli.parse(cli.parser("train", ""), [f"--gin_file={name}.gin", *flags])
        assert gin_files.load_experiment(args, bindings, keep=False, fill=True).plan == plan


def test_settings_of_a_plan_that_is_not_there_are_refused():
    flags = ["--gin_file=beir.gin", "--data_dir=d", "--model_dir=m", "--gin.Lexical.weight=0.3"]
    load = lambda *more: gin_files.load_experiment(
        *cli.parse(cli.parser("train", ""), [*flags, *more]), keep=False
    )
    with pytest.raises(Mistake) as error:
        load()
    assert str(error.value) == (
        "--gin.Lexical.weight: got a setting of a plan that this experiment does not have, "
        "expected --gin.PLAN=@Lexical() beside it"
    )
    assert load("--gin.PLAN=@Lexical()").plan == Lexical(weight=0.3)


def test_as_many_passages_are_planned_as_there_are():
    plan = Lexical()
    assert plan.of_corpus(250) == Lexical(planned=100)
    assert plan.of_corpus(6) == Lexical(planned=6, num_beams=6)
    assert Lexical(planned=3, num_beams=2).of_corpus(6) == Lexical(planned=3, num_beams=2)
    with pytest.raises(ValueError, match="Lexical.num_beams: got 101, expected at most 100"):
        Lexical(num_beams=101)
