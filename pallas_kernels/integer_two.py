"""One token and evenly spaced codes of two bits: sums of integers, as in `integer_one`.

    sum x w = scale (first * sum x + step * sum x code)

A block of 256 weights a row is one four of planes. A word of codes has two planes, two bytes each; a mask
leaves one code in each byte: of the upper or the lower row, and of the first or the second of two neighbours.
So the second are a quarter in x, and the sums of lower rows are sixteen times too large.
Codebooks that are not evenly spaced take `stream`, where a table costs twice as much.
"""

from collections.abc import Callable

import jax.numpy as jnp

from pallas_kernels import integer_one
from pallas_kernels.case import Case
from pallas_kernels.integer_plan import CHUNK, MIN_GROUP
from pallas_kernels.layout import scale_offset
from pallas_kernels.ptx import load_float
from pallas_kernels.registers import Register, at, vector
from pallas_kernels.ring_plan import unsupported_groups

_MASK = 0x03030303
# Bits of the masks, for the registers of A: upper and lower rows of the first neighbours, then of the second.
_SHIFTS = (0, 4, 2, 6)


def unsupported_product(case: Case, consumers: int) -> str | None:
    """Why the arithmetic, of two bits here or of four in `integer_four`, does not take a case, or None."""
    least = MIN_GROUP
    if case.bits not in (2, 4) or case.m != 1 or not case.uniform or case.group_size < least:
        return (
            f"{case.m} tokens, {case.bits} bits in groups of {case.group_size}, uniform={case.uniform}"
            f" are not 1, 2 or 4 in groups of {least} or more, and evenly spaced values"
        )
    if case.k % CHUNK:
        return f"{case.k} weights a row are not whole {CHUNK}"
    return unsupported_groups(case, consumers)


class Product(integer_one.Product):
    """Writes a product by integers, of two bits."""

    # The integers of neighbours two apart lie in turn.
    selectors = "0x5151", "0x4040"

    def load_codebooks(self) -> Callable[[], None]:
        """Loads of each codebook the first value and the step."""
        ptx, case, loads, codes = self.ptx, self.case, [], 2**self.case.bits
        for start in range(0, case.codebooks, 32 * self.consumers):
            codebook_index = self.thread + start
            in_bounds = codebook_index < case.codebooks
            index = ptx.op("min.u32", codebook_index, case.codebooks - 1)
            index = (index * codes).low()
            first, last = (
                load_float(ptx, self.operands["codebook"], index + code, jnp.float32)
                for code in (0, codes - 1)
            )
            step = (last - first) * (1 / (codes - 1))
            loads.append((self.shared + codebook_index * 8, [first, step], in_bounds))

        def store() -> None:
            for address, values, in_bounds in loads:
                target = at(address, self.codebooks_offset)
                ptx.do("st.shared.v2.b32", target, vector(values), when=in_bounds)

        return store

    def paired(self, x: list[Register]) -> list[tuple[Register, Register]]:
        """Of four neighbours the first and the third, then the second and the fourth."""
        starts = (4 * i + j for i in range(len(x) // 4) for j in range(2))
        return [(x[i], x[i + 2]) for i in starts]

    def _locate_bytes(self) -> None:
        """Even planes have the lower bytes of an operand, odd ones the upper ones."""
        odd = (self.plane & 1).ne(0)
        self.bytes = self.ptx.op("selp.b32", "0xFFFF0000", "0x0000FFFF", odd)

    def _locate_sums(self) -> None:
        """The first two planes are in the first sums, the other two in the second."""
        self.higher = (self.thread_in_group & 1).ne(0)
        self.in_second = (self.thread_in_group & 2).ne(0)

    def _set_steps(self, steps: list[Register]) -> None:
        """A lower row's codes stand four bits higher."""
        self.ptx.do("mul.f32", steps[1], steps[0], 1 / 16)

    def _load_factors(self, scales: Register) -> None:
        """The scales of the upper and the lower row, from where this lane's first ones are."""
        plan = self.plan
        self.factors = [
            self._load_pair(at(scales, self.scales_offset + scale_offset(part, plan.scale_bytes)))
            for part in range(plan.parts)
        ]

    def multiply(self) -> None:
        """Adds the products of the four planes to the totals."""
        [(x, scales, wholes)] = self.x
        each = 4 // self.plan.parts
        for part, (factors, scale, whole) in enumerate(
            zip(self.factors, scales, wholes, strict=True)
        ):
            self._multiply_part(x, range(part * each, (part + 1) * each), factors, scale, whole)

    def _multiply_part(
        self, x: list[Register], steps: range, factors, scale: Register, whole: Register
    ) -> None:
        """Adds the part of some steps of the planes to the sums of its rows."""
        ptx = self.ptx
        sums = [ptx.registers("b32", 4) for _ in range(2)]
        for i in steps:
            for pair in range(2):
                word = self.words[4 * pair + i]
                ptx.do(
                    integer_one.MULTIPLY,
                    vector(sums[pair]),
                    vector([word & f"0x{_MASK << shift:08x}" for shift in _SHIFTS]),
                    vector(x[2 * i : 2 * i + 2]),
                    vector(sums[pair] if i > steps.start else [self.zero] * 4),
                )
        base = whole * self.first
        for row in range(2):
            both = (pair[2 * row : 2 * row + 2] for pair in sums)
            both = [integer_one.join(*bytes_) for bytes_ in both]
            sum_ = ptx.op("selp.b32", both[1], both[0], self.in_second)
            value = ptx.op("cvt.rn.f32.s32", sum_)
            value = ptx.op("fma.rn.f32", self.steps[row], value, base)
            factor = factors[row] * scale
            ptx.do("fma.rn.f32", self.totals[row], factor, value, self.totals[row])
