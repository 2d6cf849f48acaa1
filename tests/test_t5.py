"""The student: shapes, names, sharing of the encoder, cache."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dgr_jax.models.layers import product
from dgr_jax.models.stacking import stack_layers
from dgr_jax.models.t5 import T5Config, Transformer
from tests import students
from tests.reference import prefix_adaptation as reference

SMALL = T5Config(
    vocab_size=50, emb_dim=16, num_heads=2, head_dim=8, mlp_dim=32,
    num_encoder_layers=2, num_decoder_layers=2,
)  # fmt: skip


def make(config=SMALL):
    rng = np.random.default_rng(0)
    queries = rng.integers(1, 50, (3, 7)).astype(np.int32)
    queries[0, 4:] = 0
    targets = rng.integers(1, 50, (3, 4, 5)).astype(np.int32)
    model = Transformer(config)
    return model, students.parameters(config), queries, targets


@pytest.mark.parametrize(
    ("dtype", "scan", "adaptive"),
    [
        ("float32", False, 0),
        pytest.param("float32", False, 2, marks=pytest.mark.slow),
        ("bfloat16", True, 0),
        pytest.param("float32", True, 1, marks=pytest.mark.slow),
        pytest.param("bfloat16", False, 1, marks=pytest.mark.slow),
    ],
)
def test_decoding_step_by_step_equals_one_pass(dtype, scan, adaptive):
    layers = 3 if adaptive else 2
    config = dataclasses.replace(
        SMALL, num_encoder_layers=1, num_decoder_layers=layers, prefix_adaptive_layers=adaptive
    )
    _, params, queries, targets = make(config)
    if scan:
        params = stack_layers(params)
    model = Transformer(dataclasses.replace(config, dtype=dtype, scan_layers=scan))
    apply = jax.jit(model.apply, static_argnames=("method", "num_beams", "length"))
    apply = functools.partial(apply, {"params": params})
    whole = apply(queries, targets)
    encoded = apply(queries, method="encode")
    cross = apply(encoded, queries, method="cross")
    cache = apply(encoded, num_beams=4, length=5, method="init_cache")
    shapes = {(3, 4, layers, 5, 2, 8)} if scan else {(3, 4, 5, 2, 8)}
    shapes |= {(3, 4, 5, 2, 8)} if adaptive else set()
    assert {leaf.shape for leaf in jax.tree.leaves(cache)} == shapes
    steps = []
    for t in range(5):
        if t == 2:
            ahead = apply(targets[:, :, 2:], cache, t, cross, queries, method="ahead")
        logits, cache = apply(targets[:, :, t], cache, t, cross, queries, method="step")
        steps.append(logits)
    assert whole.dtype == jnp.float32
    # Sums of other shapes are rounded otherwise, by each processor in its way; logits are up to 15.
    atol = 4e-5 if dtype == "float32" else 0.05
    np.testing.assert_allclose(np.stack(steps, 2), whole, atol=atol)
    np.testing.assert_allclose(apply(ahead, method="logits"), whole[:, :, 2:], atol=atol)


def test_output_weights_of_each_prefix_against_the_twin():
    config = dataclasses.replace(
        SMALL, num_encoder_layers=1, num_decoder_layers=1, prefix_adaptive_layers=2
    )
    model, params, queries, targets = make(config)

    def parts(model, queries, targets):
        prefix, encoded = model._embed(targets), model.encode(queries)
        return prefix, encoded, model.decoder(prefix, encoded, queries > 0, True)

    targets[..., 0] = 0  # the start, in whose place the query's vector stands
    apply = jax.jit(model.apply, static_argnames="method")
    logits = apply({"params": params}, queries, targets)
    prefix, encoded, hidden = apply({"params": params}, queries, targets, method=parts)
    kernel = params["decoder"]["logits_dense"]["kernel"]
    for b, r, t in [(0, 0, 0), (0, 1, 2), (1, 3, 4), (2, 2, 1)]:
        weights = reference.output_weights(
            params["prefix_adaptation"], kernel,
            np.asarray(encoded)[b, queries[b] > 0].mean(0), np.asarray(prefix)[b, r, 1 : t + 1], 2,
        )  # fmt: skip
        assert np.abs(weights - kernel).max() > 0.1
        np.testing.assert_allclose(logits[b, r, t], hidden[b, r, t] @ weights, atol=1e-4)


@pytest.mark.slow
def test_targets_of_a_query_do_not_see_each_other():
    model, params, queries, targets = make()
    together = model.apply({"params": params}, queries, targets)
    for r in range(4):
        alone = model.apply({"params": params}, queries, targets[:, r])
        np.testing.assert_allclose(together[:, r], alone, atol=1e-5)


@pytest.mark.slow
def test_padding_of_a_query_changes_nothing():
    model, params, queries, targets = make()
    longer = np.pad(queries, [(0, 0), (0, 5)])
    np.testing.assert_allclose(
        model.apply({"params": params}, queries, targets),
        model.apply({"params": params}, longer, targets),
        atol=1e-5,
    )


def test_a_target_does_not_see_its_future():
    model, params, queries, targets = make()
    changed = targets.copy()
    changed[..., 3:] = 7
    apply = jax.jit(model.apply)
    before = apply({"params": params}, queries, targets)
    after = apply({"params": params}, queries, changed)
    np.testing.assert_allclose(before[:, :, :3], after[:, :, :3], atol=1e-5)
    assert np.abs(before[:, :, 3:] - after[:, :, 3:]).max() > 1e-3


def test_parameter_names_and_shapes_are_t5x_s():
    _, params, _, _ = make()
    flat = {
        "/".join(str(k.key) for k in path): leaf.shape
        for path, leaf in jax.tree_util.tree_flatten_with_path(params)[0]
    }
    layer = {
        "pre_attention_layer_norm/scale": (16,),
        "attention/query/kernel": (16, 16),
        "attention/key/kernel": (16, 16),
        "attention/value/kernel": (16, 16),
        "attention/out/kernel": (16, 16),
        "pre_mlp_layer_norm/scale": (16,),
        "mlp/wi_0/kernel": (16, 32),
        "mlp/wi_1/kernel": (16, 32),
        "mlp/wo/kernel": (32, 16),
    }
    decoder_layer = {
        name.replace("attention", "self_attention"): shape for name, shape in layer.items()
    } | {
        "pre_cross_attention_layer_norm/scale": (16,),
        **{
            f"encoder_decoder_attention/{part}/kernel": (16, 16)
            for part in ("query", "key", "value", "out")
        },
    }
    expected = {
        "token_embedder/embedding": (50, 16),
        "encoder/relpos_bias/rel_embedding": (2, 32),
        "encoder/encoder_norm/scale": (16,),
        "decoder/relpos_bias/rel_embedding": (2, 32),
        "decoder/decoder_norm/scale": (16,),
        "decoder/logits_dense/kernel": (16, 50),
    }
    for i in range(2):
        expected |= {f"encoder/layers_{i}/{name}": shape for name, shape in layer.items()}
        expected |= {f"decoder/layers_{i}/{name}": shape for name, shape in decoder_layer.items()}
    assert flat == expected


def test_logits_via_embedding_has_no_output_kernel():
    config = dataclasses.replace(SMALL, logits_via_embedding=True, mlp_activations=("relu",))
    model, params, queries, targets = make(config)
    assert "logits_dense" not in params["decoder"]
    assert set(params["encoder"]["layers_0"]["mlp"]) == {"wi", "wo"}
    logits = jax.eval_shape(model.apply, {"params": params}, queries, targets)
    assert logits.shape == (3, 4, 5, 50)


def test_wrong_settings_are_refused_by_name():
    with pytest.raises(ValueError, match="T5Config.dtype: got 'float16', expected"):
        T5Config(dtype="float16")
    with pytest.raises(ValueError, match="T5Config.emb_dim: got 0"):
        T5Config(emb_dim=0)
    with pytest.raises(ValueError, match="T5Config.vocab_size: got 0"):
        Transformer(T5Config()).init(
            jax.random.key(0), jnp.ones((1, 2), int), jnp.ones((1, 2), int)
        )


def test_prefix_adaptive_layers_are_not_below_0():
    with pytest.raises(
        ValueError, match="T5Config.prefix_adaptive_layers: got -1, expected 0 to 1,000"
    ):
        T5Config(prefix_adaptive_layers=-1)


@pytest.mark.parametrize("shape", [(5,), (3, 5), (2, 3, 5), (2, 1, 3, 5)])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_product_and_its_gradients(shape, dtype):
    rng = np.random.default_rng(0)
    x, kernel = (jnp.asarray(rng.standard_normal(s), dtype) for s in (shape, (5, 4)))
    gradient = jnp.asarray(rng.standard_normal((*shape[:-1], 4)), dtype)
    found, expected = (
        (y, *pull(gradient)) for y, pull in (jax.vjp(f, x, kernel) for f in (product, jnp.dot))
    )
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == dtype
        rtol = 1e-5 if dtype == jnp.float32 else 2e-2
        np.testing.assert_allclose(
            one.astype(jnp.float32), other.astype(jnp.float32), rtol=rtol, atol=rtol
        )
