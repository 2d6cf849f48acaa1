"""Objectives against plain loops, and what must not change their value."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dgr_jax.losses import ranking
from dgr_jax.training import list_decoding, objectives
from dgr_jax.training.objectives import Distillation, Generation
from tests import toy

MODEL = toy.Toy()
PARAMS = jax.device_put(toy.params())
RNG = jax.random.PRNGKey(1)
RANKNET = functools.partial(ranking.distilled_ranknet, margin=2.0, margin_gap=0.5)
RANK = Distillation(RANKNET, generation_weight=0.0)
BOTH = Distillation(RANKNET, generation_weight=0.7)


@functools.cache
def _compiled(objective):
    return jax.jit(objective.loss_fn(MODEL))


def _value(objective, batch):
    loss_sum, weight_sum, metrics = _compiled(objective)(PARAMS, batch, RNG)
    means = {name: float(a) / max(float(b), 1e-9) for name, (a, b) in metrics.items()}
    return float(loss_sum), float(weight_sum), means


@jax.jit
def _logits(query, tokens):
    return MODEL.apply({"params": PARAMS}, query[None], tokens[None])[0]


def _log_prob(query, tokens):
    """Log-softmax of each of `tokens` after the tokens before it, one at a time."""
    total = []
    for t, token in enumerate(tokens):
        before = np.zeros(4, np.int32)
        before[1 : t + 1] = tokens[:t]
        logits = np.asarray(_logits(query, before), np.float64)[t]
        total.append(logits[token] - np.log(np.exp(logits).sum()))
    return total


def _score(lists, b, passage):
    """Sum over the identifiers of a passage of weight * sum of its tokens' log-probabilities."""
    score = 0.0
    for tokens, weight in zip(
        lists["identifier_tokens"][b, passage], lists["identifier_weights"][b, passage], strict=True
    ):
        score += weight * sum(_log_prob(lists["encoder_input_tokens"][b], tokens[tokens > 0]))
    return score


def _token_mean(batch, b):
    tokens = batch["decoder_target_tokens"][b]
    return -np.mean(_log_prob(batch["encoder_input_tokens"][b], tokens[tokens > 0]))


def test_generation_is_the_mean_over_tokens():
    batch = toy.generation_examples(4)
    loss_sum, weight_sum, metrics = _value(Generation(), batch)
    per_token = [
        log_prob
        for query, target in zip(
            batch["encoder_input_tokens"], batch["decoder_target_tokens"], strict=True
        )
        for log_prob in _log_prob(query, target[target > 0])
    ]
    assert weight_sum == len(per_token) == 10
    np.testing.assert_allclose(loss_sum, -sum(per_token), rtol=1e-5)
    assert set(metrics) == {"token_accuracy", "identifier_accuracy"}


def test_generation_accuracies_count_only_real_tokens():
    logits = jax.nn.one_hot(jnp.array([[3, 4, 9], [3, 7, 9]]), 16)
    targets, weights = jnp.array([[3, 4, 0], [3, 4, 5]]), jnp.array([[1.0, 1, 0], [1, 1, 1]])
    metrics = objectives._tokens_right(logits, targets, weights)
    assert [float(x) for x in metrics["token_accuracy"]] == [3, 5]
    assert [float(x) for x in metrics["identifier_accuracy"]] == [1, 2]
    tied = np.array([[0.0, 5.0, 5.0], [3.0, 3.0, 1.0]], np.float32)
    assert objectives._first_best(tied).tolist() == [1, 0]


@pytest.mark.parametrize(("identifiers", "own_examples"), [(1, False), (3, True)])
def test_distillation_is_rank_loss_plus_generation_loss(identifiers, own_examples):
    """The generation examples are their own batch, or the targets beside the rank lists."""
    lists = toy.rank_lists(3, identifiers=identifiers)
    lists["passage_mask"][1, 2] = False
    student = [[_score(lists, b, i) for i in range(4)] for b in range(3)]
    student = np.array(student, np.float32)
    rank = np.asarray(RANKNET(student, lists["teacher_scores"], lists["passage_mask"]))
    assert np.count_nonzero(rank) >= 2

    batch = {"rank_list": lists}
    if own_examples:
        batch["generation"] = toy.generation_examples(5, seed=7)
    examples = batch.get("generation", lists)
    tokens = np.mean([_token_mean(examples, b) for b in range(5 if own_examples else 3)])
    loss_sum, weight_sum, metrics = _value(BOTH, batch)
    assert weight_sum == 3
    np.testing.assert_allclose(loss_sum / weight_sum, rank.mean() + 0.7 * tokens, rtol=1e-4)
    np.testing.assert_allclose(metrics["rank_loss"], rank.mean(), rtol=1e-4)
    np.testing.assert_allclose(metrics["generation_loss"], tokens, rtol=1e-4)


def test_queries_are_encoded_once():
    lists = toy.rank_lists(3, passages=4, identifiers=2)
    toy.encoder_calls.clear()
    jax.eval_shape(Distillation(RANKNET).loss_fn(MODEL), PARAMS, {"rank_list": lists}, RNG)
    assert toy.encoder_calls == [(3, 4)]


def test_target_longer_or_shorter_than_the_identifiers():
    lists = toy.rank_lists(3)
    expected = _value(BOTH, {"rank_list": lists})
    longer = dict(lists)
    for name in ("decoder_input_tokens", "decoder_target_tokens", "decoder_loss_weights"):
        longer[name] = np.pad(lists[name], ((0, 0), (0, 2)))
    np.testing.assert_allclose(_value(BOTH, {"rank_list": longer})[0], expected[0], rtol=1e-5)
    wider = dict(lists)
    wider["identifier_tokens"] = np.pad(lists["identifier_tokens"], [(0, 0)] * 3 + [(0, 2)])
    got = _value(BOTH, {"rank_list": wider})
    np.testing.assert_allclose(got[0], expected[0], rtol=1e-5)
    assert got[2]["positive_first"] == expected[2]["positive_first"]


def test_list_order_and_masked_passages_change_nothing():
    lists = toy.rank_lists(3)
    expected, _, metrics = _value(BOTH, {"rank_list": lists})
    turned = dict(lists)
    names = ("identifier_tokens", "identifier_weights", "teacher_scores", "passage_mask")
    for name in names:
        extra = np.concatenate([lists[name], lists[name][:, :1]], axis=1)
        turned[name] = extra[:, ::-1].copy()
    turned["passage_mask"][:, 0] = False
    turned["teacher_scores"][:, 0] = np.nan
    got, _, turned_metrics = _value(BOTH, {"rank_list": turned})
    np.testing.assert_allclose(got, expected, rtol=1e-5)
    assert turned_metrics == pytest.approx(metrics, rel=1e-4)


def test_invalid_lists_add_nothing_and_are_counted():
    lists = toy.rank_lists(3)
    expected = _value(RANK, {"rank_list": lists})[2]["rank_loss"] * 3
    lists["passage_mask"][0] = False
    lists["passage_mask"][1, 1:] = False
    alone, weight_sum, metrics = _value(RANK, {"rank_list": lists})
    assert weight_sum == 3 and metrics["valid_lists"] == pytest.approx(1 / 3)
    np.testing.assert_allclose(alone, metrics["rank_loss"] * 3, rtol=1e-6)
    lists["passage_mask"][:] = True
    lists["passage_mask"][2] = False
    others = _value(RANK, {"rank_list": lists})[0]
    assert 0 < alone < expected
    np.testing.assert_allclose(alone + others, expected, rtol=1e-5)

    lists["identifier_tokens"][:, 1:] = 0  # no identifiers: all lists are invalid
    loss = lambda params: RANK.loss_fn(MODEL)(params, {"rank_list": lists}, RNG)[0]
    value, grads = jax.jit(jax.value_and_grad(loss))(PARAMS)
    assert value == 0
    assert all(not np.any(leaf) for leaf in jax.tree.leaves(grads))  # finite, and zero


def test_a_passage_without_identifiers_does_not_win():
    """Its score would be 0, above every log-probability."""
    lists = toy.rank_lists(3)
    lists["identifier_weights"][:, 3] = 0.0
    masked = dict(lists, passage_mask=lists["passage_mask"].copy())
    masked["passage_mask"][:, 3] = False
    got = _value(BOTH, {"rank_list": lists})
    expected = _value(BOTH, {"rank_list": masked})
    np.testing.assert_allclose(got[0], expected[0], rtol=1e-6)
    assert got[2] == pytest.approx(expected[2])


def test_passages_that_share_an_identifier_are_ranked_as_the_better_one():
    lists = toy.rank_lists(3)
    lists["identifier_tokens"][:, 2] = lists["identifier_tokens"][:, 3]
    lists["teacher_scores"][:, 2:] = [1.0, 2.0]
    masked = dict(lists, passage_mask=lists["passage_mask"].copy())
    masked["passage_mask"][:, 2] = False
    got = _value(BOTH, {"rank_list": lists})
    expected = _value(BOTH, {"rank_list": masked})
    np.testing.assert_allclose(got[0], expected[0], rtol=1e-6)


def test_microbatches_add_up():
    """The sums of two halves are those of the whole: what the step's single division needs."""
    lists, generation = toy.rank_lists(4), toy.generation_examples(6)
    lists["passage_mask"][0] = False
    whole = _value(BOTH, {"rank_list": lists, "generation": generation})
    halves = [
        _value(
            BOTH,
            {
                "rank_list": {k: v[2 * i : 2 * i + 2] for k, v in lists.items()},
                "generation": {k: v[3 * i : 3 * i + 3] for k, v in generation.items()},
            },
        )
        for i in range(2)
    ]
    np.testing.assert_allclose(sum(half[0] for half in halves), whole[0], rtol=1e-5)
    assert sum(half[1] for half in halves) == whole[1]


def test_prefixes():
    lists = toy.rank_lists(3)
    lists["identifier_tokens"][:, 1, 0, 0] = lists["identifier_tokens"][:, 0, 0, 0]
    plain = _value(RANK, {"rank_list": lists})[0]
    objective = Distillation(RANKNET, 0.0, prefix_lengths=(1, 2), prefix_weights=(0.25, 0.5))
    expected = plain
    for length, weight in ((1, 0.25), (2, 0.5)):
        cut = dict(lists, identifier_tokens=lists["identifier_tokens"][..., :length])
        expected += weight * _value(RANK, {"rank_list": cut})[0]
    np.testing.assert_allclose(_value(objective, {"rank_list": lists})[0], expected, rtol=1e-5)


def test_prefix_errors():
    with pytest.raises(ValueError) as error:
        Distillation(RANKNET, prefix_lengths=(1, 2), prefix_weights=(1.0,))
    assert str(error.value) == (
        "Distillation.prefix_weights: got 1 weights, expected 2, one for each of "
        "Distillation.prefix_lengths"
    )
    objective = Distillation(RANKNET, prefix_lengths=(3,), prefix_weights=(1.0,))
    with pytest.raises(ValueError) as error:
        _value(objective, {"rank_list": toy.rank_lists(2)})
    assert str(error.value) == (
        "Distillation.prefix_lengths: got 3, expected less than 3, the identifiers' length"
    )
    with pytest.raises(ValueError, match="got 2 identifiers a passage, expected 1"):
        _value(objective, {"rank_list": toy.rank_lists(2, identifiers=2)})


def test_metrics_of_the_order():
    student = jnp.array([[3.0, 1.0, 2.0], [1.0, 2.0, 9.0]])
    teacher = jnp.array([[3.0, 2.0, 1.0], [2.0, 1.0, 5.0]])
    mask = jnp.array([[True, True, True], [True, True, False]])
    right, pairs = objectives._ordered_pairs(student, teacher, mask)
    assert (float(right), float(pairs)) == (2, 4)
    tokens = jnp.array([[[[5, 1]], [[6, 1]], [[7, 1]]], [[[5, 1]], [[6, 1]], [[7, 1]]]])
    first = lambda target: tuple(
        float(x) for x in objectives._positive_first(student, mask, tokens, jnp.array(target))
    )
    assert first([[5, 1, 0], [6, 1, 0]]) == (2, 2)
    assert first([[6, 1, 0], [6, 1, 0]]) == (1, 2)
    assert first([[6, 1, 0], [7, 1, 0]]) == (0, 1)  # the second positive is masked


def test_shift_right():
    tokens = jnp.array([[4, 5, 1, 0]])
    np.testing.assert_array_equal(list_decoding.shift_right(tokens), [[0, 4, 5, 1]])


def test_every_ranking_loss_fits():
    lists = toy.rank_lists(2)
    for name in ranking.LOSSES:
        objective = Distillation(ranking.bind(name))
        loss = lambda p, o=objective: o.loss_fn(MODEL)(p, {"rank_list": lists}, RNG)[0]
        assert jax.eval_shape(loss, PARAMS).shape == ()


def test_dropout_draws_from_the_key():
    model = toy.Toy(dropout_rate=0.5)
    loss = jax.jit(Generation().loss_fn(model))
    batch = toy.generation_examples(4)
    values = [float(loss(PARAMS, batch, jax.random.PRNGKey(i))[0]) for i in (0, 0, 1)]
    assert values[0] == values[1] != values[2]
