"""The end of a program of the Mosaic GPU kernel: biases, rounding, the copies to y; see `mosaic_kernel`."""

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import mosaic_shares, mosaic_sums, mosaic_values
from pallas_kernels.mosaic_decoding import Decoder
from pallas_kernels.mosaic_matmul import GROUP_ROWS, columns, slab
from pallas_kernels.mosaic_values import SCALAR, U32, inline


def x_transforms(case):
    """How `wgmma` reads x in shared memory."""
    return plgpu.TilingTransform((8, columns(case))), plgpu.SwizzleTransform(128)


def kept_planes(config):
    """The last planes of a tile whose memory results take before the next tile's are copied there."""
    return config.row_groups if config.programs else 0


def end_piece(case, config, plan, piece, total, refs, tile, program, *, x_smem, x_free, table, **_):
    """Gives the sums of a piece away, or adds those of others and writes the tile; see `mosaic_schedule`."""
    row_group = jax.lax.axis_index("wg")
    bias, y, sums, flags = refs
    device, scalars = (plgpu.RefType(),) * 2, (SCALAR,)
    result = plgpu.ShapeDtypeStruct(total.shape, total.dtype, layout=plgpu.Layout.WGMMA)

    @inline(arg_types=(*device, plgpu.Layout.WGMMA, *scalars))
    def give(_, sums, flags, total, place):
        mosaic_shares.give(sums, flags, total, U32(place.registers.item()))

    @inline(arg_types=(*device, plgpu.Layout.WGMMA, *scalars), return_type=result)
    def take(_, sums, flags, total, place):
        return mosaic_shares.take(sums, flags, total, U32(place.registers.item()))

    def place(program):
        return jnp.int32(program * config.row_groups + row_group)

    after = tile.past(tile.slabs) * (
        slab(case, config) // columns(case)
    )  # planes, with the tile's own

    def write_tile():
        whole = total
        if plan.shared:
            first = jnp.where(piece.first > 0, plan.first_giver(piece), program)
            whole = jax.lax.fori_loop(
                first, program, lambda other, some: take(sums, flags, some, place(other)), total
            )
        slot = jax.lax.rem(after - 1 - row_group, config.x_stages)
        first_row = tile.program * config.rows + row_group * GROUP_ROWS
        write(
            case, config, whole, bias, (), y, tile, first_row, x_smem[-1], slot, table, keeps=True
        )

    if plan.shared:
        ends = plan.ends(piece)
        pl.when(ends)(write_tile)
        pl.when(jnp.logical_not(ends))(lambda: give(sums, flags, total, place(program)))
    else:
        write_tile()
    for i in range(kept_planes(config)):
        plgpu.barrier_arrive(x_free.at[jax.lax.rem(after - 1 - i, config.x_stages)])


def write(
    case,
    config,
    total,
    bias,
    factors,
    y,
    tile,
    first_row,
    x_flat,
    slot,
    table,
    sync=True,
    keeps=False,
):
    """Adds the bias, rounds, transposes [rows, tokens] in shared memory, and copies it out.

    Waits for other warpgroups before, if `sync`, and until the results are in device memory; or, where the
    program `keeps` running, until their shared memory may be written again.
    """
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
    plgpu.wait_smem_to_gmem(0, wait_read_only=keeps)


def copy_rows(tokens, source, y, m, rows, first_row):
    """Copies a tile's own rows to y, of so many; zeros if there is no source."""
    sources = () if source is None else (plgpu.RefType((plgpu.SwizzleTransform(128),)),)

    @inline(arg_types=(plgpu.RefType(), SCALAR, SCALAR, SCALAR, *sources))
    def copy(_, y, m, rows, first_row, source=None):
        bounds = (U32(value.registers.item()) for value in (m, rows, first_row))
        mosaic_sums.copy_rows(source, y, *bounds, tokens=tokens)

    bounds = (jnp.int32(value) for value in (m, rows, first_row))
    copy(y, *bounds, *(() if source is None else (source,)))
