"""`python -m dgr_jax.retrieve`: ask a trained student, or run the candidates stage."""

from __future__ import annotations

from collections.abc import Sequence

from dgr_jax import cli

DESCRIPTION = (
    "Answer questions with the student in --model_dir: --query prints passages, --queries writes a "
    "TREC run. With --gin_file and neither, run the candidates stage of an experiment."
)


def command(argv: Sequence[str] | None) -> None:
    parser = cli.parser("retrieve", DESCRIPTION)
    parser.add_argument("--query", action="append", default=[], help="a question; may be repeated")
    parser.add_argument("--queries", help="TSV of qid and text, or a BEIR queries.jsonl")
    parser.add_argument("--output", help="TREC run to write for --queries (.gz too)")
    parser.add_argument("--k", type=int, default=10, help="passages a question")
    parser.add_argument("--num_beams", type=int, help="beams; default: those of the experiment")
    parser.add_argument("--system", help="distill, control or generate; default: the last trained")
    args, bindings = cli.parse(parser, argv)
    if args.query or args.queries:
        if not args.model_dir:
            parser.error("--query and --queries need --model_dir")
        if args.queries and not args.output:
            parser.error("--queries needs --output")
        from dgr_jax.stages import ask

        ask.answer(args)
        return
    experiment = cli.load_experiment(args, bindings)

    from dgr_jax import pipeline, stages

    pipeline.run(experiment, stages.MAKERS, ["candidates"])


if __name__ == "__main__":
    cli.main(command)
