"""Token embeddings from the passages: seconds and peak memory by the size of the collection.

    python -m benchmarks.corpus_start --passages=10000,100000,1000000

Synthetic passages of `benchmarks.prepare` (--words words in 4 sentences, and a title), a vocabulary
of --pieces pieces that is trained on some of them, embeddings of --width. Each size runs in a
process of its own. Seconds are the clock's and, in brackets, the processor's.

--exact=N, of so many passages: also the decomposition of ARPACK (scipy's svds), to rounding, and
the usual randomized one (scikit-learn's, 5 power iterations), with the root mean square difference
of the cosines of 500 pieces from ARPACK's.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.prepare import passages


def timed(name: str, measured: dict[str, float], call: Callable[[], Any]) -> Any:
    start, processor = time.perf_counter(), time.process_time()
    result = call()
    measured[name] = time.perf_counter() - start
    measured[f"{name}_processor"] = time.process_time() - processor
    return result


def measure(folder: Path, count: int, args: argparse.Namespace) -> dict[str, float]:
    from dgr_jax.corpora import store
    from dgr_jax.data.vocabulary import SentencePiece, Vocabulary
    from dgr_jax.models import corpus_start
    from dgr_jax.models.initial import Corpus
    from dgr_jax.stages.start import counted

    stored = store.write(passages(count, args.words), folder / "passages")
    pieces = SentencePiece(size=args.pieces, max_characters=3_000_000)
    pieces.write(folder, (stored[row].contents for row in range(min(count, 100_000))))
    vocabulary = Vocabulary.create(folder)
    measured: dict[str, float] = {"passages": count, "pieces": vocabulary.pieces}
    everything = Corpus(max_passages=count)
    blocks = timed("count", measured, lambda: list(counted(stored, vocabulary, everything)))
    measured["counts"] = sum(block.nnz for block in blocks)
    tokens, rows = timed("analyse", measured, lambda: corpus_start.embeddings(blocks, args.width))
    status = Path("/proc/self/status").read_text()
    measured["peak"] = int(re.search(r"VmHWM:\s+(\d+)", status)[1]) / 2**20
    if count == args.exact:
        compare(blocks, tokens, rows, measured)
    return measured


def compare(blocks: list, tokens: np.ndarray, rows: np.ndarray, measured: dict) -> None:
    """Adds the other decompositions of the same matrix to what was measured."""
    import scipy.sparse
    from scipy.sparse.linalg import svds
    from sklearn.utils.extmath import randomized_svd
    from threadpoolctl import threadpool_limits

    texts = scipy.sparse.vstack(blocks, "csc")[:, tokens]
    weights = np.log((1 + texts.shape[0]) / (1 + np.diff(texts.indptr)))
    matrix = (texts @ scipy.sparse.diags_array(weights.astype(np.float32))).T.tocsr()
    width = rows.shape[1]
    chosen = np.random.default_rng(0).choice(len(tokens), 500)

    def cosines(left: np.ndarray, values: np.ndarray | float) -> np.ndarray:
        found = (left * np.sqrt(values))[chosen]
        found /= np.linalg.norm(found, axis=1, keepdims=True)
        return found @ found.T

    with threadpool_limits(limits=1):
        left, values, _ = timed("arpack", measured, lambda: svds(matrix, width))
        exact = cosines(left, values)
        usual = lambda: randomized_svd(matrix, width, n_iter=5, random_state=0)
        left, values, _ = timed("randomized", measured, usual)
    error = lambda found: float(np.sqrt(np.mean((found - exact) ** 2)))
    measured["error"], measured["randomized_error"] = (
        error(cosines(rows, 1.0)),
        error(cosines(left, values)),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--passages", default="10000,100000")
    parser.add_argument("--words", type=int, default=56)
    parser.add_argument("--pieces", type=int, default=8000)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--exact", type=int, default=10_000)
    parser.add_argument("--one", type=int, default=0, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        with tempfile.TemporaryDirectory() as folder:
            print(json.dumps(measure(Path(folder), args.one, args)))
        return
    print("| passages | counts | counting, s | analysis, s | peak GiB |\n|---|---|---|---|---|")
    others = []
    for count in args.passages.split(","):
        command = [sys.executable, "-m", "benchmarks.corpus_start", f"--one={count}"]
        for name in ("words", "pieces", "width", "exact"):
            command.append(f"--{name}={getattr(args, name)}")
        found = json.loads(subprocess.run(command, check=True, stdout=-1).stdout)
        seconds = lambda name, found=found: f"{found[name]:.1f} ({found[f'{name}_processor']:.1f})"
        print(
            f"| {found['passages']:,} | {found['counts']:,} | {seconds('count')} | "
            f"{seconds('analyse')} | {found['peak']:.2f} |",
            flush=True,
        )
        if "arpack" in found:
            others.append(
                f"{found['passages']:,} passages: ARPACK {seconds('arpack')} s; randomized "
                f"{seconds('randomized')} s, error {found['randomized_error']:.4f}; ours "
                f"{seconds('analyse')} s, error {found['error']:.4f}"
            )
    print("\n".join(others))


if __name__ == "__main__":
    main()
