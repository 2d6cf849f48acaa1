"""`python -m dgr_jax.study --gin_file=studies/margins.gin`: experiments, and one table of them."""

from __future__ import annotations

import functools
from collections.abc import Sequence

from dgr_jax import interrupts
from dgr_jax.config import cli, gin_files
from dgr_jax.config.mistakes import Failure

DESCRIPTION = (
    "Run what has not been run of a grid of experiments, or of a corpus that grows, and write a "
    "table (CSV and Markdown) and plots. Killed, it goes on where it was."
)
KINDS = ("Study", "LivingStudy")


def command(argv: Sequence[str] | None) -> None:
    parser = cli.parser("study", DESCRIPTION)
    dry, only = "list the experiments and what they cost", "write the table of what is there"
    parser.add_argument("--dry_run", action="store_true", help=f"{dry}; run none")
    parser.add_argument("--table_only", action="store_true", help=f"{only}; run none")
    args, bindings = cli.parse(parser, argv)
    if not args.model_dir:
        parser.error("--model_dir is required: where experiments, table and plots are written")
    own = [b for b in bindings if b.partition(".")[0] in KINDS]
    study = gin_files.load_experiment(args, own, KINDS, keep=False)

    from dgr_jax.experiments.living_study import LivingStudy
    from dgr_jax.studies import living, living_report, outstanding, report
    from dgr_jax.studies.grid import Grid

    others = [b for b in bindings if b not in own and not b.startswith("MODEL_DIR")]
    interrupts.goes_on("the study")
    load = functools.partial(gin_files.from_flags, fill=args.dry_run)
    given = args.model_dir, load, others, args.gin_search_paths
    if isinstance(study, LivingStudy):
        refresh = functools.partial(gin_files.from_flags, kinds=("Refresh",))
        living_report.run(living.Living(study, *given, refresh), args.dry_run, args.table_only)
        return
    grid = Grid(study, *given)
    if args.dry_run:
        outstanding.show(grid)
        return
    if failed := report.of_runs(grid, table_only=args.table_only):
        raise Failure(failed)


if __name__ == "__main__":
    cli.main(command)
