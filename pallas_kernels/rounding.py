"""What `mosaic_integers` makes of x and of scales, in a launch each, where XLA makes several."""

import functools

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl

from pallas_kernels import triton_compat
from pallas_kernels.case import Case
from pallas_kernels.layout import TILE_ROWS, scale_index

LARGEST = 127  # of the integers
RUN = 32  # columns of K that are reordered among themselves
MAX_FEATURES = 32768  # that the registers of one program hold


def integers(x: Array, rows: int, *, interpret: bool = False) -> tuple[Array, Array]:
    """See `mosaic_integers.integers`; the factors are of so many rows, those past x anything.

    Args:
        x: [M, K] of halves, K a multiple of 32.
        rows: M at least.
        interpret: run in Pallas' interpreter.
    """
    m, k = x.shape
    size = pl.next_power_of_2(k)
    return pl.pallas_call(
        functools.partial(_integers, size=size),
        grid=(m,),
        out_shape=(
            jax.ShapeDtypeStruct((m, k), jnp.int8),
            jax.ShapeDtypeStruct((rows,), jnp.float32),
        ),
        compiler_params=triton_compat.compiler_params(
            num_warps=max(1, min(16, size // 1024)), num_stages=1
        ),
        interpret=interpret,
        name="fdk_integers",
    )(x)


def _integers(x, y, factors, *, size):
    k, row, index = x.shape[1], pl.program_id(0), jnp.arange(size)
    # Where the operand has 4 c to 4 c + 3, and 16 further the next 4, a lane has columns 8 c to 8 c + 7.
    column = index // RUN * RUN + index // 4 % 4 * 8 + index // 16 % 2 * 4 + index % 4
    mask = None if size == k else index < k
    other = None if mask is None else 0.0
    wide = triton_compat.load(x.at[row, column], mask=mask, other=other).astype(jnp.float32)
    largest = jnp.max(jnp.abs(wide))
    is_zero = largest == 0
    # Whether a maximum is NaN where a value is depends on the compiler: what is not finite makes this NaN.
    poison = jnp.sum(jnp.where(jnp.abs(wide) < jnp.inf, 0.0, jnp.nan))
    inverse = jnp.where(is_zero, 0.0, LARGEST / jnp.where(is_zero, 1.0, largest))
    rounded = jnp.floor(wide * inverse + 0.5)
    triton_compat.store(y.at[row, index], rounded.astype(jnp.int32).astype(jnp.int8), mask=mask)
    factors[row] = jnp.where(is_zero, 1.0, largest * (1 / LARGEST)) + poison


def relative(
    case: Case, scales: Array, codebook: Array, *, interpret: bool = False
) -> tuple[Array, Array, Array]:
    """See `mosaic_integers.relative`; the factors are of all rows of the tiles.

    Args:
        case: the product.
        scales: [tiles, fours, 64].
        codebook: [codebooks, 2**bits].
        interpret: run in Pallas' interpreter.
    """
    return pl.pallas_call(
        functools.partial(_relative, case=case, size=pl.next_power_of_2(4 * case.scale_fours)),
        grid=(case.tiles,),
        out_shape=(
            jax.ShapeDtypeStruct(scales.shape, jnp.float16),
            jax.ShapeDtypeStruct(codebook.shape, jnp.float32),
            jax.ShapeDtypeStruct((case.tiles * TILE_ROWS,), jnp.float32),
        ),
        compiler_params=triton_compat.compiler_params(num_warps=4, num_stages=1),
        interpret=interpret,
        name="fdk_relative_scales",
    )(scales, codebook)


def _relative(scales, codebook, by_row, table, factors, *, case, size):
    tile = pl.program_id(0)
    which = tile * TILE_ROWS * case.codebooks // case.n  # changes at multiples of programs' rows
    which = jnp.minimum(which, case.codebooks - 1)
    code = jnp.arange(2**case.bits)
    values = triton_compat.load(codebook.at[which, code])
    peak = jnp.max(jnp.abs(values))
    peak = jnp.where(peak == 0, 1.0, peak)
    triton_compat.store(table.at[which, code], values / peak)
    group, row = jnp.arange(size)[:, None], jnp.arange(TILE_ROWS)[None]
    four, index = jnp.broadcast_arrays(*scale_index(row, group))
    mask = four < case.scale_fours
    wide = triton_compat.load(scales.at[tile, four, index], mask=mask, other=0.0)
    wide = wide.astype(jnp.float32)
    largest = jnp.max(jnp.abs(wide), axis=0)
    largest = jnp.where(largest == 0, 1.0, largest)
    found = (wide * (LARGEST / largest)[None]).astype(jnp.float16)
    triton_compat.store(by_row.at[tile, four, index], found, mask=mask)
    rows = tile * TILE_ROWS + jnp.arange(TILE_ROWS)
    triton_compat.store(factors.at[rows], largest * (1 / LARGEST) * peak)
