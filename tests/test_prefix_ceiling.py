"""The best recall of beam search where passages share prefixes."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dgr_jax.retrieval.prefix_ceiling import PrefixCeiling
from tests.reference import exhaustive as reference

# Three passages below 1, and the positives, 3 and 4, alone below their first codes.
CODES = np.array([[1, 4], [1, 5], [1, 6], [2, 4], [3, 4]])


def test_a_positive_is_lost_to_a_prefix_that_many_others_share():
    ceiling = PrefixCeiling(np.concatenate([np.array([[1, i + 7] for i in range(30)]), CODES]))
    right = [33, 34]  # 0.05 each; the 33 others below 1 have 0.9 together
    assert [ceiling(right, width, k=10) for width in (1, 2, 3)] == [0.0, 0.5, 1.0]
    assert [ceiling(right, width, k=1) for width in (1, 2, 3)] == [0.0, 0.5, 0.5]
    assert [ceiling(right, width, k=10, spread=0.5) for width in (1, 2, 3)] == [0.0, 0.5, 1.0]
    assert [ceiling(right, width, k=10, spread=0.2) for width in (1, 2)] == [0.5, 1.0]


def test_a_student_that_is_sure_loses_what_is_beyond_its_width():
    ceiling = PrefixCeiling(CODES)
    assert [ceiling([0, 1, 3], width, k=10, spread=0.0) for width in (1, 2, 3)] == [
        pytest.approx(share) for share in (1 / 3, 2 / 3, 1)
    ]
    assert ceiling(range(5), width=2, k=10) == 0.4  # there are no others
    shared = PrefixCeiling(np.array([[1, 4], [1, 4], [2, 5], [3, 6]]))  # two have one identifier
    assert shared([0, 1, 2, 3], width=1, k=10, spread=0.0) == 0.5


rows = st.lists(st.lists(st.integers(1, 3), min_size=3, max_size=3), min_size=2, max_size=30)


@settings(max_examples=200, deadline=None)
@given(
    rows, st.data(), st.integers(1, 8), st.integers(1, 6), st.sampled_from([0.0, 0.5, 0.9, 0.99])
)
def test_ceilings_are_those_of_a_beam_search(codes, data, width, k, spread):
    """Every identifier ends by a token of its own, as some share all of their codes."""
    short = data.draw(st.lists(st.booleans(), min_size=len(codes), max_size=len(codes)))
    ids = [[*(c[:2] if cut else c), 9 if cut else 8] for c, cut in zip(codes, short, strict=True)]
    padded = np.array([row + [0] * (4 - len(row)) for row in ids])
    number = st.integers(0, len(codes) - 1)
    right = data.draw(st.lists(number, min_size=1, max_size=len(codes), unique=True))
    expected = reference.prefix_ceiling([tuple(row) for row in ids], right, width, k, spread)
    assert PrefixCeiling(padded)(right, width, k, spread) == pytest.approx(expected)
