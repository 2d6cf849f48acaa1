"""Changes of the index of a trained student, from the command line."""

from __future__ import annotations

import logging

from rich.table import Table

from dgr_jax import display
from dgr_jax.corpora import changes
from dgr_jax.model_dir import kept
from dgr_jax.retrieval.living import update

logger = logging.getLogger(__name__)


def change(model_dir: str, add: str | None, remove: str | None) -> None:
    """Adds the passages of a file, and removes those of the pids in another."""
    added = changes.read_passages(add) if add else []
    removed = changes.read_pids(remove) if remove else []
    update.update(update.versions(model_dir), added, removed)


def compact(model_dir: str) -> None:
    """See `update.compact`."""
    update.compact(update.versions(model_dir))


def rollback(model_dir: str) -> None:
    """See `update.rollback`."""
    logger.info("index: version %d answers", update.rollback(update.versions(model_dir)))


def show(model_dir: str) -> None:
    """Prints the versions."""
    versions = update.versions(model_dir)
    current, console = None, display.console()
    try:
        current = versions.current()
    except kept.Damaged as error:
        logger.warning("%s", error)
    table = Table("version", "made of", "passages", "added", "removed", "when", "")
    answers = lambda version: "answers" if version == current else ""
    table.add_row("0", "", "", "", "", "the prepare stage", answers(0))
    for version in versions.all():
        counts = version.passages, version.added, version.removed
        cells = map("{:,}".format, (version.version, version.before, *counts))
        table.add_row(*cells, version.made, answers(version.version))
    console.print(table)
