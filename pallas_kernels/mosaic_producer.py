"""The producer warpgroup of the Mosaic GPU kernel, which copies x and the weight; see `mosaic_kernel`."""

import functools

import jax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import mosaic_values
from pallas_kernels.mosaic_matmul import columns, scale_fours, slab
from pallas_kernels.mosaic_values import inline


def produce(
    case,
    config,
    x,
    w,
    s,
    tile,
    *,
    x_smem,
    w_smem,
    s_smem,
    x_full,
    w_full,
    x_free,
    w_free,
    **_,
):
    """Copies codes and scales a slab at a time, and the planes of x that belong to them."""
    x_smem = x_smem[1]
    size, tiles, width = slab(case, config), config.rows // 16, columns(case)
    planes, blocks, fours = size // width, size // case.span, scale_fours(case, config)
    collective = "cluster" if config.cluster > 1 else None

    slabs = tile.slabs

    def step(i, _):
        count = tile.past(i)
        slot = jax.lax.rem(count, config.w_stages)
        pl.when(count >= config.w_stages)(functools.partial(plgpu.barrier_wait, w_free.at[slot]))
        here = tile.first_slab + i  # of all slabs

        rows = pl.ds(tile.program * tiles, tiles)
        plgpu.copy_gmem_to_smem(
            tile.of_matrix(w, rows, pl.ds(here * blocks, blocks)), w_smem.at[slot], w_full.at[slot]
        )
        four = here * size // (4 * case.group_size)
        plgpu.copy_gmem_to_smem(
            tile.of_matrix(s, rows, pl.ds(four, fours)), s_smem.at[slot], w_full.at[slot]
        )
        for plane in range(planes):
            index = count * planes + plane
            slot = jax.lax.rem(index, config.x_stages)
            pl.when(index >= config.x_stages)(
                functools.partial(plgpu.barrier_wait, x_free.at[slot])
            )
            column = (here * planes + plane) * width
            plgpu.copy_gmem_to_smem(
                x.at[pl.ds(tile.m, config.tokens), pl.ds(column, width)],
                x_smem.at[slot],
                x_full.at[slot],
                collective_axes=collective,
            )
        return ()

    jax.lax.fori_loop(0, slabs, step, ())
    # Programs of a cluster end together: their barriers are signalled from outside.
    if config.cluster > 1:
        last = slabs * planes
        for index in range(max(0, last - config.x_stages), last):
            plgpu.barrier_wait(x_free.at[index % config.x_stages])
    if config.splits > 1:
        _sync_splits()
        _sync_splits()


@inline()
def _sync_splits(_):
    mosaic_values.sync_cluster()
