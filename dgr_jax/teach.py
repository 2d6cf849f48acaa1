"""`python -m dgr_jax.teach`: a teacher orders the student's candidates, and rank lists are cut."""

from __future__ import annotations

from collections.abc import Sequence

from dgr_jax.config import cli, running

DESCRIPTION = (
    "Run the teach stage of an experiment (and the stages it needs): the teacher orders the "
    "candidates of every training query; coverage and agreement with the judgements are reported."
)


def command(argv: Sequence[str] | None) -> None:
    parser = cli.parser("teach", DESCRIPTION)
    cli.several(parser)
    args, bindings = cli.parse(parser, argv)
    running.run(args, bindings, ["teach"])


if __name__ == "__main__":
    cli.main(command)
