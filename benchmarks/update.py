"""Passages into the index of a trained student and out of it, beside making all of it again.

    python -m benchmarks.update --passages=10000,100000 --added=1000 --schemes=rq,title,multiview

The passages are drawn: words of a Zipf law, by topic. Nothing of a student is needed but what the
prepare stage leaves, and what says that there is one; the encoder of `dense` and its vectors are
drawn too. Made again is what the prepare stage makes: passages, identifiers, tries, suffix array
and postings of all passages; it says nothing of the training that would follow it.

Times are those of processors, without the reading of the passages that come, but for the whole
command, which imports, reads and compiles too. Times by the clock stand in brackets; on a machine
that is shared they say little.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import jax
import numpy as np
from flax import linen as nn
from flax import traverse_util

from dgr_jax import partitioning
from dgr_jax.corpora import store
from dgr_jax.corpora.types import Passage
from dgr_jax.data.vocabulary import SentencePiece, Vocabulary
from dgr_jax.experiments.generative import Prepare
from dgr_jax.identifiers.multiview import Multiview
from dgr_jax.identifiers.rq import ResidualQuantization
from dgr_jax.identifiers.scheme import Scheme
from dgr_jax.identifiers.semantic import KMeansTree
from dgr_jax.identifiers.string import NaiveString
from dgr_jax.identifiers.title import Title
from dgr_jax.model_dir import records
from dgr_jax.models import tensor_files
from dgr_jax.models.dual_encoder import DualEncoder, DualEncoderConfig
from dgr_jax.models.t5 import T5Config
from dgr_jax.retrieval import dense, kinds
from dgr_jax.retrieval.bm25 import Bm25
from dgr_jax.retrieval.dense import DenseSearch
from dgr_jax.retrieval.generative import Search
from dgr_jax.retrieval.kept_postings import PLANS, place
from dgr_jax.retrieval.living import update
from dgr_jax.settings import describe
from dgr_jax.stages import identifiers

SCHEMES = {
    "rq": ResidualQuantization(),
    "semantic": KMeansTree(),
    "title": Title(),
    "string": NaiveString(reserve=100_000),
    "multiview": Multiview(views=("title", "body")),
    "dense": Title(),  # an encoder has no use for them
}
TINY = {"emb_dim": 128, "num_heads": 4, "head_dim": 32, "mlp_dim": 256,
        "num_encoder_layers": 2, "num_decoder_layers": 2}  # fmt: skip
COMPACTED = 200_000  # passages up to which a compaction is measured
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


def prepare(folder: Path, scheme: Scheme, passages: list[Passage], identified: bool = True) -> None:
    """What the prepare stage leaves for readers, without examples to train on."""
    held = store.write(passages, folder / "passages")
    settings = Prepare(tasks="none", identifiers=scheme, vocabulary=SentencePiece(size=4000))
    if not (folder / "spiece.model").exists():
        texts = (passage.contents for passage in passages[:5000])
        settings.vocabulary.write(folder, texts)
    identifiers.build(settings, folder, held, ())
    bm25 = Bm25()
    bm25.fit(held).kept().save(place(folder / PLANS, bm25), bm25, held.pids)
    if not identified:
        for name in ("identifiers", "trie"):
            shutil.rmtree(folder / name)
    recorded = {"prepare": describe(settings) | {"collection": "drawn"}}
    records.write_record(folder, status="done", fingerprint="drawn", settings=recorded)


def student(model_dir: Path, scheme: str, count: int) -> None:
    """What says that a student was trained; of a dense one also its encoder and its vectors."""
    folder = model_dir / "student"
    folder.mkdir()
    vocabulary = Vocabulary.load(model_dir / "prepare")
    t5 = T5Config(vocabulary.size, **TINY)
    if scheme != "dense":
        kind = "multiview" if scheme == "multiview" else "docid"
        kinds.write_student(folder, kind, t5, Search(), [folder.name])
        return
    config = DualEncoderConfig(t5)
    kinds.write_student(folder, "dense", config, DenseSearch(), [folder.name])
    params = nn.meta.unbox(partitioning.boxed_params(DualEncoder(config), jax.random.key(0)))
    arrays = traverse_util.flatten_dict(jax.tree.map(np.asarray, params), sep="/")
    tensor_files.write_folder(folder, arrays)
    vectors = np.random.default_rng(0).standard_normal((count, config.dim), np.float32)
    np.save(folder / dense.VECTORS, vectors)


class Clock:
    """Seconds of processors, and by the clock, of what is done in a context."""

    def __init__(self) -> None:
        self.used: list[float] = []
        self.passed: list[float] = []

    def __enter__(self) -> None:
        self._start = time.perf_counter(), _processors()

    def __exit__(self, *_: object) -> None:
        self.passed.append(time.perf_counter() - self._start[0])
        self.used.append(_processors() - self._start[1])

    def __str__(self) -> str:
        return f"{statistics.median(self.used):.2f} ({statistics.median(self.passed):.1f})"


def _processors() -> float:
    """Seconds that this process and those that it waited for have used."""
    used = os.times()
    return used.user + used.system + used.children_user + used.children_system


def measure(scheme: str, count: int, added: int, repeats: int) -> None:
    """Prints a line of the table."""
    made, command, adding, same, removing, compaction = (Clock() for _ in range(6))
    with tempfile.TemporaryDirectory() as name:
        model_dir, passages = Path(name), list(drawn(count, 0, "p"))
        (model_dir / "prepare").mkdir()
        with made:
            prepare(model_dir / "prepare", SCHEMES[scheme], passages, scheme != "dense")
        student(model_dir, scheme, count)
        versions = update.versions(model_dir)
        for repeat in range(repeats):
            new, removed = list(drawn(added, repeat + 1, f"n{repeat}-")), passages[repeat].pid
            with adding:
                update.update(versions, new, [removed])
        with same:
            update.update(versions, new)
        with removing:
            update.update(versions, [], [passage.pid for passage in new])
        if count <= COMPACTED:
            with compaction:
                update.compact(versions)
        files = model_dir / "new.jsonl"
        files.write_text("\n".join(json.dumps(asdict(passage)) for passage in new))
        for _ in range(repeats):
            asked = f"--model_dir={model_dir}", f"--add={files}"
            with command:
                process = subprocess.Popen([sys.executable, "-m", "dgr_jax.update", *asked])
                _, status, usage = os.wait4(process.pid, 0)
            assert status == 0
            update.rollback(versions)
    peak = usage.ru_maxrss / 1e6
    compacted = compaction if compaction.used else "not measured"
    cells = adding, command, same, removing, compacted, made, f"{peak:.1f}"
    print(f"| {scheme} | {count:,} | {' | '.join(map(str, cells))} |", flush=True)


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    return next(line.partition(": ")[2] for line in lines if line.startswith("model name"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--passages", default="10000,100000")
    parser.add_argument("--added", type=int, default=1000)
    parser.add_argument("--schemes", default=",".join(SCHEMES))
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    print(
        f"{os.cpu_count()} cores of {_processor()}, load {os.getloadavg()[0]:.0f}; "
        f"{args.added:,} passages added and one removed, all of them added again, and removed"
    )
    print("| scheme | passages | added | command | again | removed | compacted | made again | GB |")
    print("|---|---|---|---|---|---|---|---|---|")
    for scheme in args.schemes.split(","):
        for count in args.passages.split(","):
            measure(scheme, int(count), args.added, args.repeats)


if __name__ == "__main__":
    main()
