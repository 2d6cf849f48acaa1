"""Generation examples of one query side by side, encoded once."""

import dataclasses

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dgr_jax.experiments.common import Training
from dgr_jax.experiments.pseudo_queries import Pairs, PseudoQueries
from dgr_jax.experiments.refresh import Refresh
from dgr_jax.training import together
from dgr_jax.training.objectives import Distillation, Generation
from dgr_jax.training.optimizers import Adafactor
from dgr_jax.training.refreshing import LevelGeneration
from dgr_jax.training.source import MixtureSource
from dgr_jax.training.together import grouped
from tests import test_dense_experiment, toy

TRAINING = Training(Generation(), Adafactor(), steps=1, batch_size=12)


def examples(counts):
    """Examples of queries with so many each, numbered by their first target token."""
    total = sum(counts)
    features = toy.generation_examples(total)
    queries = np.repeat(np.arange(len(counts)), counts)
    features["encoder_input_tokens"] = 2 + np.stack([queries % 3, queries % 5], 1).astype(np.int32)
    features["decoder_loss_weights"] = np.arange(total * 3, dtype=np.float32).reshape(total, 3)
    return features, queries


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=8), st.integers(1, 5), st.integers(1, 4))
def test_groups_hold_every_example_of_one_query(counts, size, block):
    features, queries = examples(counts)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(together, "_BLOCK", block)
        groups = grouped(features, size)
    rows = np.arange(len(groups["encoder_input_tokens"]))
    numbers = groups["decoder_loss_weights"][rows][..., 0].astype(int) // 3
    assert numbers.shape == (sum(-(-count // size) for count in counts), size)
    assert groups["decoder_loss_weights"].shape == (*numbers.shape, 3)
    assert set(numbers.ravel()) == set(range(len(queries)))
    assert (queries[numbers] == queries[numbers[:, :1]]).all()
    for name, leaf in features.items():
        expected = leaf[numbers[:, 0] if name == "encoder_input_tokens" else numbers]
        np.testing.assert_array_equal(groups[name][rows], expected)
    times = np.bincount(numbers.ravel())
    for query in range(len(counts)):  # as equally often as can be
        assert np.ptp(times[queries == query]) <= 1


def test_a_mixture_of_groups_and_its_loss():
    """The loss is that of the same examples, each with an encoding of its own."""
    parts = [examples((4, 2, 6))[0], examples((3, 8))[0]]
    tasks = {str(i): (grouped(part, 4), 1.0 + i) for i, part in enumerate(parts)}
    batch = MixtureSource(tasks, 3, seed=0).batch(2)
    assert {name: leaf.shape for name, leaf in batch.items()} == {
        "encoder_input_tokens": (3, 2), "decoder_input_tokens": (3, 4, 3),
        "decoder_target_tokens": (3, 4, 3), "decoder_loss_weights": (3, 4, 3),
    }  # fmt: skip
    flat = {name: leaf.reshape(-1, leaf.shape[-1]) for name, leaf in batch.items()}
    flat["encoder_input_tokens"] = np.repeat(batch["encoder_input_tokens"], 4, axis=0)
    loss = Generation().loss_fn(toy.Toy())
    mean = Distillation(lambda *_: 0)._generation_loss
    logits = np.random.default_rng(0).normal(size=(12, 3, toy.VOCABULARY)).astype(np.float32)
    apart = logits.reshape(3, 4, 3, -1)

    @jax.jit
    def both(params):
        losses = [loss(params, examples, jax.random.key(0)) for examples in (batch, flat)]
        return *losses, mean(apart, batch), mean(logits, flat)

    toy.encoder_calls.clear()
    *losses, got, expected = both(toy.params())
    assert toy.encoder_calls == [(3, 2), (12, 2)]
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5)
    jax.tree.map(close, *losses)
    close(got[0], expected[0])


def test_where_examples_are_not_learned_together_it_is_said():
    many, dense = {"examples_per_query": 2}, test_dense_experiment.BASE
    changed = lambda training: dataclasses.replace(training, **many)
    refresh = dataclasses.replace(TRAINING, objective=LevelGeneration(), **many)
    for make, message in [
        (lambda: dataclasses.replace(dense, train=changed(dense.train)),
         "Training.examples_per_query: got 2, expected 1 with a dense retriever"),
        (lambda: dataclasses.replace(dense, refresh=changed(dense.train)),
         "refresh/Training.examples_per_query: got 2, expected 1 with a dense retriever"),
        (lambda: PseudoQueries("m", dense.collection, Pairs(), None, changed(TRAINING), None),
         "Training.examples_per_query: got 2, expected 1 where pseudo-queries are learned"),
        (lambda: Refresh("m", refresh),
         "Training.examples_per_query: got 2, expected 1 where a student is refreshed"),
    ]:  # fmt: skip
        with pytest.raises(ValueError) as error:
            make()
        assert str(error.value) == message


def test_errors():
    with pytest.raises(
        ValueError, match="Training.examples_per_query: got 5, expected a number th"
    ):
        dataclasses.replace(TRAINING, examples_per_query=5)
    grouped_by_four = dataclasses.replace(TRAINING, examples_per_query=4)
    grouped_by_four.check_shards("generate", 3, "batch_size")
    message = (
        "batch_size=12, expected a multiple of 8, .* x Training.examples_per_query; set BATCH_S"
    )
    with pytest.raises(ValueError, match=message):
        grouped_by_four.check_shards("generate", 2, "batch_size")
