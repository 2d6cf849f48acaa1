"""`python -m dgr_jax.report --model_dir=DIR`: a finished experiment as one HTML file."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from dgr_jax.config import cli

logger = logging.getLogger(__name__)

DESCRIPTION = (
    "Write one HTML file of a finished experiment: measures with intervals and tests, curves, wins "
    "and losses, identifiers, teacher, costs. A second --model_dir is compared with the first."
)


def command(argv: Sequence[str] | None) -> None:
    parser = cli.plain_parser("report", DESCRIPTION)
    parser.add_argument(
        "--model_dir",
        action="append",
        required=True,
        metavar="DIR",
        help="a finished MODEL_DIR; give it twice to compare two",
    )
    parser.add_argument(
        "--output", default="report.html", metavar="FILE", help="default: report.html"
    )
    args = cli.parse_plain(parser, argv)

    from dgr_jax.analysis import report

    report.write(args.model_dir, args.output)
    logger.info("wrote %s", args.output)


if __name__ == "__main__":
    cli.main(command)
