"""What constrained beam search loses on a finished experiment, and what it could find at best."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from dgr_jax.experiments.generative import Experiment
from dgr_jax.model_dir.measurements import read_kept, write_kept
from dgr_jax.retrieval import exhaustive, kinds
from dgr_jax.retrieval.exhaustive import Lost
from dgr_jax.retrieval.prefix_ceiling import SPREAD
from dgr_jax.stages.evaluate import chosen_queries, first_test_split
from dgr_jax.stages.prepared import Prepared
from dgr_jax.stages.systems import open_system

logger = logging.getLogger(__name__)

TOP = 10  # passages that are compared


def measured(
    experiment: Experiment,
    folder: Path,
    system: str,
    beams: Sequence[int],
    split: str,
    spread: float,
) -> list[Lost]:
    """`measure`, of which every width is kept beside the run as soon as it is done: what is kept is
    not measured again.

    folder: of the run.
    """
    path = folder / "evaluate" / f"beams-{system}.json"
    asked = {"split": split or first_test_split(experiment), "spread": spread}
    kept: dict[str, Any] = read_kept(path)
    if kept.get("asked") != asked:
        kept = {"asked": asked, "lost": {}}
    missing = [width for width in beams if str(width) not in kept["lost"]]
    if missing:
        logger.info("study: beams of %s, %s", folder.name, system)
    for lost in measure(experiment, system, missing, split, spread) if missing else ():
        kept["lost"][str(lost.num_beams)] = {k: v.tolist() for k, v in lost.values().items()}
        write_kept(path, kept)
        logger.info("study: %d beams of %s, %s: done", lost.num_beams, folder.name, system)
    return [Lost.of(width, kept["lost"][str(width)]) for width in beams]


def measure(
    experiment: Experiment,
    system: str,
    beams: Sequence[int],
    split: str = "",
    spread: float = SPREAD,
) -> Iterator[Lost]:
    """Each width of beam search against all identifiers scored, on the judged queries of a split.

    split: '' is the first test split. Queries are those of the evaluate stage. spread: of the
    ceiling, see `PrefixCeiling`.

    Raises ValueError for an experiment with several identifiers a passage.
    """
    prepared, search = Prepared.load(experiment.model_dir), experiment.evaluate.search
    if not kinds.TRAINED[experiment.kind].scores_all:
        raise ValueError(
            f"Study.beams: got a {experiment.kind} student, whose identifiers cannot all be "
            "scored; expected one identifier a passage (Prepare.identifiers)"
        )
    split = split or first_test_split(experiment)
    judged, least = prepared.qrels(split), experiment.evaluate.min_relevance
    texts, positives = [], []
    for qid, query in chosen_queries(experiment, prepared, split).items():
        graded = judged.get(qid, {}).items()
        if right := [prepared.store.index_of(pid) for pid, grade in graded if grade >= least]:
            texts.append(query.text)
            positives.append(right)
    student: Any = open_system(experiment, system, prepared)
    tokens = student.encode(prepared.vocabulary, texts)
    k = min(TOP, search.depth)
    yield from exhaustive.recall_lost(
        student, tokens, beams, k=k, positives=positives, spread=spread
    )
