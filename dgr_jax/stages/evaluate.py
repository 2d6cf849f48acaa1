"""Stage evaluate: runs, measures, comparisons and plots of every system on the test splits."""

from __future__ import annotations

import collections
import json
import logging
import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from dgr_jax import display, evaluation, plots, processes
from dgr_jax.corpora import trec
from dgr_jax.corpora.types import Query, ScoredPassage
from dgr_jax.experiments.dense import DenseExperiment
from dgr_jax.experiments.generative import Experiment
from dgr_jax.experiments.stage import Stage
from dgr_jax.model_dir import kept
from dgr_jax.retrieval import self_hits
from dgr_jax.retrieval.batching import BLOCK, scored_passages
from dgr_jax.retrieval.bm25 import WORDS, Bm25
from dgr_jax.retrieval.planned import check_corpus
from dgr_jax.retrieval.retriever import write_plan
from dgr_jax.settings import describe, fingerprint
from dgr_jax.stages import judged
from dgr_jax.stages.measures import check_measures
from dgr_jax.stages.prepared import Prepared
from dgr_jax.stages.systems import open_system
from dgr_jax.training import metrics, validation

if TYPE_CHECKING:
    from rich.console import Console

logger = logging.getLogger(__name__)

Item = TypeVar("Item")
Run = dict[str, list[ScoredPassage]]
Values = dict[str, dict[str, float]]  # measure -> qid -> value
COMPARED = ("Success@1", "Success@10", "RR@10")


def evaluate(experiment: Experiment, folder: Path) -> None:
    """Measures every student; see `measure`."""
    made = Prepared.load(experiment.model_dir)
    search = search_of(experiment, made)
    if processes.first() and experiment.plan is not None:
        write_plan(folder, experiment.plan)
    measure(experiment, folder, made, lambda system: open_system(experiment, system, search, made))


def search_of(experiment: Experiment | DenseExperiment, made: Prepared) -> Any:
    """Evaluate.search; a passage deeper where queries that are asked are passages, which they must
    not find."""
    own = any(
        _own(experiment, made, split, chosen_queries(experiment, made, split))
        for split in experiment.prepare.test_splits
    )
    return self_hits.deeper(experiment.evaluate.search) if own else experiment.evaluate.search


def _own(
    experiment: Experiment | DenseExperiment, made: Prepared, split: str, qids: Iterable[str]
) -> frozenset[str]:
    """The queries that must not find the passage of their id."""
    return judged.self_hits(experiment.prepare, qids, made.store, made.qrels(split))


def measure(
    experiment: Experiment | DenseExperiment,
    folder: Path,
    made: Prepared,
    opened: Callable[[str], Any],
) -> None:
    """Writes <system>.<split>.trec, metrics.json (system -> split -> measure), comparisons.json,
    success_at_k.png and training_curves.png, and prints the table.

    One system is in memory at a time, and of its runs one block of queries. Several processes
    search together; the first does the rest. A run is kept beside its student, which is not
    searched again by an evaluation that differs in other settings or in another student. What lies
    in the stage's folder is a copy, for people.

    opened: a system -> what retrieves, such as a `Decoder`, by `search_of`.
    """
    splits = experiment.prepare.test_splits
    if not splits:
        logger.info("evaluate: there are no test queries (Prepare.test_splits): nothing to measure")
    queries = {split: chosen_queries(experiment, made, split) for split in splits}
    own = {split: _own(experiment, made, split, asked) for split, asked in queries.items()}
    for split, asked in queries.items():
        if not asked:
            raise ValueError(f"split {split!r} has no query to measure on; expected one or more")
        evaluation.require_answers(experiment.evaluate.measures, asked.values(), split)
    values: dict[str, dict[str, Values]] = {}
    for system in ["bm25"] * experiment.evaluate.bm25 + [*experiment.measured]:
        runs = {split: _kept_run(experiment, system, split, bool(own[split])) for split in splits}
        _search(experiment, made, system, opened, queries, runs, own)
        if processes.first():
            values[system] = {
                split: _measure(experiment, made, queries[split], split, path)
                for split, path in runs.items()
            }
            for split, path in runs.items():
                _copy(path, folder / f"{system}.{split}.trec")
    if not processes.first():
        return
    measured = {
        system: {
            split: evaluation.means(
                {name: found[name] for name in experiment.evaluate.measures if name in found}
            )
            for split, found in by_split.items()
        }
        for system, by_split in values.items()
    }
    _write_json(folder / "metrics.json", measured)
    compared = {split: _compare(values, split) for split in splits}
    described = {
        split: [{"systems": pair, **asdict(c)} for pair, c in found]
        for split, found in compared.items()
    }
    _write_json(folder / "comparisons.json", described)
    first = {s: found[splits[0]] if splits else {} for s, found in values.items()}
    _plot(experiment, folder, first)
    _show(measured, compared)
    for line in _choices(experiment):
        _console().print(line, soft_wrap=True)


def chosen_queries(
    experiment: Experiment | DenseExperiment, made: Prepared, split: str
) -> dict[str, Query]:
    """qid -> query, at most Evaluate.max_queries of them."""
    queries = made.queries(split)
    settings = experiment.evaluate
    if not settings.max_queries or settings.max_queries >= len(queries):
        return queries
    rng = np.random.default_rng(settings.seed)
    keep = np.sort(rng.choice(len(queries), settings.max_queries, replace=False))
    qids = list(queries)
    return {qids[i]: queries[qids[i]] for i in keep}


def first_test_split(experiment: Experiment | DenseExperiment) -> str:
    """ValueError where there is none."""
    for split in experiment.prepare.test_splits:
        return split
    raise ValueError(
        f"{experiment.model_dir} has no test split to measure on "
        f"({type(experiment.prepare).__name__}.test_splits)"
    )


def _kept_run(experiment: Experiment | DenseExperiment, system: str, split: str, own: bool) -> Path:
    """The file of a system's run, named by what is asked of it; BM25's lies with the corpus, and is
    named by its settings too, but for BM25 of words, as it always was; that of `planned` lies with
    its student, and is named by the plan too.

    own: whether queries are passages, which are left out of the run.
    """
    settings = experiment.evaluate
    student = system != "bm25"
    asked = (settings.search if student else settings.search.depth, settings.max_queries)
    drawn = settings.seed if settings.max_queries else 0
    more = [experiment.plan] if system == "planned" else []
    if not student and settings.baseline != WORDS:
        more = [settings.baseline]
    mark = fingerprint(describe([*asked, drawn, *["without self-hits"] * own, *more]))
    stage = {"bm25": "prepare", "planned": "distill"}.get(system, system)
    folder = Path(experiment.model_dir) / stage / "runs"
    return folder / f"{system}.{split}-{mark}.trec"


def _search(
    experiment: Experiment | DenseExperiment,
    made: Prepared,
    system: str,
    opened: Callable[[str], Any],
    queries: dict[str, dict[str, Query]],
    runs: dict[str, Path],
    own: dict[str, frozenset[str]],
) -> None:
    """Writes the runs (by split) that are not there yet, or not as they were written; own: the
    queries of each that must not find the passage of their id."""
    first = processes.first()
    absent = [split for split, path in runs.items() if not _is_kept(path)] if first else None
    absent = processes.agree(absent)
    if not absent or system == "bm25" and not processes.first():
        return
    depth = experiment.evaluate.search.depth
    baseline = experiment.evaluate.baseline
    search = _searcher(made, system, opened, baseline, depth + any(own.values()))
    for split in absent:
        found = search({qid: query.text for qid, query in queries[split].items()})
        if any(own.values()):
            found = _without_self_hits(found, own[split], depth, f"{system} on {split}")
        if processes.first():
            lists = (rank_list for run in found for rank_list in trec.rank_lists(run))
            written = runs[split].with_name(f"{runs[split].stem}.partial.trec")
            trec.write_run(written, lists, tag=f"dgr_jax-{system}")
            kept.adopt(written, runs[split])
        else:
            collections.deque(found, maxlen=0)


def _is_kept(path: Path) -> bool:
    """Whether a run is there as it was written."""
    if not path.is_file():
        return False
    try:
        listed = kept.is_listed(path)
    except kept.Damaged as damage:
        logger.warning("evaluate: %s; searched again", damage.what)
        return False
    if not listed and path.stat().st_nlink > 1:
        logger.info("evaluate: %s has another name, and may be edited; searched again", path)
        return False
    return True


def _without_self_hits(
    runs: Iterator[Run], own: frozenset[str], depth: int, name: str
) -> Iterator[Run]:
    """Blocks of a run without the queries' own passages, whose number is logged."""
    hits = 0
    for run in runs:
        hits += sum(p.pid == qid for qid in own & run.keys() for p in run[qid])
        yield self_hits.without(run, own, depth)
    if hits:
        logger.info("evaluate: %s: %s queries found themselves, left out", name, f"{hits:,}")


def _searcher(
    made: Prepared, system: str, opened: Callable[[str], Any], baseline: Bm25, depth: int
) -> Callable[[dict[str, str]], Iterator[Run]]:
    """queries -> the run of a system in blocks."""
    if system == "bm25":
        index = baseline.fit(made.store)
        return lambda queries: (index.search(b, depth) for b in _blocks(queries))
    student = opened(system)
    return lambda queries: _retrieve(student, made, queries)


def _blocks(queries: dict[str, Item]) -> Iterator[dict[str, Item]]:
    items = list(queries.items())
    return (dict(items[start : start + BLOCK]) for start in range(0, len(items), BLOCK))


def _retrieve(student: Any, made: Prepared, queries: dict[str, str]) -> Iterator[Run]:
    encoded = (student.encode(made.vocabulary, list(b.values())) for b in _blocks(queries))
    found = student.passages_of_blocks(encoded)
    for block, (passages, scores) in zip(_blocks(queries), found, strict=True):
        yield scored_passages(list(block), passages, scores, made.store.pids)


def _measure(
    experiment: Experiment | DenseExperiment,
    made: Prepared,
    queries: dict[str, Query],
    split: str,
    path: Path,
) -> Values:
    """What a run is worth: every measure that is asked for, compared or plotted; of a split without
    judgements, those of answers."""
    settings, qrels = experiment.evaluate, made.qrels(split)
    names = dict.fromkeys((*settings.measures, *COMPARED, *_plotted(settings.search.depth)))
    of_answers = [name for name in names if evaluation.answer_cutoff(name) is not None]
    of_judgements = [name for name in names if name not in of_answers] if qrels else []

    def text(pid: str) -> str:
        return made.store[made.store.index_of(pid)].text

    values: Values = {}
    lacking = 0
    for run in _read(path, queries):
        found: Values = {}
        lacking += sum(not passages for passages in run.values())
        if of_answers:
            asked = [queries[qid] for qid in run]
            found |= evaluation.answer_hits(run, asked, text, of_answers)
        if of_judgements:
            grades = {qid: qrels[qid] for qid in run}
            found |= evaluation.per_query(
                run, grades, of_judgements, min_relevance=settings.min_relevance
            )
        for name, by_query in found.items():
            values.setdefault(name, {}).update(by_query)
    if lacking:
        logger.warning(
            "evaluate: %s has no passages for %s of %s queries of split %r, which count as 0",
            *(path.name.partition(".")[0], f"{lacking:,}", f"{len(queries):,}", split),
        )
    return values


def _read(path: Path, queries: dict[str, Query]) -> Iterator[Run]:
    """A run in blocks of the queries that it was made for; those without passages have no line."""
    lists = trec.runs(path)
    following = next(lists, None)
    for block in _blocks(queries):
        run: Run = {}
        for qid in block:
            run[qid] = []
            if following is not None and following.qid == qid:
                run[qid] = list(following.passages)
                following = next(lists, None)
        yield run


def _copy(run: Path, shown: Path) -> None:
    """Of older versions, what is shown is another name of a run that is kept: it is not written
    into."""
    shown.unlink(missing_ok=True)
    shutil.copyfile(run, shown)


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=1), encoding="utf-8")


def _compare(
    values: dict[str, dict[str, Values]], split: str
) -> list[tuple[str, evaluation.Comparison]]:
    """(systems, comparison) with a paired test over the queries, for every pair of interest, by
    COMPARED and every measure of answers."""
    pairs = [
        ("distill", "generate"), ("distill", "control"), ("distill", "bm25"),
        ("planned", "bm25"), ("planned", "distill"),
        ("refresh", "dense"), ("refresh", "bm25"), ("dense", "bm25"),
    ]  # fmt: skip
    return [
        (
            f"{a} against {b}",
            evaluation.compare(
                name, *([*values[system][split][name].values()] for system in (a, b))
            ),
        )
        for a, b in pairs
        if a in values and b in values
        for name in values[a][split]
        if name in COMPARED or evaluation.answer_cutoff(name) is not None
    ]


def _plotted(depth: int) -> dict[str, int]:
    """Measure -> k of the points of the plot."""
    return {f"Success@{k}": k for k in (1, 5, 10, 20, 50, 100) if k <= depth}


def _plot(
    experiment: Experiment | DenseExperiment, folder: Path, values: dict[str, Values]
) -> None:
    """values: of the first test split."""
    points = _plotted(experiment.evaluate.search.depth)
    curves = {}
    for system, found in values.items():
        means = evaluation.means({name: found[name] for name in points if name in found})
        curves[system] = {points[name]: mean for name, mean in means.items()}
    if any(curves.values()):  # the split has judgements
        title = f"Success@k, {first_test_split(experiment)}"
        plots.success_at_k(curves, folder / "success_at_k.png", title=title)
    model_dir = Path(experiment.model_dir)
    # BM25 and a plan have no curve, but a colour: the others have theirs in both plots.
    rows = {
        s: metrics.read_jsonl(model_dir / s / "metrics.jsonl") if s in experiment.systems else ()
        for s in values
    }
    plots.training_curves(rows, folder / "training_curves.png")


def _show(measured: Any, compared: Any) -> None:
    console = _console()
    for split, found in compared.items():
        by_system = {system: by_split[split] for system, by_split in measured.items()}
        console.print(evaluation.measures_table(by_system, title=split))
        shown = {"RR@10", *[c.measure for _, c in found if c.measure not in COMPARED][:1]}
        for pair, comparison in found:
            if comparison.measure in shown:
                line = f"{pair.replace(' against', ' and')}: {comparison}"
                console.print(line, soft_wrap=True)


def _choices(experiment: Experiment | DenseExperiment) -> Iterator[str]:
    """What was chosen of each training run that is measured, and on how many questions."""
    stages = dict.fromkeys(s for system in experiment.systems for s in experiment.training(system))
    for stage in stages:
        if choice := validation.readable(Path(experiment.model_dir) / stage):
            yield f"{stage}: {choice}"


def _console() -> Console:
    """As wide as the terminal; as wide as any table where there is none, such as in a log."""
    console = display.console()
    return console if console.is_terminal else display.console(width=200)


def measure_runs(paths: list[str], qrels_path: str, min_relevance: int) -> None:
    """Print the measures of TREC runs against a qrels file (TREC, or BEIR's .tsv).

    Raises ValueError for a file without judgements, a run that is given twice, and a run that is
    empty or has no query of the judgements; says what else may not be as it was meant.
    """
    judged = trec.qrels_in_memory(trec.qrels(qrels_path))
    if not judged:
        raise ValueError(f"--qrels={qrels_path}: found no judgement; expected qid, 0, pid, grade")
    highest = max(max(grades.values()) for grades in judged.values())
    if highest < min_relevance:
        logger.warning(
            "--min_relevance=%d: the highest grade of %s is %d, so that nothing counts as relevant "
            "but for graded measures", min_relevance, qrels_path, highest,
        )  # fmt: skip
    measured = {}
    for path, name in _names(paths).items():
        run = trec.run_in_memory(trec.runs(path))
        for remark in _remarks(run, judged, path, qrels_path):
            logger.warning("%s: %s", path, remark)
        measured[name] = evaluation.evaluate(run, judged, min_relevance=min_relevance)
    title = _names([qrels_path])[qrels_path]
    _console().print(evaluation.measures_table(measured, title=title))


def _names(paths: list[str]) -> dict[str, str]:
    """Path -> what it is called: the name of its file where that says which one it is."""
    if twice := [path for path, count in collections.Counter(paths).items() if count > 1]:
        raise ValueError(f"--run={twice[0]}: got it {paths.count(twice[0])} times, expected once")
    counts = collections.Counter(Path(path).name for path in paths)
    return {
        path: Path(path).name if counts[Path(path).name] == 1 and Path(path).is_file() else path
        for path in paths
    }


def _remarks(
    run: Run, judged: dict[str, dict[str, int]], path: str, qrels_path: str
) -> Iterator[str]:
    """What may not be as it was meant; ValueError for a run that nothing can be measured of."""
    if not run:
        raise ValueError(f"--run={path}: found no passage; expected a TREC run")
    both, other = [qid for qid in run if qid in judged], next(iter(run))
    if not both:
        raise ValueError(
            f"--run={path}: found none of the {len(judged):,} queries of {qrels_path} among its "
            f"{len(run):,}, such as {other!r}; expected a run of these queries"
        )
    if lacking := len(judged) - len(both):
        yield f"lacks {lacking:,} of the {len(judged):,} judged queries, which count as 0"
    if beside := len(run) - len(both):
        yield f"{beside:,} of its {len(run):,} queries have no judgements, and are left out"
    pids = {pid for grades in judged.values() for pid in grades}
    if not any(passage.pid in pids for qid in both for passage in run[qid]):
        pid = run[both[0]][0].pid
        yield (
            f"none of its passages, such as {pid!r}, is among the {len(pids):,} judged ones; is it "
            "of another collection?"
        )
    ties = sum(len({p.score for p in run[qid]}) < len(run[qid]) for qid in both)
    if ties:
        yield (
            f"passages of {ties:,} queries have equal scores, and stand in the order of their "
            "pids; other tools may order them otherwise"
        )


def _settings(experiment: Experiment) -> dict[str, Any]:
    """Without the plan where there is none, so that older stages stay."""
    plan = {} if experiment.plan is None else {"plan": experiment.plan}
    return {"evaluate": experiment.evaluate, **plan}


def _check(experiment: Experiment) -> None:
    """Raises ValueError where measures cannot be taken, or the prepared corpus is too small for the
    plan."""
    check_measures(experiment)
    report = Path(experiment.model_dir) / "prepare" / "report.json"
    if experiment.plan is not None and report.is_file():
        with kept.reading(report):
            check_corpus(experiment.plan, kept.read_json(report)["passages"])


STAGE = Stage(
    "evaluate",
    evaluate,
    settings=_settings,
    upstream=lambda e: ("distill", "control") if e.control else ("distill",),
    check=_check,
)
