"""Prepare where TensorFlow and SeqIO are not installed: the same arrays, and it says so once."""

import sys

import numpy as np
import pytest

from dgr_jax.data import direct, loading
from dgr_jax.data.vocabulary import SentencePiece
from dgr_jax.experiments.dense import DensePrepare
from dgr_jax.stages import dense_prepare
from dgr_jax.stages.prepare import prepare
from tests.conftest import with_seqio
from tests.test_generation_data import (
    Collection,
    Experiment,
    by_one,  # noqa: F401
    examples,
    files,
    one_after_the_other,
    small_parts,  # noqa: F401
)

TENSORFLOW = ("tensorflow", "tensorflow_datasets", "tensorflow_text", "seqio")


class DenseExperiment:
    collection = Collection()
    prepare = DensePrepare(
        tasks="quickstart",
        vocabulary=SentencePiece(size=60),
        sources=examples.Sources(chunk_words=6, passages=1.0, pseudo_queries=1.0),
        train_splits=("train", "test"),
        query_length=9,
        passage_length=12,
    )


@pytest.fixture
def missing(monkeypatch):
    """Imports of TensorFlow and what needs it fail, although other tests may have had them."""
    for name in [*sys.modules]:
        if name.partition(".")[0] in TENSORFLOW or name == "dgr_jax.data.prepared":
            monkeypatch.delitem(sys.modules, name)
    for name in TENSORFLOW:
        monkeypatch.setitem(sys.modules, name, None)


def without_records(folder):
    """Bytes by file, but for the TFDS dataset."""
    return {name: held for name, held in files(folder).items() if not name.startswith("tfds/")}


def same_bytes(made, without):
    """Those of `made`, whose folder has a TFDS dataset, and of the other folder, which has none."""
    assert (made / "tfds").is_dir() and not (without / "tfds").exists()
    assert without_records(without) == without_records(made)
    return without_records(made)


def said(caplog):
    return [r.getMessage() for r in caplog.records if "SeqIO" in r.getMessage()]


@with_seqio
@pytest.mark.parametrize("everywhere", [None, one_after_the_other])
def test_the_same_bytes(everywhere, by_one, small_parts, missing, tmp_path, caplog):  # noqa: F811
    prepare(Experiment(), tmp_path, everywhere)
    made = same_bytes(by_one, tmp_path)
    assert {name for name in made if name.startswith("arrays/labelled/")} >= {
        "arrays/labelled/encoder_input_tokens.npy",
        "arrays/labelled/decoder_target_tokens.npy",
    }
    (line,) = said(caplog)
    assert line.startswith(
        "prepare: writes token arrays, and neither SeqIO tasks nor a TensorFlow dataset (import of "
        "seqio halted; None in sys.modules); the arrays are the same, unless "
    )
    assert line.endswith("tasks/quickstart.py makes features of its own")


@with_seqio
def test_the_same_bytes_for_a_dual_encoder(tmp_path, request, caplog):
    for name in ("with", "without"):
        if name == "without":
            request.getfixturevalue("missing")
        (tmp_path / name).mkdir()
        dense_prepare.prepare(DenseExperiment(), tmp_path / name)
    made = same_bytes(tmp_path / "with", tmp_path / "without")
    folders = {name.split("/")[1] for name in made if name.startswith("arrays/")}
    assert folders == {*("labelled_train", "labelled_test", "passages", "pseudo_queries", "corpus")}
    assert len(said(caplog)) == 1


def test_examples_in_several_blocks(monkeypatch):
    class Lengths:
        def encode_inputs(self, texts, length):
            return np.array([[len(text)] * length for text in texts], np.int32)

    monkeypatch.setattr(direct, "_BLOCK", 2)
    made = examples.of_positives(("a" * n, n, "") for n in range(5))
    blocks = list(direct.positives_arrays(made, Lengths(), 2, 3))
    assert [len(block["query"]) for block in blocks] == [2, 2, 1]
    assert blocks[2]["positives"].tolist() == [[4, -1, -1]]
    assert blocks[2]["grades"].tolist() == [[1, 0, 0]]
    assert blocks[2]["query"].tolist() == [[4]]
    assert blocks[2]["encoder_input_tokens"].tolist() == [[4, 4]]


def test_tasks_that_do_not_exist_are_named(missing, tmp_path):
    experiment = Experiment()
    experiment.prepare = type(experiment.prepare)(**vars(experiment.prepare) | {"tasks": "none"})
    with pytest.raises(ValueError, match="^Prepare.tasks: got 'none', expected one of "):
        prepare(experiment, tmp_path)


def test_what_is_missing_is_found_by_importing_it(missing):
    assert loading.missing() == "import of seqio halted; None in sys.modules"
    assert loading.prepared() is direct
