"""Losses that teach a student the order of a teacher's rank list.

Every loss has the signature

    f(student [..., L], teacher [..., L], mask bool [..., L], *, settings) -> f32 [...]

with B queries as the usual leading axis and L passages a list, in any order: each loss reads the
order from the teacher's scores, higher is better. What holds for all of them:

- Scores may have any float or integer type; they are cast to float32. They must be finite where
  the mask is set, and may be anything, NaN and infinities included, where it is not.
- A masked passage contributes exactly 0 to the loss and to the gradient. A list that has nothing
  to teach (fully masked, one passage, every pair satisfied or tied) gives 0 and a zero gradient,
  except where a loss says otherwise.
- The teacher is data: no gradient flows into it.
- The position of a passage is the number of passages that the teacher puts strictly above it.
  So the order of the list never matters, and passages with equal teacher scores share a position.
- A pair with equal teacher scores carries no order: the pairwise losses leave it out.

Settings are Python numbers and strings, checked at trace time.
"""

from __future__ import annotations

import difflib
import inspect
import math
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp

from dgr_jax import ranges

Loss = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]

_LOWEST = float(jnp.finfo(jnp.float32).min)

POSITION_WEIGHTS = ("reciprocal", "uniform")
GAINS = ("rank", "exponential")

# What the settings of all losses may be, by name.
SETTINGS = {
    "margin": ranges.at_least(0),
    "margin_gap": ranges.at_least(0),
    "first_weight": ranges.at_least(0),
    "position_weights": ranges.one_of(*POSITION_WEIGHTS),
    "positive_above": ranges.optional(ranges.FINITE),
    "temperature": ranges.above(0),
    "teacher_temperature": ranges.optional(ranges.above(0)),
    "gains": ranges.one_of(*GAINS),
}


def distilled_ranknet(
    student: jax.Array,
    teacher: jax.Array,
    mask: jax.Array,
    *,
    margin: float = 1.0,
    margin_gap: float = 0.5,
    first_weight: float = 3.0,
    position_weights: str = "reciprocal",
) -> jax.Array:
    """Distilled RankNet (DGR, Li et al. 2024): a hinge whose margin grows with the rank distance.

    With the passages counted from 1 in the teacher's order,

        mean over pairs i < j with a positive term of
            v_i * max(0, s_j - s_i + margin + (j - i - 1) * margin_gap)

    and 0 where no term is positive. Passages tied in the teacher share the position 1 + (number of
    passages strictly above), and pairs of them do not count. A strict order gives the published
    loss.

    Args:
      student, teacher, mask: [..., L], see the module.
      margin: margin of neighbours in the teacher's order. 1 suits log-probabilities of docids,
        the published 300 suits multiview scores.
      margin_gap: what every passage in between adds to the margin (published: 100). Both are
        meant for short lists: the ends of a list of 100 get a margin 98 gaps wider.
      first_weight: v_1, the weight of the pairs of the teacher's first passage.
      position_weights: 'reciprocal' (v_i = 1/i for the others, as published) or 'uniform' (every
        v_i = 1, the first too; first_weight is then not used).

    Returns:
      f32 [...].
    """
    _one_of("position_weights", position_weights, POSITION_WEIGHTS)
    student, teacher, mask = _clean(student, teacher, mask)
    position = _position(teacher, mask)
    if position_weights == "uniform":
        weight = jnp.ones_like(student)
    else:
        weight = jnp.where(position == 0, first_weight, 1.0 / (position + 1.0))
    gap = position[..., None, :] - position[..., :, None] - 1.0
    term = weight[..., :, None] * (margin + margin_gap * gap - _differences(student))
    return _mean(term, _ordered(teacher, mask) & (term > 0), axis=(-2, -1))


def ltrgr(
    student: jax.Array,
    teacher: jax.Array,
    mask: jax.Array,
    *,
    margin: float = 1.0,
    margin_gap: float = 0.5,
    positive_above: float | None = None,
) -> jax.Array:
    """LTRGR's two hinges (Li et al. 2023), between positives p and negatives n of the list.

        0.5 * max(0, s(n_top) - s(p_top) + margin)
      + 0.5 * E[max(0, s(n_rand) - s(p_rand) + margin + margin_gap)]

    Which passages are positive: those that the teacher scores strictly above `positive_above`, as
    0 for relevance grades; with None, which needs no scale, those that share the teacher's highest
    score. The rest of the list is negative. 'top' is the passage that the student scores highest.
    The published second term draws one random positive and one random negative; here stands its
    expectation, the mean over all positives x negatives: the same loss on average, no random
    key, less noise. A list without a positive or without a negative gives 0.

    Args:
      student, teacher, mask: [..., L], see the module.
      margin, margin_gap: as in `distilled_ranknet`.
      positive_above: teacher score that a positive must exceed, or None.

    Returns:
      f32 [...].
    """
    student, teacher, mask = _clean(student, teacher, mask)
    if positive_above is None:
        positive = mask & (_position(teacher, mask) == 0)
    else:
        positive = mask & (teacher > positive_above)
    negative = mask & ~positive
    top = _highest(student, negative) - _highest(student, positive) + margin
    usable = jnp.any(positive, -1) & jnp.any(negative, -1)
    top = jnp.where(usable & (top > 0), top, 0.0)
    random = margin + margin_gap - _differences(student)
    random = jnp.where(random > 0, random, 0.0)
    pairs = positive[..., :, None] & negative[..., None, :]
    return 0.5 * top + 0.5 * _mean(random, pairs, axis=(-2, -1))


def ranknet(
    student: jax.Array, teacher: jax.Array, mask: jax.Array, *, temperature: float = 1.0
) -> jax.Array:
    """RankNet (Burges et al. 2005): mean over the teacher's ordered pairs of a logistic loss.

        mean over i above j of   log(1 + exp((s_j - s_i) / temperature))

    Args:
      student, teacher, mask: [..., L], see the module.
      temperature: divides the student's score differences.

    Returns:
      f32 [...].
    """
    _positive("temperature", temperature)
    student, teacher, mask = _clean(student, teacher, mask)
    term = jax.nn.softplus(-_differences(student) / temperature)
    return _mean(term, _ordered(teacher, mask), axis=(-2, -1))


def listnet(
    student: jax.Array,
    teacher: jax.Array,
    mask: jax.Array,
    *,
    temperature: float = 1.0,
    teacher_temperature: float | None = None,
) -> jax.Array:
    """ListNet (Cao et al. 2007): cross entropy of the top-one probabilities.

        - sum over i of softmax(t / teacher_temperature)_i * log softmax(s / temperature)_i

    At its best it equals the entropy of the teacher's distribution, not 0.

    Args:
      student, teacher, mask: [..., L], see the module.
      temperature: divides the student's scores.
      teacher_temperature: divides the teacher's scores; None is `temperature`. Teachers differ in
        scale by orders of magnitude: a spread of 20 is a one-hot target, one of 0.1 a flat one.

    Returns:
      f32 [...].
    """
    teacher_temperature = _temperatures(temperature, teacher_temperature)
    student, teacher, mask = _clean(student, teacher, mask)
    log_p = _log_softmax(teacher / teacher_temperature, mask)
    log_q = _log_softmax(student / temperature, mask)
    return -jnp.sum(_probabilities(log_p, mask) * log_q, -1)


def kl_divergence(
    student: jax.Array,
    teacher: jax.Array,
    mask: jax.Array,
    *,
    temperature: float = 1.0,
    teacher_temperature: float | None = None,
) -> jax.Array:
    """KL(teacher || student) of the softmax distributions over the list (Hinton et al. 2015).

    ListNet minus the entropy of the teacher: the same gradient, and 0 where both agree. The loss
    is not multiplied by temperature ** 2.

    Args:
      student, teacher, mask: [..., L], see the module.
      temperature, teacher_temperature: as in `listnet`.

    Returns:
      f32 [...], never below 0 but for rounding.
    """
    teacher_temperature = _temperatures(temperature, teacher_temperature)
    student, teacher, mask = _clean(student, teacher, mask)
    log_p = _log_softmax(teacher / teacher_temperature, mask)
    log_q = _log_softmax(student / temperature, mask)
    return jnp.sum(_probabilities(log_p, mask) * (log_p - log_q), -1)


def listmle(
    student: jax.Array, teacher: jax.Array, mask: jax.Array, *, temperature: float = 1.0
) -> jax.Array:
    """ListMLE (Xia et al. 2008): -log probability of the teacher's order under Plackett-Luce.

        sum over i of   log(sum over j not above i of exp(s_j / temperature)) - s_i / temperature

    Passages tied in the teacher stand in each other's sums (Breslow's rule for ties), which draws
    their scores together; the loss of a list with ties does not reach 0. It is a sum: it grows with
    the list, to hundreds at 100 passages.

    Args:
      student, teacher, mask: [..., L], see the module.
      temperature: divides the student's scores.

    Returns:
      f32 [...].
    """
    _positive("temperature", temperature)
    student, teacher, mask = _clean(student, teacher, mask)
    student = student / temperature
    left = (
        mask[..., :, None] & mask[..., None, :] & (teacher[..., None, :] <= teacher[..., :, None])
    )
    scores = jnp.where(left, student[..., None, :], _LOWEST)
    term = jax.nn.logsumexp(scores, axis=-1) - student
    return jnp.sum(jnp.where(mask, term, 0.0), -1)


def lambda_loss(
    student: jax.Array,
    teacher: jax.Array,
    mask: jax.Array,
    *,
    gains: str = "rank",
    temperature: float = 1.0,
) -> jax.Array:
    """LambdaLoss (Wang et al. 2018) with LambdaRank's weights: what swapping a pair does to nDCG.

        sum over i above j of   |dnDCG(i, j)| * log2(1 + exp((s_j - s_i) / temperature))
        |dnDCG(i, j)| = (G_i - G_j) / maxDCG * |1 / log2(1 + r_i) - 1 / log2(1 + r_j)|

    r is the student's own rank from 1, of which no gradient is taken. Passages that the student
    ties stand in the worst order for it, the teacher's reversed: a tie still has a gradient.

    Args:
      student, teacher, mask: [..., L], see the module.
      gains: 'rank' (G = number of passages that the teacher puts strictly below; for scores of any
        scale) or 'exponential' (G = 2^t - 1; for relevance grades, those below 0 count as 0).
      temperature: divides the student's score differences.

    Returns:
      f32 [...]; 0 where every gain is 0.
    """
    _one_of("gains", gains, GAINS)
    _positive("temperature", temperature)
    student, teacher, mask = _clean(student, teacher, mask)
    gain = _gains(teacher, mask, gains)
    ideal = jnp.sum(gain / jnp.log2(2.0 + _strict_position(gain, gain, mask)), -1)
    rank = _strict_position(jax.lax.stop_gradient(student), -teacher, mask)
    discount = 1.0 / jnp.log2(2.0 + rank)
    change = jnp.abs(_differences(gain) * _differences(discount))
    weight = change / jnp.where(ideal > 0, ideal, 1.0)[..., None, None]
    term = weight * jax.nn.softplus(-_differences(student) / temperature) / math.log(2.0)
    return jnp.sum(jnp.where(_ordered(teacher, mask), term, 0.0), (-2, -1))


def margin_mse(
    student: jax.Array,
    teacher: jax.Array,
    mask: jax.Array,
    *,
    teacher_temperature: float = 1.0,
) -> jax.Array:
    """Margin-MSE (Hofstaetter et al. 2020) over all pairs of the list.

        mean over pairs {i, j} of   ((s_i - s_j) - (t_i - t_j) / teacher_temperature)^2

    A pair tied in the teacher counts here: its margin to learn is 0.

    Args:
      student, teacher, mask: [..., L], see the module.
      teacher_temperature: divides the teacher's margins, to bring them to the student's scale.

    Returns:
      f32 [...]; 0 with fewer than two passages.
    """
    _positive("teacher_temperature", teacher_temperature)
    student, teacher, mask = _clean(student, teacher, mask)
    term = jnp.square(_differences(student) - _differences(teacher) / teacher_temperature)
    both = mask[..., :, None] & mask[..., None, :] & ~jnp.eye(mask.shape[-1], dtype=bool)
    return _mean(term, both, axis=(-2, -1))


def prefix_loss(
    loss: Loss,
    token_log_probs: jax.Array,
    identifier_tokens: jax.Array,
    teacher: jax.Array,
    mask: jax.Array,
    *,
    prefix_lengths: tuple[int, ...],
    prefix_weights: tuple[float, ...],
) -> jax.Array:
    """The same loss on what beam search sees after t tokens (RIPOR, Zeng et al. 2024).

        sum over t of   alpha_t * loss(score of the first t tokens, teacher, mask_t)

    The score of a prefix is the sum of its tokens' log-probabilities; an identifier shorter than t
    enters with its full score. Passages whose first t tokens are equal have equal scores whatever
    the student does: a pair of them would be a constant penalty that dilutes the pairs that can be
    ordered. So the items ranked at t are the distinct prefixes, each with the score of the best of
    its passages, and mask_t leaves the other passages out (see `distinct_prefixes`). That is what
    a beam needs: the prefix above the best passage has to stay alive.

    Args:
      loss: any loss of this module, settings bound (see `bind`).
      token_log_probs: float [..., L, T]; anything where the token is padding.
      identifier_tokens: int32 [..., L, T], right-padded with 0.
      teacher, mask: [..., L], see the module.
      prefix_lengths: rising, from 1 to T; the last is usually T, the whole identifier.
      prefix_weights: alpha_t, as many as lengths; usually rising to 1.

    Returns:
      f32 [...].
    """
    _check_prefixes(prefix_lengths, prefix_weights, token_log_probs, identifier_tokens)
    real = identifier_tokens != 0
    scores = jnp.cumsum(jnp.where(real, token_log_probs.astype(jnp.float32), 0.0), -1)
    student = jnp.stack([scores[..., t - 1] for t in prefix_lengths])
    kept = jnp.stack(
        [distinct_prefixes(identifier_tokens, teacher, mask, t) for t in prefix_lengths]
    )
    losses = loss(student, jnp.broadcast_to(teacher, student.shape), kept)
    return jnp.tensordot(jnp.asarray(prefix_weights, jnp.float32), losses, axes=1)


def distinct_prefixes(
    identifier_tokens: jax.Array, teacher: jax.Array, mask: jax.Array, length: int
) -> jax.Array:
    """One passage for each distinct prefix: the one that the teacher scores highest.

    With length = T it leaves out passages that share their whole identifier with a better one.

    Args:
      identifier_tokens: int32 [..., L, T].
      teacher: [..., L]; of equal scores the first passage stays.
      mask: bool [..., L].
      length: tokens to compare.

    Returns:
      bool [..., L], a part of mask.
    """
    _, teacher, mask = _clean(teacher, teacher, mask)
    prefix = identifier_tokens[..., :length]
    equal = jnp.all(prefix[..., :, None, :] == prefix[..., None, :, :], -1)
    place = jnp.arange(mask.shape[-1])
    earlier = place[None, :] < place[:, None]
    tied = teacher[..., None, :] == teacher[..., :, None]
    better = (teacher[..., None, :] > teacher[..., :, None]) | (tied & earlier)
    return mask & ~jnp.any(equal & better & mask[..., None, :], -1)


LOSSES: dict[str, Callable[..., jax.Array]] = {
    f.__name__: f
    for f in (
        distilled_ranknet,
        ltrgr,
        ranknet,
        listnet,
        listmle,
        lambda_loss,
        kl_divergence,
        margin_mse,
    )
}


def bind(name: str, **settings: float | str | None) -> Loss:
    """The loss of that name with its settings bound: `bind('ranknet', temperature=2.0)`.

    Raises ValueError for an unknown name or setting, with those there are.
    """
    if name not in LOSSES:
        near = difflib.get_close_matches(name, LOSSES, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"unknown ranking loss {name!r}: expected one of {sorted(LOSSES)}{hint}")
    known = [p for p in inspect.signature(LOSSES[name]).parameters.values()][3:]
    unknown = sorted(settings.keys() - {p.name for p in known})
    if unknown:
        has = ", ".join(p.name for p in known)
        raise ValueError(f"{name} has no setting {unknown[0]!r}: expected some of: {has}")
    return partial(LOSSES[name], **settings)


def _clean(student, teacher, mask):
    """Checked shapes; float32 scores, 0 where masked, so that no garbage meets an operation."""
    if not student.shape == teacher.shape == mask.shape:
        raise ValueError(
            "student, teacher and mask must have one shape [..., L]; got "
            f"{student.shape}, {teacher.shape} and {mask.shape}"
        )
    mask = mask.astype(bool)
    student = jnp.where(mask, student.astype(jnp.float32), 0.0)
    teacher = jnp.where(mask, jax.lax.stop_gradient(teacher).astype(jnp.float32), 0.0)
    return student, teacher, mask


def _differences(x):
    """x_i - x_j at [..., i, j]."""
    return x[..., :, None] - x[..., None, :]


def _ordered(teacher, mask):
    """bool [..., i, j]: both are real and the teacher puts i strictly above j."""
    above = teacher[..., :, None] > teacher[..., None, :]
    return above & mask[..., :, None] & mask[..., None, :]


def _position(teacher, mask):
    """f32 [..., L]: how many passages the teacher puts strictly above each; 0 where masked."""
    return jnp.sum(_ordered(teacher, mask), axis=-2, dtype=jnp.float32)


def _strict_position(score, tie_break, mask):
    """f32 [..., L]: ranks from 0, best first; ties by `tie_break`, then by place in the list."""
    place = jnp.arange(mask.shape[-1])
    keys = (score, tie_break, jnp.broadcast_to(-place, mask.shape))
    above = jnp.zeros((), bool)
    for key in reversed(keys):
        i, j = key[..., :, None], key[..., None, :]
        above = (i > j) | ((i == j) & above)
    both = mask[..., :, None] & mask[..., None, :]
    return jnp.sum(above & both, axis=-2, dtype=jnp.float32)


def _gains(teacher, mask, gains):
    """f32 [..., L], 0 where masked. nDCG does not change with a common factor of all gains, so the
    exponential ones are divided by 2^max: 2^t overflows float32 at t = 128."""
    if gains == "rank":
        return jnp.sum(_ordered(teacher, mask), axis=-1, dtype=jnp.float32)
    grade = jnp.maximum(teacher, 0.0)
    top = jnp.max(grade, -1, keepdims=True)
    return jnp.where(mask, jnp.exp2(grade - top) - jnp.exp2(-top), 0.0)


def _highest(x, chosen):
    """The highest chosen entry; 0 where none is chosen."""
    highest = jnp.max(jnp.where(chosen, x, _LOWEST), -1)
    return jnp.where(jnp.any(chosen, -1), highest, 0.0)


def _mean(term, counted, axis):
    """Mean of the counted terms, 0 if there is none."""
    total = jnp.sum(jnp.where(counted, term, 0.0), axis)
    return total / jnp.maximum(jnp.sum(counted, axis), 1)


def _log_softmax(x, mask):
    """Log-softmax over the real passages; 0 where masked."""
    return jnp.where(mask, jax.nn.log_softmax(jnp.where(mask, x, _LOWEST), -1), 0.0)


def _probabilities(log_p, mask):
    return jnp.where(mask, jnp.exp(log_p), 0.0)


def _temperatures(temperature, teacher_temperature):
    _positive("temperature", temperature)
    if teacher_temperature is None:
        return temperature
    _positive("teacher_temperature", teacher_temperature)
    return teacher_temperature


def _positive(name, value):
    if not value > 0:
        raise ValueError(f"{name} must be above 0; got {value!r}")


def _one_of(name, value, allowed):
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}; got {value!r}")


def _check_prefixes(lengths, weights, token_log_probs, identifier_tokens):
    if token_log_probs.shape != identifier_tokens.shape:
        raise ValueError(
            "token_log_probs and identifier_tokens must have one shape [..., L, T]; got "
            f"{token_log_probs.shape} and {identifier_tokens.shape}"
        )
    if not jnp.issubdtype(identifier_tokens.dtype, jnp.integer):
        raise ValueError(
            "identifier_tokens must be token ids, which tell equal prefixes apart from tied ones; "
            f"got dtype {identifier_tokens.dtype}"
        )
    size = identifier_tokens.shape[-1]
    rising = all(a < b for a, b in zip((0, *lengths), (*lengths, size + 1), strict=True))
    if not lengths or not rising:
        raise ValueError(f"prefix_lengths must rise from 1 to at most T = {size}; got {lengths}")
    if len(weights) != len(lengths):
        raise ValueError(
            f"prefix_weights must be as many as prefix_lengths ({len(lengths)}); got {weights}"
        )
