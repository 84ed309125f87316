"""The end of a program of the Mosaic GPU kernel: biases, rounding, the copies to y; see `mosaic_kernel`."""

import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import mosaic_sums, mosaic_values
from pallas_kernels.mosaic_decoding import Decoder
from pallas_kernels.mosaic_matmul import GROUP_ROWS, columns
from pallas_kernels.mosaic_values import SCALAR, U32, inline


def x_transforms(case):
    return plgpu.TilingTransform((8, columns(case))), plgpu.SwizzleTransform(128)


def write(case, config, total, bias, factors, y, tile, first_row, x_flat, slot, table, sync=True):
    """Adds the bias, rounds, transposes [rows, tokens] in shared memory, and copies it out."""
    tokens, decoder = total.shape[1], Decoder.of(case)
    part = x_flat.at[slot, pl.ds(0, tokens)]
    target = plgpu.RefType((plgpu.SwizzleTransform(128),))
    biases = (plgpu.RefType(),) * len(bias)
    scaling = (SCALAR, plgpu.RefType(), plgpu.RefType()) if factors else ()

    @inline(
        arg_types=(target, plgpu.RefType(), plgpu.Layout.WGMMA, SCALAR, SCALAR, *biases, *scaling)
    )
    def transpose(_, target, table, total, first_row, group, *others):
        if sync:
            mosaic_values.sync_warpgroups(128 * config.warpgroups)
        first_row, group = (U32(value.registers.item()) for value in (first_row, group))
        values = mosaic_sums.values_of(total)
        if (factor := decoder.factor(table)) is not None:
            values = mosaic_sums.times(values, factor)
        if factors:
            first_token, *by_row = others[-3:]
            first_token = U32(first_token.registers.item())
            values = mosaic_sums.scale(values, case, first_row, first_token, *by_row)
        added = others[0] if bias else None
        mosaic_sums.store_transposed(target, values, case, first_row, group, bias=added)

    group = jnp.int32(0 if tile.group is None else tile.group)
    scaling = (jnp.int32(tile.m), *factors) if factors else ()
    transpose(part, table, total, jnp.int32(first_row), group, *bias, *scaling)
    plgpu.commit_smem()
    if tile.rows is not None:
        copy_rows(tokens, part, y, tile.m, tile.rows, first_row)
        return
    plgpu.copy_smem_to_gmem(part, y.at[pl.ds(tile.m, tokens), pl.ds(first_row, GROUP_ROWS)])
    plgpu.wait_smem_to_gmem(0)


def copy_rows(tokens, source, y, m, rows, first_row):
    """Copies a tile's own rows to y, of so many; zeros if there is no source."""
    sources = () if source is None else (plgpu.RefType((plgpu.SwizzleTransform(128),)),)

    @inline(arg_types=(plgpu.RefType(), SCALAR, SCALAR, SCALAR, *sources))
    def copy(_, y, m, rows, first_row, source=None):
        bounds = (U32(value.registers.item()) for value in (m, rows, first_row))
        mosaic_sums.copy_rows(source, y, *bounds, tokens=tokens)

    bounds = (jnp.int32(value) for value in (m, rows, first_row))
    copy(y, *bounds, *(() if source is None else (source,)))
