"""What a product by integers does before its loop: x becomes integers in shared memory, see `integer_one`."""

import functools
from collections.abc import Callable

import jax.numpy as jnp

from pallas_kernels import decoding, ring_product
from pallas_kernels.integer_plan import INTEGERS, PLANES, Plan
from pallas_kernels.layout import PLANE
from pallas_kernels.outputs import Load
from pallas_kernels.ptx import over_lanes
from pallas_kernels.registers import Register, at, vector

_X = 1024  # bytes of the x of a chunk
_LARGEST = 32512.0  # of the integers: its high byte, rounded, is 127
# The last bits of a float of this size are an integer. Low bytes have a bias of 128.
_MAGIC = 1.5 * 2**23 + 128
_MAGIC_BITS = 0x4B400080
_FINITE = 2.0**127
_TINY = 2.0**-112  # smaller x are not told apart from zero, if there are no others


class Integers(ring_product.Product):
    """Writes the part of a product that makes integers of x.

    A chunk of 512 x is eight planes. A warp makes one, with four lanes a plane and 16 x a lane; where there are
    warps for it, two share a chunk (`Plan.sharers`), with eight lanes a plane.

    Attributes:
        plane: register with the plane of the chunk that the lane has x of.
        upper: whether that is one of the last two planes of its four.
    """

    plan: Plan
    divisor = 4  # of the x of every second pair
    # How the two integers of a register of B lie there, each twice: their high bytes, their low ones.
    selectors = "0x5511", "0x4400"

    def prepare_x(self, meanwhile: Callable[[], object]) -> None:
        """Makes integers of x, a chunk or a part of one a warp at a time."""
        ptx, case, sharers = self.ptx, self.case, self.plan.sharers
        self.infinite = ptx.register("pred")
        self._locate_x()
        self._locate_bytes()
        rows = self.plan.chunks * case.m  # of x, 512 each: those of a token follow each other
        # With sharers each has one part: there are warps for all.
        rounds = -(-rows * sharers // self.consumers)
        own = self.warp // sharers if sharers > 1 else self.warp
        address = self._x_address(own)
        words = (4,) * (2 // sharers)  # of each half, or of one
        for first in range(0, rounds, 3):
            here = range(first, min(first + 3, rounds))
            blocks = [own + i * self.consumers for i in here]
            in_bounds = [b < rows for b in blocks]
            registers = [[ptx.registers("b32", count) for count in words] for _ in here]
            loads = []
            for i, halves, guard in zip(here, registers, in_bounds, strict=True):
                for half, target in enumerate(halves):
                    source = at(address, i * self.consumers * _X + half * PLANE)
                    loads.append(Load(target, source, guard))
                    self._load(loads[-1])
            if not first:
                meanwhile()
            self._settle(loads)
            for i, halves, block, guard in zip(here, registers, blocks, in_bounds, strict=True):
                ptx.do("bra", f"fdk_no_x_{i}", when=~guard)
                pairs = (decoding.unpack(ptx, p, case.x_dtype) for half in halves for p in half)
                self._prepare_block([x for pair in pairs for x in pair], block, f"{i}")
                ptx.label(f"fdk_no_x_{i}")

    def _locate_x(self) -> None:
        """Which plane of a chunk the lane has x of; with sharers also which half of it."""
        self.plane = self.row
        if self.plan.sharers > 1:
            self.plane = (self.warp & 1) * 4 + (self.row >> 1)
            self.half = self.row & 1

    def _x_address(self, chunk: Register) -> Register:
        """The address of the lane's x, or of the first ones of two halves."""
        sharers, own = self.plan.sharers, self.thread_in_group * 16
        address = self._row("x") + chunk * _X
        if sharers == 1:
            return address + self.row * (2 * PLANE) + own
        return address + (self.warp & 1) * (_X // 2) + self.row * PLANE + own

    def _locate_bytes(self) -> None:
        """Which bytes of an operand are of the lane's plane.

        Planes 0 and 1 of four have the even bytes, planes 2 and 3 the odd ones.
        """
        self.upper = (self.plane & 2).ne(0)
        self.bytes = self.ptx.op("selp.b32", "0xFF00FF00", "0x00FF00FF", self.upper)

    def paired(self, x: list[Register]) -> list[tuple[Register, Register]]:
        """The lane's x in pairs, one for each register of B: the second of two pairs are divided."""
        return list(zip(x[::2], x[1::2], strict=True))

    def _prepare_block(self, x: list[Register], block: Register, name: str) -> None:
        """Stores the integers of the lane's x of a chunk, and of each of its planes the scale and the sums.

        The x of a lane are as many of each half of a plane, or all of one half.
        """
        ptx = self.ptx
        parts = min(2, self.plan.parts) if self.plan.sharers == 1 else 1
        scales, inverses = self._scales_of(x, parts, name)
        pairs, sums = [], [ptx.op("mov.u32", 0) for _ in range(2 * parts)]
        paired = self.paired(x)
        for i, pair in enumerate(paired):
            part = i * parts // len(paired)
            values = [
                ptx.op("fma.rn.f32", value, inverses[i % 2], _MAGIC, kind="b32") for value in pair
            ]
            for value in values:
                sums[2 * part + i % 2] = sums[2 * part + i % 2] + value
            pairs.append(values)
        self._store_integers(block, *self._operands(pairs))
        wholes = []
        for once, divided in zip(sums[::2], sums[1::2], strict=True):
            sum_ = once + divided * self.divisor
            # Half of the addends, and those of the other half so often.
            count = len(x) // 2 // parts
            sum_ = sum_ - ((count + count * self.divisor) * _MAGIC_BITS % 2**32)
            sum_ = over_lanes(ptx, "add.u32", sum_, self._summed())
            wholes.append(ptx.op("cvt.rn.f32.s32", sum_))
        self._store_sums(block, scales, wholes)

    def _neighbours(self, *, of_half: bool) -> tuple[int, ...]:
        """Distances to the lanes with which a lane shares a plane, or half of one."""
        return (1, 2) if self.plan.sharers == 1 or of_half else (1, 2, 4)

    def _summed(self) -> tuple[int, ...]:
        """Distances to the lanes whose sums are one with the lane's."""
        return self._neighbours(of_half=self.plan.parts == 2)

    def _store_sums(self, block: Register, scales: list[Register], wholes: list[Register]) -> None:
        """The first lane of a plane, or of its part with sums of its own, stores the scale and the sum."""
        ptx, plan, address = self.ptx, self.plan, self._plane_sums_address(block)
        start = self.offsets["plane_sums"]
        if plan.parts == 1:
            first = (self.lane & (4 * plan.sharers - 1)).eq(0)
            ptx.do("st.shared.v2.b32", at(address, start), vector([*scales, *wholes]), when=first)
            return
        # Of both halves: the first one's scale, the sums, the other one's scale.
        first = (self.lane & (8 // plan.parts - 1)).eq(0)
        if plan.parts == 4:
            address = address + (self.thread_in_group >> 1) * 16
        if plan.sharers == 1:
            values = vector([scales[0], *wholes, scales[1]])
            ptx.do("st.shared.v4.b32", at(address, start), values, when=first)
            return
        ptx.do("st.shared.f32", at(address + self.half * 12, start), *scales, when=first)
        ptx.do("st.shared.f32", at(address + self.half * 4, start + 4), *wholes, when=first)

    def _operands(self, pairs: list[list[Register]]) -> tuple[list[Register], list[Register]]:
        """Words of the high and of the low bytes of integers: a byte of a pair each, twice."""
        ptx, found = self.ptx, []
        for selector, flipped in zip(self.selectors, (None, "0x80808080"), strict=True):
            words = [ptx.op("prmt.b32", *pair, selector) for pair in pairs]
            words = words if flipped is None else [word ^ flipped for word in words]
            found.append([self._of_plane(word) for word in words])
        return found[0], found[1]

    def _of_plane(self, both: Register) -> Register:
        """A byte of two integers, each twice, where the codes of the lane's plane are in an operand."""
        return both & self.bytes

    def _store_integers(self, block: Register, high: list[Register], low: list[Register]) -> None:
        """Stores the bytes of the lane's integers as operands: eight words each, or with sharers four."""
        ptx = self.ptx
        four, plane = self.plane >> 2, self.plane & 3
        address = self.shared + block * (2 * INTEGERS) + four * INTEGERS
        # Plane p is in rows 2 p and 2 p + 1 of lanes.
        address = address + plane * (8 * 16) + self.thread_in_group * 16
        if self.plan.sharers > 1:
            address = address + self.half * (INTEGERS // 2)
        for row, words in enumerate((high, low)):
            for half in range(len(words) // 4):
                offset = self.offsets["integers"] + row * 4 * 16 + half * INTEGERS // 2
                part = vector(words[4 * half : 4 * half + 4])
                ptx.do("st.shared.v4.b32", at(address, offset), part)

    def _plane_sums_address(self, block: Register) -> Register:
        """Where the scale of x and the sums of x of the lane's plane are."""
        size = self.plan.sums_bytes
        return self.shared + block * (2 * PLANES * size) + self.plane * size

    def _scales_of(
        self, x: list[Register], parts: int, name: str
    ) -> tuple[list[Register], list[Register]]:
        """The scale of x for each part, and what makes integers of x: of all of them, of the divided ones.

        Where there is an infinity, all x are brought into the finite range first, and parts without one add
        nothing: their sums are zero, which an infinite scale would make NaN.
        """
        ptx = self.ptx
        sizes = [ptx.op("abs.f32", value) for value in x]
        largest = functools.reduce(lambda a, b: ptx.op("max.NaN.f32", a, b), sizes)
        largest = over_lanes(ptx, "max.NaN.f32", largest, self._neighbours(of_half=False))
        scales = [largest * (1 / _LARGEST)]
        if self.plan.parts > 1:
            scales = [ptx.op("mov.f32", scales[0]) for _ in range(parts)]

        ptx.do("setp.eq.f32", self.infinite, largest, jnp.inf)
        somewhere = ptx.register("pred")
        ptx.do("vote.sync.any.pred", somewhere, self.infinite, "0xffffffff")
        ptx.do("bra", f"fdk_finite{name}", when=~somewhere)
        if self.plan.parts > 1:
            each = len(sizes) // parts
            for i, scale in enumerate(scales):
                self._leave_out(scale, sizes[i * each : (i + 1) * each])
        for value in x:
            ptx.do("max.f32", value, value, -_FINITE)
            ptx.do("min.f32", value, value, _FINITE)
        ptx.do("selp.f32", largest, _FINITE, largest, self.infinite)
        ptx.label(f"fdk_finite{name}")
        largest = ptx.op("max.f32", largest, _TINY)
        inverse = ptx.op("rcp.approx.f32", largest)
        return scales, [inverse * (_LARGEST / divisor) for divisor in (1, self.divisor)]

    def _leave_out(self, scale: Register, sizes: list[Register]) -> None:
        """Makes the scale of a part zero, if its plane has an infinity and the part has none."""
        ptx = self.ptx
        largest = functools.reduce(lambda a, b: ptx.op("max.NaN.f32", a, b), sizes)
        largest = over_lanes(ptx, "max.NaN.f32", largest, self._summed())
        ptx.do("mov.f32", scale, 0.0, when=self.infinite & largest.ne(jnp.inf))
