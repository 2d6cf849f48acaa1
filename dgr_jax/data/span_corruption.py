"""Span corruption, T5's pre-training (Raffel et al. 2020): a text whose spans are to be filled in.

    text     bees dance to show the way to flowers
    input    bees <0> show the way <1> flowers </s>
    target   <0> dance to <1> to </s>

<0>, <1> ... are sentinels: ids after the pieces (SentencePiece.extra_ids), from the last one on, as
those of T5. A share of the tokens is masked, in spans that are drawn anew each time. Other than
T5's, whose texts end with a span, the last part may be one that is not masked: a short text has one
span alone, which would always be its end.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any, NamedTuple

import numpy as np

from dgr_jax import ranges
from dgr_jax.data.vocabulary import Vocabulary
from dgr_jax.special_tokens import EOS_ID

_BLOCK = 10_000  # texts that are encoded together


class Sizes(NamedTuple):
    """Of a text of so many `tokens`: those that are masked, in so many spans."""

    tokens: int
    masked: int
    spans: int

    @property
    def input(self) -> int:
        """Tokens of the input, EOS counted."""
        return self.tokens - self.masked + self.spans + 1

    @property
    def target(self) -> int:
        """Tokens of the target, EOS counted."""
        return self.masked + self.spans + 1


@dataclass(frozen=True)
class SpanCorruption:
    """What is masked of a text.

    length: tokens of an encoder input at most, EOS counted; of a longer passage, a part is drawn.
    masked: share of the tokens.
    mean_span: tokens of a masked span on average.
    """

    length: int = 64
    masked: float = 0.15
    mean_span: float = 3.0

    def __post_init__(self) -> None:
        ranges.check(
            self,
            length=ranges.at_least(4, ", EOS counted"),
            masked=ranges.above(0),
            mean_span=ranges.at_least(1),
        )
        ranges.check(self, masked=ranges.below(1))

    def sizes(self, tokens: int) -> Sizes:
        """Of a text of so many tokens, two or more."""
        masked = min(max(1, round(tokens * self.masked)), tokens - 1)
        spans = min(max(1, round(masked / self.mean_span)), masked, tokens - masked)
        return Sizes(tokens, masked, spans)

    @property
    def longest(self) -> Sizes:
        """Of the longest text whose input fits."""
        tokens = self.length - 1
        while self.sizes(tokens + 1).input <= self.length:
            tokens += 1
        while self.sizes(tokens).input > self.length:
            tokens -= 1
        return self.sizes(tokens)

    def check_ids(self, extra_ids: int) -> None:
        """Raises ValueError where a vocabulary has too few ids after its pieces for sentinels."""
        needed = self.longest.spans
        if extra_ids < needed:
            raise ValueError(
                f"SentencePiece.extra_ids: got {extra_ids}, expected at least {needed}, the "
                f"sentinels of texts of {self.longest.tokens} tokens (SpanCorruption.length)"
            )

    def corrupted(
        self, text: np.ndarray, last: int, random: np.random.Generator
    ) -> tuple[np.ndarray, np.ndarray]:
        """(input, target) of a text int [n], two tokens or more. last: the first sentinel, after
        which come last - 1, last - 2 ..."""
        sizes = self.sizes(len(text))
        kept = _parts(sizes.tokens - sizes.masked + 1, sizes.spans + 1, random)  # the last: 1 more
        masked = _parts(sizes.masked, sizes.spans, random)
        ends = np.cumsum(kept[:-1] + masked)
        inputs, targets, start = [], [], 0
        for span, end in enumerate(ends.tolist()):
            middle = end - masked[span]
            inputs += [text[start:middle], [last - span]]
            targets += [[last - span], text[middle:end]]
            start = end
        inputs.append(text[start:])
        whole = lambda parts: np.concatenate([*parts, [EOS_ID]]).astype(np.int32)
        return whole(inputs), whole(targets)


def _encoded(texts: Iterable[str], vocabulary: Vocabulary) -> Iterator[np.ndarray]:
    """The tokens of each text, some texts at a time: lists of them take ten times the memory."""
    unread = iter(texts)
    while block := list(islice(unread, _BLOCK)):
        for tokens in vocabulary.encode_all(block):
            yield np.array(tokens, np.uint16 if vocabulary.text_size <= 1 << 16 else np.int32)


def _parts(total: int, count: int, random: np.random.Generator) -> np.ndarray:
    """int [count], 1 or more each, whose sum is `total`, all such equally likely."""
    cuts = 1 + np.sort(random.choice(total - 1, count - 1, replace=False))
    return np.diff(np.concatenate([[0], cuts, [total]]))


class CorruptedTexts:
    """A Source (`training.source`) of generation batches: texts to be filled in.

    Each epoch has all texts in another order, a text of several times the longest several times;
    what is masked depends on the seed, the step and the place in the batch alone.
    """

    def __init__(
        self,
        texts: Iterable[str],
        vocabulary: Vocabulary,
        settings: SpanCorruption,
        batch_size: int,
        seed: int,
    ) -> None:
        """Raises ValueError where no text has two tokens."""
        settings.check_ids(vocabulary.text_size - vocabulary.pieces)
        self._texts = [text for text in _encoded(texts, vocabulary) if len(text) > 1]
        if not self._texts:
            raise ValueError("span corruption: got no text of two tokens or more, expected one")
        self._settings, self._sentinel = settings, vocabulary.text_size - 1
        self._batch_size, self._seed = batch_size, seed
        longest = settings.longest
        self._window, self._shape = longest.tokens, (settings.length, longest.target)
        times = [-(-len(text) // self._window) for text in self._texts]
        self._of = np.repeat(np.arange(len(times)), times)
        self._order: tuple[int, np.ndarray] = -1, self._of

    def batch(self, step: int, process_index: int = 0, process_count: int = 1) -> dict[str, Any]:
        """See Source."""
        share = self._batch_size // process_count
        inputs = np.zeros((share, self._shape[0]), np.int32)
        targets = np.zeros((share, self._shape[1]), np.int32)
        for row in range(share):
            place = step * self._batch_size + process_index * share + row
            random = np.random.default_rng([self._seed, 4, place])
            text = self._text(place, random)
            for whole, part in zip(
                (inputs, targets),
                self._settings.corrupted(text, self._sentinel, random),
                strict=True,
            ):
                whole[row, : len(part)] = part
        return {
            "encoder_input_tokens": inputs,
            "decoder_input_tokens": np.pad(targets[:, :-1], ((0, 0), (1, 0))),
            "decoder_target_tokens": targets,
            "decoder_loss_weights": (targets > 0).astype(np.float32),
        }

    def _text(self, place: int, random: np.random.Generator) -> np.ndarray:
        """The text at a place of the endless order, or a part of it that fits."""
        epoch, at = divmod(place, len(self._of))
        if self._order[0] != epoch:
            random_of_epoch = np.random.default_rng([self._seed, 5, epoch])
            self._order = epoch, random_of_epoch.permutation(self._of)
        text = self._texts[self._order[1][at]]
        start = random.integers(max(1, len(text) - self._window + 1))
        return text[start : start + self._window]
