"""The kernel for many rows of x: weight codes become operand registers of `wgmma`, in Pallas' Mosaic GPU.

Each compute warpgroup decodes 64 rows of the weight into registers, x comes by bulk tensor copies into shared
memory from a producer warpgroup, the sums stay in registers over the whole of K. Scales multiply the decoded
weights, which are rounded as a dequantised weight would be.

Glossary: T tokens a program (`Config.tokens`); a plane is 64 columns of K; a slab the planes whose codes and
scales are copied at once.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import mosaic_results, mosaic_sums, mosaic_tiles, mosaic_values
from pallas_kernels.case import Arrays, Case
from pallas_kernels.mosaic_decoding import Decoder
from pallas_kernels.mosaic_matmul import (
    GROUP_ROWS,
    Config,
    columns,
    scale_fours,
    schedule,
    slab,
)
from pallas_kernels.mosaic_producer import produce
from pallas_kernels.mosaic_tiles import Tile
from pallas_kernels.mosaic_values import SCALAR, U32, inline

_TILES = GROUP_ROWS // 16
_PRODUCER_REGISTERS = 40


class _Warpgroup(NamedTuple):
    """Which of those that compute it is: of all, of those with rows of their own, of those of its rows."""

    number: Any
    row_group: Any
    k_group: Any

    @classmethod
    def of(cls, config: Config, number: Any) -> "_Warpgroup":
        """The warpgroup of a number."""
        return cls(number, jax.lax.rem(number, config.row_groups), number // config.row_groups)


# A function of its own in the program: products of equal shapes are lowered and compiled once.
@functools.partial(jax.jit, static_argnums=(0, 1))
def matmul(
    case: Case,
    config: Config,
    arrays: Arrays,
    group_sizes: Array | None = None,
    factors: tuple[Array, Array] | None = None,
) -> Array:
    """X [M, K] times the transpose of a planar weight: [M, N].

    Args:
        case: the product; of one matrix and all rows, if there are groups.
        config: launch configuration.
        arrays: x and the weight; with `group_sizes` stacked weights and biases.
        group_sizes: int32 [E], consecutive rows for each matrix; or None.
        factors: of integers (x is int8): float32 [M, filled up to whole programs] of rows of x and [N] of the
            weight, see `mosaic_integers`.
    """
    programs_n = -(-case.n // config.rows)
    tiles_m, lead = -(-case.m // config.tokens), ()
    if group_sizes is not None:
        # At most: whole tiles, a last one for each group with rows, and one past them all.
        lead = group_sizes.shape
        tiles_m = case.m // config.tokens + min(*lead, case.m) + 1
    has_bias = arrays.bias is not None
    out: Any = jax.ShapeDtypeStruct((case.m, case.n), case.out_dtype)
    body = functools.partial(_kernel, case, config, lead, has_bias, factors is not None)
    grid, names = (tiles_m, -(-programs_n // config.cluster)), ("m", "n")
    if config.programs:
        if group_sizes is not None or factors is not None:
            raise ValueError(f"groups and integers have no persistent programs: {config.programs=}")
        given = config.programs * config.row_groups, GROUP_ROWS * config.tokens
        out = out, jax.ShapeDtypeStruct(given, jnp.float32)
        body = functools.partial(_persistent, case, config, has_bias)
        grid, names = (config.programs,), ("program",)
    kernel = plgpu.kernel(
        body,
        out_type=out,
        grid=grid,
        grid_names=names,
        scratch_types=_scratch(case, config),
        num_threads=config.warpgroups + 1,
        thread_name="wg",
        compiler_params=plgpu.CompilerParams(
            lowering_semantics=plgpu.LoweringSemantics.Lane,
            unsafe_no_auto_barriers=True,
            reduction_scratch_bytes=16,
        ),
        cluster=(config.cluster * config.splits,),
        cluster_names=("cluster",),
    )
    # The 1 KiB of a tile of a block as 8 lines of 128 bytes.
    packed = arrays.packed.reshape(*lead, case.tiles, case.blocks, 8, 64)
    operands = (arrays.x, packed, arrays.scales, arrays.codebook.reshape(-1))
    operands += () if arrays.bias is None else (arrays.bias.reshape(-1),)
    operands += factors or ()
    if config.programs:
        return kernel(*operands)[0]
    return kernel(*operands, *(() if group_sizes is None else (group_sizes,)))


def _scratch(case: Case, config: Config) -> dict[str, Any]:
    swizzle = plgpu.SwizzleTransform(128)
    tiles = _TILES * config.row_groups
    x_shape = config.x_stages, config.tokens, columns(case)
    # The same bytes: `wgmma` reads tiles of 8 rows, copies of any number of rows know none.
    views = [
        plgpu.SMEM(x_shape, case.x_dtype, transforms=t)
        for t in (mosaic_results.x_transforms(case), (swizzle,))
    ]
    if case.x_dtype != case.out_dtype:  # outputs take the place of x
        views.append(plgpu.SMEM((*x_shape[:2], GROUP_ROWS), case.out_dtype, transforms=(swizzle,)))
    users = config.row_groups  # warpgroups that read a plane of x
    free = plgpu.Barrier
    if config.splits == 1 and not config.programs:
        free = functools.partial(plgpu.ClusterBarrier, collective_axes=("cluster",))
    return dict(
        x_smem=plgpu.RefUnion(*views),
        w_smem=plgpu.SMEM(
            (config.w_stages, tiles, slab(case, config) // case.span, 8, 64),
            jnp.uint16,
            transforms=(swizzle,),
        ),
        s_smem=plgpu.SMEM(
            (config.w_stages, tiles, scale_fours(case, config), 64), case.scale_dtype
        ),
        table=plgpu.SMEM((max(16, Decoder.of(case).table_bytes) // 4,), jnp.uint32),
        x_full=plgpu.Barrier(num_barriers=config.x_stages),
        w_full=plgpu.Barrier(num_arrivals=2, num_barriers=config.w_stages),
        x_free=free(num_arrivals=users, num_barriers=config.x_stages),
        w_free=plgpu.Barrier(num_arrivals=config.warpgroups, num_barriers=config.w_stages),
    )


def _kernel(
    case: Case, config: Config, lead, has_bias, has_factors, x, w, s, codebook, *refs, **scratch
):
    bias, y = refs[:1] if has_bias else (), refs[-1]
    factors = refs[-3:-1] if has_factors else ()
    slabs = -(-case.k // slab(case, config))
    split = jax.lax.axis_index("cluster") if config.splits > 1 else 0
    per_split = -(-slabs // config.splits)
    first = split * per_split
    part = first, jnp.minimum(per_split, slabs - first) if config.splits > 1 else slabs
    program = jax.lax.axis_index("n")
    if config.cluster > 1:
        program = program * config.cluster + jax.lax.axis_index("cluster")
    visit = jax.lax.axis_index("m")
    warpgroup = jax.lax.axis_index("wg")

    def run(tile: Tile) -> None:
        def consume():
            own = _Warpgroup.of(config, warpgroup)
            _set_up(case, config, codebook, tile, scratch["table"])
            total = _multiply(case, config, tile, own, **scratch)
            _end(case, config, total, bias, factors, y, tile, own, **scratch)

        copy = functools.partial(produce, case, config, x, w, s, tile, **scratch)
        _specialise(config, warpgroup, copy, consume)

    if not lead:
        run(Tile(visit * config.tokens, None, program, None, *part))
        return
    group, m, rows = _find(case, config, refs[-2], visit, *lead)
    pl.when((rows > 0) & (group < lead[0]))(lambda: run(Tile(m, rows, program, group, *part)))
    pl.when((rows > 0) & (group == lead[0]) & (warpgroup < config.row_groups) & (split == 0))(
        lambda: mosaic_results.copy_rows(
            config.tokens, None, y, m, rows, _first_row(config, program, warpgroup)
        )
    )


def _persistent(case: Case, config: Config, has_bias, x, w, s, codebook, *refs, **scratch):
    """The kernel of programs with a loop over tiles and parts of tiles, see `mosaic_schedule`."""
    bias, (y, sums) = refs[:1] if has_bias else (), refs[-2:]
    # Zero at the start, of this launch alone, and zero again at its end.
    flags = pl.get_global(plgpu.SemaphoreType.REGULAR((config.programs * config.row_groups,)))
    program, plan = jax.lax.axis_index("program"), schedule(case, config)
    warpgroup = jax.lax.axis_index("wg")
    along_n = -(-case.n // config.rows)

    def for_each(body) -> None:
        """Calls `body` with each piece of the program that has slabs, as a piece and as a tile."""

        def run(step, before):
            piece = plan.piece(program, step)
            place = piece.tile // along_n * config.tokens, None, piece.tile % along_n, None
            tile = Tile(*place, piece.first, piece.slabs, before)
            pl.when(piece.slabs > 0)(lambda: body(piece, tile))
            return before + piece.slabs

        steps = plan.steps()
        jax.lax.fori_loop(steps.start, steps.stop, run, jnp.int32(0))

    def consume() -> None:
        own = _Warpgroup.of(config, warpgroup)
        _set_up(case, config, codebook, Tile(0, None, 0, None, 0, 0), scratch["table"])

        def compute(piece, tile):
            total = _multiply(case, config, tile, own, **scratch)
            mosaic_results.end_piece(
                case, config, plan, piece, total, (bias, y, sums, flags), tile, program, **scratch
            )

        for_each(compute)

    def copy() -> None:
        for_each(lambda _, tile: produce(case, config, x, w, s, tile, **scratch))

    _specialise(config, warpgroup, copy, consume)


def _specialise(config: Config, warpgroup, copy, consume) -> None:
    """What the producer does, and what the warpgroups that compute do."""

    @pl.when(warpgroup == config.warpgroups)
    def _():
        plgpu.set_max_registers(_PRODUCER_REGISTERS, action="decrease")
        copy()

    @pl.when(warpgroup < config.warpgroups)
    def _():
        plgpu.set_max_registers(_registers(config.warpgroups), action="increase")
        consume()


def _find(case: Case, config: Config, sizes, visit, groups: int):
    """Group, first row and number of rows of a tile of a grouped product."""
    found = plgpu.ShapeDtypeStruct((), jnp.int32, layout=SCALAR)

    @inline(arg_types=(plgpu.RefType(), SCALAR), return_type=(found,) * 3)
    def find(_, sizes, visit):
        results = mosaic_tiles.find_tile(
            sizes,
            U32(visit.registers.item()),
            groups=groups,
            tokens=config.tokens,
            rows=case.m,
        )
        return tuple(mosaic_values.scalar(result) for result in results)

    return find(sizes, jnp.int32(visit))


def _first_row(config: Config, program, row_group):
    """The first row of the weight that a warpgroup computes."""
    return program * config.rows + row_group * GROUP_ROWS


def _registers(warpgroups: int) -> int:
    """Registers of a thread that computes: what a program starts with, less the producer's.

    A program that asks for more than there are waits for ever.
    """
    at_start = 64 * 1024 // (128 * (warpgroups + 1)) // 8 * 8
    all_of_them = at_start * (warpgroups + 1) - _PRODUCER_REGISTERS
    return min(240, all_of_them // warpgroups // 8 * 8)


@inline(arg_types=(SCALAR,))
def _take_turn(_, warpgroup):
    mosaic_values.take_turn(U32(warpgroup.registers.item()))


@inline(arg_types=(SCALAR,))
def _give_turn(_, warpgroup):
    mosaic_values.give_turn(U32(warpgroup.registers.item()))


def _set_up(case: Case, config: Config, codebook, tile: Tile, table) -> None:
    """Fills the table of values for a tile's rows."""
    decoder = Decoder.of(case)

    @inline(arg_types=(plgpu.RefType(), plgpu.RefType(), SCALAR))
    def set_up(_, codebook, table, codebook_index):
        decoder.set_up(
            codebook, table, U32(codebook_index.registers.item()), 128 * config.warpgroups
        )

    codebook_index = tile.program * config.rows // (case.n // case.codebooks)
    codebook_index = jnp.minimum(codebook_index, case.codebooks - 1)
    if tile.group is not None:
        codebook_index += tile.group * case.codebooks
    set_up(codebook, table, jnp.int32(codebook_index))


def _multiply(
    case,
    config,
    tile,
    own_group,
    *,
    x_smem,
    w_smem,
    s_smem,
    table,
    x_full,
    w_full,
    x_free,
    w_free,
):
    """The sums of a warpgroup. It decodes a plane while the products of the one before are under way."""
    x_smem = x_smem[0]
    size, width, decoder = slab(case, config), columns(case), Decoder.of(case)
    planes = size // width
    slabs, step = tile.slabs, config.k_groups
    warpgroup, row_group, k_group = own_group

    integers = case.x_dtype == jnp.int8
    layout = plgpu.Layout.WGMMA_8BIT if integers else plgpu.Layout.WGMMA
    a_type = plgpu.ShapeDtypeStruct((GROUP_ROWS, width), case.x_dtype, layout=layout)
    refs = plgpu.RefType((plgpu.SwizzleTransform(128),)), plgpu.RefType(), plgpu.RefType()

    @inline(arg_types=(*refs, SCALAR, SCALAR), return_type=a_type)
    def decode(_, codes, scales, table, group, plane):
        numbers = (U32(value.registers.item()) for value in (group, plane))
        return decoder.plane(codes, scales, table, *numbers)

    # Decoding 8 bits takes the longest. Two warpgroups ask for products in turns, so that one decodes while
    # those of the other are under way: else both would decode at once, and the tensor cores would idle.
    kept = mosaic_results.kept_planes(config)
    turns = case.bits == 8 and not integers and config.warpgroups == 2
    own, other = jnp.int32(warpgroup), jnp.int32(1 - warpgroup)
    if turns:
        pl.when(warpgroup == 1)(lambda: _give_turn(other))

    def body(acc):
        def multiply(i, _):
            w_slot = jax.lax.rem(tile.past(i), config.w_stages)
            plgpu.barrier_wait(w_full.at[w_slot])
            # The scales start with four groups; the slab with this one of them.
            group = jax.lax.rem((tile.first_slab + i) * size // case.group_size, 4)
            tiles = pl.ds(row_group * _TILES, _TILES)
            slot_refs = w_smem.at[w_slot, tiles], s_smem.at[w_slot, tiles], table
            for first in range(0, planes, step):
                plane = first + (k_group if step > 1 else 0)
                index = i * planes + plane
                a = decode(*slot_refs, jnp.int32(group), jnp.int32(plane))
                slot = jax.lax.rem(tile.past(index, planes), config.x_stages)
                plgpu.barrier_wait(x_full.at[slot])
                if turns:
                    _take_turn(own)
                plgpu.wgmma(acc, a, x_smem.at[slot].transpose((1, 0)))
                if turns:
                    _give_turn(other)
                # The products of the plane before: what they read may be written now.
                plgpu.wgmma_wait(1)

                over = index >= step
                if kept:
                    over &= index <= slabs * planes - kept

                @pl.when(over)
                def _():
                    before = tile.past(index - step, planes)  # noqa: B023
                    plgpu.barrier_arrive(x_free.at[jax.lax.rem(before, config.x_stages)])

            plgpu.barrier_arrive(w_free.at[w_slot])
            return ()

        jax.lax.fori_loop(0, slabs, multiply, ())
        if turns:
            pl.when(warpgroup == 0)(lambda: _take_turn(own))  # the last one it was given
        plgpu.wgmma_wait(0)
        if not kept:
            last = slabs * planes - step + k_group
            plgpu.barrier_arrive(x_free.at[jax.lax.rem(last, config.x_stages)])
        return acc[...]

    sum_dtype = jnp.int32 if integers else jnp.float32
    return pl.run_scoped(body, plgpu.ACC((GROUP_ROWS, config.tokens), sum_dtype))


def _end(case, config, total, bias, factors, y, tile, own, *, x_smem, table, **_) -> None:
    """Adds the sums of warpgroups and programs that share K, and writes the tile."""
    x_smem, x_flat = x_smem[0], x_smem[-1]
    warpgroup, row_group, k_group = own
    first_row = _first_row(config, tile.program, row_group)
    if config.k_groups == config.splits == 1:
        mosaic_results.write(
            case, config, total, bias, factors, y, tile, first_row, x_flat, row_group, table
        )
        return
    whole, split = plgpu.RefType(mosaic_results.x_transforms(case)), jnp.int32(0)
    tokens = config.tokens
    if config.splits > 1:
        tokens = mosaic_sums.own_tokens(tokens)
        split = jax.lax.axis_index("cluster")
        tile = tile.from_row(split * (config.tokens - tokens))
    sums = plgpu.ShapeDtypeStruct((GROUP_ROWS, tokens), total.dtype, layout=plgpu.Layout.WGMMA)

    @inline(arg_types=(whole, plgpu.Layout.WGMMA, SCALAR, SCALAR), return_type=sums)
    def add(_, x_smem, total, *numbers):
        warpgroup, split = (U32(number.registers.item()) for number in numbers)
        return mosaic_sums.add_over_k(
            x_smem,
            total,
            warpgroup,
            config.row_groups,
            config.k_groups,
            split if config.splits > 1 else None,
        )

    total = add(x_smem, total, jnp.int32(warpgroup), split)

    @pl.when(k_group == 0)
    def _():
        slot = 2 * (config.warpgroups - config.row_groups) + row_group
        mosaic_results.write(
            case, config, total, bias, (), y, tile, first_row, x_flat, slot, table, sync=False
        )
