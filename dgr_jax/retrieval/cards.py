"""The model card of a retriever, made of what its stages left: data, sizes, measures, settings."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from dgr_jax import display
from dgr_jax.model_dir import records

_LIMITS = """\
It finds passages of the collection that it was trained on, and no others: a passage that is added
later is not found. Scores order the passages of one question and are no probabilities of being
right. The measures hold for questions like those that they were taken on."""


def card(folder: Path, systems: Sequence[str], license: str, datasets: Sequence[str]) -> str:
    """Markdown with the fields that the hub reads. folder: of the retriever; systems: trained ones
    in it."""
    report = _read(folder / "prepare/report.json")
    measures = _read(folder / "evaluate/metrics.json")
    body = [f"# A retriever over {report.get('passages', 0):,} passages", "", _opening(systems[-1])]
    body += ["", "## Data", "", *_data(report), "", "## Model", "", *_model(folder, systems)]
    for split in dict.fromkeys(split for row in measures.values() for split in row):
        body += ["", f"## Measures on the split {split}", "", *_table(measures, split)]
    body += ["", *_tests(_read(folder / "evaluate/comparisons.json"))]
    body += ["## Made by", "", "`python -m dgr_jax.train --gin_file=config.gin --model_dir=DIR`,"]
    body += [f"where config.gin is the file in this folder. Licence: {license}."]
    body += ["", "## Limits", "", _LIMITS, ""]
    fields = _fields(measures, systems[-1], license, datasets)
    front = [f"{name}: {json.dumps(value)}" for name, value in fields.items()]
    return "\n".join(["---", *front, "---", "", *body])


def _opening(system: str) -> str:
    return (
        "```python\nfrom dgr_jax import Retriever\n\n"
        'retriever = Retriever.from_hub("REPOSITORY")  # or a folder\n'
        'retriever.search(["a question"])\n```\n\n'
        f"`{system}` is the best of its trained students."
    )


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def _data(report: Mapping[str, Any]) -> Iterator[str]:
    yield f"- passages: {report.get('passages', 0):,}"
    for split, count in report.get("queries", {}).items():
        yield f"- queries of the split {display.markdown_cell(split)}: {count:,}"
    for source, count in report.get("examples", {}).items():
        yield f"- examples made of {source.replace('_', ' ')}: {count:,}"


def _model(folder: Path, systems: Sequence[str]) -> Iterator[str]:
    for system in systems:
        model = _read(folder / system / records.STUDENT).get("model", {})
        shown = {k: v for k, v in {**model, **model.get("t5", {})}.items() if k != "t5"}
        size = sum(p.stat().st_size for p in (folder / system).glob("*.safetensors"))
        yield f"- {system}: {size:,} bytes of parameters"
        yield from (f"  - {k}: {display.markdown_cell(v)}" for k, v in shown.items())


def _table(measures: Mapping[str, Any], split: str) -> Iterator[str]:
    rows = {system: row[split] for system, row in measures.items() if split in row}
    names = list(dict.fromkeys(name for row in rows.values() for name in row))
    yield f"| system | {' | '.join(map(display.markdown_cell, names))} |"
    yield f"|---|{'---|' * len(names)}"
    for system, row in rows.items():
        cells = (f"{row[name]:.4f}" if name in row else "-" for name in names)
        yield f"| {display.markdown_cell(system)} | {' | '.join(cells)} |"


def _tests(comparisons: Mapping[str, Any]) -> Iterator[str]:
    """Lines on the paired randomization tests of every split."""
    for split, rows in comparisons.items():
        yield f"Paired randomization tests on {split}:"
        yield ""
        for row in rows:
            yield (
                f"- {display.markdown_cell(row['systems'])}, {row['measure']}: "
                f"{row['difference']:+.4f}, p = {row['p_value']:.3f}"
            )
        yield ""


def _fields(
    measures: Mapping[str, Any], system: str, license: str, datasets: Sequence[str]
) -> dict[str, Any]:
    """What the hub reads."""
    results: list[dict[str, Any]] = [
        {
            "task": {"type": "text-retrieval"},
            "dataset": {"type": next(iter(datasets), "own"), "name": split, "split": split},
            "metrics": [{"type": name, "value": value} for name, value in row.items()],
        }
        for split, row in measures.get(system, {}).items()
    ]
    names = list(dict.fromkeys(m["type"] for r in results for m in r["metrics"]))
    fields: dict[str, Any] = {"library_name": "dgr_jax", "pipeline_tag": "text-ranking"}
    fields |= {"license": license, "tags": ["generative-retrieval", "jax"]}
    fields |= {"datasets": list(datasets)} if datasets else {}
    fields |= {"metrics": names} if names else {}
    return fields | ({"model-index": [{"name": system, "results": results}]} if results else {})
