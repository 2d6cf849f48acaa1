"""Texts whose spans are to be filled in, and the stage that trains on them."""

from __future__ import annotations

import dataclasses
import json

import jax
import numpy as np
import pytest

from dgr_jax.config import cli, gin_files
from dgr_jax.data.span_corruption import CorruptedTexts, SpanCorruption
from dgr_jax.stages import pipeline, student, systems
from dgr_jax.stages.prepared import Prepared
from tests.conftest import TINY

LAST = 499  # the first sentinel


class Words:
    """A vocabulary of numbers."""

    pieces, text_size = 400, LAST + 1

    def encode_all(self, texts):
        return [[int(word) for word in text.split()] for text in texts]


def filled_in(inputs, targets, last=LAST, sentinels=100):
    """The text that an input and its target were made of: every sentinel of the input stands for
    what follows it in the target."""
    inputs, targets = ([int(t) for t in row if t] for row in (inputs, targets))
    assert inputs.pop() == targets.pop() == 1
    spans, order = {}, []
    for token in targets:
        if last - sentinels < token <= last:
            order.append(token)
            spans[token] = []
        else:
            spans[order[-1]].append(token)
    assert order == [last - k for k in range(len(order))] and all(spans.values())
    text = []
    for token in inputs:
        text += spans.pop(token) if token in spans else [token]
    assert not spans
    return text


@pytest.mark.parametrize("length", [2, 3, 7, 40, 300])
@pytest.mark.parametrize(("masked", "mean_span"), [(0.15, 3.0), (0.5, 1.0), (0.9, 20.0)])
def test_what_is_masked_is_what_is_asked_for(length, masked, mean_span):
    settings = SpanCorruption(masked=masked, mean_span=mean_span)
    text = 3 + np.arange(length, dtype=np.int32)
    sizes, seen = settings.sizes(length), set()
    for seed in range(20):
        inputs, targets = settings.corrupted(text, LAST, np.random.default_rng(seed))
        assert filled_in(inputs, targets, sentinels=151) == text.tolist()
        assert (len(inputs), len(targets)) == (sizes.input, sizes.target)
        assert inputs[0] == text[0] and (inputs > LAST - 151).sum() == sizes.spans
        seen.add(inputs.tobytes())
    assert sizes.masked == np.clip(round(length * masked), 1, length - 1)
    assert masked > 0.15 or len(seen) > 1 or length == 2


def test_the_longest_text_fills_the_input():
    for length in (4, 5, 16, 64, 512):
        for masked in (0.01, 0.15, 0.6):
            settings = SpanCorruption(length=length, masked=masked)
            longest = settings.longest
            assert longest.input <= length < settings.sizes(longest.tokens + 1).input
    assert SpanCorruption(length=512).longest == (568, 85, 28)  # as T5's


def test_batches_depend_on_the_step_alone_and_read_every_text():
    counts = [9, 5, 1, 10]
    texts = [
        " ".join(map(str, range(20 * (i + 1), 20 * (i + 1) + n))) for i, n in enumerate(counts)
    ]
    settings = SpanCorruption(length=8)
    source = CorruptedTexts(texts, Words(), settings, 4, seed=1)
    again = CorruptedTexts(iter(texts), Words(), settings, 4, seed=1)
    read = []
    for step in (3, 0, 1, 2):
        batch, halves = source.batch(step), [again.batch(step, i, 2) for i in (0, 1)]
        for name, array in batch.items():
            np.testing.assert_array_equal(np.concatenate([h[name] for h in halves]), array)
        targets = batch["decoder_target_tokens"]
        np.testing.assert_array_equal(batch["decoder_input_tokens"][:, 1:], targets[:, :-1])
        np.testing.assert_array_equal(batch["decoder_loss_weights"], targets > 0)
        assert batch["encoder_input_tokens"].shape == (4, 8)
        read += map(filled_in, batch["encoder_input_tokens"], targets)
    whole = [text for text in read if len(text) == settings.longest.tokens]
    assert all(np.diff(text).tolist() == [1] * (len(text) - 1) for text in read)
    assert {text[0] // 20 for text in read} == {1, 2, 4} and len({tuple(t) for t in whole}) > 4
    with pytest.raises(ValueError, match="span corruption: got no text of two tokens or more"):
        CorruptedTexts(["7"], Words(), settings, 4, seed=1)


def loaded(*flags, under=("--gin_file=quickstart.gin",)):
    asked = [*under, "--gin_file=runs/pretrain.gin", *flags]
    return gin_files.load_experiment(*cli.parse(cli.parser("train", ""), asked), keep=False)


def test_the_stage_stands_before_generation_and_makes_it_another():
    experiment = loaded()
    assert list(experiment.stages)[:4] == ["prepare", "start", "pretrain", "generate"]
    assert experiment.stages["pretrain"].upstream(experiment) == ("prepare", "start")
    assert experiment.stages["generate"].upstream(experiment) == ("prepare", "start", "pretrain")
    plain = dataclasses.replace(experiment, pretrain=None)
    assert "pretrain" not in plain.stages
    own = lambda e: pipeline.settings_of(e)["generate"]
    assert own(plain) != own(experiment)
    assert experiment.compared("distill") != plain.compared("distill")
    assert "mean_span" in json.dumps(pipeline.settings_of(experiment)["pretrain"])


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        (
            "--gin.SentencePiece.extra_ids=2",
            "SentencePiece.extra_ids: got 2, expected at least 3, the sentinels of texts of 70 "
            "tokens (SpanCorruption.length)",
        ),
        (
            "--gin.pretrain/Training.validate_every=5",
            "pretrain/Training.validate_every: got 5, expected 0: before it learns identifiers",
        ),
        (
            "--gin.pretrain/Training.examples_per_query=2",
            "pretrain/Training.examples_per_query: got 2, expected 1 where spans are filled in",
        ),
        ("--gin.SpanCorruption.masked=1.0", "SpanCorruption.masked: got 1.0, expected below 1"),
        ("--gin.PRETRAIN_BATCH_SIZE=0", "pretrain/Training.batch_size: got 0, expected at least 1"),
    ],
)
def test_what_cannot_be_pretrained_is_refused(flag, message):
    with pytest.raises(ValueError) as error:
        loaded(flag)
    assert message in str(error.value)


@pytest.mark.slow
def test_generation_begins_where_pretraining_ended(tmp_path, monkeypatch):
    steps = ("--gin.PRETRAIN_STEPS=30", "--gin.PRETRAIN_BATCH_SIZE=8")
    more = ("--gin.SpanCorruption.length=16", "--gin.Mesh.data=-1", f"--model_dir={tmp_path}/model")
    experiment = loaded(*steps, *more, under=TINY)
    begun = []
    monkeypatch.setattr(student, "train_student", lambda *args: begun.append(args[-1]))
    pipeline.run(experiment, ["prepare", "start", "pretrain"])
    student.generate(experiment, tmp_path)
    prepared = Prepared.load(experiment.model_dir)
    pretrained = systems.params(experiment, "pretrain", prepared)
    jax.tree.map(np.testing.assert_array_equal, begun[0], pretrained)
    fresh = student.beginning(experiment, prepared, 0)
    assert any(map(np.any, jax.tree.leaves(jax.tree.map(np.subtract, pretrained, fresh))))
    rows = [json.loads(line) for line in (tmp_path / "model/pretrain/metrics.jsonl").open()]
    losses = [row["loss"] for row in rows]
    assert rows[-1]["step"] == 30 and np.mean(losses[-5:]) < np.mean(losses[:5])
