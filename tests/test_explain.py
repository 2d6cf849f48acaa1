"""`train --explain`: what every macro of gin files is."""

from __future__ import annotations

import pytest

from dgr_jax import train
from dgr_jax.config import cli, configurables, explain
from dgr_jax.config.mistakes import Mistake
from tests.test_cli import EXPERIMENTS


def macros(*flags: str) -> dict[str, explain.Macro]:
    args, bindings = cli.parse(cli.parser("train", ""), flags)
    return {macro.name: macro for macro in explain.macros(args, bindings)}


@pytest.fixture(autouse=True)
def logging_of_the_tests(monkeypatch):
    monkeypatch.setattr(cli, "_configure_logging", lambda verbose: None)


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_macro_of_a_shipped_experiment_says_what_it_means_and_may_be(name):
    known = macros(f"--gin_file={name}")
    assert {"MODEL_DIR", "SEED", "COLLECTION", "TASKS"} <= known.keys()
    for macro in known.values():
        assert macro.meaning and macro.sets and macro.choices, macro


def test_a_macro_of_a_component():
    macro = macros("--gin_file=beir.gin", "--gin.LOSS=@ltrgr()")["LOSS"]
    assert macro.value == "@ltrgr()"
    assert macro.meaning == "How a student's order is compared with the teacher's."
    assert macro.sets == ("Distillation.loss",)
    assert macro.choices[:2] == ("@distilled_ranknet()", "@ltrgr()")
    assert "@single_lh()" not in macro.choices


def test_a_macro_of_one_s_own_file(tmp_path):
    lines = "include 'quickstart.gin'", "# Mine.", "NUM_BEAMS = 7  # few", "", "# Not", "", "A = 1"
    (tmp_path / "own.gin").write_text("\n".join([*lines, "TopM.size = %A"]))
    known = macros(f"--gin_file={tmp_path}/own.gin")
    assert known["NUM_BEAMS"].value == "7"
    assert known["NUM_BEAMS"].meaning.endswith("and take longer. Mine. few")
    assert known["A"] == explain.Macro("A", "1", "", ("TopM.size",), ("a whole number",))


@pytest.mark.parametrize(
    ("name", "setting", "expected"),
    [
        ("Experiment", "initial", ("@Corpus()", "@Pretrained()", "None")),
        ("Evaluate", "search", ("@Search()", "@MultiviewSearch()", "@DenseSearch()")),
        ("Experiment", "evaluate", ("@Evaluate()",)),
        ("KMeansTree", "embeddings", ("@TfidfSvd()", "@SentenceEncoder()", "@FromFile()")),
        ("ResidualQuantization", "num_codes", ("a whole number", "None")),
        ("AdamW", "learning_rate", ("@Constant()", "@ReciprocalSqrt()", "@Linear()", "@Cosine()")),
        ("Evaluate", "measures", ("a tuple, each a string",)),
        ("distilled_ranknet", "margin", ("a number",)),
    ],
)  # fmt: skip
def test_choices_are_those_that_a_setting_takes(name, setting, expected):
    assert configurables.choices(name, setting) == expected


def test_what_must_be_given_is_said_and_nothing_is_written(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    train.command(["--gin_file=beir.gin", "--explain"])
    out = capsys.readouterr().out
    assert "DATA_DIR = (must be given: --data_dir=...)\n    Where the collection lies.\n" in out
    assert "    choices: @RunTeacher(), @Bm25Teacher()," in out
    assert not list(tmp_path.iterdir())
    with pytest.raises(Mistake, match="did you mean NUM_BEAMS"):
        train.command(["--gin_file=beir.gin", "--explain", "--gin.NUM_BEEMS=3"])
