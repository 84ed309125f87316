"""One row of x and codes of one bit in the program of `ring`: sums of integers on the tensor cores.

Decoding to floats takes an instruction a weight, more than reading takes time. Masked codes are integers
already, a byte each, four to an instruction, for `mma.sync.m16n8k32`. So x becomes integers: 16 bits, scaled
by the largest of 64 neighbours, as a high and a low byte. With two values any codebook is affine:

    sum x w = scale (first * sum x + (second - first) * sum of the x whose code is set)

The eight columns of the instruction are the high and low bytes of four planes of x. Codes of two planes are in
one operand, bytes interleaved, where the columns of the other have zeros; and the columns of the two
planes whose codes it has not hold sums that nobody reads. A mask leaves a code at one bit of its byte, the
same for all codes of a register: what that makes of the sums is divided out again, in x for the registers of
upper and lower halves of a step, and at the end for upper and lower rows and for planes. An infinity in x makes
the scale infinite and itself the only integer that is not zero.

The program is that of `ring`. A block of 512 weights a row is two fours of planes of 64. Groups of scales may
be larger than a plane, or halves of one: then each half has sums of its own. `integer_quarters` has smaller
ones.
"""

from collections.abc import Callable

import jax.numpy as jnp

from pallas_kernels import decoding
from pallas_kernels.integer_plan import CODEBOOK_BYTES, INTEGERS, PLANES, Plan
from pallas_kernels.integer_x import Integers
from pallas_kernels.layout import PART_BYTES, PLANE, TILE_ROWS, scale_offset
from pallas_kernels.registers import Memory, Register, at, vector, wide

MULTIPLY = "mma.sync.aligned.m16n8k32.row.col.s32.u8.s8.s32"


def join(high: Register, low: Register) -> Register:
    """The sum of integers from the sums of their bytes."""
    return low + high * 256


class Product(Integers):
    """Writes a product by integers."""

    plan_class = Plan
    plan: Plan
    units = 2  # of a lane's sums: of the upper and the lower row

    def __init__(self, *args, **options) -> None:
        super().__init__(*args, **options)
        self.decoder = decoding.decoder(self.ptx, 1, self.case.x_dtype, exact=True)

    # Before the loop: the codebooks, and x in `integer_x`

    def load_codebooks(self) -> Callable[[], None]:
        """Loads of each codebook the first value and the step to the second one."""
        ptx, case, decoder = self.ptx, self.case, self.decoder
        loads = []
        for start in range(0, case.codebooks, 32 * self.consumers):
            codebook_index = self.thread + start
            in_bounds = codebook_index < case.codebooks
            source = self.operands["codebook"] + codebook_index * 8
            values = [decoder.value(source, code, in_bounds) for code in range(2)]
            loads.append((self.shared + codebook_index * CODEBOOK_BYTES, values, in_bounds))

        def store() -> None:
            for address, values, in_bounds in loads:
                _, first, second = decoder.rounded(*values)
                step = second - first
                target = at(address, self.codebooks_offset)
                ptx.do("st.shared.v2.b32", target, vector([first, step]), when=in_bounds)

        return store

    # The loop over the program's blocks

    def start_run(self, run: int) -> None:
        """Where this lane's operands are, and constants of the lane."""
        if run:
            return
        ptx = self.ptx
        self._locate_integers()
        self.codes = self.codes_in_slot()
        self.locate_scales()
        self._locate_sums()
        self.zero = ptx.op("mov.u32", 0)
        address = self.shared + self.warp * (4 * TILE_ROWS) + self.row * 8
        self.partial = address + self.thread_in_group * 4
        self.keeps = self.thread_in_group < 2
        self.first, *self.steps = ptx.registers("f32", 1 + self.units)

    def _locate_integers(self) -> None:
        """Where the integers of x for this lane are, and the sums of x."""
        self.integers = self.shared + self.lane * 16
        self.plane_sums = self.shared + self.thread_in_group * self.plan.sums_bytes

    def _locate_sums(self) -> None:
        """Which of the two sums the lane's columns are in, those of a plane.

        The codes of planes 1 and 3 stand four bits higher.
        """
        self.higher = (self.thread_in_group & 1).ne(0)
        self.unit = self.ptx.op("selp.f32", 1 / 16, 1.0, self.higher)

    def first_scales(self) -> Register:
        """Where in a slot the scales of this lane's plane of the first four are."""
        g, plane = self.case.group_size, self.thread_in_group
        if g == PLANE:  # four groups are the four planes, one for each lane
            size = self.plan.scale_bytes
            return (self.warp * self.plan.block_scales).low() + self.lane * (2 * size)
        group = self.group_in_slot()
        if g <= self.case.span:
            group = group + (plane // (g // PLANE) if g > PLANE else plane * (PLANE // g))
        return self.scales_in_slot(group)

    def start_tile(self, tile: Register, run: int) -> None:
        """The codebook of a tile's rows: the first value, and the steps that a unit of a row's sums is."""
        ptx, case, steps = self.ptx, self.case, self.steps
        address = self.shared
        if case.codebooks > 1:
            row = self.first_tile + run * self.plan.run_tiles
            row = ((row + tile) * TILE_ROWS).low()
            codebook_index = row // (case.n // case.codebooks)
            codebook_index = ptx.op("min.u32", codebook_index, case.codebooks - 1)
            address = self.shared + codebook_index * CODEBOOK_BYTES
        ptx.do(
            "ld.shared.v2.b32", vector([self.first, steps[0]]), at(address, self.codebooks_offset)
        )
        self._set_steps(steps)

    def _set_steps(self, steps: list[Register]) -> None:
        """What a unit of the sums of both rows is, from the step that the first register has."""
        self.ptx.do("mul.f32", steps[0], steps[0], self.unit)
        # A lower row's codes stand one bit higher.
        self.ptx.do("mul.f32", steps[1], steps[0], 0.5)

    def load_x(self, block: Register) -> None:
        """The integers of both fours of planes of x, their scales and sums."""
        ptx, sums_bytes = self.ptx, self.plan.sums_bytes
        fours = self.plan.fours
        integers = self.integers + block * (fours * INTEGERS)
        sums = self.plane_sums + block * (fours * PLANES * sums_bytes)
        self.x = []
        for half in range(fours):
            plane_sums = ptx.registers("b32", sums_bytes // 4)
            address = at(sums, self.offsets["plane_sums"] + half * PLANES * sums_bytes)
            width, values = wide(plane_sums)
            ptx.do(f"ld.shared{width}.b32", values, address)
            sums_of_x = self.scales_and_sums(plane_sums)
            self.x.append((self._load_integers(integers, half), *sums_of_x))

    def scales_and_sums(self, words: list[Register]) -> tuple[list[Register], list[Register]]:
        """Of each part of a plane the scale and the sum of x, as `_store_sums` has left them."""
        first, *others = (word.as_float() for word in words)
        return ([first], others) if self.plan.parts == 1 else ([first, others[2]], others[:2])

    def _load_integers(self, address: Register, half: int) -> list[Register]:
        """The integers of four planes of x."""
        words = self.ptx.registers("b32", 8)
        for i in range(2):
            part = at(address, self.offsets["integers"] + half * INTEGERS + i * INTEGERS // 2)
            self.ptx.do("ld.shared.v4.b32", vector(words[4 * i : 4 * i + 4]), part)
        return words

    def load_block(self, slot: Register) -> None:
        """The codes and the scales."""
        ptx = self.ptx
        self.words = ptx.registers("b32", 8)
        codes, scales = slot + self.codes, self.block_scales(slot)
        for half in range(2):
            part = vector(self.words[4 * half : 4 * half + 4])
            ptx.do("ld.shared.v4.b32", part, at(codes, half * PART_BYTES))
        self._load_factors(scales)

    def _load_factors(self, scales: Register) -> None:
        """Of each four of planes the scales of both rows, float32, from where this lane's first ones are."""
        plan = self.plan
        # The second four of planes have groups of their own, unless a group is the whole block.
        further = scale_offset(PLANES * PLANE // self.case.group_size, plan.scale_bytes)
        self.factors = []
        for half in range(2 if further else 1):
            pairs = []
            for part in range(plan.parts):
                offset = half * further + scale_offset(part, plan.scale_bytes)
                pairs.append(self._load_pair(at(scales, self.scales_offset + offset)))
            self.factors.append(pairs)
        self.factors *= 2 // len(self.factors)

    def _load_pair(self, address: Memory) -> list[Register]:
        """The scales of the upper and the lower row at an address, float32."""
        ptx, dtype = self.ptx, self.case.scale_dtype
        if dtype == jnp.float32:
            pair = ptx.registers("f32", 2)
            ptx.do("ld.shared.v2.b32", vector(pair), address)
            return pair
        return decoding.unpack(ptx, ptx.op("ld.shared.b32", address), dtype)

    def multiply(self) -> None:
        """Adds the products of both fours of planes to the totals."""
        for half, (x, scales, wholes) in enumerate(self.x):
            words = self.words[4 * half : 4 * half + 4]
            steps, each = range(len(words)), len(words) // self.plan.parts
            parts = zip(self.factors[half], scales, wholes, strict=True)
            for part, (factors, scale, whole) in enumerate(parts):
                positions = steps[part * each : (part + 1) * each]
                self._multiply(
                    [(words[i], x[2 * i : 2 * i + 2]) for i in positions], factors, scale, whole
                )

    def _multiply(self, steps, factors, scale: Register, whole: Register) -> None:
        """Adds the part of steps of four planes, or of their halves, to the sums of its rows.

        Args:
            steps: of each the word of codes and the two of integers of x.
            factors: scales of the upper and the lower row.
            scale: of x.
            whole: the sum of these integers.
        """
        ptx = self.ptx
        sums = [ptx.registers("b32", 4) for _ in range(2)]
        for i, (word, x) in enumerate(steps):
            for part in range(2):
                masks = (0x01010101 << 4 * part + bit for bit in range(4))
                ptx.do(
                    MULTIPLY,
                    vector(sums[part]),
                    vector([word & f"0x{mask:08x}" for mask in masks]),
                    vector(x),
                    vector(sums[part] if i else [self.zero] * 4),
                )
        base = whole * self.first
        for row in range(2):
            both = (part[2 * row : 2 * row + 2] for part in sums)
            both = [join(*bytes_) for bytes_ in both]
            sum_ = ptx.op("selp.b32", both[1], both[0], self.higher)
            value = ptx.op("cvt.rn.f32.s32", sum_)
            value = ptx.op("fma.rn.f32", self.steps[row], value, base)
            factor = factors[row] * scale
            ptx.do("fma.rn.f32", self.totals[row], factor, value, self.totals[row])

    def store_totals(self, tile: Register) -> None:
        """Adds the sums of the four lanes of a row, and stores them as the warp's part of the tile's."""
        ptx = self.ptx
        upper, lower = self.totals
        other, rest = ptx.registers("f32", 2)
        # Of the four lanes of a row, two keep the sums of the lower one.
        given = ptx.op("selp.f32", upper, lower, self.higher)
        kept = ptx.op("selp.f32", lower, upper, self.higher)
        ptx.do("shfl.sync.bfly.b32", other, given, 1, 31, "0xffffffff")
        kept = kept + other
        ptx.do("shfl.sync.bfly.b32", rest, kept, 2, 31, "0xffffffff")
        kept = kept + rest
        address = self.partial + tile * (self.consumers * 4 * TILE_ROWS)
        ptx.do("st.shared.f32", at(address, self.offsets["partial"]), kept, when=self.keeps)
