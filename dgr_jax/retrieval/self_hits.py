"""Queries that are passages of the corpus, under the same id: they must not find themselves.

A search that goes one passage deeper (`Search.deeper`) still has as many as were asked for, when
the query's own passage is taken out. Axis letters: n queries, D depth.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import numpy as np

from dgr_jax.corpora.types import ScoredPassage


def left_out(found: Mapping[str, np.ndarray], own: np.ndarray) -> dict[str, np.ndarray]:
    """What a search one passage deeper has found, without the own passage of each query.

    found: passages int [n, D + 1], and scores [n, D + 1] and members [n, D + 1, K], which go with
    them; other arrays stay. own: int [n], -1 where the query is no passage.
    """
    is_own = (found["passages"] == own[:, None]) & (own[:, None] >= 0)
    order = np.argsort(is_own, axis=1, kind="stable")[:, :-1]
    made = dict(found)
    for name in {"passages", "scores", "members"} & found.keys():
        places = order.reshape(*order.shape, *[1] * (found[name].ndim - 2))
        made[name] = np.take_along_axis(found[name], places, axis=1)
    return made


def without(
    run: Mapping[str, Sequence[ScoredPassage]], own: Collection[str], depth: int
) -> dict[str, list[ScoredPassage]]:
    """A run of at most `depth` passages a query, in which the queries `own` do not find the passage
    of their id."""
    return {
        qid: [p for p in passages if qid not in own or p.pid != qid][:depth]
        for qid, passages in run.items()
    }
