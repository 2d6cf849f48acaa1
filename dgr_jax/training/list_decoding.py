"""The identifiers of rank lists, and of generation examples, through a model: a query is encoded
once, all of its identifiers are decoded in one pass; and the table of a plan where one is trained.

Axis letters: B queries, G generation examples, L passages of a list, K identifiers of a passage, T
tokens of one, R rows that the decoder reads, W tokens of a packed row, Q tokens of a query, V
vocabulary.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from dgr_jax.losses import generation
from dgr_jax.models.query_rows import QueryRows
from dgr_jax.special_tokens import PAD_ID
from dgr_jax.training.plan_losses import PlanLoss

Lists = Mapping[str, Any]


def shift_right(tokens: jax.Array) -> jax.Array:
    """Decoder inputs of targets [..., T]: the start token (0, as pad), then all but the last."""
    return jnp.pad(tokens[..., :-1], [(0, 0)] * (tokens.ndim - 1) + [(1, 0)])


def pad_to(tokens: jax.Array, length: int) -> jax.Array:
    """Tokens [..., T] with padding up to a length."""
    return jnp.pad(tokens, [(0, 0)] * (tokens.ndim - 1) + [(0, length - tokens.shape[-1])])


def packed_queries(batch: Mapping[str, Any]) -> dict[str, Any]:
    """What `encode` is told of queries that lie side by side; nothing, where they do not."""
    rows = QueryRows.of(batch)
    return {} if rows is None else {"rows": rows}


def decoded_examples(
    model: Any, params: Any, batch: Mapping[str, Any], rng: jax.Array, plan: PlanLoss | None
) -> tuple[jax.Array, Any]:
    """Logits [G, T, V] of generation targets, and the table of the plan; None: there is none."""
    queries, inputs = batch["encoder_input_tokens"], batch["decoder_input_tokens"]
    apply, rows = functools.partial(model.apply, {"params": params}), packed_queries(batch)
    if plan is None:
        logits = apply(queries, inputs, deterministic=False, rngs={"dropout": rng}, **rows)
        return logits, None
    encode_rng, decode_rng = jax.random.split(rng)
    dropout = {"deterministic": False, "rngs": {"dropout": encode_rng}}
    encoded = apply(queries, method="encode", **dropout, **rows)
    table, known = _planned(model, apply, plan, encoded, queries, inputs.shape[-1], decode_rng)
    dropout = {"deterministic": False, "rngs": {"dropout": decode_rng}}
    x = apply(encoded, queries, inputs[:, None], method="decode", **dropout, **known)
    return apply(x[:, 0], method="logits"), table


def _planned(
    model: Any,
    apply: Any,
    plan: PlanLoss | None,
    encoded: jax.Array,
    queries: jax.Array,
    length: int,
    rng: jax.Array,
) -> tuple[Any, dict[str, Any]]:
    """The table of the plan, and what `decode` is told so that a query is read once."""
    if plan is None:
        return None, {}
    dropout = {"deterministic": False, "rngs": {"dropout": jax.random.fold_in(rng, 1)}}
    shape = length, model.config.vocab_size
    table, reading = plan.table(apply, encoded, queries, shape, **dropout)
    return table, {} if reading is None else {"reading": reading}


def decoded_lists(
    model: Any,
    params: Any,
    lists: Lists,
    with_target: bool,
    encode_rng: jax.Array,
    decode_rng: jax.Array,
    plan: PlanLoss | None = None,
) -> tuple[jax.Array, jax.Array | None, Any]:
    """Encodes each query once, or once a view, and decodes its L*K identifiers, and its target if
    asked.

    Returns log-probabilities [B, L, K, T] of the identifiers' tokens, of the target logits
    [B, T', V] or None, and the table of the plan or None.
    """
    rows = _packed_rows(lists) if "packed_tokens" in lists else _rows(lists)
    inputs, length, target_length = rows.inputs, rows.targets.shape[-1], 0
    segments = rows.segments
    if with_target:
        target = lists["decoder_input_tokens"]
        target_length = target.shape[-1]
        inputs = _with_target(inputs, target, lists["encoder_input_tokens"].ndim)
        if segments is not None:  # the row of the target is a single one
            segments = jnp.pad(segments, [(0, 0), (0, 1), (0, inputs.shape[-1] - length)])
    encoded, seen = _encoded_queries(model, params, lists, rows.views, encode_rng)
    apply = functools.partial(model.apply, {"params": params})
    table, known = _planned(model, apply, plan, encoded, seen, inputs.shape[-1], decode_rng)
    if segments is not None:
        known["segments"] = segments
    x = apply(
        *(encoded, seen, inputs),
        deterministic=False,
        method="decode",
        rngs={"dropout": decode_rng},
        **known,
    )
    logits = functools.partial(model.apply, {"params": params}, method="logits")
    # Parts of x and not of the logits, whose gradients would be put together again: they are large.
    own = x[:, :-1, :length] if with_target else x
    log_probs = generation.token_log_probs(logits(own), rows.targets)
    if segments is None:
        log_probs = log_probs.reshape(lists["identifier_tokens"].shape)
    else:
        log_probs = _unpacked(log_probs, lists)
    return log_probs, logits(x[:, -1, :target_length]) if with_target else None, table


def _with_target(inputs: jax.Array, target: jax.Array, query_dims: int) -> jax.Array:
    """Decoder inputs [B, R, T] and those of the target [B, T'], side by side as one row more."""
    if query_dims == 3:
        raise ValueError(
            "Distillation: got rank lists of several views without generation examples; expected "
            'batches {"rank_list": ..., "generation": ...}'
        )
    longest = max(inputs.shape[-1], target.shape[-1])
    rows = [pad_to(inputs, longest), pad_to(target, longest)[:, None, :]]
    return jnp.concatenate(rows, axis=1)


def _encoded_queries(
    model: Any, params: Any, lists: Lists, views: jax.Array | None, rng: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Each query, or each view of it, encoded once, and the tokens that a target may look at."""
    queries = lists["encoder_input_tokens"]
    encoded = model.apply(
        {"params": params},
        queries.reshape(-1, queries.shape[-1]),
        deterministic=False,
        method="encode",
        rngs={"dropout": rng},
        **packed_queries(lists),
    )
    if queries.ndim == 2:
        return encoded, queries
    assert views is not None
    return encoded.reshape(queries.shape[0], -1, encoded.shape[-1]), _of_view(queries, views)


class _Rows(NamedTuple):
    """What the decoder reads of the lists, int32 [B, R, T] each; views of a row, [B, R], or of a
    token; views and segments None where there are none."""

    targets: jax.Array
    inputs: jax.Array
    views: jax.Array | None
    segments: jax.Array | None


def _rows(lists: Lists) -> _Rows:
    """A row for each identifier."""
    tokens, views = lists["identifier_tokens"], lists.get("identifier_views")
    targets = tokens.reshape(tokens.shape[0], -1, tokens.shape[-1])
    of_row = None if views is None else views.reshape(targets.shape[:2])
    return _Rows(targets, shift_right(targets), of_row, None)


def _packed_rows(lists: Lists) -> _Rows:
    """The rows of `training.packing`: an identifier begins where the segment is another one."""
    targets, segments = lists["packed_tokens"], lists["packed_segments"]
    inputs = jnp.where(segments == shift_right(segments), shift_right(targets), PAD_ID)
    views = lists.get("identifier_views")
    if views is None:
        return _Rows(targets, inputs, None, segments)
    identifier = jnp.maximum(segments - 1, 0).reshape(segments.shape[0], -1)
    of_token = jnp.take_along_axis(views.reshape(views.shape[0], -1), identifier, axis=-1)
    return _Rows(targets, inputs, of_token.reshape(segments.shape), segments)


def _unpacked(log_probs: jax.Array, lists: Lists) -> jax.Array:
    """[B, R, W] of packed rows -> those of each identifier's tokens [B, L, K, T], 0 at padding."""
    tokens, starts = lists["identifier_tokens"], lists["packed_starts"]
    flat = log_probs.reshape(log_probs.shape[0], -1)
    places = jnp.minimum(starts[..., None] + jnp.arange(tokens.shape[-1]), flat.shape[-1] - 1)
    unpacked = jnp.take_along_axis(flat, places.reshape(places.shape[0], -1), axis=-1)
    return jnp.where(tokens != PAD_ID, unpacked.reshape(tokens.shape), 0.0)


def _of_view(queries: jax.Array, views: jax.Array) -> jax.Array:
    """What each target, or each token of it, may look at of a query's inputs [B, 3, Q] side by
    side: int32 [B, R, 3*Q] or [B, R, T, 3*Q].

    views: int32 [B, R] or [B, R, T], places of the inputs.
    """
    own = views[..., None] == jnp.arange(queries.shape[1])
    inputs = queries.reshape(queries.shape[0], *(1,) * (views.ndim - 1), *queries.shape[1:])
    shown = jnp.where(own[..., None], inputs, PAD_ID)
    return shown.reshape(*views.shape, -1)
