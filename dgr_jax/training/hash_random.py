"""Random bits by hashing, for dropout and first parameters: a few integer operations a number.

JAX's Threefry is made for simulations. A T5 draws masks in up to six places a layer, and a good
part of the time to compile a step on CPU went into these draws. A mask needs no more than bits that
look independent, depend on the key and the place alone, and are the same on every mesh: an integer
hash of the place and the key gives them.

    rng = hash_random.key(jax.random.fold_in(run_key, step))    # a key as jax.random and Flax take

The hash is a 32-bit mixer of the two-round form of Wellons (2018, "lowbias32"), with the constants
of lower bias that were found for it later.
"""

from __future__ import annotations

import math

import jax
import jax.extend.random
import jax.numpy as jnp

_ODD = 0x9E3779B9  # 2^32 / golden ratio: neighbouring numbers come to lie far apart


def key(rng: jax.Array) -> jax.Array:
    """A key [] of this generator from one of Threefry (typed, or uint32 [2])."""
    if jnp.issubdtype(rng.dtype, jax.dtypes.prng_key):
        rng = jax.random.key_data(rng)
    return jax.random.wrap_key_data(rng, impl=_IMPLEMENTATION)


def _mix(x: jax.Array) -> jax.Array:
    x = (x ^ (x >> 16)) * jnp.uint32(0x21F0AAAD)
    x = (x ^ (x >> 15)) * jnp.uint32(0xD35A2D97)
    return x ^ (x >> 15)


def _hash(words: jax.Array, numbers: jax.Array) -> jax.Array:
    """uint32 of the shape of `numbers`, which are uint32, from key words uint32 [2]."""
    return _mix(_mix(numbers * jnp.uint32(_ODD) ^ words[0]) + words[1])


def _seed(seed: jax.Array) -> jax.Array:
    zeros = jnp.zeros(2, jnp.uint32)
    return _children(zeros, jnp.asarray(seed).astype(jnp.uint32))


def _children(words: jax.Array, numbers: jax.Array) -> jax.Array:
    """Key words [..., 2] of the children with these numbers [...]."""
    first = _hash(words, numbers)
    return jnp.stack([first, _mix(first + words[1] + jnp.uint32(_ODD))], -1)


def _split(words: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    # Numbers of folded-in data are small as well: the top bit tells them apart.
    places = jax.lax.iota(jnp.uint32, math.prod(shape)) | jnp.uint32(1 << 31)
    return _children(words, places.reshape(shape))


def _fold_in(words: jax.Array, data: jax.Array | int) -> jax.Array:
    return _children(words, jnp.asarray(data).astype(jnp.uint32))


def _random_bits(words: jax.Array, bit_width: int, shape: tuple[int, ...]) -> jax.Array:
    if bit_width == 64:
        parts = _random_bits(words, 32, (2, *shape)).astype(jnp.uint64)
        return (parts[0] << 32) | parts[1]
    places = jnp.zeros(shape, jnp.uint32)
    stride = 1
    for axis in range(len(shape) - 1, -1, -1):  # of each axis: cut over devices, none is gathered
        places += jax.lax.broadcasted_iota(jnp.uint32, shape, axis) * jnp.uint32(stride % 2**32)
        stride *= shape[axis]
    bits = _hash(words, places)
    return bits if bit_width == 32 else (bits >> (32 - bit_width)).astype(f"uint{bit_width}")


_IMPLEMENTATION = jax.extend.random.define_prng_impl(
    key_shape=(2,),
    seed=_seed,
    split=_split,
    random_bits=_random_bits,
    fold_in=_fold_in,
    name="hash",
    tag="hash",
)
