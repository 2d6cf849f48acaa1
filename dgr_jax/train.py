"""`python -m dgr_jax.train --gin_file=quickstart.gin`: an experiment, from corpus to measures."""

from __future__ import annotations

from collections.abc import Sequence

from dgr_jax.config import cli, gin_files

DESCRIPTION = (
    "Prepare a collection, teach a T5 student to write passage identifiers, distil it from a "
    "teacher's rank lists, and measure it. Stages that are done already are skipped."
)


def command(argv: Sequence[str] | None) -> None:
    parser = cli.parser("train", DESCRIPTION)
    parser.add_argument(
        "--stages",
        default="evaluate",
        metavar="STAGE,STAGE",
        help="stages to run, with those they need: prepare, start, generate, candidates, teach, "
        "distill, control, evaluate; of a dense retriever prepare, negatives, teach, start, "
        "dense, mine, refresh, evaluate (default: evaluate, which needs all)",
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
    cli.several(parser)
    args, bindings = cli.parse(parser, argv)
    experiment = gin_files.load_experiment(args, bindings, keep=not args.plan)
    if args.plan:
        from dgr_jax.capacity import disk

        disk.show(experiment, disk.given(args.corpus) if args.corpus else None)
        return

    from dgr_jax.stages import pipeline
    from dgr_jax.stages.makers import makers

    asked = [stage.strip() for stage in args.stages.split(",")]
    pipeline.run(experiment, makers(experiment), asked, named=cli.named(bindings))


if __name__ == "__main__":
    cli.reuse_memory()
    cli.main(command)
