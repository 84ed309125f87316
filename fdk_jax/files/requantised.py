"""Weights whose format scale times codebook cannot hold, quantised anew."""

import numpy as np

from fdk_jax.files.bits import pack, unpack
from fdk_jax.files.contents import quantised_tensor
from fdk_jax.format.codebooks import NF4
from fdk_jax.format.quantised_tensor import QuantisedTensor

GROUP_SIZE = 32


def requantised(weight: np.ndarray, bits: int) -> QuantisedTensor:
    """Float32 [..., N, K] to the nearest of scale times codebook, groups of 32 weights, float32 scales.

    8 bits are integers from -127 to 127 times the largest magnitude / 127, 4 bits are NF4.
    """
    k = weight.shape[-1]
    padded = np.pad(weight, [(0, 0)] * (weight.ndim - 1) + [(0, -k % GROUP_SIZE)])
    groups = padded.reshape(*weight.shape[:-1], -1, GROUP_SIZE)
    largest = np.abs(groups).max(-1)
    if bits == 8:
        scales = largest / np.float32(127)
        values = np.arange(-128, 128, dtype=np.float32)
    else:
        scales, values = largest, np.asarray(NF4, np.float32)
    quotients = groups / np.where(scales > 0, scales, np.float32(1))[..., None]
    if bits == 8:
        codes = (np.rint(quotients).astype(np.int16) + 128).astype(np.uint8)
    else:
        # How many borders are below: a tenth of a search's time.
        codes = np.zeros(quotients.shape, np.uint8)
        for border in (values[1:] + values[:-1]) / 2:
            codes += quotients > border
    packed = pack(codes.reshape(*weight.shape[:-1], -1)[..., :k], bits)
    return quantised_tensor(packed, scales, values, bits=bits, group_size=GROUP_SIZE, in_features=k)


def relative_error(weight: np.ndarray, made: QuantisedTensor) -> float:
    """|weight - made| / |weight| in the 2-norm; 0 where both are zero.

    By numpy: several threads do this for as many shapes as a file has, and JAX would compile for each.
    """
    codes = unpack(np.asarray(made.packed), made.bits, lowest_first=False)[..., : weight.shape[-1]]
    values = np.asarray(made.codebook).reshape(-1, 2**made.bits)[0].astype(np.float32)
    scales = np.repeat(np.asarray(made.scales, np.float32), made.group_size, axis=-1)
    difference = values[codes]
    difference *= scales[..., : weight.shape[-1]]
    difference -= weight
    size, error = (np.sqrt(np.square(a).sum(dtype=np.float64)) for a in (weight, difference))
    return float(error / size) if size else float(error > 0)
