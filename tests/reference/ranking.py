"""The ranking losses of one list, written out as loops in float64 over the real passages only.

Each takes student [L], teacher [L], mask [L] and the settings of its twin, and returns a float.
"""

from __future__ import annotations

import numpy as np


def real_passages(student, teacher, mask):
    kept = [i for i in range(len(mask)) if mask[i]]
    return [float(student[i]) for i in kept], [float(teacher[i]) for i in kept]


def position(teacher, i):
    """Rank from 1 in the teacher's order; tied passages share the first rank of their group."""
    return 1 + sum(other > teacher[i] for other in teacher)


def mean(terms):
    return sum(terms) / len(terms) if terms else 0.0


def distilled_ranknet(
    student,
    teacher,
    mask,
    *,
    margin=1.0,
    margin_gap=0.5,
    first_weight=3.0,
    position_weights="reciprocal",
):
    s, t = real_passages(student, teacher, mask)
    terms = []
    for a in range(len(s)):
        for b in range(len(s)):
            if t[a] <= t[b]:
                continue
            i, j = position(t, a), position(t, b)
            v = first_weight if i == 1 else 1 / i
            if position_weights == "uniform":
                v = 1.0
            term = v * max(0.0, s[b] - s[a] + margin + (j - i - 1) * margin_gap)
            if term > 0:
                terms.append(term)
    return mean(terms)


def ltrgr(student, teacher, mask, *, margin=1.0, margin_gap=0.5, positive_above=None):
    s, t = real_passages(student, teacher, mask)
    if not s:
        return 0.0
    if positive_above is None:
        good = [x == max(t) for x in t]
    else:
        good = [x > positive_above for x in t]
    positives = [x for x, g in zip(s, good, strict=True) if g]
    negatives = [x for x, g in zip(s, good, strict=True) if not g]
    if not positives or not negatives:
        return 0.0
    top = max(0.0, max(negatives) - max(positives) + margin)
    draws = [max(0.0, n - p + margin + margin_gap) for p in positives for n in negatives]
    return 0.5 * top + 0.5 * mean(draws)


def ranknet(student, teacher, mask, *, temperature=1.0):
    s, t = real_passages(student, teacher, mask)
    terms = []
    for i in range(len(s)):
        for j in range(len(s)):
            if t[i] > t[j]:
                terms.append(np.logaddexp(0.0, (s[j] - s[i]) / temperature))
    return mean(terms)


def softmax(x):
    e = np.exp(np.asarray(x) - max(x))
    return e / e.sum()


def listnet(student, teacher, mask, *, temperature=1.0, teacher_temperature=None):
    s, t = real_passages(student, teacher, mask)
    if not s:
        return 0.0
    p = softmax([x / (teacher_temperature or temperature) for x in t])
    q = softmax([x / temperature for x in s])
    return -sum(p[i] * np.log(q[i]) for i in range(len(s)))


def kl_divergence(student, teacher, mask, *, temperature=1.0, teacher_temperature=None):
    s, t = real_passages(student, teacher, mask)
    if not s:
        return 0.0
    p = softmax([x / (teacher_temperature or temperature) for x in t])
    q = softmax([x / temperature for x in s])
    return sum(p[i] * (np.log(p[i]) - np.log(q[i])) for i in range(len(s)))


def listmle(student, teacher, mask, *, temperature=1.0):
    s, t = real_passages(student, teacher, mask)
    s = [x / temperature for x in s]
    loss = 0.0
    for i in range(len(s)):
        left = [s[j] for j in range(len(s)) if t[j] <= t[i]]
        loss += np.log(sum(np.exp(x - s[i]) for x in left))
    return loss


def lambda_loss(student, teacher, mask, *, gains="rank", temperature=1.0):
    s, t = real_passages(student, teacher, mask)
    if gains == "rank":
        gain = [sum(other < x for other in t) for x in t]
    else:
        gain = [2.0 ** max(x, 0.0) - 1.0 for x in t]
    ideal = sum(g / np.log2(2 + r) for r, g in enumerate(sorted(gain, reverse=True)))
    if ideal == 0:
        return 0.0
    order = sorted(range(len(s)), key=lambda i: (-s[i], t[i]))
    rank = {i: r for r, i in enumerate(order, start=1)}
    loss = 0.0
    for i in range(len(s)):
        for j in range(len(s)):
            if t[i] > t[j]:
                swap = abs(1 / np.log2(1 + rank[i]) - 1 / np.log2(1 + rank[j]))
                change = abs(gain[i] - gain[j]) / ideal * swap
                loss += change * np.log2(1 + np.exp((s[j] - s[i]) / temperature))
    return loss


def margin_mse(student, teacher, mask, *, teacher_temperature=1.0):
    s, t = real_passages(student, teacher, mask)
    terms = []
    for i in range(len(s)):
        for j in range(i + 1, len(s)):
            terms.append(((s[i] - s[j]) - (t[i] - t[j]) / teacher_temperature) ** 2)
    return mean(terms)


def prefix_loss(
    loss, token_log_probs, identifier_tokens, teacher, mask, *, prefix_lengths, prefix_weights
):
    total = 0.0
    for length, weight in zip(prefix_lengths, prefix_weights, strict=True):
        best = {}
        for i in range(len(mask)):
            if mask[i]:
                prefix = tuple(identifier_tokens[i][:length])
                if prefix not in best or teacher[i] > teacher[best[prefix]]:
                    best[prefix] = i
        student, target = [], []
        for prefix, i in best.items():
            real = [k for k, token in enumerate(prefix) if token != 0]
            student.append(sum(float(token_log_probs[i][k]) for k in real))
            target.append(teacher[i])
        total += weight * loss(student, target, [True] * len(student))
    return total
