"""Flags, gin files, and the one line that a mistake is answered with."""

from __future__ import annotations

import contextlib
import errno
import importlib
import importlib.util
import platform
import re
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path

import pytest

import dgr_jax
from dgr_jax import (
    evaluate,
    prepare,
    pseudo_queries,
    retrieve,
    shipped,
    teach,
    train,
)
from dgr_jax.config import bound, cli, configurables, gin_files
from dgr_jax.config.mistakes import Failure, Mistake
from dgr_jax.corpora.beir import BeirCollection, write_beir
from dgr_jax.corpora.types import Passage, Qrel, Query
from dgr_jax.identifiers.embeddings import TfidfSvd
from dgr_jax.losses import ranking
from dgr_jax.retrieval.bm25 import WORDS, Bm25
from dgr_jax.settings import describe, fingerprint
from dgr_jax.stages.pipeline import stage_settings
from dgr_jax.teaching.teachers import Bm25Teacher, RunTeacher, VectorTeacher
from tests.conftest import ROOT

COMMANDS = {"train": train, "prepare": prepare, "retrieve": retrieve, "teach": teach,
            "evaluate": evaluate, "pseudo_queries": pseudo_queries}  # fmt: skip
ALL_COMMANDS = sorted(
    path.stem
    for path in (ROOT / "dgr_jax").glob("*.py")
    if "cli.main(command)" in path.read_text(encoding="utf-8")
)
GIN = ROOT / "gin_configs"
OTHERS = {"pseudo_queries.gin"}  # of other commands than train
EXPERIMENTS = sorted(path.name for path in GIN.glob("*.gin") if path.name not in OTHERS)
MODELS = sorted(f"models/{path.name}" for path in GIN.glob("models/*.gin"))
NEEDED = (
    "--data_dir=somewhere", "--gin.SentencePiece.path=spiece.model",
    "--gin.Sources.pseudo_query_path=pseudo_queries.tsv",
)  # fmt: skip
QUICKSTART = "--gin_file=quickstart.gin"


@pytest.fixture(autouse=True)
def as_in_a_fresh_process(monkeypatch, tmp_path):
    """An empty folder to be in, and a command line that leaves the logging of the tests alone."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cli, "_configure_logging", lambda verbose: None)


def load(*arguments: str):
    args, bindings = cli.parse(cli.parser("train", "..."), arguments)
    return gin_files.load_experiment(args, bindings)


def complaint(capsys, command, *arguments: str) -> str:
    """What a command that must fail with status 2 writes to stderr."""
    with pytest.raises(SystemExit) as stopped:
        cli.main(lambda _: command(arguments))
    assert stopped.value.code == 2
    return capsys.readouterr().err


def fingerprints(experiment) -> dict[str, str]:
    return {s: fingerprint(stage_settings(experiment, s)) for s in experiment.stages}


def needed(experiment: str) -> tuple[str, ...]:
    """Arguments with which a shipped experiment can be read."""
    text = whole_text(experiment)
    marks = ("DATA_DIR =", "SentencePiece.path =", "Sources.pseudo_query_path =")
    return tuple(n for n, mark in zip(NEEDED, marks, strict=True) if mark in text)


def whole_text(file: str) -> str:
    """A shipped gin file with those that it includes."""
    text = (GIN / file).read_text(encoding="utf-8")
    return text + "".join(map(whole_text, re.findall(r"^include '(.+)'", text, re.MULTILINE)))


# --help


@pytest.mark.parametrize("name", COMMANDS)
def test_help_is_quick_and_light(name):
    code = (
        "import runpy, sys\n"
        f"sys.argv = ['x', '--help']\n"
        "try:\n"
        f"    runpy.run_module('dgr_jax.{name}', run_name='__main__')\n"
        "except SystemExit as stopped:\n"
        "    heavy = {'jax', 'flax', 'tensorflow', 'seqio', 'numpy', 'sklearn', 'gin'}\n"
        "    sys.exit(f'imported {heavy & set(sys.modules)}' if heavy & set(sys.modules) else 0)\n"
    )
    start = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert time.perf_counter() - start < 3
    assert done.stdout.startswith(f"usage: python -m dgr_jax.{name} ")
    for flag in ("--gin_file", "--gin_search_paths", "--model_dir", "--data_dir", "--gin.NAME="):
        assert flag in done.stdout
    assert "quickstart.gin" in done.stdout


@pytest.mark.parametrize("name", ALL_COMMANDS)
def test_every_command_says_its_versions(name, capsys):
    with pytest.raises(SystemExit) as stopped:
        importlib.import_module(f"dgr_jax.{name}").command(["--version"])
    assert stopped.value.code == 0
    printed = dict(line.split(" ") for line in capsys.readouterr().out.splitlines())
    assert printed["dgr_jax"] == dgr_jax.__version__
    assert printed["python"] == platform.python_version()
    for name in ("jax", "flax", "numpy"):
        assert printed[name] == metadata.version(name)
    assert ("tensorflow" in printed) == (importlib.util.find_spec("tensorflow") is not None)


def test_import_of_the_package_is_light():
    code = "import sys, dgr_jax; sys.exit(bool({'jax', 'tensorflow', 'numpy'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=60).returncode == 0


# gin files and bindings


def test_later_gin_files_lie_over_earlier_ones():
    small = load(QUICKSTART, "--model_dir=m")
    large = load(QUICKSTART, "--gin_file=models/base.gin", "--model_dir=m")
    assert small.model.emb_dim < large.model.emb_dim == 768
    assert large.generate.steps == small.generate.steps


def test_search_paths(tmp_path):
    for name, lines in (("one/mine.gin", "include 'quickstart.gin'\ninclude 'theirs.gin'\n"),
                        ("two/theirs.gin", "SEED = 7\n")):  # fmt: skip
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_text(lines)
    found = load("--gin_file=mine.gin", f"--gin_search_paths={tmp_path}/one,{tmp_path}/two")
    assert found.generate.seed == 7


def test_folders_of_the_working_directory_may_have_the_names_of_ours(tmp_path, monkeypatch):
    """They look like Python packages, which gin would read files from."""
    for name in ("models", "runs"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    assert load(QUICKSTART, "--model_dir=m").model.emb_dim == 128


def test_a_teacher_of_several():
    found = load(
        *(QUICKSTART, "--model_dir=m", "--gin.TEACHER=@FusionTeacher()"),
        "--gin.FusionTeacher.teachers=(@Bm25Teacher(), @RunTeacher())",
        *("--gin.FusionTeacher.weights=(0.7, 12)", f"--gin.RunTeacher.path={__file__}"),
    )
    assert [type(t).__name__ for t in found.teach.teacher.teachers] == ["Bm25Teacher", "RunTeacher"]
    assert found.teach.teacher.weights == (0.7, 12)


@pytest.mark.parametrize(
    "under",
    [
        (QUICKSTART,),
        ("--data_dir=d", "--gin_file=squad_dense.gin", "--gin_file=runs/taught.gin"),
    ],
)
def test_a_teacher_of_bm25_and_vectors_is_one_line(under):
    given = (*under, "--gin_file=runs/fusion.gin", "--model_dir=m")
    files = [f"--gin.VectorTeacher.{name}_path=f" for name in ("passages", "queries", "query_ids")]
    teacher = load(*given, *files).teach.teacher
    of_words, of_vectors = teacher.teachers
    assert isinstance(of_words, Bm25Teacher) and of_vectors == VectorTeacher("f", "f", "f")
    assert of_words.bm25 == Bm25(stemmer="snowball", language="english")
    assert (teacher.weights, teacher.judged_first) == ((0.7, 12.0), True)
    with pytest.raises(Mistake, match=r"^VectorTeacher\.passages_path is not set; give --gin"):
        load(*given)


@pytest.mark.parametrize(
    ("binding", "read", "expected"),
    [
        ("MODEL_DIR=some/folder", lambda e: e.model_dir, "some/folder"),
        ("MODEL_DIR=a=b #c 'd'", lambda e: e.model_dir, "a=b #c 'd'"),
        ("MODEL_DIR='quoted'", lambda e: e.model_dir, "quoted"),
        ('MODEL_DIR="quoted"', lambda e: e.model_dir, "quoted"),
        ("SEED=3", lambda e: (e.prepare.seed, e.generate.seed, e.evaluate.seed), (3, 3, 3)),
        ("GENERATE_STEPS=1e3", lambda e: e.generate.steps, 1000),
        ("LEARNING_RATE=1e-3", lambda e: e.generate.optimizer.learning_rate.peak, 0.001),
        ("Sources.labelled=2", lambda e: e.prepare.sources.labelled, 2.0),
        ("Adafactor.max_grad_norm=1", lambda e: e.distill.optimizer.max_grad_norm, 1.0),
        ("Adafactor.max_grad_norm=None", lambda e: e.distill.optimizer.max_grad_norm, None),
        ("SentencePiece.path=", lambda e: e.prepare.vocabulary.path, ""),
        ("Experiment.control=False", lambda e: e.control, False),
        ("Prepare.test_splits=('dev', 'test')", lambda e: e.prepare.test_splits, ("dev", "test")),
        ("Prepare.test_splits=['dev']", lambda e: e.prepare.test_splits, ("dev",)),
        ("DISTILL_STEPS=%GENERATE_STEPS", lambda e: e.distill.steps == e.generate.steps, True),
        ("LOSS=@listnet()", lambda e: e.distill.objective.loss.func.__name__, "listnet"),
        ("IDENTIFIERS=@Title()", lambda e: type(e.prepare.identifiers).__name__, "Title"),
        ("generate/Training.batch_size=5", lambda e: e.generate.batch_size, 5),
        ("generate/Training.batch_size=5", lambda e: e.distill.batch_size == 5, False),
        ("dgr_jax.Search.num_beams=9", lambda e: e.evaluate.search.num_beams, 9),
    ],
)
def test_bindings(binding, read, expected):
    found = read(load(QUICKSTART, f"--gin.{binding}"))
    assert found == expected
    assert type(found) is type(expected)


def test_a_binding_reaches_components_that_are_defaults_of_others():
    experiment = load(QUICKSTART, "--gin.TfidfSvd.dim=7", "--gin.Bm25.k1=2", "--gin.Mesh.data=1")
    assert experiment.prepare.identifiers.embeddings == TfidfSvd(dim=7)
    assert experiment.teach.teacher.bm25.k1 == 2.0
    assert experiment.evaluate.baseline == Bm25(k1=2.0)
    assert experiment.mesh.data == 1
    tree = load(QUICKSTART, "--gin.TfidfSvd.dim=7", "--gin.IDENTIFIERS=@KMeansTree()")
    assert tree.prepare.identifiers.embeddings == TfidfSvd(dim=7)


@pytest.mark.parametrize(
    "given",
    [(QUICKSTART,), ("--gin_file=dense.gin", "--data_dir=d"), ("--gin_file=dgr.gin", *NEEDED)],
)
def test_the_baseline_row_is_bm25_of_stems_unless_it_is_chosen(given):
    def baseline(*bindings):
        return load(*given, "--model_dir=m", *bindings).evaluate.baseline

    assert baseline() == Bm25(stemmer="snowball", language="english")
    assert baseline("--gin.Bm25.stemmer=") == WORDS
    german = ("--gin.Bm25.language=german", "--gin.Bm25.stop_words=german")
    assert baseline(*german) == Bm25(language="german", stop_words="german")
    with pytest.raises(Mistake, match=r"^Bm25\.language: got 'thai', expected one of arabic, arm"):
        baseline("--gin.Bm25.language=thai")


def test_baseline_and_teacher_may_differ():
    scoped = ("--gin.Evaluate.baseline=@baseline/Bm25()", "--gin.baseline/Bm25.stemmer=")
    experiment = load(QUICKSTART, "--model_dir=m", *scoped)
    assert experiment.evaluate.baseline == WORDS
    assert experiment.teach.teacher.bm25 == Bm25()


def test_an_older_experiment_goes_on_with_bm25_of_words():
    """Its config.gin says so, and names no baseline."""
    load(QUICKSTART, "--model_dir=m", "--gin.Bm25.stemmer=")
    config = Path("m/config.gin")
    later = ("Bm25.language", "Evaluate.baseline")
    lines = [line for line in config.read_text().splitlines() if not line.startswith(later)]
    assert {"Bm25.stemmer = ''", "Evaluate.bm25 = True"} <= set(lines)
    config.write_text("\n".join(lines) + "\n")
    experiment = load("--model_dir=m")
    assert experiment.teach.teacher.bm25 == experiment.evaluate.baseline == WORDS
    assert "baseline" not in describe(experiment.evaluate)


def test_folders():
    experiment = load("--gin_file=beir.gin", "--data_dir=2024", "--model_dir=my model")
    assert experiment.model_dir == "my model"
    assert experiment.collection == BeirCollection("2024")
    assert load("--gin_file=beir.gin", "--gin.DATA_DIR=d", "--gin.MODEL_DIR=m").model_dir == "m"


# shipped experiments


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_shipped_experiments_are_read_and_read_again(name):
    first = load(f"--gin_file={name}", "--model_dir=m", *needed(name))
    again = load("--gin_file=m/config.gin", "--gin.MODEL_DIR=n")
    assert fingerprints(again) == fingerprints(first)
    Path("n").rename("moved")
    alone = load("--model_dir=moved")
    assert fingerprints(alone) == fingerprints(first)
    assert alone.model_dir == "moved"
    assert alone.mesh == first.mesh
    for name in {"generate", "distill", "train"} & vars(first).keys():
        assert getattr(alone, name).log_every == getattr(first, name).log_every


# T5 1.1 as published: width, MLP width, heads, layers of the encoder and of the decoder.
T5_1_1 = {
    "models/small.gin": (512, 1024, 6, 8),
    "models/base.gin": (768, 2048, 12, 12),
    "models/large.gin": (1024, 2816, 16, 24),
    "models/xl.gin": (2048, 5120, 32, 24),
    "models/xxl.gin": (4096, 10240, 64, 24),
}


@pytest.mark.parametrize("name", MODELS)
def test_shipped_sizes(name):
    model = load(QUICKSTART, f"--gin_file={name}").model
    assert model.num_encoder_layers == model.num_decoder_layers
    size = (model.emb_dim, model.mlp_dim, model.num_heads, model.num_decoder_layers)
    assert size == T5_1_1.get(name, size)
    assert T5_1_1.keys() < set(MODELS)


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_line_of_a_shipped_experiment_has_an_effect(name):
    """A binding that reaches nothing is a setting that somebody believes in."""
    load(f"--gin_file={name}", "--model_dir=m", *needed(name))
    import gin

    set_there = set(bound.settings(gin.config_str()))
    used = {
        (bound.winner(scope, component, key, set_there), component, key)
        for scope, component, key in bound.settings(gin.operative_config_str())
    }
    restated = {("", component, key) for component, key, _ in configurables.nested_defaults()}
    replaced = {name for name in set_there if name[1] in ranking.LOSSES}  # by another LOSS
    assert set_there - used - restated - replaced == set()


def test_settings_can_be_overridden_when_an_experiment_goes_on():
    load(QUICKSTART, "--model_dir=m", "--gin.TopM.size=4")
    assert load("--model_dir=m").teach.lists.size == 4
    changed = load("--model_dir=m", "--gin.Training.log_every=7", "--gin.TopM.size=3",
                   "--gin.ResidualQuantization.num_codes=4", "--gin.SEED=2")  # fmt: skip
    assert (changed.generate.log_every, changed.distill.log_every) == (7, 7)
    assert changed.teach.lists.size == 3
    assert changed.prepare.identifiers.num_codes == 4
    assert changed.teach.seed == 2
    assert load("--model_dir=m").teach.lists.size == 3


def test_config_gin_names_the_defaults_of_what_was_made():
    load(QUICKSTART, "--model_dir=m")
    lines = Path("m/config.gin").read_text().splitlines()
    for line in (
        "SEED = 0",
        "Search.num_beams = %NUM_BEAMS",
        "Bm25.k1 = 0.9",
        "TfidfSvd.iterations = 5",
        "Training.microbatches = 1",
        "ranknet.temperature = 1.0",
    ):
        assert line in lines


def test_a_finished_experiment_that_cannot_be_written_is_read(monkeypatch, caplog):
    """Such as one of an older version, which knew fewer defaults."""
    load(QUICKSTART, "--model_dir=m")
    kept = Path("m/config.gin").read_text()

    def refuse(path, *_, **__):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(Path, "write_text", refuse)
    assert load("--model_dir=m", "--gin.TopM.size=4").teach.lists.size == 4
    assert Path("m/config.gin").read_text() == kept
    assert caplog.messages == ["m/config.gin: Permission denied; it stays as it is"]


def test_an_experiment_that_is_not_read_leaves_nothing():
    with pytest.raises(Mistake):
        load(QUICKSTART, "--model_dir=m", "--gin.SEED=x")
    assert not Path("m").exists()


# mistakes


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "give --gin_file=FILE, such as quickstart.gin, or --model_dir=DIR"),
        (("--model_dir=m",), "no experiment at m/config.gin; give --gin_file=FILE"),
        (
            ("--gin_file=quickstrat.gin",),
            f"--gin_file=quickstrat.gin: not found in ., {GIN}; did you mean quickstart.gin",
        ),
        (
            (QUICKSTART, "--gin_file=models/tny.gin"),
            f"--gin_file=models/tny.gin: not found in ., {GIN}; did you mean models/tiny.gin",
        ),
        (
            (QUICKSTART, "--gin_search_paths=here,there"),
            "--gin_search_paths: here is no folder",
        ),
        (
            (QUICKSTART, "--gin.NUM_BEAM=3"),
            "--gin.NUM_BEAM: quickstart.gin has no macro NUM_BEAM; did you mean NUM_BEAMS",
        ),
        (
            (QUICKSTART, "--gin.LOSS=%NUM_BEAM"),
            "quickstart.gin: %NUM_BEAM is not set; did you mean NUM_BEAMS",
        ),
        (
            (QUICKSTART, "--data_dir=d"),
            "--data_dir: quickstart.gin has no macro DATA_DIR, so it would not be looked at",
        ),
        (
            (QUICKSTART, "--gin.Serch.num_beams=3"),
            "--gin.Serch.num_beams=3: No configurable matching 'Serch'; did you mean Search",
        ),
        (
            (QUICKSTART, "--gin.TEACHER=@BM25Teacher()"),
            "--gin.TEACHER=@BM25Teacher(): No configurable matching reference '@BM25Teacher()'; "
            "did you mean Bm25Teacher",
        ),
        (
            (QUICKSTART, "--gin.Search.beams=3"),
            "--gin.Search.beams=3: Configurable 'Search' doesn't have a parameter named 'beams'; "
            "did you mean num_beams",
        ),
        (
            (QUICKSTART, "--gin.distilled_ranknet.margins=3"),
            "--gin.distilled_ranknet.margins=3: Configurable 'distilled_ranknet' doesn't have a "
            "parameter named 'margins'; did you mean margin",
        ),
        (
            (QUICKSTART, "--gin.generat/Training.steps=3"),
            "--gin.generat/Training.steps has no effect; set distill/Training.steps or "
            "generate/Training.steps",
        ),
        (
            (QUICKSTART, "--gin.Linear.peak=3"),
            "--gin.Linear.peak has no effect; set distill/Linear.peak or generate/Linear.peak",
        ),
        (
            (QUICKSTART, "--gin.Prepare.test_splits=(dev,)"),
            "--gin.Prepare.test_splits=(dev,): gin cannot read this; are strings in quotes, and "
            "brackets closed?",
        ),
        (
            (QUICKSTART, "--gin.Prepare.test_splits=('dev',"),
            "--gin.Prepare.test_splits=('dev',: gin cannot read this; are strings in quotes",
        ),
        (
            (QUICKSTART, "--gin.Prepare.test_splits=dev"),
            "Prepare.test_splits: got 'dev', expected a tuple such as ('dev',)",
        ),
        (
            (QUICKSTART, "--gin.Prepare.test_splits=()"),
            "Prepare.test_splits: got (), expected a split or more",
        ),
        (
            (QUICKSTART, "--gin.GENERATE_STEPS=many"),
            "Training.steps: got 'many', expected a whole number",
        ),
        (
            (QUICKSTART, "--gin.GENERATE_STEPS=1.5"),
            "Training.steps: got 1.5, expected a whole number",
        ),
        (
            (QUICKSTART, "--gin.GENERATE_STEPS=True"),
            "Training.steps: got True, expected a whole number",
        ),
        ((QUICKSTART, "--gin.LEARNING_RATE=high"), "Linear.peak: got 'high', expected a number"),
        ((QUICKSTART, "--gin.TASKS=3"), "Prepare.tasks: got 3, expected a string"),
        (
            (QUICKSTART, "--model_dir=gs://a/b"),
            "MODEL_DIR: got gs://a/b, expected a folder: its files are mapped into memory",
        ),
        (
            (QUICKSTART, "--gin.TASKS=quick"),
            "Prepare.tasks: no tasks/quick.py; did you mean quickstart",
        ),
        ((QUICKSTART, "--gin.Evaluate.bm25=1"), "Evaluate.bm25: got 1, expected True or False"),
        (
            (QUICKSTART, "--gin.LOSS=@listnet()", "--gin.listnet.temperature=low"),
            "listnet.temperature: got 'low', expected a number",
        ),
        (
            (QUICKSTART, "--gin.IDENTIFIERS=rq"),
            "Prepare.identifiers: got 'rq', expected a component, written @NAME()",
        ),
        (
            (QUICKSTART, "--gin.IDENTIFIERS=@Title"),
            "Prepare.identifiers: got 'Title', expected a component, written @Title()",
        ),
        (
            (QUICKSTART, "--gin.LOSS=@listnet"),
            "Distillation.loss: got 'listnet', expected a component, written @listnet()",
        ),
        (
            (QUICKSTART, "--gin.TEACHER=@RunTeacher()"),
            "RunTeacher.path is not set; give --gin.RunTeacher.path=VALUE",
        ),
        ((QUICKSTART, "--gin.Search.num_beams=0"), "Search.num_beams: got 0, expected at least 1"),
        (("--gin_file=beir.gin",), "beir.gin needs --data_dir=..., --model_dir=..."),
        (("--gin_file=squad.gin", "--model_dir=m"), "squad.gin needs --data_dir=..."),
        (
            ("--gin_file=msmarco.gin", "--model_dir=m"),
            "msmarco.gin needs --data_dir=..., --gin.SentencePiece.path=...",
        ),
        (
            ("--gin_file=nq.gin", "--data_dir=d", "--model_dir=m"),
            "nq.gin needs --gin.SentencePiece.path=...",
        ),
    ],
)  # fmt: skip
def test_a_mistake_is_one_line(arguments, message, capsys):
    written = complaint(capsys, train.command, *arguments)
    assert written.startswith(f"error: {message}")
    assert written.count("\n") == 1


def test_a_mistake_in_a_gin_file_names_file_and_line(capsys):
    for text, message in (
        ("Search.beams = 3", "Configurable 'Search' doesn't have a parameter named 'beams'"),
        ("Serch.num_beams = 3", "No configurable matching 'Serch'; did you mean Search"),
        ("LOSS = (1, x)", "gin cannot read this"),
        ("include 'nothing.gin'", "Unable to open file: nothing.gin"),
    ):
        Path("mine.gin").write_text(f"include 'quickstart.gin'\n\n{text}\n")
        written = complaint(capsys, train.command, "--gin_file=mine.gin")
        assert written.startswith(f"error: mine.gin:3: {message}")
        assert written.count("\n") == 1


def test_what_is_required_counts_only_where_it_is_used():
    experiment = load("--gin_file=beir.gin", "--model_dir=m",
                      "--gin.COLLECTION=@QuickstartCollection()")  # fmt: skip
    assert type(experiment.collection).__name__ == "QuickstartCollection"


def test_a_setting_of_something_that_is_not_made_is_warned_of(caplog):
    load(QUICKSTART, "--gin.KMeansTree.branching=5")
    assert [r.getMessage() for r in caplog.records if r.name == "dgr_jax.config.bound"] == [
        "--gin.KMeansTree.branching has no effect: this experiment makes no KMeansTree"
    ]


def test_lines_of_a_gin_file_of_ones_own_that_have_no_effect_are_said(caplog):
    Path("more.gin").write_text("distil/Training.steps = 3\nBATCH_SIZE = 8\n")
    text = "include 'quickstart.gin'\ninclude 'more.gin'\nNUM_BEAM = 3\nSEED = 2\n"
    Path("mine.gin").write_text(f"{text}KMeansTree.branching = 5\n")
    assert load("--gin_file=mine.gin").prepare.seed == 2
    assert [r.getMessage() for r in caplog.records if r.name == "dgr_jax.config.bound"] == [
        "more.gin:1: distil/Training.steps has no effect; set distill/Training.steps or "
        "generate/Training.steps",
        "mine.gin:3: NUM_BEAM has no effect: nothing refers to it; did you mean NUM_BEAMS?",
        "mine.gin:5: KMeansTree.branching has no effect: no KMeansTree is made",
    ]


def test_what_was_tried_and_failed_ends_with_status_1(capsys):
    def command(argv):
        raise Failure("1 of 2 experiments failed")

    with pytest.raises(SystemExit) as stopped:
        cli.main(command)
    assert stopped.value.code == 1
    assert capsys.readouterr().err == "error: 1 of 2 experiments failed\n"


@pytest.mark.parametrize("flag", ["--gin_fil=quickstart.gin", "--model=m", "--gin"])
def test_half_a_flag(flag, capsys):
    assert f"unrecognized arguments: {flag}" in complaint(capsys, train.command, flag)


@pytest.mark.parametrize("binding", ["--gin.SEED", "--gin.=3", "--gin. = 3"])
def test_half_a_binding(binding, capsys):
    written = complaint(capsys, train.command, QUICKSTART, binding)
    assert f"{binding}: expected --gin.NAME=VALUE" in written


def test_a_real_process_ends_with_status_2_and_no_traceback(command):
    done = command("dgr_jax.teach", QUICKSTART, "--gin.SEEED=1", check=False)
    assert done.returncode == 2
    assert done.stdout == ""
    assert re.fullmatch(r"error: --gin.SEEED: .*; did you mean SEED\?\n", done.stderr)


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ValueError("bad value"), "error: bad value\n"),
        (FileNotFoundError(2, "No such file", "x"), "error: x: No such file\n"),
        (PermissionError(13, "Not allowed", "m"), "error: m: Not allowed\n"),
        (FileNotFoundError("no x; expected y"), "error: no x; expected y\n"),
        (ImportError("needs the extra"), "error: needs the extra\n"),
        (FloatingPointError("loss is nan at step 3"), "error: loss is nan at step 3\n"),
    ],
)  # fmt: skip
def test_errors_of_stages_are_short_unless_asked(error, line, capsys, monkeypatch):
    def command(_):
        raise error

    monkeypatch.setattr(cli.logging.getLogger(), "level", cli.logging.WARNING)
    with pytest.raises(SystemExit, match="2"):
        cli.main(command)
    assert capsys.readouterr().err == line + "(--verbose shows where)\n"
    monkeypatch.setattr(cli.logging.getLogger(), "level", cli.logging.INFO)
    with pytest.raises(type(error)):
        cli.main(command)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="it asks glibc")
def test_freed_memory_is_used_again():
    code = """
import resource, sys
import numpy as np
from dgr_jax.config import cli
if sys.argv[1] == "reuse":
    cli.reuse_memory()
np.ones(1 << 22)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    np.ones(1 << 22)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
    faults = {
        how: int(subprocess.check_output([sys.executable, "-c", code, how], cwd=ROOT))
        for how in ("reuse", "leave")
    }
    assert faults["reuse"] < faults["leave"] / 10


def test_every_command_uses_freed_memory_again(monkeypatch):
    asked = []
    monkeypatch.setattr(cli, "reuse_memory", lambda: asked.append(True))
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    cli.main(lambda _: None)
    assert asked == []  # the memory of another program is its own
    monkeypatch.setattr(cli.interrupts, "is_program", lambda: True)
    monkeypatch.setattr(cli.interrupts, "heard", contextlib.nullcontext)  # a program's last act
    cli.main(lambda _: None)
    assert asked == [True]


def test_other_ends_of_a_command():
    def interrupted(_):
        raise KeyboardInterrupt

    def preempted(_):
        raise SystemExit(75)

    def wrong(_):
        raise KeyError("a bug")

    with pytest.raises(SystemExit, match="130"):
        cli.main(interrupted)
    with pytest.raises(SystemExit, match="75"):
        cli.main(preempted)
    with pytest.raises(KeyError, match="a bug"):
        cli.main(wrong)


# data that is not there


MISSING = {
    "msmarco.gin": [
        "collection.tsv (also as .gz): pid <tab> text, one passage a line",
        "queries.train.tsv (also as .gz): qid <tab> text",
        "qrels.train.tsv (also as .gz): qid 0 pid relevance",
        "queries.dev.small.tsv", "qrels.dev.small.tsv",
        "from collectionandqueries.tar.gz of https://microsoft.github.io/msmarco/",
    ],
    "nq.gin": [
        "psgs_w100.tsv", "a header id, text, title",
        "biencoder-nq-train.json", "biencoder-nq-dev.json", '"positive_ctxs"',
        "https://dl.fbaipublicfiles.com/dpr/wikipedia_split/psgs_w100.tsv.gz",
    ],
    "squad.gin": [
        "corpus.jsonl (also as .gz)", '{"_id", "title" (optional), "text", "metadata" (optional)}',
        "queries.jsonl",
        "qrels/seen_train.tsv", "qrels/seen_test.tsv", "query-id, corpus-id, score",
    ],
    "beir.gin": ["corpus.jsonl", "queries.jsonl", "qrels/train.tsv", "qrels/test.tsv", "beir-cell"],
    "laptop.gin": ["corpus.jsonl", "queries.jsonl", "qrels/train.tsv", "qrels/test.tsv"],
    "dgr.gin": ["corpus.jsonl", "queries.jsonl", "qrels/train.tsv", "qrels/test.tsv"],
    "ltrgr.gin": ["corpus.jsonl", "queries.jsonl", "qrels/train.tsv", "qrels/test.tsv"],
    "squad_dgr.gin": ["qrels/seen_train.tsv", "qrels/seen_test.tsv"],
    "msmarco_dgr.gin": ["collection.tsv", "qrels.dev.small.tsv"],
    "nq_dgr.gin": ["psgs_w100.tsv", "biencoder-nq-dev.json"],
    "dense.gin": ["corpus.jsonl", "queries.jsonl", "qrels/train.tsv", "qrels/test.tsv"],
    "nfcorpus_dense.gin": ["corpus.jsonl", "qrels/train.tsv", "qrels/test.tsv"],
    "squad_dense.gin": ["qrels/seen_train.tsv", "qrels/seen_test.tsv"],
}  # fmt: skip


@pytest.mark.parametrize("name", MISSING)
@pytest.mark.parametrize("there", [False, True])
def test_missing_data_is_named_before_anything_starts(name, there, capsys, tmp_path):
    data = tmp_path / "data"
    if there:
        data.mkdir()
    arguments = (f"--gin_file={name}", "--model_dir=m", *needed(name), f"--data_dir={data}")
    written = complaint(capsys, prepare.command, *arguments)
    state = "lacks" if there else "does not exist"
    assert written.startswith(f"error: {data} {state}")
    for words in MISSING[name]:
        assert words in written
    assert "--data_dir" in written
    assert [path.name for path in Path("m").iterdir()] == ["config.gin"]


def test_every_shipped_experiment_on_own_data_is_looked_at():
    assert set(MISSING) == {name for name in EXPERIMENTS if needed(name)}


@pytest.mark.parametrize(
    ("split", "lines", "message"),
    [
        ("test", "", "qrels of split 'test': found none; expected a judged query or more"),
        ("train", "", "qrels of split 'train': found none; expected a judged query or more"),
        ("train", "q\tp\t0\n", "split 'train' has no positive: no relevance of 1 or more"),
        (
            "test",
            "q\tp\t1\nq\tx\t1\n",
            "qrels of split 'test': found 1 of 2 judgements with 1 unknown passage id (x); ",
        ),
    ],
)
def test_judgements_that_cannot_be_used(split, lines, message, capsys, tmp_path):
    qrels = {name: [Qrel("q", "p", 1)] for name in ("train", "test")}
    write_beir(tmp_path / "data", [Passage("p", "text")], [Query("q", "why")], qrels)
    changed = tmp_path / "data" / "qrels" / f"{split}.tsv"
    changed.write_text(f"query-id\tcorpus-id\tscore\n{lines}")
    written = complaint(
        capsys, prepare.command, "--gin_file=beir.gin", "--model_dir=m", "--data_dir=data"
    )
    assert f"error: {message}" in written


def test_a_model_dir_that_is_a_file(capsys, tmp_path):
    (tmp_path / "m").write_text("")
    written = complaint(capsys, train.command, QUICKSTART, "--model_dir=m")
    assert written == "error: MODEL_DIR m cannot be made: File exists\n"


def test_missing_files_of_settings_are_named_before_anything_starts(capsys):
    written = complaint(capsys, train.command, QUICKSTART, "--gin.SentencePiece.path=no.model")
    assert written.startswith("error: SentencePiece.path: no file at 'no.model'; ")
    written = complaint(
        capsys,
        train.command,
        QUICKSTART,
        "--gin.TEACHER=@RunTeacher()",
        "--gin.RunTeacher.path=run",
    )
    assert written.startswith("error: RunTeacher.path: no file at 'run'; ")
    written = complaint(capsys, train.command, QUICKSTART, "--gin.Evaluate.measures=('Sucess@1',)")
    assert written.startswith("error: unknown measure 'Sucess@1'")
    assert [path.name for path in Path("quickstart_model").iterdir()] == ["config.gin"]


def test_unknown_stage(capsys):
    written = complaint(capsys, train.command, QUICKSTART, "--stages=prepare, genrate")
    assert written.startswith("error: unknown stage 'genrate', expected one of ")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--query=why",), "--query and --queries need --model_dir"),
        (("--queries=q.tsv", "--model_dir=m"), "--queries needs --output"),
        ((QUICKSTART, "--output=run.trec"), "--output needs --queries"),
        (("--query=why", "--model_dir=m", "--output=x"), "--output needs --queries"),
        ((QUICKSTART, "--report_speed"), "--report_speed needs --queries"),
        ((QUICKSTART, "--k=5"), "--k needs --query or --queries"),
        ((QUICKSTART, "--system=control"), "--system needs --query or --queries"),
        (
            ("--query=why", "--model_dir=m", "--system=distil"),
            "system: got 'distil', expected one of distill, control, generate, refresh, dense, tho",
        ),
        (
            ("--query=why", "--model_dir=m", "--gin.Search.num_beams=9"),
            "--gin.Search.num_beams has no effect on --query and --queries, which ask the finished "
            "student of --model_dir; there are --k, --num_beams, --batch_size, --system",
        ),
        (("--query=why", "--model_dir=m", QUICKSTART), "--gin_file has no effect on --query"),
        (("--query=why", "--model_dir=m", "--rerank=r.trec"), "--rerank needs --queries"),
        (
            ("--queries=q", "--model_dir=m", "--rerank=r.trec", "--report_speed"),
            "--rerank and --report_speed exclude each other",
        ),
        (("--queries=q", "--output=o", "--model_dir=m", "--json"), "--json needs --query"),
        (("--query=why", "--model_dir=m", "--data_dir=d"), "--data_dir has no effect on --query"),
    ],
)
def test_retrieve_asks_for_what_it_needs(arguments, message, capsys):
    assert message in complaint(capsys, retrieve.command, *arguments)


def test_evaluate_asks_for_run_and_qrels(capsys):
    assert "--run and --qrels go together" in complaint(capsys, evaluate.command, "--run=x.trec")


# components


def test_components_are_known_by_their_names():
    made = configurables.configurables()
    assert made["RunTeacher"](path="x") == RunTeacher(path="x")
    assert made["margin_mse"]().func.__name__ == "margin_mse"
    assert all(name == factory.__name__ for name, factory in made.items())


def test_nested_defaults_restate_what_is_so_anyway():
    found = list(configurables.nested_defaults())
    assert ("ResidualQuantization", "embeddings", "TfidfSvd") in found
    assert ("Bm25Teacher", "bm25", "Bm25") in found
    made = configurables.configurables()
    for component, setting, default in found:
        # What else these need is tested above.
        if component not in (
            "Experiment", "Prepare", "PseudoQueries", "Distillation", "DenseExperiment",
            "DensePrepare", "Evaluate", "Bm25Baseline", "Refresh", "LivingStudy",
        ):  # fmt: skip
            assert getattr(made[component](), setting) == made[default]()


def test_resources_lie_in_the_checkout_or_the_package(tmp_path, monkeypatch):
    assert cli.resources("gin_configs") == GIN
    monkeypatch.setattr(shipped, "PACKAGE", tmp_path)
    (tmp_path / "tasks").mkdir()
    assert cli.resources("tasks") == tmp_path / "tasks"


# gin files of strangers


def write_gin(folder: Path, name: str, text: str) -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


@pytest.mark.parametrize(
    "statement",
    [
        "import evil",
        "import evil.inner",
        "from evil import inner",
        "import evil as numpy",
        "from __gin__ import dynamic_registration\nimport evil",
        "import dgr_jax.config.cli",
    ],
)
@pytest.mark.parametrize("included", [False, True])
def test_gin_files_import_nothing(statement, included, tmp_path, monkeypatch):
    write_gin(tmp_path, "evil/__init__.py", "raise SystemExit('it ran')")
    write_gin(tmp_path, "evil/inner.py", "")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    kept = "include 'quickstart.gin'\n"
    if included:
        write_gin(tmp_path, "part.gin", statement)
        write_gin(tmp_path, "config.gin", f"{kept}include 'part.gin'\n")
    else:
        write_gin(tmp_path, "config.gin", f"{kept}{statement}\n")
    line = 1 if included else 2
    with pytest.raises(Mistake, match=rf".*\.gin:{line}: got an import of .*, expected none"):
        load(f"--model_dir={tmp_path}")
    assert "evil" not in sys.modules


@pytest.mark.parametrize("how", ["full", "above", "link", "nested"])
def test_gin_files_include_within_their_folders(how, tmp_path, monkeypatch):
    away = write_gin(tmp_path, "away/secret.gin", "SEED = 7")
    model_dir = tmp_path / "model"
    included = {"full": str(away), "above": "../away/secret.gin", "link": "linked.gin"}
    name = included.get(how, "part.gin")
    config = write_gin(model_dir, "config.gin", f"include 'quickstart.gin'\ninclude '{name}'\n")
    if how == "link":
        (model_dir / "linked.gin").symlink_to(away)
    write_gin(model_dir, "part.gin", f"include '{away}'\n")
    monkeypatch.chdir(model_dir)
    with pytest.raises(Mistake, match="gin:[12]: include .*: expected a file in .*search_paths"):
        load(f"--model_dir={model_dir}")
    bound = load(
        f"--gin_file={config}", f"--gin_search_paths={away.parent}", f"--model_dir={model_dir}"
    )
    assert bound.prepare.seed == 7 or how == "above"


def test_gin_files_of_a_folder_include_each_other(tmp_path, monkeypatch):
    part = write_gin(tmp_path, "mine/part.gin", "SEED = 7")
    file = write_gin(tmp_path, "mine/all.gin", f"include 'quickstart.gin'\ninclude '{part}'\n")
    monkeypatch.chdir(tmp_path)
    assert load(f"--gin_file={file}").prepare.seed == 7
    loop = write_gin(tmp_path, "mine/loop.gin", "include 'mine/loop.gin'\n")
    with pytest.raises(Mistake, match="includes mine/loop.gin, which includes it"):
        load(f"--gin_file={loop}")


def test_a_binding_is_one_binding():
    with pytest.raises(Mistake, match="expected one --gin.NAME=VALUE"):
        load("--gin_file=quickstart.gin", "--gin.SEED=(1,)\nimport evil")


def test_model_dir_is_the_one_given(tmp_path):
    text = f"include 'quickstart.gin'\nExperiment.model_dir = '{tmp_path / 'elsewhere'}'\n"
    write_gin(tmp_path, "config.gin", text)
    with pytest.raises(Mistake, match="the gin files set .*elsewhere"):
        load(f"--model_dir={tmp_path}")
    assert not (tmp_path / "elsewhere").exists()


@pytest.mark.parametrize("name", ["../evil", "/tmp/evil", "quickstart/../quickstart", ""])
def test_tasks_are_names(name):
    from dgr_jax.data.task_files import task_file

    with pytest.raises(ValueError, match="Prepare.tasks: got .*, expected one of"):
        task_file(name)


# README and docs; every command that they name: test_docs


def test_the_documents_say_what_a_gin_file_needs():
    page = ROOT / "docs" / "how_to" / "own_data.md"
    lines = page.read_text(encoding="utf-8").splitlines()
    rows = [line for line in lines if line.startswith("| `--gin_file=")]
    named = {name: row for row in rows for name in re.findall(r"[\w/]+\.gin", row.split("|")[1])}
    assert len(named) >= 10
    for name, row in named.items():
        try:
            load(f"--gin_file={name}", "--data_dir=FOLDER", "--model_dir=/dev/null/DIR")
        except Mistake as mistake:
            for needed in re.findall(r"--gin\.([\w.]+)=\.\.\.", str(mistake)):
                assert f"--gin.{needed}" in row, (name, needed)


def test_the_documents_import_what_is_there():
    for page in (ROOT / "README.md", *(ROOT / "docs").rglob("*.md")):
        text = page.read_text(encoding="utf-8")
        for line in re.findall(r"^from dgr_jax\S* import .*$", text, re.MULTILINE):
            if "t5x" not in line and ".integrations." not in line:
                exec(line, {})
                continue
            # Packages of others, which need not be here.
            _, module, _, names = line.split(" ", 3)
            source = ROOT.joinpath(*module.split(".")).with_suffix(".py")
            for name in names.split(", "):
                defined = rf"^ *(class|def) {name}\b"
                file = source if source.is_file() else source.with_suffix("") / f"{name}.py"
                assert file.stem == name or re.search(defined, file.read_text(), re.MULTILINE)
