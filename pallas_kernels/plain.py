"""The plain kernel: any dtype, group size and codebook, in ordinary Pallas operations.

The readable twin of the kernels in PTX. It serves what they do not, and GPUs that they do not know. A shift
and a mask bring one code of each word of a tile to the front (`layout.Shift`), in one order of K for all
rows; x is put into that order once, before. So the loop has no index arithmetic: codes become values by
selects or by a look-up in the codebook, and are multiplied with x, one row in float32, several by a dot.

Glossary: M rows of x, N rows of the weight; L lines a program, of which each stands for the rows r and r + 8
of a tile; S shifts of both halves of a tile; B tiles along K, which the programs of a row share.
"""

import functools

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl

from pallas_kernels import layout, target, triton_compat
from pallas_kernels.case import Arrays, Case

_TILES = 4  # that a program's lines are of
_LINES = 8 * _TILES
_TOKENS = 16  # the least that tensor cores take
_PROGRAMS = 8  # a multiprocessor


def matmul(case: Case, arrays: Arrays, *, interpret: bool) -> Array:
    """X [M, K] times the transpose of a planar weight, [M, N]; see `pallas_kernels.matmul`."""
    tokens = 1 if case.m == 1 else _TOKENS
    grid = pl.cdiv(case.tiles, _TILES), pl.cdiv(case.m, tokens)
    each = case.blocks if interpret else _blocks_each(case.blocks, grid[0] * grid[1])
    splits = pl.cdiv(case.blocks, each)
    parts = pl.pallas_call(
        functools.partial(_kernel, case, tokens=tokens, each=each),
        out_shape=jax.ShapeDtypeStruct((splits, case.m, case.n), jnp.float32),
        grid=(*grid, splits),
        compiler_params=triton_compat.compiler_params(num_warps=4, num_stages=1),
        interpret=interpret,
        name="fdk_plain",
    )(_in_order(case, arrays.x), *arrays[1:3], arrays.codebook.reshape(-1, 2**case.bits))
    y = parts[0] if splits == 1 else parts.sum(axis=0)
    if arrays.bias is not None:
        y += arrays.bias.astype(jnp.float32)[None, :]
    return y.astype(case.out_dtype)


def _blocks_each(blocks: int, programs: int) -> int:
    """Tiles along K of a program, such that there are enough programs."""
    splits = max(1, _PROGRAMS * target.current().multiprocessors // programs)
    return max(4, pl.cdiv(blocks, splits))


def _in_order(case: Case, x: Array) -> Array:
    """X [M, K] as [M, B, S, 32]: what each word's code is multiplied with, shift by shift."""
    x = case.pad(x).reshape(-1, case.blocks, case.span)
    # Computed, as constants are not partitioned.
    columns = jnp.stack([s.column(jnp.arange(layout.WORDS)) for s in layout.shifts(case.bits)])
    return x[:, :, columns]


def _kernel(
    case: Case, x_ref, packed_ref, scales_ref, codebook_ref, out_ref, *, tokens: int, each: int
):
    # x :: [M, B, S, 32], packed :: [tiles, B, 2, 8, 32], scales :: [tiles, fours, 64], out :: [splits, M, N]
    m, n, tiles, blocks = case.m, case.n, case.tiles, case.blocks
    bits, planes, codebooks, group_size = case.bits, case.planes, case.codebooks, case.group_size
    line = pl.program_id(0) * _LINES + jnp.arange(_LINES, dtype=jnp.int32)
    tile, row = jnp.minimum(line >> 3, tiles - 1), line & 7
    token = pl.program_id(1) * tokens + jnp.arange(tokens, dtype=jnp.int32)
    present = jnp.minimum(token, m - 1)  # the last one again, which nobody stores
    word = jnp.arange(layout.WORDS, dtype=jnp.int32)
    split = pl.program_id(2)
    shape = (_LINES, layout.WORDS)
    wide = functools.partial(jnp.broadcast_to, shape=shape)
    at_tile, at_row, at_word = wide(tile[:, None]), wide(row[:, None]), wide(word[None, :])
    odd = (at_word & 1) == 1

    def scale(lower: bool, group: Array) -> Array:
        four, position = layout.scale_index(at_row + 8 * lower, wide(group))
        return scales_ref[at_tile, four, position].astype(jnp.float32)

    def factors(shift: layout.Shift, lower: bool, block: Array) -> Array:
        """The scales of a shift's codes."""
        if group_size % layout.PLANE:
            return scale(
                lower, (block * planes * layout.PLANE + shift.column(at_word)) // group_size
            )
        even, other = (
            (block * planes + shift.plane(i)) * layout.PLANE // group_size for i in range(2)
        )
        if shift.plane(0) == shift.plane(1):
            return scale(lower, even)
        return scale(lower, jnp.where(odd, other, even))

    def value_of(lower: bool):
        """What makes values of codes of these rows, as the scales' dtype rounds them."""
        codebook_index = jnp.minimum(tile * 16 + 8 * lower + row, n - 1) // (n // codebooks)
        codebook_index = wide(codebook_index[:, None])

        def look_up(code: Array) -> Array:
            return codebook_ref[codebook_index, code].astype(scales_ref.dtype).astype(jnp.float32)

        if bits > 2:
            return look_up
        values = [look_up(jnp.full(shape, code, jnp.int32)) for code in range(2**bits)]
        return functools.partial(_select, values)

    values = [value_of(lower) for lower in (False, True)]

    def step(i: Array, totals: tuple[Array, Array]) -> tuple[Array, Array]:
        block = split * each + i
        at_block = jnp.broadcast_to(block, shape)
        words = [
            packed_ref[at_tile, at_block, jnp.full(shape, part), at_row, at_word].astype(jnp.int32)
            for part in range(case.parts)
        ]
        sums = list(totals)
        for number, shift in enumerate(layout.shifts(bits)):
            code = shift.code(words)
            x = x_ref[present[:, None], block, number, word[None, :]]
            for lower in (False, True):
                if lower not in (shift.lower(0), shift.lower(1)):
                    continue
                weight = values[lower](code) * factors(shift, lower, block)
                if shift.lower(0) != shift.lower(1):
                    weight = jnp.where(odd == (shift.lower(1) == lower), weight, 0.0)
                sums[lower] += _product(weight, x)
        return sums[0], sums[1]

    start = jnp.zeros(shape if tokens == 1 else (_LINES, tokens), jnp.float32)
    steps = jnp.minimum(each, blocks - split * each)
    totals = jax.lax.fori_loop(0, steps, step, (start, start))
    for lower, total in enumerate(totals):
        if tokens == 1:
            total = total.sum(axis=1, keepdims=True)
        output = (line >> 3) * 16 + 8 * lower + row
        mask = (output[:, None] < n) & (token[None, :] < m)
        triton_compat.store(out_ref.at[split, token[None, :], output[:, None]], total, mask=mask)


def _select(values: list[Array], code: Array) -> Array:
    """The value of a code, by selects."""
    if len(values) == 2:
        return jnp.where(code & 1 == 1, values[1], values[0])
    half = len(values) // 2
    upper = _select(values[half:], code)
    return jnp.where(code & half == half, upper, _select(values[:half], code))


def _product(weight: Array, x: Array) -> Array:
    """Products with one token, not yet added up: [L, 32]; with several: [L, tokens]."""
    if x.shape[0] == 1:
        return weight * x.astype(jnp.float32)
    precision = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    return jax.lax.dot_general(
        weight.astype(x.dtype),
        x,
        (((1,), (1,)), ((), ())),
        precision=precision,
        preferred_element_type=jnp.float32,
    )
