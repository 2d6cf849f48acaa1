"""The files of Dense Passage Retrieval (Karpukhin et al. 2020): Wikipedia in 100-word passages,
question files and the JSON files of its bi-encoder training; also .gz."""

from __future__ import annotations

import ast
import json
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from dgr_jax.corpora import checks, lines
from dgr_jax.corpora.types import Collection, Passage, Qrel, Query

_SITE = "https://dl.fbaipublicfiles.com/dpr"
_HOW = "(data/download_data.py of github.com/facebookresearch/DPR fetches it)"
_HEADER = ["id", "text", "title"]
# A positive passage with this score was marked by a person; the others contain an answer.
_MARKED = 1000


@dataclass(frozen=True)
class DprCollection(Collection):
    """A folder with psgs_w100.tsv and the question files of one data set, or DPR's data folder.

    `dataset` is the name in DPR's files: nq, trivia, webquestions, curatedtrec, squad1. A split
    has judgements where its bi-encoder file (biencoder-<dataset>-<split>.json) is there; its
    positive passages get relevance 2 when a person marked them, else 1. Other splits are
    questions with answers (<dataset>-<split>.qa.csv), measured by answer strings.
    `passages_file`, `judged_file` and `questions_file` give other names; {dataset} and {split}
    stand for theirs.
    """

    folder: str
    dataset: str = "nq"
    passages_file: str = "psgs_w100.tsv"
    judged_file: str = "biencoder-{dataset}-{split}.json"
    questions_file: str = "{dataset}-{split}.qa.csv"

    @property
    def splits(self) -> tuple[str, ...]:
        """The splits of train, dev, test that have judgements here."""
        return tuple(s for s in ("train", "dev", "test") if self._judged(s).find(self._root))

    def check(self, splits: Iterable[str] = ("train", "dev", "test")) -> None:
        """Raises FileNotFoundError naming every missing file: the corpus and those of `splits`.

        Train and dev need their bi-encoder files; of any other split the questions are enough.
        """
        checks.require(self._root, self._wanted(splits), "DprCollection.folder")

    def inputs(self, splits: Iterable[str] = ("train", "dev", "test")) -> dict[str, Path | None]:
        """The corpus and the files of `splits`: name -> file, None where it is missing."""
        return checks.locate(self._root, self._wanted(splits))

    def passages(self) -> Iterator[Passage]:
        """All passages in corpus order."""
        return checks.checked(_passages, self._path(self._corpus), "passage")

    def queries(self, split: str) -> Iterator[Query]:
        """The questions of a split: of its bi-encoder file if it is there, else of its question
        file. The qid is <split>-<number>: the question's place in the JSON file, or its line."""
        judged = self._judged(split).find(self._root)
        path = judged or self._path(self._questions(split))
        parse = _judged_queries if judged else _questions
        return checks.checked(partial(parse, split=split), path, "query")

    def qrels(self, split: str) -> Iterator[Qrel]:
        """The positive passages of a split's questions; FileNotFoundError where it has none."""
        return _qrels(self._path(self._judged(split)), split)

    @property
    def _root(self) -> Path:
        return lines.place(self.folder)

    @property
    def _corpus(self) -> checks.SourceFile:
        name = self.passages_file
        return checks.SourceFile(
            (name, f"wikipedia_split/{name}"),
            "a header id, text, title, then one passage a line, by tabs, quoted as CSV",
            f"{_SITE}/wikipedia_split/psgs_w100.tsv.gz {_HOW}",
        )

    def _wanted(self, splits: Iterable[str]) -> list[checks.SourceFile]:
        wanted = [self._corpus]
        for split in splits:
            judged = self._judged(split)
            enough = split not in ("train", "dev") and not judged.find(self._root)
            wanted.append(self._questions(split) if enough else judged)
        return wanted

    def _judged(self, split: str) -> checks.SourceFile:
        name = self._name(self.judged_file, split)
        short = f"{self.dataset}-{split}.json"
        return checks.SourceFile(
            (name, f"retriever/{short}", short, f"retriever/{name}"),
            'a JSON array of {"question", "answers", "positive_ctxs": [{"passage_id"}]}',
            f"{_SITE}/data/retriever/{name}.gz {_HOW}",
        )

    def _questions(self, split: str) -> checks.SourceFile:
        name = self._name(self.questions_file, split)
        short = f"{self.dataset}-{split}.csv"
        return checks.SourceFile(
            (name, f"retriever/qas/{short}", short, f"retriever/qas/{name}"),
            'question <tab> list of answers (["a", "b"]), one question a line, quoted as CSV',
            f"{_SITE}/data/retriever/{name} {_HOW}",
        )

    def _name(self, form: str, split: str) -> str:
        return form.replace("{dataset}", self.dataset).replace("{split}", split)

    def _path(self, source: checks.SourceFile) -> Path:
        return source.require(self._root, "DprCollection.folder")


def _passages(path: Path) -> Iterator[tuple[int, Passage]]:
    rows = lines.csv_rows(path, tabs_over_lines=False)
    line, header = next(rows, (1, []))
    if header != _HEADER:
        raise lines.error(path, line, f"the columns {lines.shown(header)}", f"the header {_HEADER}")
    for line, fields in rows:
        if len(fields) != len(_HEADER):
            columns = f"{len(fields)} column{'s' * (len(fields) != 1)} ({fields[0][:60]!r} ...)"
            raise lines.error(path, line, columns, "3 columns: id, text, title")
        pid, text, title = fields
        yield line, Passage(pid, text, title)


def _questions(path: Path, split: str) -> Iterator[tuple[int, Query]]:
    for line, fields in lines.csv_rows(path, tabs_over_lines=False):
        if len(fields) != 2:
            columns = f"{len(fields)} column{'s' * (len(fields) != 1)} ({fields[0][:60]!r} ...)"
            raise lines.error(path, line, columns, "2 columns: question and list of answers")
        yield line, Query(f"{split}-{line}", fields[0], _answers(fields[1], path, line))


def _answers(text: str, path: Path, line: int) -> tuple[str, ...]:
    """A list of strings, written as JSON or, in the official files, as a Python list."""
    try:
        answers = lines.parsed(json.loads, text)
    except ValueError:
        answers = _python_list(text)
    if not isinstance(answers, list) or not all(isinstance(answer, str) for answer in answers):
        raise lines.error(path, line, f"the answers {text[:60]!r}", 'a list of strings ["a", "b"]')
    return tuple(answers)


def _python_list(text: str) -> Any:
    """The value of a Python literal, None where there is none."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SyntaxWarning)  # of "\\d" in the answers' own text
        try:
            return ast.literal_eval(text)
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            return None


def _judged_queries(path: Path, split: str) -> Iterator[tuple[int, Query]]:
    for place, (line, record) in enumerate(lines.json_array(path), start=1):
        text = checks.text_field(record, "question", path, line)
        answers = checks.text_list(record, "answers", path, line)
        yield line, Query(f"{split}-{place}", text, answers)


def _qrels(path: Path, split: str) -> Iterator[Qrel]:
    for place, (line, record) in enumerate(lines.json_array(path), start=1):
        relevance: dict[str, int] = {}
        for passage in _positives(record, path, line):
            key = "passage_id" if "passage_id" in passage else "psg_id"
            pid = checks.id_field(passage, key, path, line, "passage")
            grade = 2 if passage.get("score") == _MARKED else 1
            relevance[pid] = max(grade, relevance.get(pid, 0))
        for pid, grade in relevance.items():
            yield Qrel(f"{split}-{place}", pid, grade)


def _positives(record: dict[str, Any], path: Path, line: int) -> list[dict[str, Any]]:
    positives = record.get("positive_ctxs")
    if not isinstance(positives, list) or not all(isinstance(item, dict) for item in positives):
        got = f"'positive_ctxs': {lines.shown(positives)}"
        raise lines.error(path, line, got, 'a list of objects {"passage_id", ...}')
    return positives
