"""Whole queries to a student that writes titles, pseudo-queries and body spans, and their parts.

    python -m benchmarks.multiview --passages 250 100000 --rounds=5

The corpus is made up (benchmarks.substring.corpus), with a title and two pseudo-queries a passage;
the student has drawn parameters. Systems, in turns, with the same student, queries and ranking:

- ours      all constraints on the device
- host      the body's constraint is an FM-index that Python asks for every beam, as the published
            code does (wavelet-matrix over token ids, through jax.pure_callback); left out without
            the package. Every query must find the same passages as ours

Parts are those of ours: the search of each view until its result is there, what the host does with
the identifiers, and the scores of passages. Milliseconds of processor a query (all threads), by the
size of --batches; on a machine that others use they say more than the clock.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import importlib.util
import json
import pathlib
import time

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import decode, substring
from dgr_jax import partitioning
from dgr_jax.analysis.speed import device_name
from dgr_jax.decoding import suffix_array, trie
from dgr_jax.decoding.constraint import Candidates
from dgr_jax.decoding.suffix_array_expand import SpanState
from dgr_jax.identifiers.table import IdentifierTable
from dgr_jax.models.t5 import T5Config
from dgr_jax.retrieval.multiview.index import MultiviewIndex
from dgr_jax.retrieval.multiview.search import MultiviewDecoder, MultiviewSearch
from dgr_jax.retrieval.search_programs import decode_fn

VOCAB, BEAMS, SPAN, EOS = substring.VOCAB, substring.BEAMS, substring.LENGTH, 1
MARKERS = {"title": VOCAB - 1, "body": VOCAB - 2, "query": VOCAB - 3}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class HostSpans:
    """A Constraint that asks an FM-index on the host; its intervals are those of the FM-index."""

    index: substring.Wavelet = dataclasses.field(metadata={"static": True})

    max_length = fixed_length = SPAN
    renormalise = False

    def init(self, batch_size: int) -> SpanState:
        zeros = jnp.zeros(batch_size, jnp.int32)
        return SpanState(zeros, zeros + self.index.root[1], zeros)

    def expand(self, state: SpanState, scores, prior, *, width: int) -> Candidates:
        shape = (len(prior), width)
        whole, real = (jax.ShapeDtypeStruct(shape, dtype) for dtype in (jnp.int32, jnp.float32))
        prior = jnp.where(state.depth >= 0, prior, -jnp.inf)
        answer = jax.pure_callback(
            self.ask, (real, *[whole] * 4), state.lo, state.hi, scores, prior
        )
        total, parent, token, low, high = answer
        valid = total > -jnp.inf
        depth = jnp.where(valid, jnp.take_along_axis(state.depth, parent, -1) + 1, -1)
        following = SpanState(jnp.where(valid, low, -1), jnp.where(valid, high, -1), depth)
        return Candidates(parent, token, total, following, valid & (depth == SPAN))

    def ask(self, lo, hi, scores, prior):
        """The best continuations of the beams of all queries."""
        lo, hi, scores, prior = map(np.asarray, (lo, hi, scores, prior))
        ranges = [
            list(zip(*pair, strict=True)) for pair in zip(lo.tolist(), hi.tolist(), strict=True)
        ]
        out = np.zeros((5, len(prior), BEAMS))
        out[0] = -np.inf
        for query, (chosen, following) in enumerate(self.index.steps(ranges, scores, prior)):
            for place, (offer, interval) in enumerate(zip(chosen, following, strict=False)):
                out[:, query, place] = *offer, *interval
        return out[0].astype(np.float32), *out[1:].astype(np.int32)

    def rows(self, state: SpanState):
        return jnp.where(state.depth == SPAN, state.lo, -1)


class HostDecoder(MultiviewDecoder):
    """Looks its spans up in the suffix array, as the intervals of the FM-index are others."""

    def _written(self, count, results):
        written = super()._written(count, results)
        find = lambda part: self.index.text.find(part.tokens, (part.tokens > 0).sum(-1))
        for place, part in enumerate(written):
            if part.view == "body":
                lo, hi = find(part)[:2]
                there = part.log_probs > -np.inf
                lo, hi = (np.where(there, leaf, 0) for leaf in (lo, hi))
                written[place] = part._replace(lo=lo, hi=hi)
        return written


def students(passages: int, batch: int) -> tuple[MultiviewDecoder, MultiviewDecoder | None]:
    """Ours and, where the package is there, the same with an FM-index on the host."""
    tokens = substring.corpus(passages * substring.PASSAGE)
    parts = [part[part > 0] for part in np.split(tokens, np.flatnonzero(tokens == 0)[:-1] + 1)]
    text = suffix_array.build(parts, vocab_size=VOCAB, max_length=SPAN)
    random, tables, tries = np.random.default_rng(3), {}, {}
    for view, length, each in (("title", 4, 1), ("query", 8, 2)):
        rows = random.choice(tokens[tokens > 2], (each * len(parts), length)).astype(np.int32)
        rows = np.pad(rows, ((0, 0), (0, 1)), constant_values=EOS)
        owners = np.arange(len(rows)) // each
        tables[view] = IdentifierTable.from_rows(rows, view=view, passages=owners)
        table = tables[view]
        tries[view] = trie.build(table.tokens, table.lengths, vocab_size=VOCAB)
    config = T5Config(vocab_size=VOCAB, **decode.SIZES["tiny"])
    mesh = partitioning.make_mesh(devices=jax.devices()[:1])
    params = jax.device_put(decode.random_params(config), partitioning.replicated(mesh))
    index = MultiviewIndex(text, tables, special_ids=(EOS, *MARKERS.values()))
    search = MultiviewSearch(num_beams=BEAMS, batch_size=batch)
    made = lambda kind: kind(
        config, params, index, tries, MARKERS, search, mesh, span_tokens=SPAN, opening=None
    )
    if importlib.util.find_spec("wavelet_matrix") is None:
        print("host is left out: it needs the package wavelet-matrix")
        return made(MultiviewDecoder), None
    host = made(HostDecoder)
    host._constraints = host._constraints | {"body": HostSpans(substring.Wavelet(tokens))}
    decode_body = decode_fn(config, BEAMS, SPAN, record=True)
    host._decode = host._decode | {"body": decode_body}
    return made(MultiviewDecoder), host


def spent(function, *arguments):
    """(result, processor milliseconds)"""
    start = time.process_time()
    result = jax.block_until_ready(function(*arguments))
    return result, 1e3 * (time.process_time() - start)


def parts_of(student: MultiviewDecoder, tokens: np.ndarray, size: int) -> dict[str, float]:
    """Processor milliseconds of the parts of one batch."""
    results, times = {}, {}
    for view in student.markers:
        results[view], times[view] = spent(student._start, view, tokens, size)
    written, times["to the host"] = spent(student._written, len(tokens), results)
    scores = type(student.index)._scores
    inside = []

    def timed_scores(*arguments):
        found, milliseconds = spent(scores, *arguments)
        inside.append(milliseconds)
        return found

    index = copy.copy(student.index)
    object.__setattr__(index, "_scores", lambda *rest: timed_scores(index, *rest))
    _, ranking = spent(index.rank, written)
    return times | {"scores of passages": sum(inside), "ranking": ranking - sum(inside)}


def measured(passages: int, arguments: argparse.Namespace) -> dict:
    """The rows of a corpus: a batch, and one query alone."""
    ours, host = students(passages, max(arguments.batches))
    systems = {"ours": ours} | ({"host": host} if host else {})
    random, most = np.random.default_rng(4), max(arguments.batches)
    queries = random.integers(3, VOCAB - 3, (most, 24), np.int32)
    queries[:, -1] = EOS
    report = {"passages": passages, "tokens": len(ours.index.text)}
    for size in arguments.batches:
        few = queries[:size]
        found = {name: system.passages(few) for name, system in systems.items()}
        if host:
            np.testing.assert_array_equal(found["host"][0][:, :10], found["ours"][0][:, :10])
        times = {name: [] for name in systems}
        for _ in range(arguments.rounds):
            for name, system in systems.items():
                times[name].append(spent(system.passages, few)[1] / size)
        rounds = [parts_of(ours, few, size) for _ in range(arguments.rounds)]
        row = {name: round(float(np.median(values)), 2) for name, values in times.items()}
        row["parts"] = {
            part: round(float(np.median([one[part] for one in rounds])) / size, 2)
            for part in rounds[0]
        }
        report[f"in batches of {size}"] = row
    return report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--passages", type=int, nargs="+", default=[250, 100_000])
    parser.add_argument("--batches", type=int, nargs="+", default=[16, 1], help="1: asked alone")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output", type=pathlib.Path)
    arguments = parser.parse_args()
    report = {"device": device_name(jax.devices()[0]), "rows": []}
    print(report["device"], flush=True)
    for passages in arguments.passages:
        report["rows"].append(measured(passages, arguments))
        print(json.dumps(report["rows"][-1], indent=1), flush=True)
    if arguments.output:
        arguments.output.write_text(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
