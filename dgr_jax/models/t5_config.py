"""The settings of a T5."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import jax

from dgr_jax import ranges

# What a layer keeps of its forward pass for the backward pass, by T5Config.remat (t5x's names):
# everything; the products of activations and kernels, but not those of attention; only its input.
REMAT = {
    "none": None,
    "minimal": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "full": jax.checkpoint_policies.nothing_saveable,
}
MOST_LAYERS = 1000  # of a stack: more could not be compiled


@dataclass(frozen=True)
class T5Config:
    """Sizes and switches of a T5. Parameters are float32; `dtype` is that of the activations.

    vocab_size: 0 takes the size of the experiment's vocabulary (text pieces and docid codes).
    remat: what a layer computes again in the backward pass, 'none', 'minimal' or 'full'; see REMAT.
    scan_layers: True compiles one layer and runs it for all; the parameters of a stack are then
      arrays with an axis of layers, as in t5x's scanned checkpoints. See `stacking`.
    prefix_adaptive_layers: how many layers the decoder has that adapts the output weights to the
      prefix, see `prefix_adaptation` (4 in the published model); 0 leaves the weights of a T5.
    decoder_query_tokens: so many tokens of the query, its first, the decoder reads before it writes
      an identifier; 0: none. They need no parameters of their own, see `Transformer.read`.
    """

    vocab_size: int = 0
    emb_dim: int = 512
    num_heads: int = 6
    head_dim: int = 64
    mlp_dim: int = 1024
    num_encoder_layers: int = 8
    num_decoder_layers: int = 8
    mlp_activations: tuple[str, ...] = ("gelu", "linear")
    dropout_rate: float = 0.1
    logits_via_embedding: bool = False
    relpos_buckets: int = 32
    relpos_max_distance: int = 128
    dtype: str = "float32"
    remat: str = dataclasses.field(default="none", metadata={"fingerprint": False})
    scan_layers: bool = False
    prefix_adaptive_layers: int = dataclasses.field(
        default=0, metadata={"fingerprint": "unless default"}
    )
    decoder_query_tokens: int = dataclasses.field(
        default=0, metadata={"fingerprint": "unless default"}
    )

    def __post_init__(self) -> None:
        if self.remat not in REMAT:
            raise ValueError(f"T5Config.remat: got {self.remat!r}, expected one of {list(REMAT)}")
        if self.dtype not in ("float32", "bfloat16"):
            raise ValueError(
                f"T5Config.dtype: got {self.dtype!r}, expected 'float32' or 'bfloat16'"
            )
        sizes = ("emb_dim", "num_heads", "head_dim", "mlp_dim")
        layers = ("num_encoder_layers", "prefix_adaptive_layers")
        ranges.check(
            self,
            **dict.fromkeys(sizes, ranges.at_least(1)),
            **dict.fromkeys(layers, ranges.between(0, MOST_LAYERS)),
            num_decoder_layers=ranges.between(1, MOST_LAYERS),
            vocab_size=ranges.tokens(0),
            decoder_query_tokens=ranges.at_least(0),
            dropout_rate=ranges.from_to_below(0, 1),
            relpos_buckets=ranges.at_least(4),  # both directions need a bucket for exact distances
            relpos_max_distance=ranges.above(self.relpos_buckets / 2),
        )
        object.__setattr__(self, "mlp_activations", tuple(self.mlp_activations))
        if self.prefix_adaptive_layers and self.decoder_query_tokens:
            raise ValueError(
                f"T5Config.decoder_query_tokens: got {self.decoder_query_tokens} with "
                f"T5Config.prefix_adaptive_layers={self.prefix_adaptive_layers}, expected 0: these "
                "layers read the prefix of the identifier alone"
            )
