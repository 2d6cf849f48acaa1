"""Where an experiment's student starts: weights of others, or what its own passages say."""

from __future__ import annotations

import logging
from dataclasses import asdict, dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from dgr_jax import ranges
from dgr_jax.models import pretrained
from dgr_jax.models.stacking import stack_layers, unstack_layers
from dgr_jax.models.t5 import T5Config, Transformer
from dgr_jax.settings import unless_default

logger = logging.getLogger(__name__)

# Of the student, not of the weights.
_OWN = ("vocab_size", "dropout_rate", "dtype", "remat", "scan_layers", "prefix_adaptive_layers")


@dataclass(frozen=True)
class Corpus:
    """Token embeddings from the passages, by latent semantic analysis; all else starts at random.

    No labels and no queries are used. See `corpus_start`, which says how, and `stages.start`.

    max_passages: of a larger collection, so many, evenly spaced.
    shuffled: each token gets the embedding of another one, to compare with: embeddings of the same
      scale that say nothing.
    """

    max_passages: int = 1_000_000
    shuffled: bool = unless_default(False)

    def __post_init__(self) -> None:
        ranges.check(self, max_passages=ranges.at_least(1))


@dataclass(frozen=True)
class Pretrained:
    """A published T5, T5 1.1 or FLAN-T5.

    source: a Hugging Face folder or hub id, or a t5x checkpoint, which may be in a bucket.
    seed: of the rows that the student's vocabulary has beyond that of the weights, and of its
      prefix-adaptive layers, which no weights have.
    """

    source: str
    seed: int = 0

    def __post_init__(self) -> None:
        ranges.check(self, seed=ranges.SEED)

    def params(self, config: T5Config, *, pieces: int = 0, text_tokens: int = 0) -> Any:
        """The parameters of a student of these sizes.

        pieces: of the student's text; text_tokens: rows of its vocabulary before docid codes and
          markers of views. Both are held against the rows of the weights; 0: they are not.

        Raises ValueError that names every setting in which the weights are of another size, and for
        weights with more tokens than the student.
        """
        published, params = pretrained.read(self.source)
        given, expected = asdict(config), asdict(published)
        wrong = [
            f"T5Config.{name}: got {given[name]!r}, expected {expected[name]!r}"
            for name in given
            if name not in _OWN and given[name] != expected[name]
        ]
        if wrong:
            raise ValueError(f"{self.source}: weights of another size; {'; '.join(wrong)}")
        self._hold_against(published.vocab_size, config.vocab_size, pieces, text_tokens)
        if published.scan_layers and not config.scan_layers:
            params = unstack_layers(params)
        _, params = pretrained.extend_vocabulary(
            published, params, config.vocab_size, jax.random.key(self.seed)
        )
        if config.scan_layers and not published.scan_layers:
            params = stack_layers(params)
        return params | _prefix_adaptation(config, self.seed)

    def _hold_against(self, rows: int, size: int, pieces: int, text_tokens: int) -> None:
        """Whether the rows of the weights are those that the student's text stands for."""
        # The ids after the pieces with which the student's text has as many rows, see
        # `data.vocabulary`.
        unused = 128 * (-(-rows // 128) - 1) + 1 - pieces
        advice = (
            f"take the vocabulary of these weights (SentencePiece.path) and its unused ids after "
            f"the pieces (SentencePiece.extra_ids: {max(0, unused)} or more; 100 for the published "
            "T5)"
        )
        if rows > size:
            raise ValueError(
                f"{self.source}: weights of another vocabulary: tokens of the student: got {size}, "
                f"expected at least {rows}, that of the model; {advice}"
            )
        if 0 < text_tokens < min(rows, size):
            logger.warning(
                "%s: the weights have %d tokens, the student's text %d: docid codes and markers of "
                "views begin with the rows of %d tokens that the weights use otherwise; %s",
                *(self.source, rows, text_tokens, min(rows, size) - text_tokens, advice),
            )
        if rows < pieces:
            logger.warning(
                "%s: the weights have %d tokens, the student's text %d pieces, of which the last "
                "have no weights and start at random; %s",
                *(self.source, rows, pieces, advice),
            )


Initial = Corpus | Pretrained


def check_initial(setting: str, initial: Any) -> None:
    """Raises ValueError where an experiment's start is none."""
    if not isinstance(initial, Initial | None):
        raise ValueError(
            f"{setting}: got {type(initial).__name__}, expected None, @Corpus() or @Pretrained()"
        )


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
