"""Orders of bits and bytes: the only module that knows them.

Glossary (shapes without leading axes, which every function accepts):

    codes   uint8 [N, K]           one code a weight, below 2**bits
    packed  uint8 [N, ceil(K / E)] the interchange layout, E = 8 / bits codes a byte
    scales        [N, ceil(K / G)] one factor for G consecutive weights of a row

In the interchange layout the first element of a byte sits in its highest bits; a row's last byte is
padded with zero codes. The kernels' layouts below hold the same codes in an order that their hardware
reads well; each has an exact inverse and none is ever written to a file.
"""

import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

BITS = (1, 2, 4, 8)


def codes_per_byte(bits: int) -> int:
    """E = 8 / bits, after checking that `bits` is a supported width."""
    if bits not in BITS:
        raise ValueError(f"{bits=} is not supported; use one of {BITS}")
    return 8 // bits


def pack(codes: ArrayLike, bits: int) -> Array:
    """Packs codes into bytes, first element in the highest bits.

    Args:
        codes: uint8 [..., K], each below 2**bits (higher bits are dropped).
        bits: 1, 2, 4 or 8.

    Returns:
        uint8 [..., ceil(K / E)]; the last byte is padded with zero codes.
    """
    e = codes_per_byte(bits)
    codes = jnp.asarray(codes)
    if codes.dtype != jnp.uint8:
        raise TypeError(f"codes must be uint8, got {codes.dtype}; cast them with .astype(jnp.uint8)")
    if codes.ndim == 0:
        raise ValueError("codes must have at least one axis, got a scalar")
    k = codes.shape[-1]
    codes = jnp.pad(codes, [(0, 0)] * (codes.ndim - 1) + [(0, -k % e)])
    fields = codes.reshape(*codes.shape[:-1], -(-k // e), e) & jnp.uint8(2**bits - 1)
    packed = jnp.zeros(fields.shape[:-1], jnp.uint8)
    for i in range(e):
        packed |= fields[..., i] << jnp.uint8(8 - bits * (i + 1))
    return packed


def unpack(packed: ArrayLike, bits: int, k: int) -> Array:
    """The inverse of `pack`.

    Args:
        packed: uint8 [..., ceil(k / E)].
        bits: 1, 2, 4 or 8.
        k: number of codes in a row.

    Returns:
        uint8 [..., k].
    """
    e = codes_per_byte(bits)
    packed = jnp.asarray(packed)
    if packed.dtype != jnp.uint8:
        raise TypeError(f"packed must be uint8, got {packed.dtype}")
    if packed.ndim == 0 or packed.shape[-1] != -(-k // e):
        raise ValueError(f"{packed.shape=} does not hold rows of {k=} codes of {bits=}")
    fields = [
        (packed >> jnp.uint8(8 - bits * (i + 1))) & jnp.uint8(2**bits - 1) for i in range(e)
    ]
    return jnp.stack(fields, axis=-1).reshape(*packed.shape[:-1], -1)[..., :k]
