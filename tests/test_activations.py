"""Constraints on activations: how many the lowered programs have, and how they cut, by layout."""

import dataclasses
import functools
import re
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dgr_jax import partitioning
from dgr_jax.capacity import programs
from dgr_jax.capacity.counting import TAKEN
from dgr_jax.capacity.sizes import estimated_sizes
from dgr_jax.losses import contrastive
from dgr_jax.models import activations
from dgr_jax.models.dual_encoder import DualEncoder, DualEncoderConfig
from dgr_jax.models.t5 import Transformer
from dgr_jax.partitioning import LAYOUTS, Mesh, make_mesh
from dgr_jax.retrieval import dense, exhaustive, sampling
from dgr_jax.retrieval.generative import Search
from dgr_jax.training.dense import Dense
from dgr_jax.training.objectives import Generation
from dgr_jax.training.step import abstract_state, make_train_step
from tests import students, toy
from tests.test_planning import SMALL, experiment

ROWS, WIDTH = '{"data", "fsdp"}', students.CONFIG.emb_dim
SGD = optax.sgd(0.1)
slow = functools.partial(pytest.param, marks=pytest.mark.slow)


def settings(layout):
    parameters, activated = layout
    return Mesh(2, 2, 2, parameter_dims=parameters, activation_dims=activated)


@functools.cache
def mesh():
    return make_mesh(Mesh(2, 2, 2), toy.devices(8))


def placed(*shape):
    sharding = partitioning.batch_sharding(mesh())
    return jax.ShapeDtypeStruct(shape, jnp.int32, sharding=sharding)


def constraints(lowered):
    """'shape: how it is cut' -> number, of the arrays that a program constrains. JAX leaves the
    dimensions of other arrays open, '?', or constrains numbers, in what a shard_map computes."""
    found = re.findall(
        r"sdy\.sharding_constraint \S+ <@\w+, \[(.*)\]> : tensor<(\S+)xf32>", lowered.as_text()
    )
    return Counter(f"{shape}: {dims}" for dims, shape in found if dims and "?" not in dims)


def lowered_step(model, objective, batch, layout, **changes):
    rules = settings(layout).rules
    state = abstract_state(model, SGD, mesh(), rules)
    step = make_train_step(objective, model, SGD, mesh(), state, rules=rules, **changes)
    return step.lower(state, batch)


def of_width(layout):
    """How the width of activations between layers is divided."""
    return '{"model"}' if layout[1] == 2 else "{}"


@pytest.mark.parametrize(
    ("layout", "microbatches"),
    [((2, 1), 1), ((1, 2), 2), slow((1, 1), 1), slow((1, 2), 1), slow((2, 2), 1)],
)
def test_a_training_step(layout, microbatches):
    """Each of the two layers, forward and backward."""
    model, batch = Transformer(students.CONFIG), toy.generation_examples(16)
    found = lowered_step(model, Generation(), batch, layout, microbatches=microbatches)
    rows, width = 16 // microbatches, of_width(layout)
    assert constraints(found) == {
        f"{rows}x4x{WIDTH}: {ROWS}, {{}}, {width}": 2,
        f"{rows}x1x3x{WIDTH}: {ROWS}, {{}}, {{}}, {width}": 2,
    } | ({f"2x8x3: {{}}, {ROWS}, {{}}": 1} if microbatches == 2 else {})  # the batch itself


@pytest.mark.parametrize("layout", [(1, 2), slow((1, 1)), slow((2, 1)), slow((2, 2))])
def test_a_training_step_of_a_dual_encoder(layout):
    """Layers of queries and passages; their vectors; those of all passages, for all queries."""
    passages = np.arange(32, dtype=np.int32).reshape(8, 4)
    batch = {
        "encoder_input_tokens": students.queries(8, 6),
        "passage_tokens": students.queries(32, 5).reshape(8, 4, 5),
        "passage_mask": np.ones((8, 4), bool),
        "positive_mask": passages % 4 == 0,
        "passages": passages,
    }
    model = DualEncoder(DualEncoderConfig(t5=students.CONFIG, projection=24))
    width = of_width(layout)
    assert constraints(lowered_step(model, Dense(contrastive.lse_pair), batch, layout)) == {
        f"8x6x{WIDTH}: {ROWS}, {{}}, {width}": 2,
        f"32x5x{WIDTH}: {ROWS}, {{}}, {width}": 2,
        f"8x24: {ROWS}, {{}}": 2,
        f"32x24: {ROWS}, {{}}": 2,
        "32x24: {}, {}": 2,
        f"8x32: {ROWS}, {{}}": 2,
    }


def decoder(layout, **config):
    search = Search(num_beams=3, depth=3, batch_size=8, query_length=6)
    return students.decoder(
        students.codes(60),
        search,
        mesh=settings(layout),
        devices=8,
        config=dataclasses.replace(students.CONFIG, **config),
    )


@pytest.mark.parametrize(
    ("layout", "scanned"),
    [
        ((2, 1), False),
        ((1, 2), True),
        *(slow(layout, False) for layout in ((1, 1), (1, 2), (2, 2))),
    ],
)
def test_decoding(layout, scanned):
    """Each data shard has its rows already: the encoder's layer and, of one beam and of three, the
    decoder's; the parameters lie as in training."""
    made = decoder(layout, scan_layers=scanned)
    abstract = partitioning.abstract_params(
        Transformer(made.config), mesh(), settings(layout).rules
    )
    assert jax.tree.all(jax.tree.map(lambda p, a: p.sharding == a.sharding, made.params, abstract))
    width = of_width(layout)
    found = constraints(made._decode.lower(made.params, made._constraint, placed(8, 6)))
    assert {k: v for k, v in found.items() if k.count("x") > 1} == {
        f"2x6x{WIDTH}: {{}}, {{}}, {width}": 1,
        f"2x1x1x{WIDTH}: {{}}, {{}}, {{}}, {width}": 1,
        f"2x3x1x{WIDTH}: {{}}, {{}}, {{}}, {width}": 1,
    }


def test_other_searches():
    """Scores of all identifiers, pseudo-queries, vectors of a dual encoder."""
    layout = 2, 2
    made, rules, width = decoder(layout), settings(layout).rules, of_width(layout)
    encoded = f"2x6x{WIDTH}: {{}}, {{}}, {width}"
    score = exhaustive.score_fn(made.config, mesh(), rules)
    identifiers = jax.ShapeDtypeStruct((2, 5, 3), jnp.int32)
    found = constraints(score.lower(made.params, identifiers, placed(8, 6)))
    assert found[encoded] == 1 and found[f"2x5x3x{WIDTH}: {{}}, {{}}, {{}}, {width}"] == 1
    draw = sampling.sample_fn(made.config, sampling.Sampling(number=4), 3, 60, mesh(), rules)
    found = constraints(draw.lower(made.params, jax.random.key(0), placed(8, 6)))
    assert found[encoded] == 1 and found[f"2x4x1x{WIDTH}: {{}}, {{}}, {{}}, {width}"] == 1
    config = DualEncoderConfig(t5=students.CONFIG)
    encode = dense.encode_fn(config, "encode_queries", mesh(), rules)
    params = partitioning.abstract_params(DualEncoder(config), mesh(), rules)
    found = constraints(encode.lower(params, placed(8, 6)))
    assert found == {encoded: 1, f"2x{WIDTH}: {{}}, {{}}": 1}


@pytest.mark.parametrize(
    ("layout", "name", "number"),
    [((2, 2), "generate", 4), slow((1, 2), "distill", 8), ((1, 2), "decode", 4)],
)
def test_planned_programs(layout, name, number):
    """What is planned is cut as what runs: `number` layers, forward and backward, of scanned ones
    one for all."""
    small = experiment(*SMALL)
    sizes = dataclasses.replace(
        estimated_sizes(small, TAKEN._replace(passages=500)), vocab_size=2304
    )
    program = programs.program(name, small, sizes, mesh(), settings(layout).rules)
    found = constraints(program.lower())
    width = small.model.emb_dim
    layers = [spec for spec in found if re.match(rf"\d+x(\d+x)+{width}:", spec)]
    assert {spec.split(", ")[-1] for spec in layers} == {of_width(layout)}
    assert sum(found[spec] for spec in layers) == number


def test_dimensions_that_are_not_divided_stay_whole():
    def program(x):
        with partitioning.in_force(mesh(), LAYOUTS[1, 2]):
            return activations.cut(x, ("batch", "length", "embed"))

    for shape, spec in {(8, 3, 6): f'{ROWS}, {{}}, {{"model"}}', (6, 3, 5): "{}, {}, {}"}.items():
        name = "x".join(map(str, shape))
        assert constraints(jax.jit(program).lower(jnp.zeros(shape))) == {f"{name}: {spec}": 1}


def test_without_rules_nothing_is_constrained():
    x = jnp.zeros((8, 3, 6))
    assert activations.cut(x, ("batch", "length", "embed")) is x
    with jax.set_mesh(mesh()):
        assert activations.cut(x, ("batch", "length", "embed")) is x
