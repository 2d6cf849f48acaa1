"""Damages files of a finished MODEL_DIR, one at a time, and looks at what its readers make of it.

    python -m tests.campaigns.damage --kind=docid --damages=300

Every file is cut in half, has a bit flipped, is emptied or taken away. The readers are retrieve,
train (of the same experiment, and whom retrieve then asks) and evaluate (with other settings, so
that students answer again). What happens is one of

    unused     the same results, and not a word
    remade     the same results, and a line that says what was made again
    told       other results, and a line that says which settings changed: config.gin was damaged
    said       exit status 2, and a line that names a file of MODEL_DIR
    silent     exit status 0 with other results
    unclear    exit status 2 without the name of a file
    traceback  anything else

The last three are faults.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import io
import itertools
import logging
import os
import random
import shutil
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from tests import conftest

SMALL = tuple(
    flag
    for flag in conftest.TINY
    if flag.startswith((
        "--gin.T5Config", "--gin.Training", "--gin.Mesh", "--gin.WARMUP", "--gin.BATCH_SIZE",
        "--gin.QUERY", "--gin.Evaluate", "--gin.SentencePiece",
    ))
)  # fmt: skip
KINDS = {
    "docid": conftest.TINY,
    "multiview": (
        "--gin_file=quickstart_dgr.gin", *SMALL, "--gin.GENERATE_STEPS=6", "--gin.DISTILL_STEPS=3",
        "--gin.LIST_BATCH_SIZE=4", "--gin.NUM_BEAMS=4", "--gin.DEPTH=8",
        "--gin.SEARCH_BATCH_SIZE=8", "--gin.Candidates.max_queries=16",
    ),
    "dense": ("--gin_file=quickstart_dense.gin", *SMALL, "--gin.DEPTH=8", "--gin.STEPS=6",
              "--gin.PASSAGE_LENGTH=16"),
}  # fmt: skip
DAMAGES = ("half", "flip", "empty", "delete")
READERS = ("retrieve", "train", "evaluate")
FAULTS = ("silent", "unclear", "traceback")
QUERIES = "q1\thow do owls hunt at night\nq2\twhat is porcelain made of\nq3\tlead acid\n"


@dataclass(frozen=True)
class Outcome:
    """What a reader made of a damage."""

    name: str
    damage: str
    reader: str
    what: str
    said: str


def run(command: str, *flags: str) -> tuple[int, str]:
    """(exit status, what is said) of `python -m dgr_jax.<command>`, in this process."""
    import importlib

    from dgr_jax.config import cli

    module = importlib.import_module(f"dgr_jax.{command}")
    said = io.StringIO()
    shown = logging.StreamHandler(said)
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
        try:
            cli.main(lambda _: (logging.getLogger().addHandler(shown), module.command(flags))[1])
            status = 0
        except SystemExit as left:
            status = int(left.code or 0)
        except BaseException:
            status = 1
            said.write(traceback.format_exc())
        finally:
            logging.getLogger().removeHandler(shown)
    return status, said.getvalue()


def results(folder: Path) -> dict[str, bytes]:
    """What evaluate tells people, by name."""
    told = folder / "evaluate"
    return {
        path.name: path.read_bytes()
        for path in sorted(told.iterdir()) if path.suffix == ".trec" or path.name == "metrics.json"
    } if told.is_dir() else {}  # fmt: skip


def read(reader: str, folder: Path) -> tuple[int, str, dict[str, bytes]]:
    """(exit status, what is said, results) of a reader of a MODEL_DIR."""
    if reader == "retrieve":
        return asked(folder)
    if reader == "train":
        status, said = run("train", f"--model_dir={folder}")
        found = results(folder)
        if status == 0:
            status, more, answers = asked(folder)
            said, found = said + more, found | answers
        return status, said, found
    status, said = run(
        "evaluate", f"--model_dir={folder}", "--gin.Evaluate.max_queries=10",
        "--gin.Evaluate.seed=3",
    )  # fmt: skip
    return status, said, results(folder)


def asked(folder: Path) -> tuple[int, str, dict[str, bytes]]:
    with tempfile.TemporaryDirectory() as place:
        queries, output = Path(place) / "queries.tsv", Path(place) / "run.trec"
        queries.write_text(QUERIES, encoding="utf-8")
        flags = (f"--model_dir={folder}", f"--queries={queries}", f"--output={output}", "--k=4")
        status, said = run("retrieve", *flags)
        return status, said, {"retrieved": output.read_bytes()} if output.is_file() else {}


def damage(path: Path, how: str, chosen: random.Random) -> None:
    """Cuts a file in half, flips a bit of it, empties it or takes it away."""
    content = bytearray(path.read_bytes())
    if how == "delete":
        path.unlink()
    elif how == "flip" and content:
        content[chosen.randrange(len(content))] ^= 1 << chosen.randrange(8)
        path.write_bytes(content)
    elif how == "half":
        path.write_bytes(content[: len(content) // 2])
    else:
        path.write_bytes(b"")


def damages(folder: Path, count: int, seed: int) -> Iterator[tuple[str, str]]:
    """(file, damage) in an order that is even over both; all, where count is 0."""
    names = [p.relative_to(folder).as_posix() for p in sorted(folder.rglob("*")) if p.is_file()]
    every = list(itertools.product(names, DAMAGES))
    random.Random(seed).shuffle(every)
    yield from every[: count or None]


def outcome(reader: str, folder: Path, name: str, expected: dict[str, bytes]) -> tuple[str, str]:
    """(what happened, what was said) where a reader meets a MODEL_DIR with a damaged file."""
    status, said, found = read(reader, folder)
    if "Traceback" in said or status not in (0, 2):
        return "traceback", said
    if status == 2:
        last = [line for line in said.splitlines() if line.startswith("error: ")]
        return ("said" if last and str(folder) in last[-1] else "unclear"), said
    if found != expected:
        changed = name == "config.gin" and "settings changed (" in said
        return "told" if changed else "silent", said
    again = ("made again", "searched again", "asked again", "settings changed", "set aside")
    return ("remade" if any(word in said for word in again) else "unused"), said


def campaign(
    finished: Path, count: int, seed: int = 0, readers: Sequence[str] = READERS
) -> Iterator[Outcome]:
    """The outcomes of `count` damages of a finished MODEL_DIR, each in a copy of it."""
    chosen = random.Random(seed)
    with tempfile.TemporaryDirectory() as place:
        copy = Path(place) / "model"

        def fresh() -> Path:
            shutil.rmtree(copy, ignore_errors=True)
            shutil.copytree(finished, copy)
            return copy

        expected = {}
        for reader in readers:
            status, said, expected[reader] = read(reader, fresh())
            if status or not expected[reader]:
                raise RuntimeError(f"{reader} of the whole {finished} fails: {said}")
        turn = itertools.cycle(readers)
        for name, how in damages(finished, count, seed):
            reader = next(turn)
            damage(fresh() / name, how, chosen)
            what, said = outcome(reader, copy, name, expected[reader])
            yield Outcome(name, how, reader, what, said)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kind", choices=KINDS, default="docid")
    parser.add_argument("--damages", type=int, default=300, help="0: all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--readers", default=",".join(READERS), help="which read, in turn")
    parser.add_argument("--model_dir", type=Path, help="one of this kind that is finished")
    args = parser.parse_args()
    os.environ["XLA_FLAGS"] = "--xla_backend_optimization_level=0"  # one device: it compiles faster
    with tempfile.TemporaryDirectory() as place:
        folder = args.model_dir or Path(place) / "model"
        if args.model_dir is None:
            status, said = run("train", *KINDS[args.kind], f"--model_dir={folder}")
            if status:
                sys.exit(said)
        begin, table = time.monotonic(), collections.Counter()
        for found in campaign(folder, args.damages, args.seed, args.readers.split(",")):
            table[found.what, found.damage] += 1
            if found.what in FAULTS:
                sys.stdout.write(
                    f"{found.what}: {found.reader}, {found.damage} {found.name}\n"
                    f"{found.said[-1500:]}\n"
                )
            sys.stdout.flush()
        sys.stdout.write(f"{args.kind}: {sum(table.values())} damages ")
        sys.stdout.write(f"in {time.monotonic() - begin:.0f} s\n")
        for what in ("unused", "remade", "told", "said", *FAULTS):
            numbers = ", ".join(f"{how} {table[what, how]}" for how in DAMAGES)
            sys.stdout.write(f"{what:10s} {numbers}\n")
        return sum(table[what, how] for what in FAULTS for how in DAMAGES)


if __name__ == "__main__":
    sys.exit(min(1, main()))
