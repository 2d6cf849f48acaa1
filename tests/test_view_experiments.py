"""Experiments with identifiers of several views: their features, keys, scores, and whole runs."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dgr_jax.corpora.beir import write_beir
from dgr_jax.corpora.types import Passage, Qrel, Query
from dgr_jax.data.views import ViewMixture
from dgr_jax.data.vocabulary import VIEWS
from dgr_jax.decoding.passage_scoring import BODY
from dgr_jax.losses import ranking
from dgr_jax.models.t5 import Transformer
from dgr_jax.partitioning import Mesh, make_mesh
from dgr_jax.retrieval.multiview.index import MultiviewIndex, Written
from dgr_jax.retrieval.multiview.keys import keys
from dgr_jax.retrieval.multiview.planned import PlannedViews
from dgr_jax.retrieval.multiview.search import MultiviewDecoder, MultiviewSearch
from dgr_jax.retrieval.retriever import Retriever
from dgr_jax.retrieval.simultaneous import Lexical
from dgr_jax.training import packing
from dgr_jax.training.objectives import Distillation, multiview_scores
from tests import students
from tests.conftest import TINY
from tests.view_collections import SCORING, TEXTS, found_by, keyed, lists_of, log_probs_of, prepare


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return prepare(tmp_path_factory.mktemp("prepared"))


def test_rank_lists_have_the_scores_of_search(made):
    """One scoring function: what training sums over the keys is what search has ranked by."""
    vocabulary, indexes, _, _ = made
    found = found_by(vocabulary, indexes)
    lists = keyed(found, indexes)
    rows, counts = np.arange(len(TEXTS)), Counter()
    named = lists.of(rows, TEXTS, lists.passages, counts)
    assert counts["passages"] == (lists.passages >= 0).sum() > len(TEXTS)
    assert counts["passages_without_keys"] == counts["passages_without_identifier"] == 0
    score = jax.jit(partial(multiview_scores, scoring=SCORING))
    scores = score(log_probs_of(named, found, rows), lists_of(vocabulary, indexes, named))
    for query, one in enumerate(found):
        number = min(4, len(one.scores))
        np.testing.assert_allclose(scores[query, :number], one.scores[:number], rtol=1e-5)
        assert not np.any(scores[query, number:])


def test_the_report_says_where_spans_begin(made):
    body = made[3].report["body"]
    assert body["spans_begin_anywhere"] is False and 0.1 < body["begin_a_word"] <= 1


def test_keys_leave_the_padding_of_the_search_out(made):
    vocabulary, indexes, _, _ = made
    found = found_by(vocabulary, indexes)
    sizes = {"depth": 4, "limit": 24, "identifiers": 12, "length": indexes.length}
    wide = [
        dataclasses.replace(
            one, query=one.query._replace(tokens=np.pad(one.query.tokens, ((0, 0), (0, 5))))
        )
        for one in found
    ]
    for name, expected in keys(found, **sizes).items():
        np.testing.assert_array_equal(keys(wide, **sizes)[name], expected, err_msg=name)


def test_passages_that_were_not_found_get_keys_of_their_own(made):
    vocabulary, indexes, passages, _ = made
    found = found_by(vocabulary, indexes)
    lists, counts = keyed(found, indexes), Counter()
    lists.passages[:] = -1  # nothing was found
    asked = np.array([[0, 3, 4], [1, -1, 2], [2, 0, -1]], np.int32)
    named = lists.of(np.arange(3), TEXTS, asked, counts)
    assert counts == {
        "passages": 7, "passages_without_keys": 7, "passages_without_identifier": 0,
    }  # fmt: skip
    again = lists.of(np.arange(3), TEXTS, asked, Counter())
    assert all(map(np.array_equal, named, again))
    for i, j in np.argwhere(asked >= 0):
        passage = passages[int(asked[i, j])]
        text = vocabulary.encode(passage.text)
        for k in np.flatnonzero(named.tokens[i, j].any(-1)):
            tokens = named.tokens[i, j, k][named.tokens[i, j, k] > 0].tolist()
            view, count = VIEWS[named.views[i, j, k]], named.counts[i, j, k]
            if view == "body":
                held = [text[a : a + len(tokens)] for a in range(len(text))]
                assert tokens in held and count >= held.count(tokens)
                at = named.starts[i, j][named.spans[i, j] == k + 1]
                assert sorted(at) == [a for a, one in enumerate(held) if one == tokens]
            else:
                assert tokens[0] == vocabulary.marker(view) and tokens[-1] == 1 and count == 1
    assert VIEWS[named.views[0, 1, 0]] == "title" and (named.views[0, 1] != BODY).all()
    assert not named.tokens[1, 1].any()


def test_a_passage_that_nothing_names_is_counted(made):
    """Without pseudo-queries and title, an empty text leaves none."""
    vocabulary, indexes, _, _ = made
    bare = dataclasses.replace(indexes, tables={"query": indexes.tables["query"]})
    lists, counts = keyed(found_by(vocabulary, indexes), bare), Counter()
    lists.passages[:] = -1
    named = lists.of(np.array([0]), TEXTS[:1], np.array([[3, 0]], np.int32), counts)
    assert counts["passages_without_identifier"] == 1 and not named.tokens[0, 0].any()


@pytest.fixture(scope="module")
def lists(made):
    """Features of three rank lists of three."""
    vocabulary, indexes, _, _ = made
    lists = keyed(found_by(vocabulary, indexes), indexes, limit=6, depth=3)
    named = lists.of(np.arange(3), TEXTS, lists.passages, Counter())
    return lists_of(vocabulary, indexes, named)


@pytest.mark.slow
def test_a_target_sees_the_input_of_its_view_alone(made, lists):
    """Distillation gives an identifier the log-probability that search does: of its own marker."""
    # in so large a corpus what a random student writes is no chance
    lists = lists | {"corpus_tokens": np.full((3, 1), 1e30, np.float32)}
    config = dataclasses.replace(students.CONFIG, vocab_size=made[0].size, dropout_rate=0.0)
    model, params = Transformer(config), students.parameters(config)
    weights = np.random.default_rng(2).normal(size=(3, 3)).astype(np.float32)
    weighted = lambda student, teacher, mask: jnp.sum(student * weights, -1)
    objective = Distillation(weighted, generation_weight=0.0, scoring=SCORING)
    loss = objective.loss_fn(model)

    @jax.jit
    def compute(params, lists):
        total = lambda params: loss(params, {"rank_list": lists}, jax.random.key(0))[0]
        return jax.value_and_grad(total)(params)

    value, gradient = compute(params, lists)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))
    assert any(np.any(leaf) for leaf in jax.tree.leaves(gradient))

    tokens, views = lists["identifier_tokens"], lists["identifier_views"]
    query = np.broadcast_to(np.arange(3)[:, None, None], views.shape)
    inputs = lists["encoder_input_tokens"][query, views].reshape(-1, 16)
    targets = tokens.reshape(-1, tokens.shape[-1])
    shifted = np.pad(targets[:, :-1], ((0, 0), (1, 0)))
    logits = jax.jit(model.apply)({"params": params}, inputs, shifted)
    log_probs = np.asarray(jax.nn.log_softmax(logits))
    log_probs = np.take_along_axis(log_probs, targets[..., None], -1).reshape(tokens.shape)
    scores = multiview_scores(jnp.asarray(log_probs), lists, SCORING)
    assert np.any(scores)
    np.testing.assert_allclose(value, np.sum(scores * weights), rtol=1e-3)

    # Side by side in few rows, they have the same scores and gradients.
    side_by_side = packing.packed(tokens, views, 4, packing.width_for(tokens.shape[-1]))
    longest = sum(len(np.unique(of_list)) - 1 for of_list in side_by_side["packed_segments"])
    assert 3 < longest < (tokens > 0).any(-1).sum()
    again, its_gradient = compute(params, lists | side_by_side)
    np.testing.assert_allclose(again, value, rtol=1e-4)
    for a, b in zip(*map(jax.tree.leaves, (gradient, its_gradient)), strict=True):
        np.testing.assert_allclose(b, a, rtol=1e-3, atol=1e-4 * float(np.abs(a).max()))


def test_lists_of_several_views_need_generation_examples(made, lists):
    batch = {"rank_list": lists}
    config = dataclasses.replace(students.CONFIG, vocab_size=made[0].size)
    objective = Distillation(ranking.distilled_ranknet, generation_weight=1.0)
    with pytest.raises(ValueError, match="rank lists of several views without generation examples"):
        objective.loss_fn(Transformer(config))(
            students.parameters(config), batch, jax.random.key(0)
        )


def test_wrong_settings_of_the_search_are_refused():
    with pytest.raises(ValueError, match=r"MultiviewSearch.num_beams: got 0, expected at least 1"):
        MultiviewSearch(num_beams=0)
    with pytest.raises(ValueError, match="MultiviewSearch.query_length: got 2, expected at least"):
        MultiviewSearch(query_length=2)


# Every pseudo-query that a random student writes counts.
LENIENT = dataclasses.replace(SCORING, query_shift=100.0)


@pytest.fixture(scope="module")
def decoder(made):
    vocabulary, indexes, _, _ = made
    config = dataclasses.replace(students.CONFIG, vocab_size=vocabulary.size)
    search = MultiviewSearch(num_beams=4, batch_size=2, depth=4, query_length=16, scoring=LENIENT)
    mesh = make_mesh(Mesh(data=1), jax.devices()[:1])
    return MultiviewDecoder.of(config, students.parameters(config), indexes, search, mesh)


@pytest.mark.slow
def test_passages_are_found_whatever_the_batches(made, decoder):
    vocabulary = made[0]
    tokens = vocabulary.encode_inputs(TEXTS, decoder.query_length)
    passages, scores = decoder.passages(tokens)
    assert passages.dtype == np.int32 and scores.dtype == np.float32
    assert passages.shape == scores.shape == (3, 4) and (passages[:, 0] >= 0).all()
    assert (np.diff(scores, axis=1)[np.isfinite(scores[:, 1:])] <= 0).all()
    (first, second) = decoder.passages_of_blocks(iter([tokens[:2], tokens[2:]]))
    np.testing.assert_array_equal(np.concatenate([first[0], second[0]]), passages)
    np.testing.assert_allclose(np.concatenate([first[1], second[1]]), scores, rtol=1e-5)
    for query, hits in enumerate(decoder.hits(tokens)):
        assert [hit[0] for hit in hits] == [p for p in passages[query] if p >= 0]
        assert all(hit[2].any() for hit in hits)
    with pytest.raises(ValueError, match="tokens: got a query of 16, expected at most 15"):
        decoder.passages(np.full((1, 16), 3, np.int32))


@pytest.mark.slow
def test_restricted_search_finds_allowed_passages_alone(made, decoder):
    vocabulary = made[0]
    tokens = vocabulary.encode_inputs(TEXTS, decoder.query_length)
    allowed = np.array([False, True, False, False, True])
    passages, _ = decoder.restrict(allowed).passages(tokens)
    assert set(passages[passages >= 0].tolist()) <= {1, 4} and (passages[:, 0] >= 0).all()
    with pytest.raises(ValueError, match="passage_mask must be bool of shape"):
        decoder.restrict(np.ones(3, bool))


def planned_views(made, decoder, **settings):
    """A student with a plan by words, which has found what `found_by` makes up."""
    vocabulary, indexes, passages, _ = made
    plan = Lexical(planned=3, num_beams=3, **settings)
    student = dataclasses.replace(decoder)
    found = found_by(vocabulary, indexes)
    student._scored = lambda blocks, size: (f for block in blocks for f in found[: len(block)])
    return PlannedViews(student, plan, plan.planner(passages)), found


def test_a_plan_is_added_to_the_passage_scores_of_several_views(made, decoder):
    """Against a dictionary of every passage that the plan or the student names."""
    system, found = planned_views(made, decoder, weight=0.5)
    queries = system.encode(made[0], TEXTS)
    passages, scores = system.by_pid(made[2].pid_of).passages(queries)
    for query, hits in enumerate(system.hits(queries)):
        pairs = zip(*(part[query].tolist() for part in queries.planned), strict=True)
        plan = {p: s for p, s in pairs if p >= 0}
        student = dict(zip(found[query].passages.tolist(), found[query].scores, strict=True))
        assert plan and student.keys() - plan.keys()
        both = {p: plan.get(p, 0) + 0.5 * student.get(p, 0) ** 0.5 for p in plan | student}
        expected = sorted(both, key=lambda p: (-both[p], p))[:4]
        count = len(expected)
        assert passages[query].tolist() == expected + [-1] * (4 - count)
        np.testing.assert_allclose(scores[query, :count], [both[p] for p in expected], rtol=1e-5)
        assert [hit.passage for hit in hits] == expected
        for hit in hits:
            assert hit.parts["plan"] == pytest.approx(plan.get(hit.passage, 0))
            assert hit.parts["passage_score"] == pytest.approx(student.get(hit.passage, 0))
            assert hit.tokens.any() == (hit.passage in student)


def test_a_plan_of_several_views_alone_and_of_some_passages(made, decoder):
    system, _ = planned_views(made, decoder, ranked_by="plan")
    queries = system.encode(made[0], TEXTS)
    blocks = [system.encode(made[0], part) for part in (TEXTS[:1], [], TEXTS[1:])]
    parts = zip(*system.passages_of_blocks(iter(blocks)), strict=True)
    for part, expected in zip(map(np.concatenate, parts), queries.planned, strict=True):
        np.testing.assert_array_equal(part[:, :3], expected)
    assert system.limits == {"planned": 3, "depth": 4} and system.query_length == 15
    some = system.restrict(np.array([False, True, True, False, False]))
    planned = some.encode(made[0], TEXTS).planned.passages
    assert set(planned.ravel().tolist()) == {-1, 1, 2}
    with pytest.raises(ValueError, match="Lexical.planned: got 6, expected at most 5, the passa"):
        PlannedViews.of(decoder, Lexical(planned=6, num_beams=3), system.planner)
    of_beams = PlannedViews.of(decoder, Lexical(num_beams=2), system.planner)
    assert of_beams.search.num_beams == 2 and of_beams.plan.planned == 5


def odd_collection(folder):
    """Passages as they come: without title, of one word, of 5,000, twice the same, not Latin; some
    without pseudo-queries."""
    subjects = ("bees", "glaciers", "owls", "salt", "kites", "tides", "bridges", "clocks")
    passages = [
        Passage(f"p{i}", f"Everything about {s} is told here, and why {s} matter to us.", s.title())
        for i, s in enumerate(subjects)
    ]
    passages += [
        Passage("untitled", "Volcanoes build islands out of the sea over many years.", ""),
        Passage("word", "Lighthouse", "One word"),
        Passage("long", " ".join(f"word{i % 97}" for i in range(5000)), "Long"),
        Passage("twin", passages[0].text, passages[0].title),
        Passage("han", "蜜蜂在蜂巢里酿造蜂蜜。它们跳舞指路。", "蜜蜂"),
        Passage("blank", "", ""),
    ]
    judged = [(f"q{i}", f"what should i know about {s}", f"p{i}") for i, s in enumerate(subjects)]
    judged.append(("q8", "how do islands come to be", "untitled"))
    judged.append(("q9", "蜜蜂在哪里酿造蜂蜜", "han"))
    queries = [Query(qid, text) for qid, text, _ in judged]
    qrels = [Qrel(qid, pid, 1) for qid, _, pid in judged]
    write_beir(folder, passages, queries, {"train": qrels, "test": qrels[:6]})
    (folder / "pseudo.tsv").write_text(
        "".join(f"p{i}\twhere can i read about {s}\n" for i, s in enumerate(subjects[:6]))
        + "p1\tWhat should I know about glaciers?\n",
        encoding="utf-8",
    )
    run = [f"q{i} Q0 p{j} 1 {8 - abs(i - j)} t" for i in range(8) for j in range(8)]
    (folder / "teacher.trec").write_text("\n".join(run) + "\n", encoding="utf-8")


@pytest.mark.slow
def test_an_experiment_on_an_odd_collection(command, tmp_path):
    """Whole, with a teacher that knows a part of the candidates: what is odd is counted."""
    data, folder = tmp_path / "data", tmp_path / "model"
    odd_collection(data)
    sizes = [flag for flag in TINY[1:] if "TfidfSvd" not in flag and "Residual" not in flag]
    made = command(
        "dgr_jax.train", "--gin_file=dgr.gin", *sizes, f"--data_dir={data}",
        f"--model_dir={folder}", "--gin.SentencePiece.size=200", "--gin.QUERY_LENGTH=16",
        "--gin.TRAIN_DEPTH=14", "--gin.TwoLists.depth=14", "--gin.TwoLists.negatives=1",
        "--gin.Experiment.control=False", "--gin.Candidates.keys=6",
        "--gin.Multiview.query_tokens=20", "--gin.TEACHER=@RunTeacher()",
        f"--gin.RunTeacher.path={data / 'teacher.trec'}", "--gin.MultiviewSearch.num_beams=4",
        f"--gin.Sources.pseudo_query_path={data / 'pseudo.tsv'}", "--gin.PLAN=@Lexical()",
    )  # fmt: skip
    report = json.loads((folder / "prepare" / "report.json").read_text())["identifiers"]
    assert report["named_passages"] == {"title": 12, "query": 6, "body": 13, "none": 1}
    assert report["query"]["copies_of_test_queries"] == 1 and report["query"]["pseudo_queries"] == 6
    assert report["title"]["passages_sharing_an_identifier"] == 2
    assert report["body"]["longest"] >= 5000 and report["body"]["passages_without_body"] == 1
    taught = json.loads((folder / "teach" / "report.json").read_text())
    assert taught["teacher"]["labelled"]["candidates_scored"] < 1
    assert taught["lists"]["positive_not_scored"] == 2  # q8 and q9, which the teacher does not know
    assert taught["keys"]["passages"] >= taught["keys"]["passages_without_keys"] > 0
    rows = taught["keys"]["packed_rows"]
    assert rows > 0 and f"rank lists: identifiers in {rows} rows of 64 tokens" in made.stderr
    measured = json.loads((folder / "evaluate" / "metrics.json").read_text())
    assert set(measured) == {"bm25", "generate", "distill", "planned"}
    ((best,),) = Retriever.load(folder).search(["everything about bees"], k=1)
    assert best.pid == "p0" and best.parts["plan"] > 0
    retriever = Retriever.load(folder, system="distill")
    (hits,) = retriever.search(["everything about bees"], k=3)
    assert 1 <= len(hits) <= 3 and all(hit.identifier for hit in hits)
    assert {hit.pid for hit in hits} <= set(retriever.store.pids) - {"blank"}
    assert [hit.score for hit in hits] == sorted((hit.score for hit in hits), reverse=True)
    done = command("dgr_jax.retrieve", f"--model_dir={folder}", "--query", "salt", "--k=2")
    assert "salt" in done.stdout


def test_titles_and_pseudo_queries_without_the_text(tmp_path):
    """No suffix array is made, and what spans would need is not asked for."""
    vocabulary, indexes, _, found = prepare(tmp_path, views=("title", "query"))
    assert indexes.text is None and not (tmp_path / "text").exists()
    assert vocabulary.views == ("title", "query") and set(indexes.views._makers(ViewMixture())) == {
        "title", "query",
    }  # fmt: skip
    assert indexes.num_tokens == found.report["body"]["tokens"] > 50
    assert "spans_begin_anywhere" not in found.report["body"]
    ranked = found_by(vocabulary, indexes)
    assert all(len(one.passages) for one in ranked)
    lists, counts = keyed(ranked, indexes), Counter()
    named = lists.of(np.arange(3), TEXTS, lists.passages, counts)
    assert named.tokens.any() and not named.spans.any()
    with pytest.raises(ValueError, match="got view 'body', expected title, query"):
        MultiviewIndex(None, indexes.tables, num_tokens=9).rank(
            [Written("body", *(np.zeros((1, 1, 1)),) * 4)]
        )
    with pytest.raises(ValueError, match="text: got None; expected num_tokens"):
        MultiviewIndex(None, indexes.tables)
