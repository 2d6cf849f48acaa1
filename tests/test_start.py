"""Weights of others as the start of an experiment's student."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import pytest

from dgr_jax.models import pretrained
from dgr_jax.models.stacking import unstack_layers
from dgr_jax.models.start import Pretrained
from tests import students

CONFIG = dataclasses.replace(students.CONFIG, relpos_buckets=8, num_encoder_layers=2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    where = tmp_path_factory.mktemp("weights")
    pretrained.write_hf(where, CONFIG, students.parameters(CONFIG))
    return where


@pytest.mark.parametrize("scan", [False, True])
def test_old_tokens_keep_their_rows_and_new_ones_get_some(folder, scan):
    larger = dataclasses.replace(
        CONFIG, vocab_size=CONFIG.vocab_size + 32, scan_layers=scan, dtype="bfloat16"
    )
    found = Pretrained(str(folder)).params(larger)
    found = unstack_layers(found) if scan else found
    expected = students.parameters(CONFIG)
    old = found["token_embedder"]["embedding"][: CONFIG.vocab_size]
    np.testing.assert_array_equal(old, expected["token_embedder"]["embedding"])
    assert found["token_embedder"]["embedding"].shape == (larger.vocab_size, CONFIG.emb_dim)
    jax.tree.map(np.testing.assert_array_equal, found["encoder"], expected["encoder"])


@pytest.mark.slow
def test_a_prefix_adaptive_decoder_starts_at_random(folder):
    adaptive = dataclasses.replace(CONFIG, prefix_adaptive_layers=1)
    found = Pretrained(str(folder)).params(adaptive)
    shapes = lambda tree: jax.tree.map(np.shape, tree)
    assert shapes(found) == shapes(students.parameters(adaptive))
    jax.tree.map(
        np.testing.assert_array_equal, found["encoder"], students.parameters(CONFIG)["encoder"]
    )
    other = Pretrained(str(folder), seed=1).params(adaptive)["prefix_adaptation"]
    assert (
        np.abs(other["gate"]["kernel"] - found["prefix_adaptation"]["gate"]["kernel"]).max() > 0.1
    )


def test_weights_of_another_size_are_refused(folder):
    other = dataclasses.replace(CONFIG, emb_dim=32, num_heads=2)
    with pytest.raises(ValueError) as refused:
        Pretrained(str(folder)).params(other)
    assert "weights of another size; T5Config.emb_dim: got 32, expected 16" in str(refused.value)
    assert "T5Config.num_heads: got 2, expected 4" in str(refused.value)
    with pytest.raises(ValueError, match="got 64, expected at least 96, that of the model"):
        Pretrained(str(folder)).params(dataclasses.replace(CONFIG, vocab_size=64))
