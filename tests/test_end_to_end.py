"""The one command, whole: what it writes, that it can be repeated, killed, moved and installed."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from collections import Counter
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from matplotlib import image

from dgr_jax import evaluate, retrieve
from dgr_jax.analysis.inspection import Inspection
from dgr_jax.checkpoints import restore_params
from dgr_jax.config import cli
from dgr_jax.corpora import trec
from dgr_jax.corpora.beir import BeirCollection
from dgr_jax.corpora.quickstart import QuickstartCollection
from dgr_jax.models.initial import Corpus
from dgr_jax.models.t5 import Transformer
from dgr_jax.partitioning import abstract_params, make_mesh
from dgr_jax.retrieval.retriever import Retriever
from dgr_jax.stages.prepared import Prepared
from tests import test_experiment
from tests.conftest import ROOT, TINY

SYSTEMS = ("bm25", "generate", "control", "distill")
STUDENTS = SYSTEMS[1:]
STAGES = dataclasses.replace(test_experiment.BASE, initial=Corpus()).stages
MEASURES = ["Success@1", "Success@5", "Success@10", "RR@10", "nDCG@10"]
QUERIES, DEPTH = 12, 8


@pytest.fixture(scope="module")
def retriever(tiny_model_dir):
    return Retriever.load(tiny_model_dir)


@pytest.fixture
def copy(tiny_model_dir, tmp_path):
    """The finished experiment, to be changed."""
    return shutil.copytree(tiny_model_dir, tmp_path / "copy")


def metrics(folder: Path) -> dict:
    return json.loads((folder / "evaluate" / "metrics.json").read_text())


def run_of(folder: Path, system: str):
    return {
        ranked.qid: ranked.passages for ranked in trec.runs(folder / f"evaluate/{system}.test.trec")
    }


def params(folder: Path, system: str) -> dict[str, np.ndarray]:
    """Every trained parameter by its path."""
    described = json.loads((folder / system / "student.json").read_text())
    model = Transformer(Retriever.load(folder, system=system).decoder.config)
    assert described["model"]["emb_dim"] == 16
    mesh = make_mesh(devices=jax.devices()[:1])
    found = restore_params(folder / system / "checkpoints", abstract_params(model, mesh))
    leaves = jax.tree_util.tree_leaves_with_path(found)
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves}


def assert_same_params(a: Path, b: Path, system: str) -> None:
    first, second = params(a, system), params(b, system)
    assert first.keys() == second.keys()
    for name in first:
        np.testing.assert_array_equal(first[name], second[name], err_msg=name)


# what a run writes


def test_measures_of_every_system_split_and_name(tiny_model_dir):
    found = metrics(tiny_model_dir)
    assert list(found) == list(SYSTEMS)
    for by_split in found.values():
        assert list(by_split) == ["test"]
        assert list(by_split["test"]) == MEASURES
        assert all(0 <= value <= 1 for value in by_split["test"].values())
    assert found["bm25"]["test"]["Success@5"] > 0.5


@pytest.mark.parametrize("system", SYSTEMS)
def test_measures_are_those_of_the_runs(tiny_model_dir, system):
    positives: dict[str, set[str]] = {}
    for qrel in QuickstartCollection().qrels("test"):
        if qrel.relevance >= 2:
            positives.setdefault(qrel.qid, set()).add(qrel.pid)
    run, found = run_of(tiny_model_dir, system), metrics(tiny_model_dir)[system]["test"]
    ranks = [
        next((n for n, p in enumerate(listed, 1) if p.pid in positives[qid]), None)
        for qid, listed in run.items()
    ]
    assert len(ranks) == QUERIES
    for k in (1, 5, 10):
        assert found[f"Success@{k}"] == pytest.approx(np.mean([bool(r and r <= k) for r in ranks]))
    assert found["RR@10"] == pytest.approx(np.mean([1 / r if r else 0 for r in ranks]))


@pytest.mark.parametrize("system", SYSTEMS)
def test_runs_are_legal(tiny_model_dir, system):
    pids = {passage.pid for passage in QuickstartCollection().passages()}
    qids = {query.qid for query in QuickstartCollection().queries("test")}
    lines: dict[str, list[list[str]]] = {}
    for line in (tiny_model_dir / f"evaluate/{system}.test.trec").read_text().splitlines():
        qid, q0, _, _, _, tag = line.split(" ")
        assert (q0, tag) == ("Q0", f"dgr_jax-{system}")
        lines.setdefault(qid, []).append(line.split(" "))
    assert len(lines) == QUERIES
    assert lines.keys() <= qids
    for rows in lines.values():
        found = [row[2] for row in rows]
        assert set(found) <= pids
        assert len(set(found)) == len(found)
        assert [int(row[3]) for row in rows] == list(range(1, len(rows) + 1))
        scores = [float(row[4]) for row in rows]
        assert scores == sorted(scores, reverse=True)
        assert np.isfinite(scores).all()
        if system != "bm25":  # beams as many as the depth, and one passage an identifier
            assert len(rows) == DEPTH
            assert max(scores) < 0


def test_students_were_evaluated_on_the_same_queries(tiny_model_dir):
    runs = [run_of(tiny_model_dir, system) for system in SYSTEMS]
    assert all(run.keys() == runs[0].keys() for run in runs)
    assert run_of(tiny_model_dir, "distill") != run_of(tiny_model_dir, "generate")


def test_comparisons(tiny_model_dir):
    found = json.loads((tiny_model_dir / "evaluate/comparisons.json").read_text())["test"]
    measured = metrics(tiny_model_dir)
    assert {row["systems"].split(" against ")[1] for row in found} == {
        "generate",
        "control",
        "bm25",
    }
    for row in found:
        first, second = row["systems"].split(" against ")
        if row["measure"] in MEASURES:
            assert row["mean_a"] == pytest.approx(measured[first]["test"][row["measure"]])
            assert row["mean_b"] == pytest.approx(measured[second]["test"][row["measure"]])
        assert 0 < row["p_value"] <= 1


@pytest.mark.parametrize("name", ["success_at_k.png", "training_curves.png"])
def test_plots_are_images(tiny_model_dir, name):
    pixels = image.imread(tiny_model_dir / "evaluate" / name)
    assert min(pixels.shape[:2]) > 100
    levels = (255 * pixels).round().astype(np.int64)
    assert len(np.unique(levels @ 256 ** np.arange(pixels.shape[-1]))) > 10  # colours


def test_the_table_is_printed(tiny_run):
    for words in (*SYSTEMS, "Success@1", "RR@10", "p = "):
        assert words in tiny_run.log


def test_stages_say_what_they_do_in_order(tiny_run):
    said = re.findall(r"^(\w+): (started|done in [\d.]+ s)$", tiny_run.log, re.MULTILINE)
    assert [stage for stage, words in said if words == "started"] == list(STAGES)
    assert [stage for stage, words in said if words != "started"] == list(STAGES)


def test_step_and_decode_compile_once(tiny_run):
    """One step for each training, and one search for all students and both stages that search."""
    events = re.findall(
        r"^(?:(\w+): started$|Finished XLA compilation of jit\((step|decode)\))",
        tiny_run.log,
        re.MULTILINE,
    )
    stage, compiled = "", []
    for started, function in events:
        stage = started or stage
        if function:
            compiled.append((stage, function))
    assert compiled == [
        ("generate", "step"),
        ("candidates", "decode"),
        ("distill", "step"),
        ("control", "step"),
    ]


def test_distillation_and_control_have_the_same_examples_and_steps(tiny_model_dir):
    for system, first, last in (("generate", 2, 6), ("control", 2, 3), ("distill", 2, 3)):
        rows = (tiny_model_dir / system / "metrics.jsonl").read_text().splitlines()
        steps = [json.loads(row)["step"] for row in rows]
        assert (steps[0], steps[-1]) == (first, last)


def test_queries_that_are_cut_are_counted(tiny_run):
    report = json.loads((tiny_run.folder / "prepare/report.json").read_text())
    vocabulary = Prepared.load(tiny_run.folder).vocabulary
    for split, of in (("train", 1440), ("test", 240)):
        texts = [query.text for query in QuickstartCollection().queries(split)]
        whole = vocabulary.encode_inputs(texts, 100)
        cut = int((whole[:, 12:] > 0).any(1).sum())
        assert 0 < cut == report["queries_cut"][split]
        said = f"prepare: {cut:,} of {of:,} {split} queries are longer than 12 tokens and are cut"
        assert said in tiny_run.log


def test_nothing_is_said_by_libraries(tiny_run):
    """But by JAX, which was asked to; older ones say it twice."""
    for line in tiny_run.log.splitlines():
        if re.match(r"WARNING:[\d :,-]+jax\._src\.", line):
            continue
        assert not re.match(r"WARNING|[IWE]\d{4} ", line)
        assert "absl" not in line and "Metadata file" not in line


def test_reports(tiny_model_dir):
    prepared = json.loads((tiny_model_dir / "prepare/report.json").read_text())
    assert prepared["passages"] == 240
    assert prepared["queries"] == {"train": 1440, "test": 240}
    assert prepared["identifiers"]["passages_sharing_an_identifier"] == 0
    taught = json.loads((tiny_model_dir / "teach/report.json").read_text())
    assert taught["lists"]["queries"] == 48
    for source in ("labelled", "passages", "pseudo_queries"):
        assert taught["teacher"][source]["queries"] == 16
        assert taught["teacher"][source]["Success@1"] >= 0.5


def test_the_notebook_reads_the_reports(tiny_model_dir):
    made = Inspection.load(tiny_model_dir)
    taught = json.loads((tiny_model_dir / "teach/report.json").read_text())["teacher"]
    shown = made.teacher()
    assert shown.columns == ("what", "labelled", "passages", "pseudo queries")
    assert [row[1:] for row in shown.rows] == [
        tuple(found[name] for found in taught.values()) for name in taught["labelled"]
    ]
    for table in (shown, made.rank_list_counts(), made.stages(), made.collection(),
                  made.identifier_report(), made.code_usage(), made.groups(), made.measures(),
                  made.comparisons(), *made.rank_lists(2)):  # fmt: skip
        assert table.rows and "<td" in table._repr_html_()


# search


def test_rank_lists_of_every_source_hold_what_they_ask_for(tiny_model_dir):
    made = Prepared.load(tiny_model_dir)
    with np.load(tiny_model_dir / "teach" / "rank_lists.npz") as stored:
        lists = dict(stored)
    qids = [str(qid) for qid in lists["qids"]]
    asked = Counter(qid.partition(":")[0] if ":" in qid else "labelled" for qid in qids)
    assert asked == {"labelled": 16, "passages": 16, "pseudo_queries": 16}
    judged, queries = made.qrels("train"), made.queries("train")
    for qid, text, listed, positive in zip(
        qids, lists["texts"], lists["passages"], lists["positives"], strict=True
    ):
        assert positive in listed
        passage = made.store[positive]
        if ":" in qid:  # a sentence or chunk of its passage
            of_passage = set(f"{passage.title} {passage.text}".lower().split())
            asked = set(str(text).lower().split())
            assert len(asked - of_passage) <= 1  # the last word may be cut
        else:
            assert judged[qid][passage.pid] == 2
            assert text == queries[qid].text


def test_search(retriever, tiny_model_dir):
    (hits,) = retriever.search(["Why do bees dance?"], k=5)
    assert [hit.rank for hit in hits] == [1, 2, 3, 4, 5]
    passages = {passage.pid: passage for passage in QuickstartCollection().passages()}
    for hit in hits:
        assert (hit.title, hit.text) == (passages[hit.pid].title, passages[hit.pid].text)


@pytest.mark.slow
def test_every_identifier_found_is_legal_and_has_its_log_probability(retriever):
    """The beams of the compiled search against the model read once, as in training."""
    decoder = retriever.decoder
    queries = ["Why do bees dance?", "Who built the wall?", "x"]
    tokens = retriever.vocabulary.encode_inputs(queries, decoder.search.query_length)
    found, scores = decoder.passages(tokens)
    rows = decoder.table.rows_of_passages()[found]
    assert (found >= 0).all()
    targets = np.asarray(decoder.table.tokens)[rows]
    assert (decoder.table.lookup(targets) == rows).all()
    shifted = np.pad(targets, [(0, 0), (0, 0), (1, 0)])[..., :-1]
    logits = Transformer(decoder.config).apply(
        {"params": decoder.params}, jnp.asarray(tokens), jnp.asarray(shifted)
    )
    log_probs = np.asarray(jax.nn.log_softmax(logits.astype(jnp.float32)))
    each = np.take_along_axis(log_probs, targets[..., None], -1)[..., 0]
    np.testing.assert_allclose(scores, (each * (targets > 0)).sum(-1), rtol=1e-4)


def test_retrieve_answers_and_writes_runs(tiny_model_dir, tmp_path, capsys, monkeypatch):
    """The run of the command is that of the evaluation."""
    monkeypatch.setattr(cli, "_configure_logging", lambda verbose: None)
    expected = run_of(tiny_model_dir, "distill")
    texts = {query.qid: query.text for query in QuickstartCollection().queries("test")}
    queries, output = tmp_path / "queries.tsv", tmp_path / "out.trec.gz"
    queries.write_text("".join(f"{qid}\t{texts[qid]}\n" for qid in expected))
    retrieve.command([
        f"--model_dir={tiny_model_dir}", "--query=Why do bees dance?", f"--queries={queries}",
        f"--output={output}", f"--k={DEPTH}",
    ])  # fmt: skip
    printed = capsys.readouterr().out
    assert "Why do bees dance?" in printed
    assert len(re.findall(r"^ +\d+\. ", printed, re.MULTILINE)) == DEPTH
    found = {ranked.qid: ranked.passages for ranked in trec.runs(output)}
    assert found.keys() == expected.keys()
    for qid, listed in expected.items():
        assert [p.pid for p in found[qid]] == [p.pid for p in listed]
        scores = [[p.score for p in passages] for passages in (found[qid], listed)]
        np.testing.assert_allclose(scores[0], scores[1], rtol=1e-5)


def test_evaluate_measures_any_run(tiny_model_dir, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(cli, "_configure_logging", lambda verbose: None)
    monkeypatch.setenv("COLUMNS", "200")
    run = tiny_model_dir / "evaluate/bm25.test.trec"
    qids = run_of(tiny_model_dir, "bm25")
    lines = (tiny_model_dir / "prepare/collection/qrels/test.tsv").read_text().splitlines()
    qrels = tmp_path / "qrels.tsv"
    kept = [line for line in lines[1:] if line.split("\t")[0] in qids]
    qrels.write_text("\n".join([lines[0], *kept]) + "\n")
    evaluate.command([f"--run={run}", f"--qrels={qrels}", "--min_relevance=2"])
    printed = capsys.readouterr().out
    found = metrics(tiny_model_dir)["bm25"]["test"]
    assert "bm25.test.trec" in printed
    for name in ("Success@1", "Success@5", "RR@10"):
        assert name in printed
        assert f"{found[name]:.3f}" in printed


# again


def test_a_second_run_makes_nothing(command, copy):
    before = {
        path: path.stat().st_mtime_ns for path in copy.rglob("*") if path.name != "config.gin"
    }
    done = command("dgr_jax.train", f"--model_dir={copy}")
    assert done.stderr.splitlines() == [
        f"{stage}: done already, from the same configuration; skipped" for stage in STAGES
    ]
    after = {path: path.stat().st_mtime_ns for path in copy.rglob("*") if path.name != "config.gin"}
    assert {p: t for p, t in after.items() if p != copy} == {
        p: t for p, t in before.items() if p != copy
    }


@pytest.mark.slow
def test_a_changed_setting_reruns_what_depends_on_it(command, copy):
    done = command("dgr_jax.train", f"--model_dir={copy}", "--gin.TopM.size=3")
    said = re.findall(r"^(\w+): (started|done already)", done.stderr, re.MULTILINE)
    assert said == [
        ("prepare", "done already"), ("start", "done already"), ("generate", "done already"),
         ("candidates", "done already"),
        ("teach", "started"), ("distill", "started"), ("control", "done already"),
        ("evaluate", "started"),
    ]  # fmt: skip
    assert "teach: settings changed (teach.lists.size); made again" in done.stderr


@pytest.mark.slow
def test_the_same_seed_gives_the_same_model_and_measures(command, tiny_model_dir, tmp_path):
    again = tmp_path / "again"
    command("dgr_jax.train", *TINY, f"--model_dir={again}")
    assert metrics(again) == metrics(tiny_model_dir)
    for system in STUDENTS:
        assert_same_params(again, tiny_model_dir, system)
    for system in SYSTEMS:
        name = f"evaluate/{system}.test.trec"
        assert (again / name).read_text() == (tiny_model_dir / name).read_text()


@pytest.mark.slow
def test_a_killed_training_ends_where_an_uninterrupted_one_does(command, tiny_model_dir, tmp_path):
    steps, every = 400, 50
    settings = ("--stages=generate", f"--gin.GENERATE_STEPS={steps}",
                f"--gin.Training.checkpoint_every={every}")  # fmt: skip
    folders = []
    for name in ("whole", "killed"):
        folders.append(tmp_path / name)
        (tmp_path / name).mkdir()
        shutil.copytree(tiny_model_dir / "prepare", tmp_path / name / "prepare")
    whole, killed = folders
    command("dgr_jax.train", *TINY, *settings, f"--model_dir={whole}")
    kill_when_there(
        killed / "generate" / "checkpoints" / str(every),
        "dgr_jax.train", *TINY, *settings, f"--model_dir={killed}",
    )  # fmt: skip
    assert json.loads((killed / "generate/stage.json").read_text())["status"] == "running"
    assert not (killed / "generate/student.json").exists()
    done = command("dgr_jax.train", *TINY, *settings, f"--model_dir={killed}")
    assert "generate: was cut off; goes on" in done.stderr
    gone_on = int(re.search(r"generate: goes on from step (\d+) of 400", done.stderr)[1])
    assert every <= gone_on < steps
    assert_same_params(killed, whole, "generate")


@pytest.mark.slow
def test_an_interrupted_training_ends_where_an_uninterrupted_one_does(
    command, tiny_model_dir, tmp_path
):
    """Ctrl-C at random moments: exit status 130, a line how to go on, and nothing else changes."""
    settings = (*TINY, "--stages=generate", "--gin.GENERATE_STEPS=200",
                "--gin.Training.checkpoint_every=50")  # fmt: skip
    whole, interrupted = tmp_path / "whole", tmp_path / "interrupted"
    for folder in (whole, interrupted):
        folder.mkdir()
        shutil.copytree(tiny_model_dir / "prepare", folder / "prepare")
    start = time.monotonic()
    command("dgr_jax.train", *settings, f"--model_dir={whole}")
    longest, random = time.monotonic() - start, np.random.default_rng(0)
    saved = 0
    for _ in range(8):
        process = started("dgr_jax.train", *settings, f"--model_dir={interrupted}")
        try:
            process.wait(random.uniform(0.3, 1.0) * longest)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGINT)
        said = process.communicate()[0]
        if process.returncode == 0:
            break
        assert process.returncode == 130, said
        assert re.search(
            r"(interrupted(: saved step \d+)?|at its end); the same command goes on", said
        ), said
        assert "Traceback" not in said and "Exception" not in said
        saved += "interrupted: saved step" in said
    done = command("dgr_jax.train", *settings, f"--model_dir={interrupted}")
    assert not saved or "generate: goes on from step" in done.stderr + said
    assert_same_params(interrupted, whole, "generate")


def started(*arguments: str) -> subprocess.Popen:
    """`python -m ARGUMENTS`, all that it says in stdout."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    environment["XLA_FLAGS"] = "--xla_backend_optimization_level=0"
    return subprocess.Popen(
        [sys.executable, "-m", *arguments],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def kill_when_there(path: Path, *arguments: str) -> None:
    """Start `python -m ARGUMENTS` and kill it as soon as a path exists."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    environment["XLA_FLAGS"] = "--xla_backend_optimization_level=0"
    process = subprocess.Popen(
        [sys.executable, "-m", *arguments],
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        deadline = time.monotonic() + 300
        while not path.exists():
            assert process.poll() is None, "ended before it could be killed"
            assert time.monotonic() < deadline
            time.sleep(0.002)
    finally:
        process.kill()
    assert process.wait() == -signal.SIGKILL


# elsewhere


@pytest.mark.slow
def test_an_export_trains_the_same_model_without_tensorflow(
    command, copy, tiny_model_dir, tmp_path
):
    away = tmp_path / "away"
    done = command("dgr_jax.prepare", f"--model_dir={copy}", f"--export={away}")
    assert "exported to" in done.stderr
    assert sorted(path.name for path in away.iterdir()) == ["config.gin", "prepare"]
    assert not (away / "prepare" / "tfds").exists()
    shutil.rmtree(copy)
    blocked = tmp_path / "blocked"
    blocked.mkdir()
    names = ("tensorflow", "seqio", "tensorflow_datasets", "tensorboard", "clu")
    (blocked / "sitecustomize.py").write_text(
        "import sys\n" + "".join(f"sys.modules[{name!r}] = None\n" for name in names)
    )
    env = {"PYTHONPATH": f"{blocked}{os.pathsep}{ROOT}"}
    done = command("dgr_jax.train", f"--model_dir={away}", env=env)
    assert "no TensorBoard summaries (import of t" in done.stderr  # the block holds
    assert "prepare: done already" in done.stderr
    for system in STUDENTS:
        assert_same_params(away, tiny_model_dir, system)
    assert metrics(away) == metrics(tiny_model_dir)
    assert not (away / "generate" / "tensorboard").exists()


def test_an_export_does_not_overwrite(copy, tiny_model_dir, capsys, monkeypatch):
    monkeypatch.setattr(cli, "_configure_logging", lambda verbose: None)
    from dgr_jax import prepare

    with pytest.raises(SystemExit, match="2"):
        cli.main(lambda _: prepare.command([f"--model_dir={copy}", f"--export={copy}"]))
    assert f"error: --export={copy}: there is an experiment already" in capsys.readouterr().err


def small_collection():
    """Sixty passages of the embedded collection, their queries and judgements by split."""
    collection = QuickstartCollection()
    passages = list(collection.passages())[:60]
    pids = {passage.pid for passage in passages}
    qrels = {
        split: [q for q in collection.qrels(split) if q.pid in pids and q.relevance == 2]
        for split in ("train", "test")
    }
    texts = {query.qid: query for query in collection.all_queries()}
    queries = {split: [texts[q.qid] for q in judged] for split, judged in qrels.items()}
    return passages, queries, qrels


def write_msmarco(folder: Path) -> None:
    passages, queries, qrels = small_collection()
    number = {passage.pid: n for n, passage in enumerate(passages)}
    lines = {"collection.tsv": [f"{number[p.pid]}\t{p.text}" for p in passages]}
    for split, name in (("train", "train"), ("test", "dev.small")):
        lines[f"queries.{name}.tsv"] = [f"{q.qid}\t{q.text}" for q in queries[split]]
        lines[f"qrels.{name}.tsv"] = [f"{q.qid} 0 {number[q.pid]} 1" for q in qrels[split]]
    folder.mkdir()
    for name, written in lines.items():
        (folder / name).write_text("\n".join(written) + "\n")


def write_nq(folder: Path) -> None:
    passages, queries, qrels = small_collection()
    number = {passage.pid: n for n, passage in enumerate(passages, 1)}
    texts = {passage.pid: passage.text for passage in passages}
    quoted = (
        f'{number[p.pid]}\t"{p.text.replace(chr(34), chr(34) * 2)}"\t{p.title}' for p in passages
    )
    folder.mkdir()
    (folder / "psgs_w100.tsv").write_text("\n".join(["id\ttext\ttitle", *quoted]) + "\n")
    for split, name in (("train", "train"), ("test", "dev")):
        records = [
            {
                "question": query.text,
                "answers": [" ".join(texts[qrel.pid].split()[:3])],
                "positive_ctxs": [{"passage_id": number[qrel.pid]}],
            }
            for query, qrel in zip(queries[split], qrels[split], strict=True)
        ]
        (folder / f"biencoder-nq-{name}.json").write_text(json.dumps(records))
    answered = (f"{r['question']}\t{json.dumps(r['answers'])}" for r in records[:20])
    (folder / "nq-test.qa.csv").write_text(
        "".join(line.replace('"', "'") + "\n" for line in answered)
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("experiment", "write"),
    [("msmarco.gin", write_msmarco), ("nq.gin", write_nq)],
)
def test_own_data_through_every_stage(experiment, write, command, tiny_model_dir, tmp_path):
    """Each shipped experiment on a small folder of its own format, with a small model."""
    write(tmp_path / "data")
    sizes = [a for a in TINY if not a.startswith(("--gin_file", "--gin.SentencePiece"))]
    model, pieces = tmp_path / "model", tiny_model_dir / "prepare" / "spiece.model"
    done = command(
        "dgr_jax.train", f"--gin_file={experiment}", f"--data_dir={tmp_path / 'data'}",
        f"--model_dir={model}", *sizes, f"--gin.SentencePiece.path={pieces}",
        "--gin.ResidualQuantization.num_codes=2", "--gin.T5Config.dtype=float32",
        "--gin.Experiment.control=False", "--gin.Generation.label_smoothing=0.1",
        *(["--gin.Prepare.test_splits=('dev', 'test')"] if experiment == "nq.gin" else []),
    )  # fmt: skip
    assert "evaluate: done in" in done.stderr
    found = metrics(model)
    assert list(found) == ["bm25", "generate", "distill"]
    (split, measured), *unjudged = found["bm25"].items()
    if experiment == "nq.gin":  # questions with answers and no judgements
        ((_, of_answers),) = unjudged
        assert {name.partition("@")[0] for name in of_answers} == {"AnswerHits"}
        assert of_answers["AnswerHits@100"] > 0.5
        assert "'test' has no judgements, only answers" in done.stderr
    assert measured["Success@10"] > 0.5
    assert (measured.get("AnswerHits@100", 0) > 0.5) == (experiment == "nq.gin")
    prepared = BeirCollection(str(model / "prepare/collection"))
    assert {q.text for q in prepared.queries(split)} == {
        q.text for q in small_collection()[1]["test"]
    }


# installed


@pytest.fixture(scope="module")
def packages(tmp_path_factory):
    """{"checkout": a wheel of it, "sdist": a source distribution}, from a copy that may change."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    source.mkdir()
    for name in ("dgr_jax", "gin_configs", "tasks"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        if (ROOT / name).is_file():
            shutil.copy(ROOT / name, source / name)
    code = f"from setuptools import build_meta; build_meta.build_sdist({str(folder)!r})"
    subprocess.run([sys.executable, "-c", code], cwd=source, check=True, timeout=300)
    (sdist,) = folder.glob("dgr_jax-*.tar.gz")
    return {"checkout": wheel_of(source, folder / "of_checkout"), "sdist": sdist}


def wheel_of(source, folder):
    """The wheel that pip builds of a folder or a source distribution."""
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", str(source), "--no-deps", "--no-build-isolation",
         "-q", "--disable-pip-version-check", "--wheel-dir", str(folder)],
        check=True, timeout=300,
    )  # fmt: skip
    (wheel,) = folder.glob("dgr_jax-*.whl")
    return wheel


@pytest.fixture(scope="module")
def wheel(packages):
    return packages["checkout"]


@pytest.mark.slow
def test_the_sdist_makes_the_same_wheel(packages, tmp_path):
    wheels = packages["checkout"], wheel_of(packages["sdist"], tmp_path)
    names = [set(zipfile.ZipFile(wheel).namelist()) for wheel in wheels]
    assert names[0] == names[1]


@pytest.mark.slow
def test_an_index_would_take_the_packages(packages):
    pytest.importorskip("twine")
    files = [str(path) for path in packages.values()]
    done = subprocess.run(
        [sys.executable, "-m", "twine", "check", "--strict", *files],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
def test_the_wheel_holds_everything(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    for folder, inside in (("gin_configs", "dgr_jax/gin_configs"), ("tasks", "dgr_jax/tasks"),
                           ("dgr_jax", "dgr_jax")):  # fmt: skip
        for path in (ROOT / folder).rglob("*"):
            if path.is_file() and path.suffix in (".py", ".gin", ".jsonl", ".tsv"):
                assert f"{inside}/{path.relative_to(ROOT / folder).as_posix()}" in names
    assert "dgr_jax/py.typed" in names
    assert not [name for name in names if name.startswith(("tests", "gin_configs", "tasks"))]


@pytest.mark.slow
def test_the_installed_wheel_finds_its_files(wheel, tmp_path):
    site, empty = tmp_path / "site", tmp_path / "empty"
    empty.mkdir()
    subprocess.run(
        [sys.executable, "-m", "pip", "install", "--no-deps", "-q", "--disable-pip-version-check",
         "--target", str(site), str(wheel)],
        check=True, timeout=300,
    )  # fmt: skip
    env = {**os.environ, "PYTHONPATH": str(site)}

    def python(*arguments: str) -> str:
        return subprocess.run(
            [sys.executable, *arguments],
            cwd=empty, env=env, capture_output=True, text=True, check=True, timeout=300,
        ).stdout  # fmt: skip

    assert Path(python("-c", "import dgr_jax; print(dgr_jax.__file__)").strip()).is_relative_to(
        site
    )
    shipped = sorted(path.name for path in (ROOT / "gin_configs").glob("*.gin"))
    assert ", ".join(shipped) in " ".join(python("-m", "dgr_jax.train", "--help").split())
    assert "studies/margins.gin" in python(
        "-c", "from dgr_jax import shipped; print(*shipped.resources('gin_configs').rglob('*.gin'))"
    )
    code = (
        "from dgr_jax.config import cli, gin_files\n"
        "from dgr_jax.data.task_files import task_file\n"
        "args, bindings = cli.parse(cli.parser('train', ''), ['--gin_file=quickstart.gin',\n"
        "                           '--gin_file=models/mini.gin'])\n"
        "experiment = gin_files.load_experiment(args, bindings)\n"
        "experiment.collection.check(['train', 'test'])\n"
        "task_file(experiment.prepare.tasks)\n"
        "print(sum(1 for _ in experiment.collection.passages()), experiment.model.emb_dim)\n"
    )
    assert python("-c", code).split() == ["240", "256"]
