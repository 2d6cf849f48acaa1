"""The settings of the experiment that writes pseudo-queries."""

from __future__ import annotations

from dataclasses import dataclass

from dgr_jax import ranges
from dgr_jax.corpora.types import Collection
from dgr_jax.data.rules import TEST_SPLITS, TRAIN_SPLIT, check_apart
from dgr_jax.data.vocabulary import SentencePiece
from dgr_jax.experiments.common import Training
from dgr_jax.experiments.stage import Stage, listed
from dgr_jax.models.t5 import T5Config
from dgr_jax.partitioning import Mesh
from dgr_jax.retrieval.sampling import Sampling


@dataclass(frozen=True)
class Pairs:
    """Collection -> vocabulary, and token arrays of passages with the queries that they answer.

    train_split: its positives, of a relevance of min_relevance or more, are the pairs.
    test_splits: splits whose queries no pseudo-query may copy; they need no judgements.
    passage_length: tokens of a passage, its title first, EOS counted; longer ones are cut.
    query_length: tokens of a query, EOS counted.
    """

    vocabulary: SentencePiece = SentencePiece()
    train_split: str = TRAIN_SPLIT
    test_splits: tuple[str, ...] = TEST_SPLITS
    min_relevance: int = 1
    passage_length: int = 192
    query_length: int = 32

    def __post_init__(self) -> None:
        length = ranges.at_least(2, ", EOS counted")
        ranges.check(
            self, min_relevance=ranges.at_least(1), passage_length=length, query_length=length
        )

    @property
    def splits(self) -> tuple[str, ...]:
        """All splits that are read."""
        return (self.train_split, *self.test_splits)


@dataclass(frozen=True)
class PseudoQueries:
    """A T5 learns to write the queries of a passage, and writes some of every passage: everything
    that `python -m dgr_jax.pseudo_queries` does, in MODEL_DIR (Nogueira et al. 2019)."""

    model_dir: str
    collection: Collection
    prepare: Pairs
    model: T5Config
    generate: Training
    sample: Sampling
    mesh: Mesh = Mesh()

    def __post_init__(self) -> None:
        check_apart(self.prepare)
        self.generate.check_batches("Training", "batch_size")
        self.generate.check_alone("Training", "where pseudo-queries are learned")
        if self.generate.validate_every:
            raise ValueError(
                f"Training.validate_every: got {self.generate.validate_every}, expected 0: what "
                "writes pseudo-queries finds no passages"
            )
        if self.model.prefix_adaptive_layers:
            raise ValueError(
                f"T5Config.prefix_adaptive_layers: got {self.model.prefix_adaptive_layers}, "
                "expected 0: queries are text, whose tokens mean the same at every position"
            )

    @property
    def stages(self) -> dict[str, Stage]:
        """All stages, in the order that they run in."""
        return listed(*(f"pseudo_queries:{name}" for name in ("PREPARE", "GENERATE", "SAMPLE")))
