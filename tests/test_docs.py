"""Every command that README and the documents name is one: its flags, gin files and bindings."""

import argparse
import contextlib
import functools
import importlib
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys

import pytest

from dgr_jax import study as study_command
from dgr_jax import update
from dgr_jax.config import cli, gin_files, questions
from dgr_jax.corpora.beir import write_beir
from dgr_jax.corpora.quickstart import QuickstartCollection
from dgr_jax.experiments.living_study import LivingStudy
from dgr_jax.studies.grid import Grid
from dgr_jax.studies.living import Living
from tests.conftest import ROOT, TINY

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "benchmarks" / "RESULTS.md"]
PAGES += sorted((ROOT / "docs").rglob("*.md"))
KINDS = {"pseudo_queries": ("PseudoQueries",), "study": study_command.KINDS, "update": ("Refresh",)}


def lines_of(text):
    """The lines of the code blocks of a page, indented or fenced, and its `code` in a paragraph."""
    fences = re.findall(r"^```(\w*)\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    blocks = [block for language, block in fences if language in ("", "bash")]
    rest = re.sub(r"^```\w*\n.*?^```$", "", text, flags=re.DOTALL | re.MULTILINE)
    blocks += re.findall(r"(?:^ {4}.*\n)+", rest, re.MULTILINE)
    inline = re.findall(r"`([^`]+)`", re.sub(r"^ {4}.*\n", "", rest, flags=re.MULTILINE))
    blocks += [" ".join(code.split()) for code in inline]
    return [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]


def calls(line):
    """The words of each call of a shell's line. Raises ValueError for what is no such line."""
    words = shlex.shlex(line, posix=True, punctuation_chars="&;|")
    words.whitespace_split = True
    call = []
    for word in words:
        if set(word) <= set("&;|"):
            yield call
            call = []
        else:
            call.append(word)
    yield call


def commands_of(path):
    """Words of every call of a module or script of ours on a page, of pip, and of launchers."""
    for line in lines_of(path.read_text(encoding="utf-8")):
        with contextlib.suppress(ValueError):  # prose
            for words in calls(line):
                start = next((i for i in range(len(words)) if is_program(words[i:])), None)
                if start is not None and "..." not in words:
                    yield words[start:]


def is_program(words):
    program, *rest = words
    return (
        (program == "python" and bool(rest) and rest[0].startswith(("scripts/", "tests/")))
        or (program == "python" and rest[:1] == ["-m"] and len(rest) > 1)
        or (program == "pip" and rest[:1] == ["install"])
        or program.startswith("scripts/launch_")
    )


ALL = {
    " ".join(words): words
    for path in PAGES
    for words in commands_of(path)
    if len(words) > (3 if words[0] == "python" and words[1] == "-m" else 1)
}


class Stop(Exception):
    """A program has read its flags."""


@pytest.fixture
def folder(monkeypatch, tmp_path):
    """A folder to be in, with what the documents call FOLDER, DIR and so on."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cli, "_configure_logging", lambda verbose: None)
    for name in ("DIR", "quickstart_model", "PREPARED", "box"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.gin").write_text("include 'quickstart.gin'\n")
    return tmp_path


def flags_read(monkeypatch, run):
    """The parser of a program of ours and what it has read, before it does anything with it."""
    stopped = []
    parse = argparse.ArgumentParser.parse_args

    def parse_args(parser, argv=None, namespace=None):
        stopped.append(parse(parser, argv, namespace))
        raise Stop

    with monkeypatch.context() as patch:
        patch.setattr(argparse.ArgumentParser, "parse_args", parse_args)
        with pytest.raises(Stop):
            run()
    return stopped[0]


def check_experiment(monkeypatch, name, arguments):
    """The flags of a command, and the experiment that they describe."""
    command = importlib.import_module(f"dgr_jax.{name}").command
    if arguments in (["--version"], ["--help"]):
        with pytest.raises(SystemExit, match="^0$"):
            command(arguments)
        return
    if name == "serve":  # of finished experiments
        flags_read(monkeypatch, lambda: command(arguments))
        return
    read = []

    def parse(parser, argv):
        read.append((parser, *original(parser, argv)))
        raise Stop

    original = cli.parse
    with monkeypatch.context() as patch:
        patch.setattr(cli, "parse", parse)
        with pytest.raises(Stop):
            command(arguments)
    ((parser, args, bindings),) = read
    if name == "retrieve":
        questions.check(parser, args, bindings)
        if args.query or args.queries:
            return
    if name == "evaluate" and args.run:
        assert args.qrels
        return
    if name == "update":  # settings are read where a student is refreshed
        assert bool(bindings[1:]) <= args.refresh
        args.gin_file = args.gin_file or [update.REFRESH]
    if name != "study":
        gin_files.load_experiment(
            args, bindings, KINDS.get(name, gin_files.EXPERIMENTS), keep=False
        )
        return
    own = [binding for binding in bindings if binding.partition(".")[0] in KINDS[name]]
    study = gin_files.load_experiment(args, own, KINDS[name], keep=False)
    others = [b for b in bindings if b not in own and not b.startswith("MODEL_DIR")]
    load = functools.partial(gin_files.from_flags, fill=True)
    if isinstance(study, LivingStudy):
        Living(study, args.model_dir, load, others).check()
        return
    grid = Grid(study, args.model_dir, load, others, args.gin_search_paths)
    gin_files.from_flags(grid.runs[0].flags, fill=True)


@pytest.mark.parametrize("text", sorted(ALL))
def test_a_command_of_the_documents_is_one(text, folder, monkeypatch):
    words = [re.sub(r"^(--gin.SEED|--process_id)=(N|\$i)$", r"\1=0", word) for word in ALL[text]]
    if words[0] == "pip":
        setup = (ROOT / "setup.py").read_text(encoding="utf-8")
        for extras in re.findall(r"(?:\.|dgr_jax)\[([\w,]+)\]", text):
            assert all(f'"{extra}": [' in setup for extra in extras.split(","))
        for option, file in zip(words, words[1:], strict=False):
            assert option != "-r" or (ROOT / file).is_file()
    elif words[0].startswith("scripts/"):
        assert (ROOT / words[0]).is_file()
        check_experiment(monkeypatch, "train", words[words.index("--") + 1 :])
    elif words[1] != "-m" or words[2].startswith(("benchmarks.", "tests.campaigns.")):
        if "exact_search" in text:
            pytest.importorskip("faiss")
        own = words[1:] if words[1] != "-m" else [f"{words[2].replace('.', '/')}.py", *words[3:]]
        path = ROOT / own[0]
        monkeypatch.setattr(sys, "argv", own)
        monkeypatch.syspath_prepend(str(path.parent))
        monkeypatch.syspath_prepend(str(ROOT))
        flags_read(monkeypatch, lambda: runpy.run_path(str(path), run_name="__main__"))
    elif words[2] in ("dgr_jax.serve", "dgr_jax.report"):
        of_finished = importlib.import_module(words[2])
        flags_read(monkeypatch, lambda: of_finished.command(words[3:]))
    elif words[2].startswith("dgr_jax."):
        check_experiment(monkeypatch, words[2].removeprefix("dgr_jax."), words[3:])
    else:
        assert words[2] in ("venv", "pytest", "t5x.train", "t5x.infer", "t5x.eval")


def test_no_program_is_looked_over():
    """What the search above takes for a command, and that it sees many."""
    assert len(ALL) > 60
    assert {words[2] for words in ALL.values() if words[1] == "-m"} >= {
        f"dgr_jax.{name}" for name in
        ("train", "prepare", "retrieve", "evaluate", "pseudo_queries", "plan", "study")
    }  # fmt: skip


# The tour and what is asked of its experiment, run in their order at the smallest size


# Beams for ten answers, and the same questions of the twelve that TINY asks, whatever the seed.
BESIDE_TINY = ("--gin.NUM_BEAMS=16", "--gin.DEPTH=16", "--gin.Evaluate.seed=0")
PAGES_RUN = ("tour.md", "how_to/evaluate.md")


def at_the_smallest_size(words):
    """The words of a call; of one that trains, with the settings of TINY before its own."""
    if words[2:3] != ["dgr_jax.train"]:
        return words
    own = [word for word in words[3:] if not word.startswith("--gin_file=")]
    files = [word for word in words[3:] if word.startswith("--gin_file=")]
    return [*words[:3], *files, *TINY[1:], *BESIDE_TINY, *own]


@pytest.fixture
def around(tmp_path):
    """A folder with what the commands of a page name, but for an experiment."""
    data = QuickstartCollection()
    test = list(data.queries("test"))
    qrels = {split: data.qrels(split) for split in ("train", "test")}
    write_beir(tmp_path / "FOLDER", data.passages(), data.all_queries(), qrels)
    lines = "".join(f"{query.qid}\t{query.text}\n" for query in test[:3])
    (tmp_path / "queries.tsv").write_text(lines)
    shutil.copy(tmp_path / "FOLDER" / "qrels" / "test.tsv", tmp_path / "qrels.tsv")
    given = [f"{q.qid} Q0 {p.pid} 1 1.0 x\n" for q, p in zip(test[:3], data.passages())]  # noqa: B905
    (tmp_path / "given.trec").write_text("".join(given))
    (tmp_path / "scripts").symlink_to(ROOT / "scripts")
    return tmp_path


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES_RUN)
def test_the_commands_of_a_page_run_in_their_order(page, around, together):
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    settings = {
        "PYTHONPATH": str(ROOT),
        "XLA_FLAGS": "--xla_backend_optimization_level=0",
        "JAX_COMPILATION_CACHE_DIR": str(together / "compiled"),
        "JAX_COMPILATION_CACHE_MAX_SIZE": str(1 << 31),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.5",
    }

    def run(*arguments):
        done = subprocess.run(
            [sys.executable, *arguments], cwd=around, env={**os.environ, **settings},
            capture_output=True, text=True, timeout=600,
        )  # fmt: skip
        assert done.returncode == 0, (arguments, done.stderr)
        return done.stdout

    ours = [words for words in commands_of(ROOT / "docs" / page) if words[0] == "python"]
    assert len(ours) > 5
    if page != "tour.md":  # which begins with one
        run("-m", "dgr_jax.train", *TINY, *BESIDE_TINY, "--model_dir=DIR")
    for words in ours:
        if len(words) > 3:
            run(*at_the_smallest_size(words)[1:])
    for code in re.findall(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE):
        assert len(run("-c", code).splitlines()) == 5
