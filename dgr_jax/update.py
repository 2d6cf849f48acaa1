"""`python -m dgr_jax.update`: adds passages to the index of a student, and removes them."""

from __future__ import annotations

from collections.abc import Sequence

from dgr_jax.config import cli, gin_files

REFRESH = "runs/living.gin"
ACTIONS = ("list", "rollback", "compact", "refresh")
DESCRIPTION = (
    "Change the passages that the students in --model_dir find, without training: each change is a "
    "version of the index beside the others, which answers from then on. --refresh trains the best "
    "student on those that were added."
)


def command(argv: Sequence[str] | None) -> None:
    parser = cli.parser("update", DESCRIPTION)
    parser.add_argument(
        "--add",
        metavar="FILE",
        help="JSON lines with pid (or _id), text and title; a pid that is there is replaced",
    )
    parser.add_argument("--remove", metavar="FILE", help="pids, one a line")
    asked = parser.add_mutually_exclusive_group()
    asked.add_argument("--list", action="store_true", help="name the versions of the index")
    asked.add_argument("--rollback", action="store_true", help="let the version before answer")
    compact = "count words anew, and drop all versions but the current one, with what was removed"
    asked.add_argument("--compact", action="store_true", help=compact)
    refresh = f"let the student learn passages that were added, by --gin_file (default: {REFRESH})"
    asked.add_argument("--refresh", action="store_true", help=refresh)
    args, bindings = cli.parse(parser, argv)
    given = [name for name in ACTIONS if getattr(args, name)]
    if not args.model_dir:
        parser.error("--model_dir is missing")
    if bool(given) == bool(args.add or args.remove):
        parser.error(f"expected --add, --remove or both, or one of --{', --'.join(ACTIONS)}")
    if args.refresh:
        from dgr_jax.stages import refreshed

        args.gin_file = args.gin_file or [REFRESH]
        settings = gin_files.load_experiment(args, bindings, ("Refresh",), keep=False, fill=False)
        refreshed.refresh(settings)
        return

    from dgr_jax.serving import living

    if given:
        name = {"list": "show"}.get(given[0], given[0])
        getattr(living, name)(args.model_dir)
    else:
        living.change(args.model_dir, args.add, args.remove)


if __name__ == "__main__":
    cli.main(command)
