"""`python -m dgr_jax.study --gin_file=studies/margins.gin`: a grid of experiments and its table."""

from __future__ import annotations

import functools
from collections.abc import Sequence

from dgr_jax import interrupts
from dgr_jax.config import cli, gin_files
from dgr_jax.config.mistakes import Failure
from dgr_jax.model_dir import writer_lock

DESCRIPTION = (
    "Run every experiment of a grid that has not been run, sharing stages that are the same, and "
    "write one table (CSV and Markdown) and plots. Killed, it goes on where it was."
)


def command(argv: Sequence[str] | None) -> None:
    parser = cli.parser("study", DESCRIPTION)
    parser.add_argument(
        "--dry_run", action="store_true", help="list the experiments and what they cost; run none"
    )
    parser.add_argument(
        "--table_only", action="store_true", help="write the table of what is there; run none"
    )
    args, bindings = cli.parse(parser, argv)
    if not args.model_dir:
        parser.error("--model_dir is required: where experiments, table and plots are written")
    own = [binding for binding in bindings if binding.startswith("Study.")]
    study = gin_files.load_experiment(args, own, ("Study",), keep=False)

    from dgr_jax.studies import outstanding, report, runner
    from dgr_jax.studies.grid import Grid

    others = [b for b in bindings if b not in own and not b.startswith("MODEL_DIR")]
    interrupts.goes_on("the study")
    load = functools.partial(gin_files.from_flags, fill=args.dry_run)
    grid = Grid(study, args.model_dir, load, others, args.gin_search_paths)
    if args.dry_run:
        outstanding.show(grid)
        return
    with writer_lock.held(args.model_dir):
        failures = [] if args.table_only else runner.run(grid)
        summary = f"{len(failures)} of {len(grid.runs)} experiments failed"
        try:
            if not failures or any(grid.finished()):
                report.write(grid)
        except ValueError as error:
            if not failures:
                raise
            failures.append(f"the others cannot be reported: {error}")
    if failures:
        raise Failure("\n".join([f"{summary}; the same command tries them again", *failures]))


if __name__ == "__main__":
    cli.main(command)
