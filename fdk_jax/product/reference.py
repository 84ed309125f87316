"""The portable backend: dequantise in jnp, then dot. The fallback, and what kernels are checked against."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from fdk_jax.format.dequantisation import dequantise_matrix


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
