"""Every identifier of a small corpus scored for every query: what beam search approximates.

Axis letters: B queries, Q query length, R identifiers of a block, U identifiers, T identifier
length, V vocabulary, P passages.
"""

from __future__ import annotations

import functools
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import ArrayLike

from dgr_jax import partitioning
from dgr_jax.identifiers.table import IdentifierTable
from dgr_jax.losses import generation
from dgr_jax.models.t5 import T5Config, Transformer
from dgr_jax.retrieval.batching import Found
from dgr_jax.retrieval.prefix_ceiling import SPREAD, PrefixCeiling, prefix_starts

logger = logging.getLogger(__name__)

_LOGITS = 1 << 26  # of a block: 256 MB
_SAY = 10.0  # seconds between two lines that say how far it is


class IdentifierWriter(Protocol):
    """What this needs of a student that writes one identifier a passage: `generative.Decoder`."""

    config: T5Config
    params: Any
    table: IdentifierTable
    search: Any
    mesh: jax.sharding.Mesh
    rules: partitioning.Rules
    allowed: np.ndarray | None
    __dataclass_fields__: ClassVar[dict[str, Any]]

    def passages(self, tokens: np.ndarray) -> Found: ...

    def ranked(self, rows: np.ndarray, log_probs: np.ndarray) -> Found: ...


@functools.lru_cache(maxsize=8)
def score_fn(
    config: T5Config, mesh: jax.sharding.Mesh, rules: partitioning.Rules = partitioning.RULES
) -> Callable[[Any, ArrayLike, ArrayLike], jax.Array]:
    """The compiled scores: (params, identifiers int32 [N, R, T], int32 [B, Q]) -> f32 [B, N*R, T],
    log p(token | those before it, query), 0 at padding.

    A query is encoded once. The N blocks follow one another, so that the logits of one are in
    memory, [B, R, T, V].
    """
    model = Transformer(config)

    def score(params: Any, identifiers: jax.Array, tokens: jax.Array) -> jax.Array:
        apply: Any = functools.partial(model.apply, {"params": params})
        encoded = apply(tokens, method="encode")

        def of_block(rows: jax.Array) -> jax.Array:
            targets = jnp.broadcast_to(rows, (tokens.shape[0], *rows.shape))
            inputs = jnp.pad(targets[..., :-1], ((0, 0), (0, 0), (1, 0)))
            logits = apply(apply(encoded, tokens, inputs, method="decode"), method="logits")
            return jnp.where(targets > 0, generation.token_log_probs(logits, targets), 0.0)

        of_blocks = lax.map(of_block, identifiers)
        return jnp.moveaxis(of_blocks, 0, 1).reshape(tokens.shape[0], -1, identifiers.shape[-1])

    on_shards = partitioning.on_batch_shards(score, mesh, whole=2, rules=rules)
    return jax.jit(on_shards, out_shardings=partitioning.replicated(mesh))


def identifier_log_probs(
    decoder: IdentifierWriter, tokens: np.ndarray, *, block: int | None = None
) -> Iterator[np.ndarray]:
    """log p(identifier | query) of every row of the table, f32 [n <= Search.batch_size, U] of each
    batch of queries; -inf for rows without a passage that the decoder may return.

    As in beam search, over the whole vocabulary or, with Search.renormalise, over the legal tokens.

    tokens: queries int32 [., Q]. block: identifiers scored together, R; None: as many as have 64M
    logits.
    """
    legal = legal_rows(decoder)
    rows = np.asarray(decoder.table.tokens[legal], np.int32)
    size = partitioning.shared_rows(decoder.search.batch_size, decoder.mesh)
    of_shard = size // partitioning.batch_shards(decoder.mesh)
    identifiers = _blocks(rows, block or _block_size(decoder.config, rows.shape[1], of_shard))
    score = score_fn(decoder.config, decoder.mesh, decoder.rules)
    said = time.monotonic()
    for start in range(0, len(tokens), size):
        if time.monotonic() - said > _SAY:
            said = time.monotonic()
            logger.info("every identifier scored for %d of %d queries", start, len(tokens))
        batch = tokens[start : start + size]
        placed = partitioning.place_padded(batch, (size, tokens.shape[1]), decoder.mesh)
        token_log_probs = np.asarray(score(decoder.params, identifiers, placed))[
            : len(batch), : len(rows)
        ]
        if decoder.search.renormalise:
            token_log_probs = renormalised(token_log_probs, rows)
        log_probs = np.full((len(batch), len(decoder.table)), -np.inf, np.float32)
        log_probs[:, legal] = token_log_probs.sum(-1)
        yield log_probs


def legal_rows(decoder: IdentifierWriter) -> np.ndarray:
    """Rows of the table with a passage that may be returned, ascending."""
    table = decoder.table
    if decoder.allowed is None:
        return np.arange(len(table))
    allowed = decoder.allowed[table.passages]
    return np.flatnonzero(np.logical_or.reduceat(allowed, table.offsets[:-1]))


def _block_size(config: T5Config, length: int, queries: int) -> int:
    return max(1, _LOGITS // (queries * length * config.vocab_size))


def _blocks(rows: np.ndarray, size: int) -> np.ndarray:
    """int32 [U, T] -> [N, R, T] with R at most `size`, filled up with padding."""
    count = -(-len(rows) // size)
    size = -(-len(rows) // count)
    filled = np.pad(rows, ((0, count * size - len(rows)), (0, 0)))
    return filled.reshape(count, size, -1)


def renormalised(log_probs: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Token log-probabilities over those tokens that continue a prefix of some row.

    log_probs: f32 [B, U, T], 0 at padding; rows: int [U, T], sorted, no one a prefix of another.
    """
    normalised = log_probs.copy()
    starts = prefix_starts(rows)
    node = np.zeros(len(rows), bool)
    node[0] = True
    for t in range(rows.shape[1]):
        child = np.flatnonzero(starts[:, t])
        first = np.searchsorted(child, np.flatnonzero(node))
        total = np.logaddexp.reduceat(log_probs[:, child, t], first, axis=1)
        normalised[..., t] -= total[:, np.cumsum(node) - 1]
        node = starts[:, t]
    return normalised


def passages(decoder: IdentifierWriter, tokens: np.ndarray, *, block: int | None = None) -> Found:
    """`Decoder.passages`, with every identifier of the table in place of those of a beam: passage
    index int32 and score f32 [n, depth]."""
    parts = []
    for log_probs in identifier_log_probs(decoder, tokens, block=block):
        rows = np.argsort(-log_probs, axis=1, kind="stable")
        scores = np.take_along_axis(log_probs, rows, 1)
        rows = np.where(scores > -np.inf, rows, -1)
        parts.append(decoder.ranked(rows, scores))
    indices, scores = zip(*parts, strict=True)
    return np.concatenate(indices), np.concatenate(scores)


def of_passages(
    log_probs: np.ndarray, table: IdentifierTable, allowed: np.ndarray | None = None
) -> np.ndarray:
    """log p(identifier | query) [n, U] -> log p(passage | query), f64 [n, P]: an identifier is
    shared equally by its passages; over all that are allowed, the chances sum to 1."""
    from scipy.special import logsumexp  # which takes long to import

    shared = np.diff(table.offsets)
    each = np.repeat(log_probs.astype(np.float64) - np.log(shared), shared, axis=1)
    by_passage = np.full((len(log_probs), table.num_passages), -np.inf)
    order = np.argsort(table.passages, kind="stable")
    owners, first = np.unique(table.passages[order], return_index=True)
    by_passage[:, owners] = np.logaddexp.reduceat(each[:, order], first, axis=1)
    if allowed is not None:
        by_passage[:, ~allowed] = -np.inf
    return by_passage - logsumexp(by_passage, axis=1, keepdims=True)


@dataclass(frozen=True)
class Lost:
    """What a beam search loses against exhaustive scoring, f64 [n] of each query.

    passages: share of the best k passages that it does not find among its own best k; first: 1
    where it does not find the best one. With positives: recall, exhaustive_recall: share of them
    among the best k of either; ceiling: that of a student that knows them, see `PrefixCeiling`.
    Empty without.
    """

    num_beams: int
    passages: np.ndarray
    first: np.ndarray
    recall: np.ndarray
    exhaustive_recall: np.ndarray
    ceiling: np.ndarray

    @classmethod
    def of(cls, num_beams: int, values: Mapping[str, Sequence[float]]) -> Lost:
        """Turns what `values` returns back into a Lost."""
        names = (f.name for f in fields(cls)[1:])
        return cls(num_beams, *(np.asarray(values.get(name, ()), np.float64) for name in names))

    def values(self) -> dict[str, np.ndarray]:
        """Name -> value of each query; names without values are left out."""
        named = ((f.name, getattr(self, f.name)) for f in fields(self)[1:])
        return {name: values for name, values in named if len(values)}


def recall_lost(
    decoder: IdentifierWriter,
    tokens: np.ndarray,
    widths: Sequence[int],
    *,
    k: int = 10,
    positives: Sequence[Sequence[int]] = (),
    spread: float = SPREAD,
) -> Iterator[Lost]:
    """What beam search of each width loses, against the same student without a search; one width
    after another.

    tokens: queries int32 [n, Q]; positives: passage indices of each query, one or more; spread: of
    `PrefixCeiling`.

    Raises ValueError for no queries, a k above Search.depth, a query without positives, and
    positives of another number of queries.
    """
    _check(decoder, tokens, k, positives)

    def losses() -> Iterator[Lost]:
        exact = passages(decoder, tokens)[0][:, :k]
        ceilings = _ceilings(decoder, positives, widths, k, spread)
        for width, ceiling in zip(widths, ceilings, strict=True):
            narrow = replace(decoder, search=replace(decoder.search, num_beams=width))
            retrieved = narrow.passages(tokens)[0][:, :k]
            yield lost(width, exact, retrieved, positives, ceiling)

    return losses()


def lost(
    num_beams: int,
    exact: np.ndarray,
    retrieved: np.ndarray,
    positives: Sequence[Sequence[int]] = (),
    ceiling: np.ndarray | None = None,
) -> Lost:
    """What the passages `retrieved` lack of the `exact` ones; int [n, k], -1 in free places."""
    there = exact >= 0
    missed = there & ~(exact[:, :, None] == retrieved[:, None, :]).any(-1)
    return Lost(
        num_beams,
        missed.sum(1) / np.maximum(there.sum(1), 1),
        missed[:, 0].astype(float),
        _recall(retrieved, positives),
        _recall(exact, positives),
        np.zeros(0) if ceiling is None else ceiling,
    )


def _ceilings(
    decoder: IdentifierWriter,
    positives: Sequence[Sequence[int]],
    widths: Sequence[int],
    k: int,
    spread: float,
) -> np.ndarray:
    """`PrefixCeiling` among the passages that may be returned, f64 [widths, n]; the other positives
    are not found."""
    if not len(positives):
        return np.zeros((len(widths), 0))
    rows = decoder.table.rows_of_passages()
    there = rows >= 0 if decoder.allowed is None else (rows >= 0) & decoder.allowed
    at_best = PrefixCeiling(decoder.table.tokens[rows[there]])
    row_of = there.cumsum() - 1

    def of(right: Sequence[int], width: int) -> float:
        asked = np.unique(right)
        left = row_of[asked[there[asked]]]
        share = at_best(left, width, k, spread) if len(left) else 0.0
        return share * len(left) / len(asked)

    return np.array([[of(right, width) for right in positives] for width in widths])


def _check(decoder: IdentifierWriter, tokens: np.ndarray, k: int, positives: Any) -> None:
    if not len(tokens):
        raise ValueError("recall_lost: got no queries, expected one or more")
    if not 1 <= k <= decoder.search.depth:
        raise ValueError(f"recall_lost: got k={k}, expected 1 to {decoder.search.depth}, the depth")
    if len(positives) and [len(tokens), True] != [len(positives), all(map(len, positives))]:
        raise ValueError(
            f"recall_lost: got positives of {sum(map(bool, map(len, positives)))} queries, "
            f"expected one or more of each of the {len(tokens)}"
        )


def _recall(retrieved: np.ndarray, positives: Sequence[Sequence[int]]) -> np.ndarray:
    """f64 [n], or [0] without positives."""
    asked = zip(positives, retrieved, strict=True) if len(positives) else ()
    return np.array([np.isin(right, row).mean() for right, row in asked])
