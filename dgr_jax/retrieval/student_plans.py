"""Plans that a student makes itself: scores of all passages from one pass, before it writes.

Axis letters: B queries, P passages, T identifier length, V vocabulary, M members of a passage.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import jax
import numpy as np

from dgr_jax import ranges
from dgr_jax.data.vocabulary import Vocabulary
from dgr_jax.models import query_tables
from dgr_jax.models.t5 import Reading, T5Config
from dgr_jax.retrieval import set_identifiers
from dgr_jax.retrieval.plan_sizes import PlanSizes
from dgr_jax.retrieval.simultaneous import PLANNED, check_plan, of_corpus
from dgr_jax.retrieval.system import Opening
from dgr_jax.settings import unless_default

_LENGTH = 8  # tokens of an identifier of millions of passages
_SUM = 4e-9  # seconds of one core to read a place of a table and add it

Ranking = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]


@dataclass(frozen=True)
class StudentPlan:
    """What the plans of a student have in common.

    planned: passages that are planned for each query. None: 100, or all of a smaller corpus.
    ranked_by, num_beams: as of Lexical.
    weight: of the log-probability, which is added to the plan score. None: as of Lexical.
    loss_weight: of what trains the plan, beside the losses of the identifiers, in every stage that
      trains the student.
    loss: of the plan's scores of rank lists, such as @margin_mse(); None: that of the distillation.
    """

    planned: int | None = None
    ranked_by: str = "beams"
    num_beams: int = 10
    weight: float | None = 1.0
    loss_weight: float = 1.0
    loss: Ranking | None = None

    searched: ClassVar[tuple[str, ...]] = ("planned", "ranked_by", "num_beams", "weight")
    of_any_student: ClassVar[bool] = False
    kept_bytes: ClassVar[int] = 0  # of a member on disk

    def __post_init__(self) -> None:
        check_plan(self)
        ranges.check(self, loss_weight=ranges.at_least(0))

    @property
    def members_of_a_passage(self) -> int:
        """At most; of identifiers, whose length is not known here, that of long ones."""
        return _LENGTH

    @property
    def most(self) -> int:
        """See Plan."""
        return PLANNED if self.planned is None else self.planned

    def of_corpus(self, num_passages: int) -> Self:
        """See Plan."""
        return of_corpus(self, num_passages)

    def sizes(self, passages: int, words: float, sample: Sequence[str] = ()) -> PlanSizes:
        """See Plan. The index lies on the devices; the time is that of the sums alone."""
        places = passages * self.members_of_a_passage
        kept = self.kept_bytes * places
        return PlanSizes(kept, 4.0 * places, min(self.most, passages), _SUM * places)

    def once_trained(self) -> Self:
        """The settings without those of training alone, which are not kept with a system."""
        return replace(self, loss_weight=1.0, loss=None)

    def table(
        self, apply: Any, config: T5Config, encoded: jax.Array, tokens: jax.Array, length: int
    ) -> tuple[jax.Array, Reading | None]:
        """The table of each query, see `models.query_tables`, and what the decoder has read."""
        raise NotImplementedError

    def members(self, identifiers: np.ndarray, config: T5Config, opening: Opening) -> np.ndarray:
        """[P, M]: the members of every passage. identifiers: of the passages, int32 [P, T].

        Raises ValueError for a student that cannot make this plan.
        """
        raise NotImplementedError


@dataclass(frozen=True)
class Learned(StudentPlan):
    """Passages are sets of pieces, and the decoder reads the query before it writes: what it makes
    of every token of the query says how much each piece of the vocabulary counts (PAG, Zeng et al.
    2024). The student needs no parameters of its own for it, and goes on from there to write.

    set_size: pieces of a passage at most, see `set_identifiers`.
    query_tokens: tokens of the query that are read. None: as many as the encoder reads.
    flops: of what keeps the weights of a query few while it is trained, see
      `training.plan_losses.SetLoss`; .01 in PAG.
    weight: the default is what 144 held-out training questions of the embedded collection chose of
      .05 to 1.5.
    """

    weight: float | None = 1.5
    set_size: int = 64
    query_tokens: int | None = None
    flops: float = unless_default(0.0)

    kept_bytes = 2

    @property
    def members_of_a_passage(self) -> int:
        """See StudentPlan."""
        return self.set_size

    def once_trained(self) -> Self:
        """See Plan."""
        return replace(super().once_trained(), flops=0.0)

    def __post_init__(self) -> None:
        super().__post_init__()
        ranges.check(
            self,
            set_size=ranges.at_least(1),
            query_tokens=ranges.optional(ranges.at_least(1)),
            flops=ranges.at_least(0),
        )

    def table(
        self, apply: Any, config: T5Config, encoded: jax.Array, tokens: jax.Array, length: int
    ) -> tuple[jax.Array, Reading]:
        """See StudentPlan."""
        return query_tables.token_table(apply, encoded, tokens)

    def members(self, identifiers: np.ndarray, config: T5Config, opening: Opening) -> np.ndarray:
        """See StudentPlan."""
        if not config.decoder_query_tokens:
            raise ValueError(
                "Experiment.plan: got Learned with a student whose decoder reads no query "
                "(T5Config.decoder_query_tokens is 0), expected one that was trained with this plan"
            )
        return set_identifiers.opened(
            opening.store,
            Vocabulary.load(opening.prepared),
            self.set_size,
            opening.prepared / "plans",
            keep=opening.keep,
        )


@dataclass(frozen=True)
class OnePass(StudentPlan):
    """All codes of the identifiers from one pass of the decoder over their positions: the score of
    a passage is the sum of log p of each of its codes, whatever the codes before it."""

    def table(
        self, apply: Any, config: T5Config, encoded: jax.Array, tokens: jax.Array, length: int
    ) -> tuple[jax.Array, None]:
        """See StudentPlan."""
        return query_tables.code_table(apply, encoded, tokens, length, config.vocab_size), None

    def members(self, identifiers: np.ndarray, config: T5Config, opening: Opening) -> np.ndarray:
        """See StudentPlan."""
        return np.asarray(query_tables.code_members(identifiers, config.vocab_size))
