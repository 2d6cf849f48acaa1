"""One self-contained HTML file of a finished experiment, or of two beside each other.

It fetches nothing: plots are part of it, and its policy forbids other hosts and scripts. Every text
of the data is escaped.
"""

from __future__ import annotations

import base64
import html
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from dgr_jax import display
from dgr_jax.analysis import beside, query_values
from dgr_jax.analysis.inspection import Inspection
from dgr_jax.analysis.tables import Table
from dgr_jax.corpora import lines
from dgr_jax.model_dir.measurements import read_kept

QUERIES = 20  # of each table of wins and losses
TEXT = 300  # characters of a passage

_PLOTS = {
    "success_at_k": "Share of queries with a relevant passage among the first k, by system",
    "training_curves": "Losses and validation over the steps of each training stage",
}
_HEAD = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; \
style-src 'unsafe-inline'; img-src data:">
<title>{title}</title>
<style>
:root {{ color-scheme: light dark; font-family: system-ui, sans-serif; line-height: 1.4; }}
body {{ max-width: 75em; margin: auto; padding: 1em; }}
h2 {{ border-bottom: 1px solid; margin-top: 2em; overflow-wrap: anywhere; }}
table {{ border-collapse: collapse; }}
tr {{ border-bottom: 1px solid #8886; }}
img {{ max-width: 100%; background: white; }}
div, pre {{ overflow-x: auto; }}
</style>
</head>
<body>
"""


def write(model_dirs: Sequence[str | os.PathLike], output: str | os.PathLike) -> None:
    """Writes the page of one MODEL_DIR, or of two.

    Raises FileNotFoundError for one whose stage evaluate is not finished, ValueError for another
    number of them, and OSError where `output` cannot be written.
    """
    if not 1 <= len(model_dirs) <= 2:
        raise ValueError(f"--model_dir: got {len(model_dirs)} of them, expected one or two")
    if len(model_dirs) == 2 and os.path.realpath(model_dirs[0]) == os.path.realpath(model_dirs[1]):
        raise ValueError(f"--model_dir: got {model_dirs[0]} twice, expected two experiments")
    text = page([Inspection.load(Path(folder)) for folder in model_dirs])
    with lines.writing(output) as handle:
        handle.write(text.encode())


def page(experiments: Sequence[Inspection]) -> str:
    """The HTML of one experiment, or of two."""
    names = [str(made.model_dir) for made in experiments]
    title = "Report of " + " and ".join(names)
    parts = [f"<h1>{_escaped(title)}</h1>"]
    if len(experiments) == 2:
        parts += _comparison(*experiments)
    for made, name in zip(experiments, names, strict=True):
        parts += [f"<h2>{_escaped(name)}</h2>", *_experiment(made)]
    return _HEAD.format(title=_escaped(title)) + "\n".join(parts) + "\n</body>\n</html>\n"


def _experiment(made: Inspection) -> Iterator[str]:
    yield "<h3>Results</h3>"
    if not made.splits:
        yield "<p>Nothing was measured: there was no test split.</p>"
    for split in made.splits:
        yield from _tables([intervals(made, split), made.comparisons(split)])
    if made.splits:
        yield "<p>p: of each test alone, not corrected for how many there are.</p>"
    yield "<h3>Curves</h3>"
    yield from _plots(made)
    yield "<h3>Wins and losses</h3>"
    for split in made.splits:
        *others, last = made.systems
        for other in others:
            for better, worse in ((last, other), (other, last)):
                yield _wide(made.gains(better, worse, split, QUERIES, TEXT))
    yield "<h3>Identifiers</h3>"
    yield from _tables([made.identifier_report(), made.code_usage(), made.groups()])
    yield "<h3>Teacher</h3>"
    yield from _tables([made.teacher(), made.rank_list_counts()])
    yield "<h3>Costs</h3>"
    yield from _tables([made.stages(), costs(made), made.collection()])


def intervals(made: Inspection, split: str) -> Table:
    """Every measure of every system, with the interval that 95% of the bootstrap over the queries
    lie in."""
    names = list(dict.fromkeys(n for by_split in made.measured.values() for n in by_split[split]))
    rows, counts = [], []
    for system, by_split in made.measured.items():
        values = query_values.per_query(made, system, split)
        counts += [len(of_queries) for of_queries in values.values()]
        cells = []
        for name in names:
            mean = by_split[split].get(name)
            shown = "" if mean is None else f"{mean:.3f}"
            if shown and values.get(name):
                _, low, high = query_values.interval(list(values[name].values()))
                shown += f" ({low:.3f} to {high:.3f})"
            cells.append(shown or None)
        rows.append((system, *cells))
    caption = (
        f"{split}: {max(counts, default=0):,} queries, relevant from grade {made.min_relevance}; "
        "in brackets, 95% of the bootstrap over the queries"
    )
    return Table(caption, ("system", *names), rows)


def costs(made: Inspection) -> Table:
    """What a study has measured of the costs of each system; no rows where none has."""
    measured = {
        system: read_kept(made.model_dir / "evaluate" / f"costs-{system}.json").get("found", {})
        for system in made.systems
    }
    names = list(dict.fromkeys(name for row in measured.values() for name in row))
    rows = [(s, *(row.get(name) for name in names)) for s, row in measured.items() if row]
    return Table("Costs, on the device that measured them", ("system", *names), rows)


def _comparison(a: Inspection, b: Inspection) -> Iterator[str]:
    yield "<h2>Beside each other</h2>"
    for letter, made in (("a", a), ("b", b)):
        yield f"<p>{letter}: {_escaped(str(made.model_dir))}, {len(made.store):,} passages</p>"
    shared = beside.splits(a, b)
    if not shared:
        yield "<p>They were measured on no split of one name: there is nothing to compare.</p>"
    for split in shared:
        table = beside.compared(a, b, split)
        if not table.rows:
            yield (
                f"<p>{_escaped(split)}: they were measured on no query that both judge in the same "
                "way: there is nothing to compare.</p>"
            )
            continue
        yield from _tables([table, *beside.gains(a, b, split, QUERIES, TEXT)], all_of_them=True)
    yield "<h3>Settings that differ</h3>"
    changed = "\n".join(map(_escaped, beside.settings(a, b)))
    yield f"<pre>{changed}</pre>" if changed else "<p>none</p>"


def _tables(tables: Iterable[Table], all_of_them: bool = False) -> list[str]:
    """Those that have rows; a sentence where none has."""
    shown = [_wide(table) for table in tables if table.rows or all_of_them]
    return shown or ["<p>Nothing is recorded.</p>"]


def _wide(table: Table) -> str:
    return f"<div>{table._repr_html_()}</div>"


def _plots(made: Inspection) -> Iterator[str]:
    for name, alternative in _PLOTS.items():
        if (path := made.plot(name)).is_file():
            data = base64.b64encode(path.read_bytes()).decode()
            yield f'<p><img alt="{alternative}" src="data:image/png;base64,{data}"></p>'


def _escaped(text: str) -> str:
    return html.escape(display.harmless(text))
