"""Where an experiment's student starts: weights of others, made to fit its vocabulary."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from dgr_jax.models import pretrained
from dgr_jax.models.stacking import stack_layers, unstack_layers
from dgr_jax.models.t5 import T5Config, Transformer

# Of the student, not of the weights.
_OWN = ("vocab_size", "dropout_rate", "dtype", "remat", "scan_layers", "prefix_adaptive_layers")


@dataclass(frozen=True)
class Pretrained:
    """A published T5, T5 1.1 or FLAN-T5.

    source: a Hugging Face folder or hub id, or a t5x checkpoint, which may be in a bucket.
    seed: of the rows that the student's vocabulary has beyond that of the weights, and of its
      prefix-adaptive layers, which no weights have.
    """

    source: str
    seed: int = 0

    def params(self, config: T5Config) -> Any:
        """The parameters of a student of these sizes.

        Raises ValueError that names every setting in which the weights are of another size, and for
        weights with more tokens than the student.
        """
        found, params = pretrained.read(self.source)
        given, expected = asdict(config), asdict(found)
        wrong = [
            f"T5Config.{name}: got {given[name]!r}, expected {expected[name]!r}"
            for name in given
            if name not in _OWN and given[name] != expected[name]
        ]
        if wrong:
            raise ValueError(f"{self.source}: weights of another size; {'; '.join(wrong)}")
        if found.scan_layers and not config.scan_layers:
            params = unstack_layers(params)
        _, params = pretrained.extend_vocabulary(
            found, params, config.vocab_size, jax.random.key(self.seed)
        )
        if config.scan_layers and not found.scan_layers:
            params = stack_layers(params)
        return params | _prefix_adaptation(config, self.seed)


def _prefix_adaptation(config: T5Config, seed: int) -> dict[str, Any]:
    """New parameters of the prefix-adaptive decoder, where the student has one."""
    if not config.prefix_adaptive_layers:
        return {}

    @jax.jit  # makes these parameters alone
    def draw() -> dict[str, Any]:
        tokens = jnp.ones((1, 2), jnp.int32)
        params = Transformer(config).init(jax.random.key(seed), tokens, tokens)["params"]
        return {"prefix_adaptation": nn.unbox(params["prefix_adaptation"])}

    return jax.device_get(draw())
