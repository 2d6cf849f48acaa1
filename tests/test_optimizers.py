"""Optimizers against their papers, schedules against their formulas."""

import dataclasses
import functools
import math

import jax
import numpy as np
import optax
import pytest

from dgr_jax.training.optimizers import (
    Adafactor,
    AdamW,
    Constant,
    Cosine,
    Gradient,
    Linear,
    ReciprocalSqrt,
    decayed,
)
from tests.reference import adafactor as reference

STEPS = 4


def _run(optimizer, params, grads):
    transformation = optimizer.transformation(STEPS)
    state = transformation.init(params)
    update = jax.jit(transformation.update)
    for step in range(STEPS):
        now = {name: grads[name][step] for name in params}
        updates, state = update(now, state, params)
        params = optax.apply_updates(params, updates)
    return params


def _case(shapes):
    random = np.random.default_rng(0)
    params = {k: random.normal(size=shape).astype(np.float32) for k, shape in shapes.items()}
    grads = {
        k: (random.normal(size=(STEPS, *shape)) * 3).astype(np.float32)
        for k, shape in shapes.items()
    }
    return params, grads


def test_adafactor_follows_the_paper():
    params, grads = _case({"wide": (128, 130), "narrow": (127, 130), "scale": (5,), "tiny": (4,)})
    params["tiny"] *= 1e-6  # smaller than the least parameter scale
    optimizer = Adafactor(Linear(peak=0.1, warmup_steps=2))
    got = _run(optimizer, params, grads)
    rate = lambda step: [0.05, 0.1, 0.1, 0.05][step]
    for name, start in params.items():
        expected = reference.adafactor(start, grads[name], rate)
        np.testing.assert_allclose(got[name], expected, rtol=2e-5, atol=1e-6, err_msg=name)


VECTOR = ([1.0, -2.0, 3.0], [[1.0, -0.5, 2.0], [-3.0, 0.25, 8.0], [0.0, 1.0, -1.0]])
MATRIX = (
    [[1.0, -2.0, 0.5], [0.0, 3.0, -1.0]],
    [
        [[1.0, 2.0, -1.0], [0.5, -4.0, 3.0]],
        [[10.0, -1.0, 0.0], [2.0, 0.5, -6.0]],
        [[-1.0, 1.0, 1.0], [0.0, 0.0, 2.0]],
    ],
)


def _turned(case):
    return tuple(np.swapaxes(np.array(part), -1, -2) for part in case)


# (parameter, gradients), settings, the parameter that t5x's Adafactor made of it in three steps.
WORKED = {
    "vector": (VECTOR, {}, [1.00768352, -2.17410016, 2.5967555]),
    "clipped": (VECTOR, {"clipping_threshold": 0.5}, [1.00946903, -2.128407, 2.79832149]),
    "decay": (VECTOR, {"decay_rate": 0.5}, [1.00272071, -2.16596627, 2.60621119]),
    "never clipped": (VECTOR, {"clipping_threshold": 1e9}, [1.03281319, -2.18687963, 2.5711453]),
    "factored": (
        MATRIX,
        {"factor_from": 2},
        [[0.50610244, -2.16018772, 0.55005091], [-0.13441834, 3.09449005, -0.9651441]],
    ),
    "factored, tall": (
        _turned(MATRIX),
        {"factor_from": 2},
        [[0.50610244, -0.13441834], [-2.16018772, 3.09449005], [0.55005091, -0.96514416]],
    ),
    "too small to factor": (
        MATRIX,
        {"factor_from": 3},
        [[0.64603782, -2.17031479, 0.46003368], [-0.37755773, 3.12736416, -1.03574944]],
    ),
    "square": (
        tuple(np.array(part)[..., :2] for part in MATRIX),
        {"factor_from": 2},
        [[0.47181255, -2.16087055], [-0.21764204, 3.07515979]],
    ),
    # Two steps; smaller than the least scale of a parameter.
    "tiny": (([1e-4, -2e-4], [[1.0, 2.0], [3.0, -1.0]]), {}, [-1.25342456e-4, -2.34507461e-4]),
}


def test_adafactor_on_worked_cases():
    made = {
        name: Adafactor(Constant(0.1), **settings).transformation(STEPS)
        for name, (_, settings, _) in WORKED.items()
    }

    @jax.jit  # once for all cases; parameters do not see each other
    def step(params, states, grads):
        out = {name: made[name].update(grads[name], states[name], params[name]) for name in made}
        params = {name: optax.apply_updates(params[name], out[name][0]) for name in made}
        return params, {name: out[name][1] for name in made}

    cases = {
        name: [np.array(part, np.float32) for part in case[0]] for name, case in WORKED.items()
    }
    params = {name: case[0] for name, case in cases.items()}
    states = {name: made[name].init(params[name]) for name in made}
    got = []
    for i in range(3):
        grads = {name: case[1][min(i, len(case[1]) - 1)] for name, case in cases.items()}
        params, states = step(params, states, grads)
        got.append(params)
    for name, (_, settings, expected) in WORKED.items():
        param, grads = cases[name]
        close = functools.partial(np.testing.assert_allclose, rtol=1e-5, err_msg=name)
        close(got[len(grads) - 1][name], expected)
        names = {"clipping_threshold": "clip", "decay_rate": "decay"}
        twin = {names.get(key, key): value for key, value in settings.items()}
        close(reference.adafactor(param, grads, lambda step: 0.1, **twin), expected)


def test_adafactor_keeps_little():
    params, _ = _case({"wide": (128, 130)})
    state = Adafactor().transformation(STEPS).init(params)
    numbers = sum(np.size(leaf) for leaf in optax.tree_utils.tree_get(state, "v_row").values())
    numbers += sum(np.size(leaf) for leaf in optax.tree_utils.tree_get(state, "v_col").values())
    assert numbers == 128 + 130
    assert optax.tree_utils.tree_get(state, "v")["wide"].shape == (1,)


def test_adamw_follows_the_paper():
    params, grads = _case({"kernel": (3, 4), "scale": (4,)})
    optimizer = AdamW(
        Constant(0.01), b1=0.8, b2=0.9, eps=1e-6, weight_decay=0.3, max_grad_norm=None
    )
    got = _run(optimizer, params, grads)
    for name, weight_decay in (("kernel", 0.3), ("scale", 0.0)):
        expected = reference.adamw(
            params[name],
            grads[name],
            lambda step: 0.01,
            b1=0.8,
            b2=0.9,
            eps=1e-6,
            weight_decay=weight_decay,
        )
        np.testing.assert_allclose(got[name], expected, rtol=1e-5, atol=1e-7)


def test_what_decays():
    params = {
        "mlp": {"wi": {"kernel": 0}},
        "norm": {"scale": 0},
        "relpos_bias": {"rel_embedding": 0},
        "token_embedder": {"embedding": 0},
        "dense": {"bias": 0},
    }
    assert decayed(params) == {
        "mlp": {"wi": {"kernel": True}},
        "norm": {"scale": False},
        "relpos_bias": {"rel_embedding": False},
        "token_embedder": {"embedding": True},
        "dense": {"bias": False},
    }


def test_clipping_bounds_the_norm_over_all_parameters():
    params = {"a": np.zeros(3, np.float32), "b": np.zeros(4, np.float32)}
    grads = {"a": np.full(3, 30.0, np.float32), "b": np.full(4, 40.0, np.float32)}
    norm = math.sqrt(3 * 30**2 + 4 * 40**2)
    optimizer = AdamW(Constant(1.0), b1=0.0, b2=0.0, eps=1e6, weight_decay=0.0, max_grad_norm=0.5)
    transformation = optimizer.transformation(STEPS)
    updates, _ = jax.jit(transformation.update)(grads, transformation.init(params), params)
    # With eps this large the update is -grad / eps.
    np.testing.assert_allclose(updates["a"], -30.0 * 0.5 / norm / 1e6, rtol=1e-5)
    np.testing.assert_allclose(updates["b"], -40.0 * 0.5 / norm / 1e6, rtol=1e-5)


def _values(schedule, total, steps):
    rate = schedule.schedule(total)
    return [float(rate(step)) for step in steps]


def test_schedules():
    np.testing.assert_allclose(_values(Constant(0.5), 10, [0, 5, 99]), [0.5, 0.5, 0.5])
    np.testing.assert_allclose(_values(Constant(0.4, 4), 10, [0, 1, 3, 4]), [0.1, 0.2, 0.4, 0.4])
    np.testing.assert_allclose(
        _values(ReciprocalSqrt(), 10, [0, 9_999, 39_999]), [0.01, 0.01, 0.005], rtol=1e-6
    )
    np.testing.assert_allclose(
        _values(Linear(1.0, warmup_steps=2, final=0.2), 10, [0, 1, 2, 6, 10, 50]),
        [0.5, 1.0, 1.0, 0.6, 0.2, 0.2],
        rtol=1e-6,
    )
    np.testing.assert_allclose(
        _values(Cosine(1.0, warmup_steps=2, final=0.2), 10, [0, 2, 6, 10]),
        [0.5, 1.0, 0.6, 0.2],
        rtol=1e-6,
    )


@pytest.mark.parametrize("kind", [Constant, ReciprocalSqrt, Linear, Cosine])
def test_schedule_errors(kind):
    with pytest.raises(ValueError) as error:
        kind(peak=-1.0)
    expected = f"{kind.__name__}.peak: got -1.0, expected above 0"
    assert str(error.value) == expected
    with pytest.raises(ValueError) as error:
        kind(warmup_steps=-3)
    assert str(error.value) == f"{kind.__name__}.warmup_steps: got -3, expected at least 0"


def test_other_errors():
    with pytest.raises(ValueError) as error:
        ReciprocalSqrt(timescale=0)
    assert str(error.value) == "ReciprocalSqrt.timescale: got 0, expected at least 1"
    with pytest.raises(ValueError) as error:
        Adafactor(max_grad_norm=0.0).transformation(STEPS)
    expected = "Adafactor.max_grad_norm: got 0.0, expected above 0, or None"
    assert str(error.value) == expected


def _twin():
    return optax.adafactor(
        Linear(peak=0.1, warmup_steps=2).schedule(STEPS),
        min_dim_size_to_factor=8,
        multiply_by_parameter_scale=True,
        momentum=None,
    )


@pytest.fixture(scope="module")
def updated():
    """Three updates of odd shapes by ours, divided by itself and not, and by optax."""
    params, grads = _case({"tall": (40, 9), "wide": (8, 24), "three": (9, 3, 12), "scale": (5,)})
    grads["tall"][:, ::3] = 0.0  # tokens that no text has
    params["scale"] *= 1e-6
    ours = Adafactor(Linear(peak=0.1, warmup_steps=2), factor_from=8).transformation(STEPS)
    twin, weight = _twin(), np.float32(7.0)

    @jax.jit
    def step(states, sums):
        divided = jax.tree.map(lambda leaf: leaf / weight, sums)
        norm = optax.global_norm(divided)
        given = {"gradient": Gradient(sums, weight, norm)}
        out = {}
        for name, optimizer, more in (
            ("sums", ours, given),
            ("plain", ours, {}),
            ("optax", twin, {}),
        ):
            params, state = states[name]
            updates, state = optimizer.update(divided, state, params, **more)
            out[name] = optax.apply_updates(params, updates), state
        return out

    states = {"sums": ours, "plain": ours, "optax": twin}
    states = {name: (params, optimizer.init(params)) for name, optimizer in states.items()}
    for number in range(3):
        states = step(states, {name: grad[number] for name, grad in grads.items()})
    return states


@pytest.mark.parametrize("way", ["sums", "plain"])
def test_adafactor_is_that_of_optax(updated, way):
    """Parameters, moments and counts, and the state's tree, as a checkpoint holds it."""
    got, expected = updated[way], updated["optax"]
    assert jax.tree.structure(got) == jax.tree.structure(expected)
    close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-35)
    jax.tree.map(close, got, expected)
    shapes = lambda tree: jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), tree)
    assert shapes(got) == shapes(expected)


@pytest.mark.parametrize("optimizer", [Adafactor(max_grad_norm=0.5), AdamW(max_grad_norm=0.5)])
def test_clipping_of_sums_is_that_of_quotients(optimizer):
    sums = {"a": np.full((3, 2), 30.0, np.float32), "b": np.array([4.0, -1.0], np.float32)}
    params = jax.tree.map(np.ones_like, sums)
    grads = jax.tree.map(lambda leaf: leaf / np.float32(8), sums)
    transformation = optimizer.transformation(STEPS)
    state = transformation.init(params)
    norm = optax.global_norm(grads)
    expected, plain = transformation.update(grads, state, params)
    got, of_sums = transformation.update(
        grads, state, params, gradient=Gradient(sums, np.float32(8), norm)
    )
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-6), got, expected)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-6), of_sums, plain)
    by_optax = optax.chain(optax.clip_by_global_norm(0.5), _bare(optimizer))
    assert jax.tree.structure(state) == jax.tree.structure(by_optax.init(params))


def _bare(optimizer):
    return dataclasses.replace(optimizer, max_grad_norm=None).transformation(STEPS)
