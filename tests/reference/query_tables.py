"""What a query says of every token, and scores that are sums of it: one number at a time."""

from __future__ import annotations

import math

import numpy as np


def token_weights(embeddings: np.ndarray, hidden: list[np.ndarray]) -> np.ndarray:
    """w[v] = max over the tokens of a query of log(1 + relu(E_v . h / sqrt(D))); 0 of padding.

    embeddings: [V, D]; hidden: a vector [D] of each token that is no padding.
    """
    weights = np.zeros(len(embeddings))
    for v in range(1, len(embeddings)):
        products = [embeddings[v] @ h / math.sqrt(len(h)) for h in hidden]
        weights[v] = max(math.log(1 + max(product, 0)) for product in products)
    return weights


def sums(table: np.ndarray, members: np.ndarray) -> np.ndarray:
    """Scores of passages from the table [W] of a query: the sum of it at the members [P, m]."""
    return np.array([sum(float(table[i]) for i in row) for row in members])


def code_table(log_probs: np.ndarray) -> np.ndarray:
    """log p of every token at every position [T, V] -> one row [T * V]; 0 where it is padding."""
    row = []
    for of_position in log_probs:
        row += [0.0, *of_position[1:]]
    return np.array(row)
