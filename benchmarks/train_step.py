"""A training step: tokens a second and memory beside transformers' T5, and of distillation.

    python -m benchmarks.train_step --model=small --batch=32 --steps=7 --output=step.json

Generation: systems in turns in one process, on the same random weights (T5 1.1 sizes, carried over
as a Hugging Face folder), the same batches, precision, dropout and optimizer:
  ours   the jitted step of `dgr_jax.training.step`: loss, gradients, metrics, update
  hf     torch: forward, backward, gradient norm clipped as ours, update (extra `interop`; left out,
         and said so, without it); --compile puts the model through torch.compile
Before anything is timed, both losses of the first batch without dropout are compared. A time is
that of a step with its batch already on the device, blocked until the new parameters are there;
median and, in brackets, the middle half. CPU seconds are those of all threads. Tokens are those
that are read and written, padding none; with --mean_length queries are padded to --query_length,
and ours reads them side by side (`Training.pack_queries`). Model FLOPs of queries at full length
(three times those of the forward products, nothing recomputed) by the time and the peak of the
device are its utilisation; a CPU's peak is what a large matrix product reaches here, in the same
minute.

Distillation: rank lists of --passages identifiers for a query, and a target:
  shared   `Distillation`, which encodes a query once for all its passages
  naive    the same loss, the encoder and the cross-attention's keys and values repeated for each
in turns as well, and what the compiler lays out for each: temporaries, and all with parameters and
optimizer. Memory of the generation step: of ours the same; of torch's the peak of its allocator on
a GPU, and on a CPU --memory_of=hf (or ours) runs one system alone and prints its peak resident set.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import json
import os
import pathlib
import resource
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # one GPU for both libraries

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.decode import PEAKS, SIZES, random_params, summary
from dgr_jax import partitioning
from dgr_jax.analysis.speed import device_name
from dgr_jax.config import cli
from dgr_jax.losses.generation import token_log_probs
from dgr_jax.losses.ranking import distilled_ranknet
from dgr_jax.models import pretrained
from dgr_jax.models.t5 import T5Config, Transformer
from dgr_jax.training.list_decoding import shift_right
from dgr_jax.training.objectives import Distillation, Generation, passage_scores
from dgr_jax.training.optimizers import Adafactor, AdamW, Constant
from dgr_jax.training.packed_queries import PackedQueries
from dgr_jax.training.step import init_state, make_train_step

GIB = 1 << 30
RATE = 1e-4
OPTIMIZERS = {
    "adamw": AdamW(learning_rate=Constant(RATE)),
    "adafactor": Adafactor(learning_rate=Constant(RATE)),
}


class Naive(Distillation):
    """`Distillation` of docids in the way of a plain encoder-decoder: a row for each passage."""

    def loss_fn(self, model: Any) -> Callable:
        def loss(params: Any, batch: Any, rng: jax.Array) -> Any:
            lists = batch["rank_list"]
            tokens, queries = lists["identifier_tokens"], lists["encoder_input_tokens"]
            size, length = tokens.shape[1], tokens.shape[-1]
            apply = functools.partial(model.apply, {"params": params}, deterministic=False)
            first, second = jax.random.split(rng)
            inputs = shift_right(tokens).reshape(-1, length)
            logits = apply(jnp.repeat(queries, size, axis=0), inputs, rngs={"dropout": first})
            log_probs = token_log_probs(logits.reshape(*tokens.shape, -1), tokens)
            student = passage_scores(log_probs, tokens, lists["identifier_weights"])
            rank = self.loss(student, lists["teacher_scores"], lists["passage_mask"])
            logits = apply(queries, lists["decoder_input_tokens"], rngs={"dropout": second})
            target, metrics = self._generation_loss(logits, lists)
            total = jnp.sum(rank) + self.generation_weight * len(rank) * target
            return total, jnp.float32(len(rank)), metrics

        return loss


def generation_batch(rng: np.random.Generator, size: int, args: argparse.Namespace) -> dict:
    targets = rng.integers(3, args.vocab_size, (size, args.target_length), np.int32)
    targets[:, -1] = 1
    queries = rng.integers(3, args.vocab_size, (size, args.query_length), np.int32)
    if args.mean_length:
        lengths = np.clip(2 + rng.poisson(args.mean_length - 2, size), 2, args.query_length)
        queries = np.where(np.arange(args.query_length) < lengths[:, None], queries, 0)
    return {
        "encoder_input_tokens": queries,
        "decoder_input_tokens": np.pad(targets[:, :-1], ((0, 0), (1, 0))),
        "decoder_target_tokens": targets,
        "decoder_loss_weights": np.ones(targets.shape, np.float32),
    }


def list_batch(rng: np.random.Generator, args: argparse.Namespace) -> dict:
    shape = (args.lists, args.passages)
    tokens = rng.integers(3, args.vocab_size, (*shape, 1, args.target_length), np.int32)
    return {"rank_list": generation_batch(rng, args.lists, args) | {
        "identifier_tokens": tokens,
        "identifier_weights": np.ones((*shape, 1), np.float32),
        "teacher_scores": np.sort(rng.standard_normal(shape, np.float32))[:, ::-1].copy(),
        "passage_mask": np.ones(shape, bool),
    }}  # fmt: skip


class Ours:
    """Our step; `step(batch)` blocks until the parameters have changed."""

    def __init__(self, objective, config, params, batch, args) -> None:
        model = Transformer(config)
        optimizer = OPTIMIZERS[args.optimizer].transformation(1000)
        mesh = partitioning.make_mesh(devices=jax.devices()[:1])
        self.state = init_state(model, optimizer, mesh, seed=0, params=params)
        step = make_train_step(objective, model, optimizer, mesh, self.state)
        batch = jax.device_put(batch)
        self._step = step.lower(self.state, batch).compile()
        found = self._step.memory_analysis()
        self.temporaries = found.temp_size_in_bytes / GIB
        self.memory = self.temporaries + found.argument_size_in_bytes / GIB
        self.check = jax.jit(lambda params, batch: self._loss(model, params, batch))

    @staticmethod
    def _loss(model, params, batch):
        tokens = batch["encoder_input_tokens"], batch["decoder_input_tokens"]
        logits = model.apply({"params": params}, *tokens)
        return -token_log_probs(logits, batch["decoder_target_tokens"]).mean()

    def put(self, batch: Any) -> Any:
        return jax.block_until_ready(jax.device_put(batch))

    def step(self, batch: Any) -> None:
        self.state, _ = self._step(self.state, batch)
        jax.block_until_ready(self.state.params)

    def loss(self, batch: Any) -> float:
        return float(self.check(self.state.params, batch))


class HuggingFace:
    """transformers' T5ForConditionalGeneration and torch's optimizer, on the GPU if torch has one.

    Adafactor is transformers' own, with T5's settings as ours.
    """

    def __init__(self, config: T5Config, params: Any, args: argparse.Namespace) -> None:
        import torch
        import transformers

        self.torch = torch
        self.device = "cuda" if torch.cuda.is_available() and args.device != "cpu" else "cpu"
        transformers.utils.logging.disable_progress_bar()
        with tempfile.TemporaryDirectory() as folder:
            pretrained.write_hf(folder, config, params)
            model = transformers.T5ForConditionalGeneration.from_pretrained(
                folder, dtype=torch.float32, dropout_rate=config.dropout_rate
            )
        self.model = model.to(self.device).train()
        self.autocast = config.dtype == "bfloat16"
        self.forward = torch.compile(self.model) if args.compile else self.model
        weights = list(self.model.parameters())
        self.clip = 1.0 if args.optimizer == "adamw" else None
        if args.optimizer == "adamw":
            self.optimizer = torch.optim.AdamW(weights, lr=RATE, weight_decay=0.01)
        else:
            self.optimizer = transformers.optimization.Adafactor(
                weights, lr=RATE, scale_parameter=True, relative_step=False, warmup_init=False
            )

    def put(self, batch: Any) -> Any:
        tensor = functools.partial(self.torch.tensor, dtype=self.torch.int64, device=self.device)
        inputs = tensor(batch["encoder_input_tokens"])
        return {
            "input_ids": inputs,
            "attention_mask": (inputs > 0).to(self.torch.int64),
            "labels": tensor(batch["decoder_target_tokens"]),
        }

    def _loss(self, batch: Any) -> Any:
        with self.torch.autocast(self.device, self.torch.bfloat16, enabled=self.autocast):
            return self.forward(**batch).loss

    def step(self, batch: Any) -> None:
        self._loss(batch).backward()
        if self.clip:
            self.torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self.device == "cuda":
            self.torch.cuda.synchronize()

    def loss(self, batch: Any) -> float:
        self.model.eval()
        with self.torch.inference_mode():
            found = float(self.model(**batch).loss)
        self.model.train()
        return found

    @property
    def memory(self) -> float | None:
        return self.torch.cuda.max_memory_allocated() / GIB if self.device == "cuda" else None


def model_flops(config: T5Config, args: argparse.Namespace) -> float:
    """Of a generation step: forward products, and twice as many backward."""
    inner, width = config.num_heads * config.head_dim, config.emb_dim
    gated = len(config.mlp_activations) > 1
    q, t = args.query_length, args.target_length
    mlp, attention = (3 if gated else 2) * width * config.mlp_dim, 4 * width * inner
    encoder = config.num_encoder_layers * q * (attention + mlp + 2 * q * inner)
    own = attention + mlp + 2 * t * inner
    across = 2 * width * inner + 2 * q * inner
    decoder = config.num_decoder_layers * (t * (own + across) + q * 2 * width * inner)
    return 3 * 2 * args.batch * (encoder + decoder + t * width * config.vocab_size)


def peak_flops(config: T5Config, args: argparse.Namespace) -> float:
    """FLOP/s: given, of a known GPU, or of a product of 2048 x 2048 matrices here."""
    if args.peak_tflops:
        return args.peak_tflops * 1e12
    kind = jax.devices()[0].device_kind
    for name, (half, single, _) in PEAKS.items():
        if name in kind:
            return (half if config.dtype == "bfloat16" else single) * 1e12
    x = jnp.ones((2048, 2048), config.dtype)
    product = jax.jit(lambda x: x @ x)
    product(x).block_until_ready()
    times = []
    for _ in range(5):
        start = time.perf_counter()
        product(x).block_until_ready()
        times.append(time.perf_counter() - start)
    return 2 * 2048**3 / min(times)


def take_turns(systems: dict[str, Any], batches: list[Any]) -> dict[str, np.ndarray]:
    """(seconds, CPU seconds) [2, n] of each system on every batch but the first two."""
    spent: dict[str, list] = {name: [] for name in systems}
    for batch in batches:
        for name, system in systems.items():
            there = system.put(batch)
            start = np.array([time.perf_counter(), time.process_time()])
            system.step(there)
            spent[name].append([time.perf_counter(), time.process_time()] - start)
    return {name: np.array(values[2:]).T for name, values in spent.items()}


def spread(values: np.ndarray, scale: float = 1.0, digits: int = 2) -> str:
    s = summary(values, scale)
    return f"{s['median']:.{digits}f} ({s['low']:.{digits}f}-{s['high']:.{digits}f})"


@dataclass(frozen=True)
class _Given:
    """Batches that are there, over and over."""

    batches: list[dict[str, np.ndarray]]

    def batch(self, step: int, process_index: int = 0, process_count: int = 1) -> dict[str, Any]:
        return self.batches[step % len(self.batches)]


def generation(config: T5Config, params: Any, args: argparse.Namespace) -> dict[str, Any]:
    rng = np.random.default_rng(1)
    given = _Given([generation_batch(rng, args.batch, args) for _ in range(args.steps + 2)])
    source = PackedQueries(given, shards=1, microbatches=1)
    batches = [source.batch(number) for number in range(args.steps + 2)]
    systems: dict[str, Any] = {"ours": Ours(Generation(), config, params, batches[0], args)}
    if "hf" in args.systems:
        systems["hf"] = HuggingFace(config, params, args)
        losses = {name: s.loss(s.put(batches[0])) for name, s in systems.items()}
        print(f"losses of the same batch: {losses}")
        if abs(losses["ours"] - losses["hf"]) > (1e-3 if config.dtype == "float32" else 0.1):
            raise SystemExit("the systems do not compute the same")
    flops, peak = model_flops(config, args), peak_flops(config, args)
    spent = take_turns(systems, batches)
    queries = np.mean([np.count_nonzero(batch["encoder_input_tokens"]) for batch in batches])
    tokens = queries + args.batch * args.target_length
    print(
        f"generation, {args.optimizer}, batch {args.batch} x ({args.query_length} + "
        f"{args.target_length}) tokens: {flops / 1e9:.0f} GFLOP a step, "
        f"peak {peak / 1e9:.0f} GFLOP/s"
    )
    line: dict[str, Any] = {"gflop": flops / 1e9, "peak_gflops": peak / 1e9}
    for name, (clock, cpu) in spent.items():
        memory = systems[name].memory
        line[name] = {
            "ms": summary(clock, 1e3), "cpu_seconds": summary(cpu), "memory_gib": memory,
            "tokens_per_second": summary(tokens / clock), "mfu": summary(flops / clock / peak),
        }  # fmt: skip
        print(
            f"  {name:8s}{spread(tokens / clock, 1, 0):>22s} tokens/s   {spread(clock, 1e3, 0)} ms"
            f"   CPU {spread(cpu)} s   utilisation {spread(flops / clock / peak, 100, 1)} %"
            + (f"   {memory:.2f} GiB" if memory else "")
        )
    if "hf" in spent:
        ratio = spent["hf"] / spent["ours"]
        line["times_hf"], line["times_hf_by_cpu"] = summary(ratio[0]), summary(ratio[1])
        print(f"  ours is {spread(ratio[0])} times as fast, {spread(ratio[1])} by CPU seconds")
    return line


def distillation(config: T5Config, params: Any, args: argparse.Namespace) -> dict[str, Any]:
    rng = np.random.default_rng(2)
    batches = [list_batch(rng, args) for _ in range(args.steps + 2)]
    systems = {
        name: Ours(kind(distilled_ranknet, generation_weight=1.0), config, params, batches[0], args)
        for name, kind in (("shared", Distillation), ("naive", Naive))
    }
    spent = take_turns(systems, batches)
    print(
        f"distillation, {args.lists} queries of {args.query_length} tokens x {args.passages} "
        f"identifiers of {args.target_length}"
    )
    line: dict[str, Any] = {}
    for name, (clock, cpu) in spent.items():
        of = systems[name]
        line[name] = {
            "ms": summary(clock, 1e3), "cpu_seconds": summary(cpu),
            "temporaries_gib": of.temporaries, "memory_gib": of.memory,
        }  # fmt: skip
        print(
            f"  {name:8s}{spread(clock, 1e3, 0):>22s} ms   CPU {spread(cpu)} s   temporaries "
            f"{of.temporaries:.2f} GiB, with parameters and optimizer {of.memory:.2f} GiB"
        )
    shared, naive = systems.values()
    ratio = spent["shared"] / spent["naive"]
    line |= {"time": summary(ratio[0]), "temporaries": shared.temporaries / naive.temporaries}
    print(
        f"  shared / naive: time {spread(ratio[0])}, CPU {spread(ratio[1])}, temporaries "
        f"{line['temporaries']:.2f}, memory {shared.memory / naive.memory:.2f}"
    )
    return line


def alone(name: str, config: T5Config, params: Any, args: argparse.Namespace) -> None:
    """Prints the peak resident set of a process that runs one system."""
    batch = generation_batch(np.random.default_rng(1), args.batch, args)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    if name == "hf":
        system = HuggingFace(config, params, args)
    else:
        system = Ours(Generation(), config, params, batch, args)
    for _ in range(3):
        system.step(system.put(batch))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"{name}: peak resident set {peak:.2f} GiB, of which {before:.2f} before it was made")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    names = lambda text: text.split(",")
    add("--model", choices=SIZES, default="small")
    add("--parts", type=names, default=["generation", "distillation"])
    add("--systems", type=names, default=["ours", "hf"])
    add("--memory_of", choices=("ours", "hf"))
    add("--optimizer", choices=OPTIMIZERS, default="adamw")
    add("--device", choices=("cpu", "gpu"), help="the default is the best that there is")
    add("--batch", type=int, default=32, help="generation examples")
    add("--lists", type=int, default=16, help="rank lists")
    add("--passages", type=int, default=6)
    add("--query_length", type=int, default=32)
    add("--mean_length", type=int, default=0, help="of queries; 0: all are as long as they may be")
    add("--target_length", type=int, default=9)
    add("--vocab_size", type=int, default=32128)
    add("--dropout", type=float, default=0.1)
    add("--dtype", choices=("float32", "bfloat16"), default="float32")
    add("--remat", default="none")
    add("--compile", action="store_true", help="torch.compile")
    add("--steps", type=int, default=5, help="timed, after two that warm up")
    add("--peak_tflops", type=float, help="of the device")
    add("--output", help="a JSON file")
    return parser.parse_args()


def main() -> None:
    args = parse()
    cli.reuse_memory()
    if args.device:
        jax.config.update("jax_platforms", {"cpu": "cpu", "gpu": "cuda"}[args.device])
    if "hf" in args.systems and not all(map(importlib.util.find_spec, ("torch", "transformers"))):
        print("hf is left out: it needs the extra 'dgr_jax[interop]'")
        args.systems.remove("hf")
    config = T5Config(
        vocab_size=args.vocab_size, dtype=args.dtype, dropout_rate=args.dropout, remat=args.remat,
        **SIZES[args.model],
    )  # fmt: skip
    params = random_params(config)
    if args.memory_of:
        alone(args.memory_of, config, params, args)
        return
    device = device_name(jax.devices()[0])
    print(
        f"{device}, jax {jax.__version__}, load {os.getloadavg()[0]:.1f}; T5 1.1 {args.model}, "
        f"{args.dtype}, dropout {args.dropout}",
        flush=True,
    )
    parts = {"generation": generation, "distillation": distillation}
    found = {name: parts[name](config, params, args) for name in args.parts}
    if args.output:
        report = {"device": device, "settings": vars(args)} | found
        pathlib.Path(args.output).write_text(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
