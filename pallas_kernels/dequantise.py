"""The kernel for hundreds of rows of x and more: writes the weight out, for the vendor's matrix product.

A stream as in `matvec`; two steps of a lane are 8 neighbours of a row of the decoded weight, 16 bytes. The
writing is what takes the time.
"""

import itertools

import jax
import jax.numpy as jnp
from jax import Array

from pallas_kernels import xla_call
from pallas_kernels.case import Arrays, Case
from pallas_kernels.layout import PLANE
from pallas_kernels.registers import Register, at, vector
from pallas_kernels.target import Target
from pallas_kernels.tile_plan import TilePlan
from pallas_kernels.tile_writer import Block, TileWriter

_WARPS = 8
_STAGES = 2  # blocks in flight a warp


def matmul(case: Case, arrays: Arrays, target: Target) -> Array:
    """X [M, K] times the transpose of a planar weight, [M, N], in two steps."""
    weight = dequantise(case, arrays.packed, arrays.scales, arrays.codebook, target)
    x = case.pad(arrays.x)
    y = jax.lax.dot_general(x, weight, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32)
    y = y[:, : case.n]
    if arrays.bias is not None:
        y += arrays.bias.astype(jnp.float32)[None, :]
    return y.astype(case.out_dtype)


def dequantise(case: Case, packed: Array, scales: Array, codebook: Array, target: Target) -> Array:
    """The weight in the dtype of x, padded to whole tiles: [ceil(N / 16) * 16, blocks * span]."""
    shape = 16 * case.tiles, case.blocks * case.span
    [weight] = xla_call.ptx_call(
        source(case, target),
        (packed, scales, codebook),
        (jax.ShapeDtypeStruct(shape, case.x_dtype),),
        target,
        grid=(case.tiles,),
        num_warps=_WARPS,
        name="fdk_dequantise",
    )
    return weight


def source(case: Case, target: Target) -> str:
    """The kernel's PTX."""
    plan = TilePlan(case=case, tiles=1, warps=_WARPS, stages=_STAGES, exact=True)
    return _Writer(plan, target).write()


class _Writer(TileWriter):
    """Writes the kernel: `write` is its stages in order."""

    def __init__(self, plan: TilePlan, target: Target) -> None:
        super().__init__(plan, target, tokens=8)  # the grid has no tokens

    def write(self) -> str:
        ptx = self.ptx
        ptx.share(max(16, self.plan.decoder_bytes))
        self.locate()
        self._locate_weight()
        blocks = self.blocks_in_flight()
        ptx.comment("load: the first blocks of codes and scales")
        for stage, block in enumerate(blocks):
            self.load(block, stage)
        self.set_up_decoder()
        self.loop_over_k(blocks)
        return ptx.text()

    def _names(self) -> tuple[str, ...]:
        return "packed", "scales", "codebook", "weight"

    def _locate_weight(self) -> None:
        """Where this lane writes: 8 neighbours of row g, and of row g + 8."""
        row_bytes = 2 * self.case.blocks * self.case.span
        row = self.program_row + self.row
        address = self.operands["weight"] + row * row_bytes + self.thread_in_group * 16
        upper = address + self.k_warp * (2 * self.case.span)
        self.weight = [upper, upper + 8 * row_bytes]

    def addresses_along_k(self) -> list[Register]:
        """Where this lane writes."""
        return self.weight

    def multiply(self, block: Block, stage: int) -> None:
        """Decodes a block times its scales, and stores it instead of multiplying it."""
        [words], [scales] = block.words, block.scales
        for plane in range(self.case.planes):
            steps = list(self.decode_scaled(words, self.plane_scales(scales, plane), plane))
            offset = stage * self.plan.k_warps * self.case.span + plane * PLANE
            for half, row in itertools.product(range(2), range(2)):
                values = vector(
                    [step[row + 2 * q] for step in steps[2 * half :][:2] for q in range(2)]
                )
                address = at(self.weight[row], 2 * (offset + 32 * half))
                self.ptx.do("st.global.v4.b32", address, values)
