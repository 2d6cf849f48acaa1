"""What a retriever is opened from: systems of a MODEL_DIR, and a version of their index."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dgr_jax.model_dir import records
from dgr_jax.model_dir.index_versions import Versions
from dgr_jax.retrieval import kinds

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Sources:
    """What a system is opened from: trained ones by name, each with the prepare stage that it was
    trained on (in the place of one stands the student that has learned later passages, where there
    is any); said: of a system that no stage trains, what `kinds.untrained` says of it; answering:
    the trained ones or, where it is made of passages alone, the evaluation; version: of the
    index."""

    name: str
    model_dir: Path
    trained: Mapping[str, records.Answering]
    prepared: Path
    said: Mapping[str, Any]
    answering: tuple[records.Answering, ...]
    version: int

    @classmethod
    def of(cls, model_dir: Path, system: str | None) -> Sources:
        """The sources of a system, or of the best one."""
        untrained, names = kinds.untrained(model_dir), kinds.best_first(model_dir)
        if system is not None and system in untrained:
            return cls._made_of(model_dir, system, untrained[system])
        if system not in (None, *names):
            raise ValueError(
                f"system: got {system!r}, expected one of {', '.join([*names, *untrained])}, those "
                f"of {model_dir}"
            )
        for name, said in untrained.items() if system is None else ():
            with contextlib.suppress(FileNotFoundError, ValueError):  # a lesser one answers
                if kinds.settings_of(said).preferred:
                    return cls._made_of(model_dir, name, said)
        answering = records.answering(model_dir, names if system is None else (system,))
        name = answering.student.name.removesuffix(records.SWAP)
        version = Versions.of(model_dir, answering.prepared).current()
        made_of = {name: answering}, answering.prepared, {}, (answering,)
        return cls(name, model_dir, *made_of, version)

    @classmethod
    def _made_of(cls, model_dir: Path, system: str, said: Mapping[str, Any]) -> Sources:
        names = kinds.settings_of(said).made_of
        trained = {
            name: records.answering(model_dir, (*kinds.refreshed(model_dir, name), name))
            for name in names
        }
        answering = tuple(trained.values()) or (
            records.answering(model_dir, (kinds.EVALUATION,), kinds.SYSTEMS),
        )
        prepared = {answer.prepared for answer in answering}
        if len(prepared) > 1:
            raise ValueError(
                f"{model_dir}: {' and '.join(names)}, of which {system} is made, were trained on "
                "different identifiers; train them again"
            )
        folder = prepared.pop()
        version = Versions.of(model_dir, folder).current()
        return cls(system, model_dir, trained, folder, said, answering, version)

    @property
    def versions(self) -> Versions:
        """The versions of the index."""
        return Versions.of(self.model_dir, self.prepared)

    @property
    def index(self) -> Path:
        """The folder of the passages, identifiers and indexes: that of the prepare stage, or of a
        later version."""
        return self.versions.at(self.version)

    @property
    def unchanged(self) -> bool:
        """Whether everything is still what it was when it was looked for."""
        same = all(answering.unchanged for answering in self.answering)
        return same and self.versions.current() == self.version

    def warn(self) -> None:
        """Says why what answers may not be what a user expects."""
        for answering in self.answering:
            if answering.aside:
                logger.warning("%s: %s", answering.student, answering.aside)
        for folder in self.versions.strangers:
            logger.warning(
                "%s: has passages that were added to other identifiers, and is not read; add them "
                "again with python -m dgr_jax.update, and remove it",
                folder,
            )
