"""Orders of bits and bytes: the only module that knows them.

Glossary (shapes without leading axes, which every function accepts):

    codes   uint8 [N, K]           one code a weight, below 2**bits
    packed  uint8 [N, ceil(K / E)] the interchange layout, E = 8 / bits codes a byte
    scales        [N, ceil(K / G)] one factor for G consecutive weights of a row

In the interchange layout the first element of a byte sits in its highest bits; a row's last byte is
padded with zero codes. The kernels' layouts below hold the same codes in an order that their hardware
reads well; each has an exact inverse and none is ever written to a file.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
from jax import Array
from jax.core import Tracer
from jax.typing import ArrayLike

if TYPE_CHECKING:
    from jaxtyping import Float, UInt, UInt8, UInt16

BITS = (1, 2, 4, 8)
# Outside of a trace a conversion is one program, where each of its steps would be one for every new shape; in a
# trace it is inlined.
_one_program = functools.partial(jax.jit, inline=True)
_SPEC = ("bits", "group_size", "out_features", "in_features")


def check_bits(bits: int) -> None:
    """Raises ValueError for a width of codes that there is not."""
    if type(bits) is not int or bits not in BITS:  # 4.0 == 4, but no shape takes it
        raise ValueError(f"{bits=} is not supported; use one of {BITS}")


def codes_per_byte(bits: int) -> int:
    """E = 8 / bits, for what takes bytes apart: refuses a width whose codes do not share bytes evenly."""
    check_bits(bits)
    if 8 % bits:
        raise ValueError(
            f"codes of {bits} bits do not divide a byte, as this code takes them to;"
            " docs/gpu/changing.md says what such a width needs"
        )
    return 8 // bits


def row_bytes(bits: int, k: int) -> int:
    """Bytes of a row of k codes in the interchange layout."""
    check_bits(bits)
    return -(-k * bits // 8)


def check_widths(bits: int, group_size: int) -> None:
    """Raises ValueError for a width of codes or of groups that is not supported."""
    check_bits(bits)
    if type(group_size) is not int or group_size < 1:
        raise ValueError(f"group_size must be a positive integer, got {group_size!r}")


def pack(codes: UInt8[ArrayLike, "*B K"], bits: int) -> UInt8[Array, "*B bytes"]:
    """Packs codes into bytes, first element in the highest bits.

    Args:
        codes: uint8 [..., K], each below 2**bits.
        bits: 1, 2, 4 or 8.

    Returns:
        uint8 [..., ceil(K / E)]; the last byte is padded with zero codes.

    Raises:
        TypeError: the codes are not uint8.
        ValueError: a code does not fit (checked outside jit; inside, its higher bits are dropped).
    """
    check_bits(bits)
    codes = jnp.asarray(codes)
    if codes.dtype != jnp.uint8:
        raise TypeError(
            f"codes must be uint8, got {codes.dtype}; cast them with .astype(jnp.uint8)"
        )
    if codes.ndim == 0:
        raise ValueError("codes must have at least one axis, got a scalar")
    if not isinstance(codes, Tracer) and codes.size and int(codes.max()) >= 2**bits:
        raise ValueError(f"code {int(codes.max())} does not fit into {bits=}")
    return _packed(codes, bits)


@functools.partial(_one_program, static_argnames="bits")
def _packed(codes: Array, bits: int) -> Array:
    e, k = codes_per_byte(bits), codes.shape[-1]
    codes = jnp.pad(codes, [(0, 0)] * (codes.ndim - 1) + [(0, -k % e)])
    fields = codes.reshape(*codes.shape[:-1], -(-k // e), e) & jnp.uint8(2**bits - 1)
    packed = jnp.zeros(fields.shape[:-1], jnp.uint8)
    for i in range(e):
        packed |= fields[..., i] << jnp.uint8(8 - bits * (i + 1))
    return packed


def unpack(packed: UInt8[ArrayLike, "*B bytes"], bits: int, k: int) -> UInt8[Array, "*B K"]:
    """The inverse of `pack`.

    Args:
        packed: uint8 [..., ceil(k / E)].
        bits: 1, 2, 4 or 8.
        k: number of codes in a row.

    Returns:
        uint8 [..., k].
    """
    check_bits(bits)
    packed = jnp.asarray(packed)
    if packed.dtype != jnp.uint8:
        raise TypeError(f"packed must be uint8, got {packed.dtype}")
    if packed.ndim == 0 or packed.shape[-1] != row_bytes(bits, k):
        raise ValueError(f"{packed.shape=} does not hold rows of {k=} codes of {bits=}")
    return _unpacked(packed, bits, k)


@functools.partial(_one_program, static_argnames=("bits", "k"))
def _unpacked(packed: Array, bits: int, k: int) -> Array:
    e = codes_per_byte(bits)
    shifts = jnp.expand_dims(jnp.arange(8 - bits, -1, -bits, dtype=jnp.uint8), range(packed.ndim))
    fields = (packed[..., None] >> shifts) & jnp.uint8(2**bits - 1)
    return fields.reshape(*packed.shape[:-1], packed.shape[-1] * e)[..., :k]


def _unchanged(packed, scales, **_):
    return packed, scales


# Planar layout of the Pallas kernels. A tile is 16 rows by E planes of 64 weights, 1 KiB, in the order in
# which the tensor cores' operand registers want it. Lane 4 g + c of a warp and step s = 2 t + u of 4 own 64
# bits: for each plane p, each q in (0, 1), each of the rows g and g + 8, and e in (0, 1), the code of
# k = 64 p + 32 t + 8 c + 4 u + 2 q + e, lowest bits first. So the x of a lane are neighbours, 8 by 8. The low
# 32 bits of all lanes and steps come first, then the high ones. So a byte is always an index into a table of
# neighbours, what a lane reads is 16 bytes in a row, and a plane lies inside one group of 64 or more. With 1
# bit the two codes of a pair (e) stand 16 bits apart instead, where the two values of an operand register are.
PLANE = 64
TILE_ROWS = 16
SCALE_GROUPS = 4


@functools.partial(_one_program, static_argnames=_SPEC)
def to_planar(
    packed: UInt8[Array, "*B N bytes"],
    scales: Float[Array, "*B N groups"],
    *,
    bits: int,
    group_size: int,
    out_features: int,
    in_features: int,
) -> tuple[UInt16[Array, "*B tiles blocks 2 8 32"], Float[Array, "*B tiles fours 64"]]:
    """From the interchange layout to that of the Pallas kernels; N and K are padded to whole tiles.

    The arguments are those of `convert`.

    Returns:
        packed: uint16 [..., ceil(N / 16), ceil(K / 64 E), 2, 8, 32]: low or high 32 bits, g, then c, s and
            the halves of 32 bits.
        scales: [..., ceil(N / 16), ceil(groups / 4), 64], groups of the padded K: for row r (of 8),
            group j (of 4) and h in (0, 1) the scale of row r + 8 h is number (4 r + j) * 2 + h.
    """
    codes = unpack(packed, bits, in_features)
    lead, planes, per_half = codes.shape[:-2], codes_per_byte(bits), 16 // bits
    pads = [(0, -out_features % TILE_ROWS), (0, -in_features % (planes * PLANE))]
    codes = jnp.pad(codes, [(0, 0)] * len(lead) + pads)
    tiles, blocks = codes.shape[-2] // TILE_ROWS, codes.shape[-1] // (planes * PLANE)
    # axes: tile, row half, g, block, p, t, c, u, q, e
    codes = codes.reshape(*lead, tiles, 2, 8, blocks, planes, 2, 4, 2, 2, 2)
    codes = _permute(codes, len(lead), (0, 3, 2, 6, 5, 7, 4, 8, 1, 9))
    if bits == 1:
        codes = codes.reshape(*lead, tiles, blocks, 8, 16, 2, 16, 2).swapaxes(-1, -2)
    slots = codes.reshape(*lead, tiles, blocks, 8, 16, 2, 2, per_half).astype(jnp.uint16)
    words = jnp.zeros(slots.shape[:-1], jnp.uint16)
    for i in range(per_half):
        words |= slots[..., i] << jnp.uint16(bits * i)
    words = _permute(words, len(lead), (0, 1, 4, 2, 3, 5))

    groups = -(-blocks * planes * PLANE // group_size)
    groups += -groups % SCALE_GROUPS
    pads = [(0, -out_features % TILE_ROWS), (0, groups - scales.shape[-1])]
    scales = jnp.pad(scales, [(0, 0)] * len(lead) + pads)
    scales = scales.reshape(*lead, tiles, 2, 8, groups // SCALE_GROUPS, SCALE_GROUPS)
    scales = _permute(scales, len(lead), (0, 3, 2, 4, 1))
    return (
        words.reshape(*lead, tiles, blocks, 2, 8, 32),
        scales.reshape(*lead, tiles, groups // SCALE_GROUPS, TILE_ROWS * SCALE_GROUPS),
    )


@functools.partial(_one_program, static_argnames=_SPEC)
def from_planar(
    packed: UInt16[Array, "*B tiles blocks 2 8 32"],
    scales: Float[Array, "*B tiles fours 64"],
    *,
    bits: int,
    group_size: int,
    out_features: int,
    in_features: int,
) -> tuple[UInt8[Array, "*B N bytes"], Float[Array, "*B N groups"]]:
    """The inverse of `to_planar`, with its arguments and results exchanged."""
    lead, planes, per_half = packed.shape[:-5], codes_per_byte(bits), 16 // bits
    tiles, blocks = packed.shape[-5:-3]
    words = packed.reshape(*lead, tiles, blocks, 2, 8, 16, 2)
    words = _permute(words, len(lead), (0, 1, 3, 4, 2, 5))
    mask = jnp.uint16(2**bits - 1)
    slots = [(words >> jnp.uint16(bits * i)) & mask for i in range(per_half)]
    codes = jnp.stack(slots, axis=-1).astype(jnp.uint8)
    if bits == 1:
        codes = codes.reshape(*lead, tiles, blocks, 8, 16, 2, 2, 16).swapaxes(-1, -2)
    codes = codes.reshape(*lead, tiles, blocks, 8, 4, 2, 2, planes, 2, 2, 2)
    codes = _permute(codes, len(lead), (0, 8, 2, 1, 6, 4, 3, 5, 7, 9))
    codes = codes.reshape(*lead, tiles * TILE_ROWS, blocks * planes * PLANE)

    fours = scales.shape[-2]
    scales = scales.reshape(*lead, tiles, fours, 8, SCALE_GROUPS, 2)
    scales = _permute(scales, len(lead), (0, 4, 2, 1, 3))
    scales = scales.reshape(*lead, tiles * TILE_ROWS, fours * SCALE_GROUPS)
    groups = -(-in_features // group_size)
    return (
        pack(codes[..., :out_features, :in_features], bits),
        scales[..., :out_features, :groups],
    )


# Tiled layout of the CPU library (cpu/src/layout.h): a tile is 16 rows, a step 64 bytes of it, 16 rows of
# 32 / bits weights. Column i of row r within a step lies in byte 4 r + i % 4, at bit (i // 4) * bits; with
# 1 bit in byte 16 (i // 8) + r, at bit i % 8.
STEP_BYTES = 64


@functools.partial(_one_program, static_argnames=_SPEC)
def to_tiled(
    packed: UInt8[Array, "*B N bytes"],
    scales: Float[Array, "*B N groups"],
    *,
    bits: int,
    group_size: int,
    out_features: int,
    in_features: int,
) -> tuple[UInt8[Array, "*B tiles steps 64"], Float[Array, "*B tiles groups 16"]]:
    """From the interchange layout to that of the CPU library; N and K are padded with zeros.

    The arguments are those of `convert`.

    Returns:
        packed: uint8 [..., ceil(N / 16), ceil(K / T), 64], T = 32 / bits weights of a row a step.
        scales: [..., ceil(N / 16), ceil(K / G), 16].
    """
    e = codes_per_byte(bits)
    tiles, steps = -(-out_features // TILE_ROWS), -(-in_features * bits // 32)
    groups = scales.shape[-1]
    codes = unpack(packed, bits, in_features)
    lead = codes.shape[:-2]
    pads = [(0, 0)] * len(lead) + [(0, -out_features % TILE_ROWS)]
    codes = jnp.pad(codes, [*pads, (0, steps * 32 // bits - in_features)])
    fields, bytes_a_row = (e, 4) if bits > 1 else (4, 8)
    codes = codes.reshape(*lead, tiles, TILE_ROWS, steps, fields, bytes_a_row)
    # The axis of codes that share a byte comes last.
    order = (0, 2, 1, 4, 3) if bits > 1 else (0, 2, 3, 1, 4)
    codes = _permute(codes, len(lead), order).reshape(*lead, tiles, steps, STEP_BYTES, e)
    tiled = jnp.zeros(codes.shape[:-1], jnp.uint8)
    for i in range(e):
        tiled |= codes[..., i] << jnp.uint8(bits * i)
    scales = jnp.pad(scales, [*pads, (0, 0)]).reshape(*lead, tiles, TILE_ROWS, groups)
    return tiled, _permute(scales, len(lead), (0, 2, 1))


@functools.partial(_one_program, static_argnames=_SPEC)
def from_tiled(
    packed: UInt8[Array, "*B tiles steps 64"],
    scales: Float[Array, "*B tiles groups 16"],
    *,
    bits: int,
    group_size: int,
    out_features: int,
    in_features: int,
) -> tuple[UInt8[Array, "*B N bytes"], Float[Array, "*B N groups"]]:
    """The inverse of `to_tiled`, with its arguments and results exchanged."""
    lead, (tiles, steps) = packed.shape[:-3], packed.shape[-3:-1]
    e, groups = codes_per_byte(bits), scales.shape[-2]
    mask = jnp.uint8(2**bits - 1)
    fields = [(packed >> jnp.uint8(bits * i)) & mask for i in range(e)]
    codes = jnp.stack(fields, axis=-1)
    if bits > 1:
        codes = codes.reshape(*lead, tiles, steps, TILE_ROWS, 4, e)
        codes = _permute(codes, len(lead), (0, 2, 1, 4, 3))
    else:
        codes = codes.reshape(*lead, tiles, steps, 4, TILE_ROWS, 8)
        codes = _permute(codes, len(lead), (0, 3, 1, 2, 4))
    codes = codes.reshape(*lead, tiles * TILE_ROWS, steps * 32 // bits)
    scales = _permute(scales, len(lead), (0, 2, 1)).reshape(*lead, tiles * TILE_ROWS, groups)
    return (
        pack(codes[..., :out_features, :in_features], bits),
        scales[..., :out_features, :],
    )


def _permute(a: Array, lead: int, order: tuple[int, ...]) -> Array:
    """Transposes the axes after the first `lead` ones."""
    return a.transpose(*range(lead), *(lead + i for i in order))


# layout: (from interchange, to interchange); both map (packed, scales) to (packed, scales) and take
# bits, group_size, out_features and in_features.
LAYOUTS = {
    "interchange": (_unchanged, _unchanged),
    "planar": (to_planar, from_planar),
    "tiled": (to_tiled, from_tiled),
}

# Faster converters of concrete arrays that a backend offers for its layout, in the form of `LAYOUTS`; each
# returns None for arrays that it cannot take.
NATIVE: dict[str, tuple[Callable, Callable]] = {}

# Converters from the interchange layout of matrices that are read by runs of rows: each takes what gives the
# (packed, scales) of rows [begin, end), what calls a function with each of some items, in threads, the dtype of
# the scales, and the arguments of `convert` that describe the matrix.
STREAMED: dict[str, Callable[..., tuple[Array, Array]]] = {}

# For each layout the axes of (packed, scales) that run along N and along K. A slice of whole
# tiles along either is the prepared form of that part of the matrix.
SHARDED_AXES = {
    "interchange": ((0, 1), (0, 1)),
    "planar": ((0, 1), (0, 1)),
    "tiled": ((0, 1), (0, 1)),
}


def convert(
    packed: UInt[Array, " ..."],
    scales: Float[Array, " ..."],
    source: str,
    target: str,
    *,
    bits: int,
    group_size: int,
    out_features: int,
    in_features: int,
) -> tuple[UInt[Array, " ..."], Float[Array, " ..."]]:
    """Moves packed codes and scales from one layout to another, exactly.

    Args:
        packed: the codes in layout `source`, any leading axes.
        scales: their scales in layout `source`.
        source: a key of `LAYOUTS`.
        target: a key of `LAYOUTS`.
        bits: width of a code.
        group_size: G, weights a scale.
        out_features: N.
        in_features: K.

    Returns:
        (packed, scales) in layout `target`.
    """
    for layout in (source, target):
        if layout not in LAYOUTS:
            raise ValueError(f"{layout=} is not one of {tuple(LAYOUTS)}")
    if source == target:
        return packed, scales
    spec = dict(
        bits=bits, group_size=group_size, out_features=out_features, in_features=in_features
    )
    packed, scales = _converted(source, 1, packed, scales, spec)
    return _converted(target, 0, packed, scales, spec)


def _converted(layout: str, way: int, packed, scales, spec) -> tuple[Array, Array]:
    """To a layout (`way` 0) or from it (1) by the backend's converter, if there is one that can."""
    done = NATIVE[layout][way](packed, scales, **spec) if layout in NATIVE else None
    return LAYOUTS[layout][way](packed, scales, **spec) if done is None else done


@functools.lru_cache(maxsize=1024)
def layout_struct(
    layout: str, *, bits: int, group_size: int, out_features: int, in_features: int, dtype
) -> tuple[jax.ShapeDtypeStruct, jax.ShapeDtypeStruct]:
    """Shapes and dtypes of (packed, scales) of one matrix in a layout; `dtype` is that of the scales."""
    n, k = out_features, in_features
    packed = jax.ShapeDtypeStruct((n, row_bytes(bits, k)), jnp.uint8)
    scales = jax.ShapeDtypeStruct((n, -(-k // group_size)), dtype)
    return jax.eval_shape(
        lambda p, s: convert(
            p,
            s,
            "interchange",
            layout,
            bits=bits,
            group_size=group_size,
            out_features=n,
            in_features=k,
        ),
        packed,
        scales,
    )
