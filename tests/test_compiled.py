"""Compiled programs are kept in the user's cache folder, where that can be, and harm nobody."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import types
import warnings
from pathlib import Path

import pytest

from dgr_jax import traced
from dgr_jax.config import cli, compiled
from tests.conftest import ROOT

VARIABLES = ("JAX_COMPILATION_CACHE_DIR", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS",
             compiled.VARIABLE, "JAX_NUM_PROCESSES", "SLURM_STEP_NUM_TASKS")  # fmt: skip


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A command of ours, before JAX is imported, in an empty home."""
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delitem(sys.modules, "jax", raising=False)
    monkeypatch.setattr(compiled.interrupts, "is_program", lambda: True)
    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)
    monkeypatch.setattr(traced, "folder", None)
    return tmp_path / "cache"


def kept(*flags):
    """Where JAX is told to keep what it compiles."""
    parser = cli.plain_parser("serve", "")
    parser.add_argument("--num_processes")
    compiled.keep(parser.parse_args(flags))
    return os.environ.get("JAX_COMPILATION_CACHE_DIR")


def test_it_is_in_the_cache_folder_of_the_user(home):
    folder = kept()
    assert Path(folder).is_dir() and Path(folder).parent == home / "dgr_jax" / "compiled"
    assert folder == str(compiled.folder()) == str(traced.folder)
    assert float(os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"]) < 1


def test_pythons_that_pack_programs_in_other_ways_do_not_share_them(monkeypatch):
    folders = set()
    for version in ((3, 12, 1), (3, 13, 0), (3, 14, 0), (3, 15, 0)):
        monkeypatch.setattr(compiled, "sys", types.SimpleNamespace(version_info=version))
        folders.add(compiled.folder())
    assert len(folders) == 2


def test_a_flag_and_a_variable_turn_it_off(home, monkeypatch):
    assert kept("--no-compilation_cache") is None and traced.folder is None
    monkeypatch.setenv(compiled.VARIABLE, "off")
    assert kept() is None and not home.exists()


@pytest.mark.parametrize(
    ("name", "value"),
    [("JAX_NUM_PROCESSES", "2"), ("SLURM_STEP_NUM_TASKS", "4"), ("--num_processes", "2")],
)
def test_several_processes_compile_for_themselves(home, monkeypatch, name, value):
    flags = [f"{name}={value}"] if name.startswith("-") else []
    if not flags:
        monkeypatch.setenv(name, value)
    assert kept(*flags) is None


def test_what_the_user_has_told_jax_stays(home, monkeypatch):
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "/elsewhere")
    assert kept() == "/elsewhere" and not home.exists()


def test_programs_of_others_are_left_alone(home, monkeypatch):
    monkeypatch.setattr(compiled.interrupts, "is_program", lambda: False)
    assert kept() is None and not home.exists()


def test_a_home_that_cannot_be_written(home, monkeypatch):
    home.write_text("a file")
    assert kept() is None
    monkeypatch.setattr(Path, "home", lambda: (_ for _ in ()).throw(RuntimeError("no home")))
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert kept() is None


def test_the_oldest_programs_make_room(tmp_path):
    for age in range(10):
        path = tmp_path / f"jit-{age}-cache"
        path.write_bytes(b"x" * 100)
        os.utime(path, (1000 - age, 1000 - age))
    compiled.prune(tmp_path, most=1000)
    assert len(list(tmp_path.iterdir())) == 10
    compiled.prune(tmp_path, most=999)
    assert {path.name for path in tmp_path.iterdir()} == {f"jit-{age}-cache" for age in range(4)}


def test_a_damaged_program_is_told_of_and_all_are_removed(tmp_path, monkeypatch, caplog):
    shown = []
    monkeypatch.setattr(warnings, "showwarning", lambda message, *place: shown.append(str(message)))
    (tmp_path / "jit-1-cache").write_bytes(b"x")
    (tmp_path / "autotune").mkdir()
    compiled.mend(tmp_path)
    for done in ("Error writing", "another: Error writing", "Error reading"):
        message = f"{done} persistent compilation cache entry for 'a': Error: x"
        warnings.showwarning(message, UserWarning, "compiler.py", 1)
    assert [line[:7] for line in shown] == ["another"] and not list(tmp_path.iterdir())
    assert caplog.text.count("a compiled program is damaged; all are made again") == 1


PROGRAM = """
import argparse, logging, sys
logging.basicConfig(format="%(message)s")
from dgr_jax.config import compiled
compiled.interrupts.is_program = lambda: True
compiled._LEAST_SECONDS = "0"
compiled.keep(argparse.Namespace(compilation_cache=True))
import jax
print(jax.jit(lambda x: x * 3 + 1)(2.0))
"""


@pytest.mark.slow
def test_the_second_time_nothing_is_compiled_and_damage_is_mended(tmp_path):
    def run():
        given = {name: value for name, value in os.environ.items() if name not in VARIABLES}
        more = {"PYTHONPATH": str(ROOT), "XDG_CACHE_HOME": str(tmp_path)}
        done = subprocess.run(
            [sys.executable, "-c", PROGRAM], env=given | more, capture_output=True, text=True
        )
        assert (done.returncode, done.stdout) == (0, "7.0\n"), done.stderr
        return done.stderr

    def programs():
        return {p: p.read_bytes() for p in tmp_path.rglob("jit__lambda*-cache")}

    assert run() == ""
    first = programs()
    assert first and run() == "" and programs() == first
    for path, whole in first.items():
        path.write_bytes(whole[: len(whole) // 2])  # as a process leaves it that is killed
    assert "a compiled program is damaged; all are made again" in run()
    assert run() == "" and programs().keys() == first.keys()


def test_every_command_has_the_flag():
    parser = cli.parser("train", "")
    assert parser.get_default("compilation_cache") is True
    assert isinstance(parser, argparse.ArgumentParser)
