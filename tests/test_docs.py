"""Every command that README and the documents name is one: its flags, gin files and bindings."""

import argparse
import functools
import importlib
import re
import runpy
import sys

import pytest

from dgr_jax import study as study_command
from dgr_jax import update
from dgr_jax.config import cli, gin_files, questions
from dgr_jax.experiments.living_study import LivingStudy
from dgr_jax.studies.grid import Grid
from dgr_jax.studies.living import Living
from tests.conftest import ROOT
from tests.documents import PAGES, commands_of, has_arguments

KINDS = {"pseudo_queries": ("PseudoQueries",), "study": study_command.KINDS, "update": ("Refresh",)}

ALL = {
    " ".join(words): words for path in PAGES for words in commands_of(path) if has_arguments(words)
}


class Stop(Exception):
    """A program has read its flags."""


@pytest.fixture
def folder(monkeypatch, tmp_path):
    """A folder to be in, with what the documents call FOLDER, DIR and so on."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cli, "_configure_logging", lambda verbose: None)
    for name in ("DIR", "quickstart_model", "PREPARED", "box", "atomic"):
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
