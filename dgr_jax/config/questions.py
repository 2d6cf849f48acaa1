"""Flags of a command that asks a finished student, beside those of an experiment."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from dgr_jax.config import mistakes


def check(
    parser: argparse.ArgumentParser, args: argparse.Namespace, bindings: Sequence[str]
) -> None:
    """Ends the program where a flag lacks another, or would have no effect."""
    if args.rerank and args.report_speed:
        parser.error("--rerank and --report_speed exclude each other")
    for name in ("output", "report_speed", "rerank"):
        if getattr(args, name) and not args.queries:
            parser.error(f"--{name} needs --queries")
    if args.json and not args.query:
        parser.error("--json needs --query")
    if args.query or args.queries:
        if not args.model_dir:
            parser.error("--query and --queries need --model_dir")
        if args.queries and not (args.output or args.report_speed):
            parser.error("--queries needs --output")
        flags = tuple(
            f"{macro} = " for macro, flag in mistakes.FLAGS.items() if getattr(args, flag[2:])
        )
        alone = ("coordinator_address", "num_processes", "process_id", "distributed")
        if joined := [name for name in alone if getattr(args, name)]:
            parser.error(f"--{joined[0]} has no effect on --query and --queries")
        given = ["--gin_file"] * bool(args.gin_file) + ["--data_dir"] * bool(args.data_dir)
        given += [f"--gin.{b.partition(' =')[0]}" for b in bindings if not b.startswith(flags)]
        if given:
            parser.error(
                f"{given[0]} has no effect on --query and --queries, which ask the finished "
                "student of --model_dir; there are --k, --num_beams, --batch_size, --system"
            )
        return
    for name in ("k", "num_beams", "batch_size", "mesh", "system"):
        if getattr(args, name) != parser.get_default(name):
            parser.error(f"--{name} needs --query or --queries")
