"""Labels that a ranker gives, beside those of people: a copy of a collection in BEIR layout with
one more split of judgements, for studies of label mixtures (studies/positives_labels.gin).

    python scripts/weak_labels.py --data_dir=FOLDER --out=DIR --split=train --name=weak --depth=4
    python scripts/weak_labels.py --data_dir=FOLDER --out=DIR --run=llm.trec.gz

Of each query of the split, the first `depth` passages of a TREC run, or without one of BM25, are
judged relevant. Prints how many of them people judged so too.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterable
from pathlib import Path

from dgr_jax.corpora import store, trec
from dgr_jax.corpora.beir import BeirCollection, write_beir
from dgr_jax.corpora.types import Qrel, RankList
from dgr_jax.retrieval.bm25 import Bm25


def ranked_by_bm25(collection: BeirCollection, split: str, depth: int) -> Iterable[RankList]:
    """The first passages that BM25 finds for every query of the split."""
    texts = {query.qid: query.text for query in collection.queries(split)}
    with tempfile.TemporaryDirectory() as folder:
        index = Bm25().fit(store.write(collection.passages(), Path(folder) / "passages"))
        found = index.search(texts, depth + 1)  # a query may be a passage itself
    return [RankList(qid, tuple(listed)) for qid, listed in found.items()]


def labels(runs: Iterable[RankList], qids: set[str], depth: int) -> list[Qrel]:
    """The first passages of each of these queries, as judgements of grade 1; a passage with the id
    of the query, which is the query itself, is none of them."""
    return [
        Qrel(ranked.qid, pid, 1)
        for ranked in runs
        if ranked.qid in qids
        for pid in [p.pid for p in ranked.passages if p.pid != ranked.qid][:depth]
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data_dir", required=True)
    parser.add_argument("--out", required=True, type=Path)
    parser.add_argument("--split", default="train", help="whose queries are labelled")
    parser.add_argument("--name", default="weak", help="of the split that is written")
    parser.add_argument("--run", type=Path, help="a TREC run; without it, BM25 ranks")
    parser.add_argument("--depth", type=int, default=4)
    args = parser.parse_args()
    if args.depth < 1:
        parser.error(f"--depth: got {args.depth}, expected at least 1")
    collection = BeirCollection(args.data_dir)
    collection.check([args.split])
    if args.name in collection.splits:
        parser.error(f"--name: {args.data_dir} has a split {args.name!r} already")
    qrels = {split: list(collection.qrels(split)) for split in collection.splits}
    known = {(qrel.qid, qrel.pid) for qrel in qrels[args.split] if qrel.relevance > 0}
    qids = {qid for qid, _ in known}
    runs = trec.runs(args.run) if args.run else ranked_by_bm25(collection, args.split, args.depth)
    made = labels(runs, qids, args.depth)
    if not made:
        parser.error(f"--run: {args.run or 'BM25'} has no query of the split {args.split!r}")
    write_beir(args.out, collection.passages(), collection.all_queries(), qrels | {args.name: made})
    shared = sum((qrel.qid, qrel.pid) in known for qrel in made)
    queries = len({qrel.qid for qrel in made})
    print(
        f"{args.out}/qrels/{args.name}.tsv: {len(made):,} labels of {queries:,} of {len(qids):,} "
        f"queries; {shared / len(made):.1%} of them judged relevant in {args.split!r}, which has "
        f"{len(known):,}"
    )


if __name__ == "__main__":
    main()
