"""The portable backend: dequantise in jnp, then dot. The fallback, and what kernels are checked against."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from fdk_jax import packing
from fdk_jax.quantisation import from_matrix
from fdk_jax.quantised_tensor import QuantisedTensor


def lookup(codes: Array, codebook: Array) -> Array:
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


def dequantise_matrix(
    packed: Array,
    scales: Array,
    codebook: Array,
    *,
    bits: int,
    group_size: int,
    in_features: int,
    dtype: Any,
) -> Array:
    """[N, K] in `dtype` from arrays in the interchange layout."""
    codes = packing.unpack(packed, bits, in_features)
    # The codebook is rounded to the compute dtype first, as the format says.
    values = lookup(codes, codebook.astype(scales.dtype).astype(jnp.float32))
    repeats = max(1, min(group_size, in_features))  # a group may be far larger than K
    spread = jnp.repeat(scales.astype(jnp.float32), repeats, axis=-1)[:, :in_features]
    return (values * spread).astype(dtype)


def dequantise(w: QuantisedTensor, dtype: Any = None) -> Array:
    """A quantised tensor as a float array [..., *shape]; `dtype` defaults to that of its scales."""
    w = w.to_layout("interchange")
    dtype = w.dtype if dtype is None else jnp.dtype(dtype)

    def one(packed, scales, codebook):
        return dequantise_matrix(
            packed,
            scales,
            codebook,
            bits=w.bits,
            group_size=w.group_size,
            in_features=w.in_features,
            dtype=dtype,
        )

    for _ in w.batch_shape:
        one = jax.vmap(one)
    return from_matrix(one(w.packed, w.scales, w.codebook), w.shape, w.axes)


def matmul(
    x: Array,
    packed: Array,
    scales: Array,
    codebook: Array,
    *,
    bits: int,
    group_size: int,
    bias: Array | None = None,
    out_dtype: Any = None,
) -> Array:
    """X [M, K] times the transpose of the weight, accumulated in float32, plus bias [N].

    The weight, in the interchange layout, is dequantised to the dtype of x.
    """
    weight = dequantise_matrix(
        packed,
        scales,
        codebook,
        bits=bits,
        group_size=group_size,
        in_features=x.shape[-1],
        dtype=x.dtype,
    )
    y = dot(x, weight, contract=(1, 1))
    if bias is not None:
        y += bias.astype(jnp.float32)[None]
    return y.astype(x.dtype if out_dtype is None else out_dtype)


def transposed_matmul(
    g: Array,
    packed: Array,
    scales: Array,
    codebook: Array,
    *,
    bits: int,
    group_size: int,
    in_features: int,
    out_dtype: Any,
) -> Array:
    """G [M, N] times the weight [N, K]: the gradient with respect to x, [M, K]."""
    weight = dequantise_matrix(
        packed,
        scales,
        codebook,
        bits=bits,
        group_size=group_size,
        in_features=in_features,
        dtype=g.dtype,
    )
    return dot(g, weight, contract=(1, 0)).astype(out_dtype)


def dot(a: Array, b: Array, contract: tuple[int, int]) -> Array:
    """Contracts an axis of a matrix with one of another; float32 [M, N]."""
    precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return jax.lax.dot_general(
        a,
        b,
        (((contract[0],), (contract[1],)), ((), ())),
        precision=precision,
        preferred_element_type=jnp.float32,
    )
