"""Names of version 0.1 still work, and say what they are called now."""

import importlib
import subprocess
import sys

import pytest

from dgr_jax import moved
from tests.conftest import ROOT


@pytest.mark.parametrize("old", sorted(moved.NAMES))
def test_an_old_name_is_a_module_that_is_there(old):
    for new in moved.NAMES[old].split():
        found = importlib.util.find_spec(f"dgr_jax.{new}")
        assert found is not None
        assert importlib.util.find_spec(f"dgr_jax.{old}").loader is not found.loader


def test_old_names_give_the_same_objects():
    code = """
import warnings
with warnings.catch_warnings(record=True) as said:
    warnings.simplefilter("always")
    from dgr_jax import cli
    from dgr_jax.retrieval.recipes import TopM
assert [str(w.message) for w in said] == [
    "dgr_jax.cli is now dgr_jax.config.cli",
    "dgr_jax.retrieval.recipes is now dgr_jax.teaching.list_recipes",
], [str(w.message) for w in said]
import dgr_jax.config.cli, dgr_jax.teaching.list_recipes
assert cli.parser is dgr_jax.config.cli.parser
assert TopM is dgr_jax.teaching.list_recipes.TopM
from dgr_jax import cli, settings
from dgr_jax.experiment import Experiment, Training, describe
from dgr_jax.planning import CHIPS, topology
from dgr_jax.pipeline import without_labels
assert describe is settings.describe and Training.__module__ == "dgr_jax.experiments.common"
assert cli.load_experiment is dgr_jax.config.gin_files.load_experiment
try:
    cli.nothing
except AttributeError as error:
    assert str(error) == "module 'dgr_jax.cli' has no attribute 'nothing'"
else:
    raise AssertionError
from dgr_jax.decoding import beam_search, sampling
from dgr_jax.training.list_decoding import shift_right
with warnings.catch_warnings(record=True) as said:
    warnings.simplefilter("always")
    assert beam_search.sample is sampling.sample
assert [str(w.message) for w in said] == [
    "dgr_jax.decoding.beam_search.sample is now in dgr_jax.decoding.sampling"
]
from dgr_jax.training.objectives import shift_right as before
assert before is shift_right
assert not hasattr(beam_search, "nothing")
from dgr_jax import Retriever
from dgr_jax.retrieval.generative import Retriever as there
from dgr_jax.retrieval.retriever import Retriever as here
assert Retriever is there is here
"""
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_a_name_that_never_was():
    with pytest.raises(ImportError, match="cannot import name 'nothing' from 'dgr_jax'"):
        from dgr_jax import nothing  # noqa: F401
