"""Accelerators and how many of them are connected."""

from __future__ import annotations

import math
import os
import re
from dataclasses import dataclass
from typing import Any

import jax

GIB = 1 << 30


@dataclass(frozen=True)
class Chip:
    """What the maker says of one chip: bytes of memory, bfloat16 FLOP/s, bytes/s of memory, and
    bytes/s that it can send to others. far_network: bytes/s to chips outside of its host of `near`
    chips. tf32, fp32: FLOP/s of GPUs in these formats; TPUs have neither, and 0 here."""

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
        """Devices to compile for. Raises ImportError without libtpu, and ValueError for a grid
        that no TPU is made in."""
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
            grid = topologies.get_topology_desc(platform="tpu", topology_name=str(self), **options)
        except jax.errors.JaxRuntimeError as error:
            raise ValueError(f"--topology={self}: {error}") from error
        return list(grid.devices)


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
