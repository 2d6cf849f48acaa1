"""Scanned layers: the same student, in stacked parameters."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn

from dgr_jax import partitioning
from dgr_jax.models.stacking import stack_layers, unstack_layers
from dgr_jax.models.t5 import REMAT, T5Config, Transformer
from dgr_jax.training.optimizers import Adafactor, Constant
from tests import students

CONFIG = T5Config(
    vocab_size=32, emb_dim=8, num_heads=2, head_dim=4, mlp_dim=16,
    num_encoder_layers=1, num_decoder_layers=3, dropout_rate=0.0,
)  # fmt: skip
SCANNED = dataclasses.replace(CONFIG, scan_layers=True)
QUERIES = students.texts(3, 5) % 32
slow = pytest.mark.slow
TARGETS = np.random.default_rng(0).integers(1, 32, (3, 2, 4)).astype(np.int32)


def _model_and_params(config):
    params = students.parameters(CONFIG)
    return Transformer(config), stack_layers(params) if config.scan_layers else params


def test_scan_changes_no_logit():
    logits = []
    for config in (CONFIG, SCANNED):
        model, params = _model_and_params(config)
        logits.append(jax.jit(model.apply)({"params": params}, QUERIES, TARGETS))
    np.testing.assert_allclose(logits[1], logits[0], rtol=1e-5, atol=1e-5)


@functools.cache
def gradient(config):
    """The gradients of a sum of squares, under the names of a student without scan."""
    model, params = _model_and_params(config)

    def loss(params):
        return jnp.sum(jnp.square(model.apply({"params": params}, QUERIES, TARGETS)))

    found = jax.jit(jax.grad(loss))(params)
    return unstack_layers(found)


@slow
@pytest.mark.parametrize("scan", [False, True])
@pytest.mark.parametrize("remat", list(REMAT))
def test_scan_and_remat_change_no_gradient(scan, remat):
    changed = dataclasses.replace(CONFIG, scan_layers=scan, remat=remat)
    same = functools.partial(np.testing.assert_allclose, rtol=2e-4, atol=1e-4)
    jax.tree.map(same, gradient(changed), gradient(CONFIG))


@slow
def test_the_backward_pass_keeps_less():
    """`full` keeps nothing of the products in a layer, `minimal` those of kernels."""

    def products(config):
        model, params = _model_and_params(config)
        loss = lambda p: jnp.sum(model.apply({"params": p}, QUERIES, TARGETS))
        return str(jax.make_jaxpr(jax.grad(loss))(params)).count("dot_general")

    none, minimal, full = (
        products(dataclasses.replace(CONFIG, remat=remat)) for remat in ("none", "minimal", "full")
    )
    assert none < minimal < full


def test_names_shapes_and_axes_of_stacked_parameters():
    boxed = jax.eval_shape(
        lambda: partitioning.boxed_params(Transformer(SCANNED), jax.random.key(0))
    )
    layers = boxed["encoder"]["layers"]
    assert layers["mlp"]["wo"]["kernel"].names == ("mlp", "layers", "embed")
    assert layers["mlp"]["wo"]["kernel"].value.shape == (16, 1, 8)
    assert layers["pre_mlp_layer_norm"]["scale"].names == ("embed", "layers")
    stacked = stack_layers(students.parameters(CONFIG))
    shapes = lambda tree: jax.tree.map(lambda leaf: leaf.shape, tree)
    assert shapes(nn.unbox(boxed)) == shapes(stacked)


def test_layers_are_stacked_in_order_and_back():
    params = students.parameters(CONFIG)
    stacked = stack_layers(params)
    kernel = stacked["decoder"]["layers"]["mlp"]["wo"]["kernel"]
    assert isinstance(kernel, np.ndarray)
    for i in range(3):
        expected = params["decoder"][f"layers_{i}"]["mlp"]["wo"]["kernel"]
        np.testing.assert_array_equal(kernel[:, i], expected)
    again = unstack_layers(stacked)
    jax.tree.map(np.testing.assert_array_equal, again, params)
    decoder = {k: v for k, v in params["decoder"].items() if k != "layers_1"}
    with pytest.raises(ValueError) as error:
        stack_layers({"decoder": decoder})
    assert str(error.value) == (
        "params['decoder']: got ['layers_0', 'layers_2'], expected ['layers_0', 'layers_1']"
    )


@slow
def test_layers_begin_apart():
    """Every layer draws its own first parameters."""
    model = Transformer(SCANNED)
    create = jax.jit(lambda: nn.unbox(partitioning.boxed_params(model, jax.random.key(0))))
    params = create()
    kernel = params["decoder"]["layers"]["mlp"]["wo"]["kernel"]
    assert kernel.shape == (16, 3, 8)
    assert np.abs(kernel[:, 0] - kernel[:, 1]).max() > 0.1


@slow
def test_a_scanned_student_finds_the_same_passages():
    rows = students.codes(60)
    search = students.Search(num_beams=5, depth=5, batch_size=4, query_length=8)
    two = dataclasses.replace(students.CONFIG, num_decoder_layers=2)
    expected = students.decoder(rows, search, config=two)
    got = students.decoder(rows, search, config=dataclasses.replace(two, scan_layers=True))
    got.params = stack_layers(expected.params)
    queries = students.queries(4)
    passages, scores = expected.passages(queries)
    assert (passages >= 0).all()
    found, found_scores = got.passages(queries)
    np.testing.assert_array_equal(found, passages)
    np.testing.assert_allclose(found_scores, scores, rtol=1e-5, atol=1e-5)


def test_policies_by_name():
    assert list(REMAT) == ["none", "minimal", "full"]
    with pytest.raises(ValueError) as error:
        T5Config(remat=True)
    assert str(error.value) == (
        "T5Config.remat: got True, expected one of ['none', 'minimal', 'full']"
    )


@pytest.mark.slow
def test_adafactor_updates_stacked_layers_each_by_itself():
    random = np.random.default_rng(0)
    shapes = {"wide": (9, 8), "narrow": (9, 7), "scale": (8,)}
    draw = lambda size: {
        k: random.normal(size=shape).astype(np.float32) * size for k, shape in shapes.items()
    }
    layers = lambda size: {f"layers_{i}": draw(size * 10**i) for i in range(3)}
    params = {"encoder": layers(0.1) | {"norm": draw(1.0)}}
    grads = [{"encoder": layers(3.0) | {"norm": draw(1.0)}} for _ in range(2)]
    transformation = Adafactor(Constant(0.1), factor_from=8).transformation(2)

    def run(params, grads):
        state = transformation.init(params)
        for gradient in grads:
            updates, state = jax.jit(transformation.update)(gradient, state, params)
            params = optax.apply_updates(params, updates)
        return params, state

    expected, apart = run(params, grads)
    got, together = run(stack_layers(params), [stack_layers(g) for g in grads])
    same = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6)
    jax.tree.map(same, unstack_layers(got), expected)
    for name in ("v_row", "v_col", "v"):
        kept, stacked = (optax.tree_utils.tree_get(s, name) for s in (apart, together))
        jax.tree.map(same, unstack_layers(stacked), kept)
    counts = lambda state: [leaf.shape for leaf in jax.tree.leaves(state) if leaf.dtype == np.int32]
    assert set(counts(together)) == {()}
