"""Stage teach: a teacher orders the candidates, and rank lists are cut from its order."""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from dgr_jax.data import rank_lists
from dgr_jax.display import listed
from dgr_jax.experiments.common import Teach
from dgr_jax.experiments.generative import Experiment
from dgr_jax.experiments.stage import Stage, after, fields
from dgr_jax.model_dir import kept
from dgr_jax.retrieval.multiview.keys import Keyed
from dgr_jax.stages import candidates as retrieved
from dgr_jax.stages import npz
from dgr_jax.stages.asked import training_queries
from dgr_jax.stages.inputs import named_by
from dgr_jax.stages.prepared import Prepared
from dgr_jax.teaching.list_recipes import RankLists
from dgr_jax.teaching.places import Places
from dgr_jax.teaching.teacher import Coverage
from dgr_jax.training import arrays, packing

logger = logging.getLogger(__name__)

_BLOCK = 2048
_KEYED = 256  # lists in a block where passages have several identifiers, which take more room


def teach(experiment: Experiment, folder: Path) -> None:
    """Writes rank_lists.npz, their token arrays in rank_lists/, and report.json: the teacher's
    coverage and agreement, and what was left out.

    Of each list rank_lists.npz holds its query (qids, and 200 characters of texts), passage indices
    int32 [n, L] (passages, -1: free place) with teacher_scores f32 [n, L], and the passage of the
    generation target int32 [n] (positives). The teacher's lists are cut one after another and never
    held together.
    """
    settings = experiment.teach
    prepared = Prepared.load(experiment.model_dir)
    candidates = CandidateLists.load(experiment, prepared)
    asked = training_queries(experiment, prepared)
    texts, qrels, qids = asked.texts, asked.qrels, candidates.qids
    coverage = {source: Coverage() for source in asked.sources}
    lists = taught(
        settings,
        texts,
        qids=qids,
        coverage=asked.by_source(coverage),
        candidates=candidates,
        store=prepared.store,
        qrels=qrels,
        min_relevance=experiment.prepare.min_relevance,
        self_hits=asked.own,
    )
    text_of = lambda row: texts[qids[row]]
    _write(folder / "rank_lists.npz", lists, qids, text_of)
    counts: Counter = Counter()
    features = _features if prepared.indexes is None else partial(_view_features, counts)
    arrays.write_arrays(folder / "rank_lists", features(experiment, lists, text_of, prepared))
    teacher = {source: counted.report() for source, counted in coverage.items()}
    report = {"teacher": teacher, "lists": lists.report}
    if counts:
        report["keys"] = counts
    (folder / "report.json").write_text(json.dumps(report, indent=1), encoding="utf-8")
    for line in readable(teacher, lists.report):
        logger.info("teach: %s", line)
    if counts:
        logger.info(
            "teach: keys of the student for %s of %s passages in lists; drawn for the others, none "
            "for %s",
            *(
                f"{count:,}"
                for count in (
                    counts["passages"] - counts["passages_without_keys"],
                    counts["passages"],
                    counts["passages_without_identifier"],
                )
            ),
        )


def _write(
    path: Path, lists: RankLists, qids: Sequence[str], text_of: Callable[[int], str]
) -> None:
    """rank_lists.npz, of which a block of lists is in memory."""
    rows = lists.query_rows

    def strings(of_row: Callable[[int], str]) -> npz.Rows:
        longest = max(len(of_row(row)) for row in rows)
        starts = range(0, len(rows), _BLOCK)
        blocks = (np.array([of_row(row) for row in rows[n : n + _BLOCK]]) for n in starts)
        return npz.Rows(np.dtype(f"U{max(1, longest)}"), rows.shape, blocks)

    def whole(array: np.ndarray) -> npz.Rows:
        return npz.Rows(array.dtype, array.shape, [array])

    npz.write(
        path,
        {
            "qids": strings(qids.__getitem__),
            "texts": strings(lambda row: text_of(row)[:200]),
            "passages": whole(lists.passages),
            "teacher_scores": whole(lists.teacher_scores),
            "positives": whole(lists.positive_passages),
        },
    )


def taught(
    settings: Teach,
    texts: Mapping[str, str],
    *,
    qids: Sequence[str],
    coverage: Mapping[str, Coverage],
    self_hits: Container[str] = (),
    **known: Any,
) -> RankLists:
    """The teacher's lists of the queries, qid -> text, cut as the recipe says.

    qids: the queries in the order that rows of the lists are counted in;
    coverage: of each query, added to; self_hits: queries whose lists lack the passage of their id;
    known: candidates, store, qrels and min_relevance, as teachers and recipes take them. Raises
    ValueError where no list could be made.
    """
    ranked = settings.teacher.rank(texts, coverage=coverage, self_hits=self_hits, **known)
    lists = settings.lists.select(ranked, qids=qids, seed=settings.seed, **known)
    if not len(lists.passages):
        raise ValueError(
            f"no rank list could be made of {len(texts)} queries: {listed(lists.report)}; look at "
            "Teach.teacher and Teach.lists"
        )
    return lists


class CandidateLists(Mapping[str, list[str]]):
    """qid -> the pids that the student found, best first; made from the arrays when asked for."""

    def __init__(self, qids: Sequence[str], passages: np.ndarray, pids: Sequence[str]) -> None:
        self.qids, self._place = qids, Places(qids)
        self._passages, self._pids = passages, pids

    @classmethod
    def load(cls, experiment: Experiment, prepared: Prepared) -> CandidateLists:
        folder = Path(experiment.model_dir) / retrieved.STAGE.name
        qids = kept.read_json(folder / "qids.json", list)
        return cls(qids, _candidates(folder), prepared.store.pids)

    def __getitem__(self, qid: str) -> list[str]:
        return [self._pids[i] for i in self._passages[self._place.of(qid)] if i >= 0]

    def __iter__(self) -> Iterator[str]:
        return iter(self.qids)

    def __len__(self) -> int:
        return len(self.qids)


def _candidates(folder: Path) -> np.ndarray:
    """Passages int32 [n, depth] that the student found."""
    with kept.reading(folder / "candidates.npz") as file, np.load(file) as stored:
        return stored["passages"]


def _features(
    experiment: Experiment,
    lists: RankLists,
    text_of: Callable[[int], str],
    prepared: Prepared,
) -> Iterator[dict[str, np.ndarray]]:
    """Model features of all rank lists in blocks."""
    assert prepared.table is not None
    for start in range(0, len(lists.passages), _BLOCK):
        block = slice(start, start + _BLOCK)
        yield rank_lists.features(
            [text_of(row) for row in lists.query_rows[block]],
            lists.passages[block],
            lists.teacher_scores[block],
            lists.positive_passages[block],
            table=prepared.table,
            vocabulary=prepared.vocabulary,
            query_length=experiment.prepare.query_length,
        )


def _view_features(
    counts: Counter,
    experiment: Experiment,
    lists: RankLists,
    text_of: Callable[[int], str],
    prepared: Prepared,
) -> Iterator[dict[str, np.ndarray]]:
    """The same of identifiers of several views, with the keys of the candidates."""
    indexes, folder = prepared.indexes, Path(experiment.model_dir) / retrieved.STAGE.name
    assert indexes is not None
    keyed = Keyed(
        arrays.read_arrays(folder / "keys"), _candidates(folder), indexes.text, indexes.tables,
        indexes.views, experiment.teach.seed,
    )  # fmt: skip
    for start in range(0, len(lists.passages), _KEYED):
        block = slice(start, start + _KEYED)
        rows = lists.query_rows[block]
        asked = [text_of(row) for row in rows]
        named = keyed.of(rows, asked, lists.passages[block], counts)
        needed = packing.rows_needed(named.tokens, named.views)
        counts["packed_rows"] = max(counts["packed_rows"], needed)
        yield rank_lists.view_features(
            asked,
            named,
            lists.teacher_scores[block],
            lists.positives[block],
            indexes.num_tokens,
            vocabulary=prepared.vocabulary,
            query_length=experiment.prepare.query_length,
        )


def readable(teacher: dict[str, dict[str, float]], lists: dict[str, int]) -> Iterator[str]:
    for source, report in teacher.items():
        yield (
            f"{source}: {report['candidates_scored']:.1%} of {report['candidates']:,} candidates "
            f"scored; a positive is among the candidates of {report['positive_in_candidates']:.1%} "
            f"of {report['queries']:,} queries, and scored for {report['positive_scored']:.1%}; "
            f"the teacher alone: Success@1 {report['Success@1']:.3f}, RR@10 {report['RR@10']:.3f}"
        )
    left_out = ", ".join(
        f"{value:,} {name.replace('_', ' ')}"
        for name, value in lists.items()
        if name not in ("queries", "lists") and value
    )
    yield f"{lists['lists']:,} rank lists of {lists['queries']:,} queries" + (
        f"; left out: {left_out}" if left_out else ""
    )


STAGE = Stage(
    "teach",
    teach,
    settings=fields("teach"),
    upstream=after(retrieved.STAGE.name),
    reads=named_by("teach"),
    alone=True,
)
