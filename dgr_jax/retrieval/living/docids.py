"""Identifiers of schemes by which a passage has one: the table and its trie."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path

import numpy as np

from dgr_jax.corpora.store import PassageStore
from dgr_jax.decoding import trie
from dgr_jax.identifiers import kept_models
from dgr_jax.identifiers.scheme import Addition, Material
from dgr_jax.identifiers.table import IdentifierTable
from dgr_jax.model_dir import kept
from dgr_jax.retrieval.living.change import Change

logger = logging.getLogger(__name__)


def write(change: Change) -> None:
    """Writes the table and the trie of a version; nothing where a passage has several identifiers,
    or none.

    The trie keeps its shapes as long as the identifiers fit, so that nothing is compiled again.
    Raises ValueError, before anything is written, where a passage can have no identifier.
    """
    if not (change.old / "identifiers" / "identifiers.json").is_file():
        return
    table = IdentifierTable.load(change.old / "identifiers")
    rows = np.zeros((0, 1), np.int32)
    if change.added:
        staying = changed(table, change.stay, change.num_passages - len(change.added))
        vocabulary = change.vocabulary
        addition = Addition(
            change.added, staying, vocabulary.encode, vocabulary.first_code_id, change.kept
        )
        try:
            rows = change.scheme.rows(addition)
        except kept_models.Missing:
            rows = change.scheme.rows(addition._replace(kept=_learned_again(change)))
        for passage, row in zip(change.added, rows, strict=True):
            if not row[0]:
                raise ValueError(
                    f"passages: {passage.pid!r} can have no identifier of "
                    f"{type(change.scheme).__name__}: the vocabulary has no token of its text; "
                    "nothing was changed"
                )
    save(change, changed(table, change.stay, change.num_passages, rows))


def _learned_again(change: Change) -> Path:
    """The folder of what an older version has not kept with the prepare stage: what gives its
    identifiers to the passages that it has is learned once more, and kept with the index.

    Raises ValueError where that gives other identifiers than the students have learned.
    """
    folder = change.new.parent / kept_models.KEPT
    if folder.is_dir():
        return folder
    logger.info(
        "index: an older version made the prepare stage, and kept nothing that gives identifiers "
        "to later passages; it is learned again, once, which takes as long as it took then"
    )
    vocabulary, partial = change.vocabulary, folder.with_name(f"{kept_models.KEPT}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    passages = PassageStore(change.prepared / "passages")
    seed = int(change.settings.get("seed", 0))
    material = Material(
        passages, vocabulary.encode, vocabulary.first_code_id, seed=seed, keep=partial
    )
    (table,) = change.scheme.tables(material)
    known = IdentifierTable.load(change.prepared / "identifiers")
    if not np.array_equal(table.tokens, known.tokens) or not np.array_equal(
        table.passages, known.passages
    ):
        shutil.rmtree(partial)
        raise ValueError(
            f"{change.prepared}: an older version kept nothing that gives identifiers to later "
            "passages, and what is learned now gives other identifiers than those that students "
            f"write; remove {change.prepared} and train again"
        )
    kept.write_manifest(partial)
    partial.rename(folder)
    return folder


def save(change: Change, table: IdentifierTable, view: str = "") -> None:
    """Writes a table and its trie."""
    table.save(change.new / "identifiers" / view)
    before = trie.load(change.old / "trie" / view)
    size = change.vocabulary.size
    index = trie.build(table.tokens, table.lengths, vocab_size=size, like=before)
    index.save(change.new / "trie" / view)


def changed(
    table: IdentifierTable,
    stay: np.ndarray,
    num_passages: int,
    rows: np.ndarray | None = None,
    owners: np.ndarray | None = None,
) -> IdentifierTable:
    """The identifiers of the passages that stay, bool [P], renumbered, and rows int32 [N, T] of
    those after them: owners int [N], numbers among these, None for one row of each."""
    rows = np.zeros((0, 1), np.int32) if rows is None else rows
    owners = np.arange(len(rows)) if owners is None else owners
    of_entry = np.repeat(np.arange(len(table)), np.diff(table.offsets))
    keep = stay[table.passages]
    number = np.cumsum(stay) - 1
    width = max(table.tokens.shape[1], rows.shape[1])
    wide = [np.pad(part, ((0, 0), (0, width - part.shape[1])))
            for part in (table.tokens[of_entry[keep]], rows)]  # fmt: skip
    return IdentifierTable.from_rows(
        np.concatenate(wide),
        view=table.view,
        num_code_tokens=table.num_code_tokens,
        passages=np.concatenate([number[table.passages[keep]], owners + np.count_nonzero(stay)]),
        num_passages=num_passages,
    )
