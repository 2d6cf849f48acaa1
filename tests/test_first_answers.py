"""Questions that nobody trained on, put to the quickstart as a new user would."""

from __future__ import annotations

from dgr_jax.corpora.quickstart import QuickstartCollection
from dgr_jax.data.same_text import normalised

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


def test_the_questions_are_none_of_the_collection():
    collection = QuickstartCollection()
    asked = {normalised(q.text) for split in ("train", "test") for q in collection.queries(split)}
    assert len(asked) > 1000 and not asked & {*map(normalised, QUESTIONS)}
    assert {*QUESTIONS.values()} <= {passage.pid for passage in collection.passages()}
