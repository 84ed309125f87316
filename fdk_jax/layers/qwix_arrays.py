"""Weights of qwix: a `QArray` is a `QuantisedTensor` with whole numbers as levels; exact both ways."""

import math
from typing import Any

import jax.numpy as jnp
import numpy as np

from fdk_jax.format import codebooks, packing
from fdk_jax.format.dequantisation import spread
from fdk_jax.format.orientation import check_axes, from_matrix, to_matrix
from fdk_jax.format.quantised_tensor import QuantisedTensor

_BITS = {"int2": 2, "int4": 4, "int8": 8, "uint4": 4, "uint8": 8}


def from_qarray(array: Any, axes: str = "kn") -> QuantisedTensor:
    """A `qwix.QArray` as a packed weight: the same numbers.

    Args:
        array: int8, int4 or int2 values with a scale for each output, or each output and tile of K.
        axes: its orientation, see `QuantisedTensor`; one letter for each axis.

    Raises:
        ValueError: a zero point, another type, or scales that no group along K has.
    """
    check_axes(axes)
    if array.zero_point is not None:
        raise ValueError(
            "a QArray with a zero point has no codebook: quantise with absmax calibration"
        )
    name = jnp.dtype(array.qtype).name
    if name not in _BITS:
        raise ValueError(
            f"a QArray of {name} is no weight of 2, 4 or 8 bits: one of {tuple(_BITS)}"
        )
    if len(axes) != array.qvalue.ndim:
        raise ValueError(f"{axes=} must have a letter for each axis of {array.qvalue.shape}")
    bits = _BITS[name]
    low = 0 if name.startswith("u") else -(2 ** (bits - 1))
    shape, scale = array.qvalue.shape, array.scale
    tiles = [s // t for s, t in zip(shape, scale.shape, strict=True)]
    k_axes = [i for i, a in enumerate(axes) if a == "k"]
    in_features = math.prod(shape[i] for i in k_axes)
    tiled = [i for i in k_axes if scale.shape[i] > 1]
    group = tiles[k_axes[-1]] if tiled else in_features
    for axis, tile in enumerate(tiles):
        scale = jnp.repeat(scale, tile, axis=axis)
    codes = to_matrix(array.qvalue.astype(jnp.int32) - low, axes)[0].astype(jnp.uint8)
    rows = to_matrix(scale, axes)[0][..., ::group]
    levels = np.arange(2**bits, dtype=np.float32) + low
    lead = codes.shape[:-2]
    flat = codes.reshape(-1, in_features)
    packed = packing.pack(flat, bits)
    tensor = QuantisedTensor(
        packed.reshape(*codes.shape[:-1], packed.shape[-1]),
        rows,
        jnp.broadcast_to(jnp.asarray(levels), (*lead, levels.size)),
        bits,
        group,
        tuple(shape),
        axes,
        uniform=bool(codebooks.is_uniform(levels)),
    )
    tensor.validate()
    return tensor


def to_qarray(w: QuantisedTensor) -> Any:
    """A packed weight whose levels are whole multiples of one number as a `qwix.QArray`: the same numbers.

    Raises:
        ValueError: other levels, or groups that are no tiles of the last contracted axis.
    """
    import qwix

    shape, axes = w.orientation
    if w.stack_shape:
        raise ValueError(f"{w} is a stack: take one with vmap or indexing")
    w = w.to_layout("interchange")
    levels = np.unique(np.asarray(w.codebook, np.float32).reshape(-1))
    step = np.diff(levels).min() if levels.size > 1 else np.float32(1)
    whole = np.rint(np.asarray(w.codebook, np.float64) / step)
    if (
        not np.allclose(whole * step, np.asarray(w.codebook), rtol=1e-6, atol=0)
        or np.abs(whole).max() > 128
    ):
        raise ValueError(
            f"the levels {levels} are no whole multiples of {step}: a QArray holds integers"
        )
    k_axes = [i for i, a in enumerate(axes) if a == "k"]
    last = shape[k_axes[-1]]
    by_tile = w.group_size < w.in_features
    if by_tile and last % w.group_size:
        raise ValueError(f"groups of {w.group_size} are no tiles of an axis of {last}")
    codes = packing.unpack(w.packed.reshape(-1, w.packed.shape[-1]), w.bits, w.in_features)
    codes = codes.reshape(*w.packed.shape[:-1], w.in_features)
    table = jnp.asarray(whole, jnp.int32)
    table = table.reshape(*table.shape[:-1], *(1,) * (codes.ndim - table.ndim), table.shape[-1])
    table = jnp.broadcast_to(table, (*codes.shape[:-1], table.shape[-1]))
    values = jnp.take_along_axis(table, codes.astype(jnp.int32), axis=-1)
    narrow = w.bits == 4 and whole.min() >= -8 and whole.max() <= 7
    values = from_matrix(values, shape, axes).astype(jnp.int4 if narrow else jnp.int8)
    scales = w.scales * jnp.asarray(step, w.scales.dtype)
    repeats = w.group_size if by_tile else w.in_features
    scales = from_matrix(spread(scales, repeats, w.in_features), shape, axes)
    for axis in k_axes:
        tile = (
            min(w.group_size, last)
            if by_tile and axis == k_axes[-1]
            else 1
            if by_tile
            else shape[axis]
        )
        scales = jnp.take(scales, jnp.arange(0, shape[axis], tile), axis=axis)
    return qwix.QArray(values, scales)
