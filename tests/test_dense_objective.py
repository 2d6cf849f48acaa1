"""The dense objective against loops over queries and passages, on one device and on eight."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn

from dgr_jax import partitioning
from dgr_jax.losses import contrastive, ranking
from dgr_jax.partitioning import Mesh, make_mesh
from dgr_jax.training.dense import Dense
from dgr_jax.training.step import init_state, make_train_step
from tests import students, toy
from tests.reference import contrastive as twin

VOCABULARY, WIDTH = 40, 8
RNG = np.array([0, 1], np.uint32)
slow = functools.partial(pytest.param, marks=pytest.mark.slow)


class Bags(nn.Module):
    """A dual encoder of two embeddings: the vector of a text is the sum of its tokens'."""

    dropout_rate: float = 0.0

    def setup(self) -> None:
        box = nn.with_logical_partitioning(nn.initializers.normal(0.5), ("vocab", "embed"))
        self.query = self.param("query", box, (VOCABULARY, WIDTH))
        self.passage = self.param("passage", box, (VOCABULARY, WIDTH))
        self.dropout = nn.Dropout(self.dropout_rate)

    def __call__(self, queries, passages):
        return self.encode_queries(queries), self.encode_passages(passages)

    def encode_queries(self, tokens, deterministic=True):
        x = jnp.where((tokens > 0)[..., None], self.query[tokens], 0.0).sum(1)
        return self.dropout(x, deterministic)

    def encode_passages(self, tokens, deterministic=True):
        x = jnp.where((tokens > 0)[..., None], self.passage[tokens], 0.0).sum(1)
        return self.dropout(x, deterministic)


def parameters():
    random = np.random.default_rng(0)
    draw = lambda: random.normal(scale=0.5, size=(VOCABULARY, WIDTH)).astype(np.float32)
    return {"query": draw(), "passage": draw()}


PARAMS = parameters()


def batch(size=8, length=4, *, passages=20, seed=0):
    """Lists of few passages, so that many occur in several; some places are free."""
    random = np.random.default_rng(seed)
    texts = random.integers(1, VOCABULARY, (passages, 5)).astype(np.int32)
    texts[::3, 3:] = 0
    listed = np.stack([random.permutation(passages)[:length] for _ in range(size)])
    mask = random.random((size, length)) < 0.8
    return {
        "encoder_input_tokens": random.integers(1, VOCABULARY, (size, 3)).astype(np.int32),
        "passage_tokens": np.where(mask[..., None], texts[listed], 0).astype(np.int32),
        "passage_mask": mask,
        "positive_mask": (random.random((size, length)) < 0.5) & (np.arange(length) < 3),
        "passages": np.where(mask, listed, -1).astype(np.int32),
        "ignored_passages": random.integers(-1, passages, (size, 2)).astype(np.int32),
        "teacher_scores": random.normal(size=(size, length)).astype(np.float32),
    }


def two_queries(first, second):
    """A batch in which two queries have one positive each, these passages, and nothing else is."""
    lists = batch()
    for name in ("passage_mask", "positive_mask"):
        lists[name][:] = False
        lists[name][:2, 0] = True
    lists["passages"][:] = lists["ignored_passages"][:] = -1
    lists["passages"][:2, 0] = first, second
    return lists


def vectors(table, tokens):
    return np.where((tokens > 0)[..., None], table.astype(np.float64)[tokens], 0.0).sum(-2)


def by_loops(lists, name, *, in_batch):
    """Loss of each query, from a walk over all passages."""
    queries = vectors(PARAMS["query"], lists["encoder_input_tokens"])
    places = vectors(PARAMS["passage"], lists["passage_tokens"])
    losses = []
    for b, query in enumerate(queries):
        mine = lists["positive_mask"][b] & lists["passage_mask"][b]
        known = {*lists["passages"][b][mine], *lists["ignored_passages"][b]} - {-1}
        scores, positive = [], []
        for other in range(len(queries)) if in_batch else [b]:
            for place in np.flatnonzero(lists["passage_mask"][other]):
                if other != b and lists["passages"][other, place] in known:
                    continue
                scores.append(query @ places[other, place])
                positive.append(other == b and mine[place])
        losses.append(getattr(twin, name)(scores, positive, [True] * len(scores)))
    return losses


@functools.cache
def _compiled(objective):
    return jax.jit(objective.loss_fn(Bags()))


def value(objective, lists):
    loss_sum, weight_sum, metrics = _compiled(objective)(PARAMS, lists, RNG)
    means = {name: float(a) / max(float(b), 1e-9) for name, (a, b) in metrics.items()}
    return float(loss_sum), float(weight_sum), means


@pytest.mark.parametrize(
    ("name", "in_batch"), [("single_lh", True), slow("joint_lh", True), ("lse_pair", False)]
)
def test_negatives_are_those_of_the_list_and_of_the_batch(name, in_batch):
    lists = batch()
    expected = by_loops(lists, name, in_batch=in_batch)
    loss_sum, weight_sum, metrics = value(Dense(contrastive.LOSSES[name], in_batch), lists)
    assert weight_sum == 8 and np.count_nonzero(expected) >= 4
    np.testing.assert_allclose(loss_sum, sum(expected), rtol=1e-5)
    np.testing.assert_allclose(metrics["contrastive_loss"], np.mean(expected), rtol=1e-5)
    assert metrics["usable_queries"] == np.count_nonzero(expected) / 8
    assert 0 < metrics["positive_first"] < 1


def test_a_positive_of_the_query_is_never_its_negative():
    """In another query's list it is masked; where nothing else is left, there is no loss."""
    objective = Dense(contrastive.single_lh)
    loss, _, metrics = value(objective, two_queries(3, 4))
    assert loss > 0 and (metrics["negatives"], metrics["usable_queries"]) == (1, 2 / 8)
    same, _, metrics = value(objective, two_queries(3, 3))
    assert same == metrics["negatives"] == metrics["usable_queries"] == 0
    assert value(objective, two_queries(-1, -1))[0] == loss  # nothing known of them: apart


def test_ignored_passages_are_no_negatives():
    lists = two_queries(3, 4)
    lists["ignored_passages"][0, 1] = 4
    _, _, metrics = value(Dense(contrastive.single_lh), lists)
    assert (metrics["negatives"], metrics["usable_queries"]) == (1, 1 / 8)


@pytest.mark.parametrize(
    ("name", "first"),
    [("kl_divergence", "single_lh"), slow("kl_divergence", None), slow("margin_mse", None)],
)
def test_the_teacher_orders_each_list(name, first):
    """Alone, or beside a contrastive loss."""
    lists = batch()
    lists["passage_mask"][0] = [True, False, False, False]  # nothing to order
    teacher = functools.partial(ranking.LOSSES[name], teacher_temperature=2.0)
    queries = vectors(PARAMS["query"], lists["encoder_input_tokens"])
    places = vectors(PARAMS["passage"], lists["passage_tokens"])
    student = np.einsum("bd,bld->bl", queries, places).astype(np.float32)
    values = np.array(teacher(student, lists["teacher_scores"], lists["passage_mask"]))
    values[lists["passage_mask"].sum(1) < 2] = 0
    expected, loss = 0.5 * values.sum(), None
    if first:
        loss = contrastive.LOSSES[first]
        expected += sum(by_loops(lists, first, in_batch=True))
    objective = Dense(loss, teacher_loss=teacher, teacher_weight=0.5)
    loss_sum, weight_sum, metrics = value(objective, lists)
    np.testing.assert_allclose(loss_sum, expected, rtol=1e-4)
    np.testing.assert_allclose(metrics["teacher_loss"], values.mean(), rtol=1e-4)
    assert metrics["valid_lists"] == (lists["passage_mask"].sum(1) >= 2).mean() < 1


def steps(objective, mesh, model, params, batches):
    """Parameters and metrics after a step a batch."""
    optimizer = optax.sgd(0.05)
    state = init_state(model, optimizer, mesh, seed=3, params=params)
    step = make_train_step(objective, model, optimizer, mesh, state)
    history = []
    for lists in batches:
        state, metrics = step(state, partitioning.shard_batch(lists, mesh))
        history.append({k: float(a) / max(float(b), 1e-9) for k, (a, b) in metrics.items()})
    assert step._cache_size() == 1
    return jax.device_get(state.params), history


def meshes_agree(objective, model, params, batches, mesh):
    """Results on one device, and that `mesh` has the same."""
    alone = make_mesh(Mesh(1), toy.devices(1))
    expected, wanted = steps(objective, alone, model, params, batches)
    got, history = steps(objective, make_mesh(mesh, toy.devices(8)), model, params, batches)
    same = functools.partial(np.testing.assert_allclose, rtol=2e-4, atol=2e-5)
    jax.tree.map(same, got, expected)
    for ours, theirs in zip(history, wanted, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4, abs=1e-5)
    return wanted


@pytest.mark.parametrize(
    ("objective", "dropout"),
    [
        (Dense(contrastive.lse_pair), 0.0),
        slow(Dense(contrastive.rand1_lh, teacher_loss=ranking.kl_divergence), 0.1),
    ],
    ids=["lse_pair", "rand1_lh-teacher-dropout"],
)
def test_one_and_eight_devices_agree(objective, dropout):
    """Each data shard holds four queries; the negatives of all are those of the whole batch."""
    batches = [batch(16, seed=seed) for seed in range(2)]
    history = meshes_agree(objective, Bags(dropout), PARAMS, batches, Mesh(4, 2, 1))
    assert history[0]["negatives"] > 20


@pytest.mark.slow
def test_a_t5_on_a_mesh():
    from dgr_jax.models.dual_encoder import DualEncoder
    from tests.test_dual_encoder import CONFIG, params

    lists = batch(8)
    tokens = {k: lists[k] % students.VOCAB for k in ("encoder_input_tokens", "passage_tokens")}
    objective = Dense(contrastive.lse_pair, teacher_loss=ranking.margin_mse)
    meshes_agree(
        objective, DualEncoder(CONFIG), params(CONFIG), [lists | tokens] * 2, Mesh(2, 2, 2)
    )


@pytest.mark.slow
def test_learns():
    """Queries that share a token with their passage find it."""
    tokens = np.arange(1, 17).astype(np.int32)
    lists = {
        "encoder_input_tokens": tokens[:, None],
        "passage_tokens": tokens[:, None, None],
        "passage_mask": np.ones((16, 1), bool),
        "positive_mask": np.ones((16, 1), bool),
        "passages": tokens[:, None],
    }
    mesh = make_mesh(Mesh(1), toy.devices(1))
    objective = Dense(functools.partial(contrastive.sum_marg_lh, temperature=0.25))
    _, history = steps(objective, mesh, Bags(), PARAMS, [lists] * 200)
    assert history[0]["positive_first"] < 0.3 and history[-1]["positive_first"] == 1


def test_errors():
    with pytest.raises(ValueError) as error:
        Dense()
    assert str(error.value) == (
        "Dense: got neither Dense.loss nor Dense.teacher_loss, expected one or both"
    )
    lists = batch()
    del lists["teacher_scores"]
    objective = Dense(contrastive.lse_pair, teacher_loss=ranking.kl_divergence)
    with pytest.raises(ValueError) as error:
        objective.loss_fn(Bags())(PARAMS, lists, RNG)
    assert str(error.value) == (
        "Dense: the batch lacks teacher_scores, expected it of shape (8, 4)"
    )
    lists["teacher_scores"] = np.zeros((8, 3), np.float32)
    with pytest.raises(ValueError) as error:
        objective.loss_fn(Bags())(PARAMS, lists, RNG)
    assert str(error.value) == (
        "Dense: teacher_scores: got shape (8, 3), expected (8, 4), as passage_tokens (8, 4, 5)"
    )
