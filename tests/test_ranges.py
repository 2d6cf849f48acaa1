"""Numbers that no setting may be are refused where settings are made, by name."""

from __future__ import annotations

import dataclasses
import math

import pytest

from dgr_jax import ranges
from dgr_jax.config import cli, configurables, gin_files
from dgr_jax.config.mistakes import Mistake
from dgr_jax.corpora.quickstart import QuickstartCollection
from dgr_jax.experiments.study import Study
from dgr_jax.identifiers.atomic import Atomic
from dgr_jax.losses import contrastive, ranking

# What the required settings of a component may be, where a number is tried in another one.
GIVEN = {
    "str": "x", "int": 8, "Collection": QuickstartCollection(), "tuple[str, ...]": ("x",),
    "Scheme": Atomic(),
}  # fmt: skip

# Settings that may be -1, and what it means.
NEGATIVE = {
    "Mesh.data": "all devices that the other axes leave",
    "Mesh.model": "the same",
    "Mesh.fsdp": "the same",
    "Scoring.query_shift": "added to a log-probability: of either sign",
    "Scoring.query_cap": "a log-probability: below 0",
    "ltrgr.positive_above": "a score of the teacher: of either sign",
}


def numeric():
    """(component, setting) of every number of everything that gin files can name."""
    for component in configurables._components():
        for field in dataclasses.fields(component):
            if field.type in ("int", "float", "int | None", "float | None"):
                yield component, field.name


def given(component):
    """A value for each setting that must be given."""
    required = (
        field
        for field in dataclasses.fields(component)
        if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
    )
    return {field.name: GIVEN.get(field.type, object()) for field in required}


def make(component, name, value):
    settings = given(component) | {name: value}
    if component.__name__ == "Mesh" and name != "data":
        settings["data"] = 1  # one axis at most is free
    return component(**settings)


@pytest.mark.parametrize(
    ("component", "name"),
    [pytest.param(*pair, id=f"{pair[0].__name__}.{pair[1]}") for pair in numeric()],
)
def test_every_number_is_checked_where_settings_are_made(component, name):
    setting = f"{component.__name__}.{name}"
    for value in (-1, math.nan, math.inf):
        if value == -1 and setting in NEGATIVE:
            assert getattr(make(component, name, value), name) == value
            continue
        with pytest.raises(ValueError) as error:
            make(component, name, value)
        assert str(error.value).startswith(f"{setting}: got {value}, expected ")


@pytest.mark.parametrize(
    ("setting", "most"),
    [(f"T5Config.{name}_layers", "1,000")
     for name in ("num_encoder", "num_decoder", "prefix_adaptive")]
    + [(name, "1,000,000,000 tokens, whose ids are int32")
       for name in ("T5Config.vocab_size", "SentencePiece.size", "SentencePiece.extra_ids",
                    "Atomic.reserve", "ResidualQuantization.reserve", "KMeansTree.reserve",
                    "ResidualQuantization.codebook_size", "KMeansTree.branching")],
)  # fmt: skip
def test_sizes_that_no_array_can_have_are_refused(setting, most):
    component, _, name = setting.partition(".")
    (component,) = (c for c in configurables._components() if c.__name__ == component)
    with pytest.raises(ValueError, match=rf"^{setting}: got 10{{12}}, expected \d to {most}"):
        make(component, name, 10**12)


@pytest.mark.parametrize("component", configurables._components(), ids=lambda c: c.__name__)
def test_a_part_of_a_step_is_no_count(component):
    for field in dataclasses.fields(component):
        if field.type not in ("int", "int | None"):
            continue
        with pytest.raises(ValueError) as error:
            make(component, field.name, 2.5)
        assert str(error.value).startswith(f"{component.__name__}.{field.name}: got 2.5, expected ")


def test_the_documented_negative_numbers_are_settings():
    losses = {f"{n}.{s}" for n in ranking.LOSSES for s in configurables.defaults(n)}
    assert NEGATIVE.keys() <= losses | {f"{c.__name__}.{n}" for c, n in numeric()}


@pytest.mark.parametrize("name", sorted(ranking.LOSSES | contrastive.LOSSES))
def test_every_number_of_a_loss_is_checked_where_it_is_made(name):
    make_loss = configurables.configurables()[name]
    for setting, default in configurables.defaults(name).items():
        if isinstance(default, bool):
            continue
        wrong = ("x",) if isinstance(default, str) else (-1.0, math.nan, math.inf)
        for value in wrong:
            if value == -1.0 and f"{name}.{setting}" in NEGATIVE:
                make_loss(**{setting: value})
                continue
            with pytest.raises(ValueError) as error:
                make_loss(**{setting: value})
            assert str(error.value).startswith(f"{name}.{setting}: got {value!r}, expected ")


@pytest.mark.parametrize("value", [math.nan, math.inf, 2.5])
def test_a_count_that_is_no_whole_number_is_named(value):
    with pytest.raises(ValueError, match=r"^TopM\.size: got .*, expected a whole number$"):
        configurables.configurables()["TopM"](size=value)


def test_words_of_ranges():
    found = [
        range_.words
        for range_ in (
            ranges.at_least(2, ", EOS counted"), ranges.above(0), ranges.below(0),
            ranges.between(0, 1), ranges.from_to_below(0, 1), ranges.one_of("a", "b"),
            ranges.optional(ranges.above(0)), ranges.each(ranges.at_least(1)), ranges.SEED,
        )
    ]  # fmt: skip
    assert found == [
        "at least 2, EOS counted", "above 0", "below 0", "0 to 1", "at least 0, below 1",
        "one of 'a', 'b'", "above 0, or None", "each at least 1", "0 to 4,294,967,295",
    ]  # fmt: skip
    assert not ranges.at_least(0).holds("1") and ranges.optional(ranges.above(0)).holds(None)


@pytest.mark.parametrize("name", ["seeds", "beams"])
@pytest.mark.parametrize("values", [(-1,), (1, 1), (math.nan,)])
def test_numbers_of_a_study_are_checked(name, values):
    with pytest.raises(ValueError, match=rf"^Study\.{name}: got .*, expected "):
        Study(gin_files=("a.gin",), **{name: values})


@pytest.mark.parametrize(
    ("binding", "message"),
    [
        ("distill/Training.steps=-1", "Training.steps: got -1, expected at least 0"),
        ("SEED=-1", "Prepare.seed: got -1, expected 0 to 4,294,967,295"),
        ("LEARNING_RATE=0", "Linear.peak: got 0.0, expected above 0"),
        ("Training.checkpoint_every=0", "Training.checkpoint_every: got 0, expected at least 1"),
        ("T5Config.dropout_rate=1", "T5Config.dropout_rate: got 1.0, expected at least 0, below 1"),
        ("Generation.label_smoothing=1e999", "Generation.label_smoothing: got inf, expected at"),
        ("ranknet.temperature=0", "ranknet.temperature: got 0.0, expected above 0"),
        ("KMeansTree.branching=1", None),  # no part of this experiment
        ("Training.microbatches=5", "generate/Training.microbatches: got 5, expected a number th"),
    ],
)
def test_the_command_line_names_the_setting(binding, message):
    flags = ("--gin_file=quickstart.gin", "--model_dir=m", f"--gin.{binding}")
    load = lambda: gin_files.load_experiment(*cli.parse(cli.parser("train", ""), flags), keep=False)
    if message is None:
        load()
        return
    with pytest.raises(Mistake) as error:
        load()
    assert str(error.value).startswith(message)
