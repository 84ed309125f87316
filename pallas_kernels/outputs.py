"""The end of a product: from its float32 sums to memory, with the norm before it and the residual behind it.

A norm needs the mean square of all of a sum, which no program of the launch that adds it knows. So a product
with a residual leaves the squares in parts, and the next one divides its results by the root of their mean.
"""

from pallas_kernels import decoding
from pallas_kernels.case import Case
from pallas_kernels.ptx import (
    Ptx,
    Writer,
    at,
    float_constant,
    load_float,
    over_lanes,
    store_float,
)
from pallas_kernels.target import Target


class OutputWriter(Writer):
    """Writes what the kernels share: a program's threads take its outputs in turns."""

    decoder: decoding.Decoder
    load = "ld.global.nc"  # what another launch has left

    def __init__(
        self,
        case: Case,
        target: Target,
        ptx: Ptx | None = None,
        operands: dict[str, str] | None = None,
    ) -> None:
        self.case, self.target, self.ptx = case, target, ptx or Ptx(target)
        self.operands = operands or {name: f"${i}" for i, name in enumerate(self._names(), 1)}

    def _names(self) -> tuple[str, ...]:
        """Names of the kernel's operands and results, in order."""
        return self.case.operands

    def _add_squares(self, warp: int, place: int) -> None:
        """Adds the squares that the launch before this one has left: a warp does, into shared memory."""
        ptx, count = self.ptx, self.case.squares
        is_owner = ptx.op("setp.eq.u32", self.warp, warp, kind="pred")
        ptx.do("bra", "fdk_no_squares", when=f"!{is_owner}")
        total = ptx.op("mov.f32", float_constant(0.0), kind="f32")
        address = ptx.op("mad.wide.u32", self.lane, 4, self.operands["squares"], kind="b64")
        parts = ptx.registers("f32", -(-count // 32))
        for i, part in enumerate(parts):
            ptx.do("mov.f32", part, float_constant(0.0))
            in_bounds = ptx.op("setp.lt.u32", self.lane, min(count - 32 * i, 32), kind="pred")
            ptx.do(f"{self.load}.f32", part, at(address, 128 * i), when=in_bounds)
        for part in parts:
            ptx.do("add.f32", total, total, part)
        total = over_lanes(ptx, "add.f32", total)
        first = ptx.op("setp.eq.u32", self.lane, 0, kind="pred")
        ptx.do("st.shared.f32", at(self.shared, place), total, when=first)
        ptx.label("fdk_no_squares")

    def _load_residual(self, row: str) -> list[str]:
        """Starts loading what an output is added to and scaled by: at the end it would be waited for."""
        ptx, case = self.ptx, self.case
        row = ptx.op("min.u32", row, case.n - 1)
        arrays = self.operands["residual"], self.operands["norm_scale"]
        return [load_float(ptx, array, row, case.x_dtype, opcode=self.load) for array in arrays]

    def _normalise(self, total: str, place: int) -> str:
        """Divides a result by the root of the mean of the squares, whose sum is in a place in shared memory."""
        ptx, case = self.ptx, self.case
        squares = ptx.op("ld.shared.f32", at(self.shared, place), kind="f32")
        constants = float_constant(1 / case.k), float_constant(case.norm_eps)
        mean = ptx.op("fma.rn.f32", squares, *constants, kind="f32")
        inverse = ptx.op("rsqrt.approx.f32", mean, kind="f32")
        return ptx.op("mul.f32", total, inverse, kind="f32")

    def _add_bias(self, total: str, row: str) -> None:
        bias = load_float(self.ptx, self.operands["bias"], row, self.case.bias_dtype)
        self.ptx.do("add.f32", total, total, bias)

    def _store_sum(self, total: str, row: str, residual: list[str], squares: str) -> None:
        """Adds the residual, stores the sum and the sum times the scale, and adds its square to `squares`."""
        ptx, (addend, scale) = self.ptx, residual
        total = ptx.op("add.f32", total, addend, kind="f32")
        total = decoding.unpack(ptx, self.decoder.pack(total, total), self.case.x_dtype)[0]
        ptx.do("fma.rn.f32", squares, total, total, squares)
        scaled = ptx.op("mul.f32", total, scale, kind="f32")
        self._store(scaled, row, "scaled")
        self._store(total, row, "sum")

    def _store(self, value: str, row: str, name: str, token: str | None = None) -> None:
        """Stores a result, of a token if there are several."""
        ptx, size, place = self.ptx, self.case.out_bytes, self.operands[name]
        if token is not None:
            index = ptx.op("mul.wide.u32", token, self.case.n, kind="b64")
            place = ptx.op("mad.lo.u64", index, size, place, kind="b64")
        address = ptx.op("mad.wide.u32", row, size, place, kind="b64")
        store_float(ptx, address, value, self.case.out_dtype)

    def _store_squares(self, total: str, warps: int) -> None:
        """Each of the warps with outputs stores the sum of their squares."""
        ptx = self.ptx
        total = over_lanes(ptx, "add.f32", total)
        place = ptx.op("mad.lo.u32", ptx.op("mov.u32", "%ctaid.x"), warps, self.warp)
        address = ptx.op("mad.wide.u32", place, 4, self.operands["squares_out"], kind="b64")
        first = ptx.op("setp.eq.u32", self.lane, 0, kind="pred")
        writer = ptx.op("selp.b32", self.warp, warps, first)
        in_bounds = ptx.op("setp.lt.u32", writer, warps, kind="pred")
        ptx.do("st.global.f32", at(address), total, when=in_bounds)
