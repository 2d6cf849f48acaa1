"""Which numbers a setting may be, checked where settings are made: before any work starts."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from numbers import Real
from typing import Any, NamedTuple

from dgr_jax.special_tokens import LONGEST_IDENTIFIER

MOST_TOKENS = 10**9  # of a part of a vocabulary: token ids are int32


class Range(NamedTuple):
    """What a setting is expected to be, in words, and whether a value is."""

    words: str
    holds: Callable[[Any], bool]


def at_least(least: float, note: str = "") -> Range:
    """From `least` on. note: what the words say beside."""
    return Range(f"at least {least:g}{note}", _real(lambda value: value >= least))


def above(limit: float) -> Range:
    """More than `limit`."""
    return Range(f"above {limit:g}", _real(lambda value: value > limit))


def below(limit: float) -> Range:
    """Less than `limit`."""
    return Range(f"below {limit:g}", _real(lambda value: value < limit))


def between(least: float, most: float) -> Range:
    """`least` to `most`, both included."""
    return Range(f"{least:,} to {most:,}", _real(lambda value: least <= value <= most))


def identifier_tokens(beside: int) -> Range:
    """At most the tokens of an identifier, without so many that come beside them, such as EOS."""
    most = LONGEST_IDENTIFIER - beside
    return Range(f"at most {most}, which an index can hold", _real(lambda value: value <= most))


def tokens(least: float) -> Range:
    """So many tokens of a vocabulary."""
    words = f"{least:,} to {MOST_TOKENS:,} tokens, whose ids are int32"
    return Range(words, _real(lambda value: least <= value <= MOST_TOKENS))


def from_to_below(least: float, limit: float) -> Range:
    """From `least` on, below `limit`."""
    words = f"at least {least:g}, below {limit:g}"
    return Range(words, _real(lambda value: least <= value < limit))


def one_of(*allowed: Any) -> Range:
    """One of these values."""
    return Range(f"one of {', '.join(map(repr, allowed))}", lambda value: value in allowed)


def optional(inner: Range) -> Range:
    """None, or a value of `inner`."""
    return Range(f"{inner.words}, or None", lambda value: value is None or inner.holds(value))


def each(inner: Range) -> Range:
    """A tuple, empty or not, whose values are all of `inner`."""
    return Range(f"each {inner.words}", lambda values: all(map(inner.holds, values)))


def _real(holds: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, Real) and math.isfinite(value) and holds(value)


_COUNTS = ("int", "int | None")
FINITE = Range("a finite number", _real(lambda value: True))
SEED = between(0, 2**32 - 1)  # what every library that draws takes


def check(settings: Any, **expected: Range) -> None:
    """Raises ValueError naming the first setting whose value is not what is expected of it, or that
    is no whole number, where its type asks for one."""
    kinds = {field.name: field.type for field in dataclasses.fields(settings)}
    for name, range_ in expected.items():
        setting, value = f"{type(settings).__name__}.{name}", getattr(settings, name)
        require(setting, value, range_)
        if kinds.get(name) in _COUNTS and value is not None and value != int(value):
            raise ValueError(f"{setting}: got {value!r}, expected a whole number")


def require(setting: str, value: Any, expected: Range) -> None:
    """Raises ValueError naming the setting, where its value is not what is expected."""
    if not expected.holds(value):
        raise ValueError(f"{setting}: got {value!r}, expected {expected.words}")
