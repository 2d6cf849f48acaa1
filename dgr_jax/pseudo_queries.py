"""`python -m dgr_jax.pseudo_queries`: queries of every passage, written by a T5 of one's own."""

from __future__ import annotations

from collections.abc import Sequence

from dgr_jax.config import cli, gin_files

DESCRIPTION = (
    "Teach a T5 to write the queries of a passage, on the training pairs of a collection, and let "
    "it write some of every passage: MODEL_DIR/sample/pseudo_queries.tsv, for "
    "Sources.pseudo_query_path of an experiment. Stages that are done already are skipped."
)


def command(argv: Sequence[str] | None) -> None:
    parser = cli.parser("pseudo_queries", DESCRIPTION)
    parser.add_argument(
        "--stages",
        default="sample",
        metavar="STAGE,STAGE",
        help="stages to run, with those they need: prepare, generate, sample (default: sample)",
    )
    args, bindings = cli.parse(parser, argv)
    experiment = gin_files.load_experiment(args, bindings, ("PseudoQueries",))

    from dgr_jax.stages import pipeline
    from dgr_jax.stages.pseudo_queries import MAKERS

    pipeline.run(
        experiment,
        MAKERS,
        [stage.strip() for stage in args.stages.split(",")],
        named=cli.named(bindings),
    )


if __name__ == "__main__":
    cli.reuse_memory()
    cli.main(command)
