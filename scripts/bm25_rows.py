"""BM25 of stems and of words on the test questions of an experiment, with paired tests between
them: what its students must be better than, in seconds and without training.

    python scripts/bm25_rows.py --gin_file=quickstart.gin
    python scripts/bm25_rows.py --gin_file=beir.gin --data_dir=FOLDER --gin.Bm25.k1=1.2
"""

from __future__ import annotations

import dataclasses
import logging
import sys
import tempfile
from pathlib import Path

from rich.console import Console

from dgr_jax import evaluation
from dgr_jax.config import cli, gin_files
from dgr_jax.corpora import store, trec
from dgr_jax.retrieval import self_hits
from dgr_jax.stages import judged

logger = logging.getLogger(__name__)

COMPARED = ("RR@10", "nDCG@10")


def main() -> None:
    parser = cli.parser("train", __doc__.partition("\n\n")[0])
    parser.prog = "python scripts/bm25_rows.py"
    experiment = gin_files.load_experiment(*cli.parse(parser), keep=False, fill=True)
    settings, collection = experiment.evaluate, experiment.collection
    rows = {
        "bm25": settings.baseline,
        "bm25 of words": dataclasses.replace(settings.baseline, stemmer=""),
    }
    console = Console(width=None if sys.stdout.isatty() else 200)
    prepare = experiment.prepare
    collection.check(prepare.splits)
    with tempfile.TemporaryDirectory() as folder:
        passages = store.write(collection.passages(), Path(folder) / "passages")
        indexes = {name: bm25.fit(passages) for name, bm25 in rows.items()}
        asked = judged.read(collection, prepare, passages)
        for line in judged.readable(asked.report, prepare):
            logger.info("%s", line)
        for split in prepare.test_splits:
            if split not in asked.qrels:
                raise ValueError(f"split {split!r} has answers alone, expected judgements")
            queries = {query.qid: query.text for query in asked.queries[split].values()}
            qrels = trec.qrels_in_memory(asked.qrels[split])
            own = judged.self_hits(prepare, queries, passages, qrels)
            measures, depth = (*settings.measures, *COMPARED), settings.search.depth
            values = {}
            for name, index in indexes.items():
                run = self_hits.without(index.search(queries, depth + bool(own)), own, depth)
                values[name] = evaluation.per_query(
                    run, qrels, measures, min_relevance=settings.min_relevance
                )
            means = {name: evaluation.means(by_query) for name, by_query in values.items()}
            console.print(evaluation.measures_table(means, title=f"{split}, {len(queries):,}"))
            for measure in COMPARED:
                pair = ([*by_query[measure].values()] for by_query in values.values())
                comparison = evaluation.compare(measure, *pair)
                console.print(f"bm25 and bm25 of words: {comparison}", soft_wrap=True)


if __name__ == "__main__":
    cli.main(lambda _: main())
