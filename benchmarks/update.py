"""Passages into the index of a trained student, beside making all of it again.

    python -m benchmarks.update --passages=10000,100000 --added=1000 --schemes=rq,title,multiview

The passages are drawn: words of a Zipf law, by topic. Nothing of a student is needed but what the
prepare stage leaves. A rebuild is that: passages, identifiers, tries, suffix array and postings of
all passages; it says nothing of the training that would follow it.
"""

from __future__ import annotations

import argparse
import os
import resource
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from dgr_jax.corpora import store
from dgr_jax.corpora.types import Passage
from dgr_jax.data.vocabulary import SentencePiece
from dgr_jax.experiments.generative import Prepare
from dgr_jax.identifiers.multiview import Multiview
from dgr_jax.identifiers.rq import ResidualQuantization
from dgr_jax.identifiers.semantic import KMeansTree
from dgr_jax.identifiers.string import NaiveString
from dgr_jax.identifiers.title import Title
from dgr_jax.model_dir import records
from dgr_jax.model_dir.index_versions import Versions
from dgr_jax.retrieval.bm25 import Bm25
from dgr_jax.retrieval.kept_postings import PLANS, place
from dgr_jax.retrieval.living import update
from dgr_jax.settings import describe
from dgr_jax.stages import identifiers

SCHEMES = {
    "rq": ResidualQuantization(),
    "semantic": KMeansTree(),
    "title": Title(),
    "string": NaiveString(),
    "multiview": Multiview(views=("title", "body")),
}
_WORDS, _TOPICS, _LENGTH = 50_000, 500, 60


def drawn(count: int, seed: int, prefix: str) -> Iterator[Passage]:
    """Passages of about 60 words, each of a topic whose words are common in it."""
    random = np.random.default_rng(seed)
    chance = 1 / np.arange(1, _WORDS + 1)
    words = random.choice(_WORDS, size=(count, _LENGTH), p=chance / chance.sum())
    topic = random.integers(_TOPICS, size=(count, 1))
    own = random.random(words.shape) < 0.4
    words = np.where(own, 1000 + topic * 90 + words % 90, words)
    for number, row in enumerate(words.tolist()):
        said = [f"w{word:x}" for word in row]
        title = " ".join(sorted(set(said), key=said.index)[-3:])
        yield Passage(f"{prefix}{number}", " ".join(said[: 30 + number % 31]), title)


def prepare(folder: Path, scheme: object, passages: list[Passage]) -> None:
    """What the prepare stage leaves for readers, without examples to train on."""
    held = store.write(passages, folder / "passages")
    settings = Prepare(tasks="none", identifiers=scheme, vocabulary=SentencePiece(size=4000))
    if not (folder / "spiece.model").exists():
        texts = (passage.contents for passage in passages[:5000])
        settings.vocabulary.write(folder, texts)
    identifiers.build(settings, folder, held, ())
    bm25 = Bm25()
    bm25.fit(held).kept().save(place(folder / PLANS, bm25), bm25, held.pids)
    recorded = {"prepare": describe(settings) | {"collection": "drawn"}}
    records.write_record(folder, status="done", fingerprint="drawn", settings=recorded)


def measure(scheme: str, count: int, added: int, repeats: int) -> None:
    """Prints a line of the table."""
    with tempfile.TemporaryDirectory() as name:
        prepared = Path(name) / "prepare"
        prepared.mkdir()
        passages = list(drawn(count, 0, "p"))
        start = time.perf_counter()
        prepare(prepared, SCHEMES[scheme], passages)
        rebuilt = time.perf_counter() - start
        versions, times, processor = Versions.of(Path(name), prepared), [], []
        for repeat in range(repeats):
            new, removed = list(drawn(added, repeat + 1, f"n{repeat}-")), passages[repeat].pid
            start, used = time.perf_counter(), time.process_time()
            update.update(versions, new, [removed])
            times.append(time.perf_counter() - start)
            processor.append(time.process_time() - used)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    print(
        f"| {scheme} | {count:,} | {statistics.median(times):.2f} ({min(times):.2f} to "
        f"{max(times):.2f}) | {statistics.median(processor):.2f} | {rebuilt:.1f} | {peak:.1f} |",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--passages", default="10000,100000")
    parser.add_argument("--added", type=int, default=1000)
    parser.add_argument("--schemes", default=",".join(SCHEMES))
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    print(f"{os.cpu_count()} cores; {args.added:,} passages added and one removed")
    print("| scheme | passages | s (least to most) | processor s | made again, s | peak GB |")
    print("|---|---|---|---|---|---|")
    for scheme in args.schemes.split(","):
        for count in args.passages.split(","):
            measure(scheme, int(count), args.added, args.repeats)


if __name__ == "__main__":
    main()
