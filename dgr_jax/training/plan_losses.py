"""What trains the plan of a student, together with its identifiers; see `retrieval.student_plans`.

Both read the scores of passages from a table of the query (`models.query_tables`) and offer

    table(apply, encoded, tokens, shape, **dropout) -> (table f32 [B, ...], Reading or None)
    of_examples(table, batch) -> f32 [G]: the loss of the passage of each generation example
    of_lists(table, lists) -> f32 [B, L]: scores of the passages of rank lists

Axis letters: B queries, G generation examples, L rank list, T identifier length, M members of a
passage, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from dgr_jax import ranges
from dgr_jax.identifiers.table import IdentifierTable
from dgr_jax.losses import contrastive
from dgr_jax.models import activations, query_tables
from dgr_jax.models.t5 import Reading
from dgr_jax.settings import unless_default
from dgr_jax.training.source import Source

Batch = Mapping[str, Any]
Ranking = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]
Shape = tuple[int, int]

MEMBERS, LIST_MEMBERS = "plan_members", "list_members"  # features of a batch


class PlanLoss(Protocol):
    """weight: of the losses of the plan; loss: of rank lists, None: that of the identifiers;
    members: how many each passage of a batch brings along, 0: none."""

    @property
    def weight(self) -> float: ...
    @property
    def loss(self) -> Ranking | None: ...
    @property
    def members(self) -> int: ...

    def table(
        self, apply: Any, encoded: jax.Array, tokens: jax.Array, shape: Shape, **dropout: Any
    ) -> tuple[jax.Array, Reading | None]:
        """apply: of a Transformer with its parameters bound; encoded [B, Q, D], tokens int32
        [B, Q], shape: T and V; dropout: arguments of a pass that is trained."""
        ...

    def of_examples(self, table: jax.Array, batch: Batch) -> jax.Array: ...

    def of_lists(self, table: jax.Array, lists: Batch) -> jax.Array: ...


@dataclass(frozen=True)
class SetLoss:
    """Sets of tokens: S(q, d) = sum of w_q[v] over the tokens v of the set of d.

    An example's loss is the cross entropy of its passage among those of its batch, or microbatch.
    Passages with one set are no negatives of each other.

    flops: of the sum over the vocabulary of (mean of w_q[v] over the queries)^2, which is added, so
      that a query gives weight to few tokens (Formal et al. 2021).
    """

    members: int
    weight: float = 1.0
    loss: Ranking | None = None
    flops: float = unless_default(0.0)

    def __post_init__(self) -> None:
        at_least_0 = dict.fromkeys(("weight", "flops"), ranges.at_least(0))
        ranges.check(self, members=ranges.at_least(1), **at_least_0)

    def table(
        self, apply: Any, encoded: jax.Array, tokens: jax.Array, shape: Shape, **dropout: Any
    ) -> tuple[jax.Array, Reading]:
        """See PlanLoss: the weights of all tokens [B, V]."""
        return query_tables.token_table(apply, encoded, tokens, **dropout)

    def of_examples(self, table: jax.Array, batch: Batch) -> jax.Array:
        """See PlanLoss. The sets of all examples are compared with every query, as a product of
        matrices: the gradient of gathers would be slower."""
        members = activations.cut(batch[MEMBERS], (None, None))
        there = (members > 0).any(-1)
        row = jnp.arange(len(members))[:, None]
        sets = jnp.zeros((len(members), table.shape[1])).at[row, members].set(1.0)
        scores = table @ sets.at[:, 0].set(0.0).T
        same = (members[:, None] == members[None]).all(-1)
        own = jnp.eye(len(members), dtype=bool)
        mask = there & there[:, None] & (own | ~same)
        losses = contrastive.single_lh(scores, own & mask, mask)
        return losses + self.flops * jnp.sum(table.mean(0) ** 2) if self.flops else losses

    def of_lists(self, table: jax.Array, lists: Batch) -> jax.Array:
        """See PlanLoss."""
        return query_tables.sums(table, lists[LIST_MEMBERS])


@dataclass(frozen=True)
class CodeLoss:
    """All codes from one pass: S(q, d) = sum of log p_t(c_t(d) | q) over the positions t.

    An example's loss is the mean of -log p over the tokens of its identifier.
    """

    weight: float = 1.0
    loss: Ranking | None = None

    members = 0

    def __post_init__(self) -> None:
        ranges.check(self, weight=ranges.at_least(0))

    def table(
        self, apply: Any, encoded: jax.Array, tokens: jax.Array, shape: Shape, **dropout: Any
    ) -> tuple[jax.Array, None]:
        """See PlanLoss: the log-probabilities of all codes [B, T, V]."""
        return query_tables.code_table(apply, encoded, tokens, *shape, **dropout), None

    def of_examples(self, table: jax.Array, batch: Batch) -> jax.Array:
        """See PlanLoss."""
        targets = batch["decoder_target_tokens"]
        members = query_tables.code_members(targets, table.shape[-1])
        scores = query_tables.sums(table, members[:, None])[:, 0]
        return -scores / jnp.maximum((targets > 0).sum(-1), 1)

    def of_lists(self, table: jax.Array, lists: Batch) -> jax.Array:
        """See PlanLoss."""
        identifiers = lists["identifier_tokens"][:, :, 0]
        members = query_tables.code_members(identifiers, table.shape[-1])
        return query_tables.sums(table, members)


@dataclass(frozen=True)
class WithSets:
    """A source whose batches bring along the sets of their passages, found by their identifiers; of
    passages with one identifier, that of the first.

    sets: [P, M] of all passages; 0: none. A batch may be one of several by name.
    """

    source: Source
    table: IdentifierTable
    sets: np.ndarray

    def batch(self, step: int, process_index: int = 0, process_count: int = 1) -> dict[str, Any]:
        """See Source."""
        batch = self.source.batch(step, process_index, process_count)
        more = {}
        if "decoder_target_tokens" in batch:
            more[MEMBERS] = self._of(batch["decoder_target_tokens"])
        if "identifier_tokens" in batch:
            more[LIST_MEMBERS] = self._of(batch["identifier_tokens"][:, :, 0])
        return batch | more

    def _of(self, identifiers: np.ndarray) -> np.ndarray:
        """Identifiers int32 [..., T] -> sets int32 [..., M]; 0 where there is no identifier."""
        rows = self.table.lookup(identifiers)
        passages = self.table.passages[self.table.offsets[np.maximum(rows, 0)]]
        return np.where(rows[..., None] >= 0, self.sets[passages], 0).astype(np.int32)
