"""Rows of a quantised table, such as an embedding."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from fdk_jax.format import packing
from fdk_jax.format.array_like import wide_indices
from fdk_jax.format.dequantisation import dequantise_matrix
from fdk_jax.format.quantised_tensor import QuantisedTensor


def take_rows(w: QuantisedTensor, index: Array, dtype: Any) -> Array:
    """Rows of a quantised matrix, dequantised: only the tiles that hold them are read.

    Args:
        w: [N, K], axes "nk", of any layout.
        index: int [...]; out of range means the nearest row.
        dtype: of the result.

    Returns:
        [..., K].
    """
    n, k = w.shape
    rows = jnp.clip(wide_indices(index).reshape(-1), 0, n - 1)
    # Every layout but the interchange one has tiles of rows as its first axis.
    per_tile = 1 if w.layout == "interchange" else packing.TILE_ROWS
    packed = w.packed[rows // per_tile, None]
    scales = _take_scales(w.scales, rows // per_tile)[:, None]
    packed, scales = packing.convert(
        packed,
        scales,
        w.layout,
        "interchange",
        bits=w.bits,
        group_size=w.group_size,
        out_features=per_tile,
        in_features=k,
    )
    within = (rows % per_tile)[:, None, None]
    packed, scales = (jnp.take_along_axis(a, within, axis=1)[:, 0] for a in (packed, scales))
    codebook = w.codebook
    if codebook.ndim == 2:
        codebook = codebook[rows // (n // codebook.shape[0])]
    values = dequantise_matrix(
        packed,
        scales,
        codebook,
        bits=w.bits,
        group_size=w.group_size,
        in_features=k,
        dtype=dtype,
    )
    return values.reshape(*index.shape, k)


def _take_scales(scales: Array, index: Array) -> Array:
    """scales[index]; narrow floats as integers, for XLA on CPUs would widen all of them first."""
    if scales.dtype.itemsize != 2:
        return scales[index]
    words = jax.lax.bitcast_convert_type(scales, jnp.uint16)[index]
    return jax.lax.bitcast_convert_type(words, scales.dtype)
