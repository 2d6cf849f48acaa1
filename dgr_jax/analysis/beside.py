"""Two finished MODEL_DIRs beside each other: what differs in settings and in answers."""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from dataclasses import asdict

from dgr_jax import evaluation
from dgr_jax.analysis import inspection
from dgr_jax.analysis.inspection import Inspection, Table
from dgr_jax.analysis.query_values import asked, per_query
from dgr_jax.model_dir import kept
from dgr_jax.stages import evaluate


def settings(a: Inspection, b: Inspection) -> list[str]:
    """The lines of config.gin that differ: those of a begin with '-', those of b with '+'."""
    changed = difflib.unified_diff(_config(a), _config(b), n=0, lineterm="")
    lines = [line for line in changed if line[1:].strip() and line[1] != "#"]
    return [line for line in lines if not line.startswith(("---", "+++", "@@"))]


def _config(made: Inspection) -> list[str]:
    path = kept.opened(made.model_dir / "config.gin")
    return path.read_text(encoding="utf-8").splitlines() if path.is_file() else []


def pairs(a: Inspection, b: Inspection) -> list[tuple[str, str]]:
    """Systems that are compared: those of one name, and the last of each."""
    same = [(system, system) for system in a.systems if system in b.systems]
    return list(dict.fromkeys([*same, (a.systems[-1], b.systems[-1])]))


def splits(a: Inspection, b: Inspection) -> list[str]:
    """The splits that both were measured on."""
    return [split for split in a.splits if split in b.splits]


def compared(a: Inspection, b: Inspection, split: str) -> Table:
    """Paired tests over the questions that both were measured on, and judge in the same way."""
    shared = _shared(a, b, split)
    rows = []
    for system_a, system_b in pairs(a, b) if shared else ():
        ours, theirs = per_query(a, system_a, split), per_query(b, system_b, split)
        for name in ours:
            if name in theirs and _is_compared(name):
                qids = [q for q in ours[name] if q in theirs[name] and q in shared]
                if qids:
                    values = ([part[name][q] for q in qids] for part in (ours, theirs))
                    cells = inspection.compared(asdict(evaluation.compare(name, *values)))
                    rows.append((_pair(system_a, system_b), *cells))
    caption = f"{split}: a against b, paired over the {len(shared):,} queries with equal judgements"
    return Table(caption, ("system", *inspection.COMPARED), rows)


def gains(a: Inspection, b: Inspection, split: str, count: int, text: int) -> Iterator[Table]:
    """Queries that the last system of a answers higher up than that of b, and those of b over a;
    see `inspection.gained`."""
    queries, hits = a.queries(split), (_hits(a, b, split), _hits(b, a, split))
    systems = _pair(a.systems[-1], b.systems[-1])
    for made, better, worse, names in ((a, *hits, "a than by b"), (b, *hits[::-1], "b than by a")):
        qids = inspection.gained(better, worse)
        rows = [
            (
                queries[qid].text,
                made.told(better[qid][1], text),
                *(own[qid][0] if qid in own else None for own in hits),
            )
            for qid in qids[:count]
        ]
        caption = f"{split}: {len(qids)} queries answered higher up by {names} ({systems})"
        if len(qids) > count:
            caption += f"; largest gains first, {count} shown"
        yield Table(caption, ("query", "passage that answers it", "a", "b"), rows)


def _hits(made: Inspection, other: Inspection, split: str) -> dict[str, tuple[int, str]]:
    """The first hits of the last system, of queries that the other judges in the same way."""
    shared = _shared(made, other, split)
    hits = made.first_hits(made.systems[-1], split)
    return {qid: hit for qid, hit in hits.items() if qid in shared}


def _shared(a: Inspection, b: Inspection, split: str) -> set[str]:
    """The qids that both have asked, with the same text, answers, grades and rule of relevance."""
    if a.min_relevance != b.min_relevance:
        return set()
    ours, theirs = a.queries(split), b.queries(split)
    grades, their_grades = a.qrels(split), b.qrels(split)
    return {
        qid
        for qid in set(asked(a, split)).intersection(asked(b, split))
        if ours[qid] == theirs[qid] and grades.get(qid) == their_grades.get(qid)
    }


def _is_compared(measure: str) -> bool:
    return measure in evaluate.COMPARED or evaluation.answer_cutoff(measure) is not None


def _pair(a: str, b: str) -> str:
    return a if a == b else f"{a} against {b}"
