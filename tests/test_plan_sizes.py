"""What a plan needs, told before it is made, against one that is made."""

from __future__ import annotations

import pytest

from dgr_jax import plan as plan_command
from dgr_jax import train
from dgr_jax.capacity import counting
from dgr_jax.config import cli, gin_files
from dgr_jax.corpora import store as stores
from dgr_jax.corpora.quickstart import QuickstartCollection
from dgr_jax.retrieval.bm25 import Bm25
from dgr_jax.retrieval.simultaneous import Lexical

WORDS = 81.8  # of a passage


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return stores.write(QuickstartCollection().passages(), tmp_path_factory.mktemp("s") / "store")


def made(plan, store, folder):
    """(bytes on disk, bytes in memory) of a plan that is made."""
    planner = plan.planner(store, folder, keep=True)
    return sum(file.stat().st_size for file in folder.glob("*/*")), planner.nbytes


@pytest.mark.parametrize(
    "plan",
    [
        Lexical(),
        Lexical(bm25=Bm25(stemmer="", stop_words="")),
        Lexical(grams=5),
        Lexical(grams=5, sentences_weight=0.5),
    ],
)
def test_a_plan_is_as_large_as_was_told(plan, store, tmp_path):
    disk, memory = made(plan, store, tmp_path / "plans")
    texts = [passage.contents for passage in store]
    sizes = plan.sizes(len(store), WORDS, texts)
    assert sizes.disk == pytest.approx(disk, rel=0.02)
    assert sizes.memory == pytest.approx(memory, rel=0.02)
    assert sizes.planned == 100 and sizes.seconds > 0
    some = plan.sizes(len(store), WORDS, texts[::3])
    assert some.disk == pytest.approx(disk, rel=0.1)
    assert some.memory == pytest.approx(memory, rel=0.1)


def test_without_a_text_at_hand_sizes_are_those_of_english(store, tmp_path):
    disk, memory = made(Lexical(), store, tmp_path / "plans")
    sizes = Lexical().sizes(len(store), WORDS)
    assert sizes.disk == pytest.approx(disk, rel=0.2)
    assert sizes.memory == pytest.approx(memory, rel=0.25)
    assert Lexical().sizes(6, WORDS).planned == 6
    disk, memory = made(Lexical(grams=5), store, tmp_path / "grams")
    sizes = Lexical(grams=5).sizes(len(store), WORDS)
    assert sizes.disk == pytest.approx(disk, rel=0.2)
    assert sizes.memory == pytest.approx(memory, rel=0.25)
    plan = Lexical(sentences_weight=0.5)
    disk, memory = made(plan, store, tmp_path / "sentences")
    sizes = plan.sizes(len(store), WORDS)
    assert sizes.disk == pytest.approx(disk, rel=0.2)
    assert sizes.memory == pytest.approx(memory, rel=0.25)
    large = Lexical().sizes(8_800_000, 55)
    assert 2e9 < large.disk < large.memory < 3e9 and large.seconds == pytest.approx(0.0353)


def experiment(*flags):
    args, bindings = cli.parse(cli.parser("train", ""), ["--gin_file=quickstart.gin", *flags])
    return gin_files.load_experiment(args, bindings, keep=False)


def test_what_lies_there_is_looked_at(store, tmp_path):
    texts = [passage.contents for passage in store]
    assert counting.sample(experiment(f"--model_dir={tmp_path}")) == texts
    args, bindings = cli.parse(
        cli.parser("train", ""), ["--gin_file=beir.gin", f"--model_dir={tmp_path}", "--data_dir=d"]
    )
    assert counting.sample(gin_files.load_experiment(args, bindings, keep=False)) == []


def test_the_commands_count_a_plan(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cli, "_configure_logging", lambda verbose: None)
    words = "plan Lexical of 100 passages a query: 180 kB in the memory of the host, "
    plan_command.command(["--gin_file=quickstart.gin", "--topology=h100:1", "--programs=generate"])
    assert words in capsys.readouterr().out
    monkeypatch.setenv("COLUMNS", "200")
    train.command(["--gin_file=quickstart.gin", "--plan"])
    said = capsys.readouterr().out
    (line,) = (line for line in said.splitlines() if words in line)
    assert "evaluate" in line and "162 kB" in line
    train.command(["--gin_file=quickstart.gin", "--plan", "--gin.PLAN=None"])
    assert "Lexical" not in capsys.readouterr().out
    assert not list(tmp_path.iterdir())
