"""`python -m dgr_jax.retrieve`: ask a trained student, or run the candidates stage."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from dgr_jax.config import cli, gin_files, mistakes

DESCRIPTION = (
    "Answer questions with the student in --model_dir: --query prints passages, --queries writes a "
    "TREC run or, with --report_speed, measures how fast it answers. With --gin_file and neither, "
    "run the candidates stage of an experiment."
)


def command(argv: Sequence[str] | None) -> None:
    parser = cli.parser("retrieve", DESCRIPTION)
    parser.add_argument("--query", action="append", default=[], help="a question; may be repeated")
    parser.add_argument("--queries", help="TSV of qid and text, or a BEIR queries.jsonl")
    parser.add_argument("--output", help="TREC run to write for --queries (.gz too)")
    parser.add_argument(
        "--report_speed",
        action="store_true",
        help="measure queries a second and latency on --queries; --output: JSON, and no run",
    )
    parser.add_argument("--k", type=int, default=10, help="passages a question")
    parser.add_argument("--num_beams", type=int, help="beams; default: those of the experiment")
    parser.add_argument("--batch_size", type=int, help="questions decoded together; see Search")
    parser.add_argument("--mesh", help="DATA,MODEL devices, such as 4,2; default: one device")
    parser.add_argument(
        "--system",
        help="which system that was trained or measured, such as distill or bm25; default: the "
        "best one that is trained",
    )
    cli.several(parser)
    args, bindings = cli.parse(parser, argv)
    _check(parser, args, bindings)
    if args.query or args.queries:
        from dgr_jax.serving import ask

        ask.answer(args)
        return
    experiment = gin_files.load_experiment(args, bindings)
    if "candidates" not in experiment.stages:
        raise mistakes.Mistake(
            "give --query or --queries: without them the stage 'candidates' runs, and this "
            f"experiment has none (its stages: {', '.join(experiment.stages)})"
        )

    from dgr_jax.stages import pipeline
    from dgr_jax.stages.makers import makers

    pipeline.run(experiment, makers(experiment), ["candidates"], named=cli.named(bindings))


def _check(parser: argparse.ArgumentParser, args: argparse.Namespace, bindings: list[str]) -> None:
    """Ends the program where a flag lacks another, or would have no effect."""
    for name in ("output", "report_speed"):
        if getattr(args, name) and not args.queries:
            parser.error(f"--{name} needs --queries")
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


if __name__ == "__main__":
    cli.main(command)
