"""The portable backend: dequantise in jnp, then dot. The fallback, and what kernels are checked against."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from fdk_jax.format import packing
from fdk_jax.format.dequantisation import dequantise_matrix, lookup, round_to, spread


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


def weight_gradients(
    x: Array,
    g: Array,
    packed: Array,
    scales: Array,
    codebook: Array,
    *,
    bits: int,
    group_size: int,
    in_features: int,
) -> tuple[Array, Array]:
    """Gradients with respect to scales [N, ceil(K / G)] and codebook, given X [M, K] and G [M, N].

    The codes are constants. A codebook entry that no code names has gradient 0.
    """
    dense = dot(
        g.astype(jnp.float32), x.astype(jnp.float32), contract=(0, 0)
    )  # of the weight: [N, K]
    codes = packing.unpack(packed, bits, in_features)
    values = lookup(codes, round_to(codebook, scales.dtype))
    groups = scales.shape[-1]
    group = jnp.arange(in_features) // group_size
    dscales = jax.ops.segment_sum((dense * values).T, group, groups).T
    rows = codebook.reshape(-1, codebook.shape[-1])
    block = jnp.arange(codes.shape[0]) // (codes.shape[0] // rows.shape[0])
    entry = block[:, None] * rows.shape[1] + codes.astype(jnp.int32)
    terms = dense * spread(scales.astype(jnp.float32), group_size, in_features)
    dcodebook = jax.ops.segment_sum(terms.reshape(-1), entry.reshape(-1), rows.size)
    return dscales.astype(scales.dtype), dcodebook.reshape(codebook.shape).astype(codebook.dtype)


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
