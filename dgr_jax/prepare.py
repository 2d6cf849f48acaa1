"""`python -m dgr_jax.prepare`: collection -> vocabulary, identifiers, trie, SeqIO tasks, arrays."""

from __future__ import annotations

from collections.abc import Sequence

from dgr_jax import cli

DESCRIPTION = (
    "Run the prepare stage of an experiment. With --export, copy what the later stages need into "
    "another MODEL_DIR, so that training goes on where TensorFlow and the data are not installed."
)


def command(argv: Sequence[str] | None) -> None:
    parser = cli.parser("prepare", DESCRIPTION)
    parser.add_argument(
        "--export", metavar="DIR", help="the new MODEL_DIR, to be taken to another machine"
    )
    args, bindings = cli.parse(parser, argv)
    experiment = cli.load_experiment(args, bindings)

    from dgr_jax import pipeline, stages

    pipeline.run(experiment, stages.makers(experiment), ["prepare"])
    if args.export:
        from dgr_jax.stages.prepare import export

        export(experiment, args.export)


if __name__ == "__main__":
    cli.main(command)
