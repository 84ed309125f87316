"""The end of a product: from its float32 sums to memory, with the norm before it and the residual after it.

A norm needs the mean square of all of a sum, which no program of the launch that adds it knows. So a product
with a residual leaves the squares in parts, and the next one divides its results by the root of their mean.
"""

from collections.abc import Sequence
from typing import NamedTuple

from pallas_kernels import decoding
from pallas_kernels.case import Case
from pallas_kernels.ptx import Ptx, Writer, load_float, over_lanes, store_float
from pallas_kernels.registers import Memory, Register, at, wide
from pallas_kernels.target import Target


class Load(NamedTuple):
    """A load of an input: its registers, from where, and under which predicate."""

    registers: list[Register]
    source: Memory
    when: Register | None = None


class OutputWriter(Writer):
    """Writes what the kernels share: a program's threads take one output after another."""

    decoder: decoding.Decoder
    load_opcode = "ld.global.nc"  # what another launch has left

    def __init__(
        self,
        case: Case,
        target: Target,
        ptx: Ptx | None = None,
        operands: dict[str, Register] | None = None,
    ) -> None:
        self.case, self.target, self.ptx = case, target, ptx or Ptx(target)
        self.operands = operands or self.ptx.operands(*self._names())

    def _names(self) -> tuple[str, ...]:
        """Names of the kernel's operands and results, in order."""
        return self.case.operands

    def _row(self, name: str) -> Register:
        """The address of an input that another product may have left."""
        return self.operands[name]

    def _load(self, load: Load) -> None:
        """Starts to load a part of such an input."""
        width, registers = wide(load.registers)
        kind = "f32" if load.registers[0].kind == "f32" else "b32"
        self.ptx.do(f"{self.load_opcode}{width}.{kind}", registers, load.source, when=load.when)

    def _settle(self, loads: Sequence[Load]) -> None:
        """What is to be done before what was loaded is used: nothing, if it was there."""

    def _add_squares(self, warp: int, offset: int) -> None:
        """Adds the squares that the launch before this one has left: a warp does, into shared memory."""
        ptx, count = self.ptx, self.case.squares
        is_owner = self.warp.eq(warp)
        ptx.do("bra", "fdk_no_squares", when=~is_owner)
        total, loads = ptx.zero(), []
        address = self._row("squares") + self.lane * 4
        parts = ptx.registers("f32", -(-count // 32))
        for i, part in enumerate(parts):
            ptx.do("mov.f32", part, 0.0)
            in_bounds = self.lane < min(count - 32 * i, 32)
            loads.append(Load([part], at(address, 128 * i), in_bounds))
            self._load(loads[-1])
        self._settle(loads)
        for part in parts:
            ptx.do("add.f32", total, total, part)
        total = over_lanes(ptx, "add.f32", total)
        first = self.lane.eq(0)
        ptx.do("st.shared.f32", at(self.shared, offset), total, when=first)
        ptx.label("fdk_no_squares")

    def _load_residual(self, row: Register) -> list[Register]:
        """Starts loading what an output is added to and scaled by: at the end it would be waited for."""
        ptx, case = self.ptx, self.case
        row = ptx.op("min.u32", row, case.n - 1)
        arrays = self.operands["residual"], self.operands["norm_scale"]
        return [
            load_float(ptx, array, row, case.x_dtype, opcode=self.load_opcode) for array in arrays
        ]

    def _normalise(self, total: Register, offset: int) -> Register:
        """Divides a result by the root of the mean square; the squares' sum is at `offset` in shared memory."""
        ptx, case = self.ptx, self.case
        squares = ptx.op("ld.shared.f32", at(self.shared, offset))
        constants = 1 / case.k, float(case.norm_eps)
        mean = ptx.op("fma.rn.f32", squares, *constants)
        inverse = ptx.op("rsqrt.approx.f32", mean)
        return total * inverse

    def _add_bias(self, total: Register, row: Register) -> None:
        bias = load_float(self.ptx, self.operands["bias"], row, self.case.bias_dtype)
        self.ptx.do("add.f32", total, total, bias)

    def _store_sum(
        self, total: Register, row: Register, residual: list[Register], squares: Register
    ) -> None:
        """Adds the residual, stores the sum and the sum times the scale, and adds its square to `squares`."""
        ptx, (addend, scale) = self.ptx, residual
        total = total + addend
        total = decoding.unpack(ptx, self.decoder.pack(total, total), self.case.x_dtype)[0]
        ptx.do("fma.rn.f32", squares, total, total, squares)
        scaled = total * scale
        self._store(scaled, row, "scaled")
        self._keep_sum(total, row)

    def _keep_sum(self, total: Register, row: Register) -> None:
        """Stores the residual stream after a product."""
        self._store(total, row, "sum")

    def _store(
        self, value: Register, row: Register, name: str, token: Register | None = None
    ) -> None:
        """Stores a result, of a token if there are several."""
        ptx, size, base = self.ptx, self.case.out_bytes, self.operands[name]
        if token is not None:
            index = (token * self.case.n).wide()
            base = ptx.op("mad.lo.u64", index, size, base)
        address = base + row * size
        store_float(ptx, address, value, self.case.out_dtype)

    def _store_squares(self, total: Register, warps: int) -> None:
        """Each of the warps with outputs stores the sum of their squares."""
        ptx = self.ptx
        total = over_lanes(ptx, "add.f32", total)
        part = self.warp + ptx.op("mov.u32", "%ctaid.x") * warps
        self._store_part(part, total, warps)

    def _store_part(self, part: Register, total: Register, warps: int) -> None:
        """The first lanes of the warps with outputs store a sum of squares."""
        ptx, address = self.ptx, self.operands["squares_out"] + part * 4
        in_bounds = self._stores_part(warps)
        ptx.do("st.global.f32", at(address), total, when=in_bounds)

    def _stores_part(self, warps: int) -> Register:
        """Whether this is the first lane of a warp with outputs."""
        first = self.lane.eq(0)
        writer = self.ptx.op("selp.b32", self.warp, warps, first)
        return writer < warps
