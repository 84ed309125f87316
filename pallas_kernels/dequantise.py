"""The kernel for hundreds of rows of x and more: writes the weight out, for the vendor's matrix product.

A stream as in `matvec`; a lane's four steps of a half plane are 8 neighbours of a row, 16 bytes, of the
decoded weight. The writing is what takes the time.
"""

import jax
import jax.numpy as jnp
from jax import Array

from pallas_kernels import matvec, triton_compat
from pallas_kernels.matvec import Case, Config
from pallas_kernels.ptx import at, vector

_CONFIG = Config(tiles=1, warps=8, stages=2)


def unsupported_reason(case: Case) -> str | None:
    """Why the kernel does not take a case, or None."""
    return matvec.unsupported_reason(case, _CONFIG)


def matmul(
    case: Case, x: Array, packed: Array, scales: Array, codebook: Array, bias: Array | None
) -> Array:
    """X [M, K] times the transpose of a planar weight, [M, N], in two steps."""
    weight = dequantise(case, packed, scales, codebook)
    if x.shape[1] != weight.shape[1]:
        x = jnp.pad(x, ((0, 0), (0, weight.shape[1] - x.shape[1])))
    y = jax.lax.dot_general(x, weight, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32)
    y = y[:, : case.n]
    if bias is not None:
        y += bias.astype(jnp.float32)[None, :]
    return y.astype(case.out_dtype)


def dequantise(case: Case, packed: Array, scales: Array, codebook: Array) -> Array:
    """The weight in the dtype of x, padded to whole tiles: [ceil(N / 16) * 16, blocks * span]."""
    return triton_compat.ptx_call(
        source(case),
        (packed, scales, codebook),
        jax.ShapeDtypeStruct((16 * case.tiles, case.blocks * case.span), case.x_dtype),
        grid=(case.tiles,),
        num_warps=_CONFIG.warps,
        name="fdk_dequantise",
    )


def source(case: Case) -> str:
    """The kernel's PTX. Operands: $1 packed, $2 scales, $3 codebook, $4 the weight."""
    return _Writer(case, _CONFIG).write()


class _Writer(matvec._Writer):
    """Writes the PTX of one case."""

    operands = matvec.Operands(packed="$1", scales="$2", codebook="$3")

    def write(self) -> str:
        config, ptx = self.config, self.ptx
        ptx.declare(f".shared .align 128 .b8 fdk_shared[{256 * self.table_row}];")
        self._locate()
        row_bytes = 2 * self.case.blocks * self.case.span
        row = ptx.op("add.u32", self.program_row, self.row)
        address = ptx.op("mad.wide.u32", row, row_bytes, "$4", kind="b64")
        address = ptx.op("mad.wide.u32", self.quad, 16, address, kind="b64")
        upper = ptx.op("mad.wide.u32", self.k_warp, 2 * self.case.span, address, kind="b64")
        self.x = [upper, ptx.op("add.u64", upper, 8 * row_bytes, kind="b64")]
        buffers = [self._buffer() for _ in range(config.stages)]
        for stage, buffer in enumerate(buffers):
            self._load(buffer, stage)
        self._fill_table()
        self._loop(buffers)
        return ptx.text()

    def _multiply(self, buffer, stage: int) -> None:
        """Decodes a block and writes it."""
        [words], [scales] = buffer["words"], buffer["scales"]
        for plane in range(self.case.planes):
            steps = self._scaled_plane(words, scales, plane)
            offset = stage * self.config.k_warps * self.case.span + plane * 64
            for i in range(4):  # an operand register: half i // 2 of the plane, upper or lower row
                values = vector([step[i] for step in steps])
                place = at(self.x[i % 2], 2 * (offset + 32 * (i // 2)))
                self.ptx.do("st.global.v4.b32", place, values)

    def _turn_x(self, loads: int) -> None:
        """Nothing to do: there is no x."""
