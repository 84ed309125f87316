"""Integer codes with zero points: (q - zero) * scale as scale * codebook[code]."""

import numpy as np

from fdk_jax.files.bits import pack
from fdk_jax.files.contents import quantised_tensor
from fdk_jax.format.quantised_tensor import QuantisedTensor


def with_zeros(
    codes: np.ndarray, zeros: np.ndarray, scales: np.ndarray, *, bits: int, group_size: int
) -> QuantisedTensor:
    """A weight of integer codes whose groups have zero points.

        w[n, k] = (codes[n, k] - zeros[n, k // G]) * scales[n, k // G]

    One zero for all groups is a codebook of `bits` bits. Several make it wider: differences of 4-bit numbers
    take 31 values, which are codes of 8 bits.

    Args:
        codes: uint8 [N, K].
        zeros: integers [N, ceil(K / G)], or one number.
        scales: [N, ceil(K / G)].
        bits: of the codes, 1, 2, 4 or 8.
        group_size: G.

    Raises:
        ValueError: different zeros with codes of 8 bits, which no codebook holds.
    """
    k = codes.shape[1]
    zeros = np.asarray(zeros, np.int32)
    first = int(zeros.flat[0])
    if (zeros == first).all():
        values = np.arange(2**bits, dtype=np.float32) - first
        return _tensor(codes, scales, values, bits, group_size)
    if bits == 8:
        raise ValueError("zero points that differ between groups of 8-bit codes do not fit 8 bits")
    wide = 4 if bits <= 2 else 8
    spread = np.repeat(zeros, group_size, axis=-1)[:, :k]
    differences = codes.astype(np.int32) - spread + 2 ** (wide - 1)
    if differences.min() < 0 or differences.max() >= 2**wide:
        raise ValueError(f"zero points from {zeros.min()} to {zeros.max()} do not fit {bits} bits")
    values = np.arange(2**wide, dtype=np.float32) - 2 ** (wide - 1)
    return _tensor(differences.astype(np.uint8), scales, values, wide, group_size)


def _tensor(codes, scales, values, bits, group_size) -> QuantisedTensor:
    return quantised_tensor(
        pack(codes, bits),
        scales,
        values,
        bits=bits,
        group_size=group_size,
        in_features=codes.shape[1],
    )
