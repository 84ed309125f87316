"""Scales, nearest codes, and `quantise` of one array."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.core import Tracer
from jax.typing import ArrayLike

from fdk_jax.format import codebooks, densities, host_arrays, packing
from fdk_jax.format.dequantisation import round_to, spread
from fdk_jax.format.orientation import check_axes, to_matrix
from fdk_jax.format.quantised_tensor import FLOAT_DTYPES, QuantisedTensor

if TYPE_CHECKING:
    from jaxtyping import Float, Float32, UInt8

SCALES = ("auto", "absmax", "absmean", "rms", "none")
CODEBOOKS = (
    "auto", "uniform", "nf4", "fp4", "ternary", "normal", "laplace", "student",
    "kmeans", "kmeans-quotients",
)  # fmt: skip
_FITTED = ("kmeans", "kmeans-quotients")
# What codebook="auto" stands for: of the levels that are known beforehand, those which docs/quality.md finds
# the best at each width, and the rule of their scales.
DEFAULTS = {
    8: ("uniform", "absmax"),
    4: ("nf4", "absmax"),
    2: ("normal", "rms"),
    1: ("uniform", "absmean"),
}
_MIN_SCALE = 1e-12
# Of a scale by the largest one: groups of zeros count, but for next to nothing.
_LEAST_SQUARE = 1e-30
_BLOCK = 1 << 24  # weights whose float32 intermediates exist at a time


def quantise_array(
    weight: Float[ArrayLike, "*shape"],
    bits: int = 4,
    *,
    group_size: int = 64,
    codebook: Any = "auto",
    scale: str = "auto",
    axes: str = "nk",
    dtype: Any = None,
    importance: Float[ArrayLike, "*shape"] | None = None,
    seed: int = 0,
) -> QuantisedTensor:
    """Quantises one weight to the interchange layout.

    Each group of `group_size` weights along K is divided by its scale; a code is the number of midpoints
    between codebook entries strictly below the quotient (ties go to the lower code). Everything is computed
    in the weight's dtype, bit for bit as in the published format (docs/format.md); on a GPU, scales of float32
    weights by a mean may be one bit apart.

    Args:
        weight: float [..., *shape] with one axis of `shape` for each letter of `axes`.
        bits: 1, 2, 4 or 8.
        group_size: weights along K that share a scale.
        codebook: "auto" (the best fixed levels for the bits: `DEFAULTS`), "uniform" (that of the published
            format), "nf4" or "fp4" (4 bits only), "ternary" (2 bits only), "normal", "laplace" or "student"
            (cube-root-density levels, see `fdk_jax.format.densities.cube_root`), "kmeans" (fitted for the
            least squared error of the weights), "kmeans-quotients" (of the quotients, whatever their scales,
            as the published recipe), or at most 2**bits ascending values.
        scale: "absmax", "absmean", "rms", "none" (ones) or "auto": what belongs to codebook "auto"; for all
            others absmean up to 2 bits, else absmax.
        axes: "k" (contracted), "n" (output) or "b" (batch) for each trailing axis: "nk" for a [N, K] matrix,
            "kn" for a Flax kernel, "bkn" for experts. Axes to the left of them are stacked matrices.
        dtype: compute dtype, to which the weight is cast first; None keeps its own.
        importance: for both "kmeans": non-negative weights of the same shape as `weight`.
        seed: for both "kmeans".

    Returns:
        A `QuantisedTensor`. Stacked matrices each get a codebook of their own from "kmeans".

    Raises:
        TypeError: the weight is not a float array.
        ValueError: an argument out of range, or a weight that is not finite.
    """
    check_options(bits, group_size, codebook, scale)
    matrix, batch, shape = as_matrix(weight, axes, dtype)
    if not isinstance(matrix, Tracer) and not _is_finite(matrix):
        raise ValueError("the weight holds NaN or infinity; it cannot be quantised")
    codebook, kind = resolve_auto(codebook, scale, bits)
    if isinstance(codebook, str) and codebook in _FITTED:
        if isinstance(matrix, Tracer):
            raise TypeError(f"{codebook=} fits on the values and cannot run under jit")
        by_scale = codebook == "kmeans"
        values = _fit_each(matrix, bits, group_size, kind, importance, axes, seed, by_scale)
        uniform = bits == 1
    else:
        values = resolve_codebook(codebook, bits, kind, group_size)
        uniform = bits == 1 or codebooks.is_uniform(values)
        values = np.broadcast_to(values, (*batch, *values.shape))
    parts = [
        _encode(matrix[rows], jnp.asarray(values), bits, group_size, kind)
        for rows in _row_blocks(matrix)
    ]
    packed, scales = parts[0] if len(parts) == 1 else map(jnp.concatenate, zip(*parts, strict=True))
    return QuantisedTensor(
        packed, scales, jnp.asarray(values), bits, group_size, shape, axes, uniform=uniform
    )


def resolve_auto(codebook: Any, scale: str, bits: int) -> tuple[Any, str]:
    """The codebook and the rule of the scales that "auto" stands for."""
    packing.check_bits(bits)
    if isinstance(codebook, str) and codebook == "auto":
        if bits not in DEFAULTS:
            raise ValueError(f'codebook="auto" has nothing at {bits=}; name one of {CODEBOOKS[1:]}')
        codebook, own = DEFAULTS[bits]
        scale = own if scale == "auto" else scale
    return codebook, resolve_scale(scale, bits)


def resolve_scale(scale: str, bits: int) -> str:
    """The rule that "auto" stands for where a codebook is given: absmean up to 2 bits, else absmax."""
    if scale not in SCALES:
        raise ValueError(f"{scale=} is not one of {SCALES}")
    return scale if scale != "auto" else ("absmean" if bits <= 2 else "absmax")


def resolve_codebook(
    codebook: Any, bits: int, scale: str = "absmax", group_size: int = 64
) -> np.ndarray:
    """float32 [2**bits] of a named or given codebook; `scale` and `group_size` shape the densities'."""
    if not isinstance(codebook, str):
        return codebooks.check(codebook, bits)
    if codebook in densities.DISTRIBUTIONS:
        return densities.cube_root(
            2**bits, scale=scale, group_size=group_size, distribution=codebook
        )
    if codebook == "uniform":
        return codebooks.uniform(bits)
    if codebook in _FITTED:
        raise ValueError(f"{codebook=} is fitted to a weight by fdk_jax.quantise: give its values")
    tables = {"nf4": codebooks.nf4, "fp4": codebooks.fp4, "ternary": codebooks.ternary}
    if codebook not in tables:
        raise ValueError(f"{codebook=} is not one of {CODEBOOKS} or an array")
    return codebooks.check(tables[codebook](), bits)


def check_options(bits: int, group_size: int, codebook: Any, scale: str) -> None:
    """Raises ValueError for an option that is out of range."""
    packing.check_widths(bits, group_size)
    resolve_scale(scale, bits)
    if isinstance(codebook, str):
        if codebook not in CODEBOOKS:
            raise ValueError(f"{codebook=} is not one of {CODEBOOKS} or an array")
        needed = {"nf4": (4, 16), "fp4": (4, 16), "ternary": (2, 3)}
        if codebook in needed and bits != needed[codebook][0]:
            width, count = needed[codebook]
            raise ValueError(f"{codebook=} has {count} values: use bits={width}, not {bits=}")


def as_matrix(
    weight: ArrayLike, axes: str, dtype: Any
) -> tuple[Array, tuple[int, ...], tuple[int, ...]]:
    """[..., N, K] of a weight in `dtype` (None: its own), its leading shape and its own shape; checked."""
    check_axes(axes)
    # A float64 beyond float32 becomes an infinity, which is refused later.
    with np.errstate(over="ignore"):
        weight = jnp.asarray(host_arrays.native(weight))
    if weight.dtype not in FLOAT_DTYPES:
        raise TypeError(
            f"weights must be bfloat16, float16 or float32, got {weight.dtype}; cast them first"
        )
    dtype = weight.dtype if dtype is None else jnp.dtype(dtype)
    if dtype not in FLOAT_DTYPES:
        raise TypeError(f"dtype must be bfloat16, float16 or float32, got {dtype}")
    if weight.ndim < len(axes):
        raise ValueError(f"a weight of shape {weight.shape} has too few axes for {axes=}")
    return to_matrix(weight.astype(dtype), axes)


def _mean(x: Array) -> Array:
    """Mean over the last axis, summed in one fixed order: the same bits on every platform.

    The order is numpy's for up to 128 values (eight running sums, joined as a tree).
    """
    g = x.shape[-1]
    full = g // 8 * 8
    if full:
        rows = x[..., :full].reshape(*x.shape[:-1], full // 8, 8)
        sums = functools.reduce(jnp.add, [rows[..., i, :] for i in range(full // 8)])
        pairs = sums[..., 0::2] + sums[..., 1::2]
        fours = pairs[..., 0::2] + pairs[..., 1::2]
        total = fours[..., 0] + fours[..., 1]
        rest = range(full, g)
    else:
        total, rest = x[..., 0], range(1, g)
    for i in rest:
        total = total + x[..., i]
    # XLA turns division by a constant into multiplication by its rounded reciprocal; a sum of
    # magnitudes is never negative, but XLA does not know that.
    return total / jnp.where(total < 0, jnp.float32(1), jnp.float32(g))


def _power_of_two(magnitudes: Array) -> Array:
    """The largest power of two up to each magnitude, or to 2**126: its reciprocal, by which XLA may multiply
    instead, is a normal number too. 1 for magnitudes without a normal, finite one.
    """
    exponents = jax.lax.bitcast_convert_type(magnitudes, jnp.int32) & 0x7F800000
    power = jax.lax.bitcast_convert_type(exponents, jnp.float32)
    power = jnp.minimum(power, jnp.float32(2.0**126))
    return jnp.where((power > 0) & jnp.isfinite(magnitudes), power, jnp.float32(1))


def group_scales(groups: Float32[Array, "*B G"], kind: str, dtype: Any) -> Float32[Array, "*B"]:
    """float32 scales of float32 groups [..., G], rounded to `dtype` and at least 1e-12."""
    if kind == "none":
        return jnp.ones(groups.shape[:-1], jnp.float32)
    if kind == "absmax":
        scale = jnp.abs(groups).max(-1)
    else:
        # The sums of a group's magnitudes, and sooner those of its squares, may exceed float32 where their
        # mean does not: sums of the same group times a power of two round alike.
        unit = _power_of_two(jnp.abs(groups).max(-1))
        parts = groups / unit[..., None]
        if kind == "absmean":
            scale = _mean(jnp.abs(parts)) * unit
        else:
            scale = jnp.sqrt(_mean(parts * parts)) * unit
    # float16 has no 1e-12: its smallest normal number keeps the division finite.
    floor = max(_MIN_SCALE, float(jnp.finfo(dtype).tiny))
    return jnp.maximum(round_to(scale, dtype), round_to(jnp.float32(floor), dtype))


def _per_group(matrix: Array, group_size: int, function: Callable[[Array], Array]) -> Array:
    """Applies `function` to groups [..., G], full ones first, then a short last one."""
    k = matrix.shape[-1]
    full = k // group_size * group_size
    head = matrix[..., :full].reshape(*matrix.shape[:-1], k // group_size, group_size)
    parts = [function(head)] if full else []
    if full < k:
        parts.append(function(matrix[..., None, full:]))
    return jnp.concatenate(parts, axis=-1) if parts else jnp.zeros((*matrix.shape[:-1], 0))


def scaled(
    matrix: Float[Array, "*B K"], group_size: int, kind: str
) -> tuple[Float32[Array, "*B K"], Float32[Array, "*B groups"]]:
    """(quotients float32 [..., N, K], scales float32 [..., N, ceil(K / G)]) of a float matrix."""
    dtype = matrix.dtype
    wide = matrix.astype(jnp.float32)
    scales = _per_group(wide, group_size, lambda g: group_scales(g, kind, dtype))
    return round_to(wide / spread(scales, group_size, matrix.shape[-1]), dtype), scales


def nearest_codes(
    quotients: Float32[Array, "N K"], codebook: Float32[Array, "*C values"], dtype: Any
) -> UInt8[Array, "N K"]:
    """uint8 codes: the number of midpoints of `codebook` strictly below each quotient.

    Args:
        quotients: float32 [N, K], on the grid of `dtype`.
        codebook: float32 [2**bits] or [C, 2**bits].
        dtype: compute dtype of the midpoints.
    """
    rows = codebook.reshape(-1, codebook.shape[-1])
    middle = middle_of(rows, dtype)
    blocks = quotients.reshape(rows.shape[0], quotients.size // rows.shape[0])
    if middle.shape[-1] <= 15:
        codes = jnp.zeros(blocks.shape, jnp.uint8)
        for i in range(middle.shape[-1]):
            codes += (blocks > middle[:, i : i + 1]).astype(jnp.uint8)
    else:
        codes = jax.vmap(functools.partial(jnp.searchsorted, side="left"))(middle, blocks)
        codes = codes.astype(jnp.uint8)
    return codes.reshape(quotients.shape)


def middle_of(codebook: Float[Array, "*C values"], dtype: Any = jnp.float32) -> Array:
    """The midpoints between neighbouring levels, on the grid of `dtype`: [..., values - 1]."""
    values = round_to(codebook, dtype)
    return round_to(round_to(values[..., 1:] + values[..., :-1], dtype) / 2, dtype)


def _row_blocks(matrix: Array) -> list[Any]:
    """Indices of runs of rows of a large [N, K]: what is computed from all of them need not exist at once."""
    whole = isinstance(matrix, Tracer) or matrix.ndim > 2 or matrix.size <= _BLOCK
    if whole or len(matrix.devices()) > 1:
        return [...]
    rows = -(-matrix.shape[0] // -(-matrix.size // _BLOCK))
    return [slice(i, i + rows) for i in range(0, matrix.shape[0], rows)]


def _is_finite(matrix: Array) -> bool:
    return all(bool(jnp.isfinite(matrix[rows]).all()) for rows in _row_blocks(matrix))


@functools.partial(jax.jit, static_argnums=(2, 3, 4))
def _encode(matrix, codebook, bits, group_size, kind) -> tuple[Array, Array]:
    """(packed, scales) of [..., N, K] with a codebook for each leading index."""
    if matrix.ndim > 2:
        return jax.vmap(lambda m, c: _encode(m, c, bits, group_size, kind))(matrix, codebook)
    quotients, scales = scaled(matrix, group_size, kind)
    codes = nearest_codes(quotients, codebook, matrix.dtype)
    return packing.pack(codes, bits), scales.astype(matrix.dtype)


@functools.partial(jax.jit, static_argnums=(1, 2))
def _quotients(matrix, group_size, kind):
    return scaled(matrix, group_size, kind)[0]


@functools.partial(jax.jit, static_argnums=(1, 2))
def _largest_scale(matrix, group_size, kind):
    return scaled(matrix, group_size, kind)[1].max(initial=0)


@functools.partial(jax.jit, static_argnums=(1, 2))
def _quotients_and_squares(matrix, group_size, kind, largest):
    """Quotients, and the squares of their scales over the largest: from 1 down to more than 0."""
    quotients, scales = scaled(matrix, group_size, kind)
    squares = jnp.maximum(jnp.square(scales / largest), _LEAST_SQUARE)
    return quotients, spread(squares, group_size, matrix.shape[-1])


def _fit_each(matrix, bits, group_size, kind, importance, axes, seed, by_scale) -> np.ndarray:
    """float32 [..., 2**bits]: a k-means codebook for each leading index.

    With `by_scale` an error of a quotient counts by what it is in the weight: the square of its scale.
    """
    batch = matrix.shape[:-2]
    if importance is not None:
        importance = to_matrix(jnp.asarray(importance), axes)[0]
        if importance.shape != matrix.shape:
            raise ValueError("importance must have the shape of the weight")
    out = np.zeros((*batch, 2**bits), np.float32)
    for index in np.ndindex(*batch):
        one = matrix[index]
        weight = None if importance is None else importance[index]
        # Each part needs some importance of its own, so with importances there is one part.
        blocks = [...] if weight is not None else _row_blocks(one)
        largest = None
        if by_scale:
            largest = jnp.stack(
                [_largest_scale(one[rows], group_size, kind) for rows in blocks]
            ).max()

        def part(rows, one=one, weight=weight, largest=largest):
            if largest is None:
                return _quotients(one[rows], group_size, kind), weight
            quotients, squares = _quotients_and_squares(one[rows], group_size, kind, largest)
            return quotients, squares if weight is None else squares * weight

        parts = [functools.partial(part, rows) for rows in blocks]
        out[index] = codebooks.fit_parts(parts, 2**bits, seed=seed)
    return out
