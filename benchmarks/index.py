"""Sizes of an index: bytes, build seconds and peak memory, and restricting it.

    python -m benchmarks.index --static_path=DIR --output=index.json

Collections of random codes and of text-like identifiers, the same on every machine.  Each is
built from sorted int32 rows in a process of its own: by `trie.build` and, with --static_path (a
checkout of youtube/static-constraint-decoding), by the public library; `rounds` times in turn,
of which the medians are shown.  Peak memory is what the process takes above its rows.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import json
import math
import os
import pathlib
import platform
import re
import subprocess
import sys
import time
from collections.abc import Callable

import numpy as np

SEED = 0


@dataclasses.dataclass(frozen=True)
class Collection:
    """`count` sorted, unique identifiers: `length` random codes, or text when length is 0."""

    count: int
    vocabulary: int
    length: int = 0

    def rows(self) -> tuple[np.ndarray, np.ndarray | None]:
        """int32 [count, T] and their lengths, None when they are all T."""
        if self.length:
            return codes(self.count, self.length, self.vocabulary), None
        return texts(self.count, self.vocabulary)


COLLECTIONS = {
    "8.8M x 8 of 256": Collection(8_800_000, 256, 8),
    "20M x 8 of 2048": Collection(20_000_000, 2048, 8),
    "10M x 32 of 256": Collection(10_000_000, 256, 32),
    "9M text of 2-15": Collection(9_000_000, 32_128),
}
RESTRICTED = Collection(10_000_000, 256, 8)


def codes(count: int, length: int, vocabulary: int) -> np.ndarray:
    """int32 [count, length]: sorted rows of uniform codes; the leading codes tell them apart."""
    rng = np.random.default_rng(SEED)
    leading = min(length, int(62 / math.log2(vocabulary)))
    keys = rng.integers(0, vocabulary**leading, count + count // 100 + 100)
    keys = np.unique(keys)
    keys = np.delete(keys, rng.choice(len(keys), len(keys) - count, replace=False))
    rows = np.empty((count, length), np.int32)
    for depth in range(leading - 1, -1, -1):
        keys, rows[:, depth] = np.divmod(keys, vocabulary)
    for depth in range(leading, length):
        rows[:, depth] = rng.integers(0, vocabulary, count, np.int32)
    return rows


def texts(count: int, vocabulary: int, longest: int = 15) -> tuple[np.ndarray, np.ndarray]:
    """Sorted int32 [count, longest] and lengths 2 to `longest`: tokens of a Zipf distribution.

    A row begins like its family does, for 1.5 tokens on average; 20 rows are of one family.
    """
    rng = np.random.default_rng(SEED)
    drawn = count + count // 3

    def zipf(size):
        return np.minimum(3 * (vocabulary / 3) ** rng.random(size, np.float32), vocabulary - 1)

    family = rng.integers(0, drawn // 20, drawn, np.int32)
    like_family = rng.geometric(0.4, drawn).astype(np.uint8) - 1
    lengths = np.minimum(2 + rng.poisson(4, drawn), longest).astype(np.uint8)
    rows = np.zeros((drawn, longest), np.uint16)
    for depth in range(longest):
        column = zipf(drawn)
        column = np.where(depth < like_family, zipf(drawn // 20)[family], column)
        rows[:, depth] = np.where(depth < lengths, column, 0)
    keys = np.zeros((-(-longest // 4), drawn), np.uint64)
    for depth in range(longest):
        keys[depth // 4] |= rows[:, depth].astype(np.uint64) << np.uint64(48 - 16 * (depth % 4))
    order = np.lexsort(keys[::-1])
    new = np.append(True, (keys[:, order[1:]] != keys[:, order[:-1]]).any(0))
    order = order[new]
    order = np.delete(order, rng.choice(len(order), len(order) - count, replace=False))
    return rows[order].astype(np.int32), lengths[order]


@dataclasses.dataclass(frozen=True)
class Cost:
    """Seconds by the clock and of the processor, and peak bytes above those held before."""

    seconds: float = 0.0
    cpu_seconds: float = 0.0
    peak: int = 0


def memory(field: str) -> int:
    """VmRSS or VmHWM (the peak of VmRSS) of this process, in bytes."""
    status = pathlib.Path("/proc/self/status").read_text()
    return 1024 * int(re.search(rf"{field}:\s+(\d+)", status)[1])


def measured(function: Callable):
    """(what it returns, its Cost)."""
    gc.collect()
    pathlib.Path("/proc/self/clear_refs").write_text("5")  # begins a new peak
    before, begin, cpu = memory("VmRSS"), time.perf_counter(), time.process_time()
    result = function()
    seconds, cpu = time.perf_counter() - begin, time.process_time() - cpu
    return result, Cost(seconds, cpu, memory("VmHWM") - before)


def static_library(path: str, module: str):
    """A module of the public library in `path`."""
    if path not in sys.path:
        sys.path.insert(0, path)
    return __import__(f"static_decoding.{module}", fromlist=[module])


def build_ours(collection: Collection, rows, lengths) -> dict:
    from dgr_jax.decoding import trie

    eos_id = None if collection.length else 1
    build = lambda: trie.build(rows, lengths, eos_id=eos_id, vocab_size=collection.vocabulary)
    index, cost = measured(build)
    padded = sum(array.nbytes for _, array in index.padded().items())
    return {"bytes": index.nbytes, "device_bytes": padded} | dataclasses.asdict(cost)


def build_static(collection: Collection, rows, path: str) -> dict:
    library = static_library(path, "csr_utils")
    build = lambda: library.build_static_index(rows, collection.vocabulary)
    arrays, cost = measured(build)
    size = sum(array.nbytes for array in arrays if isinstance(array, np.ndarray))
    return {"bytes": size, "device_bytes": size} | dataclasses.asdict(cost)


def restrict_ours(share: float) -> dict:
    """Seconds of Trie.restrict, of putting the result on the device, and the traces of a search."""
    import jax
    import jax.numpy as jnp

    from dgr_jax.decoding import trie
    from dgr_jax.decoding.beam_search import beam_search

    rows, _ = RESTRICTED.rows()
    index = trie.build(rows, vocab_size=RESTRICTED.vocabulary)
    mask = np.random.default_rng(SEED).random(len(rows)) < share
    traces = []

    @jax.jit
    def search(constraint):
        traces.append(1)
        step = lambda tokens, cache, position: (jnp.zeros((*tokens.shape, 256)), cache)
        return beam_search(step, constraint, None, batch_size=1, num_beams=10)

    jax.block_until_ready(search(index.constraint()))
    part, cost = measured(lambda: index.restrict(mask))
    begin = time.perf_counter()
    constraint = jax.block_until_ready(part.constraint())
    put = time.perf_counter() - begin
    found = part.table_rows(np.asarray(search(constraint).rows))
    if not mask[found].all():
        raise AssertionError("restrict: a row that is not allowed was returned")
    return {
        "share": share,
        "put_seconds": put,
        "bytes": part.nbytes,
        "traces": len(traces),
    } | dataclasses.asdict(cost)


def in_child(module: str, arguments: list[str]) -> dict:
    """Runs a module with `--child`; what it prints last, read as JSON."""
    command = [sys.executable, "-m", module, "--child", *arguments]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def machine() -> str:
    return f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores"


def child(options: argparse.Namespace) -> dict:
    if options.system == "restrict":
        return restrict_ours(options.share)
    collection = COLLECTIONS[options.names[0]]
    rows, lengths = collection.rows()
    if options.system == "static":
        return build_static(collection, rows, options.static_path)
    return build_ours(collection, rows, lengths)


def medians(runs: list[dict]) -> dict:
    return {name: float(np.median([run[name] for run in runs])) for name in runs[0]}


def compare(name: str, options: argparse.Namespace) -> dict:
    """Both libraries in turn on one collection."""
    runs = {"trie": [], "static": []}
    systems = ["trie"]
    if options.static_path and name in options.static_names:
        systems.append("static")
    for _ in range(options.rounds):
        for system in systems:
            arguments = [f"--names={name}", f"--system={system}"]
            arguments.append(f"--static_path={options.static_path}")
            runs[system].append(in_child("benchmarks.index", arguments))
    return {"name": name} | {system: medians(runs[system]) for system in systems}


def show(result: dict) -> None:
    for system in ("trie", "static"):
        if system not in result:
            continue
        found, reference = result[system], result.get("static", {})
        cells = [f"{found[k] / 1e6:9.1f} MB {k}" for k in ("bytes", "device_bytes", "peak")]
        cells.append(f"{found['seconds']:7.2f} s ({found['cpu_seconds']:.2f} s of processor)")
        if reference and system == "trie":
            compared = ("bytes", "seconds", "cpu_seconds", "peak")
            ratios = (f"{k} {found[k] / reference[k]:.2f}" for k in compared)
            cells.append("of the public: " + ", ".join(ratios))
        print(f"{result['name']:16s} {system:7s}", *cells, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    names = lambda text: text.split(",")
    parser.add_argument("--names", type=names, default=list(COLLECTIONS))
    parser.add_argument("--static_path", default="", help="checkout of the public library")
    parser.add_argument("--static_names", type=names, default=list(COLLECTIONS)[:2])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--shares", default="0.9,0.1", help="passages that restrict leaves")
    parser.add_argument("--output", help="JSON file of the results")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--system", default="trie", help=argparse.SUPPRESS)
    parser.add_argument("--share", type=float, default=0.0, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(json.dumps(child(options)))
        return
    results = []
    for name in options.names:
        results.append(compare(name, options))
        show(results[-1])
    restricted = []
    for share in filter(None, options.shares.split(",")):
        run = in_child("benchmarks.index", ["--system=restrict", f"--share={share}"])
        restricted.append(run)
        print(f"restrict 10M x 8 of 256 to {share}:", json.dumps(run), flush=True)
    if options.output:
        whole = {"machine": machine(), "collections": results, "restrict": restricted}
        pathlib.Path(options.output).write_text(json.dumps(whole, indent=1))


if __name__ == "__main__":
    main()
