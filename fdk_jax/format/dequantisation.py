"""Weights from codes, scales and a codebook, in jnp."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from jax import Array

from fdk_jax.format import packing

if TYPE_CHECKING:
    from jaxtyping import Float, Float32, UInt8


def lookup(codes: UInt8[Array, "N K"], codebook: Float[Array, "*C values"]) -> Float[Array, "N K"]:
    """codebook[codes] for codes [N, K] and a codebook [2**bits] or [C, 2**bits] (row blocks)."""
    rows = codebook.reshape(-1, codebook.shape[-1])
    blocks = codes.reshape(rows.shape[0], codes.size // rows.shape[0])
    if rows.shape[-1] > 16:
        return jnp.take_along_axis(rows, blocks.astype(jnp.int32), axis=-1).reshape(codes.shape)
    # A tree of selects on the bits of the code: no gather, which is slow on every platform.
    levels = [rows[:, i : i + 1] for i in range(rows.shape[-1])]
    bit = jnp.uint8(1)
    while len(levels) > 1:
        chosen = (blocks & bit) != 0
        levels = [
            jnp.where(chosen, high, low)
            for low, high in zip(levels[0::2], levels[1::2], strict=True)
        ]
        bit = bit << jnp.uint8(1)
    return levels[0].reshape(codes.shape)


def spread(
    scales: Float[Array, "*B groups"], group_size: int, in_features: int
) -> Float[Array, "*B K"]:
    """The scale of each weight, [..., K], from scales [..., ceil(K / G)]; a group may be far larger than K."""
    repeats = max(1, min(group_size, in_features))
    return jnp.repeat(scales, repeats, axis=-1)[..., :in_features]


def round_to(x: Float[Array, ...], dtype: Any) -> Float32[Array, ...]:
    """Values in float32 on the grid of `dtype`, to the bit as numpy rounds, small numbers and infinities too.

    Without the barrier XLA leaves a pair of casts out where it may be more exact than it was asked to be, as on
    GPUs: an error of all weights alike, which the kernels do not have. `lax.reduce_precision` has no numbers
    below the smallest normal one.
    """
    x = x.astype(jnp.float32)
    if dtype == jnp.float32:
        return x
    return jax.lax.optimization_barrier(x.astype(dtype)).astype(jnp.float32)


def dequantise_matrix(
    packed: UInt8[Array, "N bytes"],
    scales: Float[Array, "N groups"],
    codebook: Float[Array, "*C values"],
    *,
    bits: int,
    group_size: int,
    in_features: int,
    dtype: Any,
) -> Float[Array, "N K"]:
    """[N, K] in `dtype` from arrays in the interchange layout."""
    codes = packing.unpack(packed, bits, in_features)
    values = lookup(codes, round_to(codebook, scales.dtype))
    return (values * spread(scales.astype(jnp.float32), group_size, in_features)).astype(dtype)
