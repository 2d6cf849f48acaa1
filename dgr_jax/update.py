"""`python -m dgr_jax.update`: adds passages to the index of a trained student, and removes them."""

from __future__ import annotations

from collections.abc import Sequence

from dgr_jax.config import cli

DESCRIPTION = (
    "Change the passages that the students in --model_dir find, without training: each change is a "
    "version of the index beside the others, which answers from then on."
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
    asked.add_argument(
        "--rollback", action="store_true", help="let the version before the current one answer"
    )
    asked.add_argument(
        "--compact",
        action="store_true",
        help="count words anew, and drop all versions but the current one, with what was removed",
    )
    args, _ = cli.parse(parser, argv)
    given = [name for name in ("list", "rollback", "compact") if getattr(args, name)]
    if not args.model_dir:
        parser.error("--model_dir is missing")
    if bool(given) == bool(args.add or args.remove):
        parser.error("expected --add, --remove or both, or one of --list, --rollback, --compact")

    from dgr_jax.serving import living

    if given:
        name = {"list": "show"}.get(given[0], given[0])
        getattr(living, name)(args.model_dir)
    else:
        living.change(args.model_dir, args.add, args.remove)


if __name__ == "__main__":
    cli.main(command)
