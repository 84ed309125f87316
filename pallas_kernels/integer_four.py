"""One token and evenly spaced codes of four bits: sums of integers, as in `integer_one`.

    sum x w = scale (first * sum x + step * sum x code)

A block of 128 weights a row is two planes. Of two words of codes a permute takes the bytes of the upper row,
another one those of the lower row; a mask leaves one code in each byte. So an operand has 32 weights of
one plane, and its columns are the high and the low bytes of their x: two of eight, the others' sums mean
nothing. A table costs three times as many instructions, and look-ups besides.
"""

import dataclasses

from pallas_kernels import integer_one, integer_plan, integer_two, ring_product
from pallas_kernels.layout import PLANE, TILE_ROWS, scale_offset
from pallas_kernels.registers import Register, at, vector, wide

_INTEGERS = 2 * PLANE  # bytes of the integers of a plane of x: the high ones, then the low ones
_MASK = "0x0f0f0f0f"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan(integer_plan.Plan):
    """A product by integers, of four bits."""

    ahead = 4  # it waits for memory, which by two slots would stand still

    @property
    def scale_runs(self) -> int:
        """Groups of a row of a block."""
        return max(1, self.case.span // self.case.group_size)

    def areas(self) -> dict[str, int]:
        """Integers, scales and sums of x, and codebooks."""
        return super().areas() | {"integers": self.case.blocks * self.case.planes * _INTEGERS}


class Product(integer_two.Product):
    """Writes a product by integers, of four bits."""

    plan_class = Plan
    plan: Plan
    divisor = 1

    # Before the loop: x

    def paired(self, x: list[Register]) -> list[tuple[Register, Register]]:
        """Neighbours: their codes are the two of a byte."""
        return list(zip(x[::2], x[1::2], strict=True))

    def _locate_bytes(self) -> None:
        """Nothing: an operand has codes of one plane."""

    def _operands(self, pairs: list[list[Register]]) -> tuple[list[Register], list[Register]]:
        """Words of the high and of the low bytes: the first of four neighbouring pairs, then the second."""
        ptx, high, low = self.ptx, [], []
        for start in range(0, len(pairs), 4):
            for values in zip(*pairs[start : start + 4], strict=True):
                # Both low bytes, then both high ones.
                halves = [ptx.op("prmt.b32", *values[i : i + 2], "0x5140") for i in range(0, 4, 2)]
                low.append(ptx.op("prmt.b32", *halves, "0x5410") ^ "0x80808080")
                high.append(ptx.op("prmt.b32", *halves, "0x7632"))
        return high, low

    def _store_integers(self, block: Register, high: list[Register], low: list[Register]) -> None:
        """Stores a plane's high bytes, then its low ones; each lane both of its halves, or one."""
        ptx = self.ptx
        plane = block * (integer_plan.CHUNK // PLANE) + self.plane
        address = self.shared + plane * _INTEGERS + self.thread_in_group * 16
        if self.plan.sharers > 1:
            address = address + self.half * 8
        for i, words in enumerate((high, low)):
            width, part = wide(words)
            offset = self.offsets["integers"] + i * PLANE
            ptx.do(f"st.shared{width}.b32", at(address, offset), part)

    # The loop over the program's blocks

    def start_run(self, run: int) -> None:
        """Where this lane's operands are."""
        if run:
            return
        ptx = self.ptx
        # The first two columns have the high and the low bytes.
        self.has_column = self.row < 2
        self.integers = self.shared + self.row * PLANE + self.thread_in_group * 16
        self.codes = self.codes_in_slot()
        self.locate_scales()
        self.zero = ptx.op("mov.u32", 0)
        self.partial = self.shared + self.warp * (4 * TILE_ROWS) + self.row * 8
        self.keeps = self.thread_in_group.eq(0)
        self.first, *self.steps = ptx.registers("f32", 2)

    def first_scales(self) -> Register:
        """Where in a slot the scales of the first group are: each lane has weights of all."""
        return ring_product.Product.first_scales(self)

    def _set_steps(self, steps: list[Register]) -> None:
        """Nothing: all codes stand at the same bits."""

    def load_x(self, block: Register) -> None:
        """Of each plane the integers, for the lanes of the columns that have them, the scale and the sums."""
        ptx, planes, size = self.ptx, self.case.planes, self.plan.sums_bytes
        integers = self.integers + block * (planes * _INTEGERS)
        sums = self.shared + block * (planes * size)
        self.x = []
        for plane in range(planes):
            words = ptx.registers("b32", 4)
            source = at(integers, self.offsets["integers"] + plane * _INTEGERS)
            ptx.do("ld.shared.v4.b32", vector(words), source, when=self.has_column)
            found = ptx.registers("b32", size // 4)
            width, values = wide(found)
            source = at(sums, self.offsets["plane_sums"] + plane * size)
            ptx.do(f"ld.shared{width}.b32", values, source)
            self.x.append((words, *self.scales_and_sums(found)))

    def _load_factors(self, scales: Register) -> None:
        """The scales of the upper and the lower row of each group, from where this lane's first ones are."""
        plan = self.plan
        self.factors = [
            self._load_pair(at(scales, self.scales_offset + scale_offset(run, plan.scale_bytes)))
            for run in range(plan.scale_runs)
        ]

    def multiply(self) -> None:
        """Adds the products of both planes to the totals."""
        parts = self.plan.parts
        for plane, (x, scales, wholes) in enumerate(self.x):
            for part, (scale, whole) in enumerate(zip(scales, wholes, strict=True)):
                halves = range(2) if parts == 1 else (part,)
                run = (2 * plane + part) * self.plan.scale_runs // (2 * self.case.planes)
                self._multiply_halves(plane, halves, x, self.factors[run], scale, whole)

    def _multiply_halves(
        self, plane: int, halves, x: list[Register], factors, scale: Register, whole: Register
    ) -> None:
        """Adds the part of halves of a plane to the sums of its rows."""
        ptx, sums = self.ptx, self.ptx.registers("b32", 4)
        for i, half in enumerate(halves):
            words = self.words[4 * plane + 2 * half : 4 * plane + 2 * half + 2]
            rows = [ptx.op("prmt.b32", *words, every) for every in ("0x6420", "0x7531")]
            codes = [row & _MASK for row in rows] + [(row >> 4) & _MASK for row in rows]
            start = vector(sums if i else [self.zero] * 4)
            operand = vector(x[2 * half : 2 * half + 2])
            ptx.do(integer_one.MULTIPLY, vector(sums), vector(codes), operand, start)
        base = whole * self.first
        for row, (total, factor) in enumerate(zip(self.totals, factors, strict=True)):
            value = ptx.op("cvt.rn.f32.s32", integer_one.join(*sums[2 * row : 2 * row + 2]))
            value = ptx.op("fma.rn.f32", self.steps[0], value, base)
            ptx.do("fma.rn.f32", total, factor * scale, value, total)

    def store_totals(self, tile: Register) -> None:
        """Stores the sums, which the lanes of the first two columns have."""
        address = self.partial + tile * (self.consumers * 4 * TILE_ROWS)
        target = at(address, self.offsets["partial"])
        self.ptx.do("st.shared.v2.b32", target, vector(self.totals), when=self.keeps)
