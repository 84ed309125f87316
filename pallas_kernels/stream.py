"""Products of one token with codes of 2, 4 and 8 bits in the program of `ring`.

What it multiplies is what `matvec` does, with x and the weight from shared memory. Each program has rows of one
codebook (of two, if its outputs are gated), for which it makes the decoder's table once. By itself such a
product is no faster than `matvec`'s; `chain` has several in a launch.
"""

import dataclasses
from collections.abc import Callable

import jax.numpy as jnp

from pallas_kernels import decoding, ring_product
from pallas_kernels.case import Case
from pallas_kernels.layout import HALF_PLANE, PART_BYTES, PLANE, TILE_ROWS, scale_offset
from pallas_kernels.outputs import Load
from pallas_kernels.registers import Register, at, vector, wide
from pallas_kernels.ring_plan import ProductPlan, unsupported_groups

_STEPS = 4  # instructions a plane
_MIN_GROUP = 8  # weights of a row that a lane has next to each other
_AT_ONCE = 8  # vectors of x that a thread loads at once


def unsupported_product(case: Case, consumers: int, programs: int) -> str | None:
    """Why the arithmetic does not take a case, or None."""
    if case.bits == 1 or case.m != 1:
        return f"{case.m} tokens and {case.bits} bits are not 1 and 2 to 8"
    if case.group_size < _MIN_GROUP:
        return f"group_size={case.group_size} is less than {_MIN_GROUP}"
    if (reason := unsupported_groups(case, consumers)) is not None:
        return reason
    if case.codebooks > min(programs, case.tiles):
        return f"{case.codebooks} codebooks are more than {programs} programs or {case.tiles} tiles"
    return None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan(ProductPlan):
    """A product by decoded weights."""

    @property
    def run_codebooks(self) -> int:
        """Codebooks of a run."""
        return max(1, self.case.codebooks // self.runs)

    @property
    def codebook_programs(self) -> int:
        """Programs that have rows of a codebook."""
        return self.programs // self.run_codebooks

    @property
    def max_tiles(self) -> int:
        """Tiles of a program of each run, or one less."""
        return -(-(self.run_tiles // self.run_codebooks) // self.codebook_programs)

    @property
    def decoders(self) -> int:
        """Codebooks of a program, each with a decoder."""
        return self.runs if self.case.codebooks > 1 else 1

    @property
    def scale_runs(self) -> int:
        """Groups of a row of a block that a lane has weights of."""
        return max(1, self.case.span // max(self.case.group_size, HALF_PLANE))

    @property
    def run_groups(self) -> int:
        """How many groups further the next one is that the lane has weights of."""
        return max(1, HALF_PLANE // self.case.group_size)

    def run_of(self, plane: int, step: int) -> int:
        """Which of them the weights of a step of a plane are of."""
        return (2 * plane + step // 2) * self.scale_runs // (2 * self.case.planes)

    @property
    def scales_weights(self) -> bool:
        """Whether scales multiply weights, since lanes whose products are added have groups of their own."""
        return self.case.group_size < HALF_PLANE

    @property
    def table_bytes(self) -> int:
        """Shared memory of a decoder's table."""
        return decoding.shared_bytes(self.case.bits, uniform=self.case.computes_values)

    def areas(self) -> dict[str, int]:
        """The decoders' tables, and x."""
        case = self.case
        codebooks = self.decoders * 4 * 2**case.bits
        x = case.blocks * case.span * 2
        return {"tables": self.decoders * self.table_bytes, "x": x, self.codebooks_name: codebooks}


class Product(ring_product.Product):
    """Writes a product by decoded weights."""

    plan_class = Plan
    plan: Plan

    def __init__(self, *args, **options) -> None:
        super().__init__(*args, **options)
        case = self.case
        self.decoders = [
            decoding.decoder(self.ptx, case.bits, case.x_dtype, uniform=case.computes_values)
            for _ in range(self.plan.decoders)
        ]
        for i, decoder in enumerate(self.decoders):
            decoder.table_offset = i * self.plan.table_bytes
        self.decoder = self.decoders[0]

    def _share(self, program: Register) -> tuple[Register, Register]:
        if self.plan.run_codebooks == 1:
            self.codebook_index = None
            return super()._share(program)
        # Rows of one codebook; programs that are left over have none.
        ptx, codebook_tiles = self.ptx, self.plan.run_tiles // self.plan.run_codebooks
        self.codebook_index = program // self.plan.codebook_programs
        rank = program - self.codebook_index * self.plan.codebook_programs
        first, tiles = self._among(rank, codebook_tiles, self.plan.codebook_programs)
        inside = self.codebook_index < self.plan.run_codebooks
        first = first + self.codebook_index * codebook_tiles
        return first, ptx.op("selp.b32", tiles, 0, inside)

    # Before the loop

    def load_codebooks(self) -> Callable[[], None]:
        """Loads the codebook of the program's rows of each run."""
        ptx, threads, values = self.ptx, 32 * self.consumers, 2**self.case.bits
        codebook, loads = self.operands["codebook"], []
        if self.codebook_index is not None:
            last = ptx.op("min.u32", self.codebook_index, self.plan.run_codebooks - 1)
            codebook = codebook + last * (4 * values)
        for run, decoder in enumerate(self.decoders):
            decoder.space = "global"
            source = codebook + run * self.plan.run_codebooks * 4 * values
            for start in range(0, values, threads):
                index = self.thread + start
                in_bounds = index < values
                address = self.shared + index * 4
                value = decoder.value(source, index, in_bounds)
                loads.append(
                    (at(address, self.codebooks_offset + run * 4 * values), value, in_bounds)
                )
            decoder.space = "shared"

        def store() -> None:
            for target, value, in_bounds in loads:
                ptx.do("st.shared.f32", target, value, when=in_bounds)

        return store

    def prepare_constants(self) -> None:
        """Makes the decoders' tables."""
        for run, decoder in enumerate(self.decoders):
            offset = self.codebooks_offset + run * 4 * 2**self.case.bits
            codebook = self.shared + offset
            decoder.set_up(codebook, self.thread, 32 * self.consumers)

    def prepare_x(self, meanwhile: Callable[[], object]) -> None:
        """Copies x."""
        ptx, threads = self.ptx, 32 * self.consumers
        count = self.case.blocks * self.case.span // 8
        address = self._row("x") + self.thread * 16
        target = self.shared + self.thread * 16
        starts = range(0, count, threads)
        for first in range(0, len(starts), _AT_ONCE):
            loads = []
            for start in starts[first : first + _AT_ONCE]:
                in_bounds = self.thread < min(count - start, threads)
                words = ptx.registers("b32", 4)
                loads.append(Load(words, at(address, 16 * start), in_bounds))
                self._load(loads[-1])
            if not first:
                meanwhile()
            for start, (words, _, in_bounds) in zip(starts[first:], loads, strict=False):
                stored = at(target, self.offsets["x"] + 16 * start)
                ptx.do("st.shared.v4.b32", stored, vector(words), when=in_bounds)

    # The loop over the program's blocks

    def start_run(self, run: int) -> None:
        """Where this lane's operands are."""
        self.decoder = self.decoders[min(run, len(self.decoders) - 1)]
        if run:
            return
        ptx = self.ptx
        self.has_token = self.row.eq(0)
        self.keeps = self.thread_in_group.eq(0)
        self.x_address = self.shared + self.thread_in_group * 16
        self.codes = self.codes_in_slot()
        self.locate_scales()
        address = self.shared + self.warp * (4 * TILE_ROWS)
        self.partial = address + self.row * 8
        self.zero = ptx.zero()

    def first_scales(self) -> Register:
        """Where in a slot the scales of the lane's first group are."""
        scales = super().first_scales()
        if not self.plan.scales_weights:
            return scales
        # Of half a plane a lane has 8 weights, from 8 times its `thread_in_group` on.
        group = self.thread_in_group // (self.case.group_size // _MIN_GROUP)
        return scales + group * (2 * self.plan.scale_bytes)

    def start_tile(self, tile: Register, run: int) -> None:
        """Nothing: the rows have one codebook."""

    def load_x(self, block: Register) -> None:
        """The x of a block's planes, for the lanes of the column that has a token."""
        ptx, case = self.ptx, self.case
        address = self.x_address + block * (case.span * 2)
        self.x = []
        for plane in range(case.planes):
            words = ptx.registers("b32", 8)
            for half in range(2):
                part = vector(words[4 * half : 4 * half + 4])
                offset = self.offsets["x"] + plane * 2 * PLANE + half * PLANE
                ptx.do("ld.shared.v4.b32", part, at(address, offset), when=self.has_token)
            self.x.append(self.decoder.paired(words))

    def load_block(self, slot: Register) -> None:
        """The codes, and the scales of the upper and the lower row."""
        ptx, runs = self.ptx, self.plan.scale_runs
        words = self.plan.scale_bytes // 2  # of a pair of scales
        self.words = ptx.registers("b32", 4 * self.case.parts)
        kind = "f32" if self.case.scale_dtype == jnp.float32 else "b32"
        registers = ptx.registers(kind, runs * words)
        self.scale_pairs = [registers[i * words : (i + 1) * words] for i in range(runs)]
        codes, scales = slot + self.codes, self.block_scales(slot)
        for i in range(self.case.parts):
            part = vector(self.words[4 * i : 4 * i + 4])
            ptx.do("ld.shared.v4.b32", part, at(codes, i * PART_BYTES))
        # Together those that are neighbours for a lane.
        each = words if self.plan.scales_weights else min(4, runs * words)
        for first in range(0, runs * words, each):
            group = first // words * self.plan.run_groups
            offset = self.scales_offset + scale_offset(group, self.plan.scale_bytes)
            width, part = wide(registers[first : first + each])
            ptx.do(f"ld.shared{width}.b32", part, at(scales, offset))

    def multiply(self) -> None:
        """Adds the products of the planes, times their scales, to the totals."""
        steps = [(plane, step) for plane in range(self.case.planes) for step in range(_STEPS)]
        if self.plan.scales_weights:
            self._multiply_scaled(steps)
            return
        ptx, run_of = self.ptx, self.plan.run_of
        for run, pair in enumerate(self.scale_pairs):
            sums = ptx.registers("f32", 4)
            for i, step in enumerate(step for step in steps if run_of(*step) == run):
                self._dot(step, sums, self.decoder.operands(self.words, *step), fresh=i == 0)
            factors = self._factors(pair)
            for total, factor, part in zip(self.totals, factors, sums[::2], strict=True):
                ptx.do("fma.rn.f32", total, factor, part, total)

    def _multiply_scaled(self, steps: list[tuple[int, int]]) -> None:
        """The same where each lane's weights have to be multiplied by their scales before."""
        ptx, kind, known = self.ptx, self.decoder.kind, {}
        sums = ptx.registers("f32", 4)
        for i, step in enumerate(steps):
            run = self.plan.run_of(*step)
            if run not in known:
                factors = self._factors(self.scale_pairs[run])
                known[run] = 2 * [self.decoder.pack(factor, factor) for factor in factors]
            operands = self.decoder.operands(self.words, *step)
            pairs = zip(operands, known[run], strict=True)
            scaled = [ptx.multiply_halves(kind, weights, factor) for weights, factor in pairs]
            self._dot(step, sums, scaled, fresh=i == 0)
        for total, part in zip(self.totals, sums[::2], strict=True):
            ptx.do("add.f32", total, total, part)

    def _dot(
        self, position: tuple[int, int], sums: list[Register], operands: list[Register], fresh: bool
    ) -> None:
        """Adds the products of a step of a plane with its x to the sums."""
        plane, step = position
        x = self.x[plane][2 * step : 2 * step + 2]
        start = [self.zero] * 4 if fresh else None
        self.ptx.multiply_add(self.decoder.kind, sums, operands, x, start)

    def _factors(self, pair: list[Register]) -> list[Register]:
        """The scales of the upper and the lower row, float32."""
        if self.case.scale_dtype == jnp.float32:
            return pair
        return decoding.unpack(self.ptx, pair[0], self.case.scale_dtype)

    def store_totals(self, tile: Register) -> None:
        """Stores the sums of the column that has a token."""
        address = self.partial + tile * (self.consumers * 4 * TILE_ROWS)
        target = at(address, self.offsets["partial"])
        self.ptx.do("st.shared.v2.b32", target, vector(self.totals), when=self.keeps)

    def finish(self, total: Register, run: int) -> Register:
        """The sum times what the decoder has left out."""
        factor = self.decoders[min(run, len(self.decoders) - 1)].factor
        return total if factor is None else (total * factor)
