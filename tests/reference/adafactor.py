"""Adafactor and AdamW for one parameter, written out from their papers."""

import numpy as np


def adafactor(param, grads, rate, *, factor_from=128, decay=0.8, clip=1.0):
    """Shazeer & Stern 2018, algorithm 5 without momentum; the parameter after all `grads`."""
    param = param.astype(np.float64)
    row = column = full = 0.0
    factored = param.ndim == 2 and min(param.shape) >= factor_from
    for t, grad in enumerate(grads, start=1):
        beta = 1.0 - t**-decay
        square = grad.astype(np.float64) ** 2 + 1e-30
        if factored:
            row = beta * row + (1 - beta) * square.mean(axis=1)
            column = beta * column + (1 - beta) * square.mean(axis=0)
            second = np.outer(row, column) / row.mean()
        else:
            full = beta * full + (1 - beta) * square
            second = full
        update = grad / np.sqrt(second)
        update = update / max(1.0, np.sqrt(np.mean(update**2)) / clip)
        size = max(1e-3, np.sqrt(np.mean(param**2)))
        param = param - rate(t - 1) * size * update
    return param


def adamw(param, grads, rate, *, b1, b2, eps, weight_decay):
    """Loshchilov & Hutter 2019, algorithm 2; the parameter after all `grads`."""
    param = param.astype(np.float64)
    mean = square = 0.0
    for t, grad in enumerate(grads, start=1):
        mean = b1 * mean + (1 - b1) * grad
        square = b2 * square + (1 - b2) * grad**2
        update = (mean / (1 - b1**t)) / (np.sqrt(square / (1 - b2**t)) + eps)
        param = param - rate(t - 1) * (update + weight_decay * param)
    return param
