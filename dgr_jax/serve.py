"""`python -m dgr_jax.serve --model_dir=DIR`: answer queries over HTTP."""

from __future__ import annotations

from collections.abc import Sequence

from dgr_jax.config import cli
from dgr_jax.serving.settings import Service

DESCRIPTION = (
    "Answer queries over HTTP with finished experiments: POST /search, and a page to look inside "
    "at /; or by MCP. A new version in MODEL_DIR answers as soon as it is whole."
)


def command(argv: Sequence[str] | None) -> None:
    parser = cli.plain_parser("serve", DESCRIPTION)
    parser.add_argument(
        "--model_dir",
        action="append",
        required=True,
        metavar="DIR",
        help="a finished MODEL_DIR, or NAME=MODEL_DIR; may be repeated",
    )
    parser.add_argument(
        "--system", action="append", default=[], help="open this one only; may be repeated"
    )
    parser.add_argument(
        "--mcp",
        action="store_true",
        help="offer the tool search by MCP over standard input and output, and no HTTP",
    )
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on")
    parser.add_argument("--port", type=int, default=8000, help="0: any that is free")
    cli.settings(parser, Service)
    args = cli.parse_plain(parser, argv)

    from dgr_jax.serving import server

    service = cli.set_from(args, Service)
    if args.mcp:
        for name in ("host", "port"):
            if getattr(args, name) != parser.get_default(name):
                parser.error(f"--{name} has no effect with --mcp, which listens on no port")
        server.converse(args.model_dir, args.system, service)
        return
    server.serve(args.model_dir, args.system, args.host, args.port, service)


if __name__ == "__main__":
    cli.main(command)
