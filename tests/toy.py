"""A model with the student's methods that compiles in a moment, and data it can learn."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn

VOCABULARY = 16


def devices(number: int) -> list[jax.Device]:
    """The first `number` devices; the tests of meshes need 8."""
    found = jax.devices()
    assert len(found) >= number, (
        f"got {len(found)} devices, expected {number}: "
        "set XLA_FLAGS=--xla_force_host_platform_device_count=8 before jax starts"
    )
    return found[:number]


class Toy(nn.Module):
    """Bag of query tokens and previous token -> next token. `encoded_rows` counts encoder work."""

    width: int = 16
    dropout_rate: float = 0.0

    def setup(self) -> None:
        def boxed(*axes: str):
            return nn.with_logical_partitioning(nn.initializers.normal(0.5), axes)

        shape = (VOCABULARY, self.width)
        self.embedding = self.param("embedding", boxed("vocab", "embed"), shape)
        self.position = self.param("position", boxed("length", "embed"), (8, self.width))
        self.kernel = self.param("kernel", boxed("embed", "mlp"), (self.width, 2 * self.width))
        self.output = self.param("logits", boxed("mlp", "vocab"), (2 * self.width, VOCABULARY))
        self.scale = self.param("scale", boxed("embed"), (self.width,))
        self.dropout = nn.Dropout(self.dropout_rate)

    def encode(self, encoder_input_tokens, deterministic=True):
        encoder_calls.append(encoder_input_tokens.shape)
        valid = (encoder_input_tokens > 0)[..., None]
        encoded = jnp.where(valid, self.embedding[encoder_input_tokens], 0.0)
        return self.dropout(encoded, deterministic)

    def decode(self, encoded, encoder_input_tokens, decoder_input_tokens, deterministic=True):
        length = decoder_input_tokens.shape[-1]
        x = self.embedding[decoder_input_tokens] + self.position[:length]
        x = (x + encoded.sum(axis=1)[:, None, None]) * (1 + self.scale)
        return jnp.tanh(x @ self.kernel)

    def logits(self, x):
        return x @ self.output

    def __call__(self, encoder_input_tokens, decoder_input_tokens, deterministic=True):
        encoded = self.encode(encoder_input_tokens, deterministic)
        targets = decoder_input_tokens
        if targets.ndim == 2:
            targets = targets[:, None]
        logits = self.logits(self.decode(encoded, encoder_input_tokens, targets, deterministic))
        return logits if decoder_input_tokens.ndim == 3 else logits[:, 0]


def params(width: int = 16, seed: int = 0) -> dict[str, np.ndarray]:
    """Parameters of a Toy without the cost of compiling its initialiser."""
    random = np.random.default_rng(seed)
    shapes = {
        "embedding": (VOCABULARY, width),
        "position": (8, width),
        "kernel": (width, 2 * width),
        "logits": (2 * width, VOCABULARY),
        "scale": (width,),
    }
    return {
        name: random.normal(scale=0.5, size=shape).astype(np.float32)
        for name, shape in shapes.items()
    }


encoder_calls: list[tuple[int, ...]] = []


def generation_examples(count: int, seed: int = 0, length: int = 3) -> dict[str, np.ndarray]:
    """Queries of 4 tokens whose first `length` are the identifier; some lose their last token."""
    random = np.random.default_rng(seed)
    queries = random.integers(2, VOCABULARY, (count, 4)).astype(np.int32)
    targets = queries[:, :length].copy()
    targets[::3, -1] = 0
    return {
        "encoder_input_tokens": queries,
        "decoder_input_tokens": np.pad(targets[:, :-1], ((0, 0), (1, 0))),
        "decoder_target_tokens": targets,
        "decoder_loss_weights": (targets > 0).astype(np.float32),
    }


def rank_lists(
    count: int, *, passages: int = 4, identifiers: int = 1, length: int = 3, seed: int = 1
) -> dict[str, np.ndarray]:
    """Random rank lists; passage 0 has the target of `generation_examples` as an identifier."""
    random = np.random.default_rng(seed)
    lists = generation_examples(count, seed, length)
    shape = (count, passages, identifiers, length)
    tokens = random.integers(2, VOCABULARY, shape).astype(np.int32)
    tokens[:, 0, 0] = lists["decoder_target_tokens"]
    tokens[:, 1, :, -1] = 0
    weights = np.ones(shape[:3], np.float32)
    if identifiers > 1:
        weights = random.uniform(0.5, 2.0, shape[:3]).astype(np.float32)
    lists["identifier_tokens"] = tokens
    lists["identifier_weights"] = weights
    lists["teacher_scores"] = random.normal(size=shape[:2]).astype(np.float32)
    lists["passage_mask"] = np.ones(shape[:2], bool)
    return lists


class Sgd:
    """An optimizer's settings, as the loop takes them, at one learning rate of either sign."""

    def __init__(self, rate: float, momentum: float | None = None) -> None:
        self.rate, self.momentum = rate, momentum

    @property
    def learning_rate(self) -> Sgd:
        return self

    def schedule(self, total_steps: int):
        return lambda step: self.rate

    def transformation(self, total_steps: int) -> optax.GradientTransformation:
        return optax.sgd(self.rate, momentum=self.momentum)
