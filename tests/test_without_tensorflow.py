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
from tests.test_generation_data import Collection, Experiment, examples, files, one_after_the_other

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


def prepared_twice(make, tmp_path, request):
    (tmp_path / "with").mkdir(), (tmp_path / "without").mkdir()
    make(tmp_path / "with")
    request.getfixturevalue("missing")
    make(tmp_path / "without")
    made = without_records(tmp_path / "with")
    assert without_records(tmp_path / "without") == made
    assert (tmp_path / "with" / "tfds").is_dir() and not (tmp_path / "without" / "tfds").exists()
    return made


def said(caplog):
    return [r.getMessage() for r in caplog.records if "SeqIO" in r.getMessage()]


@with_seqio
@pytest.mark.parametrize("everywhere", [None, one_after_the_other])
def test_the_same_bytes(everywhere, tmp_path, monkeypatch, request, caplog):
    monkeypatch.setattr(examples, "PASSAGES_A_PART", 5)
    made = prepared_twice(lambda to: prepare(Experiment(), to, everywhere), tmp_path, request)
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
    made = prepared_twice(
        lambda to: dense_prepare.prepare(DenseExperiment(), to), tmp_path, request
    )
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
