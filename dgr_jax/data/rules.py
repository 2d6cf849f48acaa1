"""Rules for data that would spoil training or measures, as settings of the prepare stage."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

TRAIN_SPLIT, TEST_SPLITS = "train", ("test",)  # where none are named

_RULES = {
    "shared_queries": ("keep", "drop"),
    "contradictory_judgements": ("error", "last", "highest"),
    "unknown_judgements": ("error", "drop"),
    "self_hits": ("drop", "keep"),
}


def _rule(name: str) -> Any:
    """A setting that came later than finished stages: these stay, as by its default."""
    return field(default=_RULES[name][0], metadata={"fingerprint": "unless default"})


@dataclass(frozen=True, kw_only=True)
class DataRules:
    """What becomes of such data. It is counted, and said, whatever the rule.

    shared_queries: queries that are learned from and tested on, by their id or by their text:
      'keep' trains on them, as published results do; 'drop' leaves them out of training.
    contradictory_judgements: a pair of query and passage with several grades: 'error' refuses it;
      the 'last' or the 'highest' counts, in training and in measures. The same grade again is
      left out.
    unknown_judgements: of queries or passages that the collection lacks: 'error' refuses them,
      'drop' leaves them out, as for a part of a corpus.
    self_hits: a passage with the id of a query is the query itself, as in ArguAna and Quora: 'drop'
      leaves it out of what the query finds, in candidates, teachers' lists, negatives, runs and
      measures, as BEIR does, unless it is judged relevant; 'keep' takes it as any other.
    """

    shared_queries: str = _rule("shared_queries")
    contradictory_judgements: str = _rule("contradictory_judgements")
    unknown_judgements: str = _rule("unknown_judgements")
    self_hits: str = _rule("self_hits")

    @property
    def rules_of_measures(self) -> tuple[str, ...]:
        """Those that measures depend on, whatever was learned from."""
        return self.contradictory_judgements, self.unknown_judgements, self.self_hits

    def check_rules(self) -> None:
        """Raises ValueError for a rule that there is not."""
        for name, known in _RULES.items():
            if (rule := getattr(self, name)) not in known:
                raise ValueError(
                    f"{type(self).__name__}.{name}: got {rule!r}, expected {' or '.join(known)}"
                )


def check_apart(settings: Any) -> None:
    """Raises ValueError where a split of a prepare stage is learned from and measured on."""
    owner = type(settings).__name__
    name = "train_split" if hasattr(settings, "train_split") else "train_splits"
    learned = getattr(settings, name)
    learned = {learned} if isinstance(learned, str) else set(learned)
    if both := learned & set(settings.test_splits):
        raise ValueError(
            f"{owner}.test_splits: got {min(both)!r}, which is learned from ({owner}.{name}), "
            "expected other splits: a measure would be of judgements that were learned"
        )
