"""What a refreshed student minimises, and which rows of it move."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dgr_jax.losses import levels
from dgr_jax.training import refreshing
from dgr_jax.training.optimizers import Adafactor, AdamW
from dgr_jax.training.refreshing import LEVELS, OLD, LevelGeneration, SlowRows, codes_of
from dgr_jax.training.source import ArraySource
from tests import students

CODES = codes_of(students.codes(12))
EXAMPLES = 6


def softmax(scores: np.ndarray) -> np.ndarray:
    exp = np.exp(scores - scores.max())
    return exp / exp.sum()


def reference(logits, targets, old, weight) -> float:
    """The loss of one example, code by code."""
    total = 0.0
    for t, level in enumerate(CODES):
        codes = [c for c in level if c]
        new = softmax(logits[t, codes].astype(np.float64))
        was = np.exp(old[t, : len(codes)].astype(np.float64))
        kl = sum(p * (np.log(p) - np.log(q)) for p, q in zip(was, new, strict=True))
        total += -np.log(new[codes.index(targets[t])]) + weight * kl
    return total


class Model:
    """A model whose parameters are its logits."""

    def apply(self, variables, queries, inputs, **_):
        return variables["params"]


def batch() -> dict[str, np.ndarray]:
    targets = students.codes(12)[3 : 3 + EXAMPLES]
    return {
        "encoder_input_tokens": students.queries(EXAMPLES),
        "decoder_input_tokens": np.pad(targets[:, :-1], ((0, 0), (1, 0))),
        "decoder_target_tokens": targets,
        "decoder_loss_weights": np.ones(targets.shape, np.float32),
        LEVELS: np.broadcast_to(CODES, (EXAMPLES, *CODES.shape)),
    }


def drawn(seed: int) -> np.ndarray:
    """Logits f32 [E, T, V]."""
    shape = (EXAMPLES, CODES.shape[0], students.VOCAB)
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def lossy(objective: LevelGeneration, logits, given):
    return jax.jit(objective.loss_fn(Model()))(logits, given, jax.random.key(0))


def test_the_loss_is_the_sum_over_codes_of_a_level():
    given, logits = batch(), drawn(0)
    given[OLD] = np.asarray(levels.level_log_probs(drawn(1), given[LEVELS]))
    value, weight, metrics = lossy(LevelGeneration(old_weight=0.3), logits, given)
    rows = zip(logits, given["decoder_target_tokens"], given[OLD], strict=True)
    np.testing.assert_allclose(value, sum(reference(*row, 0.3) for row in rows), rtol=2e-5)
    assert weight == EXAMPLES * CODES.shape[0]
    apart = metrics["old_divergence"]
    assert apart[0] > 0
    np.testing.assert_allclose(value - 0.3 * apart[0], metrics["generation_loss"][0], rtol=1e-5)


def test_a_student_that_is_the_old_one_is_not_apart_from_it():
    given, logits = batch(), drawn(0)
    given[OLD] = np.asarray(levels.level_log_probs(logits, given[LEVELS]))
    loss = LevelGeneration(old_weight=1.0).loss_fn(Model())
    apart = lambda logits: loss(logits, given, jax.random.key(0))[2]["old_divergence"][0]
    value, grads = jax.jit(jax.value_and_grad(apart))(logits)
    assert abs(value) < 1e-5
    np.testing.assert_allclose(grads, 0, atol=1e-6)


def test_all_tokens_compete_where_it_is_asked_for():
    given, logits = batch(), drawn(0)
    value, _, metrics = lossy(LevelGeneration(False, 0.0), logits, given)
    exp = np.exp(logits.astype(np.float64))
    shares = exp / exp.sum(-1, keepdims=True)
    targets = given["decoder_target_tokens"][..., None]
    expected = -np.log(np.take_along_axis(shares, targets, -1)).sum()
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    assert "old_divergence" not in metrics


def test_gradients_are_those_of_finite_differences():
    random = np.random.default_rng(3)
    logits = jnp.asarray(random.normal(size=(2, 3, 96)), jnp.float32)
    codes = jnp.asarray(np.broadcast_to(CODES, (2, *CODES.shape)))
    targets = jnp.asarray(students.codes(12)[:2])
    old = levels.level_log_probs(logits[::-1] * 0.5, codes)

    def loss(logits):
        new = levels.level_log_probs(logits, codes)
        entropy = levels.cross_entropy(new, codes, targets)
        return jnp.sum(entropy + 0.5 * levels.divergence(old, new))

    loss = jax.jit(loss)
    grads = np.asarray(jax.jit(jax.grad(loss))(logits))
    for place in [(0, 0, int(targets[0, 0])), (1, 2, int(CODES[2, 1])), (0, 1, 5)]:
        step = np.zeros(logits.shape, np.float32)
        step[place] = 1e-2
        differs = (loss(logits + step) - loss(logits - step)) / 2e-2
        np.testing.assert_allclose(grads[place], differs, atol=2e-3)
    assert grads[0, 1, 5] == 0, "a text token has no part in it"


def test_padding_of_levels_and_empty_levels_count_nothing():
    codes = jnp.asarray([[5, 7, 0], [0, 0, 0]])
    logits = jnp.zeros((2, 9)).at[0, 0].set(50.0)

    def loss(logits):
        new = levels.level_log_probs(logits, codes)
        kept = levels.cross_entropy(new, codes, jnp.asarray([7, 0]))
        return jnp.sum(kept + levels.divergence(new, new)), new

    (value, log_probs), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(logits)
    np.testing.assert_allclose(value, np.log(2), rtol=1e-6)
    assert np.isneginf(np.asarray(log_probs)[1]).all() and np.isneginf(log_probs[0, 2])
    assert np.isfinite(grads).all() and not grads[1].any()


@pytest.mark.parametrize("optimizer", [Adafactor(), AdamW()], ids=["adafactor", "adamw"])
def test_frozen_rows_stay_and_slow_ones_move_slowly(optimizer):
    random = np.random.default_rng(0)
    draw = lambda *shape: random.normal(size=shape).astype(np.float32)
    shapes = {"token_embedder": {"embedding": (12, 4)}, "encoder": {"kernel": (4, 12)}}
    shapes["decoder"] = {"logits_dense": {"kernel": (4, 12)}, "scale": (4,)}
    is_shape = lambda leaf: isinstance(leaf, tuple)
    params, grads = (jax.tree.map(lambda s: draw(*s), shapes, is_leaf=is_shape) for _ in range(2))
    rates = np.array([0.0] * 6 + [0.01] * 3 + [1.0] * 3, np.float32)
    moved = []
    for asked in (SlowRows(optimizer, rates), optimizer):
        transformation = asked.transformation(10)
        update = jax.jit(transformation.update)
        moved.append(update(grads, transformation.init(params), params)[0])
    slow, every = moved
    for table in (
        lambda tree: np.asarray(tree["token_embedder"]["embedding"]),
        lambda tree: np.asarray(tree["decoder"]["logits_dense"]["kernel"]).T,
    ):
        assert table(every)[:6].all() and not table(slow)[:6].any()
        np.testing.assert_allclose(table(slow)[6:9], table(every)[6:9] * 0.01, rtol=1e-5)
        np.testing.assert_array_equal(table(slow)[9:], table(every)[9:])
    np.testing.assert_array_equal(slow["encoder"]["kernel"], every["encoder"]["kernel"])
    np.testing.assert_array_equal(slow["decoder"]["scale"], every["decoder"]["scale"])
    assert SlowRows(optimizer, rates).learning_rate == optimizer.learning_rate


def test_batches_bring_along_the_codes_of_each_level():
    tokens = np.array([[70, 80, 1], [71, 80, 0], [70, 81, 0]], np.int32)
    codes = codes_of(tokens)
    np.testing.assert_array_equal(codes, [[70, 71], [80, 81], [1, 0]])
    source = refreshing.WithLevels(ArraySource({"decoder_target_tokens": tokens}, 2, 0), codes)
    got = source.batch(5)
    assert got[LEVELS].shape == (2, 3, 2)
    np.testing.assert_array_equal(got[LEVELS][1], codes)
