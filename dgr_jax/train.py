"""`python -m dgr_jax.train --gin_file=quickstart.gin`: an experiment, from corpus to measures."""

from __future__ import annotations

from collections.abc import Sequence

from dgr_jax import cli

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
        help="stages to run, with those they need: prepare, generate, candidates, teach, distill, "
        "control, evaluate (default: evaluate, which needs all)",
    )
    args, bindings = cli.parse(parser, argv)
    experiment = cli.load_experiment(args, bindings)

    from dgr_jax import pipeline, stages

    asked = [stage.strip() for stage in args.stages.split(",")]
    pipeline.run(experiment, stages.MAKERS, asked)


if __name__ == "__main__":
    cli.reuse_memory()
    cli.main(command)
