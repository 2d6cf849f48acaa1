"""`python -m dgr_jax.prepare`: collection -> vocabulary, identifiers, trie, SeqIO tasks, arrays."""

from __future__ import annotations

from collections.abc import Sequence

from dgr_jax import processes
from dgr_jax.config import cli, running

DESCRIPTION = (
    "Run the prepare stage of an experiment. With --export, copy what the later stages need into "
    "another MODEL_DIR, so that training goes on where TensorFlow and the data are not installed."
)


def command(argv: Sequence[str] | None) -> None:
    parser = cli.parser("prepare", DESCRIPTION)
    parser.add_argument(
        "--export", metavar="DIR", help="the new MODEL_DIR, to be taken to another machine"
    )
    parser.add_argument(
        "--beam_options",
        metavar="FLAGS",
        help="make the examples by Apache Beam (extra `beam`); FLAGS are those of its runner, such "
        "as '--runner=DirectRunner --direct_num_workers=2 --direct_running_mode=multi_processing'. "
        "Workers must see MODEL_DIR and the pseudo-queries under the same paths",
    )
    cli.several(parser)
    args, bindings = cli.parse(parser, argv)
    changed = {}
    if args.beam_options is not None:
        from dgr_jax.stages import beam

        changed = {"changed": beam.everywhere(args.beam_options)}
    experiment = running.run(args, bindings, ["prepare"], **changed)
    if args.export and processes.first():
        from dgr_jax.stages.prepared import export

        export(experiment, args.export)


if __name__ == "__main__":
    cli.main(command)
