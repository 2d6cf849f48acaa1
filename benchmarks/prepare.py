"""Preparing a large collection: passages a second and peak memory of each part of the stage.

    python -m benchmarks.prepare --passages=100000,1000000 --identifiers=string,rq

A BEIR folder of synthetic passages (--words words of a Zipf distribution over 200,000, in 4
sentences, each of which is a pseudo-query; a title of 3 words), one labelled training query in 100
passages, all other settings as they are by default. Each size runs the whole prepare stage in a
process of its own, so what is measured is what a user gets. Seconds are the clock's and, in
brackets, the processor's, of all threads: of those the passages a second are counted where other
programs share the machine. Peak memory is the largest resident set while a part runs, in
brackets the share of it that is not files mapped into memory, which the system may take back.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from dgr_jax.corpora import beir
from dgr_jax.corpora.types import Passage, Qrel, Query

TYPES = 200_000
SENTENCES = 4
BLOCK = 10_000
EVERY = 100  # passages a labelled query


def passages(count: int, words: int) -> Iterator[Passage]:
    """The same at each call: words of a Zipf distribution, a third of them of the topic's 20."""
    spelled = [spelt(rank) for rank in range(TYPES)]
    parts = [part + 3 for part in np.array_split(np.arange(words), SENTENCES)]
    cuts = [(part[0], part[-1] + 1) for part in parts]
    for first in range(0, count, BLOCK):
        rng = np.random.default_rng([7, first])
        shape = (min(BLOCK, count - first), words + 3)
        ranks = (TYPES ** rng.random(shape, np.float32)).astype(np.int64) - 1
        topic = rng.integers(0, TYPES // 20, (len(ranks), 1)) * 20 + rng.integers(0, 20, shape)
        ranks = np.where(rng.random(shape, np.float32) < 0.3, topic, ranks)
        for number, row in enumerate(ranks.tolist(), start=first):
            drawn = [spelled[rank] for rank in row]
            text = " ".join(" ".join(drawn[low:high]) + "." for low, high in cuts)
            yield Passage(f"p{number}", text, " ".join(drawn[:3]))


def write_collection(folder: Path, count: int, words: int) -> None:
    """A BEIR folder; every hundredth passage is the positive of a training query, and the one
    after it of a test query."""
    queries, judged = [], {"train": [], "test": []}

    def read() -> Iterator[Passage]:
        for number, passage in enumerate(passages(count, words)):
            if number % EVERY < 2:
                split = ("train", "test")[number % EVERY]
                text = " ".join(passage.text.split()[:8])
                queries.append(Query(f"q{number}", text))
                judged[split].append(Qrel(f"q{number}", passage.pid, 1))
            yield passage

    beir.write_beir(folder, read(), queries, judged)


def spelt(rank: int) -> str:
    """A word of syllables for each rank, shorter where it is more frequent."""
    word = ""
    rank += 1
    while rank:
        rank, syllable = divmod(rank, 85)
        word += "bdfghjklmnprstvwz"[syllable // 5] + "aeiou"[syllable % 5]
    return word


class Watch(logging.Handler):
    """Peak memory since the last part, read off when the stage says that a part is done."""

    def __init__(self) -> None:
        super().__init__()
        self.parts: dict[str, dict[str, float]] = {}
        self._peak = self._anonymous = 0.0
        self._processor = time.process_time()
        threading.Thread(target=self._sample, daemon=True).start()

    def emit(self, record: logging.LogRecord) -> None:
        if found := re.match(r"prepare: (.+) in ([\d.]+) s$", record.getMessage()):
            self._read()
            name, seconds = found[1], float(found[2])
            processor = time.process_time()
            self.parts[name] = {
                "seconds": seconds, "processor": processor - self._processor,
                "peak": self._peak, "own": self._anonymous,
            }  # fmt: skip
            self._peak, self._anonymous, self._processor = 0.0, 0.0, processor
            print(f"  {name}: {self.parts[name]}", flush=True)

    def _sample(self) -> None:
        while True:
            self._read()
            time.sleep(0.05)

    def _read(self) -> None:
        status = Path("/proc/self/status").read_text()
        resident, own = (
            int(re.search(rf"{key}:\s+(\d+)", status)[1]) / 2**20 for key in ("VmRSS", "RssAnon")
        )
        self._peak, self._anonymous = max(self._peak, resident), max(self._anonymous, own)


def measure(args: argparse.Namespace, folder: Path) -> dict:
    """Runs the stage in this process; -> parts, and the largest resident set of the process."""
    from dgr_jax.data.vocabulary import SentencePiece
    from dgr_jax.experiments.generative import Prepare
    from dgr_jax.identifiers.embeddings import TfidfSvd
    from dgr_jax.identifiers.rq import ResidualQuantization
    from dgr_jax.identifiers.string import NaiveString
    from dgr_jax.stages.prepare import prepare

    embeddings = TfidfSvd(dim=args.dim, fit_passages=args.fit_passages)
    scheme = {
        "string": NaiveString(),
        "rq": ResidualQuantization(
            num_codes=args.num_codes, codebook_size=args.codebook_size, embeddings=embeddings
        ),
    }[args.identifiers]
    watch = Watch()
    logger = logging.getLogger("dgr_jax")
    logger.setLevel(logging.INFO)
    logger.addHandler(watch)
    experiment = argparse.Namespace(
        collection=beir.BeirCollection(args.collection),
        prepare=Prepare(
            tasks="quickstart",
            identifiers=scheme,
            vocabulary=SentencePiece(max_characters=args.max_characters),
        ),
    )
    start, processor = time.perf_counter(), time.process_time()
    prepare(experiment, folder)
    status = Path("/proc/self/status").read_text()
    return {
        "passages": int(args.passages),
        "identifiers": args.identifiers,
        "examples": json.loads((folder / "report.json").read_text())["examples"],
        "seconds": time.perf_counter() - start,
        "processor": time.process_time() - processor,
        "peak": int(re.search(r"VmHWM:\s+(\d+)", status)[1]) / 2**20,
        "parts": watch.parts,
        "bytes": sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()),
    }


def in_a_process(args: argparse.Namespace, passages: str, identifiers: str) -> dict:
    with tempfile.TemporaryDirectory(dir=args.folder or None) as parent:
        folder, collection = Path(parent, "prepare"), Path(parent, "collection")
        write_collection(collection, int(passages), args.words)
        folder.mkdir()
        command = [
            sys.executable, "-m", "benchmarks.prepare", f"--one={folder}",
            f"--collection={collection}", f"--passages={passages}", f"--identifiers={identifiers}",
        ]  # fmt: skip
        for name in ("dim", "fit_passages", "num_codes", "codebook_size", "max_characters"):
            command.append(f"--{name}={getattr(args, name)}")
        environment = os.environ | {"TF_CPP_MIN_LOG_LEVEL": "3", "JAX_PLATFORMS": "cpu"}
        subprocess.run(command, check=True, env=environment)
        return json.loads((Path(folder) / "measured.json").read_text())


def show(found: dict) -> None:
    count = found["passages"]
    print(
        f"\n{count:,} passages, identifiers {found['identifiers']}, examples "
        + ", ".join(f"{n:,} {name}" for name, n in found["examples"].items())
        + f"; {found['bytes'] / 2**30:.2f} GiB written"
    )
    print(
        "| part | seconds (of processor) | passages/s (of processor) | peak GiB (own) |\n"
        "|---|---|---|---|"
    )
    every = {"peak": found["peak"], "own": max(part["own"] for part in found["parts"].values())}
    for name, part in (found["parts"] | {"all": found | every}).items():
        clock, processor = (max(part[key], 0.05) for key in ("seconds", "processor"))
        print(
            f"| {name} | {clock:,.0f} ({processor:,.0f}) | {count / clock:,.0f} "
            f"({count / processor:,.0f}) | {part['peak']:.2f} ({part['own']:.2f}) |"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--passages", default="50000,100000")
    parser.add_argument("--identifiers", default="rq")
    parser.add_argument("--words", type=int, default=56)
    parser.add_argument("--dim", type=int, default=128)
    parser.add_argument("--fit_passages", type=int, default=500_000)
    parser.add_argument("--num_codes", type=int, default=4)
    parser.add_argument("--codebook_size", type=int, default=256)
    parser.add_argument("--max_characters", type=int, default=60_000_000)
    parser.add_argument(
        "--folder", default="", help="where to write; a temporary folder by default"
    )
    parser.add_argument("--output", help="JSON of all that was measured")
    parser.add_argument("--one", default="", help=argparse.SUPPRESS)
    parser.add_argument("--collection", default="", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        found = measure(args, Path(args.one))
        (Path(args.one) / "measured.json").write_text(json.dumps(found))
        return
    print(f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}")
    every = []
    for identifiers in args.identifiers.split(","):
        for passages in args.passages.split(","):
            every.append(in_a_process(args, passages, identifiers))
            show(every[-1])
    if args.output:
        Path(args.output).write_text(json.dumps(every, indent=1))


if __name__ == "__main__":
    main()
