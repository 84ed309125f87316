"""The kernel for hundreds of rows of x and more: writes the weight out, for the vendor's matrix product.

A stream as in `matvec`; two steps of a lane are 8 neighbours of a row of the decoded weight, 16 bytes. The
writing is what takes the time.
"""

import itertools

import jax
import jax.numpy as jnp
from jax import Array

from pallas_kernels import decoding, matvec, xla_call
from pallas_kernels.case import Arrays, Case
from pallas_kernels.matvec import Config
from pallas_kernels.ptx import at, vector
from pallas_kernels.target import Target

_CONFIG = Config(tiles=1, warps=8, stages=2)


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
        num_warps=_CONFIG.warps,
        name="fdk_dequantise",
    )
    return weight


def source(case: Case, target: Target) -> str:
    """The kernel's PTX."""
    return _Writer(case, _CONFIG, target).write()


class _Writer(matvec._Writer):
    """Writes the PTX of one case."""

    def write(self) -> str:
        config, ptx = self.config, self.ptx
        ptx.share(max(16, self.decoder.shared_bytes))
        ptx.comment("locate: this lane's rows, range of K and addresses")
        self._locate()
        row_bytes = 2 * self.case.blocks * self.case.span
        row = ptx.op("add.u32", self.program_row, self.row)
        address = ptx.op("mad.wide.u32", row, row_bytes, self.operands["weight"], kind="b64")
        address = ptx.op("mad.wide.u32", self.quad, 16, address, kind="b64")
        upper = ptx.op("mad.wide.u32", self.k_warp, 2 * self.case.span, address, kind="b64")
        self.x = [upper, ptx.op("add.u64", upper, 8 * row_bytes, kind="b64")]
        buffers = [self._buffer(i) for i in range(config.stages)]
        for stage, buffer in enumerate(buffers):
            self._load(buffer, stage)
        self._set_up_decoder()
        self._loop(buffers)
        return ptx.text()

    def _names(self) -> tuple[str, ...]:
        return "packed", "scales", "codebook", "weight"

    def _decoder(self) -> decoding.Decoder:
        return decoding.decoder(self.ptx, self.case.bits, self.case.x_dtype, exact=True)

    def _multiply(self, buffer, stage: int) -> None:
        """Decodes a block and writes it."""
        [words], [scales] = buffer["words"], buffer["scales"]
        for plane in range(self.case.planes):
            factors = self._plane_factors(scales, plane)
            steps = list(self._scaled_plane(words, factors, plane))
            offset = stage * self.config.k_warps * self.case.span + plane * 64
            for half, row in itertools.product(range(2), range(2)):
                values = vector(
                    [step[row + 2 * q] for step in steps[2 * half :][:2] for q in range(2)]
                )
                place = at(self.x[row], 2 * (offset + 32 * half))
                self.ptx.do("st.global.v4.b32", place, values)

    def _turn_x(self, loads: int) -> None:
        """Nothing to do: there is no x."""
