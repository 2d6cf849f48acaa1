"""The notebook on a real MODEL_DIR, and its tables on one written by hand."""

import base64
import html
import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import nbformat
import numpy as np
import pytest
from nbclient import NotebookClient

from dgr_jax.analysis import inspection
from dgr_jax.analysis.inspection import Inspection, Table
from dgr_jax.corpora import beir, store, trec
from dgr_jax.corpora.types import Passage, Qrel, Query, RankList, ScoredPassage
from dgr_jax.data.vocabulary import SentencePiece, Vocabulary
from dgr_jax.experiments.dense import Negatives
from dgr_jax.identifiers.table import IdentifierTable
from dgr_jax.models.initial import Corpus
from dgr_jax.retrieval.retriever import Hit
from tests import test_dense_experiment, test_experiment

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOK = ROOT / "notebooks" / "evaluation.ipynb"


def rows_of(shown):
    """The cells of a table's HTML, header first, as text."""
    return [
        [
            html.unescape(re.sub(r"</?b>", "", cell))
            for cell in re.findall(r"<t[hd].*?>(.*?)</t", row)
        ]
        for row in re.findall(r"<tr>(.*?)</tr>", shown)
    ]


# The notebook on the output of a real, short run.


@pytest.fixture(scope="session")
def executed(tiny_model_dir):
    """cell id -> outputs of the notebook after a run from top to bottom; a failing cell raises."""
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XLA_FLAGS", "--xla_backend_optimization_level=0")  # compiles fast
        patch.setenv("DGR_JAX_MODEL_DIR", str(tiny_model_dir))
        NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(ROOT)}}).execute()
    return {cell.id: cell for cell in notebook.cells if cell.cell_type == "code"}


def tables(cell):
    return [rows_of(o.data["text/html"]) for o in cell.outputs if "text/html" in o.get("data", {})]


@pytest.mark.slow
def test_every_cell_runs(executed):
    counts = [cell.execution_count for cell in executed.values()]
    assert counts == list(range(1, len(executed) + 1))
    assert not [o for cell in executed.values() for o in cell.outputs if o.output_type == "error"]


@pytest.mark.slow
def test_search_shows_passages_of_the_collection(executed, tiny_model_dir):
    (found,) = tables(executed["search"])
    assert found[0] == ["rank", "title", "score", "identifier", "snippet"]
    beams = json.loads((tiny_model_dir / "distill/student.json").read_text())["search"]["num_beams"]
    assert [row[0] for row in found[1:]] == [str(rank) for rank in range(1, min(beams, 10) + 1)]
    passages = {p.title: p for p in store.PassageStore(tiny_model_dir / "prepare/passages")}
    for _, title, score, identifier, snippet in found[1:]:
        assert passages[title].text.startswith(snippet.removesuffix(" ..."))
        assert float(score) < 0
        assert re.fullmatch(r"<\d+> <\d+> <\d+>", identifier)
    scores = [float(row[2]) for row in found[1:]]
    assert scores == sorted(scores, reverse=True)


@pytest.mark.slow
def test_measures_stages_and_plots_are_those_of_the_run(executed, tiny_model_dir):
    measured = json.loads((tiny_model_dir / "evaluate/metrics.json").read_text())
    shown = tables(executed["measures"])[0]
    assert [row[0] for row in shown[1:]] == ["bm25", "generate", "control", "distill"]
    for system, *values in shown[1:]:
        assert values == [f"{v:.3f}" for v in measured[system]["test"].values()]
    assert [row[2] for row in tables(executed["done"])[0][1:]] == ["done"] * (
        len(test_experiment.BASE.stages) + 1  # start
    )
    for name, cell in (("success_at_k", "success-plot"), ("training_curves", "training-plot")):
        (shown,) = executed[cell].outputs
        drawn = (tiny_model_dir / "evaluate" / f"{name}.png").read_bytes()
        assert base64.b64decode(shown.data["image/png"]) == drawn


@pytest.mark.slow
def test_wins_and_losses_are_those_of_the_runs(executed, tiny_model_dir):
    """Four tables: distill against generate and control, each with gains and losses."""
    evaluated = tiny_model_dir / "evaluate"
    judged = beir.BeirCollection(str(tiny_model_dir / "prepare" / "collection"))
    texts = {query.qid: query.text for query in judged.queries("test")}
    answers = {(q.qid, q.pid) for q in judged.qrels("test") if q.relevance == 2}

    def first(system):
        ranks = {}
        for line in (evaluated / f"{system}.test.trec").read_text().splitlines():
            qid, _, pid, rank, *_ = line.split()
            if (qid, pid) in answers:
                ranks[texts[qid]] = min(int(rank), ranks.get(texts[qid], 99))
        return ranks

    ranks = {s: first(s) for s in ("bm25", "generate", "control", "distill")}
    pairs = [("distill", "generate"), ("distill", "control")]
    pairs = [pair for a, b in pairs for pair in ((a, b), (b, a))]
    shown = [o.data["text/html"] for o in executed["wins"].outputs]
    assert len(shown) == 4
    for (a, b), table in zip(pairs, shown, strict=True):
        gained = [text for text, rank in ranks[a].items() if rank < ranks[b].get(text, 99)]
        assert f"test: {len(gained)} queries answered higher up by {a} than by {b}" in table
        rows = rows_of(table)[1:]
        assert len(rows) == min(len(gained), 10)
        for text, _, *found in rows:
            assert text in gained
            assert found == [str(ranks[system].get(text, "–")) for system in ranks]


# The tables on a MODEL_DIR written by hand.

TITLES = ("Ants", "Bees <b>", "", "Dogs")


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    """Four passages; three test queries with an answer, one with a related passage alone."""
    folder = tmp_path_factory.mktemp("by_hand")
    prepare, evaluate, teach = (folder / name for name in ("prepare", "evaluate", "teach"))
    passages = [
        Passage(f"p{i}", f"The text of passage {i} is a short one.", title)
        for i, title in enumerate(TITLES)
    ]
    store.write(passages, prepare / "passages")
    queries = [Query(f"q{i}", f"question {i}") for i in range(4)]
    qrels = [
        Qrel("q0", "p0", 2), Qrel("q1", "p2", 2), Qrel("q2", "p1", 2), Qrel("q2", "p3", 3),
        Qrel("q3", "p0", 1),
    ]  # fmt: skip
    beir.write_beir(prepare / "collection", (), queries, {"test": qrels})
    SentencePiece(size=64).write(prepare, [p.text for p in passages])
    vocabulary = Vocabulary.create(prepare)
    vocabulary.save()
    codes = vocabulary.first_code_id + np.array([[0, 1], [1, 0], [0, 0], [0, 2]])
    table = IdentifierTable.from_rows(codes.astype(np.int32), view="rq", num_code_tokens=3)
    table.save(prepare / "identifiers")
    write_json(
        prepare / "report.json",
        passages=4, queries={"test": 4}, qrels={"test": 5}, examples={"labelled": 1234},
        vocabulary={"text": 64, "size": 256}, identifiers=table.report(),
    )  # fmt: skip
    runs = {
        "generate": {"q0": ["p1", "p0"], "q1": ["p2"], "q2": ["p0", "p2"], "q3": ["p1"]},
        "distill": {"q0": ["p0", "p1"], "q1": ["p1", "p2"], "q2": ["p0", "p3", "p1"], "q3": ["p0"]},
    }
    for system, run in runs.items():
        lists = [
            RankList(qid, tuple(ScoredPassage(pid, -float(i)) for i, pid in enumerate(pids)))
            for qid, pids in run.items()
        ]
        evaluate.mkdir(exist_ok=True)
        trec.write_run(evaluate / f"{system}.test.trec", lists, tag="test")
    measured = {
        "generate": {"test": {"RR@10": 0.375, "nDCG@10": 0.5}},
        "distill": {"test": {"RR@10": 0.5, "nDCG@10": 0.5}},
    }
    write_json(evaluate / "metrics.json", **measured)
    compared = {
        "systems": "distill against generate", "measure": "RR@10", "mean_a": 0.5, "mean_b": 0.375,
        "difference": 0.125, "p_value": 0.0002, "wins": 2, "losses": 1, "ties": 1,
    }  # fmt: skip
    write_json(evaluate / "comparisons.json", test=[compared])
    settings = {"evaluate": {"min_relevance": 2}}
    write_json(evaluate / "stage.json", status="done", seconds=90.4, settings=settings)
    write_json(
        teach / "report.json", teacher={"labelled": {"candidates_scored": 0.25}}, lists={"lists": 7}
    )
    np.savez(
        teach / "rank_lists.npz",
        texts=np.array(["which animal barks?"]),
        passages=np.array([[3, 2, -1]], np.int32),
        teacher_scores=np.array([[5.5, 2.25, 0]], np.float32),
        positives=np.array([3], np.int32),
    )
    return folder


def write_json(path, **values):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(values), encoding="utf-8")


@pytest.fixture(scope="module")
def made(model_dir):
    return Inspection.load(model_dir)


def test_stages_are_those_of_the_experiment(made):
    base, teach = test_dense_experiment.BASE, test_dense_experiment.TEACH
    own = {"negatives": Negatives("bm25"), "refresh": base.train, "initial": Corpus()}
    dense = replace(base, teach=teach, **own)
    docids = test_experiment.BASE
    prepare = replace(docids.prepare, vocabulary=SentencePiece(extra_ids=100))
    docids = replace(docids, pretrain=docids.generate, prepare=prepare)
    assert sorted(inspection.STAGES) == sorted({*docids.stages, *dense.stages})
    table = made.stages()
    assert table.caption == "Stages: 1.5 minutes in all"
    assert [(stage, status, seconds) for stage, _, status, seconds in table.rows] == [
        ("evaluate", "done", 90)
    ]
    assert made.rivals == [("distill", "generate")]


def test_counts_of_the_collection(made):
    counts = dict(rows_of(made.collection()._repr_html_())[1:])
    assert counts["passages"] == "4"
    assert counts["examples: labelled"] == "1,234"


def test_use_of_codes_and_groups(made):
    assert dict(made.identifier_report().rows)["identifiers"] == 4
    assert [row[:3] for row in made.code_usage().rows] == [(1, 4, 2), (2, 4, 3)]
    # In the order of the identifiers: 0 0, 0 1, 0 2; an untitled passage shows its text.
    shared = "The text of passage 2 is a short one.; Ants; Dogs"
    assert made.groups().rows == [("<0>", 3, shared), ("<1>", 1, "Bees <b>")]
    assert made.groups(count=1, titles=2).rows == [("<0>", 3, shared.removesuffix("; Dogs"))]


def test_teacher_and_rank_lists(made):
    assert made.teacher().columns == ("what", "labelled")
    assert made.teacher().rows == [("candidates scored", 0.25)]
    assert made.rank_list_counts().rows == [("lists", 7)]
    (table,) = made.rank_lists(3)
    assert table.caption == "Rank list: which animal barks?"
    untitled = "The text of passage 2 is a short one."
    assert table.rows == [(1, "Dogs", 5.5, "yes"), (2, untitled, 2.25, "")]
    assert made.rank_lists(0) == []


def test_measures_with_the_best_in_bold(made):
    table = made.measures()
    assert table.columns == ("system", "RR@10", "nDCG@10")
    assert table.rows == [("generate", 0.375, 0.5), ("distill", 0.5, 0.5)]
    assert table.bold == {(1, 1), (0, 2), (1, 2)}
    assert "test: relevant from grade 2" in table._repr_html_()


def test_comparisons(made):
    assert rows_of(made.comparisons("test")._repr_html_())[1:] == [
        ["distill against generate", "RR@10", "0.500", "0.375", "0.125", "< 0.001", "2", "1", "1"]
    ]


def test_gains_are_ordered_by_reciprocal_rank(made):
    """q0 2 -> 1, q1 1 -> 2, q2 not found -> 2 by its second answer, q3 has no answer at grade 2."""
    gains = made.gains("distill", "generate")
    assert gains.caption == "test: 2 queries answered higher up by distill than by generate"
    assert gains.columns == ("query", "passage that answers it", "generate", "distill")
    assert gains.rows == [("question 0", "Ants", 2, 1), ("question 2", "Dogs", None, 2)]
    untitled = "The text of passage 2 is a short one."
    assert made.gains("generate", "distill").rows == [("question 1", untitled, 1, 2)]
    first = made.gains("distill", "generate", "test", count=1)
    assert first.caption.endswith("than by generate; largest gains first, 1 shown")
    assert first.rows == gains.rows[:1]
    assert "none" in made.gains("distill", "distill")._repr_html_()


def test_unknown_systems_and_splits_are_named(made):
    with pytest.raises(ValueError, match="system: got 'bm25', expected one of generate, distill"):
        made.gains("distill", "bm25")
    with pytest.raises(ValueError, match="split: got 'dev', expected one of test"):
        made.measures("dev")


def test_an_unfinished_experiment_is_told_apart_from_none(tmp_path):
    with pytest.raises(FileNotFoundError, match="found no stage; run python -m dgr_jax.train"):
        Inspection.load(tmp_path / "absent")
    write_json(tmp_path / "prepare" / "stage.json", status="done")
    write_json(tmp_path / "evaluate" / "stage.json", status="running")
    with pytest.raises(FileNotFoundError, match="found stages prepare, evaluate; run"):
        Inspection.load(tmp_path)


def test_an_experiment_that_measured_nothing(model_dir, tmp_path):
    folder = shutil.copytree(model_dir, tmp_path / "unlabelled")
    write_json(folder / "evaluate" / "metrics.json", bm25={}, generate={}, distill={})
    with pytest.raises(ValueError, match="nothing was measured, there was no test split"):
        Inspection.load(folder)._split(None)


def test_an_experiment_without_identifiers_or_teacher(model_dir, tmp_path):
    """Such as a dense retriever; and one with identifiers of several views."""
    folder = tmp_path / "dense"
    shutil.copytree(model_dir, folder)
    shutil.rmtree(folder / "teach")
    shutil.rmtree(folder / "prepare" / "identifiers")
    report = json.loads((folder / "prepare" / "report.json").read_text())
    del report["identifiers"]
    write_json(folder / "prepare" / "report.json", **report)
    write_json(folder / "evaluate" / "metrics.json", bm25={"test": {}}, dense={"test": {}})
    made = Inspection.load(folder)
    assert made.identifiers is None and made.rivals == [("dense", "bm25")]
    assert made.identifier_report().caption == "Identifiers: none"
    assert made.collection().rows and made.rank_lists() == []
    for table in (made.identifier_report(), made.code_usage(), made.groups(), made.teacher(),
                  made.rank_list_counts()):  # fmt: skip
        assert "none" in table._repr_html_()
    report["identifiers"] = {"title": {"view": "title", "identifiers": 3}, "body": {"tokens": 9}}
    write_json(folder / "prepare" / "report.json", **report)
    made = Inspection.load(folder)
    assert made.identifier_report().caption == "Identifiers: body, title"
    assert made.identifier_report().rows == [("title: identifiers", 3), ("body: tokens", 9)]
    assert made.groups().rows == ()


class Parrot:
    """A retriever with two beams that finds one passage again and again."""

    decoder = SimpleNamespace(most_passages=2)

    def search(self, queries, k):
        hit = Hit(1, "p", -0.0001, "Bees <i>", "Text & more " * 40, "<7> <1>")
        return [[replace(hit, rank=rank) for rank in range(1, k + 1)] for _ in queries]


def test_answers_are_no_more_than_the_beams():
    assert len(inspection.answers(Parrot(), "why?", 10).rows) == 2
    assert len(inspection.answers(Parrot(), "why?", 1).rows) == 1


def test_tables_escape_html_and_set_numbers_right():
    shown = inspection.answers(Parrot(), "a < b?", 1)._repr_html_()
    header, row = rows_of(shown)
    assert header == ["rank", "title", "score", "identifier", "snippet"]
    assert row[:4] == ["1", "Bees <i>", "0.000", "<7> <1>"]
    assert row[4].startswith("Text & more") and row[4].endswith(" ...") and len(row[4]) <= 160
    assert "a &lt; b?" in shown and "<i>" not in shown and "<7>" not in shown
    sides = re.findall(r"<td.*?text-align: (\w+)", shown)
    assert sides == ["right", "left", "right", "left", "left"]


def test_an_empty_table_says_so():
    assert Table("Use of codes", ("position",), ())._repr_html_().endswith("<p>none</p>")
