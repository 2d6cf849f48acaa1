"""The settings by which a student learns passages that were added after its training."""

from __future__ import annotations

from dataclasses import dataclass

from dgr_jax import ranges
from dgr_jax.experiments.common import Training
from dgr_jax.partitioning import Mesh
from dgr_jax.training.refreshing import LevelGeneration


@dataclass(frozen=True)
class Refresh:
    """How `python -m dgr_jax.update --refresh` trains the student in MODEL_DIR on: it learns the
    passages of the index that it has not learned, and keeps those that it has.

    training: its objective is LevelGeneration.
    pseudo_query_path: TSV with a pid and a question of a passage that came later on each line; if
      blank, the sentences of a passage are its questions. Chunks of it are learned beside them as
      `Sources` of the prepare stage says.
    replay: share of each batch that is drawn from what the student has learned before.
    recent: share of the replay that is of passages which the student has learned by being refreshed
      before, where there are any: they are few, and it has seen them seldom.
    docid_rate: the rate of the embeddings of docid codes that passages had in training; those of
      codes that none had, of a reserve, move at the full rate.
    text_rate: the rate of the embeddings of all other tokens; 0 leaves them as they are.
    """

    model_dir: str
    training: Training
    pseudo_query_path: str = ""
    replay: float = 0.5
    recent: float = 0.5
    docid_rate: float = 0.01
    text_rate: float = 0.0
    mesh: Mesh = Mesh()

    def __post_init__(self) -> None:
        rate = ranges.between(0, 1)
        rates = dict.fromkeys(("recent", "docid_rate", "text_rate"), rate)
        ranges.check(self, replay=ranges.from_to_below(0, 1), **rates)
        if not isinstance(self.training.objective, LevelGeneration):
            raise ValueError(
                f"Training.objective: got {type(self.training.objective).__name__}, expected "
                "LevelGeneration, by which a student learns passages that were added"
            )
        self.training.check_batches("Training", "batch_size")
        self.training.check_alone("Training", "where a student is refreshed")
        if self.training.validate_every:
            raise ValueError(
                f"Training.validate_every: got {self.training.validate_every}, expected 0: no "
                "questions are held out when passages that were added are learned"
            )
