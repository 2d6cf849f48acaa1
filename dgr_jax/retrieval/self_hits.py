"""Queries that are passages of the corpus, under the same id, must not find themselves.

A search that goes one passage deeper (`Search.deeper`) still has the wanted number of passages
after the query's own passage is taken out. Axis letters: n queries, D depth.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import numpy as np

from dgr_jax.corpora.types import ScoredPassage


def left_out(deeper_result: Mapping[str, np.ndarray], own: np.ndarray) -> dict[str, np.ndarray]:
    """The result of a search one passage deeper, without the own passage of each query.

    deeper_result: passages int [n, D + 1], and scores [n, D + 1] and members [n, D + 1, K], which
    are cut with them; other arrays stay. own: int [n], -1 where the query is no passage.
    """
    is_own = (deeper_result["passages"] == own[:, None]) & (own[:, None] >= 0)
    order = np.argsort(is_own, axis=1, kind="stable")[:, :-1]
    result = dict(deeper_result)
    for name in {"passages", "scores", "members"} & deeper_result.keys():
        places = order.reshape(*order.shape, *[1] * (deeper_result[name].ndim - 2))
        result[name] = np.take_along_axis(deeper_result[name], places, axis=1)
    return result


def without(
    run: Mapping[str, Sequence[ScoredPassage]], own: Collection[str], depth: int
) -> dict[str, list[ScoredPassage]]:
    """A run with at most `depth` passages for each query, in which the queries `own` do not find
    the passage with their id."""
    return {
        qid: [p for p in passages if qid not in own or p.pid != qid][:depth]
        for qid, passages in run.items()
    }
