"""Pools the runs of one experiment under several seeds, and compares its systems.

    for seed in 0 1 2; do
      python -m dgr_jax.train --gin_file=quickstart.gin --gin.SEED=$seed --model_dir=seed$seed
    done
    python scripts/compare_seeds.py seed0 seed1 seed2 --split=test --min_relevance=2

Prints the mean and standard deviation over seeds of every measure of every system, and paired
tests over the queries, each query counted once with its mean over the seeds.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np

from dgr_jax import evaluation
from dgr_jax.corpora import beir, trec
from dgr_jax.corpora.types import ScoredPassage

PAIRS = (("distill", "generate"), ("distill", "control"), ("distill", "bm25"))


def read_run(folder: Path, system: str, split: str) -> dict[str, list[ScoredPassage]]:
    path = folder / "evaluate" / f"{system}.{split}.trec"
    return {ranked.qid: list(ranked.passages) for ranked in trec.runs(path)}


def read_qrels(folder: Path, split: str) -> dict[str, dict[str, int]]:
    judged: dict[str, dict[str, int]] = {}
    for qrel in beir.BeirCollection(str(folder / "prepare" / "collection")).qrels(split):
        judged.setdefault(qrel.qid, {})[qrel.pid] = qrel.relevance
    return judged


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model_dirs", nargs="+", type=Path)
    parser.add_argument("--split", default="test")
    parser.add_argument("--min_relevance", type=int, default=1)
    parser.add_argument("--measures", default="Success@1,Success@10,RR@10")
    args = parser.parse_args()
    measured = [
        json.loads((folder / "evaluate" / "metrics.json").read_text()) for folder in args.model_dirs
    ]
    for system in measured[0]:
        rows = [row[system][args.split] for row in measured]
        cells = [
            f"{name} {np.mean([r[name] for r in rows]):.3f} ± {np.std([r[name] for r in rows]):.3f}"
            for name in rows[0]
        ]
        print(f"{system:10s}", "  ".join(cells))
    qrels = read_qrels(args.model_dirs[0], args.split)
    for a, b in PAIRS:
        if a not in measured[0] or b not in measured[0]:
            continue
        for measure in args.measures.split(","):
            comparison = evaluation.compare_many(
                [read_run(folder, a, args.split) for folder in args.model_dirs],
                [read_run(folder, b, args.split) for folder in args.model_dirs],
                qrels,
                measure,
                min_relevance=args.min_relevance,
            )
            print(f"{a} and {b}: {comparison}")


if __name__ == "__main__":
    main()
