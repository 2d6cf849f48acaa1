"""What a retriever keeps and learns while its corpus grows, in three numbers.

p[t, i] is a measure on the questions of part i after step t, for i <= t; T is the last step.
(Definitions as in CLEVER, Chen et al. 2023, and MixLoRA-DSI, Huynh et al. 2025.)
"""

from __future__ import annotations

import numpy as np


def average(values: np.ndarray, step: int = -1) -> float:
    """AP: mean over the parts i <= t of p[t, i]; values: f64 [T + 1, T + 1], NaN for i > t."""
    return float(np.nanmean(values[step]))


def forgetting(values: np.ndarray) -> float:
    """BWT: mean over the parts i < T of max over the steps i <= t < T of p[t, i] - p[T, i]; NaN
    where steps before the last were not measured."""
    before = values[:-1, :-1]
    if not len(before) or np.isnan(np.diag(before)).any():
        return float("nan")
    return float(np.mean(np.nanmax(before, axis=0) - values[-1, :-1]))


def learning(values: np.ndarray) -> float:
    """FWT: mean over the parts i > 0 of p[i, i]; NaN where one of these was not measured."""
    return float(np.mean(np.diag(values)[1:]))
