"""What a constraint adds to a step of beam search, beside other ways to constrain it.

    python -m benchmarks.constraint --static_path=DIR --output=constraint.json

All systems search under the same logits, which depend on query, token and position, and are read
from a table: there is no model to hide behind.  A time is that of a whole search divided by its
steps; the systems take turns, so that what else the machine does falls on all of them.  `added`
is the median over the turns of the difference to the unconstrained search of the same turn.
`cpu_ms` is the processor time of the process, threads summed: what a busy machine changes least.

Systems:
  logits         reads the logits and their normaliser and searches nothing: all others do this too
  unconstrained  beam_search, every sequence of the length is legal
  trie           beam_search under trie.build(...).constraint()
  static         the loop of youtube/static-constraint-decoding, a checkout of which lies in
                 --static_path; its recommended two dense levels, one where the tables of two
                 would hold more than 2^29 entries.  It keeps --tokens_per_beam of a beam's tokens
                 at a dense level (30 as published; its search is exact from the beam width on)
  binary_search  beam_search; for each beam and token a binary search in the sorted rows
  callback       beam_search; a mask from a trie of Python dicts through jax.pure_callback

Each collection is measured in a process of its own.  Every identifier that is returned is looked
up in the rows; an illegal one stops the run, except in `static`, where its share is reported.
"""

from __future__ import annotations

import argparse
import bisect
import dataclasses
import functools
import json
import pathlib
import sys
import time
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import index as index_sizes
from dgr_jax.analysis.speed import device_name
from dgr_jax.decoding import constraint as constraints
from dgr_jax.decoding import trie, trie_build
from dgr_jax.decoding.beam_search import beam_search, score_by_token
from dgr_jax.decoding.constraint import Candidates
from dgr_jax.decoding.selection import joint_top_k

LENGTH = 8
DENSE_ENTRIES = 1 << 29


def read_logits(table: jax.Array, salt: jax.Array, tokens: jax.Array, position: jax.Array):
    """f32 [B, M, V] of tokens [B, M]: rows of the table [R, V], written out as a model would."""
    query = jnp.arange(len(tokens))[:, None]
    row = (31 * tokens + 127 * position + 17 * query + salt) % len(table)
    return jax.lax.optimization_barrier(table[row])


@functools.partial(jax.jit, static_argnames=("batch", "beams"))
def search(constraint, table, salt, *, batch: int, beams: int):
    read = functools.partial(read_logits, table, salt)
    step_fn = lambda tokens, cache, position: (read(tokens, position), cache)

    def score_fn(inputs, targets, cache, position):
        positions = jnp.broadcast_to(position + jnp.arange(inputs.shape[-1]), inputs.shape)
        return score_by_token(lambda token: read(*token), (inputs, positions), targets)

    return beam_search(
        step_fn, constraint, None, batch_size=batch, num_beams=beams, score_fn=score_fn
    )


@functools.partial(jax.jit, static_argnames=("batch", "beams"))
def read_all(table, salt, *, batch: int, beams: int):
    """The logits and normalisers of as many steps as a search has."""

    def step(position, tokens):
        logits = read_logits(table, salt, tokens, position)
        return tokens + (jax.nn.logsumexp(logits, -1) > 0)

    tokens = jax.lax.fori_loop(0, LENGTH, step, jnp.zeros((batch, beams), jnp.int32))
    return jnp.repeat(tokens[..., None], LENGTH, -1)


@dataclasses.dataclass(frozen=True)
class StaticModel:
    """The same logits for the loop of the public library, which calls model(ids, key)."""

    batch: int

    def __call__(self, ids, key):
        table, salt, position = key
        logits = read_logits(table, salt, ids.reshape(self.batch, -1), position)
        return logits.reshape(len(ids), 1, -1), (table, salt, position + 1)


class Interval(NamedTuple):
    """The rows that begin with what a beam wrote: low to high, after `depth` tokens."""

    low: jax.Array
    high: jax.Array
    depth: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class BinarySearch:
    """A Constraint over sorted rows, flat [U * LENGTH]: every token of every beam is searched."""

    flat: jax.Array

    max_length = fixed_length = LENGTH
    renormalise = False

    def init(self, batch_size: int) -> Interval:
        zeros = jnp.zeros(batch_size, jnp.int32)
        return Interval(zeros, zeros + len(self.flat) // LENGTH, zeros)

    def expand(self, state: Interval, scores, prior, *, width: int) -> Candidates:
        edges = self._lower_bounds(state, scores.shape[-1] + 1)
        legal = edges[..., 1:] > edges[..., :-1]
        best, parent, tokens, valid = choose(scores, legal, prior, width)
        entry = parent * edges.shape[-1] + tokens
        flat_edges = edges.reshape(len(edges), -1)
        low, high = (jnp.take_along_axis(flat_edges, entry + i, -1) for i in (0, 1))
        depth = jnp.take_along_axis(state.depth, parent, -1) + 1
        state = Interval(*(jnp.where(valid, leaf, -1) for leaf in (low, high, depth)))
        return Candidates(parent, tokens, best, state, valid & (depth == LENGTH))

    def _lower_bounds(self, state: Interval, count: int):
        """int32 [B, M, count]: the first row of each interval whose next token is at least v."""
        wanted, column = jnp.arange(count), jnp.max(state.depth)
        shape = (*state.low.shape, count)
        low, high = (jnp.broadcast_to(x[..., None], shape) for x in (state.low, state.high))

        def halve(bounds):
            low, high = bounds
            middle = (low + high) >> 1
            token = self.flat.at[middle * LENGTH + column].get(mode="clip").astype(jnp.int32)
            right, open_ = token < wanted, low < high
            return jnp.where(open_ & right, middle + 1, low), jnp.where(
                open_ & ~right, middle, high
            )

        return jax.lax.while_loop(lambda b: (b[0] < b[1]).any(), halve, (low, high))[0]

    def rows(self, state: Interval):
        return jnp.where(state.depth == LENGTH, state.low, -1)


class Written(NamedTuple):
    """tokens [.., LENGTH] that a beam wrote, the first `depth` of them."""

    tokens: jax.Array
    depth: jax.Array


@dataclasses.dataclass(frozen=True, eq=False)
class DictTrie:
    """Nested dicts of the rows, and the legal next tokens of prefixes."""

    root: dict

    @classmethod
    def build(cls, rows: np.ndarray) -> DictTrie:
        root: dict = {}
        for row in rows.tolist():
            node = root
            for token in row:
                node = node.setdefault(token, {})
        return cls(root)

    def mask(self, vocabulary: int, tokens: np.ndarray, depth: np.ndarray) -> np.ndarray:
        tokens, depth = np.asarray(tokens), np.asarray(depth)
        out = np.zeros((*depth.shape, vocabulary), bool)
        for place in zip(*np.nonzero(depth >= 0), strict=True):
            node = self.root
            for token in tokens[place][: depth[place]].tolist():
                node = node[token]
            out[place][list(node)] = True
        return out


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Callback:
    """A Constraint that asks the host for the legal tokens of each beam."""

    tree: DictTrie = dataclasses.field(metadata={"static": True})

    max_length = fixed_length = LENGTH
    renormalise = False

    def init(self, batch_size: int) -> Written:
        return Written(jnp.zeros((batch_size, LENGTH), jnp.int32), jnp.zeros(batch_size, jnp.int32))

    def expand(self, state: Written, scores, prior, *, width: int) -> Candidates:
        shape = jax.ShapeDtypeStruct(scores.shape, bool)
        ask = functools.partial(self.tree.mask, scores.shape[-1])
        legal = jax.pure_callback(ask, shape, state.tokens, state.depth)
        best, parent, tokens, valid = choose(scores, legal, prior, width)
        depth = jnp.take_along_axis(state.depth, parent, -1)
        written = jnp.take_along_axis(state.tokens, parent[..., None], 1)
        here = jnp.arange(LENGTH) == depth[..., None]
        written = jnp.where(here, tokens[..., None], written)
        state = Written(written, jnp.where(valid, depth + 1, -1))
        return Candidates(parent, tokens, best, state, valid & (depth + 1 == LENGTH))

    def rows(self, state: Written):
        return jnp.full(state.depth.shape, -1, jnp.int32)


def choose(scores, legal, prior, width):
    """The best of the legal [B, M, V]: (log_probs, parent, tokens, valid), each [B, width]."""
    scores = jnp.where(legal, scores, -jnp.inf)
    best, place = joint_top_k(scores, prior, width)
    return best, place // scores.shape[-1], place % scores.shape[-1], best > -jnp.inf


@dataclasses.dataclass
class System:
    """A way to search, built: run(table, salt, batch, beams) -> tokens int32 [B, M, LENGTH]."""

    run: Callable
    bytes: int = 0
    cost: index_sizes.Cost = index_sizes.Cost()


def build_trie(rows: np.ndarray, options: argparse.Namespace) -> System:
    build = lambda: trie.build(rows, vocab_size=options.vocabulary)
    index, cost = index_sizes.measured(build)
    return System(under(index.constraint()), index.nbytes, cost)


def build_logits(rows: np.ndarray, options: argparse.Namespace) -> System:
    return System(lambda table, salt, batch, beams: read_all(table, salt, batch=batch, beams=beams))


def build_unconstrained(rows: np.ndarray, options: argparse.Namespace) -> System:
    return System(under(constraints.Unconstrained(LENGTH)))


def build_binary_search(rows: np.ndarray, options: argparse.Namespace) -> System:
    dtype = trie_build.smallest_dtype(options.vocabulary - 1)
    flat, cost = index_sizes.measured(lambda: rows.astype(dtype).reshape(-1))
    return System(under(BinarySearch(jnp.asarray(flat))), flat.nbytes, cost)


def build_callback(rows: np.ndarray, options: argparse.Namespace) -> System | None:
    if len(rows) > options.largest_callback:
        return None
    tree, cost = index_sizes.measured(lambda: DictTrie.build(rows))
    return System(under(Callback(tree)), cost.peak, cost)


def build_static(rows: np.ndarray, options: argparse.Namespace) -> System | None:
    if not options.static_path:
        return None
    builder = index_sizes.static_library(options.static_path, "csr_utils")
    decoder = index_sizes.static_library(options.static_path, "decoding_jax")
    vocabulary, dense = options.vocabulary, 2
    if vocabulary**2 > DENSE_ENTRIES:
        dense = 1
    build = lambda: builder.build_static_index(rows, vocabulary, dense)
    (csr, pointers, branches, *tables), cost = index_sizes.measured(build)
    arrays = [jnp.asarray(array) for array in (csr, pointers, *tables)]
    first = jnp.int32(0)
    size = sum(array.nbytes for array in arrays)

    def run(table, salt, batch, beams):
        kept = min(beams, options.tokens_per_beam)
        key = (table, salt, first)
        return decoder.sparse_transition_jax(
            StaticModel(batch), key, batch, beams, kept, 0, LENGTH, vocabulary, branches, *arrays,
            d_dense=dense,
        )  # fmt: skip

    return System(run, size, cost)


def under(constraint) -> Callable:
    def run(table, salt, batch, beams):
        return search(constraint, table, salt, batch=batch, beams=beams).tokens

    return run


BUILDERS = {
    "logits": build_logits,
    "unconstrained": build_unconstrained,
    "trie": build_trie,
    "static": build_static,
    "binary_search": build_binary_search,
    "callback": build_callback,
}


def legal_share(rows: np.ndarray, found: np.ndarray) -> float:
    """The share of found [n, LENGTH] that are among the sorted rows."""
    as_list = lambda i: rows[i].tolist()
    legal = 0
    for row in found.tolist():
        place = bisect.bisect_left(range(len(rows)), row, key=as_list)
        legal += place < len(rows) and as_list(place) == row
    return legal / len(found)


def take_turns(systems: dict[str, System], rows, table, batch, beams, options) -> dict[str, dict]:
    """Seconds by the clock and of the processor, each [rounds] with NaN where a slow system sat
    out, and the checks of what was returned."""
    runs = {name: {"legal": [], "as_trie": []} for name in systems}
    for run in runs.values():
        run |= {clock: np.full(options.rounds, np.nan) for clock in ("ms", "cpu_ms")}
    for turn in range(-1, options.rounds):  # the first compiles
        salt, returned = jax.block_until_ready(jnp.int32(turn)), {}
        for name, system in systems.items():
            if turn > 0 and np.nansum(runs[name]["ms"]) > 1e3 * options.seconds:
                continue
            begin, cpu = time.perf_counter(), time.process_time()
            tokens = jax.block_until_ready(system.run(table, salt, batch, beams))
            if turn >= 0:
                runs[name]["cpu_ms"][turn] = 1e3 * (time.process_time() - cpu)
                runs[name]["ms"][turn] = 1e3 * (time.perf_counter() - begin)
            returned[name] = np.asarray(tokens).reshape(-1, LENGTH)
        check(returned, rows, runs)
    return runs


def check(returned: dict[str, np.ndarray], rows: np.ndarray, runs: dict[str, dict]) -> None:
    """Notes the share of legal identifiers, and of those that the trie returned too."""
    ours = set(map(tuple, returned["trie"].tolist())) if "trie" in returned else set()
    for name, found in returned.items():
        if name in ("logits", "unconstrained"):
            continue
        share = legal_share(rows, found)
        if share < 1 and name != "static":
            raise AssertionError(f"{name}: {1 - share:.1%} of the identifiers are illegal")
        runs[name]["legal"].append(share)
        same = len(ours & set(map(tuple, found.tolist())))
        runs[name]["as_trie"].append(same / max(len(ours), 1))


def summary(runs: dict[str, dict], systems: dict[str, System]) -> list[dict]:
    """One record a system, times in milliseconds a step."""
    records = []
    for name, run in runs.items():
        record = {"system": name, "turns": int(np.isfinite(run["ms"]).sum())}
        for clock in ("ms", "cpu_ms"):
            spread = np.nanpercentile(run[clock] / LENGTH, [0, 25, 50, 75])
            names = (f"{clock}_least", f"{clock}_q1", clock, f"{clock}_q3")
            record |= dict(zip(names, spread, strict=True))
            if name != "unconstrained" and "unconstrained" in runs:
                added = (run[clock] - runs["unconstrained"][clock]) / LENGTH
                record[f"added_{clock}"] = float(np.nanmedian(added))
            if name != "static" and "static" in runs:
                record[f"{clock}_of_static"] = float(
                    np.nanmedian(run[clock] / runs["static"][clock])
                )
        record |= {key: float(np.mean(run[key])) for key in ("legal", "as_trie") if run[key]}
        built = dataclasses.asdict(systems[name].cost)
        record["bytes"] = systems[name].bytes
        records.append(record | {f"build_{key}": value for key, value in built.items()})
    return records


def measure(options: argparse.Namespace) -> list[dict]:
    """All systems and batch shapes on one collection."""
    rows = index_sizes.codes(options.rows, LENGTH, options.vocabulary)
    built = {name: BUILDERS[name](rows, options) for name in options.systems}
    systems = {name: system for name, system in built.items() if system}
    rows = rows.astype(trie_build.smallest_dtype(options.vocabulary - 1))
    normal = jax.random.normal(jax.random.key(0), (options.table_rows, options.vocabulary))
    table = jax.block_until_ready(options.temperature * normal)
    records = []
    for shape in options.batches:
        batch, beams = map(int, shape.split("x"))
        runs = take_turns(systems, rows, table, batch, beams, options)
        setting = {
            "rows": options.rows,
            "vocabulary": options.vocabulary,
            "batch": batch,
            "beams": beams,
            "device": device_name(jax.devices()[0]),
        }
        records += [setting | record for record in summary(runs, systems)]
    return records


def show(records: list[dict]) -> None:
    for record in records:
        cells = []
        for clock in ("ms", "cpu_ms"):
            least, low, high = (record[f"{clock}_{part}"] for part in ("least", "q1", "q3"))
            cells.append(f"{clock} {record[clock]:.2f} [{low:.2f}-{high:.2f}], least {least:.2f}")
            for key in (f"added_{clock}", f"{clock}_of_static"):
                if key in record:
                    cells.append(f"{key} {record[key]:.2f}")
        cells += [f"{key} {record[key]:.1%}" for key in ("legal", "as_trie") if key in record]
        cells.append(f"{record['bytes'] / 1e6:.1f} MB")
        built, peak = record["build_cpu_seconds"], record["build_peak"] / 1e6
        cells.append(f"built in {built:.2f} s of processor, peak {peak:.0f} MB")
        shape = f"V={record['vocabulary']} {record['batch']}x{record['beams']}"
        print(f"{record['rows']:.0e} {shape} {record['system']:13s}", ", ".join(cells), flush=True)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    split = lambda text: text.split(",")
    counts = lambda text: [int(float(part)) for part in split(text)]
    parser.add_argument("--sizes", type=counts, default=[10**5, 10**6, 10**7, 2 * 10**7])
    parser.add_argument("--vocabularies", type=counts, default=[256, 2048, 32_128])
    parser.add_argument("--systems", type=split, default=list(BUILDERS))
    parser.add_argument("--batches", type=split, default=["2x70", "32x10"])
    parser.add_argument("--static_path", default="", help="checkout of the public library")
    parser.add_argument("--tokens_per_beam", type=int, default=30, help="of `static`")
    parser.add_argument("--rounds", type=int, default=21, help="turns of every system")
    parser.add_argument("--seconds", type=float, default=15.0, help="most for one system")
    parser.add_argument("--table_rows", type=int, default=509, help="distinct rows of logits")
    parser.add_argument("--temperature", type=float, default=2.0, help="deviation of the logits")
    parser.add_argument("--largest_callback", type=int, default=10**6, help="rows in Python dicts")
    parser.add_argument("--output", help="JSON file of the results")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--rows", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--vocabulary", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if unknown := set(options.systems) - set(BUILDERS):
        parser.error(f"unknown systems {sorted(unknown)}; expected some of {list(BUILDERS)}")
    return options


def main() -> None:
    options = parse()
    if options.child:
        print(json.dumps(measure(options)))
        return
    records = []
    for vocabulary in options.vocabularies:
        for count in options.sizes:
            this = [f"--rows={count}", f"--vocabulary={vocabulary}"]
            found = index_sizes.in_child("benchmarks.constraint", [*sys.argv[1:], *this])
            show(found)
            records += found
            if options.output:
                pathlib.Path(options.output).write_text(json.dumps(records, indent=1))


if __name__ == "__main__":
    main()
