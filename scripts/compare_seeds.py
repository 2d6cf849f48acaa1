"""Pools the runs of one experiment under several seeds, and compares its systems.

    for seed in 0 1 2; do
      python -m dgr_jax.train --gin_file=quickstart.gin --gin.SEED=$seed --model_dir=seed$seed
    done
    python scripts/compare_seeds.py seed0 seed1 seed2 --split=test

Prints the mean and standard deviation over seeds of every measure of every system, and paired
tests over the queries, each query counted once with its mean over the seeds.

Folders that are no seeds of one experiment are refused: those of another collection, of other
settings than seeds, of the same seed twice, and those that were asked other queries.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dgr_jax import evaluation
from dgr_jax.corpora import beir, trec
from dgr_jax.corpora.types import ScoredPassage
from dgr_jax.model_dir import kept, records

PAIRS = (
    ("distill", "generate"), ("distill", "control"), ("distill", "bm25"),
    ("planned", "distill"), ("planned", "bm25"),
    ("refresh", "dense"), ("dense", "bm25"), ("refresh", "bm25"),
)  # fmt: skip

Runs = Mapping[str, Mapping[str, list[ScoredPassage]]]  # system -> qid -> its passages


class Finished(NamedTuple):
    """A finished MODEL_DIR: settings of its evaluate stage and of all before it, without those of
    seeds, which stand apart, by name."""

    folder: Path
    settings: dict[str, Any]
    seeds: dict[str, int]
    measured: Mapping[str, Mapping[str, Mapping[str, float]]]


def read(folder: Path) -> Finished:
    """Raises ValueError where nothing was measured, or what was measured cannot be read."""
    record = records.read_record(folder / "evaluate")
    if record.get("status") != "done":
        raise ValueError(
            f"{folder}: got no finished stage evaluate, expected one: python -m dgr_jax.train "
            f"--model_dir={folder}"
        )
    metrics = folder / "evaluate" / "metrics.json"
    try:
        measured = json.loads(metrics.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError) as error:
        raise ValueError(f"{metrics}: cannot be read ({error})") from error
    seeds: dict[str, int] = {}
    return Finished(folder, _without_seeds(record["settings"], "", seeds), seeds, measured)


def _without_seeds(settings: Any, at: str, seeds: dict[str, int]) -> Any:
    """The settings without seeds and without what tells whether the collection's files changed,
    which is read from what was prepared of them; adds the seeds by their names."""
    if isinstance(settings, list):
        return [_without_seeds(v, f"{at}[{i}]", seeds) for i, v in enumerate(settings)]
    if not isinstance(settings, dict):
        return settings
    others = {}
    for name, value in settings.items():
        path = f"{at}.{name}" if at else name
        if name == "seed":
            seeds[path] = value
        elif not path.endswith("prepare.files.collection"):
            others[name] = _without_seeds(value, path, seeds)
    return others


def collection(folder: Path) -> dict[str, str]:
    """What tells one collection from another, by name: passages, queries, judgements."""
    prepared = folder / "prepare"
    files = {"passages": [prepared / "passages" / name for name in ("pids.txt", "offsets.npy")]}
    files["queries"] = sorted(prepared.glob("*/**/queries.jsonl"))
    files["judgements"] = sorted(prepared.glob("collection/qrels/*"))
    marks = {}
    for name, paths in files.items():
        mark = hashlib.sha256()
        for path in paths:
            mark.update(path.read_bytes())
        marks[name] = mark.hexdigest()
    return marks


def check(finished: Sequence[Finished], split: str) -> None:
    """Raises ValueError naming two folders that are not two seeds of one experiment."""
    first, known = finished[0], collection(finished[0].folder)
    seen: dict[str, Path] = {}
    for one in finished:
        for name, mark in collection(one.folder).items():
            if mark != known[name]:
                raise ValueError(
                    f"{first.folder} and {one.folder}: got other {name}, expected one collection"
                )
        if differ := records.changed_settings(first.settings, one.settings):
            raise ValueError(
                f"{first.folder} and {one.folder}: got other settings ({', '.join(differ[:5])}), "
                "expected those of one experiment, with other seeds alone"
            )
        seeds = json.dumps(one.seeds, sort_keys=True)
        if seeds in seen:
            raise ValueError(
                f"{seen[seeds]} and {one.folder}: got the same seeds, expected another "
                "--gin.SEED for each folder: one seed twice tells nothing of the spread"
            )
        seen[seeds] = one.folder
    splits = list(next(iter(first.measured.values())))
    if split not in splits:
        raise ValueError(f"--split: got {split!r}, expected one of {', '.join(splits)}")


def read_runs(one: Finished, split: str) -> Runs:
    """Of every system that was measured, as they were written."""
    paths = {system: one.folder / "evaluate" / f"{system}.{split}.trec" for system in one.measured}
    return {
        system: trec.run_in_memory(trec.runs(kept.opened(path))) for system, path in paths.items()
    }


def judgements(finished: Sequence[Finished], runs: Sequence[Runs], split: str) -> dict[str, Any]:
    """qid -> pid -> relevance of the queries that were asked. Raises ValueError where those of two
    folders differ, or no query has a judgement."""
    folder = finished[0].folder / "prepare" / "collection"
    judged = trec.qrels_in_memory(beir.BeirCollection(str(folder)).qrels(split))
    if finished[0].settings["evaluate"]["max_queries"]:
        asked = [set().union(*found.values()) for found in runs]
        for one, qids in zip(finished, asked, strict=True):
            if qids != asked[0]:
                raise ValueError(
                    f"{finished[0].folder} and {one.folder}: were asked other queries, expected "
                    "the same: give Evaluate.seed one value (Evaluate.max_queries draws by it)"
                )
        judged = {qid: grades for qid, grades in judged.items() if qid in asked[0]}
    return judged


def compare(folders: Sequence[Path], split: str, measures: Sequence[str], least: int) -> None:
    """Prints all of it. least: grade of a positive; 0: that of the experiment."""
    finished = [read(folder) for folder in folders]
    check(finished, split)
    for system in finished[0].measured:
        rows = [one.measured[system][split] for one in finished]
        cells = [
            f"{name} {np.mean([r[name] for r in rows]):.3f} ± {np.std([r[name] for r in rows]):.3f}"
            for name in rows[0]
        ]
        print(f"{system:10s}", "  ".join(cells))
    runs = [read_runs(one, split) for one in finished]
    judged = judgements(finished, runs, split)
    least = least or finished[0].settings["evaluate"]["min_relevance"]
    evaluation.check(measures, min_relevance=least)
    for a, b in PAIRS:
        if a in runs[0] and b in runs[0]:
            for measure in measures:
                of_a, of_b = ([found[name] for found in runs] for name in (a, b))
                compared = evaluation.compare_many(of_a, of_b, judged, measure, min_relevance=least)
                print(f"{a} and {b}: {compared}")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model_dirs", nargs="+", type=Path, help="one a seed, two or more")
    parser.add_argument("--split", default="test")
    parser.add_argument(
        "--min_relevance", type=int, default=0, help="default: Evaluate.min_relevance"
    )
    parser.add_argument("--measures", default="Success@1,Success@10,RR@10")
    args = parser.parse_args(argv)
    try:
        if len(args.model_dirs) < 2:
            raise ValueError(f"got one folder, {args.model_dirs[0]}, expected one a seed")
        measures = [name.strip() for name in args.measures.split(",")]
        compare(args.model_dirs, args.split, measures, args.min_relevance)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
