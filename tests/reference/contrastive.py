"""The contrastive losses of one query, by their formulas in float64 over the real passages only.

Each takes scores [N], positive_mask [N], mask [N] and the settings of its twin, and returns a
float. `draw`, where rand1_lh takes it, is the number of the positive that is drawn, from 0.
"""

from __future__ import annotations

import numpy as np


def parts(scores, positive_mask, mask, temperature):
    """Scores of the positives and of the negatives."""
    real = [i for i in range(len(mask)) if mask[i]]
    positives = [float(scores[i]) / temperature for i in real if positive_mask[i]]
    negatives = [float(scores[i]) / temperature for i in real if not positive_mask[i]]
    return np.array(positives), np.array(negatives)


def lse(x):
    return float(np.logaddexp.reduce(x))


def single_lh(scores, positive_mask, mask, *, temperature=1.0):
    return rand1_lh(scores, positive_mask, mask, draw=0, temperature=temperature)


def rand1_lh(scores, positive_mask, mask, *, draw, temperature=1.0):
    p, n = parts(scores, positive_mask, mask, temperature)
    if not len(p) or not len(n):
        return 0.0
    return lse([p[draw], *n]) - p[draw]


def joint_lh(scores, positive_mask, mask, *, temperature=1.0, per_positive=False):
    p, n = parts(scores, positive_mask, mask, temperature)
    if not len(p) or not len(n):
        return 0.0
    loss = len(p) * lse([*p, *n]) - sum(p)
    return loss / len(p) if per_positive else loss


def sum_marg_lh(scores, positive_mask, mask, *, temperature=1.0):
    p, n = parts(scores, positive_mask, mask, temperature)
    if not len(p) or not len(n):
        return 0.0
    return lse([*p, *n]) - lse(p)


def lse_pair(scores, positive_mask, mask, *, temperature=1.0):
    p, n = parts(scores, positive_mask, mask, temperature)
    if not len(p) or not len(n):
        return 0.0
    return lse([0.0, *(b - a for a in p for b in n)])
