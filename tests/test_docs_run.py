"""What README and the documents show runs, in its order, at the smallest size."""

import gzip
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import asdict, replace
from functools import cache

import pytest

from dgr_jax.corpora.beir import write_beir
from dgr_jax.corpora.quickstart import QuickstartCollection
from dgr_jax.corpora.subset import Subset
from tests.conftest import ROOT
from tests.documents import PAGES, blocks_of, calls, commands_of, has_arguments, is_program

PASSAGES = 24

# Why what matches one of these is not run, where it is tried instead.
NOT_RUN = {
    r"^(python3 -m venv|\.) ": ".ci/run makes environments",
    r"^pip install": ".ci/run installs this package and its extras",
    r"^docker |^scripts/launch_": "needs Docker or a cluster: tests/test_launch.py",
    r"--coordinator_address": "two processes: tests/test_processes.py",
    r"^python -m t5x\.|^CONFIGS=": "needs t5x, which no index has: tests/test_t5x_adapter.py",
    r"^python -m pytest|tests[./]campaigns": "these tests, and what is run by hand",
    r"@Pretrained\(\)": "needs weights of the Hub: tests/test_pretrained.py",
    r"@ListwiseTeacher\(\)": "needs a language model: tests/test_listwise.py",
    r"--refresh": "after a rollback there is nothing new to learn: tests/test_refreshed.py",
    r"--mcp": "speaks with an assistant over its standard input: tests/test_mcp.py",
    r"--system=sum": "needs a class among the components: tests/test_systems.py has it in whole",
    r"--topology=v5": "needs libtpu (extra tpu), where it is not there: tests/test_planning.py",
    r"scaling_tables\.py": "ranks meshes of 15 programs, for minutes",
    r"benchmarks\.(index|constraint) ": "needs the code of another project",
    r"benchmarks\.(train_step|exact_search|substring|decode|whole_query) ": (
        "needs packages to be compared with"
    ),
    r"benchmarks\.(query_parts|multiview) ": "has a T5 small, and an index of many passages",
    r"benchmarks\.(growth|quickstart) ": "trains the quickstart, or all stages of many passages",
    r"benchmarks\.prepare ": "counts the memory of processes, each of which starts anew",
}
NO_PYTHON = {
    "import pyterrier": "extra pyterrier: tests/test_integrations.py",
    "import t5x_adapter": "needs t5x, which no index has: tests/test_t5x_adapter.py",
    "class WeightedSum": "a part of the class that tests/test_systems.py has in whole",
}

# Bindings that come last, by the kind of experiment.
STUDENT = {
    "T5Config.emb_dim": 16, "T5Config.num_heads": 2, "T5Config.head_dim": 8,
    "T5Config.mlp_dim": 32, "T5Config.num_encoder_layers": 1, "T5Config.num_decoder_layers": 1,
    "T5Config.dropout_rate": 0, "BATCH_SIZE": 8, "WARMUP_STEPS": 2, "SentencePiece.size": 400,
    "Training.log_every": 2, "Mesh.data": 1,
}  # fmt: skip
RANKING = {
    "GENERATE_STEPS": 6, "DISTILL_STEPS": 3, "LIST_BATCH_SIZE": 4, "DEPTH": 16,
    "SEARCH_BATCH_SIZE": 8, "QUERY_LENGTH": 12, "Candidates.max_queries": 16,
    "Experiment.control": False,
}  # fmt: skip
DOCID = STUDENT | RANKING | {
    "NUM_BEAMS": 16, "TopM.size": 8, "TfidfSvd.dim": 8, "ResidualQuantization.num_codes": 2,
    "ResidualQuantization.codebook_size": 8,
}  # fmt: skip
VIEWS = STUDENT | RANKING | {
    "NUM_BEAMS": 4, "TRAIN_DEPTH": 16, "TwoLists.depth": 16, "Candidates.keys": 6,
    "Multiview.query_tokens": 12, "QUERY_LENGTH": 16,
}  # fmt: skip
DENSE = STUDENT | {"STEPS": 6, "QUERY_LENGTH": 12, "PASSAGE_LENGTH": 16, "DEPTH": 16}
WRITER = STUDENT | {"STEPS": 6, "Sampling.number": 2}
EMBEDDED = {
    "COLLECTION": "@Subset()", "Subset.collection": "@QuickstartCollection()",
    "Subset.size": PASSAGES,
}  # fmt: skip
OF_BENCHMARKS = {
    "planning": "--passages 120 --planned=20 --beams=4 --plain_beams=8 --queries=4 --rounds=1",
    "packed_lists": "--steps=2",
    "packed_queries": "--steps=2",
    "examples_together": "--steps=2",
    "corpus_start": "--passages=60 --pieces=200 --width=8 --exact=60",
    "update": "--passages=60 --added=4 --schemes=title --repeats=1",
    "serve": "--seconds=0.3 --clients=1,2",
}


def kind_of(file):
    """The bindings of experiments of a gin file."""
    for part, bindings in (("dense", DENSE), ("dgr", VIEWS), ("ltrgr", VIEWS), ("pseudo", WRITER)):
        if part in file:
            return bindings
    return DOCID


def added(words):
    """What a command is given behind that which stands in the document."""
    name = words[2] if words[1] == "-m" else words[1]
    files = [word.partition("=")[2] for word in words if word.startswith("--gin_file=")]
    if name.startswith("benchmarks."):
        return OF_BENCHMARKS[name.partition(".")[2]].split()
    if name == "dgr_jax.study":  # hours; here, whether its experiments are such, and what they cost
        return ["--dry_run"]
    if name == "dgr_jax.plan" or not files or {"--plan", "--explain"} & set(words):
        return []
    bindings = kind_of(files[0]) | (EMBEDDED if files[0].startswith("quickstart") else {})
    if "--gin.COLLECTION=@Subset()" in words:
        bindings = bindings | {"Subset.size": PASSAGES}
    for word in words:
        if word.split("=")[0].endswith("validate_every"):
            bindings = bindings | {word.split("=")[0].removeprefix("--gin."): 3}
    return [f"--gin.{name}={value}" for name, value in bindings.items()]


# What stands for a value of one's own.
NAMES = {
    "--gin.SEED=N": "--gin.SEED=0", "DIR0": "seed0", "DIR1": "seed1",
    "--queries=FILE": "--queries=queries.tsv", "--k=100": "--k=10",
}  # fmt: skip


def at_the_smallest_size(words):
    given = [NAMES.get(word, word) for word in words if word not in ("DIR2", "seed2")]
    return [*given, *added(given)]


def python_of(code):
    """Python of a page, with passages in place of "..." and fewer steps."""
    others = repr([asdict(passage) for passage in passages()[2:]])
    code = code.replace(", ...]", f", *{others}]")
    return code.replace("generate_steps=500", f"bindings={DOCID!r}")


def reason(text, reasons):
    return next((why for pattern, why in reasons.items() if re.search(pattern, text)), None)


@cache
def what_stands_on(page):
    """(what is run, what is not) of a page, each as (text, call), in its order."""
    run, left = [], {}
    for words in commands_of(page):
        if has_arguments(words):
            text = " ".join(words)
            if (why := reason(text, NOT_RUN)) is None:
                run.append((text, {"words": at_the_smallest_size(words)}))
            else:
                left[text] = why
    for language, block in blocks_of(page):
        if language == "python":
            if (why := reason(block, NO_PYTHON)) is None:
                run.append((block, {"code": python_of(block)}))
            else:
                left[block] = why
        elif language == "bash":
            for line in block.replace("\\\n", " ").splitlines():
                for words in calls(line):
                    if words and not is_program(words):
                        left[" ".join(words)] = reason(" ".join(words), NOT_RUN)
    return run, left


@cache
def passages():
    """Those of the embedded collection that are taken, with pids as in the documents: p0, p1 ..."""
    part = Subset(QuickstartCollection(), size=PASSAGES)
    return [replace(p, pid=f"p{i}") for i, p in enumerate(part.passages())]


def collection(folder):
    """A collection in BEIR layout with every split that a document names."""
    part = Subset(QuickstartCollection(), size=PASSAGES)
    pids = {old.pid: new.pid for old, new in zip(part.passages(), passages(), strict=True)}
    qrels = {
        split: [replace(q, pid=pids[q.pid]) for q in part.qrels(split) if q.relevance == 2]
        for split in ("train", "test")
    }
    qrels |= {f"seen_{split}": of for split, of in qrels.items()}
    write_beir(
        folder / "FOLDER", passages(), [*part.queries("train"), *part.queries("test")], qrels
    )
    return list(part.queries("test")), qrels


@pytest.fixture(scope="module")
def around(tmp_path_factory):
    """A folder with what the commands name and do not make."""
    folder = tmp_path_factory.mktemp("documents")
    queries, qrels = collection(folder)
    lines = "".join(f"{query.qid}\t{query.text}\n" for query in queries[:3])
    (folder / "queries.tsv").write_text(lines)
    shutil.copy(folder / "FOLDER" / "qrels" / "test.tsv", folder / "qrels.tsv")
    pids = [passage.pid for passage in passages()]
    given = [f"{q.qid} Q0 {pid} 1 1.0 x\n" for q in queries[:3] for pid in pids[:1]]
    (folder / "given.trec").write_text("".join(given))
    taught = {q.qid: q.pid for q in qrels["train"]}
    run = [
        f"{qid} Q0 {other} {rank} {9 - rank} x\n" for qid, pid in taught.items()
        for rank, other in enumerate([pid, *(p for p in pids if p != pid)][:8], 1)
    ]  # fmt: skip
    with gzip.open(folder / "my_reranker.trec.gz", "wt") as file:
        file.writelines(run)
    texts = {q.qid: q.text for q in Subset(QuickstartCollection(), size=PASSAGES).queries("train")}
    by_pid = {passage.pid: passage for passage in passages()}
    records = [
        {
            "query_id": qid, "query": texts[qid],
            "positive_passages": [record(by_pid[pid], 9.0)],
            "negative_passages": [record(p, 1.0) for p in passages()[:4] if p.pid != pid],
        } for qid, pid in taught.items()
    ]  # fmt: skip
    written = "".join(json.dumps(line) + "\n" for line in records)
    (folder / "their_train.jsonl").write_text(written)
    new = {"pid": "p7", "title": "Bees", "text": "Bees make honey."}
    (folder / "new.jsonl").write_text(json.dumps(new) + "\n")
    (folder / "pids.txt").write_text("p3\n")
    (folder / "pseudo_queries.tsv").write_text(
        "".join(f"{p.pid}\twhat is known of {p.title}\n" for p in passages())
    )
    (folder / "docs" / "assets" / "tour").mkdir(parents=True)
    (folder / "kept" / "nothing").mkdir(parents=True)
    (folder / "scripts").symlink_to(ROOT / "scripts")
    return folder


def record(passage, score):
    return {"docid": passage.pid, "title": passage.title, "text": passage.text, "score": score}


FIRST = ("own_data.md", "tour.md", "evaluate.md", "multiview.md")  # others ask what these have made
ORDER = sorted(PAGES, key=lambda path: ((*FIRST, path.name).index(path.name), path.suffix))
# What DIR holds when a page begins, where it is not an experiment with docids.
GIVEN = {"RESULTS.md": "views", "python.md": "nothing", "README.md": "nothing"}
NEEDED = [path for path in ORDER if what_stands_on(path)[0]]
GRAIN = "need the extra 'dgr_jax[grain]'"


@pytest.fixture(scope="module")
def done(around, together):
    """page -> (text, what came of it) of everything that is run, in one process."""
    asked = []
    for page in NEEDED:
        if page.name not in FIRST[:2]:
            asked.append((page, "", {"copy": {f"kept/{GIVEN.get(page.name, 'docid')}": "DIR"}}))
        asked += [(page, text, call) for text, call in what_stands_on(page)[0]]
        if page.name in ("own_data.md", "multiview.md"):
            kept = "views" if page.name == "multiview.md" else "docid"
            asked.append((page, "", {"copy": {"DIR": f"kept/{kept}"}}))
    (around / "calls.json").write_text(json.dumps([call for *_, call in asked]))
    settings = {
        "PYTHONPATH": str(ROOT),
        "XLA_FLAGS": "--xla_backend_optimization_level=0",
        "JAX_COMPILATION_CACHE_DIR": str(together / "compiled"),
        "JAX_COMPILATION_CACHE_MAX_SIZE": str(1 << 31),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.2",
    }
    with (around / "log.txt").open("w") as log:
        subprocess.run(
            [sys.executable, "-m", "tests.documents_run", "calls.json", "results.jsonl"],
            cwd=around, env=os.environ | settings, stdout=log, stderr=log, check=True, timeout=2400,
        )  # fmt: skip
    results = [json.loads(line) for line in (around / "results.jsonl").read_text().splitlines()]
    by_page = {}
    for (page, text, _), result in zip(asked, results, strict=True):
        by_page.setdefault(page, []).append((text, result))
    return by_page


@pytest.mark.slow
@pytest.mark.parametrize("page", NEEDED, ids=lambda page: page.name)
def test_what_stands_on_a_page_runs(page, done):
    failed = [f"{text}\n{result['error']}" for text, result in done[page] if result["error"]]
    missing = [
        error for error in failed if GRAIN in error and not importlib.util.find_spec("grain")
    ]
    assert failed == missing, "\n\n".join(failed)
    for text, result in done[page]:
        if "for hit in" in text:
            assert len(result["said"].splitlines()) == 5
    if missing:
        pytest.skip("the rest of the page runs; batches of Grain need the package grain")


def test_everything_is_run_or_there_is_a_reason():
    left = {text: why for page in PAGES for text, why in what_stands_on(page)[1].items()}
    assert not [text for text, why in left.items() if why is None]
    assert {*left.values()} == {*NOT_RUN.values(), *NO_PYTHON.values()}, "a reason is not needed"
    assert sum(len(what_stands_on(page)[0]) for page in PAGES) > 80
