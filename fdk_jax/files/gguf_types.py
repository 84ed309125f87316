"""Blocks of GGUF's tensor types as codes, scales and a codebook.

Layouts from ggml (`ggml-common.h`, `ggml-quants.c`, MIT licence), Q2_0 and PQ2_0 from llama.cpp and its fork of
PrismML. A function takes the blocks of rows, uint8 [..., N, blocks, bytes], and returns
(packed [..., N, blocks, bytes of codes], scales [..., N, blocks, groups a block]).
"""

import dataclasses
from collections.abc import Callable

import numpy as np

from fdk_jax.files import small_floats
from fdk_jax.files.bits import pack, turn
from fdk_jax.files.contents import quantised_tensor
from fdk_jax.format.host_arrays import scratch

Parts = tuple[np.ndarray, np.ndarray]

_DECODED_BYTES = 1 << 18  # of a file's that are decoded at a time, so that they stay in a cache
_IQ4_NL = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)


@dataclasses.dataclass(frozen=True)
class BlockType:
    """A tensor type that scale times codebook holds exactly.

    Attributes:
        name: GGUF's.
        weights: a block.
        size: bytes a block.
        bits: of a code here.
        group_size: weights a scale.
        values: the codebook.
        decode: see the module.
    """

    name: str
    weights: int
    size: int
    bits: int
    group_size: int
    values: tuple[float, ...]
    decode: Callable[[np.ndarray], Parts]

    def tensor(self, rows: np.ndarray, in_features: int, factor: np.float32 | None = None):
        """The `QuantisedTensor` of rows of bytes [..., N, bytes], times a factor of the whole tensor."""
        packed, scales = self._parts(rows.reshape(-1, rows.shape[-1]), in_features)
        if factor is not None:
            scales = scales.astype(np.float32) * factor
        return quantised_tensor(
            packed.reshape(*rows.shape[:-1], -1),
            scales.reshape(*rows.shape[:-1], -1),
            self.values,
            bits=self.bits,
            group_size=self.group_size,
            in_features=in_features,
        )

    def _parts(self, rows: np.ndarray, in_features: int) -> Parts:
        """Codes and scales of rows [N, bytes], a block of rows at a time: decoding holds copies of its own."""
        step = max(1, _DECODED_BYTES // rows.shape[-1])
        parts: list[np.ndarray] = []
        for begin in range(0, len(rows), step):
            some = rows[begin : begin + step]
            blocks = some.reshape(len(some), in_features // self.weights, self.size)
            decoded = [part.reshape(len(some), -1) for part in self.decode(blocks)]
            if not parts:
                parts = [np.empty((len(rows), d.shape[1]), d.dtype) for d in decoded]
            for whole, part in zip(parts, decoded, strict=True):
                whole[begin : begin + step] = part
        codes, scales = parts
        return codes, scales


def _half(bytes_: np.ndarray) -> np.ndarray:
    """Float16 [..., n] of bytes [..., 2 n]."""
    return np.ascontiguousarray(bytes_).view(np.float16)


def _halves_of_block(codes: np.ndarray) -> np.ndarray:
    """Nibbles of which byte j holds elements j (low) and half a block further, in the interchange layout.

    Two bytes make one of the low nibbles and one of the high ones, in the low half of a word of 16 bits.
    """
    out, half = np.empty(codes.shape, np.uint8), codes.shape[-1] // 2
    pairs, ours, other, cut = scratch(4 * codes.size).reshape(4, -1)
    whole = f"V{codes.shape[-1]}"  # a block at a time, which is far faster than byte by byte
    np.copyto(pairs.view(whole).reshape(codes.shape[:-1]), codes.view(whole)[..., 0])
    pairs, ours, other = (a.view(np.uint16) for a in (pairs, ours, other))
    cut, halves = cut[: pairs.size], out.view(f"u{half}")
    for at, nibbles, up, down in ((0, 0x0F0F, 4, 8), (1, 0xF0F0, 0, 12)):
        np.bitwise_and(pairs, np.uint16(nibbles), out=ours)
        np.right_shift(ours, np.uint16(down), out=other)
        np.left_shift(ours, np.uint16(up), out=ours)
        np.bitwise_or(ours, other, out=ours)
        np.copyto(cut, ours, casting="unsafe")  # without what is above the two nibbles
        halves[..., at] = cut.view(f"u{half}").reshape(halves.shape[:-1])
    return out


def _nibbles(blocks: np.ndarray) -> Parts:
    return _halves_of_block(blocks[..., 2:]), _half(blocks[..., :2])


def _in_order(bits: int) -> Callable[[np.ndarray], Parts]:
    """A float16 scale, then codes in order, lowest first."""
    return lambda blocks: (turn(blocks[..., 2:].copy(), bits), _half(blocks[..., :2]))


def _q8_0(blocks: np.ndarray) -> Parts:
    return blocks[..., 2:] ^ np.uint8(0x80), _half(blocks[..., :2])


def _tq1_0(blocks: np.ndarray) -> Parts:
    """Five base-3 digits a byte: 32 bytes for 160 elements, 16 for 80, then 4 of four digits for 16."""
    powers = np.asarray([1, 3, 9, 27, 81], np.uint8)
    parts = []
    for begin, end, digits in ((0, 32, 5), (32, 48, 5), (48, 52, 4)):
        # The digits of a byte are elements that lie as far apart as there are bytes.
        some = blocks[..., None, begin:end] * powers[:digits, None]
        parts.append(((some.astype(np.uint16) * 3) >> 8).astype(np.uint8))
    codes = np.concatenate([p.reshape(*p.shape[:-2], -1) for p in parts], axis=-1)
    return pack(codes, 2), _half(blocks[..., 52:])


def _tq2_0(blocks: np.ndarray) -> Parts:
    runs = blocks[..., :64].reshape(*blocks.shape[:-1], 2, 1, 32)
    shifts = np.asarray([0, 2, 4, 6], np.uint8)[:, None]
    codes = (runs >> shifts) & np.uint8(3)
    codes = codes.reshape(*blocks.shape[:-1], 256)
    return pack(codes, 2), _half(blocks[..., 64:])


def _mxfp4(blocks: np.ndarray) -> Parts:
    codes = small_floats.ascending_e2m1(_halves_of_block(blocks[..., 1:]))
    return codes, small_floats.e8m0(blocks[..., :1])


def _nvfp4(blocks: np.ndarray) -> Parts:
    """Four scales without a sign, then for each 8 bytes: low nibbles are elements 0 to 7, high ones 8 to 15."""
    codes = blocks[..., 4:].reshape(*blocks.shape[:-1], 4, 8)
    packed = small_floats.ascending_e2m1(_halves_of_block(codes))
    raw = np.ascontiguousarray(blocks[..., :4])
    scales = small_floats.e4m3(raw & np.uint8(0x7F))
    # As ggml reads what would be NaN.
    scales = np.where(np.isnan(scales), np.where(raw == 0x7F, 0, 480), scales).astype(np.float32)
    return packed.reshape(*blocks.shape[:-1], 32), scales


def _iq4_xs(blocks: np.ndarray) -> Parts:
    """A float16 scale, eight 6-bit factors (high bits in 16, low ones in 4 bytes), then runs as IQ4_NL's."""
    lead = blocks.shape[:-1]
    high = np.ascontiguousarray(blocks[..., 2:4]).view(np.uint16)
    high = (high >> np.arange(0, 16, 2, dtype=np.uint16)).astype(np.uint8) & np.uint8(3)
    low = blocks[..., 4:8, None] >> np.asarray([0, 4], np.uint8)
    low = low.reshape(*lead, 8) & np.uint8(15)
    factors = (low | (high << np.uint8(4))).astype(np.float32) - 32
    codes = blocks[..., 8:].reshape(*lead, 8, 16)
    scales = _half(blocks[..., :2]).astype(np.float32) * factors
    return _halves_of_block(codes).reshape(*lead, 128), scales


def _q5_0(blocks: np.ndarray) -> Parts:
    low = blocks[..., 6:]
    low = np.concatenate([low & np.uint8(15), low >> np.uint8(4)], axis=-1)
    high = np.unpackbits(blocks[..., 2:6], axis=-1, bitorder="little")
    return low | (high << np.uint8(4)), _half(blocks[..., :2])


def _q6_k(blocks: np.ndarray) -> Parts:
    lead = blocks.shape[:-1]
    low = blocks[..., :128].reshape(*lead, 2, 1, 64) >> np.asarray([0, 4], np.uint8)[:, None]
    high = blocks[..., 128:192].reshape(*lead, 2, 1, 32)
    high = (high >> np.asarray([0, 2, 4, 6], np.uint8)[:, None]) & np.uint8(3)
    codes = (low & np.uint8(15)).reshape(*lead, 256) | (high << np.uint8(4)).reshape(*lead, 256)
    factors = np.ascontiguousarray(blocks[..., 192:208]).view(np.int8).astype(np.float32)
    return codes, _half(blocks[..., 208:]).astype(np.float32) * factors


def _integers(bits: int, zero: int) -> tuple[float, ...]:
    return tuple(float(i - zero) for i in range(2**bits))


_E2M1 = tuple(float(v) for v in small_floats.E2M1)
# By the number of the type in a file.
EXACT = {
    2: BlockType("Q4_0", 32, 18, 4, 32, _integers(4, 8), _nibbles),
    8: BlockType("Q8_0", 32, 34, 8, 32, _integers(8, 128), _q8_0),
    20: BlockType("IQ4_NL", 32, 18, 4, 32, _IQ4_NL, _nibbles),
    23: BlockType("IQ4_XS", 256, 136, 4, 32, _IQ4_NL, _iq4_xs),
    34: BlockType("TQ1_0", 256, 54, 2, 256, (-1.0, 0.0, 1.0), _tq1_0),
    35: BlockType("TQ2_0", 256, 66, 2, 256, _integers(2, 1), _tq2_0),
    39: BlockType("MXFP4", 32, 17, 4, 32, _E2M1, _mxfp4),
    40: BlockType("NVFP4", 64, 36, 4, 16, _E2M1, _nvfp4),
    41: BlockType("Q1_0", 128, 18, 1, 128, (-1.0, 1.0), _in_order(1)),
    42: BlockType("Q2_0", 64, 18, 2, 64, _integers(2, 1), _in_order(2)),
    142: BlockType("PQ2_0", 128, 34, 2, 128, _integers(2, 1), _in_order(2)),
}
# An earlier type of the same number and other blocks, which the size of a tensor tells apart.
OLDER_Q2_0 = dataclasses.replace(EXACT[142], name="Q2_0 of 128 weights")
FLOATS = {0: ("F32", 4), 1: ("F16", 2), 28: ("F64", 8), 30: ("BF16", 2)}
# More bits than there are in the file, but no other values: read where `requantise` allows 8 bits.
WIDENED = {
    6: BlockType("Q5_0", 32, 22, 8, 32, _integers(5, 16), _q5_0),
    14: BlockType("Q6_K", 256, 210, 8, 16, _integers(6, 32), _q6_k),
}
# Types that only their values describe: (name, weights a block, bytes a block).
OTHERS = {
    3: ("Q4_1", 32, 20),
    7: ("Q5_1", 32, 24),
    10: ("Q2_K", 256, 84),
    11: ("Q3_K", 256, 110),
    12: ("Q4_K", 256, 144),
    13: ("Q5_K", 256, 176),
    16: ("IQ2_XXS", 256, 66),
    17: ("IQ2_XS", 256, 74),
    18: ("IQ3_XXS", 256, 98),
    19: ("IQ1_S", 256, 50),
    21: ("IQ3_S", 256, 110),
    22: ("IQ2_S", 256, 82),
    29: ("IQ1_M", 256, 56),
}


def block_of(number: int) -> tuple[str, int, int] | None:
    """(name, weights a block, bytes a block) of a type that is not of floats; None for an unknown one."""
    if number in OTHERS:
        return OTHERS[number]
    known = EXACT.get(number) or WIDENED.get(number)
    return None if known is None else (known.name, known.weights, known.size)


def dequantised(number: int, rows: np.ndarray) -> np.ndarray:
    """Float32 [..., N, K] of rows of bytes of a type in `OTHERS` or `WIDENED`, by the `gguf` package.

    Raises:
        ImportError: the package is missing.
    """
    try:
        import gguf
    except ImportError as error:
        raise ImportError(
            "requantising needs the gguf package: pip install fdk-jax[models]"
        ) from error
    kind = gguf.GGMLQuantizationType(number)
    return np.asarray(gguf.quants.dequantize(rows, kind), np.float32)
