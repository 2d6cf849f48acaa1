"""Operations, bytes and traffic of a step by formula, where nothing is compiled."""

from __future__ import annotations

from collections.abc import Mapping

from dgr_jax.capacity.programs import Program, ProgramShape
from dgr_jax.models.t5 import T5Config


def forward_flops(config: T5Config, shape: ProgramShape) -> float:
    """FLOPs of matrix products of one forward pass, or of one search, over all chips."""
    width, heads = config.emb_dim, config.num_heads * config.head_dim
    mlp = _mlp(config)
    read = shape.queries * shape.query_length
    # The first step of a search has one beam a query.
    steps = shape.target_length - 1 + 1 / shape.beams if shape.beams else shape.target_length
    written = shape.queries * shape.targets * steps
    cached = shape.target_length + shape.query_length
    decoder = written * (6 * width * heads + mlp + 2 * heads * cached) + read * 2 * width * heads
    logits = written * width * config.vocab_size
    encoder = encoder_flops(config, shape.queries, shape.query_length)
    layers = config.num_decoder_layers * decoder
    if config.prefix_adaptive_layers:
        block = 4 * width * heads + mlp + 2 * heads * shape.target_length
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


def tokens_together(shape: ProgramShape, shards: int) -> tuple[float, float]:
    """Tokens that are read and written together on one data shard."""
    queries = shape.queries / shards / shape.microbatches
    return queries * shape.query_length, queries * shape.targets * (
        1 if shape.beams else shape.target_length
    )


def temporary_bytes(
    config: T5Config, shape: ProgramShape, parts: int, tokens: tuple[float, float]
) -> float:
    """Bytes of activations, roughly: what each layer keeps, and three copies of the logits."""
    read, written = tokens
    element = 2 if config.dtype == "bfloat16" else 4
    width, heads = config.emb_dim, config.num_heads * config.head_dim / parts
    hidden = config.mlp_dim * len(config.mlp_activations) / parts
    scores = config.num_heads / parts
    logits = 3 * written * config.vocab_size / parts * 4
    if shape.beams:
        caches = config.num_decoder_layers + config.prefix_adaptive_layers
        cache = 2 * written * shape.target_length * heads * caches
        cross = 2 * read * heads * config.num_decoder_layers
        return element * (2 * cache + cross) + logits
    kept = {
        "full": (width, width),
        "minimal": (2 * width + 4 * heads + hidden, 4 * width + 6 * heads + hidden),
        "none": (
            6 * width + 5 * heads + 3 * hidden + 3 * scores * shape.query_length,
            9 * width + 8 * heads + 3 * hidden
            + 3 * scores * (shape.query_length + shape.target_length),
        ),
    }[config.remat]  # fmt: skip
    decoders = config.num_decoder_layers + config.prefix_adaptive_layers  # the latter keep less
    layers = config.num_encoder_layers * read * kept[0] + decoders * written * kept[1]
    return element * layers + logits


def moved_bytes(config: T5Config, program: Program, temporaries: float, passes: int) -> float:
    """Bytes of memory read and written, at least: parameters in every pass or step of a search, the
    optimizer, and temporaries once each way (of a search for every token, in whatever pass)."""
    parameters = program.parts["parameters"]
    if program.shape.beams:
        half = 2 if config.dtype == "bfloat16" else 1
        return parameters / half * program.shape.steps + temporaries * program.shape.target_length
    update = 5 * parameters + 2 * program.parts["optimizer"]
    return passes * parameters * program.shape.microbatches + update + 2 * temporaries


def sent_bytes(
    config: T5Config,
    program: Program,
    axes: Mapping[str, int],
    tokens: tuple[float, float],
    passes: int,
) -> dict[str, float]:
    read, written = tokens
    shape, training = program.shape, not program.shape.beams
    element = 2 if config.dtype == "bfloat16" else 4
    ring = lambda n: (n - 1) / n
    runs = shape.microbatches if training else 1
    steps = shape.target_length if shape.beams else 1
    adaptive = 2 * config.prefix_adaptive_layers + 2 if config.prefix_adaptive_layers else 0
    reductions = 3 * config.num_decoder_layers + adaptive
    layers = 2 * config.num_encoder_layers * read + reductions * written * steps
    each_way = {1: 1, 3: 2, 4: 3}[passes]
    reduced = each_way * layers * config.emb_dim * element * 2 * ring(axes["model"]) * runs
    gathered = scattered = 0.0
    if training:
        parameters = program.parts["parameters"]  # of one chip, cut over model and fsdp
        whole = parameters * axes["fsdp"]
        reduced += 2 * ring(axes["data"]) * parameters
        gathered = (passes - 1) * whole * ring(axes["fsdp"]) * runs
        scattered = whole * ring(axes["fsdp"])
    else:  # once a batch, see partitioning.on_batch_shards
        gathered = program.parts["parameters"] * (axes["fsdp"] - 1)
    sent = {"all-reduce": reduced, "all-gather": gathered, "reduce-scatter": scattered}
    return {kind: size for kind, size in sent.items() if size}
