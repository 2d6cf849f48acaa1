"""Lists of positives and negatives, drawn by step; their settings."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from dgr_jax.experiments.dense import Lists
from dgr_jax.training.lists import ListSource, Phases, TaughtLists
from dgr_jax.training.source import ArraySource

PASSAGES, QUERIES, DEPTH = 30, 12, 6
TOKENS = np.arange(PASSAGES * 4, dtype=np.int32).reshape(PASSAGES, 4) + 1


def judged(most=5):
    """Queries of 1 to `most` positives, grade 2 before grade 1, and other passages to draw from."""
    random = np.random.default_rng(0)
    shuffled = np.stack([random.permutation(PASSAGES) for _ in range(QUERIES)]).astype(np.int32)
    held = np.arange(most) < 1 + np.arange(QUERIES)[:, None] % most
    return {
        "encoder_input_tokens": np.arange(QUERIES, dtype=np.int32)[:, None] + 1,
        "positives": np.where(held, shuffled[:, :most], -1),
        "grades": np.where(held, np.array([2, 2, 1, 1, 1])[:most], 0).astype(np.int32),
        "negatives": shuffled[:, most : most + DEPTH],
    }


FEATURES = judged()


def source(**settings):
    return ListSource(
        ArraySource(FEATURES, 6, seed=0), TOKENS, **{"positives": 3, "negatives": 2} | settings
    )


def test_a_list_is_of_the_querys_positives_and_negatives():
    lists, seen = source(), Counter()
    for step in range(40):
        batch = lists.batch(step)
        assert batch["passage_tokens"].shape == (6, 5, 4) and batch["passages"].dtype == np.int32
        for row, query in enumerate(batch["encoder_input_tokens"][:, 0] - 1):
            listed, relevant = batch["passages"][row], FEATURES["positives"][query]
            positive = batch["positive_mask"][row]
            known = set(relevant[relevant >= 0].tolist())
            assert positive.sum() == min(3, len(known)) and not positive[3:].any()
            assert set(listed[positive].tolist()) <= known
            assert set(listed[3:].tolist()) <= set(FEATURES["negatives"][query].tolist())
            drawn = listed[listed >= 0]
            assert len(set(drawn.tolist())) == len(drawn)
            np.testing.assert_array_equal(batch["passage_mask"][row], listed >= 0)
            np.testing.assert_array_equal(batch["ignored_passages"][row], relevant)
            tokens = batch["passage_tokens"][row]
            np.testing.assert_array_equal(tokens[listed >= 0], TOKENS[drawn])
            assert not tokens[listed < 0].any()
            seen.update((query, int(p)) for p in drawn)
    # all positives and all negatives are met
    assert len(seen) == (FEATURES["positives"] >= 0).sum() + QUERIES * DEPTH


def test_draws_depend_on_seed_and_step_and_not_on_processes():
    first, again, other = source().batch(7), source().batch(7), source(seed=1).batch(7)
    parts = [source().batch(7, process, 3) for process in range(3)]
    for name, values in first.items():
        np.testing.assert_array_equal(again[name], values)
        np.testing.assert_array_equal(np.concatenate([part[name] for part in parts]), values)
    assert not np.array_equal(other["passages"], first["passages"])
    assert not np.array_equal(source().batch(9)["passages"], first["passages"])  # the next epoch


def test_fixed_positives_are_the_first_ones():
    for step in (0, 5):
        batch = source(fixed=True, negatives=0).batch(step)
        rows = batch["encoder_input_tokens"][:, 0] - 1
        np.testing.assert_array_equal(batch["passages"], FEATURES["positives"][rows, :3])


def test_more_places_than_positives_stay_free():
    batch = source(positives=8).batch(0)
    assert batch["passages"].shape == (6, 10) and "ignored_passages" not in batch
    assert (batch["passages"][:, 5:8] == -1).all()


def test_grades_are_drawn_by_weight():
    many = {name: np.repeat(values[[4]], 4000, axis=0) for name, values in FEATURES.items()}
    queries = ArraySource(many, 4000, seed=0)
    drawn = ListSource(queries, TOKENS, positives=1, grade_weights=(1.0, 3.0)).batch(0)
    share = np.isin(drawn["passages"], FEATURES["positives"][4, :2]).mean()
    assert share == pytest.approx(6 / 9, abs=0.03)  # two of weight 3, three of weight 1
    drawn = ListSource(queries, TOKENS, positives=5, grade_weights=(0.0, 1.0)).batch(0)
    assert (drawn["positive_mask"].sum(1) == 2).all()  # grade 1 is never drawn
    assert (drawn["ignored_passages"] >= 0).all()  # nor a negative


def test_a_teachers_lists_know_their_positives():
    passages = np.where(FEATURES["positives"] % 2 == 0, FEATURES["positives"], -1)
    passages[:, 4] = FEATURES["negatives"][:, 0]
    scores = np.random.default_rng(0).normal(size=passages.shape).astype(np.float32)
    taught = FEATURES | {"passages": passages, "teacher_scores": scores}
    batch = TaughtLists(ArraySource(taught, 6, seed=0), TOKENS).batch(1)
    rows = batch["encoder_input_tokens"][:, 0] - 1
    np.testing.assert_array_equal(batch["teacher_scores"], scores[rows])
    np.testing.assert_array_equal(batch["passage_mask"], passages[rows] >= 0)
    np.testing.assert_array_equal(batch["positive_mask"][:, :4], passages[rows, :4] >= 0)
    assert not batch["positive_mask"][:, 4].any() and batch["passage_mask"][:, 4].all()
    np.testing.assert_array_equal(batch["passage_tokens"][:, 4], TOKENS[passages[rows, 4]])
    np.testing.assert_array_equal(batch["ignored_passages"], FEATURES["positives"][rows])


def test_phases_follow_one_another():
    first, second = (ArraySource(FEATURES, 2, seed) for seed in (1, 2))
    phases = Phases([(3, first), (2, second)])
    for step, expected in ((0, first.batch(0)), (2, first.batch(2)), (3, second.batch(0)),
                           (9, second.batch(6))):  # fmt: skip
        np.testing.assert_array_equal(phases.batch(step)["positives"], expected["positives"])


def test_a_curriculum_in_shares_of_the_steps():
    assert Lists().phases(2) == [(1.0, (1.0, 1.0))]
    assert Lists(weights=(1.0, 3.0)).phases(2) == [(1.0, (1.0, 3.0))]
    phases = Lists(curriculum=((3.0, 1.0, 0.0), (1.0, 0.0, 1.0))).phases(2)
    assert phases == [(0.75, (1.0, 0.0)), (0.25, (0.0, 1.0))]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"positives": 0}, "Lists.positives: got 0, expected at least 1"),
        (
            {"weights": (0.0, 0.0)},
            r"Lists.weights: got \(0.0, 0.0\), expected weights of 0 or more",
        ),
        ({"grade_weights": (-1.0,)}, r"Lists.grade_weights: got \(-1.0,\), expected weights"),
        ({"curriculum": ((1.0,),)}, r"Lists.curriculum: got the phase \(1.0,\), expected"),
        ({"curriculum": ((0.0, 1.0),)}, r"Lists.curriculum: got the phase \(0.0, 1.0\), expected"),
        ({"curriculum": ((1.0, 1.0),), "weights": (1.0,)}, "got both weights and curriculum"),
    ],
)
def test_lists_that_cannot_be_made(settings, message):
    with pytest.raises(ValueError, match=message):
        Lists(**settings)


def test_a_weight_for_each_split():
    message = r"Lists.weights: got weights \(1.0,\), expected 2, one for each of DensePrepare.train"
    with pytest.raises(ValueError, match=message):
        Lists(weights=(1.0,)).phases(2)
    with pytest.raises(ValueError, match="Lists.curriculum: got weights"):
        Lists(curriculum=((1.0, 1.0),)).phases(2)
