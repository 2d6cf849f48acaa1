"""Published weights as the start of an experiment's student."""

from __future__ import annotations

import dataclasses
import logging

import jax
import numpy as np
import pytest

from dgr_jax.models import pretrained
from dgr_jax.models.initial import Pretrained
from dgr_jax.models.stacking import unstack_layers
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


@pytest.mark.parametrize(
    ("pieces", "text_tokens", "size", "said"),
    [
        (90, 96, 224, ""),
        (70, 80, 224, "begin with the rows of 16 tokens that the weights use otherwise"),
        (70, 80, 96, "begin with the rows of 16 tokens that the weights use otherwise"),
        (120, 128, 224, "weights have 96 tokens, the student's text 120 pieces, of which the last"),
        (0, 0, 224, ""),
    ],
)
def test_rows_of_the_weights_are_those_of_the_text(folder, pieces, text_tokens, size, said, caplog):
    larger = dataclasses.replace(CONFIG, vocab_size=size)
    with caplog.at_level(logging.WARNING):
        Pretrained(str(folder)).params(larger, pieces=pieces, text_tokens=text_tokens)
    assert said in caplog.text and bool(said) == bool(caplog.text)
    assert not said or "SentencePiece.extra_ids: 0 or more; 100 for the published T5" in caplog.text


def test_the_unused_ids_that_are_missing_are_told(caplog):
    """32,000 pieces and weights of 32,128 rows, as T5's are."""
    start = Pretrained("t5")
    start._hold_against(32_128, 34_176, pieces=32_000, text_tokens=32_000)
    assert "the rows of 128 tokens that the weights use otherwise" in caplog.text
    assert "SentencePiece.extra_ids: 1 or more" in caplog.text
    caplog.clear()
    start._hold_against(32_128, 34_176, pieces=32_000, text_tokens=32_128)
    assert not caplog.text
    with pytest.raises(ValueError, match="got 32000, expected at least 32128.*extra_ids: 1 or mo"):
        start._hold_against(32_128, 32_000, pieces=32_000, text_tokens=32_000)
