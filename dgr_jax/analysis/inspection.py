"""A finished MODEL_DIR as tables for people: what was done, what came out, and for which queries.

An `Inspection` reads the files that the stages left; it runs no student and measures nothing again.
`answers` asks a student.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from dgr_jax.analysis.tables import Table
from dgr_jax.corpora import trec
from dgr_jax.corpora.beir import BeirCollection
from dgr_jax.corpora.store import PassageStore
from dgr_jax.corpora.types import Passage, Query, RankList
from dgr_jax.data.vocabulary import Vocabulary
from dgr_jax.identifiers.table import IdentifierTable
from dgr_jax.model_dir import kept
from dgr_jax.retrieval.retriever import Retriever

STAGES = {
    "prepare": "reads the collection; makes vocabulary, identifiers, trie and training examples",
    "start": "makes token embeddings from the passages",
    "pretrain": "the student learns to fill in spans of the passages",
    "generate": "the student learns to write identifiers",
    "candidates": "the student retrieves passages for the training queries",
    "negatives": "finds passages that are no answers, such as those of BM25",
    "teach": "the teacher orders those passages; rank lists are cut from its order",
    "distill": "the student learns the teacher's order",
    "control": "the student trains on without a teacher, for as many steps as distill",
    "dense": "the encoder learns to tell answers from other passages",
    "mine": "the encoder finds the negatives that it learns from next",
    "refresh": "the encoder trains on with these",
    "evaluate": "every system answers the test queries",
}

COMPARED = ("measure", "a", "b", "a - b", "p", "better", "worse", "equal")


@dataclass(frozen=True)
class Inspection:
    """What one experiment of any kind left in its MODEL_DIR.

    measured: system -> split -> measure -> value; systems and splits are in its order.
    identifiers: one of each passage; None where there are several, or none.
    """

    model_dir: Path
    measured: dict[str, dict[str, dict[str, float]]]
    store: PassageStore
    identifiers: IdentifierTable | None
    vocabulary: Vocabulary

    @classmethod
    def load(cls, model_dir: str | Path) -> Inspection:
        """Open a MODEL_DIR. Raises FileNotFoundError when its stage evaluate is not finished."""
        model_dir = Path(model_dir)
        if _read(model_dir / "evaluate" / "stage.json").get("status") != "done":
            here = [s for s in STAGES if (model_dir / s / "stage.json").is_file()]
            raise FileNotFoundError(
                f"no finished experiment in {model_dir.absolute()}: expected its stage evaluate to "
                f"be done, found {'stages ' + ', '.join(here) if here else 'no stage'}; run python "
                f"-m dgr_jax.train --gin_file=FILE --model_dir={model_dir}, or set MODEL_DIR"
            )
        prepared = model_dir / "prepare"
        identifiers = _read(prepared / "report.json").get("identifiers", {})
        return cls(
            model_dir,
            _read(model_dir / "evaluate" / "metrics.json"),
            PassageStore(prepared / "passages"),
            IdentifierTable.load(prepared / "identifiers") if "view" in identifiers else None,
            Vocabulary.load(prepared),
        )

    @property
    def systems(self) -> list[str]:
        return list(self.measured)

    @property
    def rivals(self) -> list[tuple[str, str]]:
        """The last system with each other that was trained, or with BM25 where there is none."""
        *others, last = self.systems
        trained = [system for system in others if (self.model_dir / system).is_dir()]
        return [(last, other) for other in trained or others]

    @property
    def splits(self) -> list[str]:
        return list(next(iter(self.measured.values())))

    @cached_property
    def min_relevance(self) -> int:
        """The grade from which a judged passage counted as relevant in the evaluate stage."""
        return self.settings["min_relevance"]

    @cached_property
    def settings(self) -> dict[str, Any]:
        """The settings of the evaluate stage, as its record describes them."""
        return _read(self.model_dir / "evaluate" / "stage.json")["settings"]["evaluate"]

    def plot(self, name: str) -> Path:
        """The PNG `success_at_k` or `training_curves`."""
        return kept.opened(self.model_dir / "evaluate" / f"{name}.png")

    def stages(self) -> Table:
        """What each stage did, whether it is done, and how long it took."""
        rows, total = [], 0.0
        others = (path.parent.name for path in sorted(self.model_dir.glob("*/stage.json")))
        for stage, does in (dict.fromkeys(others, "") | STAGES).items():
            if not (record := _read(self.model_dir / stage / "stage.json")):
                continue  # of another kind of experiment
            seconds = record.get("seconds")
            total += seconds or 0.0
            shown = None if seconds is None else round(seconds)
            rows.append((stage, does, record["status"], shown))
        columns = ("stage", "what it does", "status", "seconds")
        return Table(f"Stages: {total / 60:.1f} minutes in all", columns, rows)

    def collection(self) -> Table:
        """Counts of passages, queries, judgements and training examples."""
        report = _read(self.model_dir / "prepare" / "report.json")
        rows = [("passages", report["passages"])]
        for name in ("queries", "qrels", "examples"):
            rows += [(f"{name}: {part}", count) for part, count in report[name].items()]
        rows.append(("text pieces of the vocabulary", report["vocabulary"]["text"]))
        return Table("Collection", ("what", "how many"), rows)

    def identifier_report(self) -> Table:
        """How many identifiers there are, how long, and how many passages share one; of several
        views, of each."""
        report = self._identifiers
        rows = [(_words(k), v) for k, v in report.items() if not isinstance(v, (str, list, dict))]
        for view, part in report.items():
            if isinstance(part, dict):
                rows += [
                    (_words(f"{view}: {k}"), v) for k, v in part.items() if not isinstance(v, str)
                ]
        kinds = report.get("view") or ", ".join(sorted(report.keys() & {"title", "body", "query"}))
        return Table(f"Identifiers: {kinds or 'none'}", ("what", "value"), rows)

    @property
    def _identifiers(self) -> dict[str, Any]:
        return _read(self.model_dir / "prepare" / "report.json").get("identifiers", {})

    def code_usage(self) -> Table:
        """Codes in use at each position of the identifiers; no rows for identifiers of text."""
        levels = self._identifiers.get("levels", [])
        columns = ("passages", "codes", "entropy", "perplexity", "largest_share")
        rows = [
            (place, *(level[column] for column in columns))
            for place, level in enumerate(levels, start=1)
        ]
        return Table("Use of codes", ("position", *map(_words, columns)), rows)

    def groups(self, count: int = 5, titles: int = 6) -> Table:
        """The identifiers' largest groups with the same first token, and passages in them; no rows
        where a passage has not just one."""
        caption, columns = (
            "Largest groups with one first token",
            ("first token", "passages", "such as"),
        )
        if self.identifiers is None:
            return Table(caption, columns, ())
        first = np.repeat(self.identifiers.tokens[:, 0], np.diff(self.identifiers.offsets))
        tokens, sizes = np.unique(first, return_counts=True)
        rows = []
        for place in np.argsort(-sizes, kind="stable")[:count]:
            members = self.identifiers.passages[first == tokens[place]][:titles]
            names = "; ".join(_name(self.store[int(i)]) for i in members)
            rows.append((self.vocabulary.decode([int(tokens[place])]), int(sizes[place]), names))
        return Table(caption, columns, rows)

    def teacher(self) -> Table:
        """How far the teacher covers the candidates and agrees with the judgements, by the source
        of the queries; no rows where there is none."""
        sources = _read(self.model_dir / "teach" / "report.json").get("teacher", {})
        names = next(iter(sources.values()), {})
        rows = [(_words(k), *(part[k] for part in sources.values())) for k in names]
        return Table("Teacher", ("what", *map(_words, sources)), rows)

    def rank_list_counts(self) -> Table:
        """How many rank lists were made, and what was left out."""
        counts = _read(self.model_dir / "teach" / "report.json").get("lists", {})
        return Table("Rank lists", ("what", "count"), [(_words(k), v) for k, v in counts.items()])

    def rank_lists(self, count: int = 3) -> list[Table]:
        """The first rank lists that the student was distilled from, in the teacher's order."""
        path = self.model_dir / "teach" / "rank_lists.npz"
        if not path.is_file():
            return []
        with kept.reading(path), np.load(path) as stored:
            names = ("texts", "passages", "teacher_scores", "positives")
            lists = [stored[name][:count] for name in names]
        return [self._rank_list(*rank_list) for rank_list in zip(*lists, strict=True)]

    def _rank_list(self, text: str, passages: Any, scores: Any, positive: int) -> Table:
        rows = [
            (rank, _name(self.store[int(i)]), float(score), "yes" if i == positive else "")
            for rank, (i, score) in enumerate(zip(passages, scores, strict=True), start=1)
            if i >= 0
        ]
        columns = ("rank", "passage", "teacher's score", "judged best")
        return Table(f"Rank list: {text}", columns, rows)

    def measures(self, split: str | None = None) -> Table:
        """Every measure of every system; the best of each measure is bold."""
        split = self._split(split)
        values = {system: by_split[split] for system, by_split in self.measured.items()}
        names = list(dict.fromkeys(name for row in values.values() for name in row))
        rows: list[Any] = [
            (system, *(row.get(name) for name in names)) for system, row in values.items()
        ]
        best = {
            (place, i)
            for i in range(1, len(names) + 1)
            for place, row in enumerate(rows)
            if row[i] is not None and row[i] == max(r[i] for r in rows if r[i] is not None)
        }
        caption = f"{split}: relevant from grade {self.min_relevance}"
        return Table(caption, ("system", *names), rows, frozenset(best))

    def comparisons(self, split: str | None = None) -> Table:
        """The paired tests between systems."""
        split = self._split(split)
        rows = [
            (c["systems"], *compared(c))
            for c in _read(self.model_dir / "evaluate" / "comparisons.json")[split]
        ]
        return Table(f"{split}: paired over the queries", ("a against b", *COMPARED), rows)

    def gains(
        self, a: str, b: str, split: str | None = None, count: int = 10, text: int = 0
    ) -> Table:
        """Queries that system a answers higher up than system b, largest gains first; see `gained`.

        The passage shown is the one that a found, with at most so many characters of its text.
        """
        split = self._split(split)
        ranks = {system: self.first_hits(system, split) for system in dict.fromkeys((a, b))}
        ranks |= {s: self.first_hits(s, split) for s in self.systems if s not in ranks}
        better, queries = gained(ranks[a], ranks[b]), self.queries(split)
        rows = [
            (
                queries[qid].text,
                self.told(ranks[a][qid][1], text),
                *(ranks[system].get(qid, (None,))[0] for system in self.systems),
            )
            for qid in better[:count]
        ]
        caption = f"{split}: {len(better)} queries answered higher up by {a} than by {b}"
        if len(better) > len(rows):
            caption += f"; largest gains first, {len(rows)} shown"
        return Table(caption, ("query", "passage that answers it", *self.systems), rows)

    def told(self, pid: str, text: int) -> str:
        """The name of a passage, and at most so many characters of its text."""
        passage = self.store[self.store.index_of(pid)]
        shown = _short(passage.text, text) if text and passage.title else ""
        return f"{_name(passage)}: {shown}" if shown else _name(passage)

    def run(self, system: str, split: str) -> Iterator[RankList]:
        """What a system has found for each query; those without passages are missing."""
        if system not in self.measured:
            raise ValueError(f"system: got {system!r}, expected one of {', '.join(self.systems)}")
        return trec.runs(kept.opened(self.model_dir / "evaluate" / f"{system}.{split}.trec"))

    def first_hits(self, system: str, split: str) -> dict[str, tuple[int, str]]:
        """qid -> rank and pid of the first relevant passage, for queries that have one."""
        relevant = self._relevant(split)
        hits = {}
        for ranked in self.run(system, split):
            wanted = relevant.get(ranked.qid, ())
            for rank, passage in enumerate(ranked.passages, start=1):
                if passage.pid in wanted:
                    hits[ranked.qid] = rank, passage.pid
                    break
        return hits

    def _relevant(self, split: str) -> dict[str, set[str]]:
        relevant: dict[str, set[str]] = {}
        for qid, grades in self.qrels(split).items():
            if pids := {pid for pid, grade in grades.items() if grade >= self.min_relevance}:
                relevant[qid] = pids
        return relevant

    def qrels(self, split: str) -> dict[str, dict[str, int]]:
        """qid -> pid -> grade."""
        grades: dict[str, dict[str, int]] = {}
        for qrel in self._judged.qrels(split):
            grades.setdefault(qrel.qid, {})[qrel.pid] = qrel.relevance
        return grades

    def queries(self, split: str) -> dict[str, Query]:
        return {query.qid: query for query in self._judged.queries(split)}

    @property
    def _judged(self) -> BeirCollection:
        kept.whole(self.model_dir / "prepare" / "collection")
        return BeirCollection(str(self.model_dir / "prepare" / "collection"))

    def _split(self, split: str | None) -> str:
        if split is not None and split not in self.splits:
            raise ValueError(f"split: got {split!r}, expected one of {', '.join(self.splits)}")
        if not self.splits:
            raise ValueError(f"{self.model_dir}: nothing was measured, there was no test split")
        return split or self.splits[0]


def gained(a: Mapping[str, tuple[int, str]], b: Mapping[str, tuple[int, str]]) -> list[str]:
    """The qids whose first relevant passage stands higher up in a than in b, largest gains first.

    A gain is the difference of 1/rank, 0 where there is none. a, b: of `Inspection.first_hits`.
    """
    gains = {qid: 1 / a[qid][0] - (1 / b[qid][0] if qid in b else 0.0) for qid in a}
    return sorted((qid for qid in gains if gains[qid] > 0), key=lambda qid: (-gains[qid], qid))


def compared(comparison: Mapping[str, Any]) -> tuple[Any, ...]:
    """The cells of a paired test under COMPARED."""
    p = comparison["p_value"]
    names = ("measure", "mean_a", "mean_b", "difference", "p_value", "wins", "losses", "ties")
    cells = {name: comparison[name] for name in names}
    return tuple((cells | {"p_value": "< 0.001" if p < 0.001 else f"{p:.3f}"}).values())


def answers(retriever: Retriever, question: str, k: int = 10) -> Table:
    """The best passages for a question: k, or as many as the retriever's beams hold."""
    (hits,) = retriever.search([question], min(k, retriever.decoder.most_passages))
    rows = [
        (hit.rank, hit.title or hit.pid, hit.score, hit.identifier, _short(hit.text, 160))
        for hit in hits
    ]
    return Table(question, ("rank", "title", "score", "identifier", "snippet"), rows)


def _read(path: Path) -> Any:
    """A JSON file, {} where there is none."""
    return kept.read_json(path) if kept.opened(path).is_file() else {}


def _words(name: str) -> str:
    return name.replace("_", " ")


def _name(passage: Passage) -> str:
    return passage.title or _short(passage.text, 60) or passage.pid


def _short(text: str, width: int) -> str:
    return textwrap.shorten(text, width, placeholder=" ...")
