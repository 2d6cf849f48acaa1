"""A SeqIO task, tokenised once, as token arrays that training reads without TensorFlow.

The prepare stage makes those of generation examples without TensorFlow's graph
(`dgr_jax.data.examples.features`), and takes these where a task makes other ones.
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
    """Model features of a task's `train` split in its own order, [n <= 4096, ...] a block."""
    ds = seqio.get_mixture_or_task(task).get_dataset(
        lengths, split="train", shuffle=False, num_epochs=1
    )
    yield from converter(ds, lengths).batch(_BLOCK).as_numpy_iterator()
