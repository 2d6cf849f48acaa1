"""Where an experiment's student starts: weights of others, made to fit its vocabulary."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import jax

from dgr_jax.models import pretrained
from dgr_jax.models.t5 import T5Config, stack_layers, unstack_layers

# Of the student, not of the weights.
_OWN = ("vocab_size", "dropout_rate", "dtype", "remat", "scan_layers")


@dataclass(frozen=True)
class Pretrained:
    """A published T5, T5 1.1 or FLAN-T5.

    source: a Hugging Face folder or hub id, or a t5x checkpoint, which may be in a bucket.
    seed: of the rows that the student's vocabulary has beyond that of the weights.
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
        return params
