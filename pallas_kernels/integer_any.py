"""One token and codes of two bits with any four values: sums of integers, as in `integer_two`.

Four values are a first one, a step for each bit of a code, and what is missing where both are set:

    sum x w = scale (v0 sum x + (v1 - v0) sum x low + (v2 - v0) sum x high + (v3 - v2 - v1 + v0) sum x low high)

So a word of codes gives three operands where evenly spaced ones give one: the low bits, the high bits, and the
low bits of its product with itself shifted by one. Where the values are as far apart on both sides, as in a
symmetric codebook, nothing is missing, and the third one is left out.
"""

import dataclasses
from collections.abc import Callable

from pallas_kernels import integer_one, integer_plan, integer_two
from pallas_kernels.registers import Memory, Register, at, vector

_LOW, _HIGH = 0x01010101, 0x02020202


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan(integer_plan.Plan):
    """A product by integers, of any four values."""

    codebook_bytes = 16  # the first value and three steps


class Product(integer_two.Product):
    """Writes a product by integers, of two bits and any values."""

    plan_class = Plan
    plan: Plan
    _branches = 0

    def load_codebooks(self) -> Callable[[], None]:
        """Loads of each codebook the first value and the steps."""
        ptx, case, decoder, loads = self.ptx, self.case, self.decoder, []
        for start in range(0, case.codebooks, 32 * self.workers):
            codebook_index = self.thread + start
            in_bounds = codebook_index < case.codebooks
            source = self.operands["codebook"] + codebook_index * 16
            values = [decoder.value(source, code, in_bounds) for code in range(4)]
            loads.append(
                (self.shared + codebook_index * self.plan.codebook_bytes, values, in_bounds)
            )

        def store() -> None:
            for address, values, in_bounds in loads:
                pairs = (decoder.rounded(*values[i : i + 2])[1:] for i in (0, 2))
                first, second, third, fourth = (value for pair in pairs for value in pair)
                low, high = second - first, third - first
                # A high bit is two in its operand.
                steps = [low, high * 0.5, (fourth - third) - low]
                target = at(address, self.codebooks_offset)
                ptx.do("st.shared.v4.b32", target, vector([first, *steps]), when=in_bounds)

        return store

    def start_run(self, run: int) -> None:
        """Where this lane's operands are."""
        super().start_run(run)
        if not run:
            self.steps = self.ptx.registers("f32", 3)
            self.missing = self.ptx.register("pred")

    def _load_steps(self, codebook: Memory) -> None:
        """The first value and the steps, and whether the last one is of any use."""
        self.ptx.do("ld.shared.v4.b32", vector([self.first, *self.steps]), codebook)
        bits = self.ptx.op("mov.b32", self.steps[-1]) & "0x7fffffff"  # of a NaN, too
        self.ptx.do("setp.ne.u32", self.missing, bits, 0)

    def multiply(self) -> None:
        """Adds the products of the four planes to the totals."""
        ptx, number = self.ptx, self._branches
        self._branches += 1
        ptx.do("bra", f"fdk_two_steps_{number}", when=~self.missing)
        self.used = self.steps
        super().multiply()
        ptx.do("bra", f"fdk_multiplied_{number}")
        ptx.label(f"fdk_two_steps_{number}")
        self.used = self.steps[:2]
        super().multiply()
        ptx.label(f"fdk_multiplied_{number}")

    def _multiply_part(
        self, x: list[Register], steps: range, factors, scale: Register, whole: Register
    ) -> None:
        """Adds the part of some steps of the planes to the sums of its rows."""
        ptx = self.ptx
        sums = [[ptx.registers("b32", 4) for _ in range(2)] for _ in self.used]
        for i in steps:
            for pair in range(2):
                word = self.words[4 * pair + i]
                operands = [(word, _LOW), (word, _HIGH)]
                if len(self.used) > len(operands):
                    operands.append((word & (word >> 1), _LOW))
                for (codes, mask), pairs in zip(operands, sums, strict=True):
                    ptx.do(
                        integer_one.MULTIPLY,
                        vector(pairs[pair]),
                        vector([codes & f"0x{mask << shift:08x}" for shift in integer_two.SHIFTS]),
                        vector(x[2 * i : 2 * i + 2]),
                        vector(pairs[pair] if i > steps.start else [self.zero] * 4),
                    )
        base = whole * self.first
        for row, unit in enumerate((1.0, 1 / 16)):  # a lower row's codes stand four bits higher
            value = ptx.zero()
            for step, pairs in zip(self.used, sums, strict=True):
                value = ptx.op("fma.rn.f32", step, self._sum(pairs, row), value)
            value = ptx.op("fma.rn.f32", value, unit, base)
            factor = factors[row] * scale
            ptx.do("fma.rn.f32", self.totals[row], factor, value, self.totals[row])
