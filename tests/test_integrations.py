"""One contract for the retrievers of all toolkits; each is skipped where its package is missing."""

from __future__ import annotations

import importlib
import sys
from types import SimpleNamespace

import numpy as np
import pytest

from dgr_jax.corpora import store
from dgr_jax.corpora.types import Passage
from dgr_jax.integrations import answers, beir, mteb
from dgr_jax.retrieval.generative import Search
from dgr_jax.retrieval.retriever import Retriever
from tests import students
from tests.conftest import ROOT

PIDS = [f"p{n}" for n in range(12)]
TEXTS = ["0", "1", "2"]  # the stub of a vocabulary below reads a question's number


@pytest.fixture(scope="module")
def retriever(tmp_path_factory):
    """A student with random parameters, two passages of which share each identifier."""
    passages = [Passage(pid, f"text of {pid}", f"title of {pid}") for pid in PIDS]
    kept = store.write(passages, tmp_path_factory.mktemp("store") / "passages")
    queries = students.queries(3)
    vocabulary = SimpleNamespace(
        encode_inputs=lambda texts, _: queries[[int(text) for text in texts]],
        decode=lambda _: "",
    )
    rows = np.repeat(students.codes(6), 2, axis=0)
    search = Search(num_beams=8, depth=8, batch_size=4, query_length=8)
    return Retriever(students.decoder(rows, search), vocabulary, kept)


def of(toolkit: str, package: str):
    """Our module for a toolkit; the test is skipped where its package is not installed."""
    pytest.importorskip(package, reason=f"{package} is not installed (extra {toolkit!r})")
    return importlib.import_module(f"dgr_jax.integrations.{toolkit}")


def ask_pyterrier(retriever, text, k):
    frame = (
        of("pyterrier", "pyterrier").DgrRetriever(retriever, text=True, num_results=k).search(text)
    )
    return list(zip(frame["docno"], frame["score"], frame["text"], strict=True))


def ask_langchain(retriever, text, k):
    found = of("langchain", "langchain_core").DgrRetriever(source=retriever, k=k).invoke(text)
    return [(d.id, d.metadata["score"], d.page_content) for d in found]


def ask_llamaindex(retriever, text, k):
    found = of("llamaindex", "llama_index.core").DgrRetriever(retriever, k=k).retrieve(text)
    return [(n.node.node_id, n.score, n.node.get_content()) for n in found]


def ask_haystack(retriever, text, k):
    made = of("haystack", "haystack").DgrRetriever(retriever, top_k=k)
    return [(d.id, d.score, d.content) for d in made.run(text)["documents"]]


def scored(retriever, run):
    """Of pid -> score, as sorted by score."""
    texts = {passage.pid: passage.text for passage in retriever.store}
    ranked = sorted(run.items(), key=lambda item: -item[1])
    return [(pid, score, texts[pid]) for pid, score in ranked]


def ask_beir(retriever, text, k):
    run = beir.BeirSearch(retriever).search(dict.fromkeys(PIDS, {}), {"q": text}, k, "cos_sim")
    return scored(retriever, run["q"])


def ask_mteb(retriever, text, k):
    run = mteb.MtebSearch(retriever).search([{"id": "q", "text": text}], top_k=k)
    return scored(retriever, run["q"])


ASKED = [ask_pyterrier, ask_langchain, ask_llamaindex, ask_haystack, ask_beir, ask_mteb]


@pytest.mark.parametrize("ask", ASKED)
@pytest.mark.parametrize("k", [1, 3, 8])
def test_every_toolkit_finds_what_the_retriever_finds(ask, k, retriever):
    for text in TEXTS:
        hits = retriever.search([text], k=k)[0]
        found = ask(retriever, text, k)
        assert [(pid, text) for pid, _, text in found] == [(hit.pid, hit.text) for hit in hits]
        np.testing.assert_allclose([s for _, s, _ in found], [h.score for h in hits], atol=1e-4)


@pytest.mark.parametrize("ask", ASKED)
def test_where_few_passages_can_be_found_all_of_them_are_answers(ask, retriever):
    assert retriever.decoder.most_passages == 8 == len(answers.hits(retriever, "0", 10))
    found = ask(retriever, "0", 10)
    assert [pid for pid, *_ in found] == [hit.pid for hit in retriever.search(["0"])[0]]
    assert len(found) == 8


@pytest.mark.parametrize("ask", ASKED)
def test_a_number_of_passages_that_is_none(ask, retriever):
    with pytest.raises(
        ValueError, match="(k|num_results): got 0, expected a whole number of at le"
    ):
        ask(retriever, "0", 0)


@pytest.mark.parametrize("ask", [ask_langchain, ask_llamaindex, ask_haystack])
def test_nothing_is_found_for_a_blank_question(ask, retriever):
    assert ask(retriever, " ", 3) == []


@pytest.mark.parametrize(
    ("toolkit", "package"),
    [
        ("pyterrier", "PyTerrier"), ("langchain", "langchain-core"),
        ("llamaindex", "llama-index-core"), ("haystack", "haystack-ai"),
    ],
)  # fmt: skip
def test_a_toolkit_that_is_missing_is_named_with_the_extra(toolkit, package, monkeypatch):
    """MTEB's is needed for what it files results under alone, BEIR's for nothing."""
    for name in (
        "pyterrier",
        "langchain_core.callbacks",
        "llama_index.core.retrievers",
        "haystack",
    ):
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.delitem(sys.modules, f"dgr_jax.integrations.{toolkit}", raising=False)
    message = (
        rf"^dgr_jax.integrations.{toolkit} needs {package}: pip install 'dgr_jax\[{toolkit}\]'$"
    )
    with pytest.raises(ImportError, match=message):
        importlib.import_module(f"dgr_jax.integrations.{toolkit}")
    assert f'"{toolkit}": [' in (ROOT / "setup.py").read_text()


def test_mteb_that_is_missing_is_named_with_the_extra(retriever, monkeypatch):
    monkeypatch.setitem(sys.modules, "mteb.models", None)
    message = r"^dgr_jax.integrations.mteb needs MTEB: pip install 'dgr_jax\[mteb\]'$"
    with pytest.raises(ImportError, match=message):
        mteb.MtebSearch(retriever).mteb_model_meta  # noqa: B018


def test_settings_belong_to_a_model_dir(retriever, tmp_path):
    with pytest.raises(ValueError, match="depth: got settings with a retriever, expected them"):
        beir.BeirSearch(retriever, depth=3)
    with pytest.raises(FileNotFoundError, match="no trained student in"):
        beir.BeirSearch(tmp_path)


# Corpora


@pytest.mark.parametrize(
    ("pids", "message"),
    [
        (
            PIDS[1:],
            "of 11 passages, of which 0 are not in the index, and 1 of the index's 12 are m",
        ),
        ([*PIDS, "x"], "of 13 passages, of which 1, such as 'x', are not in the index, and 0 of"),
        (["x", *PIDS[2:]], "of 11 passages, of which 1, such as 'x', are .*, and 2 of the index"),
    ],
)
def test_another_corpus_is_refused(pids, message, retriever):
    with pytest.raises(ValueError, match=f"BeirSearch: got a corpus {message}"):
        beir.BeirSearch(retriever).search(dict.fromkeys(pids, {}), {"q": "0"}, 3)
    with pytest.raises(ValueError, match=f"MtebSearch: got a corpus {message}"):
        mteb.MtebSearch(retriever).index([{"id": pid, "text": ""} for pid in pids])
    answers.check_corpus(retriever, PIDS[::-1], "any order")


# PyTerrier


@pytest.fixture
def pyterrier(retriever):
    module = of("pyterrier", "pyterrier")
    return SimpleNamespace(
        pt=importlib.import_module("pyterrier"), pd=importlib.import_module("pandas"),
        retriever=module.DgrRetriever(retriever),
    )  # fmt: skip


def test_frames_keep_their_columns(pyterrier, retriever):
    frame = pyterrier.pd.DataFrame([["a", "0", 1], ["b", "1", 2]], columns=["qid", "query", "mine"])
    found = pyterrier.retriever(frame)
    assert list(found.columns) == ["qid", "query", "mine", "docno", "docid", "score", "rank"]
    run = retriever.run({"a": "0", "b": "1"})
    for qid, mine in (("a", 1), ("b", 2)):
        rows = found[found["qid"] == qid]
        assert rows["docno"].tolist() == [p.pid for p in run[qid]]
        assert rows["rank"].tolist() == list(range(8))
        assert set(rows["mine"]) == {mine}
        assert rows["score"].is_monotonic_decreasing
        assert [retriever.store.pids[row] for row in rows["docid"]] == rows["docno"].tolist()


def test_empty_frames_have_the_columns_of_others(pyterrier):
    frame = pyterrier.pd.DataFrame(columns=["qid", "query"])
    assert list(pyterrier.retriever(frame).columns) == list(pyterrier.retriever.search("0").columns)
    assert len(pyterrier.retriever(frame)) == 0
    frame = pyterrier.pd.DataFrame(columns=["qid", "query", "docno"])
    assert len(pyterrier.retriever(frame)) == 0
    with pytest.raises(KeyError, match="does not match required columns"):
        pyterrier.retriever(pyterrier.pd.DataFrame(columns=["qid"]))


def test_frames_with_docno_are_reranked(pyterrier, retriever):
    rows = [["a", "0", "p5", "x", 9.0], ["a", "0", "p0", "y", 8.0], ["b", "2", "p3", "z", 7.0]]
    frame = pyterrier.pd.DataFrame(rows, columns=["qid", "query", "docno", "mine", "score"])
    found = pyterrier.retriever(frame)
    expected = retriever.rerank(
        {"a": "0", "b": "2"},
        {"a": [answers.ScoredPassage("p5", 0), answers.ScoredPassage("p0", 0)],
         "b": [answers.ScoredPassage("p3", 0)]},
    )  # fmt: skip
    assert found["docno"].tolist() == [p.pid for qid in "ab" for p in expected[qid]]
    assert found["score"].tolist() == [p.score for qid in "ab" for p in expected[qid]]
    assert found["rank"].tolist() == [0, 1, 0]
    mine = dict(zip(found["docno"], found["mine"], strict=True))
    assert mine == {"p5": "x", "p0": "y", "p3": "z"}
    assert len((pyterrier.retriever % 1)(frame)) == 2


def test_pipelines(pyterrier):
    pt, retriever = pyterrier.pt, pyterrier.retriever
    cut = (retriever % 3).compile()
    assert type(cut) is type(retriever) and cut.num_results == 3
    assert retriever.fuse_rank_cutoff(3).fuse_rank_cutoff(5).num_results == 3
    assert cut.search("0")["docno"].tolist() == retriever.search("0")["docno"].tolist()[:3]
    frame = pyterrier.pd.DataFrame([["a", "0"], ["b", "1"]], columns=["qid", "query"])
    again = (retriever % 4 >> retriever)(frame)
    assert sorted(again["docno"]) == sorted((retriever % 4)(frame)["docno"])
    doubled = (retriever + retriever)(frame).set_index(["qid", "docno"])["score"]
    once = retriever(frame).set_index(["qid", "docno"])["score"]
    assert doubled.to_dict() == pytest.approx((2 * once).to_dict())
    features = (retriever >> (retriever**retriever))(frame)["features"]
    assert {len(row) for row in features} == {2}
    words = pt.Transformer.from_df(
        pyterrier.pd.DataFrame(
            [["a", "p3", 1.0], ["b", "p4", 2.0]], columns=["qid", "docno", "score"]
        )
    )
    table = pt.Experiment(
        [retriever, words >> retriever],
        frame,
        pyterrier.pd.DataFrame([["a", "p0", 1], ["b", "p1", 1]], columns=["qid", "docno", "label"]),
        ["recip_rank", "num_q"],
        names=["all", "reranked"],
    )
    assert table["name"].tolist() == ["all", "reranked"] and (table["num_q"] == 2).all()


# MTEB and BEIR, the packages themselves


def test_beir_evaluates_it(retriever):
    pytest.importorskip("beir")
    from beir.retrieval.evaluation import EvaluateRetrieval

    evaluation = EvaluateRetrieval(beir.BeirSearch(retriever), k_values=[1, 5])
    queries = {f"q{text}": text for text in TEXTS}
    found = evaluation.retrieve({pid: {"title": "", "text": ""} for pid in PIDS}, queries)
    assert {len(passages) for passages in found.values()} == {5}
    best = {qid: {max(run, key=run.get): 1} for qid, run in found.items()}
    assert evaluation.evaluate(best, found, [1, 5])[0]["NDCG@1"] == 1.0


def test_mteb_knows_it_and_what_it_is(retriever):
    pytest.importorskip("mteb")
    from mteb.models.models_protocols import EncoderProtocol, SearchProtocol

    search = mteb.MtebSearch(retriever, name="me/bees", revision="1", training_datasets=["X"])
    assert isinstance(search, SearchProtocol) and not isinstance(search, EncoderProtocol)
    meta = search.mteb_model_meta
    assert (meta.name, meta.revision, meta.framework) == ("me/bees", "1", ["JAX"])
    parameters = retriever.decoder.describe()["parameters"]
    assert meta.n_parameters == parameters > 0
    assert meta.memory_usage_mb == parameters * 4 / 2**20
    assert (meta.max_tokens, meta.model_type, meta.training_datasets) == (8, [], {"X"})


def test_mteb_evaluates_it_on_a_task(retriever, tmp_path):
    package = pytest.importorskip("mteb")
    from datasets import Dataset
    from mteb.abstasks.retrieval import AbsTaskRetrieval
    from mteb.abstasks.retrieval_dataset_loaders import RetrievalSplitData
    from mteb.abstasks.task_metadata import TaskMetadata

    search = mteb.MtebSearch(retriever, name="me/bees", revision="1")
    best = {text: retriever.search([text], k=1)[0][0].pid for text in TEXTS}

    class Small(AbsTaskRetrieval):
        metadata = TaskMetadata(
            name="Small", description="made here", type="Retrieval", category="t2t",
            modalities=["text"], eval_splits=["test"], eval_langs=["eng-Latn"],
            main_score="ndcg_at_10", dataset={"path": "none", "revision": "1"}, reference=None,
            date=None, domains=None, task_subtypes=None, license=None, annotations_creators=None,
            dialect=None, sample_creation=None, bibtex_citation=None,
        )  # fmt: skip

        def load_data(self, **ignored):
            corpus = [{"id": p.pid, "title": p.title, "text": p.text} for p in retriever.store]
            self.dataset = {
                "default": {
                    "test": RetrievalSplitData(
                        corpus=Dataset.from_list(corpus),
                        queries=Dataset.from_list([{"id": f"q{t}", "text": t} for t in TEXTS]),
                        relevant_docs={f"q{t}": {best[t]: 1} for t in TEXTS},
                        top_ranked=None,
                    )
                }
            }
            self.data_loaded = True

    result = package.evaluate(search, Small(), cache=None, co2_tracker=False)
    (scores,) = result.task_results[0].scores["test"]
    assert scores["ndcg_at_10"] == 1.0
    assert scores["recall_at_5"] == 1.0


def test_mteb_reranks_what_is_given(retriever):
    search = mteb.MtebSearch(retriever)
    queries = [{"id": "a", "text": "0"}, {"id": "b", "text": "1"}]
    found = search.search(queries, top_k=2, top_ranked={"a": ["p5", "p0", "p1"]})
    assert found["b"] == {}
    listed = [answers.ScoredPassage(pid, 0) for pid in ("p5", "p0", "p1")]
    expected = retriever.rerank({"a": "0"}, {"a": listed})["a"][:2]
    assert found["a"] == {p.pid: p.score for p in expected}


# Haystack


def test_haystack_filters_and_pipelines(retriever):
    module = of("haystack", "haystack")
    from haystack import Pipeline

    made = module.DgrRetriever(retriever, top_k=3)
    only = {"field": "meta.title", "operator": "in", "value": ["title of p3", "title of p4"]}
    assert {d.id for d in made.run("0", filters=only)["documents"]} <= {"p3", "p4"}
    none = {"field": "meta.title", "operator": "==", "value": "x"}
    assert made.run("0", filters=none) == {"documents": []}
    pipeline = Pipeline()
    pipeline.add_component("retriever", made)
    documents = pipeline.run({"retriever": {"query": "0"}})["retriever"]["documents"]
    assert [d.id for d in documents] == [hit.pid for hit in retriever.search(["0"], k=3)[0]]
    with pytest.raises(ValueError, match="got a Retriever to save, expected one of a MODEL_DIR"):
        made.to_dict()


def test_haystack_pipelines_are_saved(monkeypatch, retriever):
    module = of("haystack", "haystack")
    monkeypatch.setattr(Retriever, "load", lambda source, **settings: retriever)
    made = module.DgrRetriever("MODEL_DIR", top_k=3, depth=4)
    again = module.DgrRetriever.from_dict(made.to_dict())
    assert (again.source, again.top_k, again.settings) == ("MODEL_DIR", 3, {"depth": 4})
