"""Losses that teach a student the order of a teacher's rank list.

Every loss has the signature

    f(student [..., L], teacher [..., L], mask bool [..., L], *, settings) -> f32 [...]

with B queries as the usual leading axis and L passages in a list, in any order: each loss reads the
order from the teacher's scores, of which a higher one is better. `pairwise` holds the losses that
compare two passages at a time, `listwise` those of the whole list's distribution. For all of them:

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
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp

from dgr_jax import ranges
from dgr_jax.losses import pairwise, rank_lists
from dgr_jax.losses.listwise import kl_divergence, listmle, listnet
from dgr_jax.losses.pairwise import distilled_ranknet, lambda_loss, ltrgr, margin_mse, ranknet

Loss = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]

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

# The range of every setting of every loss, by the setting's name.
SETTINGS = {
    "margin": ranges.at_least(0),
    "margin_gap": ranges.at_least(0),
    "first_weight": ranges.at_least(0),
    "position_weights": ranges.one_of(*pairwise.POSITION_WEIGHTS),
    "positive_above": ranges.optional(ranges.FINITE),
    "temperature": ranges.above(0),
    "teacher_temperature": ranges.optional(ranges.above(0)),
    "gains": ranges.one_of(*pairwise.GAINS),
}


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
    """A loss on the prefixes that beam search has to rank after t tokens (RIPOR, Zeng et al. 2024).

        sum over t of   alpha_t * loss(score of the first t tokens, teacher, mask_t)

    The score of a prefix is the sum of its tokens' log-probabilities; an identifier shorter than t
    enters with its full score. Passages whose first t tokens are equal have equal scores whatever
    the student does: a pair of them would be a constant penalty that dilutes the pairs that can be
    ordered. So the items ranked at t are the distinct prefixes, each with the score of the best of
    its passages, and mask_t leaves the other passages out (see `distinct_prefixes`). That is what
    a beam needs: the prefix above the best passage has to stay alive.

    Args:
      loss: any loss of this module, with its settings bound (see `bind`).
      token_log_probs: float [..., L, T]; any value where the token is padding.
      identifier_tokens: int32 [..., L, T], right-padded with 0.
      teacher, mask: [..., L], see the module.
      prefix_lengths: rising, from 1 to T; the last is usually T, the whole identifier.
      prefix_weights: alpha_t, one for each length; usually rising to 1.

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
      teacher: [..., L]; of passages with equal scores the first one stays.
      mask: bool [..., L].
      length: how many tokens to compare.

    Returns:
      bool [..., L], a part of mask.
    """
    _, teacher, mask = rank_lists.clean(teacher, teacher, mask)
    prefix = identifier_tokens[..., :length]
    equal = jnp.all(prefix[..., :, None, :] == prefix[..., None, :, :], -1)
    place = jnp.arange(mask.shape[-1])
    earlier = place[None, :] < place[:, None]
    tied = teacher[..., None, :] == teacher[..., :, None]
    better = (teacher[..., None, :] > teacher[..., :, None]) | (tied & earlier)
    return mask & ~jnp.any(equal & better & mask[..., None, :], -1)


def bind(name: str, **settings: float | str | None) -> Loss:
    """The loss of that name with its settings bound: `bind('ranknet', temperature=2.0)`.

    Raises ValueError for an unknown name or setting; the message lists the known ones.
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
