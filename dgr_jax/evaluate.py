"""`python -m dgr_jax.evaluate`: measures of an experiment's systems, or of any TREC run."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from dgr_jax.config import cli, running

DESCRIPTION = (
    "Run the evaluate stage of an experiment (and the stages it needs); or, with --run and "
    "--qrels, measure TREC runs against judgements."
)


def command(argv: Sequence[str] | None) -> None:
    parser = cli.parser("evaluate", DESCRIPTION)
    parser.add_argument("--run", action="append", default=[], help="a TREC run; may be repeated")
    parser.add_argument("--qrels", help="TREC qrels, or BEIR qrels (.tsv) of the runs")
    parser.add_argument("--min_relevance", type=int, default=1, help="grade of a positive")
    parser.add_argument(
        "--measures",
        metavar="NAME,NAME",
        help="of the runs, names of ir_measures (default: those of an experiment)",
    )
    parser.add_argument("--per_query", action="store_true", help="the runs query by query as well")
    parser.add_argument("--json", action="store_true", help="print one JSON object of the runs")
    cli.several(parser)
    args, bindings = cli.parse(parser, argv)
    if args.run or args.qrels:
        _measure(parser, args)
        return
    for name in ("measures", "per_query", "json"):
        if getattr(args, name):
            parser.error(f"--{name} needs --run and --qrels")
    running.run(args, bindings, ["evaluate"])


def _measure(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    if not (args.run and args.qrels):
        parser.error("--run and --qrels go together")
    from dgr_jax import evaluation
    from dgr_jax.stages.measure_runs import measure_runs, names

    measures = names(args.measures) if args.measures else evaluation.MEASURES
    shown = {"per_query": args.per_query, "as_json": args.json}
    measure_runs(args.run, args.qrels, args.min_relevance, measures=measures, **shown)


if __name__ == "__main__":
    cli.main(command)
