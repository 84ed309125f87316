"""`integer_one` for groups of 16: quarters of a plane, each with a sum of its own.

An instruction adds up the products of four lanes, two of which have weights of one quarter and two of the next
one. So columns are the high and low bytes of x for both quarters, of both planes whose codes an operand has:
lanes that are not of a column's quarter have zeros there. As in `integer_tokens` all columns are of use, and
the operands of x are others for planes 0 and 2 than for planes 1 and 3.

Column 4 i + 2 j + h is of the plane i of the two, the quarter j of the half, and the byte h (0: high).
"""

from pallas_kernels import integer_one
from pallas_kernels.integer_plan import INTEGERS, PLANES
from pallas_kernels.layout import FOUR_SCALES, PLANE, SCALE_GROUPS, scale_offset
from pallas_kernels.registers import Register, at, vector

GROUP = PLANE // 4


class Product(integer_one.Product):
    """Writes a product by integers whose groups are quarters of a plane."""

    units = 4  # of a lane's sums: of both rows, of planes 0 and 2, then of planes 1 and 3

    # Before the loop: x

    def _summed(self) -> tuple[int, ...]:
        """Two lanes have the x of a quarter."""
        return (1,)

    # The loop over the program's blocks

    def _locate_integers(self) -> None:
        """Where the x of the lane's column are, if its weights are of the column's quarter; and its sums."""
        ptx = self.ptx
        column = self.shared + (self.row >> 2) * (2 * INTEGERS // 8) + (self.row & 1) * 64
        self.integers = column + self.thread_in_group * 16
        self.is_of_quarter = ((self.row >> 1) & 1).eq(self.thread_in_group >> 1)
        # What is not loaded stays zero.
        self.x_words = [ptx.op("mov.u32", 0) for _ in range(16)]
        planes = (self.thread_in_group >> 1) * (2 * self.plan.sums_bytes)
        self.plane_sums = self.shared + planes + (self.thread_in_group & 1) * 16

    def _locate_sums(self) -> None:
        """Of which row the lane keeps the sum in the end."""
        self.higher = (self.thread_in_group & 1).ne(0)

    def first_scales(self) -> Register:
        """Where in a slot the scales of this lane's first quarter are: a plane has a four of groups."""
        size = self.plan.scale_bytes
        scales = (self.warp * self.plan.block_scales).low() + self.row * (8 * size)
        scales = scales + (self.thread_in_group >> 1) * (2 * FOUR_SCALES * size)
        return scales + (self.thread_in_group & 1) * (2 * size)

    def _set_steps(self, steps: list[Register]) -> None:
        """What a unit of the sums is: of a lower row's codes half, of planes 1 and 3 a sixteenth as much."""
        for i, scale in enumerate((1 / 2, 1 / 16, 1 / 32), 1):
            self.ptx.do("mul.f32", steps[i], steps[0], scale)

    def load_x(self, block: Register) -> None:
        """Where the integers of a block of x, their scales and sums are: of all at once there are too many."""
        fours = self.plan.fours
        self.block_integers = self.integers + block * (fours * INTEGERS)
        self.block_sums = self.plane_sums + block * (fours * PLANES * self.plan.sums_bytes)

    def _load_four(self, four: int) -> list[tuple[list[Register], list[Register]]]:
        """Loads four planes of x; of the lane's two the scales and sums of a quarter of each half."""
        ptx, size = self.ptx, self.plan.sums_bytes
        for i in range(4):  # both halves of planes 0 and 2, then of planes 1 and 3
            part, half = divmod(i, 2)
            offset = four * INTEGERS + part * INTEGERS // 8 + half * INTEGERS // 2
            source = at(self.block_integers, self.offsets["integers"] + offset)
            words = vector(self.x_words[4 * i : 4 * i + 4])
            ptx.do("ld.shared.v4.b32", words, source, when=self.is_of_quarter)
        found = []
        for part in range(2):
            values = ptx.registers("b32", 4)
            offset = self.offsets["plane_sums"] + (four * PLANES + part) * size
            ptx.do("ld.shared.v4.b32", vector(values), at(self.block_sums, offset))
            found.append(self.scales_and_sums(values))
        return found

    def _load_factors(self, scales: Register) -> None:
        """Of each four of planes, each of the lane's two and half of it the scales of both rows."""
        size = self.plan.scale_bytes
        self.factors = {}
        for four in range(self.plan.fours):
            for part in range(2):
                for half in range(2):
                    offset = scale_offset((four * PLANES + part) * SCALE_GROUPS + 2 * half, size)
                    self.factors[four, part, half] = self._load_pair(
                        at(scales, self.scales_offset + offset)
                    )

    def multiply(self) -> None:
        """Adds the products of both fours of planes to the totals."""
        for four in range(self.plan.fours):
            sums = self._load_four(four)
            for part in range(2):
                masks = [0x01010101 << 4 * part + bit for bit in range(4)]
                words = self.words[4 * four : 4 * four + 4]
                codes = [[word & f"0x{mask:08x}" for mask in masks] for word in words]
                for half, (scale, whole) in enumerate(zip(*sums[part], strict=True)):
                    x = self.x_words[8 * part + 4 * half :][:4]
                    self._multiply_quarter(
                        list(zip(codes[2 * half :][:2], (x[:2], x[2:]), strict=True)),
                        [factor * scale for factor in self.factors[four, part, half]],
                        whole * self.first,
                        self.steps[2 * part : 2 * part + 2],
                    )

    def _multiply_quarter(self, steps, factors, base: Register, units) -> None:
        """Adds the lane's quarter of a plane to the sums of its rows.

        Args:
            steps: of each the operands of codes and of x.
            factors: scales of the upper and the lower row, times that of x.
            base: the part of the codebook's first value.
            units: what a unit of the sums of each row is.
        """
        ptx, sums = self.ptx, self.ptx.registers("b32", 4)
        for i, (codes, x) in enumerate(steps):
            start = sums if i else [self.zero] * 4
            ptx.do(integer_one.MULTIPLY, *(vector(r) for r in (sums, codes, x, start)))
        for row, (factor, unit, total) in enumerate(zip(factors, units, self.totals, strict=True)):
            value = ptx.op("cvt.rn.f32.s32", integer_one.join(*sums[2 * row : 2 * row + 2]))
            value = ptx.op("fma.rn.f32", unit, value, base)
            ptx.do("fma.rn.f32", total, factor, value, total)
