"""What a new version of an index is made of."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from dgr_jax.corpora.store import PassageStore
from dgr_jax.corpora.types import Passage
from dgr_jax.data.vocabulary import Vocabulary
from dgr_jax.identifiers.atomic import Atomic
from dgr_jax.identifiers.kept_models import KEPT
from dgr_jax.identifiers.multiview import Multiview
from dgr_jax.identifiers.rq import ResidualQuantization
from dgr_jax.identifiers.scheme import Scheme
from dgr_jax.identifiers.semantic import KMeansTree
from dgr_jax.identifiers.string import NaiveString
from dgr_jax.identifiers.title import Title
from dgr_jax.model_dir import records
from dgr_jax.model_dir.records import read_record
from dgr_jax.retrieval import kinds
from dgr_jax.retrieval.living.incdsi import IncDSI
from dgr_jax.settings import from_described

# Subclasses of Scheme, once they are imported, by whose names the prepare stage records them.
SCHEMES = (Atomic, KMeansTree, Multiview, NaiveString, ResidualQuantization, Title)


@dataclass(frozen=True)
class Change:
    """A version and the one that comes after it.

    prepared: folder of the prepare stage; old: of the version, which may be the same; new: of the
    one to come. store: the passages of the old one; stay: those that stay, bool [P]; added: those
    that come after them. renew: whether what is else kept as it was, to be fast, is made anew.
    incdsi: how rows of atomic identifiers are found.
    """

    model_dir: Path
    prepared: Path
    old: Path
    new: Path
    store: PassageStore
    stay: np.ndarray
    added: Sequence[Passage]
    renew: bool = False
    incdsi: IncDSI = IncDSI()

    @property
    def num_passages(self) -> int:
        """Passages of the new version."""
        return self.num_staying + len(self.added)

    @property
    def num_staying(self) -> int:
        """Passages of the old version that stay: the first ones of the new version."""
        return int(np.count_nonzero(self.stay))

    @cached_property
    def vocabulary(self) -> Vocabulary:
        """That of the students."""
        return Vocabulary.load(self.prepared)

    @cached_property
    def settings(self) -> Mapping[str, Any]:
        """Those of the prepare stage, as it has recorded them."""
        return read_record(self.prepared).get("settings", {}).get("prepare", {})

    @cached_property
    def scheme(self) -> Scheme:
        """How passages get identifiers."""
        return scheme_of(self.settings, self.prepared)

    @property
    def kept(self) -> Path:
        """What the scheme has left to give identifiers to passages that come later."""
        return self.prepared / KEPT

    def students(self, kind: str) -> Iterator[Path]:
        """Folders of the systems of a kind that were trained on the prepare stage."""
        for name in kinds.best_first(self.model_dir):
            with contextlib.suppress(FileNotFoundError, ValueError):
                answering = records.answering(self.model_dir, (name,))
                if answering.prepared == self.prepared:
                    if kinds.read_student(answering.student).kind == kind:
                        yield answering.student


def scheme_of(settings: Mapping[str, Any], prepared: Path) -> Scheme:
    """How passages get identifiers, by the recorded settings of a prepare stage, whose folder is
    named in errors."""
    schemes: Any = Scheme  # abstract: those that it names are not
    return from_described(schemes, settings.get("identifiers"), str(prepared))
