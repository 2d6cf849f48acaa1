"""`python -m dgr_jax.retrieve`: ask a trained student, or run the candidates stage."""

from __future__ import annotations

from collections.abc import Sequence

from dgr_jax.config import cli, questions, running

DESCRIPTION = (
    "Answer questions with the student in --model_dir: --query prints passages, --queries writes a "
    "TREC run or, with --report_speed, measures how fast it answers. With --gin_file and neither, "
    "run the candidates stage of an experiment."
)


def command(argv: Sequence[str] | None) -> None:
    parser = cli.parser("retrieve", DESCRIPTION)
    parser.add_argument("--query", action="append", default=[], help="a question; may be repeated")
    parser.add_argument(
        "--json", action="store_true", help="for --query: print a JSON object a question, on a line"
    )
    parser.add_argument("--queries", help="TSV of qid and text, or a BEIR queries.jsonl")
    parser.add_argument("--output", help="TREC run to write for --queries (.gz too)")
    parser.add_argument(
        "--report_speed",
        action="store_true",
        help="measure queries a second and latency on --queries; --output: JSON, and no run",
    )
    parser.add_argument(
        "--rerank",
        metavar="RUN",
        help="TREC run: its passages for --queries, by the log-probability of their identifiers",
    )
    parser.add_argument(
        "--k", type=int, help="passages a question; default: 10, or as many as can be found"
    )
    parser.add_argument("--num_beams", type=int, help="beams; default: those of the experiment")
    parser.add_argument("--batch_size", type=int, help="questions decoded together; see Search")
    parser.add_argument("--mesh", help="DATA,MODEL devices, such as 4,2; default: one device")
    parser.add_argument(
        "--system",
        help="which system that was trained or measured, such as distill, bm25 or planned (distill "
        "with the plan); default: planned where there is one, or the best one that is trained",
    )
    cli.several(parser)
    args, bindings = cli.parse(parser, argv)
    questions.check(parser, args, bindings)
    if args.query or args.queries:
        from dgr_jax.serving import ask

        ask.answer(args)
        return
    hint = (
        "give --query or --queries: without them the stage 'candidates' runs, and this experiment "
        "has none"
    )
    running.run(args, bindings, ["candidates"], hint=hint)


if __name__ == "__main__":
    cli.main(command)
