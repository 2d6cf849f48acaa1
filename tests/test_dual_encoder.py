"""The dual encoder: T5's encoder under its names, pooled, projected and compared."""

import dataclasses
import functools

import flax.traverse_util
import jax
import numpy as np
import pytest
from flax import linen as nn
from jax.sharding import PartitionSpec

from dgr_jax import partitioning
from dgr_jax.models import dual_encoder
from dgr_jax.models.dual_encoder import DualEncoder, DualEncoderConfig
from dgr_jax.models.t5 import Transformer
from tests import students, toy

CONFIG = DualEncoderConfig(t5=students.CONFIG, projection=16)
QUERIES, PASSAGES = students.queries(4), students.queries(4, seed=1)
SETTINGS = {
    "all_others": DualEncoderConfig(students.CONFIG, False, "first", 0, "cosine", 0.05),
    "projected": CONFIG,
    "plain": DualEncoderConfig(t5=students.CONFIG),
    "first": dataclasses.replace(CONFIG, pooling="first"),
    "cosine": dataclasses.replace(CONFIG, similarity="cosine", temperature=0.05),
    "separate": dataclasses.replace(CONFIG, shared=False),
}
slow = [pytest.param(name, marks=pytest.mark.slow) for name in list(SETTINGS)[1:]]


@functools.cache
def params(config):
    """Random parameters; T5's weights are those of `students`, different in each tower."""
    boxed = jax.eval_shape(
        lambda: partitioning.boxed_params(DualEncoder(config), jax.random.key(0))
    )
    random = np.random.default_rng(2)
    return jax.tree.map(
        lambda leaf: (random.normal(size=leaf.shape) / np.sqrt(leaf.shape[0])).astype(np.float32),
        nn.unbox(boxed),
    )


@functools.cache
def _encode():
    """T5's own encoder, compiled once for all settings and towers."""
    return jax.jit(
        lambda p, x: Transformer(students.CONFIG).apply({"params": p}, x, method="encode")
    )


def vectors(tower, tokens, config):
    """The vector of each text by itself, from the output of T5's encoder."""
    found = []
    encoded = np.asarray(_encode()(tower["t5"], tokens))
    for row, x in zip(tokens, encoded, strict=True):
        x = x[0] if config.pooling == "first" else x[: (row > 0).sum()].mean(0)
        if config.projection:
            x = x @ tower["projection"]["kernel"]
        found.append(x / np.linalg.norm(x) if config.similarity == "cosine" else x)
    return np.stack(found)


@pytest.mark.parametrize("name", ["all_others", *slow])
def test_scores_are_products_of_pooled_encodings(name):
    config = SETTINGS[name]
    values = params(config)
    model = DualEncoder(config)
    scores = jax.jit(model.apply)({"params": values}, QUERIES, PASSAGES)
    towers = [values["shared"]] * 2 if config.shared else [values["query"], values["passage"]]
    queries = vectors(towers[0], QUERIES, config)
    passages = vectors(towers[1], PASSAGES, config)
    assert scores.shape == (4, 4) and scores.dtype == np.float32
    assert queries.shape[1] == config.dim
    np.testing.assert_allclose(scores, queries @ passages.T / config.temperature, rtol=2e-4)
    assert np.std(scores) > 1e-2


def test_names_are_those_of_t5():
    values = params(CONFIG)["shared"]
    assert set(values) == {"t5", "projection"}
    theirs = students.parameters(students.CONFIG)
    wanted = {name: theirs[name] for name in ("token_embedder", "encoder")}  # and no decoder
    shapes = lambda tree: {k: v.shape for k, v in flax.traverse_util.flatten_dict(tree).items()}
    assert shapes(values["t5"]) == shapes(wanted)


@pytest.mark.parametrize("name", ["projected", "separate"])
def test_starts_from_a_t5(name):
    values = params(SETTINGS[name])
    theirs = students.parameters(students.CONFIG)
    started = dual_encoder.start_from(values, theirs)
    assert set(started) == set(values)
    for tower, parts in started.items():
        assert parts["t5"] == {k: theirs[k] for k in ("token_embedder", "encoder")}
        assert parts["projection"] is values[tower]["projection"]


def test_another_t5_does_not_fit():
    other = dataclasses.replace(students.CONFIG, vocab_size=50, num_encoder_layers=0)
    with pytest.raises(ValueError) as error:
        dual_encoder.start_from(params(CONFIG), students.parameters(other))
    message = str(error.value)
    assert message.startswith("initial parameters of tower 'shared': ['encoder']['layers_0']")
    assert "['token_embedder']['embedding']: got (50, 16), expected (96, 16)" in message
    assert message.endswith("; set T5Config as it was for these parameters")


@pytest.mark.parametrize("pooling", ["mean", "first"])
def test_padding_changes_nothing(pooling):
    encoded = np.random.default_rng(0).normal(size=(2, 5, 3)).astype(np.float32)
    valid = np.array([[1, 1, 1, 0, 0], [0, 0, 0, 0, 0]], bool)
    pooled = dual_encoder._pool(encoded, valid, pooling)
    shorter = dual_encoder._pool(encoded[:, :3], valid[:, :3], pooling)
    np.testing.assert_array_equal(pooled, shorter)
    garbage = np.where(valid[..., None], encoded, np.nan)
    np.testing.assert_array_equal(dual_encoder._pool(garbage, valid, pooling)[0], pooled[0])
    if pooling == "mean":
        np.testing.assert_array_equal(pooled[1], 0)  # a text without tokens, of a padded batch


def test_an_empty_text_has_a_finite_gradient():
    total = lambda x: dual_encoder._unit(x).sum()
    grad = jax.jit(jax.grad(total))(np.array([[0.0, 0.0], [3.0, 4.0]]))
    assert np.isfinite(grad).all() and np.asarray(grad)[1].any()
    np.testing.assert_allclose(dual_encoder._unit(np.array([[3.0, 4.0]])), [[0.6, 0.8]], rtol=1e-6)


def test_parameters_are_cut_as_those_of_t5():
    mesh = partitioning.make_mesh(partitioning.Mesh(2, 2, 2), toy.devices(8))
    cut = partitioning.abstract_params(DualEncoder(CONFIG), mesh)["shared"]
    theirs = partitioning.abstract_params(Transformer(students.CONFIG), mesh)
    ours = jax.tree.map(lambda leaf: leaf.sharding, cut["t5"])
    assert ours == jax.tree.map(lambda leaf: leaf.sharding, {k: theirs[k] for k in cut["t5"]})
    assert cut["projection"]["kernel"].sharding.spec == PartitionSpec("fsdp", None)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"pooling": "last"}, "pooling: got 'last', expected one of 'mean', 'first'"),
        ({"similarity": "l2"}, "similarity: got 'l2', expected one of 'dot', 'cosine'"),
        (
            {"projection": 8},
            "projection: got 8, expected 16 to 1024, or 0 for the model's width",
        ),
        ({"temperature": 0.0}, "temperature: got 0.0, expected above 0"),
    ],
)
def test_errors(settings, message):
    with pytest.raises(ValueError) as error:
        DualEncoderConfig(**settings)
    assert str(error.value) == f"DualEncoderConfig.{message}"
