"""The kernel for two to four rows of x and codes of one bit: `integer_one`, with the columns of two tokens.

One token of `integer_one` fills the eight columns of an instruction with four planes, of which an operand has
the codes of two. Here a column is a byte of one of two tokens and of one of those two planes: all columns are
of use, and the operands of x are others for planes 0 and 2 than for planes 1 and 3. Three and four tokens are
two such pairs, which share the codes that are masked out.

In shared memory the bytes of both planes stand interleaved, as the codes do; a lane clears those that are not
of its column's plane. Column 4 i + 2 j + h of a pair is token i, the plane j of the two, and byte h (0: high).
"""

import dataclasses

from pallas_kernels import integer_one, integer_plan, ring
from pallas_kernels.case import Case
from pallas_kernels.integer_plan import INTEGERS, MIN_GROUP, PLANES
from pallas_kernels.layout import PLANE, TILE_ROWS, scale_offset
from pallas_kernels.registers import Register, at, vector
from pallas_kernels.ring_plan import unsupported_groups
from pallas_kernels.target import Target

TOKENS = range(2, 5)


@dataclasses.dataclass(frozen=True)
class Config(ring.Config):
    """As `ring.Config`; its type says which kernel is meant."""


def unsupported_reason(case: Case, config: Config, target: Target) -> str | None:
    """Why the kernel does not take a case, or None."""
    if case.bits != 1 or case.m not in TOKENS or case.group_size < MIN_GROUP:
        return (
            f"{case.m} tokens, {case.bits} bits in groups of {case.group_size} are not 2 to 4, 1 and"
            f" {MIN_GROUP} or more"
        )
    if case.residual or case.squares:
        return "it has no residual"
    reason = unsupported_groups(case, config.consumers)
    return reason or ring.unsupported_reason(case, config, target, Product)


grid = ring.grid


def source(case: Case, config: Config, target: Target) -> str:
    """The kernel's PTX."""
    return ring.source(case, config, target, Product)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan(integer_plan.Plan):
    """A product of several tokens by integers."""

    @property
    def pairs(self) -> int:
        """Pairs of tokens; the last one may have one token."""
        return -(-self.case.m // 2)

    @property
    def tokens(self) -> int:
        """Tokens that a tile has sums of: those of whole pairs."""
        return 2 * self.pairs

    @property
    def half_integers(self) -> int:
        """Bytes of the integers of four planes of x of all tokens."""
        return self.pairs * INTEGERS

    @property
    def half_sums(self) -> int:
        """Bytes of the scales and sums of four planes of x of all tokens."""
        return self.tokens * PLANES * self.sums_bytes

    def areas(self) -> dict[str, int]:
        """Integers, scales and sums of x, and codebooks."""
        return super().areas() | {
            "integers": self.case.blocks * 2 * self.half_integers,
            "plane_sums": self.case.blocks * 2 * self.half_sums,
        }


class Product(integer_one.Product):
    """Writes a product of several tokens by integers."""

    plan_class = Plan
    plan: Plan

    def __init__(self, *args, **options) -> None:
        super().__init__(*args, **options)
        # Of each pair the upper and the lower row, of one token.
        self.lane_totals = 2 * self.plan.pairs

    # Before the loop: x

    def _of_plane(self, both: Register) -> Register:
        """Both copies: another lane's take the address of one of them."""
        return both

    def _token(self, row: Register) -> tuple[Register, Register]:
        """The token, and the block along K, of 512 values of x."""
        blocks = self.case.blocks
        token = row // blocks
        return token, row - token * blocks

    def _store_integers(self, row: Register, high: list[Register], low: list[Register]) -> None:
        """Stores the high or the low bytes of this lane's plane and of the one that shares operands with it."""
        ptx, plan = self.ptx, self.plan
        token, block = self._token(row)
        words = []
        for upper, lower in zip(high, low, strict=True):
            # Lanes of planes 0 and 1 keep the high bytes, and get those of planes 2 and 3.
            kept = ptx.op("selp.b32", lower, upper, self.upper)
            given = ptx.op("selp.b32", upper, lower, self.upper)
            received = ptx.register("b32")
            ptx.do("shfl.sync.bfly.b32", received, given, 8, 31, "0xffffffff")
            words.append(ptx.op("lop3.b32", kept, received, self.bytes, "0xE4"))
        address = self.shared + block * (2 * plan.half_integers)
        address = address + (self.row >> 2) * plan.half_integers + (token >> 1) * INTEGERS
        address = address + (self.row & 1) * (INTEGERS // 2) + (token & 1) * (8 * 16)
        address = address + ((self.row >> 1) & 1) * (4 * 16) + self.thread_in_group * 16
        for half in range(2):
            offset = self.offsets["integers"] + half * INTEGERS // 4
            part = vector(words[4 * half : 4 * half + 4])
            ptx.do("st.shared.v4.b32", at(address, offset), part)

    def _plane_sums_address(self, row: Register) -> Register:
        """Where the scale of x and the sums of x of the lane's plane are."""
        token, block = self._token(row)
        size = self.plan.sums_bytes
        address = self.shared + block * (2 * self.plan.half_sums)
        address = address + (self.row >> 2) * self.plan.half_sums
        return address + token * (PLANES * size) + (self.row & 3) * size

    # The loop over the program's blocks

    def start_run(self, run: int) -> None:
        """Where this lane's operands are, and constants of the lane."""
        del run
        ptx = self.ptx
        address = self.shared + (self.row >> 2) * (8 * 16) + (self.row & 1) * (4 * 16)
        self.integers = address + self.thread_in_group * 16
        self.plane_sums = self.shared + self.thread_in_group * (2 * self.plan.sums_bytes)
        self.codes = self.codes_in_slot()
        self.locate_scales()
        # The lane's sums are of the first or the second of the planes that share operands.
        self.higher = (self.thread_in_group & 1).ne(0)
        self.zero = ptx.op("mov.u32", 0)
        address = self.shared + self.warp * (4 * TILE_ROWS) + self.row * 8
        address = address + (self.thread_in_group & 1) * 4
        self.partial = address + (self.thread_in_group >> 1) * (self.consumers * 4 * TILE_ROWS)
        self.first, *self.steps = ptx.registers("f32", 5)

    def first_scales(self) -> Register:
        """Where in a slot the scales of this lane's first two planes are."""
        g, group = self.case.group_size, self.group_in_slot()
        if g <= 2 * PLANE:
            group = group + (self.thread_in_group & 1) * (2 * PLANE // g)
        return self.scales_in_slot(group)

    def _set_steps(self, steps: list[Register]) -> None:
        """What a unit of the sums is: of a lower row's codes half, of planes 1 and 3 a sixteenth as much."""
        for i, scale in enumerate((1 / 2, 1 / 16, 1 / 32), 1):
            self.ptx.do("mul.f32", steps[i], steps[0], scale)

    def load_x(self, block: Register) -> None:
        """Where the integers of a block of x, their scales and sums are: of all at once there are too many."""
        plan = self.plan
        self.block_integers = self.integers + block * (2 * plan.half_integers)
        self.block_sums = self.plane_sums + block * (2 * plan.half_sums)

    def _load_half(self, half: int, pair: int) -> tuple[list[Register], list]:
        """Of four planes of x of a pair the integers, and of the lane's planes the scale and the sums."""
        ptx, plan = self.ptx, self.plan
        words = ptx.registers("b32", 16)
        start = self.offsets["integers"] + half * plan.half_integers + pair * INTEGERS
        for i in range(4):  # planes 0 and 2, then planes 1 and 3
            part = vector(words[4 * i : 4 * i + 4])
            ptx.do("ld.shared.v4.b32", part, at(self.block_integers, start + i * INTEGERS // 4))
        found = ptx.registers("b32", plan.sums_bytes // 2)
        start = self.offsets["plane_sums"] + half * plan.half_sums
        start += pair * 2 * PLANES * plan.sums_bytes
        for i in range(0, len(found), 4):
            source = at(self.block_sums, start + 4 * i)
            ptx.do("ld.shared.v4.b32", vector(found[i : i + 4]), source)
        each = len(found) // 2
        sums = [self.scales_and_sums(part) for part in (found[:each], found[each:])]
        return [word & self.bytes for word in words], sums

    def _load_factors(self, scales: Register) -> None:
        """Of each half, plane and part of it the scales of the upper and the lower row."""
        size, g, known = self.plan.scale_bytes, self.case.group_size, {}
        self.factors = {}
        for half in range(2):
            for plane in range(2):
                for part in range(self.plan.parts):
                    # The lane's first plane is at the start of a group, or the next one is in the same.
                    within = (plane * PLANE + part * MIN_GROUP) // g
                    group = half * PLANES * PLANE // g + within
                    if group not in known:
                        offset = self.scales_offset + scale_offset(group, size)
                        known[group] = self._load_pair(at(scales, offset))
                    self.factors[half, plane, part] = known[group]

    def multiply(self) -> None:
        """Adds the products of both fours of planes to the totals."""
        each = 4 // self.plan.parts
        for half in range(2):
            x = [self._load_half(half, pair) for pair in range(self.plan.pairs)]
            for plane in range(2):
                masks = [0x01010101 << 4 * plane + bit for bit in range(4)]
                words = self.words[4 * half : 4 * half + 4]
                operands = [[word & f"0x{mask:08x}" for mask in masks] for word in words]
                for pair in range(self.plan.pairs):
                    integers, sums = x[pair]
                    for part, (scale, whole) in enumerate(zip(*sums[plane], strict=True)):
                        steps = range(part * each, (part + 1) * each)
                        self._multiply_steps(
                            [(operands[i], integers[8 * plane + 2 * i :][:2]) for i in steps],
                            [factor * scale for factor in self.factors[half, plane, part]],
                            whole * self.first,
                            self.steps[2 * plane : 2 * plane + 2],
                            self.totals[2 * pair : 2 * pair + 2],
                        )

    def _multiply_steps(self, steps, factors, base: Register, units, totals) -> None:
        """Adds the part of steps of two planes, or of their halves, to the sums of the lane's rows.

        Args:
            steps: of each the operands of codes and of x.
            factors: scales of the upper and the lower row, times that of x.
            base: the part of the codebook's first value.
            units: what a unit of the sums of each row is.
            totals: of both rows.
        """
        ptx = self.ptx
        sums = ptx.registers("b32", 4)
        for i, (codes, x) in enumerate(steps):
            start = sums if i else [self.zero] * 4
            ptx.do(integer_one.MULTIPLY, *(vector(r) for r in (sums, codes, x, start)))
        for row, (factor, unit, total) in enumerate(zip(factors, units, totals, strict=True)):
            value = integer_one.join(*sums[2 * row : 2 * row + 2])
            value = ptx.op("cvt.rn.f32.s32", value)
            value = ptx.op("fma.rn.f32", unit, value, base)
            ptx.do("fma.rn.f32", total, factor, value, total)

    def store_totals(self, tile: Register) -> None:
        """Adds the sums of a row's two lanes for each token, and stores them as the warp's."""
        ptx = self.ptx
        address = self.partial + tile * self.plan.tile_bytes
        for pair in range(self.plan.pairs):
            upper, lower = self.totals[2 * pair : 2 * pair + 2]
            given = ptx.op("selp.f32", upper, lower, self.higher)
            kept = ptx.op("selp.f32", lower, upper, self.higher)
            other = ptx.register("f32")
            ptx.do("shfl.sync.bfly.b32", other, given, 1, 31, "0xffffffff")
            offset = self.offsets["partial"] + 2 * pair * self.consumers * 4 * TILE_ROWS
            ptx.do("st.shared.f32", at(address, offset), kept + other)
