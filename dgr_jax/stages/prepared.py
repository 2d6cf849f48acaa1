"""What the prepare stage has made, opened by every stage after it."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from dgr_jax.corpora import trec
from dgr_jax.corpora.store import PassageStore
from dgr_jax.corpora.types import Query
from dgr_jax.data.vocabulary import Vocabulary
from dgr_jax.experiments.dense import DenseExperiment, DensePrepare
from dgr_jax.experiments.generative import Experiment, Prepare
from dgr_jax.identifiers.table import IdentifierTable
from dgr_jax.model_dir import kept, writer_lock
from dgr_jax.model_dir.records import RECORD, read_record, write_record
from dgr_jax.retrieval.multiview.view_indexes import ViewIndexes
from dgr_jax.stages import judged

logger = logging.getLogger(__name__)

PREPARE = "prepare"  # the stage that leaves this


def write_report(folder: Path, report: dict[str, Any], settings: Prepare | DensePrepare) -> None:
    """Writes report.json and says what is in it."""
    (folder / "report.json").write_text(json.dumps(report, indent=1), encoding="utf-8")
    for line in _readable(report, settings):
        logger.info("prepare: %s", line)


@dataclass(frozen=True)
class Prepared:
    """What the prepare stage left, opened. A dense retriever has no identifiers."""

    folder: Path
    store: PassageStore
    vocabulary: Vocabulary

    @classmethod
    def load(cls, model_dir: str | Path) -> Prepared:
        folder = Path(model_dir) / PREPARE
        return cls(folder, PassageStore(folder / "passages"), Vocabulary.load(folder))

    @cached_property
    def table(self) -> IdentifierTable:
        """One identifier of each passage; ValueError where there are those of several views."""
        if self.vocabulary.views:
            raise ValueError(
                f"{self.folder.parent} has identifiers of several views; expected one a passage, "
                "such as Prepare.identifiers = @ResidualQuantization()"
            )
        return IdentifierTable.load(self.folder / "identifiers")

    @cached_property
    def indexes(self) -> ViewIndexes | None:
        """Identifiers of several views; None where a passage has one."""
        views = bool(self.vocabulary.views)
        return ViewIndexes.load(self.folder, self.vocabulary) if views else None

    def queries(self, split: str) -> dict[str, Query]:
        """qid -> query of a split."""
        return judged.queries(self.folder, split)

    def qrels(self, split: str) -> dict[str, dict[str, int]]:
        """qid -> pid -> relevance of a split; {} of one that has answers instead."""
        return trec.qrels_in_memory(judged.qrels(self.folder, split))


def export(experiment: Experiment | DenseExperiment, target: str) -> None:
    """Copy the prepare stage, without its TFDS dataset, to MODEL_DIR `target` on its way elsewhere.

    There every later stage runs without TensorFlow and without the collection.
    """
    origin, folder = Path(experiment.model_dir) / PREPARE, Path(target) / PREPARE
    if read_record(folder):
        raise ValueError(f"--export={target}: there is an experiment already ({folder / RECORD})")
    with writer_lock.held(experiment.model_dir), writer_lock.held(target):
        kept.whole(origin)
        shutil.copytree(
            origin, folder, ignore=shutil.ignore_patterns("tfds", RECORD), dirs_exist_ok=True
        )
        write_record(folder, **read_record(origin))
        shutil.copyfile(Path(experiment.model_dir) / "config.gin", Path(target) / "config.gin")
    logger.info(
        "exported to %s; there: python -m dgr_jax.train --model_dir=%s", target, Path(target).name
    )


def cut(
    vocabulary: Vocabulary, queries: dict[str, dict[str, Query]], length: int
) -> dict[str, int]:
    """How many queries of each split have more tokens than fit, EOS counted."""
    return {
        split: sum(len(vocabulary.encode(query.text)) >= length for query in of_split.values())
        for split, of_split in queries.items()
    }


def _readable(report: dict[str, Any], settings: Prepare | DensePrepare) -> Iterator[str]:
    identifiers = report.get("identifiers", {})
    yield (
        ", ".join(
            [f"{report['passages']:,} passages"]
            + [f"{n:,} {split} queries" for split, n in report["queries"].items()]
        )
        + "; examples: "
        + ", ".join(f"{n:,} {name}" for name, n in report["examples"].items())
    )
    for split, cut in report["queries_cut"].items():
        if cut:
            yield (
                f"{cut:,} of {report['queries'][split]:,} {split} queries are longer than "
                f"{settings.query_length} tokens and are cut "
                f"({type(settings).__name__}.query_length)"
            )
    for source, counted in report["inputs_cut"].items():
        if counted["cut"] and not source.startswith("labelled"):
            length = "passage_length" if source == "corpus" else "query_length"
            inputs = f"{counted['inputs']:,} {source.replace('_', ' ')} inputs"
            yield (
                f"{counted['cut']:,} of {inputs} are longer than {getattr(settings, length)} "
                f"tokens and are cut, {counted['tokens_lost']:,} of {counted['tokens']:,} tokens "
                f"are lost ({type(settings).__name__}.{length})"
            )
    if copies := report["copies_of_test_queries"]:
        yield (
            f"{copies:,} pseudo-queries are copies of test queries and are left out "
            "(Sources.pseudo_query_path)"
        )
    yield from judged.readable(report, settings)
    if "positives" in report:
        yield f"positives a query: {_line(report['positives'])}"
    if line := _line(identifiers):
        yield line
    for view in ("title", "body", "query", "named_passages", "drawn"):
        if view in identifiers:
            yield f"{view.replace('_', ' ')}: {_line(identifiers[view])}"
    for position, level in enumerate(identifiers.get("levels", []), start=1):
        usage = (f"{key.replace('_', ' ')} {_short(value)}" for key, value in level.items())
        yield f"code {position}: {', '.join(usage)}"


def _line(report: Mapping[str, Any]) -> str:
    plain = {key: value for key, value in report.items() if not isinstance(value, (list, dict))}
    return ", ".join(f"{key.replace('_', ' ')} {_short(value)}" for key, value in plain.items())


def _short(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)
