"""Orders of codes in other programs' bytes, turned into that of the interchange layout; numpy only.

E = 8 / bits codes share a byte. Ours has the first code in the highest bits, most others in the lowest.
"""

import numpy as np

from fdk_jax.format.host_arrays import scratch
from fdk_jax.format.packing import codes_per_byte

WIDTHS = (1, 2, 4, 8)  # of codes that share bytes evenly, which is all that these functions take


def turned(packed: np.ndarray, bits: int) -> np.ndarray:
    """Bytes uint8 of any shape with the order of their codes reversed: lowest first to highest first."""
    codes_per_byte(bits)
    if bits < 8:
        packed = (packed << np.uint8(4)) | (packed >> np.uint8(4))
    if bits < 4:
        packed = ((packed & np.uint8(0x33)) << np.uint8(2)) | (
            (packed >> np.uint8(2)) & np.uint8(0x33)
        )
    if bits < 2:
        packed = ((packed & np.uint8(0x55)) << np.uint8(1)) | (
            (packed >> np.uint8(1)) & np.uint8(0x55)
        )
    return packed


def turn(packed: np.ndarray, bits: int) -> np.ndarray:
    """`turned` in place, of bytes that lie together: ten times as fast, since it touches no new memory."""
    codes_per_byte(bits)
    flat = packed.reshape(-1)
    words = flat.view(np.uint64 if flat.size % 8 == 0 else np.uint8)
    other = scratch(flat.size).view(words.dtype)
    for shift, mask in ((4, 0x0F), (2, 0x33), (1, 0x55)):
        if bits > shift:
            break
        by = words.dtype.type(shift)
        low = np.full(words.itemsize, mask, np.uint8).view(words.dtype)[0]
        np.right_shift(words, by, out=other)
        np.bitwise_and(other, low, out=other)
        np.bitwise_and(words, low, out=words)
        np.left_shift(words, by, out=words)
        np.bitwise_or(words, other, out=words)
    return packed


def pack(codes: np.ndarray, bits: int) -> np.ndarray:
    """uint8 [..., ceil(K / E)] from codes uint8 [..., K], first code in the highest bits."""
    e = codes_per_byte(bits)
    if codes.shape[-1] % e:
        pads = [(0, 0)] * (codes.ndim - 1) + [(0, -codes.shape[-1] % e)]
        codes = np.pad(codes, pads)
    packed = codes[..., 0::e] << np.uint8(8 - bits)
    for i in range(1, e):
        packed |= codes[..., i::e] << np.uint8(8 - bits * (i + 1))
    return packed


def unpack(packed: np.ndarray, bits: int, *, lowest_first: bool = True) -> np.ndarray:
    """Codes uint8 [..., E * bytes] of bytes uint8 [..., bytes]."""
    e, mask = codes_per_byte(bits), np.uint8(2**bits - 1)
    codes = np.empty((*packed.shape, e), np.uint8)
    for i in range(e):
        shift = bits * (i if lowest_first else e - 1 - i)
        np.bitwise_and(packed >> np.uint8(shift), mask, out=codes[..., i])
    return codes.reshape(*packed.shape[:-1], packed.shape[-1] * e)


def recoded(packed: np.ndarray, codes: np.ndarray, bits: int) -> np.ndarray:
    """Bytes in which each code c has become codes[c].

    Args:
        packed: uint8 of any shape.
        codes: uint8 [2**bits].
        bits: 1, 2, 4 or 8.
    """
    table = np.arange(256, dtype=np.uint8)[:, None]
    table = pack(codes[unpack(table, bits, lowest_first=False)], bits)[:, 0]
    return table[packed]


def sorted_values(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(ascending values, new code of each old one) of a codebook float32 [2**bits] in any order."""
    order = np.argsort(values, kind="stable")
    codes = np.empty(len(values), np.uint8)
    codes[order] = np.arange(len(values), dtype=np.uint8)
    # Minus zero and zero are one value; a codebook has zero without a sign.
    return values[order] + np.float32(0), codes
