"""Rules for data that would spoil training or measures, as settings of the prepare stage."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from dgr_jax import ranges
from dgr_jax.settings import unless_default

TRAIN_SPLIT, TEST_SPLITS = "train", ("test",)  # the splits where none are named
VALIDATION = "validation"  # the split of questions that are held out to choose checkpoints on

_RULES = {
    "shared_queries": ("keep", "drop"),
    "contradictory_judgements": ("error", "last", "highest"),
    "unknown_judgements": ("error", "drop"),
    "self_hits": ("drop", "keep"),
}


def _rule(name: str) -> Any:
    return unless_default(_RULES[name][0])


@dataclass(frozen=True, kw_only=True)
class DataRules:
    """How to treat data that would spoil results. Such data is counted and reported by any rule.

    shared_queries: the rule for training queries that are also test queries, by their id or their
      text. 'keep' trains on them, as published results do; 'drop' leaves them out of training.
    contradictory_judgements: the rule for a query and passage with several grades. 'error' refuses
      them; otherwise the 'last' or the 'highest' grade counts, in training and in measures. The
      same grade given twice is no contradiction.
    unknown_judgements: the rule for judgements of queries or passages that the collection lacks.
      'error' refuses them; 'drop' leaves them out, which suits a part of a corpus.
    self_hits: the rule for a passage with the id of a query, which is the query itself, as in
      ArguAna and Quora. 'drop' leaves it out of the query's candidates, teachers' lists, negatives,
      runs and measures, as BEIR does, unless it is judged relevant; 'keep' treats it as any other.
    validation: share of the training questions that are held out of training, so that checkpoints
      and weights can be chosen on them (see `Training.validate_every`); 0 holds out none. Questions
      with the same words are held out together; test questions are never held out.
    validation_split: the name of a split of the collection to choose on, in place of `validation`.
      Training questions with the words of one of its questions are left out of training.
    validation_seed: decides which questions are held out; the choice is the same in every
      experiment on the same data.
    """

    shared_queries: str = _rule("shared_queries")
    contradictory_judgements: str = _rule("contradictory_judgements")
    unknown_judgements: str = _rule("unknown_judgements")
    self_hits: str = _rule("self_hits")
    validation: float = unless_default(0.0)
    validation_split: str = unless_default("")
    validation_seed: int = unless_default(0)

    @property
    def held_out(self) -> tuple[str, ...]:
        """The name of the split to choose on, as it is prepared; () where there is none."""
        name = self.validation_split or (VALIDATION if self.validation else "")
        return (name,) if name else ()

    @property
    def rules_of_measures(self) -> tuple[str, ...]:
        """The rules that measures depend on, whatever was learned from."""
        return self.contradictory_judgements, self.unknown_judgements, self.self_hits

    def check_rules(self) -> None:
        """Raises ValueError for an unknown rule, and for wrong settings of held-out questions."""
        for name, known in _RULES.items():
            if (rule := getattr(self, name)) not in known:
                raise ValueError(
                    f"{type(self).__name__}.{name}: got {rule!r}, expected {' or '.join(known)}"
                )
        ranges.check(self, validation=ranges.from_to_below(0, 1), validation_seed=ranges.SEED)
        _check_held_out(self)


def _check_held_out(settings: Any) -> None:
    setting, share = f"{type(settings).__name__}.validation", settings.validation
    if not share:
        return
    if settings.validation_split:
        raise ValueError(
            f"{setting}_split: got {settings.validation_split!r} with {setting}={share}, expected "
            "one of them"
        )
    if not settings.train_splits:
        raise ValueError(
            f"{setting}: got {share} without a split to learn from, expected 0; a split to choose "
            f"on can be named ({setting}_split)"
        )
    if VALIDATION in (*settings.train_splits, *settings.test_splits):
        raise ValueError(
            f"{setting}: got {share} with a split {VALIDATION!r} that is learned from or tested "
            "on, expected 0, as the drawn questions have this name"
        )


def measured_splits(settings: Any) -> tuple[str, ...]:
    """The splits whose questions must not be learned: those to test and to choose on."""
    return (*settings.test_splits, *settings.held_out)


def check_apart(settings: Any) -> None:
    """Raises ValueError where a split of a prepare stage is learned from and measured on, or one
    to choose on is also used otherwise."""
    owner = type(settings).__name__
    name = "train_split" if hasattr(settings, "train_split") else "train_splits"
    learned = getattr(settings, name)
    learned = {learned} if isinstance(learned, str) else set(learned)
    if both := learned & set(settings.test_splits):
        raise ValueError(
            f"{owner}.test_splits: got {min(both)!r}, which is learned from ({owner}.{name}), "
            "expected other splits: a measure would be of judgements that were learned"
        )
    chosen_on = getattr(settings, "validation_split", "")
    for use, splits in (("learned from", learned), ("tested on", settings.test_splits)):
        if chosen_on and chosen_on in splits:
            raise ValueError(
                f"{owner}.validation_split: got {chosen_on!r}, which is {use}, expected another "
                f"split, or a share of the training questions ({owner}.validation)"
            )
