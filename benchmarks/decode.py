"""Whole queries a second: encode, and write identifiers under a constraint.

    python -m benchmarks.decode --models=small,base --beams=10,40 --output=decode.json

Systems, all on the same random weights (T5 1.1 sizes) and the same queries, in turns:
  ours           dgr_jax: the trie on the device, one compiled program a batch
  int8           ours with kernels of 8 bits (Search.kernels='int8'): other scores, see `as_ours`
  planned        the best --planned_beams of 100 planned identifiers, drawn for each query, and
                 `planned, int8`: for speed alone, as nothing drawn says what is relevant
  unconstrained  ours, every sequence of the length legal: what the constraint costs
  hf             transformers' generate, with a trie of Python dicts through
                 prefix_allowed_tokens_fn (extra `interop`; left out, and said so, without it)

Identifiers are random rows of --codes codes of --codebook, a block of tokens each, and EOS, so that
all systems write 9 tokens; `ours` scores those at which nothing is left to choose in one pass.
Every sequence that is returned is looked up in the sorted rows; an illegal one stops the run.  A
time is that of a batch, from tokens on the host to sequences and scores on the host; median and
spread (the middle half) over the turns.  CPU seconds are those of all threads of this process: on a
machine that others use too they say more about two systems on the CPU than the clock does.

A step is the time of the batch less that of encoding it, by the number of tokens.  Its floor is
the time to read the weights of the decoder once and to do one token's arithmetic, one after the
other, at the peak rates of the device: known for some GPUs, else --peak_tflops and
--bandwidth_gbs.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import json
import os
import pathlib
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any, NamedTuple

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # one GPU for both libraries

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from dgr_jax import partitioning
from dgr_jax.analysis.speed import device_name
from dgr_jax.decoding import trie
from dgr_jax.decoding.constraint import Unconstrained
from dgr_jax.models import eight_bits, pretrained
from dgr_jax.models.t5 import T5Config, Transformer
from dgr_jax.retrieval.planned import guided_fn
from dgr_jax.retrieval.search_programs import decode_fn

EOS = 1
SIZES = {
    "tiny": dict(emb_dim=128, num_heads=4, head_dim=32, mlp_dim=256, num_encoder_layers=2,
                 num_decoder_layers=2),
    "small": dict(emb_dim=512, num_heads=6, head_dim=64, mlp_dim=1024, num_encoder_layers=8,
                  num_decoder_layers=8),
    "base": dict(emb_dim=768, num_heads=12, head_dim=64, mlp_dim=2048, num_encoder_layers=12,
                 num_decoder_layers=12),
    "large": dict(emb_dim=1024, num_heads=16, head_dim=64, mlp_dim=2816, num_encoder_layers=24,
                  num_decoder_layers=24),
}  # fmt: skip

# Part of the device's name -> dense TFLOP/s in bfloat16 and in float32 (TF32 where it is the
# default of matrix products), GB/s; from the makers' data sheets.
PEAKS = {
    "H200": (989, 495, 4800),
    "H100 PCIe": (756, 378, 2000),
    "H100": (989, 495, 3350),
    "A100-SXM4-80GB": (312, 156, 2039),
    "A100": (312, 156, 1555),
    "L40S": (362, 183, 864),
    "L4": (121, 60, 300),
    "T4": (65, 8.1, 320),
    "V100": (125, 15.7, 900),
}


def random_params(config: T5Config, seed: int = 0) -> Any:
    """Float32 parameters on the host, of a size that keeps activations and logits in scale."""
    token = jnp.zeros((1, 1), jnp.int32)
    shapes = jax.eval_shape(Transformer(config).init, jax.random.key(0), token, token)["params"]
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        names = [key.key for key in path]
        if names[-1] == "scale":
            return np.ones(leaf.shape, np.float32)
        scale = leaf.shape[0] ** -0.5 if names[-1] == "kernel" else 1.0
        if "query" in names:  # as T5 does it, or attention is so sharp that rounding errors grow
            scale *= config.head_dim**-0.5
        return np.float32(scale) * rng.standard_normal(leaf.shape, np.float32)

    return jax.tree_util.tree_map_with_path(draw, nn.unbox(shapes))


def identifier_rows(count: int, codes: int, codebook: int, vocab_size: int) -> np.ndarray:
    """int32 [U, codes + 1], sorted and unique: a block of the last tokens a level, then EOS."""
    drawn = np.random.default_rng(1).integers(0, codebook, (count, codes), np.int32)
    drawn += vocab_size + codebook * (np.arange(codes, dtype=np.int32) - codes)
    drawn = drawn[np.lexsort(drawn.T[::-1])]
    drawn = drawn[np.append(True, (drawn[1:] != drawn[:-1]).any(1))]
    return np.pad(drawn, [(0, 0), (0, 1)], constant_values=EOS)


def as_bytes(rows: np.ndarray) -> np.ndarray:
    """One comparable value a row, in the order of the rows."""
    rows = np.ascontiguousarray(rows, ">u4")
    return rows.view(f"V{4 * rows.shape[-1]}")[..., 0]


def require_legal(system: str, found: np.ndarray, legal: np.ndarray) -> None:
    """found int [B, M, T], legal: as_bytes of the sorted rows."""
    found = as_bytes(found)
    place = np.minimum(np.searchsorted(legal, found), len(legal) - 1)
    if not (legal[place] == found).all():
        raise SystemExit(f"{system}: returned identifiers that do not exist")


class Found(NamedTuple):
    """tokens int [B, M, T] and scores f32 [B, M] on the host, best first."""

    tokens: np.ndarray
    scores: np.ndarray


System = Callable[[np.ndarray], Found]


def ours(config: T5Config, params: Any, constraint: Any, beams: int, length: int) -> System:
    """params and constraint on the device."""
    decode = decode_fn(config, beams, length)

    def search(tokens: np.ndarray) -> Found:
        result = decode(params, constraint, tokens)
        return Found(np.asarray(result.tokens), np.asarray(result.log_probs))

    return search


def planned(config: T5Config, params: Any, rows: np.ndarray, beams: int) -> Callable:
    """params on the device, rows sorted; log-probabilities f32 [B, 100] of planned identifiers."""
    mesh = partitioning.make_mesh(devices=jax.devices()[:1])
    decode, random = guided_fn(config, beams, True, mesh), np.random.default_rng(3)

    def search(tokens: np.ndarray) -> np.ndarray:
        chosen = np.sort(random.integers(0, len(rows), (len(tokens), 100)), 1)
        bonus = random.standard_normal(chosen.shape, np.float32)
        return np.asarray(decode(params, (tokens, rows[chosen], bonus)))

    return search


def encoder(config: T5Config, params: Any) -> Callable[[np.ndarray], None]:
    """What comes before the first step."""

    @jax.jit
    def encode(params, tokens):
        apply = functools.partial(Transformer(config).apply, {"params": params})
        return apply(apply(tokens, method="encode"), tokens, method="cross")

    return lambda tokens: jax.block_until_ready(encode(params, tokens))


def dict_trie(rows: np.ndarray) -> dict:
    """Nested dicts; where one row is left, a tuple of its other tokens."""
    root: dict = {}
    shared = (rows[1:] == rows[:-1]).cumprod(1).sum(1)
    depths = np.maximum(np.append(0, shared), np.append(shared, 0)).tolist()
    for row, depth in zip(rows.tolist(), depths, strict=True):
        node = root
        for token in row[:depth]:
            node = node.setdefault(token, {})
        node[row[depth]] = tuple(row[depth + 1 :])
    return root


def legal_tokens(root: dict, prefix: list[int]) -> list[int]:
    """Tokens that continue a prefix; EOS after an end, or after what no row begins with."""
    node: Any = root
    for depth, token in enumerate(prefix):
        if isinstance(node, tuple):
            return list(node[len(prefix) - depth :][:1]) or [EOS]
        node = node.get(token, ())
    return list(node) if isinstance(node, dict) else list(node[:1]) or [EOS]


def hugging_face(config: T5Config, params: Any, root: dict, beams: int, length: int) -> System:
    """params on the host; on the GPU if torch has one."""
    import torch
    import transformers

    device = "cuda" if torch.cuda.is_available() else "cpu"
    with tempfile.TemporaryDirectory() as folder:
        pretrained.write_hf(folder, config, params, dtype=config.dtype)
        transformers.utils.logging.disable_progress_bar()
        model = transformers.T5ForConditionalGeneration.from_pretrained(
            folder, dtype=getattr(torch, config.dtype)
        )
    model = model.to(device).eval()

    @torch.inference_mode()
    def search(tokens: np.ndarray) -> Found:
        inputs = torch.tensor(tokens, dtype=torch.int64, device=device)
        found = model.generate(
            input_ids=inputs,
            attention_mask=(inputs > 0).to(torch.int64),
            num_beams=beams,
            num_return_sequences=beams,
            do_sample=False,
            max_new_tokens=length,
            length_penalty=0.0,
            early_stopping=False,
            prefix_allowed_tokens_fn=lambda _, ids: legal_tokens(root, ids.tolist()[1:]),
            return_dict_in_generate=True,
            output_scores=True,
        )
        sequences = found.sequences[:, 1:].reshape(len(tokens), beams, -1).cpu().numpy()
        return Found(sequences, found.sequences_scores.reshape(len(tokens), beams).cpu().numpy())

    return search


class Floor(NamedTuple):
    """Seconds of a step at the device's peak rates."""

    weights: float
    arithmetic: float


def floor(config: T5Config, batch: int, beams: int, query: int, length: int, peaks) -> Floor:
    """peaks: (FLOP/s of the products in config.dtype, FLOP/s of float32, bytes/s).

    Counts the products of the decoder and of the logits (float32), and attention over the query
    and over the mean number of tokens written.
    """
    flops, flops32, bandwidth = peaks
    inner, layers = config.num_heads * config.head_dim, config.num_decoder_layers
    gated = len(config.mlp_activations) > 1
    attention = 6 * config.emb_dim * inner  # query, key, value, out; query, out across
    kernels = layers * (attention + (3 if gated else 2) * config.emb_dim * config.mlp_dim)
    logits = config.emb_dim * config.vocab_size
    mixing = layers * 2 * inner * (query + (length + 1) / 2)
    size = jnp.dtype(config.dtype).itemsize
    rows = batch * beams
    return Floor(
        (size * kernels + 4 * logits) / bandwidth,
        2 * rows * ((kernels + mixing) / flops + logits / flops32),
    )


def peaks_of(device: str, dtype: str, args: argparse.Namespace):
    """Of the device, by flags or by name; None where neither knows."""
    if args.peak_tflops and args.bandwidth_gbs:
        return args.peak_tflops * 1e12, args.peak_tflops * 1e12, args.bandwidth_gbs * 1e9
    for name, (half, single, bandwidth) in PEAKS.items():
        if name in device:
            chosen = half if dtype == "bfloat16" else single
            return chosen * 1e12, single * 1e12, bandwidth * 1e9
    return None


def take_turns(
    systems: dict[str, Callable], batches: list[np.ndarray], check: Callable
) -> dict[str, np.ndarray]:
    """(seconds, CPU seconds) [2, n] of every system on every batch but the first: that warms up."""
    spent: dict[str, list] = {name: [] for name in systems}
    for tokens in batches:
        found = {}
        for name, search in systems.items():
            start = np.array([time.perf_counter(), time.process_time()])
            found[name] = search(tokens)
            spent[name].append([time.perf_counter(), time.process_time()] - start)
        check(found)
    return {name: np.array(values[1:]).T for name, values in spent.items()}


def summary(values: np.ndarray, scale: float = 1.0) -> dict[str, float]:
    low, middle, high = np.percentile(values * scale, (25, 50, 75))
    return {"median": float(middle), "low": float(low), "high": float(high)}


class Agreement:
    """Checks legality, and counts how often two systems return the same list."""

    def __init__(self, legal: np.ndarray) -> None:
        self.legal = legal
        self.lists = self.equal = 0
        self.score_error = 0.0
        self.as_ours: list[float] = []  # share of a list by int8 that ours has too

    def __call__(self, found: dict[str, Found | None]) -> None:
        for name in ("ours", "int8", "hf"):
            if name in found:
                require_legal(name, found[name].tokens, self.legal)
        if "ours" in found and "int8" in found:
            for pair in zip(found["ours"].tokens, found["int8"].tokens, strict=True):
                a, b = (set(map(tuple, tokens.tolist())) for tokens in pair)
                self.as_ours.append(len(a & b) / len(a))
        if "ours" in found and "hf" in found:
            a, b = found["ours"], found["hf"]
            self.lists += len(a.tokens)
            self.equal += int((a.tokens == b.tokens).all((1, 2)).sum())
            self.score_error = max(self.score_error, float(np.abs(a.scores - b.scores).max()))


def measure(model: str, beams: int, rows: np.ndarray, args: argparse.Namespace) -> dict[str, Any]:
    """One line of the table."""
    config = T5Config(vocab_size=args.vocab_size, dtype=args.dtype, **SIZES[model])
    params, length = random_params(config), rows.shape[1]
    on_device = jax.device_put(params)
    index = args.index.constraint()
    systems: dict[str, Callable] = {"encode": encoder(config, on_device)}
    if "ours" in args.systems:
        systems["ours"] = ours(config, on_device, index, beams, length)
    rounded = eight_bits.searched(on_device, "int8")
    if "int8" in args.systems:
        systems["int8"] = ours(config, rounded, index, beams, length)
    if "planned" in args.systems:
        systems["planned"] = planned(config, on_device, rows, args.planned_beams)
        systems["planned, int8"] = planned(config, rounded, rows, args.planned_beams)
    if "unconstrained" in args.systems:
        systems["unconstrained"] = ours(config, on_device, Unconstrained(length), beams, length)
    if "hf" in args.systems:
        systems["hf"] = hugging_face(config, params, args.dict_trie, beams, length)
    rng = np.random.default_rng(2)
    shape = (args.repeats + 1, args.batch, args.query_length)
    batches = rng.integers(2, config.vocab_size, shape, np.int32)
    agreement = Agreement(as_bytes(rows))
    spent = take_turns(systems, list(batches), agreement)
    return describe(model, beams, config, length, spent, agreement, args)


def describe(model, beams, config, length, spent, agreement, args) -> dict[str, Any]:
    seconds = {name: values[0] for name, values in spent.items()}
    encode = seconds.pop("encode")
    steps = {name: (values - encode) / length for name, values in seconds.items()}
    line: dict[str, Any] = {
        "model": model,
        "beams": beams,
        "encode_ms": summary(encode, 1e3),
        "queries_per_second": {
            name: summary(args.batch / values) for name, values in seconds.items()
        },
        "cpu_seconds_a_batch": {name: summary(spent[name][1]) for name in seconds},
        "step_ms": {name: summary(values, 1e3) for name, values in steps.items()},
    }
    if {"ours", "unconstrained"} <= steps.keys():
        added = (steps["ours"] - steps["unconstrained"]) / np.median(steps["unconstrained"])
        line["overhead_percent"] = summary(added, 100)
    if "ours" in seconds:
        line["of_ours_by_cpu_seconds"] = {
            name: summary(values[1] / spent["ours"][1])
            for name, values in spent.items()
            if name not in ("ours", "encode")
        }
    if agreement.as_ours:
        line["as_ours"] = float(np.mean(agreement.as_ours))
    if {"ours", "hf"} <= seconds.keys():
        line["times_hf"] = summary(seconds["hf"] / seconds["ours"])
        line["times_hf_by_cpu_seconds"] = summary(spent["hf"][1] / spent["ours"][1])
        line["equal_lists"] = f"{agreement.equal}/{agreement.lists}"
        line["largest_score_difference"] = agreement.score_error
    peaks = peaks_of(jax.devices()[0].device_kind, config.dtype, args)
    if peaks:
        parts = floor(config, args.batch, beams, args.query_length, length, peaks)
        line["floor_ms"] = {name: 1e3 * value for name, value in parts._asdict().items()}
        if "ours" in steps:
            line["times_floor"] = float(np.median(steps["ours"]) / sum(parts))
    return line


def show(line: dict[str, Any]) -> None:
    spread = lambda s, digits=1: (
        f"{s['median']:.{digits}f} ({s['low']:.{digits}f}-{s['high']:.{digits}f})"
    )
    print(f"{line['model']}, {line['beams']} beams: encode {spread(line['encode_ms'])} ms")
    for name, rate in line["queries_per_second"].items():
        step = spread(line["step_ms"][name], 2)
        cpu = spread(line["cpu_seconds_a_batch"][name], 2)
        print(f"  {name:14s}{spread(rate, 2):>24s} queries/s   step {step} ms   CPU {cpu} s")
    if "overhead_percent" in line:
        print(f"  the constraint adds {spread(line['overhead_percent'])} % to a step")
    for name, ratio in line.get("of_ours_by_cpu_seconds", {}).items():
        print(f"  {name} takes {spread(ratio, 2)} of the CPU seconds of ours")
    if "as_ours" in line:
        print(f"  int8 returns {line['as_ours']:.1%} of the identifiers that ours returns")
    if "times_hf" in line:
        print(
            f"  ours is {spread(line['times_hf'], 2)} times as fast as hf, "
            f"{spread(line['times_hf_by_cpu_seconds'], 2)} by CPU seconds; equal lists "
            f"{line['equal_lists']}, scores differ by {line['largest_score_difference']:.1e}"
        )
    if "floor_ms" in line:
        parts = line["floor_ms"]
        text = " + ".join(f"{value:.3f} ({name})" for name, value in parts.items())
        times = (
            f"; ours takes {line['times_floor']:.1f} times that" if "times_floor" in line else ""
        )
        print(f"  floor of a step: {text} ms{times}")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    names = lambda text: text.split(",")
    add("--models", type=names, default=["small", "base"], help=", ".join(SIZES))
    add("--beams", type=lambda text: [int(n) for n in text.split(",")], default=[10, 40])
    add("--systems", type=names, default=["ours", "unconstrained", "hf"])
    add("--planned_beams", type=int, default=4)
    add("--identifiers", type=lambda text: int(float(text)), default=1_000_000)
    add("--batch", type=int, default=16)
    add("--query_length", type=int, default=32)
    add("--codes", type=int, default=8)
    add("--codebook", type=int, default=256)
    add("--vocab_size", type=int, default=32128)
    add("--dtype", choices=("float32", "bfloat16"), default="float32")
    add("--repeats", type=int, default=5, help="batches timed, after one that warms up")
    add("--peak_tflops", type=float, help="of the device, for the floor")
    add("--bandwidth_gbs", type=float, help="of its memory, for the floor")
    add("--output", help="a JSON file")
    return parser.parse_args()


def main() -> None:
    args = parse()
    if "hf" in args.systems and not all(map(importlib.util.find_spec, ("torch", "transformers"))):
        print("hf is left out: it needs the extra 'dgr_jax[interop]'")
        args.systems.remove("hf")
    device = jax.devices()[0]
    rows = identifier_rows(args.identifiers, args.codes, args.codebook, args.vocab_size)
    start = time.perf_counter()
    args.index = trie.build(rows, vocab_size=args.vocab_size)
    built = time.perf_counter() - start
    if "hf" in args.systems:
        args.dict_trie = dict_trie(rows)
    print(
        f"{device_name(device)}, jax {jax.__version__}; {len(rows)} identifiers of "
        f"{rows.shape[1]} tokens ({args.codes} codes of {args.codebook}, EOS), trie "
        f"{args.index.nbytes / 1e6:.1f} MB in {built:.1f} s; batch "
        f"{args.batch}, queries of {args.query_length} tokens, vocabulary {args.vocab_size}, "
        f"{args.dtype}",
        flush=True,
    )
    lines = []
    for model in args.models:
        for beams in args.beams:
            lines.append(measure(model, beams, rows, args))
            show(lines[-1])
            sys.stdout.flush()
    if args.output:
        settings = {k: v for k, v in vars(args).items() if k not in ("index", "dict_trie")}
        report = {"device": device_name(device), "settings": settings}
        pathlib.Path(args.output).write_text(json.dumps(report | {"lines": lines}, indent=1))


if __name__ == "__main__":
    main()
