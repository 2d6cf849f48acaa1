"""The device works on a batch while the host reads the one before."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from typing import TypeVar

Batch = TypeVar("Batch")


def one_behind(started: Iterable[Batch]) -> Iterator[Batch]:
    """The same batches, each of them once the next is started."""
    return (batch for batch, _ in itertools.pairwise(itertools.chain(started, [None])))
