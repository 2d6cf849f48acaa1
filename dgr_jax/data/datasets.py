"""A SeqIO task, tokenised once, as token arrays that training reads without TensorFlow.

The prepare stage makes the arrays of generation examples without TensorFlow
(`dgr_jax.data.examples.features`), and uses this module where a task's own arrays are others.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np
import seqio

_BLOCK = 4096


def arrays(
    task: str,
    lengths: Mapping[str, int | tuple[int, ...]],
    converter: seqio.FeatureConverter,
) -> Iterator[dict[str, np.ndarray]]:
    """Model features of a task's `train` split in its own order, in blocks [n <= 4096, ...]."""
    ds = seqio.get_mixture_or_task(task).get_dataset(
        lengths, split="train", shuffle=False, num_epochs=1
    )
    yield from converter(ds, lengths).batch(_BLOCK).as_numpy_iterator()
