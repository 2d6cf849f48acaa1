"""Token embeddings from the passages; the student and the dense encoder that start with them."""

from __future__ import annotations

import argparse
import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest

from dgr_jax import partitioning
from dgr_jax.config import cli, gin_files
from dgr_jax.model_dir import kept
from dgr_jax.models import corpus_start
from dgr_jax.models.dual_encoder import DualEncoder, DualEncoderConfig
from dgr_jax.models.initial import Corpus, Pretrained
from dgr_jax.models.t5 import Transformer
from dgr_jax.stages import pipeline
from dgr_jax.stages.prepared import Prepared
from dgr_jax.stages.start import counted, parameters
from dgr_jax.training.optimizers import Adafactor
from dgr_jax.training.step import init_state
from tests import students, test_dense_experiment, test_experiment
from tests.conftest import TINY
from tests.reference import corpus_start as reference

CORPUS = dataclasses.replace(test_experiment.BASE, initial=Corpus())
DENSE = dataclasses.replace(test_dense_experiment.BASE, initial=Corpus())


def texts(count, size, *, subjects=8, seed=0):
    """Token lists of one subject each, between common words, without 5 and with 7 in every one."""
    random = np.random.default_rng(seed)
    own = np.array_split(np.arange(20, size), subjects)
    made = []
    for subject in random.integers(subjects, size=count):
        common = random.integers(8, 20, size=random.integers(2, 5))
        of_subject = random.choice(own[subject], size=random.integers(3, 9))
        made.append([7, *common.tolist(), *of_subject.tolist()])
    return made


def found(sentences, passages, size, width):
    cut = len(sentences) // 3
    blocks = [
        corpus_start.counted(sentences[:cut], size, binary=True),
        corpus_start.counted(passages, size, binary=False),
        corpus_start.counted(sentences[cut:], size, binary=True),
    ]
    return corpus_start.embeddings(blocks, width)


# the analysis


def test_counts_of_tokens():
    some = [[3, 1, 3, 3], [], [2]]
    whole = corpus_start.counted(some, 5, binary=False).toarray()
    np.testing.assert_allclose(
        whole, np.log1p([[0, 1, 0, 3, 0], [0, 0, 0, 0, 0], [0, 0, 1, 0, 0]]), rtol=1e-6
    )
    binary = corpus_start.counted(some, 5, binary=True).toarray()
    np.testing.assert_array_equal(binary, whole > 0)
    assert corpus_start.counted([], 5, binary=True).shape == (0, 5)


@pytest.mark.parametrize("size", [60, 300])  # the whole matrix, and the space of its powers
def test_embeddings_are_those_of_the_definition(size):
    sentences, passages = texts(400, size), texts(200, size, seed=1)
    tokens, rows = found(sentences, passages, size, 8)
    expected = reference.embeddings(sentences, passages, size, 8)
    assert set(range(size)) - set(tokens.tolist()) == {0, 1, 2, 3, 4, 5, 6, 7}
    np.testing.assert_allclose(np.linalg.norm(rows, axis=1), 8**0.5, rtol=1e-5)
    # Singular vectors are the same up to their sign: the products of the rows are the same.
    np.testing.assert_allclose(
        rows @ rows.T, (expected @ expected.T)[np.ix_(tokens, tokens)], atol=2e-2
    )
    assert rows.dtype == np.float32 and tokens.dtype == np.int32


def test_fewer_texts_than_dimensions():
    some = [[3, 4], [4, 5], [6]]
    tokens, rows = corpus_start.embeddings([corpus_start.counted(some, 9, binary=True)], 16)
    np.testing.assert_array_equal(tokens, [3, 4, 5, 6])
    np.testing.assert_allclose(
        rows @ rows.T, (e := reference.embeddings(some, [], 9, 16)[3:7]) @ e.T, atol=1e-3
    )
    assert not rows[:, 3:].any() and rows.shape == (4, 16)


@pytest.mark.parametrize("some", [[], [[]], [[3, 4], [3, 4]]])
def test_texts_that_tell_nothing_apart_give_no_rows(some):
    tokens, rows = corpus_start.embeddings([corpus_start.counted(some, 9, binary=True)], 4)
    assert tokens.shape == (0,) and rows.shape == (0, 4)


def test_the_same_texts_give_the_same_rows():
    sentences, passages = texts(300, 300), texts(100, 300, seed=1)
    first, second = (found(sentences, passages, 300, 8) for _ in range(2))
    jax.tree.map(np.testing.assert_array_equal, first, second)


# stages and settings


def test_a_stage_of_its_own_where_it_is_asked_for():
    assert "start" not in test_experiment.BASE.stages | test_dense_experiment.BASE.stages
    assert list(CORPUS.stages) == [
        "prepare", "start", "generate", "candidates", "teach", "distill", "control", "evaluate"
    ]  # fmt: skip
    assert CORPUS.stages["generate"].upstream(CORPUS) == ("prepare", "start")
    assert list(DENSE.stages) == ["prepare", "start", "dense", "evaluate"]
    assert DENSE.stages["dense"].upstream(DENSE) == ("prepare", "start")


def test_an_experiment_that_starts_at_random_has_the_settings_that_it_had():
    asked = pipeline.settings_of(test_experiment.BASE)
    assert asked["generate"].keys() == {"model", "generate", "initial", "prepare"}
    assert asked["generate"]["initial"] is None
    dense = pipeline.settings_of(test_dense_experiment.BASE)
    assert dense["dense"].keys() == {"model", "train", "lists", "initial", "prepare"}


@pytest.mark.parametrize(
    ("change", "made_again"),
    [
        ({"initial": Corpus(max_passages=9)}, True),
        ({"initial": Corpus(shuffled=True)}, True),
        ({"model": dataclasses.replace(CORPUS.model, emb_dim=64)}, True),
        ({"model": dataclasses.replace(CORPUS.model, dropout_rate=0.5)}, False),
        ({"generate": dataclasses.replace(CORPUS.generate, seed=1)}, False),
    ],
)
def test_settings_of_the_stage(change, made_again):
    before, after = (
        pipeline.settings_of(e)["start"] for e in (CORPUS, dataclasses.replace(CORPUS, **change))
    )
    assert (before != after) == made_again


def test_finished_starts_of_older_versions_stay_finished():
    described = pipeline.settings_of(CORPUS)["start"]
    assert described["initial"] == {"is": "Corpus", "max_passages": 1_000_000}


@pytest.mark.parametrize(
    ("experiment", "name"),
    [(test_experiment.BASE, "Experiment"), (test_dense_experiment.BASE, "DenseExperiment")],
)
def test_what_is_no_start_is_refused(experiment, name):
    expected = rf"{name}.initial: got Adafactor, expected None, @Corpus\(\) or @Pretrained\(\)"
    with pytest.raises(ValueError, match=expected):
        dataclasses.replace(experiment, initial=Adafactor())
    assert dataclasses.replace(experiment, initial=Pretrained("t5")).initial.source == "t5"


def loaded(*flags):
    args, bindings = cli.parse(cli.parser("train", ""), list(flags))
    return gin_files.load_experiment(args, bindings, keep=False, fill=True)


@pytest.mark.parametrize(
    "name", ["quickstart", "quickstart_dgr", "quickstart_dense", "laptop", "beir", "dgr", "ltrgr",
             "dense", "squad", "squad_dgr", "squad_dense", "nfcorpus_dense"],
)  # fmt: skip
def test_shipped_experiments_start_from_the_corpus(name):
    assert loaded(f"--gin_file={name}.gin").initial == Corpus()
    assert loaded(f"--gin_file={name}.gin", "--gin.INITIAL=None").initial is None


@pytest.mark.parametrize("name", ["msmarco", "msmarco_dgr", "nq", "nq_dgr"])
def test_those_with_a_published_vocabulary_do_not(name):
    assert loaded(f"--gin_file={name}.gin").initial is None
    with_weights = ("--gin.INITIAL=@Pretrained()", "--gin.Pretrained.source=t5")
    assert loaded(f"--gin_file={name}.gin", *with_weights).initial == Pretrained("t5")


# the stage itself


@pytest.fixture(scope="module")
def made(tiny_model_dir, tmp_path_factory):
    """Flags of an experiment whose stages `prepare` and `start` are done."""
    folder = tmp_path_factory.mktemp("start") / "model"
    for stage in ("prepare", "start"):
        shutil.copytree(tiny_model_dir / stage, folder / stage)
    return (*TINY, f"--model_dir={folder}", "--gin.Mesh.data=-1"), folder


def run(flags, *more):
    experiment = loaded(*flags, *more)
    pipeline.run(experiment, ["start"])
    return experiment


def test_the_stage_writes_what_the_definition_says(made):
    _, folder = made
    prepared = Prepared.load(folder)
    tokens, rows = (np.load(folder / "start" / f"{name}.npy") for name in ("tokens", "rows"))
    sentences, passages = [], []
    for number, block in enumerate(counted(prepared.store, prepared.vocabulary, Corpus())):
        (passages if number % 2 else sentences).append(block.shape[0])
    report = json.loads((folder / "start" / "report.json").read_text())
    assert report == {
        "passages": 240, "sentences": sum(sentences), "width": 16,
        "pieces": prepared.vocabulary.pieces, "pieces_with_a_row": len(tokens),
    }  # fmt: skip
    assert sum(passages) == 240 and sum(sentences) > 900
    assert rows.shape == (len(tokens), 16) and 400 < len(tokens) < prepared.vocabulary.pieces
    near = rows @ rows[list(tokens).index(prepared.vocabulary.encode("bees")[-1])]
    assert np.isfinite(near).all() and near.max() == pytest.approx(16, rel=1e-4)


def test_of_a_large_collection_passages_evenly_spaced(made):
    _, folder = made
    prepared = Prepared.load(folder)
    blocks = list(counted(prepared.store, prepared.vocabulary, Corpus(max_passages=100)))
    assert blocks[1].shape[0] == 80  # every third


def test_a_killed_stage_is_made_again_to_the_same_bytes(made, capsys):
    flags, folder = made
    contents = lambda: {f.name: f.read_bytes() for f in (folder / "start").glob("*.npy")}
    before = contents()
    record = json.loads((folder / "start" / "stage.json").read_text())
    (folder / "start" / "stage.json").write_text(json.dumps(record | {"status": "running"}))
    (folder / "start" / "rows.npy").write_bytes(b"half")
    run(flags)
    assert "start: was cut off; goes on" in capsys.readouterr().err
    assert contents() == before
    run(flags)
    assert "start: done already" in capsys.readouterr().err
    (folder / "start" / "rows.npy").write_bytes(b"other")
    with pytest.raises(kept.Damaged, match="rows.npy"):
        start_of(folder, None, partitioning.Mesh())
    run(flags)
    assert contents() == before


def test_shuffled_embeddings_are_those_of_other_tokens(made):
    flags, folder = made
    names = ("tokens", "rows")
    tokens, rows = (np.load(folder / "start" / f"{name}.npy") for name in names)
    run(flags, "--gin.Corpus.shuffled=True")
    same, shuffled = (np.load(folder / "start" / f"{name}.npy") for name in names)
    run(flags)
    np.testing.assert_array_equal(same, tokens)
    np.testing.assert_array_equal(np.unique(shuffled, axis=0), np.unique(rows, axis=0))
    assert (shuffled != rows).any(axis=1).mean() > 0.9


def start_of(folder, model, mesh):
    experiment = argparse.Namespace(model_dir=folder, mesh=mesh)
    return jax.device_get(parameters(experiment, model, 3))


@pytest.fixture(scope="module")
def rows_of(tmp_path_factory):
    """A folder with rows for a few tokens, as the stage leaves them."""
    folder = tmp_path_factory.mktemp("rows")
    (folder / "start").mkdir()
    tokens = np.array([4, 9, 60], np.int32)
    rows = np.random.default_rng(0).normal(size=(3, students.CONFIG.emb_dim)).astype(np.float32)
    np.save(folder / "start" / "tokens.npy", tokens)
    np.save(folder / "start" / "rows.npy", rows)
    return folder, tokens, rows


@pytest.mark.parametrize("tied", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_only_the_rows_of_text_differ_from_a_random_start(rows_of, tied):
    folder, tokens, rows = rows_of
    config = dataclasses.replace(students.CONFIG, logits_via_embedding=tied)
    model = Transformer(config)
    changed = start_of(folder, model, partitioning.Mesh())
    mesh = partitioning.make_mesh()
    drawn = jax.device_get(init_state(model, Adafactor().transformation(1), mesh, seed=3).params)
    embedding = drawn["token_embedder"]["embedding"].copy()
    embedding[tokens] = rows
    drawn["token_embedder"]["embedding"] = embedding
    jax.tree.map(np.testing.assert_array_equal, changed, drawn)


@pytest.mark.parametrize("shared", [True, False])
def test_each_tower_of_a_dense_encoder_gets_them(rows_of, shared):
    folder, tokens, rows = rows_of
    model = DualEncoder(DualEncoderConfig(t5=students.CONFIG, shared=shared))
    changed = start_of(folder, model, partitioning.Mesh())
    assert changed.keys() == ({"shared"} if shared else {"query", "passage"})
    for tower in changed.values():
        np.testing.assert_array_equal(tower["t5"]["token_embedder"]["embedding"][tokens], rows)


def test_on_every_mesh_the_same(rows_of):
    folder, *_ = rows_of
    first, second = (
        start_of(folder, Transformer(students.CONFIG), mesh)
        for mesh in (partitioning.Mesh(), partitioning.Mesh(data=4, model=2))
    )
    jax.tree.map(np.testing.assert_array_equal, first, second)
