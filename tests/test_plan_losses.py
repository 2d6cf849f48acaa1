"""What trains a student's plan, against plain loops, and beside the other losses."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dgr_jax.identifiers.table import IdentifierTable
from dgr_jax.losses import ranking
from dgr_jax.models import query_tables
from dgr_jax.models.t5 import Transformer
from dgr_jax.training.objectives import Distillation, Generation
from dgr_jax.training.plan_losses import CodeLoss, SetLoss, WithSets
from dgr_jax.training.source import ArraySource
from tests import students
from tests.reference import query_tables as reference

CONFIG = dataclasses.replace(students.CONFIG, decoder_query_tokens=4, dropout_rate=0.0)
MODEL = Transformer(CONFIG)
PARAMS = students.parameters(students.CONFIG)
RNG = jax.random.PRNGKey(0)
ROWS = students.codes(6, seed=1)
SETS = np.random.default_rng(2).integers(3, 60, (6, 5)).astype(np.uint16)
SETS[:, 4] = 0  # they have four pieces
SETS[5] = SETS[4]  # two passages with one set
TABLE = IdentifierTable.from_rows(ROWS, view="test")
RANKNET = functools.partial(ranking.ranknet)
WEIGHT = 0.5


def examples(passages):
    targets = ROWS[passages]
    return {
        "encoder_input_tokens": students.queries(len(passages)),
        "decoder_input_tokens": np.pad(targets[:, :-1], ((0, 0), (1, 0))),
        "decoder_target_tokens": targets,
        "decoder_loss_weights": np.ones(targets.shape, np.float32),
    }


def lists(passages):
    """Rank lists of the passages, int [B, L]; -1: a free place."""
    there = passages >= 0
    tokens = np.where(there[..., None], ROWS[passages], 0)[:, :, None]
    teacher = np.random.default_rng(3).normal(size=passages.shape).astype(np.float32)
    return examples(passages[:, 0]) | {
        "identifier_tokens": tokens,
        "identifier_weights": there[..., None].astype(np.float32),
        "teacher_scores": teacher,
        "passage_mask": there,
    }


def with_sets(batch):
    return WithSets(ArraySource(batch, len(batch["encoder_input_tokens"]), 0), TABLE, SETS).batch(0)


EXAMPLES = with_sets(examples(np.array([0, 1, 4, 5, 2])))
LISTS = with_sets(lists(np.array([[0, 2, 3], [4, 1, -1], [2, 5, 0]])))
FLOPS = 0.5
PLANS = {"sets": SetLoss(5, WEIGHT, flops=FLOPS), "codes": CodeLoss(WEIGHT)}


@functools.cache
def compiled(objective):
    return jax.jit(objective.loss_fn(MODEL))


@functools.cache
def differentiated(objective):
    """(params, batch) -> ((loss sum, (weight sum, metrics)), gradient)"""

    def parts(params, batch):
        loss_sum, *others = objective.loss_fn(MODEL)(params, batch, RNG)
        return loss_sum, others

    return jax.jit(jax.value_and_grad(parts, has_aux=True))


def value(objective, batch):
    return in_floats(*compiled(objective)(PARAMS, batch, RNG))


def in_floats(loss_sum, weight_sum, metrics):
    means = {name: float(a) / max(float(b), 1e-9) for name, (a, b) in metrics.items()}
    return float(loss_sum), float(weight_sum), means


@functools.cache
def applied():
    return functools.partial(jax.jit(MODEL.apply, static_argnames="method"), {"params": PARAMS})


def tables(kind, batch):
    """The table of each query as one row, in float64."""
    apply, queries = applied(), batch["encoder_input_tokens"]
    encoded = apply(queries, method="encode")
    if kind == "sets":
        table, _ = query_tables.token_table(apply, encoded, queries)
        return np.asarray(table, np.float64)
    levels = np.broadcast_to(np.array([95, 94, 93], np.int32), (len(queries), 1, 3))
    logits = apply(apply(encoded, queries, levels, method="decode"), method="logits")
    log_probs = np.asarray(jax.nn.log_softmax(logits[:, 0]), np.float64)
    return np.stack([reference.code_table(row) for row in log_probs])


def scores(kind, batch, passages):
    """[B, L] of the passages [B, L]."""
    members = SETS if kind == "sets" else ROWS + np.arange(3) * students.VOCAB
    rows = zip(tables(kind, batch), passages, strict=True)
    return np.stack([reference.sums(table, members[of_query]) for table, of_query in rows])


def example_losses(kind, batch, passages):
    everything = scores(kind, batch, np.tile(np.arange(6), (len(passages), 1)))
    losses = []
    for b, own in enumerate(passages):
        if kind == "codes":
            losses.append(-everything[b, own] / 3)
            continue
        others = [p for p in passages if (SETS[p] != SETS[own]).any()]
        all_scores = everything[b, [own, *others]]
        losses.append(np.log(np.exp(all_scores - all_scores[0]).sum()))
    spread = (tables(kind, batch).mean(0) ** 2).sum() if kind == "sets" else 0.0
    assert kind == "codes" or 0.1 < FLOPS * spread < 10
    return np.array(losses) + FLOPS * spread


def passages_of(batch):
    rows = TABLE.lookup(batch["decoder_target_tokens"])
    return TABLE.passages[TABLE.offsets[rows]]


@pytest.mark.parametrize("kind", PLANS)
def test_generation_with_a_plan(kind):
    plain = value(Generation(), EXAMPLES)
    (loss_sum, others), _ = differentiated(Generation(plan=PLANS[kind]))(PARAMS, EXAMPLES)
    loss, weight, metrics = in_floats(loss_sum, *others)
    expected = example_losses(kind, EXAMPLES, passages_of(EXAMPLES))
    assert weight == plain[1] == 15
    assert metrics["plan_loss"] == pytest.approx(expected.mean(), rel=1e-4)
    assert loss == pytest.approx(plain[0] + WEIGHT * 3 * expected.sum(), rel=1e-4)


@pytest.mark.parametrize(
    ("kind", "own"),
    [
        ("sets", True),
        pytest.param("codes", False, marks=pytest.mark.slow),
        pytest.param("sets", False, marks=pytest.mark.slow),
        pytest.param("codes", True, marks=pytest.mark.slow),
    ],
)
def test_distillation_with_a_plan(kind, own):
    """Generation examples are the targets of the lists, or a batch of their own."""
    batch = {"rank_list": LISTS} | ({"generation": EXAMPLES} if own else {})
    of = EXAMPLES if own else LISTS
    plain = Distillation(RANKNET, generation_weight=0.7)
    rows = TABLE.lookup(LISTS["identifier_tokens"][:, :, 0])
    passages = np.where(rows >= 0, TABLE.passages[np.maximum(rows, 0)], 0)
    student = scores(kind, LISTS, passages).astype(np.float32)
    ranked = np.asarray(jax.jit(RANKNET)(student, LISTS["teacher_scores"], LISTS["passage_mask"]))
    examples = example_losses(kind, of, passages_of(of))
    loss, _, metrics = value(dataclasses.replace(plain, plan=PLANS[kind]), batch)
    expected = value(plain, batch)[0] + WEIGHT * (ranked.sum() + 0.7 * 3 * examples.mean())
    assert loss == pytest.approx(expected, rel=1e-4)
    assert metrics["plan_rank_loss"] == pytest.approx(ranked.mean(), rel=1e-4)
    assert metrics["plan_loss"] == pytest.approx(examples.mean(), rel=1e-4)
    assert 0 <= metrics["plan_pairs_right"] <= 1


@pytest.mark.slow
def test_a_plan_may_have_a_loss_of_its_own():
    plain = Distillation(RANKNET, generation_weight=0.0)
    other = dataclasses.replace(plain, plan=SetLoss(5, 1.0, functools.partial(ranking.margin_mse)))
    rows = TABLE.lookup(LISTS["identifier_tokens"][:, :, 0])
    student = scores("sets", LISTS, np.where(rows >= 0, TABLE.passages[np.maximum(rows, 0)], 0))
    ranked = ranking.margin_mse(
        student.astype(np.float32), LISTS["teacher_scores"], LISTS["passage_mask"]
    )
    expected = value(plain, {"rank_list": LISTS})[0] + float(ranked.sum())
    assert value(other, {"rank_list": LISTS})[0] == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("kind", PLANS)
def test_gradients_are_finite_also_of_nothing(kind):
    """Also where a batch has no passage that is known, and a query is blank."""
    program = differentiated(Generation(plan=PLANS[kind]))
    for batch in (EXAMPLES, {k: np.zeros_like(v) for k, v in EXAMPLES.items()}):
        _, gradient = program(PARAMS, batch)
        leaves = jax.tree.leaves(gradient)
        assert all(np.isfinite(leaf).all() for leaf in leaves)


def test_sets_travel_with_their_passages():
    batch = with_sets({k: v for k, v in LISTS.items() if not k.endswith("_members")})
    rows = TABLE.lookup(batch["identifier_tokens"][:, :, 0])
    for b, i in np.ndindex(rows.shape):
        expected = SETS[TABLE.passages[rows[b, i]]] if rows[b, i] >= 0 else np.zeros(5)
        np.testing.assert_array_equal(batch["list_members"][b, i], expected)
    np.testing.assert_array_equal(batch["plan_members"], SETS[passages_of(batch)])


def test_a_table_of_codes_has_no_place_for_padding():
    members = query_tables.code_members(jnp.array([[5, 7, 0]]), 10)
    assert members.tolist() == [[5, 17, 0]]
    table = jnp.arange(30.0).reshape(1, 3, 10).at[..., 0].set(0.0)
    assert query_tables.sums(table, members).tolist() == [[22.0]]


@pytest.mark.parametrize("kind", [SetLoss, CodeLoss])
def test_weights_are_checked(kind):
    settings = {"members": 4} if kind is SetLoss else {}
    with pytest.raises(ValueError, match=f"{kind.__name__}.weight: got -1, expected at least 0"):
        kind(**settings, weight=-1)
