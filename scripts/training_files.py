"""Training files of other tools for retrievers, read and written: Tevatron's, those of
sentence-transformers, and FlagEmbedding's.

    python scripts/training_files.py read train.jsonl --out=FOLDER
    python scripts/training_files.py read train.jsonl --data_dir=FOLDER --out=LISTS
    python scripts/training_files.py write --data_dir=FOLDER --run=run.trec --out=train.jsonl
    python scripts/training_files.py write --data_dir=FOLDER --model_dir=DIR \
        --format=sentence-transformers --negatives=4 --out=train.jsonl

`read` writes queries, judgements (the positives) and, where there are scores, run.trec.gz for
RunTeacher, each score as it is; without --data_dir also a corpus of the passages that are listed,
so that FOLDER is a collection. With it, passages and queries that have no id get that of the same
text in the collection, and passages that it lacks are left out.
`write` takes a run, or the rank lists that a student was distilled from: of each query of the
split the judged passages are the positives, and the first others the negatives.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from itertools import groupby
from operator import itemgetter
from pathlib import Path

import numpy as np

from dgr_jax.corpora import files, lines, store, training_files, trec
from dgr_jax.corpora.beir import BeirCollection, write_beir
from dgr_jax.corpora.training_files import Example, Listed
from dgr_jax.corpora.types import Passage, Qrel, RankList, ScoredPassage
from dgr_jax.model_dir import kept


@dataclass(frozen=True)
class Source:
    """A training file, read again for each file that is made of it; pids: the passages that count,
    None for all; by_text, queries_by_text: key of a text -> id."""

    path: str
    pids: frozenset[str] | None = None
    by_text: dict[str, str] = field(default_factory=dict)
    queries_by_text: dict[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, path: str, data_dir: str | None) -> Source:
        """With the ids of a collection in BEIR layout, if there is one."""
        if data_dir is None:
            return cls(path)
        collection = BeirCollection(data_dir)
        pids, by_text, queries_by_text = set(), {}, {}
        for passage in collection.passages():
            pids.add(passage.pid)
            for text in {passage.contents, passage.text}:
                by_text.setdefault(training_files.key(text), passage.pid)
        for query in collection.all_queries():
            queries_by_text.setdefault(training_files.key(query.text), query.qid)
        return cls(path, frozenset(pids), by_text, queries_by_text)

    def examples(self) -> Iterator[Example]:
        """The queries with a passage that counts."""
        for example in training_files.read(self.path, self.by_text, self.queries_by_text):
            if known := tuple(filter(self.counts, example.passages)):
                yield replace(example, passages=known)

    def counts(self, listed: Listed) -> bool:
        """Whether the passage is in the collection."""
        return self.pids is None or listed.passage.pid in self.pids

    def passages(self) -> Iterator[Passage]:
        """Every passage once; ValueError for one without text, or with two texts."""
        texts: dict[str, str] = {}
        for example in self.examples():
            for passage in (listed.passage for listed in example.passages):
                digits = training_files.key(passage.contents)
                if texts.get(passage.pid) == digits:
                    continue
                what = f"the passage {lines.shown(passage.pid)}"
                if not passage.contents:
                    expected = "a text, or --data_dir, the folder of its collection"
                    raise lines.error(self.path, example.line, f"{what} without text", expected)
                if passage.pid in texts:
                    got = f"{what} with another text than before"
                    raise lines.error(self.path, example.line, got, "one text a passage")
                texts[passage.pid] = digits
                yield passage

    def qrels(self) -> Iterator[Qrel]:
        """The positives; what else is listed was judged by nobody."""
        for example in self.examples():
            for listed in example.passages:
                if listed.positive:
                    yield Qrel(example.query.qid, listed.passage.pid, 1)

    def rank_lists(self, counts: Counter) -> Iterator[RankList]:
        """Those of the queries whose passages have scores."""
        for example in training_files.read(self.path, self.by_text, self.queries_by_text):
            known = list(filter(self.counts, example.passages))
            counts["queries"] += bool(known)
            counts["passages"] += len(example.passages)
            counts["unknown"] += len(example.passages) - len(known)
            scores = {listed.score for listed in known} - {None}
            if scores:
                counts["lists"] += 1
                counts["ordered"] += len(scores) > 1
                scored = (ScoredPassage(item.passage.pid, item.score) for item in known)
                yield RankList(example.query.qid, tuple(scored))


def read(args: argparse.Namespace) -> None:
    with files.rereadable(args.file):
        source, counts = Source.of(args.file, args.data_dir), Counter()
        run = args.out / "run.trec.gz"
        trec.write_run(run, source.rank_lists(counts), args.tag, exact=True)
        if not counts["queries"]:
            run.unlink()
            raise ValueError(f"{args.file}: none of its passages is in {args.data_dir}")
        passages = source.passages() if args.data_dir is None else None
        queries = (example.query for example in source.examples())
        write_beir(args.out, passages, queries, {args.split: source.qrels()})
    if not counts["ordered"]:  # its ranks would be taken for an order
        run.unlink()
        print("no query has passages of different scores: no run is written", file=sys.stderr)
    if counts["unknown"]:
        print(
            f"left out {counts['unknown']:,} of {counts['passages']:,} places: their passages are "
            f"not in {args.data_dir}",
            file=sys.stderr,
        )
    print(f"{args.out}: {counts['queries']:,} queries, {counts['lists']:,} with scores")


def taught(model_dir: Path, pids: list[str]) -> Iterator[RankList]:
    """The rank lists that the student of an experiment was distilled from, those of a query in
    one."""
    path = model_dir / "teach" / "rank_lists.npz"
    with kept.reading(path), np.load(path) as stored:
        columns = [stored[name].tolist() for name in ("qids", "passages", "teacher_scores")]
    for qid, rows in groupby(zip(*columns, strict=True), key=itemgetter(0)):
        scores = {
            pids[row]: score
            for _, listed, teacher_scores in rows
            for row, score in zip(listed, teacher_scores, strict=True)
            if row >= 0
        }
        yield RankList(qid, tuple(ScoredPassage(*item) for item in scores.items()))


def chosen(
    rank_lists: Iterable[RankList], args: argparse.Namespace, passages: store.PassageStore
) -> Iterator[Example]:
    """The queries of the split with scored positives and enough negatives."""
    collection = BeirCollection(args.data_dir)
    queries = {query.qid: query for query in collection.queries(args.split)}
    qrels = trec.qrels_in_memory(collection.qrels(args.split))
    same = args.format == "sentence-transformers"  # the number of negatives on every line
    for ranked in rank_lists:
        if ranked.qid not in queries:
            continue
        grades = qrels[ranked.qid]
        listed = [
            Listed(
                passages[passages.index_of(item.pid)],
                grades.get(item.pid, 0) >= args.min_relevance,
                item.score,
            )
            for item in ranked.passages
            if item.pid in passages
        ]
        positives = [item for item in listed if item.positive]
        negatives = [item for item in listed if not item.positive][: args.negatives]
        if positives and negatives and not (same and len(negatives) < args.negatives):
            yield Example(queries[ranked.qid], (*positives, *negatives))


def write(args: argparse.Namespace) -> None:
    collection, queries = BeirCollection(args.data_dir), set()
    collection.check([args.split])
    wanted = len({qrel.qid for qrel in collection.qrels(args.split)})

    def counted(examples: Iterable[Example]) -> Iterator[Example]:
        for example in examples:
            queries.add(example.query.qid)
            yield example
        if not queries:
            raise ValueError(
                f"{args.run or args.model_dir}: no query of the split {args.split!r} has a "
                "positive with a score and enough negatives"
            )

    with tempfile.TemporaryDirectory() as folder:
        if args.run:
            passages = store.write(collection.passages(), Path(folder) / "passages")
            lists = trec.runs(args.run, ties="rank")
        else:
            passages = store.PassageStore(args.model_dir / "prepare" / "passages")
            lists = taught(args.model_dir, passages.pids)
        examples = counted(chosen(lists, args, passages))
        rows = training_files.write(args.out, args.format, examples)
    print(
        f"{args.out}: {rows:,} lines of {len(queries):,} of {wanted:,} queries; the others have no "
        "scored positive, or too few negatives"
    )


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    commands = made.add_subparsers(required=True)
    reads = commands.add_parser("read", help="a training file as run, judgements and queries")
    reads.set_defaults(command=read)
    reads.add_argument("file", help="JSON lines, also .gz; its fields say whose form it has")
    reads.add_argument("--data_dir", help="the collection (BEIR layout) whose passages these are")
    reads.add_argument("--out", required=True, type=Path, help="a folder")
    reads.add_argument("--split", default="train", help="of the judgements that are written")
    reads.add_argument("--tag", default="teacher", help="the last column of the run")
    writes = commands.add_parser("write", help="a run or rank lists as a training file")
    writes.set_defaults(command=write)
    writes.add_argument("--data_dir", required=True, help="the collection (BEIR layout)")
    lists = writes.add_mutually_exclusive_group(required=True)
    lists.add_argument("--run", help="a TREC run with the scores of a teacher")
    lists.add_argument("--model_dir", type=Path, help="a finished experiment's rank lists")
    writes.add_argument("--out", required=True, type=Path, help="the file; .gz packs it")
    writes.add_argument("--split", default="train", help="whose judgements say what is positive")
    writes.add_argument("--min_relevance", type=int, default=1, help="grade of a positive")
    writes.add_argument("--format", choices=training_files.FORMATS, default="tevatron")
    writes.add_argument("--negatives", type=int, help="at most so many; all without it")
    return made


def main() -> None:
    program = parser()
    args = program.parse_args()
    if args.command is write:
        if args.negatives is not None and args.negatives < 1:
            program.error(f"--negatives: got {args.negatives}, expected at least 1")
        if args.format == "sentence-transformers" and args.negatives is None:
            program.error("--format=sentence-transformers needs --negatives, the same for all")
    args.command(args)


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
