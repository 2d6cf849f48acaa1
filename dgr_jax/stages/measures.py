"""What evaluation is asked to measure, looked at before anything starts."""

from __future__ import annotations

from typing import Any

from dgr_jax import evaluation


def check_measures(experiment: Any) -> None:
    """Raises ValueError for measures that evaluation does not know, and for a measure of answers
    that the collection's queries lack, where the collection is at hand; what was prepared of it is
    checked when it is measured."""
    settings = experiment.evaluate
    evaluation.check(settings.measures, min_relevance=settings.min_relevance)
    collection, splits = experiment.collection, experiment.prepare.test_splits
    measures = settings.measures
    of_answers = any(evaluation.answer_cutoff(name) is not None for name in measures)
    if of_answers and all(collection.inputs(splits).values()):
        for split in splits:
            evaluation.require_answers(measures, collection.queries(split), split)
