"""Quantised matrices in a form that several of them share, without a change of any value."""

import dataclasses
import math
from collections.abc import Sequence

import numpy as np

from fdk_jax.files.bits import pack, unpack
from fdk_jax.format.quantised_tensor import QuantisedTensor


def alike(parts: Sequence[QuantisedTensor]) -> list[QuantisedTensor]:
    """Matrices [n_i, K] in the interchange layout with one width, group size and dtype of scales.

    Codes become as wide as the widest, groups as small as their greatest common divisor, scales of different
    dtypes float32.
    """
    bits = max(part.bits for part in parts)
    group_size = math.gcd(*(part.group_size for part in parts))
    dtypes = {np.dtype(part.scales.dtype) for part in parts}
    dtype = dtypes.pop() if len(dtypes) == 1 else np.dtype(np.float32)
    return [_widened(part, bits, group_size, dtype) for part in parts]


def _widened(w: QuantisedTensor, bits: int, group_size: int, dtype: np.dtype) -> QuantisedTensor:
    packed, scales, codebook, uniform = w.packed, w.scales, w.codebook, w.uniform
    if w.bits != bits:
        codes = unpack(np.asarray(packed), w.bits, lowest_first=False)[..., : w.in_features]
        packed = pack(codes, bits)
        more = [(0, 0)] * (codebook.ndim - 1) + [(0, 2**bits - 2**w.bits)]
        codebook, uniform = np.pad(np.asarray(codebook), more, mode="edge"), False
    if w.group_size != group_size:
        groups = -(-w.in_features // group_size)
        scales = np.repeat(np.asarray(scales), w.group_size // group_size, axis=-1)[..., :groups]
    if scales.dtype != dtype:
        scales = np.asarray(scales).astype(dtype)
    return dataclasses.replace(
        w,
        packed=packed,
        scales=scales,
        codebook=codebook,
        bits=bits,
        group_size=group_size,
        uniform=uniform,
    )
