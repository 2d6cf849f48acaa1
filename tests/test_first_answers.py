"""Questions that nobody trained on, put to the quickstart as a new user would."""

from __future__ import annotations

import pytest

from dgr_jax.corpora.quickstart import QuickstartCollection
from dgr_jax.data.same_text import normalised
from dgr_jax.retrieval.retriever import Retriever

# The question of the README, and ten others: they were written from the passages alone, before any
# of them was answered, and stay as they are whatever the answers.
QUESTIONS = {
    "Why do bees dance?": "bees-04",
    "Can a volcano cause a mudslide?": "volcanoes-04",
    "Do I have to throw away some of my sourdough starter?": "bread-08",
    "Are blue whales bigger than any other animal?": "whales-04",
    "Why do some leaves go red instead of yellow?": "trees-04",
    "Why don't owls break their necks when they look behind them?": "owls-04",
    "Who made the first vaccine?": "vaccines-08",
    "How do the blue lines get into Stilton cheese?": "cheese-08",
    "Is it bad to leave my phone plugged in all night?": "batteries-08",
    "Can you freeze in the desert after dark?": "deserts-04",
    "Why do floods knock bridges down?": "bridges-08",
}


RIGHT = 7  # of these, the first among them; BM25 alone answers 4, the student without the plan 7


def test_the_questions_are_none_of_the_collection():
    collection = QuickstartCollection()
    asked = {normalised(q.text) for split in ("train", "test") for q in collection.queries(split)}
    assert len(asked) > 1000 and not asked & {*map(normalised, QUESTIONS)}
    assert {*QUESTIONS.values()} <= {passage.pid for passage in collection.passages()}


@pytest.mark.slow
def test_the_first_answers_of_the_quickstart(command, tmp_path):
    """The quickstart as a user trains it, without the control. Wrong are those on mudslides, the
    first vaccine and cold deserts, whose passages say it in other words; of some seeds also the
    one on owls."""
    flags = ("--gin_file=quickstart.gin", "--gin.Experiment.control=False")
    command("dgr_jax.train", *flags, f"--model_dir={tmp_path}", env={"XLA_FLAGS": ""})
    hits = Retriever.load(tmp_path).search(list(QUESTIONS), k=1)
    first = [passages[0].pid for passages in hits]
    right = [found == pid for found, pid in zip(first, QUESTIONS.values(), strict=True)]
    assert right[0] and sum(right) >= RIGHT, dict(zip(QUESTIONS, first, strict=True))
