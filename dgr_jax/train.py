"""`python -m dgr_jax.train --gin_file=quickstart.gin`: an experiment, from corpus to measures."""

from __future__ import annotations

from collections.abc import Sequence

from dgr_jax.config import cli, explain, gin_files, running

DESCRIPTION = (
    "Prepare a collection, teach a T5 student to write passage identifiers, distil it from a "
    "teacher's rank lists, and measure it. Stages that are done already are skipped."
)


def command(argv: Sequence[str] | None) -> None:
    parser = cli.parser("train", DESCRIPTION)
    cli.stages(
        parser,
        "prepare, start, generate, candidates, teach, distill, control, evaluate; of a dense "
        "retriever prepare, negatives, teach, start, dense, mine, refresh, evaluate",
    )
    parser.add_argument(
        "--plan", action="store_true", help="print files, disk and index sizes, and start nothing"
    )
    parser.add_argument(
        "--corpus",
        metavar="PASSAGES,WORDS,QUERIES,PSEUDO",
        help="for --plan: passages, words of each, training queries, pseudo-queries a passage, as "
        "8.8e6,55,5e5,20 (default: those of the corpus that lies there are counted)",
    )
    parser.add_argument(
        "--explain",
        action="store_true",
        help="print every macro of the gin files: value, meaning and choices; start nothing",
    )
    cli.several(parser)
    args, bindings = cli.parse(parser, argv)
    if args.explain:
        explain.show(args, bindings)
        return
    if not args.plan:
        running.run(args, bindings, args.stages)
        return
    experiment = gin_files.load_experiment(args, bindings, keep=False)

    from dgr_jax.capacity import disk

    disk.show(experiment, disk.given(args.corpus) if args.corpus else None)


if __name__ == "__main__":
    cli.main(command)
