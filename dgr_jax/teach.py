"""`python -m dgr_jax.teach`: a teacher orders the student's candidates, and rank lists are cut."""

from __future__ import annotations

from collections.abc import Sequence

from dgr_jax.config import cli, gin_files

DESCRIPTION = (
    "Run the teach stage of an experiment (and the stages it needs): the teacher orders the "
    "candidates of every training query; coverage and agreement with the judgements are reported."
)


def command(argv: Sequence[str] | None) -> None:
    parser = cli.parser("teach", DESCRIPTION)
    cli.several(parser)
    args, bindings = cli.parse(parser, argv)
    experiment = gin_files.load_experiment(args, bindings)

    from dgr_jax.stages import pipeline
    from dgr_jax.stages.makers import makers

    pipeline.run(experiment, makers(experiment), ["teach"], named=cli.named(bindings))


if __name__ == "__main__":
    cli.main(command)
