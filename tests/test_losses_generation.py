"""Cross entropy and token log-probabilities against their definitions, written with a one-hot."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dgr_jax.losses import generation

V = 11
cross_entropy = jax.jit(generation.cross_entropy, static_argnames=("label_smoothing", "z_loss"))
token_log_probs = jax.jit(generation.token_log_probs)


def batch(seed=0, dtype=np.float32):
    rng = np.random.default_rng(seed)
    logits = jnp.asarray(rng.normal(scale=4, size=(3, 5, V)), dtype)
    targets = rng.integers(0, V, size=(3, 5)).astype(np.int32)
    weights = (rng.random((3, 5)) < 0.7).astype(np.float32) * rng.choice([0.5, 1.0], (3, 5))
    return logits, targets, weights.astype(np.float32)


def log_softmax(x):
    shifted = x - x.max()
    return shifted - np.log(np.exp(shifted).sum())


def slow_cross_entropy(logits, targets, weights, label_smoothing, z_loss):
    loss = 0.0
    for place in np.ndindex(targets.shape):
        row = np.asarray(logits[place], np.float64)
        wanted = np.full(V, label_smoothing / (V - 1))
        wanted[targets[place]] = 1 - label_smoothing
        least = sum(-p * np.log(p) for p in wanted if p > 0)
        log_z = np.log(np.exp(row).sum())
        token = -(wanted * log_softmax(row)).sum() - least + z_loss * log_z**2
        loss += weights[place] * token
    return loss, weights.sum()


SETTINGS = [(0.0, 0.0), (0.1, 0.0), (0.0, 1e-2), (0.3, 1e-4)]


@pytest.mark.parametrize(("label_smoothing", "z_loss"), SETTINGS)
def test_cross_entropy_equals_its_definition(label_smoothing, z_loss):
    logits, targets, weights = batch()
    options = {"label_smoothing": label_smoothing, "z_loss": z_loss}
    got = cross_entropy(logits, targets, weights, **options)
    expected = slow_cross_entropy(logits, targets, weights, **options)
    np.testing.assert_allclose(got, expected, rtol=1e-5)


@pytest.mark.parametrize(("label_smoothing", "z_loss"), SETTINGS[1:])
def test_gradient_equals_finite_differences_of_the_definition(label_smoothing, z_loss):
    logits, targets, weights = batch(1)
    options = {"label_smoothing": label_smoothing, "z_loss": z_loss}
    loss = jax.jit(lambda x: generation.cross_entropy(x, targets, weights, **options)[0])
    gradient = jax.grad(loss)(logits)
    flat = np.asarray(logits, np.float64)
    for place in np.ndindex(1, 2, V):
        up, down = flat.copy(), flat.copy()
        up[place] += 1e-4
        down[place] -= 1e-4
        high, low = (slow_cross_entropy(x, targets, weights, **options)[0] for x in (up, down))
        assert gradient[place] == pytest.approx((high - low) / 2e-4, abs=1e-4)
    assert not np.any(np.asarray(gradient)[weights == 0])


def test_predicting_the_smoothed_target_costs_nothing():
    targets = np.array([4])
    wanted = np.full((1, V), 0.2 / (V - 1), np.float32)
    wanted[0, 4] = 0.8
    loss, weight = cross_entropy(np.log(wanted), targets, np.ones(1), label_smoothing=0.2)
    assert float(loss) == pytest.approx(0, abs=1e-6) and float(weight) == 1


def test_parts_of_a_batch_add_up():
    logits, targets, weights = batch(2)
    whole = cross_entropy(logits, targets, weights, label_smoothing=0.1)
    parts = [
        cross_entropy(logits[i], targets[i], weights[i], label_smoothing=0.1) for i in range(3)
    ]
    np.testing.assert_allclose(np.sum(parts, 0), whole, rtol=1e-5)


def test_token_log_probs_equal_log_softmax_at_the_target():
    logits, targets, _ = batch(3)
    got = token_log_probs(logits, targets)
    for place in np.ndindex(targets.shape):
        expected = log_softmax(np.asarray(logits[place], np.float64))[targets[place]]
        assert got[place] == pytest.approx(expected, rel=1e-5, abs=1e-6)


def test_token_log_probs_have_the_gradient_of_log_softmax():
    logits, targets, weights = batch(4)
    gradient = jax.grad(lambda x: (token_log_probs(x, targets) * weights).sum())(logits)
    softmax = np.exp([[log_softmax(row) for row in rows] for rows in np.asarray(logits)])
    expected = (np.eye(V)[targets] - softmax) * weights[..., None]
    np.testing.assert_allclose(gradient, expected, atol=1e-6)


def test_large_bfloat16_logits_are_computed_in_float32():
    logits, targets, weights = batch(5, jnp.bfloat16)
    logits = logits * 100
    loss, _ = cross_entropy(logits, targets, weights, z_loss=1e-4)
    full, _ = cross_entropy(logits.astype(jnp.float32), targets, weights, z_loss=1e-4)
    assert loss.dtype == jnp.float32 and np.isfinite(loss)
    assert float(loss) == pytest.approx(float(full), rel=1e-6)
    log_probs = token_log_probs(logits, targets)
    assert log_probs.dtype == jnp.float32 and np.all(log_probs <= 0)


def test_the_step_keeps_no_one_hot_and_no_second_copy_of_the_logits():
    tokens, vocabulary, width = 128, 4096, 8
    targets, weights = jnp.zeros(tokens, jnp.int32), jnp.ones(tokens)

    def loss(hidden, table):
        return cross_entropy(hidden @ table, targets, weights, label_smoothing=0.1, z_loss=1e-4)[0]

    shapes = jnp.zeros((tokens, width)), jnp.zeros((width, vocabulary))
    compiled = jax.jit(jax.value_and_grad(loss, argnums=(0, 1))).lower(*shapes).compile()
    memory = compiled.memory_analysis()
    if memory is None:
        pytest.skip("this backend does not report its memory")
    logits = tokens * vocabulary * 4
    assert memory.temp_size_in_bytes < 2.5 * logits  # the logits and their gradient


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda x, y, w: cross_entropy(x, y, w[:2]),
            (
                "expected logits [..., V] with targets and weights [...]; "
                "got (3, 5, 11) with (3, 5) and (2, 5)"
            ),
        ),
        (
            lambda x, y, w: token_log_probs(x, y[:, :4]),
            "expected logits [..., V] with targets and weights [...]; got (3, 5, 11) with (3, 4)",
        ),
        (
            lambda x, y, w: cross_entropy(x, w, w),
            "targets must be token ids; got dtype float32",
        ),
        (
            lambda x, y, w: cross_entropy(x, y, w, label_smoothing=1.0),
            "label_smoothing must be in [0, 1); got 1.0",
        ),
    ],
)
def test_wrong_arguments_say_what_was_expected(call, message):
    with pytest.raises(ValueError) as caught:
        call(*batch())
    assert str(caught.value) == message
