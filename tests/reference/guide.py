"""Slow, obvious twins of dgr_jax.decoding.guide: lists of tuples."""

from __future__ import annotations

from tests.reference.decoding import token_log_probs


def bonus(planned, prefix):
    """The largest plan score of the rows that begin with `prefix`; planned: [(row, score)]."""
    return max(score for row, score in planned if row[: len(prefix)] == prefix)


def guided_search(model, query, planned, num_beams):
    """[(row, log_prob)], best log_prob + plan score first, in beams of planned identifiers."""
    rows = sorted({row for row, _ in planned})
    live, finished = [((), 0.0)], []

    def rank(offer):
        return offer[1] + bonus(planned, offer[0])

    while live:
        offers = []
        for prefix, log_prob in live:
            # The whole vocabulary normalises; planned rows only say what may follow.
            steps = token_log_probs(model, query, rows, prefix)
            offers += [((*prefix, token), log_prob + step) for token, step in steps.items()]
        offers.sort(key=rank, reverse=True)
        finished += [offer for offer in offers if offer[0] in rows]
        finished = sorted(finished, key=rank, reverse=True)[:num_beams]
        live = [offer for offer in offers if offer[0] not in rows][:num_beams]
    return finished


def planned_identifiers(rows, plan):
    """[(identifier, the best plan score of its passages)] in order; rows: identifiers of each
    passage; plan: passage -> plan score."""
    best = {}
    for passage, score in plan.items():
        for row in rows[passage]:
            best[row] = max(score, best.get(row, score))
    return sorted(best.items())
