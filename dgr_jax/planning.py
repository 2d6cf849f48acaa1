"""What an experiment needs of a machine that is not here: memory, FLOPs, network, time at best.

The programs that would run, the two train steps and the search with its trie, are built from shapes
alone and compiled for a TPU topology by libtpu, which needs no TPU. `hlo` reads what they do. For
GPUs, and to rank meshes, `analytic` counts by formula.

Estimated, as no data is read: the size of the vocabulary and of the trie, from the settings and the
number of passages, as if these were spread evenly over all codes.
"""

from __future__ import annotations

import dataclasses
import logging
import math
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dgr_jax import hlo, partitioning
from dgr_jax.data.vocabulary import SentencePiece
from dgr_jax.decoding import trie_arrays, trie_build
from dgr_jax.decoding.trie_expand import TrieConstraint
from dgr_jax.experiment import Experiment, Training
from dgr_jax.identifiers.atomic import Atomic
from dgr_jax.identifiers.rq import ResidualQuantization
from dgr_jax.identifiers.semantic import KMeansTree
from dgr_jax.identifiers.string import NaiveString
from dgr_jax.models.t5 import T5Config, Transformer
from dgr_jax.retrieval.generative import Search, decode_fn
from dgr_jax.training.step import abstract_state, make_train_step

logger = logging.getLogger(__name__)

PROGRAMS = ("generate", "distill", "decode")
GIB = 1 << 30


@dataclass(frozen=True)
class Chip:
    """Of one chip, from its maker: bytes of memory, bf16 FLOP/s, bytes/s of memory, and bytes/s
    that it can send to others; far_network: to chips outside of its host of `near` chips. tf32,
    fp32: FLOP/s of GPUs in these; TPUs have neither, and 0."""

    memory: float
    flops: float
    bandwidth: float
    network: float
    dimensions: int = 1
    near: int = 0
    far_network: float = 0.0
    tf32: float = 0.0
    fp32: float = 0.0

    def peak(self, products: str) -> tuple[float, str]:
        """FLOP/s of products of matrices, one of PRODUCTS, and how the chip makes them.

        As JAX does (`jax.lax.Precision`): float32 by default is one pass of bfloat16 on TPUs and
        TF32 on these GPUs; exact float32 is six passes on TPUs and no work of GPUs' tensor cores.
        """
        if products == "bfloat16":
            return self.flops, "bfloat16"
        if products == "float32":
            return (self.tf32, "TF32") if self.tf32 else (self.flops, "one bfloat16 pass")
        return (self.fp32, "float32") if self.fp32 else (self.flops / 6, "six bfloat16 passes")


# Products of matrices of bfloat16; of float32, at the precision that JAX takes by default; and of
# float32 at the highest.
PRODUCTS = ("bfloat16", "float32", "exact float32")


# cloud.google.com/tpu/docs (interconnect: all links of a chip, one way) and NVIDIA's data sheets
# (SXM, without sparsity; NVLink one way in a host of 8, InfiniBand of 400 and 200 Gbit/s beyond).
CHIPS = {
    "v4": Chip(32 * GIB, 275e12, 1228e9, 300e9, dimensions=3),
    "v5e": Chip(16 * GIB, 197e12, 819e9, 200e9, dimensions=2),
    "v5p": Chip(95 * GIB, 459e12, 2765e9, 600e9, dimensions=3),
    "v6e": Chip(32 * GIB, 918e12, 1640e9, 400e9, dimensions=2),
    "h100": Chip(
        80 * GIB, 989e12, 3350e9, 450e9, near=8, far_network=50e9, tf32=494e12, fp32=67e12
    ),
    "a100": Chip(
        80 * GIB, 312e12, 2039e9, 300e9, near=8, far_network=25e9, tf32=156e12, fp32=19.5e12
    ),
}


@dataclass(frozen=True)
class Topology:
    """Chips of one kind, in a grid."""

    name: str
    shape: tuple[int, ...]

    @property
    def chip(self) -> Chip:
        return CHIPS[self.name]

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def is_tpu(self) -> bool:
        return self.name.startswith("v")

    def __str__(self) -> str:
        return f"{self.name}:{'x'.join(map(str, self.shape))}"

    def devices(self) -> list[Any]:
        """Devices to compile for. Raises ImportError without libtpu, ValueError for a grid that
        is not made."""
        try:
            import libtpu  # noqa: F401
        except ImportError as error:
            raise ImportError(
                "planning for TPUs needs the extra 'dgr_jax[tpu]': pip install 'dgr_jax[tpu]'"
            ) from error
        from jax.experimental import topologies

        for name, value in _NO_TPU_HERE.items():
            os.environ.setdefault(name, value)
        options: dict[str, Any] = {"chip_config_name": "megacore"} if self.name == "v4" else {}
        if any(size % 2 for size in self.shape[:2]):
            options["chips_per_host_bounds"] = (1, 1, 1)
        try:
            made = topologies.get_topology_desc(platform="tpu", topology_name=str(self), **options)
        except jax.errors.JaxRuntimeError as error:
            raise ValueError(f"--topology={self}: {error}") from error
        return list(made.devices)


_NO_TPU_HERE = {  # libtpu looks for one otherwise, and locks it
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5e-4",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}


def topology(text: str) -> Topology:
    """'v5p:4x4x4' or 'h100:8'. Raises ValueError for anything else."""
    name, _, grid = text.partition(":")
    if name not in CHIPS:
        raise ValueError(f"--topology: got {text!r}, expected one of {', '.join(CHIPS)}, a colon, "
                         "and a grid, such as v5p:4x4x4, v5e:4x4 or h100:8")  # fmt: skip
    wanted = CHIPS[name].dimensions
    if not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)*", grid) or grid.count("x") + 1 != wanted:
        example = "x".join(["4"] * wanted) if wanted > 1 else "8"
        raise ValueError(
            f"--topology: got {text!r}, expected {wanted} number{'s' * (wanted > 1)} for {name}, "
            f"such as {name}:{example}"
        )
    return Topology(name, tuple(int(size) for size in grid.split("x")))


# sizes that are estimated


@dataclass(frozen=True)
class Sizes:
    """What the prepare stage would find: passages, tokens of the vocabulary, the choices at every
    position of an identifier, and whether identifiers end with a closing token."""

    passages: int
    vocab_size: int
    levels: tuple[int, ...]
    closing: bool

    @property
    def length(self) -> int:
        return len(self.levels) + self.closing


def estimated_sizes(experiment: Experiment, passages: int) -> Sizes:
    """Sizes from the settings. Codes are taken to be used evenly, text vocabularies to be full."""
    levels, codes, closing = _levels(experiment.prepare.identifiers, passages)
    text = text_size(experiment.prepare.vocabulary)
    size = experiment.model.vocab_size or _rounded(text + codes)
    return Sizes(passages, size, levels, closing)


def text_size(pieces: SentencePiece) -> int:
    """Tokens of a text vocabulary before any code, full; one that is given has T5's 32,000."""
    return _rounded((32_000 if pieces.path else pieces.size) + pieces.extra_ids)


def _rounded(tokens: int) -> int:
    return -(-tokens // 128) * 128


def _levels(scheme: Any, passages: int) -> tuple[tuple[int, ...], int, bool]:
    """(choices at each position, docid codes in the vocabulary, ends with a closing token)."""
    if isinstance(scheme, ResidualQuantization):
        scheme = scheme.sized(passages)
        levels = (scheme.codebook_size,) * scheme.num_codes
        if math.prod(levels) < 2 * passages:  # many share their codes: a tie code tells them apart
            levels = (*levels, max(2, math.ceil(2 * passages / math.prod(levels))))
        return levels, sum(levels), False
    if isinstance(scheme, KMeansTree):
        splits = math.log(max(passages / scheme.leaf_size, 1)) / math.log(scheme.branching)
        levels = (scheme.branching,) * math.ceil(splits) + (scheme.leaf_size,)
        return levels, sum(levels), True
    if isinstance(scheme, NaiveString):
        return (10,) * len(str(passages - 1)), 10, False
    if isinstance(scheme, Atomic):
        return (passages,), passages, False
    return (2000,) * 12, 0, True  # titles and other text


def abstract_trie(sizes: Sizes) -> tuple[trie_arrays.Arrays, trie_build.Layout]:
    """The arrays of the trie of random identifiers, in shape and dtype, without memory.

    Rows in c cells fill c (1 - exp(-rows / c)) of them; exp(-rows / c) of the rows are alone.
    """
    rows, length = sizes.passages, len(sizes.levels)
    cells = [math.prod(sizes.levels[:depth]) for depth in range(length + 1)]
    alone = [rows * math.exp(-(rows - 1) / cell) for cell in cells]
    nodes = [cell * -math.expm1(-rows / cell) for cell in cells]
    alone[-1] = nodes[-1] = rows
    inner = [nodes[depth] - alone[depth] for depth in range(length)]
    stored = [1.0] + [nodes[depth] - alone[depth - 1] for depth in range(1, length + 1)]
    left = [length - depth + sizes.closing for depth in range(length + 1)]
    tails = alone[0] * left[0]
    tails += sum((alone[d] - alone[d - 1]) * left[d] for d in range(1, length + 1))
    layout = _layout(sizes)
    most = layout.gathers[-1]
    wide = sum(i for depth, i in enumerate(inner) if i >= 1 and stored[depth + 1] / i > most)
    counts = dict(nodes=sum(stored), inner=sum(inner), tails=tails, wide=wide)
    made = _arrays(sizes, layout, **{name: round(count) for name, count in counts.items()})
    capacity = trie_arrays.capacities(made, layout)
    padded = {name: _unreal(capacity[name], array.dtype) for name, array in made.items()}
    return trie_arrays.Arrays(**padded), layout


def _layout(sizes: Sizes) -> trie_build.Layout:
    # A closing token, which is small, stretches the range of token ids at a depth.
    spans = np.array([sizes.vocab_size] if sizes.closing else sizes.levels)
    words = trie_build.bitmap_words(sizes.vocab_size, spans[spans > trie_build.GATHERS[-1]])
    return trie_build.Layout(
        ends="token" if sizes.closing else "fixed",
        max_length=trie_build.size_class(sizes.length) if sizes.closing else sizes.length,
        gathers=trie_build.choose_gathers(words),
        bitmap_words=words,
        token_dtype=trie_build.smallest_dtype(spans.max() - 1).name,
    )


def _arrays(
    sizes: Sizes, layout: trie_build.Layout, *, nodes: int, inner: int, tails: int, wide: int
) -> trie_arrays.Arrays:
    if sizes.vocab_size > trie_build.MAX_VOCABULARY:
        raise ValueError(
            f"Prepare.identifiers: a vocabulary of {sizes.vocab_size} tokens, expected at most "
            f"{trie_build.MAX_VOCABULARY}, which the trie can hold"
        )
    token, longest = np.dtype(layout.token_dtype), layout.max_length
    shapes = {
        "edge_tokens": ((nodes,), token),
        "directory": ((-(-nodes // 32), 2), np.uint32),
        "first_child": ((inner + 1,), np.int32),
        "tails": ((tails,), token),
        "tail_start": ((sizes.passages if sizes.closing else 0,), np.int32),
        "row_length": ((0,), np.uint8),
        "wide": ((wide,), np.int32),
        "bitmaps": ((wide, layout.bitmap_words), np.uint32),
        "base": ((longest + 1,), np.int32),
        "bitmap_low": ((longest + 1,), np.int32),
        "level_start": ((longest + 2,), np.int32),
        "tail_bias": ((longest + 1,), np.int32),
        "ends_at": ((), np.int32),
    }
    return trie_arrays.Arrays(**{name: _unreal(*found) for name, found in shapes.items()})


def _unreal(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """An array of this shape that takes no memory."""
    return np.broadcast_to(np.zeros((), dtype), shape)


# programs


@dataclass(frozen=True)
class Work:
    """What the formulas need to know of a program. queries of Q tokens are encoded; each has
    `targets` sequences of T tokens. beams: of a search, 0: training; ahead: tokens at the end of a
    search that one pass scores (TrieConstraint.completion_width)."""

    queries: int
    query_length: int
    targets: float
    target_length: int
    beams: int = 0
    microbatches: int = 1
    ahead: int = 1

    @property
    def steps(self) -> int:
        """Passes of the decoder that a search makes, the first, of one beam, among them."""
        return self.target_length - self.ahead + 1

    @property
    def looped(self) -> int:
        """Those of them that are runs of its loop: not the first, nor the one that scores ahead."""
        return max(1, self.steps - 1 - (self.ahead > 1))


@dataclass(frozen=True)
class Program:
    """One program on a mesh. parts: bytes that a chip holds all the time, by name."""

    name: str
    work: Work
    parts: Mapping[str, int]
    lower: Callable[[], Any]


def _held(tree: Any) -> int:
    """Bytes on one chip of abstract arrays with shardings."""
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * np.dtype(leaf.dtype).itemsize
        for leaf in jax.tree.leaves(tree)
    )


def abstract(
    mesh: Any, shape: tuple[int, ...], dtype: Any, *, sharding: Any = None
) -> jax.ShapeDtypeStruct:
    sharding = sharding or partitioning.batch_sharding(mesh)
    return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)


def _generation_batch(mesh: Any, rows: int, query_length: int, length: int) -> dict[str, Any]:
    return {
        "encoder_input_tokens": abstract(mesh, (rows, query_length), jnp.int32),
        "decoder_input_tokens": abstract(mesh, (rows, length), jnp.int32),
        "decoder_target_tokens": abstract(mesh, (rows, length), jnp.int32),
        "decoder_loss_weights": abstract(mesh, (rows, length), jnp.float32),
    }


def _list_batch(mesh: Any, rows: int, lists: int, query_length: int, length: int) -> dict[str, Any]:
    return _generation_batch(mesh, rows, query_length, length) | {
        "identifier_tokens": abstract(mesh, (rows, lists, 1, length), jnp.int32),
        "identifier_weights": abstract(mesh, (rows, lists, 1), jnp.float32),
        "teacher_scores": abstract(mesh, (rows, lists), jnp.float32),
        "passage_mask": abstract(mesh, (rows, lists), jnp.bool_),
    }


def abstract_batch(name: str, experiment: Experiment, sizes: Sizes, mesh: Any) -> dict[str, Any]:
    """A batch of the stage 'generate', 'control' or 'distill' in shape, of one identifier a
    passage."""
    settings = experiment.generate if name == "generate" else experiment.distill
    shape = experiment.prepare.query_length, sizes.length
    generation = _generation_batch(mesh, settings.examples, *shape)
    if name != "distill":
        return generation
    size = list_size(experiment.teach.lists)
    lists = {"rank_list": _list_batch(mesh, settings.list_batch_size, size, *shape)}
    # Without examples of their own, the target of each list's query.
    return lists | ({"generation": generation} if settings.batch_size else {})


def list_size(lists: Any) -> int:
    """Passages of a rank list of a recipe."""
    return getattr(lists, "size", 0) or lists.negatives + 1


def model_config(experiment: Experiment, sizes: Sizes) -> T5Config:
    """The student with the vocabulary of these sizes."""
    return dataclasses.replace(experiment.model, vocab_size=sizes.vocab_size)


def program(name: str, experiment: Experiment, sizes: Sizes, mesh: Any, rules: Any) -> Program:
    """'generate' or 'distill', one step of training; 'decode', one batch of a search.

    mesh: of devices, or abstract, where the program is not compiled.
    """
    config = model_config(experiment, sizes)
    if name == "decode":
        return _search(experiment, config, sizes, mesh, rules)
    settings = getattr(experiment, name)
    query_length = experiment.prepare.query_length
    batch = abstract_batch(name, experiment, sizes, mesh)
    work = Work(settings.batch_size, query_length, 1, sizes.length)
    if name == "distill":
        rows, size = settings.list_batch_size, list_size(experiment.teach.lists)
        both = rows + settings.batch_size
        targets = (rows * size + settings.examples) / both
        work = Work(both, query_length, targets, sizes.length)
    work = dataclasses.replace(work, microbatches=settings.microbatches)
    check_rows(batch, settings, mesh, name)
    return step_program(name, settings, Transformer(config), batch, work, mesh, rules)


def check_rows(batch: Any, settings: Training, mesh: Any, name: str) -> None:
    shards = partitioning.batch_shards(mesh) * settings.microbatches
    for leaf in jax.tree.leaves(batch):
        if leaf.shape[0] % shards:
            raise ValueError(
                f"{name}: got a batch of {leaf.shape[0]}, expected a multiple of {shards}, "
                "microbatches x data shards of the mesh; set BATCH_SIZE, LIST_BATCH_SIZE or --mesh"
            )


def step_program(
    name: str, settings: Training, model: Any, batch: Any, work: Work, mesh: Any, rules: Any
) -> Program:
    """A train step of a model on batches of these shapes."""
    optimizer = settings.optimizer.transformation(settings.steps)
    state = abstract_state(model, optimizer, mesh, rules)
    parts = {
        "parameters": _held(state.params),
        "optimizer": _held(state.opt_state),
        "batch": _held(batch),
    }

    def lower() -> Any:
        step = make_train_step(
            *(settings.objective, model, optimizer, mesh, state),
            microbatches=settings.microbatches,
            rules=rules,
        )
        return step.lower(state, batch)

    return Program(name, work, parts, lower)


def _search(
    experiment: Experiment, config: T5Config, sizes: Sizes, mesh: Any, rules: Any
) -> Program:
    search = experiment.evaluate.search
    if not isinstance(search, Search):
        raise ValueError(
            f"Evaluate.search: got {type(search).__name__}; decoding is planned for one identifier "
            "a passage: give --programs=generate,distill"
        )
    rows = partitioning.shared_rows(search.batch_size, mesh)
    arrays, layout = abstract_trie(sizes)
    places = partitioning.index_shardings(
        dict(arrays.items()), mesh, max_replicated_bytes=search.max_replicated_bytes
    )
    put = {k: abstract(mesh, a.shape, a.dtype, sharding=places[k]) for k, a in arrays.items()}
    constraint = TrieConstraint(
        **put, layout=layout, vocab_size=sizes.vocab_size, renormalise=search.renormalise
    )
    params = partitioning.abstract_params(Transformer(config), mesh, rules)
    tokens = abstract(mesh, (rows, search.query_length), jnp.int32)
    parts = {"parameters": _held(params), "trie": _held(constraint), "batch": _held(tokens)}

    def lower() -> Any:
        decode = decode_fn(config, search.num_beams, layout.max_length, mesh, rules=rules)
        return decode.lower(params, constraint, tokens)

    work = Work(
        *(rows, search.query_length, search.num_beams, sizes.length, search.num_beams),
        ahead=max(1, constraint.completion_width),
    )
    return Program("decode", work, parts, lower)


# plans


@dataclass(frozen=True)
class Plan:
    """One program on one mesh, a chip's share of it.

    parts: bytes by name, `temporaries` included. sent: bytes by collective. products: what most of
    the FLOPs are, one of PRODUCTS. source: 'compiled', 'formula', or what the compiler said when it
    did not fit.
    """

    program: str
    mesh: Mapping[str, int]
    topology: Topology
    parts: Mapping[str, float]
    flops: float
    moved: float
    sent: Mapping[str, float]
    queries: int
    products: str = "bfloat16"
    source: str = "formula"
    seconds: float = 0.0

    @property
    def total(self) -> float:
        return sum(self.parts.values())

    @property
    def fits(self) -> bool:
        return self.total <= self.topology.chip.memory

    @property
    def times(self) -> dict[str, float]:
        """Least seconds of a run, by what bounds it; all three at once at best."""
        chip = self.topology.chip
        far = chip.near and self.topology.size > chip.near
        network = chip.far_network if far else chip.network
        return {
            "compute": self.flops / chip.peak(self.products)[0],
            "memory": self.moved / chip.bandwidth,
            "network": sum(self.sent.values()) / network,
        }

    @property
    def bound(self) -> str:
        return max(self.times, key=self.times.__getitem__)

    @property
    def queries_per_second(self) -> float:
        """At best: as many as the tightest bound lets through."""
        return self.queries / max(max(self.times.values()), 1e-12)


def compiled(made: Program, formula: Plan) -> Plan:
    """Compiles a program and reads what it does; formula: the same by formula."""
    start = time.monotonic()
    logger.info("plan: compiling %s for %s", made.name, formula.topology)
    try:
        program = made.lower().compile()
    except jax.errors.JaxRuntimeError as error:
        used = re.search(r"Used ([\d.]+)([KMGT]) of", str(error))
        if "RESOURCE_EXHAUSTED" not in str(error) or used is None:
            raise
        total = float(used[1]) * 1024 ** ("KMGT".index(used[2]) + 1)
        parts = {**made.parts, "temporaries": max(0.0, total - sum(made.parts.values()))}
        source = "too large to compile; FLOPs and bytes by formula"
        return dataclasses.replace(formula, parts=parts, source=source)
    memory = program.memory_analysis()
    arguments = memory.argument_size_in_bytes
    total = arguments + memory.temp_size_in_bytes
    total += memory.output_size_in_bytes - memory.alias_size_in_bytes
    parts = {**made.parts, "temporaries": max(0.0, total - sum(made.parts.values()))}
    done = hlo.cost(program.as_text(), unknown_trips=made.work.looped)
    return dataclasses.replace(
        formula,
        parts=parts,
        flops=done.flops,
        moved=done.bytes,
        sent=done.sent(),
        source="compiled",
        seconds=time.monotonic() - start,
    )


def analytic(made: Program, mesh: Any, topology: Topology, config: T5Config) -> Plan:
    """The same by formula: products of matrices, what layers keep, Megatron's all-reduces of
    activations (Shoeybi et al. 2019), all-reduce of gradients, all-gather where fully sharded."""
    axes = dict(mesh.shape)
    chips = topology.size
    work, training = made.work, not made.work.beams
    runs = passes(config) if training else 1
    flops = runs * forward_flops(config, work) / chips
    tokens = _tokens(work, partitioning.batch_shards(mesh))
    temporaries = _temporaries(config, work, axes["model"], tokens)
    gathered = 1 if training else axes["fsdp"] / 2
    temporaries += made.parts["parameters"] * gathered  # gradients, or all kernels in bfloat16
    return Plan(
        program=made.name,
        mesh=axes,
        topology=topology,
        parts={**made.parts, "temporaries": temporaries},
        flops=flops,
        moved=_moved(config, made, temporaries, runs),
        sent=_sent(config, made, axes, tokens, runs),
        queries=work.queries,
        products=config.dtype,
    )


def forward_flops(config: T5Config, work: Work) -> float:
    """FLOPs of matrix products of one forward pass, or of one search, over all chips."""
    width, heads = config.emb_dim, config.num_heads * config.head_dim
    mlp = _mlp(config)
    read = work.queries * work.query_length
    # The first step of a search has one beam a query.
    steps = work.target_length - 1 + 1 / work.beams if work.beams else work.target_length
    written = work.queries * work.targets * steps
    cached = work.target_length + work.query_length
    decoder = written * (6 * width * heads + mlp + 2 * heads * cached) + read * 2 * width * heads
    logits = written * width * config.vocab_size
    encoder = encoder_flops(config, work.queries, work.query_length)
    layers = config.num_decoder_layers * decoder
    if config.prefix_adaptive_layers:
        block = 4 * width * heads + mlp + 2 * heads * work.target_length
        layers += written * (config.prefix_adaptive_layers * block + 3 * width * width)
    return encoder + 2.0 * (layers + logits)


def encoder_flops(config: T5Config, texts: int, length: int) -> float:
    """FLOPs of matrix products of the encoder over texts of so many tokens, padding counted."""
    width, heads = config.emb_dim, config.num_heads * config.head_dim
    layer = 4 * width * heads + _mlp(config) + 2 * heads * length
    return 2.0 * config.num_encoder_layers * texts * length * layer


def _mlp(config: T5Config) -> int:
    """Weights of the matrices of an MLP."""
    return (len(config.mlp_activations) + 1) * config.emb_dim * config.mlp_dim


def passes(config: T5Config) -> int:
    """Forward passes that the FLOPs of a training step are worth."""
    return 4 if config.remat == "full" else 3


def _tokens(work: Work, shards: int) -> tuple[float, float]:
    """Tokens that are read and written together on one data shard."""
    queries = work.queries / shards / work.microbatches
    return queries * work.query_length, queries * work.targets * (
        1 if work.beams else work.target_length
    )


def _temporaries(config: T5Config, work: Work, parts: int, tokens: tuple[float, float]) -> float:
    """Bytes of activations, roughly: what each layer keeps, and three copies of the logits."""
    read, written = tokens
    element = 2 if config.dtype == "bfloat16" else 4
    width, heads = config.emb_dim, config.num_heads * config.head_dim / parts
    hidden = config.mlp_dim * len(config.mlp_activations) / parts
    scores = config.num_heads / parts
    logits = 3 * written * config.vocab_size / parts * 4
    if work.beams:
        caches = config.num_decoder_layers + config.prefix_adaptive_layers
        cache = 2 * written * work.target_length * heads * caches
        cross = 2 * read * heads * config.num_decoder_layers
        return element * (2 * cache + cross) + logits
    kept = {
        "full": (width, width),
        "minimal": (2 * width + 4 * heads + hidden, 4 * width + 6 * heads + hidden),
        "none": (
            6 * width + 5 * heads + 3 * hidden + 3 * scores * work.query_length,
            9 * width + 8 * heads + 3 * hidden
            + 3 * scores * (work.query_length + work.target_length),
        ),
    }[config.remat]  # fmt: skip
    decoders = config.num_decoder_layers + config.prefix_adaptive_layers  # the latter keep less
    layers = config.num_encoder_layers * read * kept[0] + decoders * written * kept[1]
    return element * layers + logits


def _moved(config: T5Config, made: Program, temporaries: float, passes: int) -> float:
    """Bytes of memory read and written, at least: parameters in every pass or step of a search, the
    optimizer, and temporaries once each way (of a search for every token, in whatever pass)."""
    parameters = made.parts["parameters"]
    if made.work.beams:
        half = 2 if config.dtype == "bfloat16" else 1
        return parameters / half * made.work.steps + temporaries * made.work.target_length
    update = 5 * parameters + 2 * made.parts["optimizer"]
    return passes * parameters * made.work.microbatches + update + 2 * temporaries


def _sent(
    config: T5Config,
    made: Program,
    axes: Mapping[str, int],
    tokens: tuple[float, float],
    passes: int,
) -> dict[str, float]:
    read, written = tokens
    work, training = made.work, not made.work.beams
    element = 2 if config.dtype == "bfloat16" else 4
    ring = lambda n: (n - 1) / n
    runs = work.microbatches if training else 1
    steps = work.target_length if work.beams else 1
    adaptive = 2 * config.prefix_adaptive_layers + 2 if config.prefix_adaptive_layers else 0
    reductions = 3 * config.num_decoder_layers + adaptive
    layers = 2 * config.num_encoder_layers * read + reductions * written * steps
    each_way = {1: 1, 3: 2, 4: 3}[passes]
    reduced = each_way * layers * config.emb_dim * element * 2 * ring(axes["model"]) * runs
    gathered = scattered = 0.0
    if training:
        parameters = made.parts["parameters"]  # of one chip, cut over model and fsdp
        whole = parameters * axes["fsdp"]
        reduced += 2 * ring(axes["data"]) * parameters
        gathered = (passes - 1) * whole * ring(axes["fsdp"]) * runs
        scattered = whole * ring(axes["fsdp"])
    else:  # once a batch, see partitioning.on_batch_shards
        gathered = made.parts["parameters"] * (axes["fsdp"] - 1)
    found = {"all-reduce": reduced, "all-gather": gathered, "reduce-scatter": scattered}
    return {kind: size for kind, size in found.items() if size}


def meshes(topology: Topology, config: T5Config, rows: int) -> Iterator[partitioning.Mesh]:
    """Meshes of all chips that cut heads, MLP and batch evenly, with and without fsdp."""
    for model in (n for n in range(1, topology.size + 1) if topology.size % n == 0):
        if config.num_heads % model or config.mlp_dim % model:
            continue
        rest = topology.size // model
        if rows % rest == 0:
            yield partitioning.Mesh(data=rest, model=model)
            if rest > 1:
                yield partitioning.Mesh(data=1, model=model, fsdp=rest)


def abstract_mesh(mesh: partitioning.Mesh, topology: Topology) -> Any:
    """The mesh without devices, for formulas."""
    sizes = partitioning.mesh_sizes(mesh, topology.size)
    auto = (jax.sharding.AxisType.Auto,) * len(sizes)
    return jax.sharding.AbstractMesh(tuple(sizes.values()), tuple(sizes), axis_types=auto)


def plan(
    name: str,
    experiment: Experiment,
    sizes: Sizes,
    topology: Topology,
    mesh: partitioning.Mesh,
    *,
    compile: bool = True,
) -> Plan:
    """The plan of one program: compiled where the topology is of TPUs, by formula otherwise."""
    if compile and topology.is_tpu:
        config = model_config(experiment, sizes)
        on = partitioning.make_mesh(mesh, topology.devices())
        made = program(name, experiment, sizes, on, mesh.rules)
        formula = analytic(made, on, topology, config)
        return compiled(made, formula)
    # The same bytes, and one layer to trace in place of all.
    scanned = dataclasses.replace(experiment.model, scan_layers=True)
    experiment = dataclasses.replace(experiment, model=scanned)
    on = abstract_mesh(mesh, topology)
    made = program(name, experiment, sizes, on, mesh.rules)
    return analytic(made, on, topology, model_config(experiment, sizes))


def sweep(
    name: str, experiment: Experiment, sizes: Sizes, topology: Topology
) -> list[tuple[partitioning.Mesh, Plan]]:
    """Every mesh by formula, those that fit first, the fastest first."""
    settings = experiment.generate if name == "decode" else getattr(experiment, name)
    rows = settings.batch_size if name != "decode" else experiment.evaluate.search.batch_size
    if name == "distill":
        rows = math.gcd(rows, settings.list_batch_size)
    rows = rows // settings.microbatches if name != "decode" else 10**6 * topology.size
    found = [
        (mesh, plan(name, experiment, sizes, topology, mesh, compile=False))
        for mesh in meshes(topology, model_config(experiment, sizes), rows)
    ]
    key = lambda pair: (not pair[1].fits, -pair[1].queries_per_second, pair[1].total)
    return sorted(found, key=key)


def advice(found: Plan, experiment: Experiment) -> list[str]:
    """What to change where a plan does not fit, or waits for the network."""
    config, parts = experiment.model, found.parts
    say: list[str] = []
    if found.fits:
        if found.bound == "network" and found.mesh["model"] > 1:
            say.append("the network bounds it: a smaller --mesh model axis, or a larger batch")
        return say
    if found.program == "decode":
        if parts["temporaries"] > parts["parameters"]:
            say.append("--gin.Search.batch_size or --gin.NUM_BEAMS smaller")
        if parts["trie"] > 0.1 * found.total:
            say.append("--gin.Search.max_replicated_bytes smaller, so that the trie is cut")
        return [*say, "more chips in the model axis of --mesh"]
    if parts["temporaries"] > parts["parameters"] + parts["optimizer"]:
        if config.remat != "full":
            stronger = "minimal" if config.remat == "none" else "full"
            say.append(f"--gin.T5Config.remat={stronger}")
        if config.dtype != "bfloat16":
            say.append("--gin.T5Config.dtype=bfloat16")
        say.append("--gin.Training.microbatches larger, or --gin.BATCH_SIZE smaller")
    if parts["optimizer"] > parts["parameters"]:
        say.append("Adafactor in place of AdamW")
    if not config.scan_layers:
        say.append("--gin.T5Config.scan_layers=True")
    more = found.mesh["model"] * 2
    if config.num_heads % more == 0 and found.mesh["data"] > 1:
        say.append(f"--mesh={found.mesh['data'] // 2},{more}: parameters cut over {more} chips")
    if found.mesh["fsdp"] == 1 and found.mesh["data"] > 1:
        say.append(
            f"--mesh=1,{found.mesh['model']},{found.mesh['data']}: parameters cut over the data "
            "shards as well (fsdp)"
        )
    return say or ["a larger --topology"]
