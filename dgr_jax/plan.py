"""`python -m dgr_jax.plan --gin_file=msmarco.gin --topology=v5p:4x4x4 --mesh=16,4`: before you pay.

Nothing is trained or written, and no accelerator is needed. Of a corpus that is at hand the
passages are counted; nothing else is read.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

from dgr_jax.config import cli, gin_files

DESCRIPTION = (
    "Compile the train steps and the search of an experiment for a TPU topology (GPUs: by formula) "
    "and print bytes a chip, FLOPs, network traffic, the time at best, and what to change when it "
    "does not fit."
)


def command(argv: Sequence[str] | None) -> None:
    parser = cli.parser("plan", DESCRIPTION)
    parser.add_argument(
        "--topology", required=True, help="v4, v5e, v5p, v6e, h100 or a100 and a grid: v5p:4x4x4"
    )
    parser.add_argument(
        "--mesh", help="DATA,MODEL or DATA,MODEL,FSDP chips, such as 16,4; default: Mesh of gin"
    )
    parser.add_argument(
        "--programs",
        default="",
        help="some of generate,distill,decode, or of a dense retriever dense,search; default: all",
    )
    parser.add_argument(
        "--passages",
        type=float,
        help="passages of the corpus; default: those of the one that lies there are counted, "
        "otherwise 8.8e6",
    )
    parser.add_argument(
        "--sweep",
        type=int,
        nargs="?",
        const=3,
        metavar="N",
        help="rank all meshes by formula, and compile the best N (default 3)",
    )
    args, bindings = cli.parse(parser, argv)
    os.environ["JAX_PLATFORMS"] = "cpu"
    experiment = gin_files.load_experiment(args, bindings, keep=False)

    from dgr_jax.capacity import tables

    tables.show(args, experiment)


if __name__ == "__main__":
    cli.main(command)
