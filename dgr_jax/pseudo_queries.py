"""`python -m dgr_jax.pseudo_queries`: queries of every passage, written by a T5 of one's own."""

from __future__ import annotations

from collections.abc import Sequence

from dgr_jax.config import cli, running

DESCRIPTION = (
    "Teach a T5 to write the queries of a passage, on the training pairs of a collection, and let "
    "it write some of every passage: MODEL_DIR/sample/pseudo_queries.tsv, for "
    "Sources.pseudo_query_path of an experiment. Stages that are done already are skipped."
)


def command(argv: Sequence[str] | None) -> None:
    parser = cli.parser("pseudo_queries", DESCRIPTION)
    cli.stages(parser, "prepare, generate, sample")
    args, bindings = cli.parse(parser, argv)
    running.run(args, bindings, args.stages, kinds=("PseudoQueries",))


if __name__ == "__main__":
    cli.main(command)
