"""One step of substring-constrained decoding: a suffix array on the device, FM-indexes in Python.

    python -m benchmarks.substring --tokens=50000000 --output=substring.json

The corpus is made up, the same on every machine: Zipf tokens and often repeated phrases.  All
three answer for the same beams and scores, taken from a beam search over unigram frequencies plus
noise: which 15 continuations of the 15 beams of a query are best?

- ours: SubstringConstraint.expand, jitted, all queries together;
- wavelet: an FM-index over token ids (as SEAL's), from the PyPI package wavelet-matrix: for each
  beam, the distinct symbols of its range of the Burrows-Wheeler transform (range_list), then two
  ranks for each beam that is kept;
- fm_index: the PyPI package fm-index, a string of one character a token.  It counts and locates
  strings, so for each beam either its occurrences are located and their next tokens read, or,
  where there are more of them than tokens, every token is tried by a count.  Only one query, once.

In the run: all three must find exactly the same legal tokens for every beam, with the same counts
for ours and wavelet, and the same 15 best.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import importlib.metadata
import json
import pathlib
import resource
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np

from dgr_jax.analysis.speed import device_name
from dgr_jax.decoding import suffix_array
from dgr_jax.decoding.suffix_array_expand import SpanState

BEAMS = 15
LENGTH = 10
VOCAB = 32_128
PASSAGE = 100
SEED = 0


def corpus(count: int) -> np.ndarray:
    """uint16 [count], passages ended by 0: Zipf tokens, two fifths overwritten by phrases."""
    rng = np.random.default_rng(SEED)
    weights = 1 / (np.arange(VOCAB - 3) + 2.7) ** 1.05
    steps = np.cumsum(weights / weights.sum())
    tokens = np.empty(count, np.uint16)
    for part in np.array_split(np.arange(count), 1 + count // 4_000_000):
        tokens[part] = np.searchsorted(steps[:-1], rng.random(len(part))) + 3
    phrases = 200_000
    lengths, origins = rng.integers(2, 15, phrases), rng.integers(0, count - 20, phrases)
    offsets = np.arange(15)
    for _ in range(1 + count // 20_000_000):
        copies = min(count, 20_000_000) // 20
        which = (phrases ** rng.random(copies)).astype(np.int64) - 1
        places = rng.integers(0, count - 20, copies)
        inside = offsets < lengths[which][:, None]
        copied = tokens[origins[which][:, None] + offsets]
        tokens[(places[:, None] + offsets)[inside]] = copied[inside]
    tokens[PASSAGE - 1 :: PASSAGE] = 0
    tokens[-1] = 0
    return tokens


class Wavelet:
    """An FM-index of the reversed tokens: a span grows at its end."""

    def __init__(self, tokens: np.ndarray):
        from pydivsufsort import divsufsort
        from wavelet_matrix import WaveletMatrix

        reversed_ = tokens[::-1].astype(">u2")
        order = divsufsort(reversed_.view(np.uint8))
        order = order[order % 2 == 0] // 2
        before = np.where(order > 0, reversed_[order - 1], 0)
        transform = np.append(reversed_[-1], before).astype(np.uint16)
        del order, before
        counts = np.bincount(tokens, minlength=VOCAB + 1)
        self.smaller = (1 + np.cumsum(counts) - counts).tolist()
        self.matrix = WaveletMatrix(transform)
        self.root = (0, len(transform))

    def step(self, ranges, scores, prior):
        """The best continuations (total, beam, token) of beams [(lo, hi)], and their ranges."""
        rank, offers = self.matrix.rank, []
        for beam, (lo, hi) in enumerate(ranges):
            if np.isfinite(prior[beam]):
                legal = [entry["value"] for entry in self.matrix.range_list(lo, hi, 1)]
                offers.append(best_of(np.array(legal, np.int64), beam, scores, prior))
        chosen = best_of_all(offers)
        following = []
        for _, beam, token in chosen:
            smaller, (lo, hi) = self.smaller[token], ranges[beam]
            following.append((smaller + rank(token, lo), smaller + rank(token, hi)))
        return chosen, following + [(0, 0)] * (BEAMS - len(following))

    def steps(self, ranges, scores, prior):
        """`step` of all queries."""
        return [self.step(*query) for query in zip(ranges, scores, prior, strict=True)]


class FmIndex:
    """The package's index of the tokens as characters, beside the tokens themselves."""

    def __init__(self, tokens: np.ndarray):
        from fm_index import FMIndex

        self.tokens = tokens
        self.index = FMIndex(as_text(tokens))

    def legal(self, span: np.ndarray) -> np.ndarray:
        text = as_text(span)
        if self.index.count(text) > VOCAB:
            count = self.index.count
            every = as_text(np.arange(1, VOCAB))
            return 1 + np.flatnonzero([count(text + letter) for letter in every])
        places = np.array(self.index.locate(text), np.int64) + len(span)
        found = np.unique(self.tokens[places])
        return found[found > 0].astype(np.int64)

    def step(self, spans, scores, prior):
        """As Wavelet.step, without ranges: the span is searched again."""
        offers = [
            best_of(self.legal(span), beam, scores, prior)
            for beam, span in enumerate(spans)
            if np.isfinite(prior[beam])
        ]
        return best_of_all(offers)


def as_text(tokens: np.ndarray) -> str:
    """One character a token, beyond the surrogates."""
    return (tokens.astype("<u4") + 0x10000).tobytes().decode("utf-32-le")


def best_of(legal, beam, scores, prior):
    """(totals, beams, tokens) of the BEAMS best legal tokens of a beam."""
    totals = scores[beam][legal] + prior[beam]
    if len(legal) > BEAMS:
        best = np.argpartition(-totals, BEAMS)[:BEAMS]
        legal, totals = legal[best], totals[best]
    return totals, np.full(len(legal), beam), legal


def best_of_all(offers):
    """[(total, beam, token)], best first."""
    if not offers:
        return []
    totals, beams, tokens = (np.concatenate(part) for part in zip(*offers, strict=True))
    order = np.lexsort((tokens, beams, -totals))[:BEAMS]
    return list(zip(totals[order], beams[order].tolist(), tokens[order].tolist(), strict=True))


def scores_of(index, queries, depth):
    """f32 [B, M, V]: unigram log-frequencies plus noise, as logits that a beam search reads."""
    rng = np.random.default_rng([SEED, depth])
    noise = rng.standard_normal((queries, BEAMS, VOCAB), np.float32)
    return 2 * noise + np.log(np.diff(index.first) + 1).astype(np.float32)


def timed(function, arguments, rounds):
    """(result, seconds of each round); the first, which compiles, is not counted."""
    result, seconds = function(*arguments), []
    for _ in range(rounds):
        start = time.perf_counter()
        result = function(*arguments)
        seconds.append(time.perf_counter() - start)
    return result, seconds


def chosen_of(candidates, query):
    total, parent, token = (
        np.asarray(x)[query].tolist()
        for x in (candidates.log_probs, candidates.parent, candidates.token_ids)
    )
    chosen = zip(total, parent, token, strict=True)
    return [offer for offer in chosen if offer[0] > -np.inf]


def compare(index, tokens, queries, rounds, with_strings):
    """Milliseconds a query and step of each, by depth; raises AssertionError where they differ."""
    constraint = index.constraint(max_length=LENGTH)
    wavelet = Wavelet(tokens)
    strings = FmIndex(tokens) if with_strings else None
    expand = jax.jit(lambda *arguments: constraint.expand(*arguments, width=BEAMS))
    ranges = [[wavelet.root] + [(0, 0)] * (BEAMS - 1)] * queries
    spans = np.zeros((queries, BEAMS, 0), np.int64)
    init = constraint.init(queries)
    alone = lambda leaf: jnp.full((queries, BEAMS), -1).at[:, 0].set(leaf)
    state = SpanState(*map(alone, init))
    prior = np.full((queries, BEAMS), -np.inf, np.float32)
    prior[:, 0] = 0
    steps = []
    for depth in range(LENGTH):
        scores = scores_of(index, queries, depth)
        placed = state, jnp.asarray(scores), jnp.asarray(prior)
        found, ours = timed(lambda *x: jax.block_until_ready(expand(*x)), placed, rounds)
        there, theirs = timed(wavelet.steps, (ranges, scores, prior), rounds)
        for query, (chosen, _) in enumerate(there):
            assert chosen == chosen_of(found, query), f"depth {depth}, query {query}"
        occurrences = np.asarray(state.hi - state.lo)[np.isfinite(prior)]
        legal = check_legal(index, wavelet, state, ranges, prior)
        row = {"depth": depth, "occurrences": spread(occurrences), "legal": spread(legal)}
        row |= {"ours_ms": spread(ours, 1e3 / queries), "wavelet_ms": spread(theirs, 1e3 / queries)}
        if strings and depth:
            start = time.perf_counter()
            chosen = strings.step(spans[0], scores[0], prior[0])
            row["fm_index_ms"] = 1e3 * (time.perf_counter() - start)
            assert chosen == chosen_of(found, 0), f"depth {depth}"
            check_strings(index, strings, state, spans[0], prior[0])
        row["faster_than_wavelet"] = row["wavelet_ms"]["median"] / row["ours_ms"]["median"]
        steps.append(row)
        print(json.dumps(row), flush=True)
        ranges = [following for _, following in there]
        parent, token = np.asarray(found.parent), np.asarray(found.token_ids)
        spans = np.take_along_axis(spans, parent[..., None], 1)
        spans = np.concatenate([spans, token[..., None]], -1)
        state, prior = found.next_state, np.array(found.log_probs)
    indexes = {"wavelet": wavelet, "fm_index": strings}
    del wavelet, strings
    sizes = {name: released(indexes, name) for name in list(indexes) if indexes[name]}
    return {"ours": constraint.nbytes, **sizes}, steps


def check_legal(index, wavelet, state, ranges, prior):
    """The number of legal tokens of each beam; both know the same, equally often."""
    numbers, leaves = [], [np.asarray(leaf) for leaf in state]
    for query, beam in np.argwhere(np.isfinite(prior)):
        lo, hi, depth = (int(leaf[query, beam]) for leaf in leaves)
        tokens, counts = index.next_tokens(lo, hi, depth)
        listed = wavelet.matrix.range_list(*ranges[query][beam], 1)
        known = {entry["value"]: entry["count"] for entry in listed}
        assert known == dict(zip(tokens.tolist(), counts.tolist(), strict=True))
        numbers.append(len(tokens))
    return numbers


def check_strings(index, strings, state, spans, prior):
    leaves = [np.asarray(leaf)[0] for leaf in state]
    for beam in np.flatnonzero(np.isfinite(prior)):
        tokens, _ = index.next_tokens(*(int(leaf[beam]) for leaf in leaves))
        np.testing.assert_array_equal(strings.legal(spans[beam]), tokens)


def released(indexes, name):
    """Bytes that the process gives back with an index (glibc): the packages do not tell."""
    trim = ctypes.CDLL(None).malloc_trim
    gc.collect()
    trim(0)
    before = resident()
    del indexes[name]
    gc.collect()
    trim(0)
    return before - resident()


def resident():
    """Bytes of memory that this process holds (Linux)."""
    pages = int(pathlib.Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


def spread(values, scale=1.0):
    values = scale * np.asarray(values, np.float64)
    low, median, high = np.percentile(values, [0, 50, 100])
    return {"median": round(median, 4), "min": round(low, 4), "max": round(high, 4)}


def peak_memory():
    """GB that this process has held at most."""
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2)


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--tokens", type=int, default=50_000_000)
    parser.add_argument("--queries", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--no_fm_index", action="store_true", help="leave out the slowest")
    parser.add_argument("--output", type=pathlib.Path)
    arguments = parser.parse_args()
    tokens = corpus(arguments.tokens)
    start = time.perf_counter()
    passages = (part[part > 0] for part in np.split(tokens, np.flatnonzero(tokens == 0)[:-1] + 1))
    index = suffix_array.build(passages, vocab_size=VOCAB, max_length=LENGTH)
    report = {
        "device": device_name(jax.devices()[0]),
        "python": sys.version.split()[0],
        "versions": {
            name: importlib.metadata.version(name)
            for name in ("jax", "pydivsufsort", "wavelet-matrix", "fm-index")
        },
        "tokens": len(index),
        "build_seconds": round(time.perf_counter() - start, 1),
        "build_peak_gb": peak_memory(),
        "planned_build_bytes": suffix_array.planned_bytes(len(index), index.num_passages, VOCAB)[
            "build"
        ],
        "bytes": {name: array.nbytes for name, array in index.arrays().items()},
        "bytes_per_token": round(index.nbytes / len(index), 3),
    }
    print(json.dumps(report, indent=1), flush=True)
    sizes, steps = compare(
        index, tokens, arguments.queries, arguments.rounds, not arguments.no_fm_index
    )
    mean = lambda name: float(np.mean([row[name]["median"] for row in steps]))
    report |= {
        "index_bytes": sizes,
        "steps": steps,
        "ours_ms": round(mean("ours_ms"), 3),
        "wavelet_ms": round(mean("wavelet_ms"), 3),
        "faster_than_wavelet": round(mean("wavelet_ms") / mean("ours_ms"), 1),
        "peak_gb": peak_memory(),
    }
    print({name: report[name] for name in ("ours_ms", "wavelet_ms", "faster_than_wavelet")})
    if arguments.output:
        arguments.output.write_text(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
