"""The kernel for one row of x and codes of one bit: sums of integers on the tensor cores.

Decoding to floats takes an instruction a weight, more than reading takes time. Masked codes are integers
already, a byte each, four to an instruction, for `mma.sync.m16n8k32`. So x becomes integers: 16 bits, scaled
by the largest of 64 neighbours, as a high and a low byte. With two values any codebook is affine:

    sum x w = scale (first * sum x + (second - first) * sum of the x whose code is set)

The eight columns of the instruction are the high and low bytes of four planes of x. Codes of two planes are in
one operand, a byte each in turns, where the columns of the other have noughts; and the columns of the two
planes whose codes it has not hold sums that nobody reads. A mask leaves a code at one bit of its byte, the
same for all codes of a register: what that makes of the sums is divided out again, in x for the registers of
upper and lower halves of a step, and at the end for upper and lower rows and for planes. An infinity in x makes
the scale infinite and itself the only integer that is not nought.

A residual sum and the RMS norm behind it need no launch of their own: see `pallas_kernels.residual_matmul`.

What is left to wait for is memory, and it must never pause: a program a multiprocessor, whose rows are one
stretch of memory. A warp of its own copies that in bulk to a ring in shared memory, as far ahead as there is
room, from the first instruction on; meanwhile the others make integers of x, once, in shared memory.

Glossary: W warps that multiply (`Config.workers`), P programs (`Config.programs`). A tile has 16 rows, a
block of it 512 weights a row: two fourfolds of four planes of 64. A slot of the ring holds a block for each
of the W warps.
"""

import dataclasses
import functools
from typing import ClassVar

import jax.numpy as jnp

from pallas_kernels import decoding
from pallas_kernels.case import PLANE, SHARED_BYTES, TILE_ROWS, Case
from pallas_kernels.outputs import OutputWriter, parts_of_squares
from pallas_kernels.ptx import at, float_constant, over_lanes, vector

_PLANES = 4  # of a fourfold
_CODES = 1024  # bytes of a block's codes
_X = 1024  # bytes of a block of x
_INTEGERS = 1024  # bytes of the integers of a fourfold of x: 8 words a lane
_SUMS = 8  # bytes of a plane's scale and sum
_BOOK = 8  # bytes of a codebook's first value and the step to the second
_BARRIERS = 16  # bytes of a slot's two barriers
_LARGEST = 32512.0  # of the integers: its high byte, rounded, is 127
# The last bits of a float of this size are an integer. Low bytes have a bias of 128.
_MAGIC = 1.5 * 2**23 + 128
_MAGIC_BITS = 0x4B400080
_FINITE = 2.0**127
_TINY = 2.0**-112  # smaller x are not told apart from nought, if there are no others


@dataclasses.dataclass(frozen=True)
class Config:
    """Launch configuration: W and P of the module's glossary."""

    workers: int = 16
    programs: int = 132
    cluster: ClassVar[int] = 1
    rows: ClassVar[int] = TILE_ROWS  # at whose multiples the codebook may change

    @property
    def warps(self) -> int:
        """Warps of a program: those that multiply, and the one that copies."""
        return self.workers + 1


def unsupported_reason(case: Case, config: Config) -> str | None:
    """Why the kernel does not take a case, or None."""
    if case.bits != 1 or case.m != 1 or case.group_size != PLANE:
        return (
            f"{case.m} tokens, {case.bits} bits in groups of {case.group_size} are not 1, 1 and 64"
        )
    return case.unsupported_reason(config, lambda: _Writer(case, config).shared_bytes)


def grid(case: Case, config: Config) -> tuple[int, int]:
    """Programs along N and M."""
    return min(config.programs, case.tiles), 1


def squares(case: Case, config: Config) -> int:
    """How many partial sums of squares a case with a residual leaves."""
    rows = _most_tiles(case, config) * TILE_ROWS
    return parts_of_squares(grid(case, config)[0], rows, config.warps)


def _most_tiles(case: Case, config: Config) -> int:
    """Tiles of a program, or one less."""
    return -(-case.tiles // grid(case, config)[0])


def source(case: Case, config: Config) -> str:
    """The kernel's PTX."""
    return _Writer(case, config).write()


class _Writer(OutputWriter):
    """Writes the PTX of one case; one method a part of the kernel."""

    def __init__(self, case: Case, config: Config) -> None:
        super().__init__(case)
        self.config = config
        self.workers, self.programs = config.workers, grid(case, config)[0]
        self.decoder = decoding.decoder(self.ptx, 1, case.x_dtype, exact=True)
        self.block_scales = 8 * TILE_ROWS * jnp.dtype(case.scale_dtype).itemsize  # bytes
        self.most_tiles = _most_tiles(case, config)
        self.slot_bytes = self.workers * (_CODES + self.block_scales)
        # Shared memory: integers of x, scales and sums of x, codebooks, partial sums, then the ring.
        self.places, end = {}, 0
        for name, size in (
            ("integers", case.blocks * 2 * _INTEGERS),
            ("plane_sums", case.blocks * 2 * _PLANES * _SUMS),
            ("books", case.books * _BOOK),
            ("partial", self.most_tiles * self.workers * TILE_ROWS * 4),
            ("squares", 4),
        ):
            self.places[name] = end
            end += -(-size // 128) * 128
        self.ring = end
        # As many slots as there is room for, at most what a program has; two at least.
        most = -(-self.most_tiles * case.blocks // self.workers)
        room = (SHARED_BYTES - end) // (self.slot_bytes + _BARRIERS)
        self.slots = max(2, min(room, most))
        self.barriers = self.ring + self.slots * self.slot_bytes
        # Threads of a program that write an output, in turns if there are more rows.
        self.threads = 32 * config.warps
        self.turns = range(0, self.most_tiles * TILE_ROWS, self.threads)

    @property
    def shared_bytes(self) -> int:
        """Shared memory of a program."""
        return self.barriers + self.slots * _BARRIERS

    def write(self) -> str:
        ptx = self.ptx
        ptx.share(self.shared_bytes)
        self._locate()
        self._load_residuals()
        ptx.do("bra", "fdk_prepare", when=f"!{self.copies}")
        self._start_ring()
        self._copy("first", self.slots, wait=False)
        # Round the ring once: a slot is empty when the barrier's first phase is over.
        ptx.do("mov.u32", self.parity, 0)
        ptx.label("fdk_prepare")
        ptx.do("bra", "fdk_prepared", when=self.is_copier)
        self._prepare()
        ptx.label("fdk_prepared")
        ptx.do("barrier.sync", 0)
        ptx.do("bra", "fdk_multiply", when=f"!{self.is_copier}")
        ptx.do("bra", "fdk_write", when=f"!{self.copies}")
        self._copy("more", None, wait=True)
        ptx.do("bra", "fdk_write")
        ptx.label("fdk_multiply")
        self._loop()
        ptx.label("fdk_write")
        ptx.do("barrier.sync", 0)
        self._write_outputs()
        return ptx.text()

    def _locate(self) -> None:
        """Registers for who this lane is and what its program has to do."""
        ptx, case = self.ptx, self.case
        self._locate_lane()
        self.is_first_lane = ptx.op("setp.eq.u32", self.lane, 0, kind="pred")
        self.is_copier = ptx.op("setp.eq.u32", self.warp, self.workers, kind="pred")
        self.copies = ptx.op("setp.eq.u32", self.thread, 32 * self.workers, kind="pred")
        # The first programs have one tile more, if they do not all have as many.
        program, (each, more) = ptx.op("mov.u32", "%ctaid.x"), divmod(case.tiles, self.programs)
        before = ptx.op("min.u32", program, more)
        self.first_tile = ptx.op("mad.lo.u32", program, each, before)
        has_more = ptx.op("setp.lt.u32", program, more, kind="pred")
        self.tiles = ptx.op("selp.b32", each + 1, each, has_more)
        self.blocks = ptx.op("mul.lo.u32", self.tiles, case.blocks)

    # The warp that copies

    def _start_ring(self) -> None:
        """Makes the barriers: a slot is full when its bytes are there, empty when each warp says so."""
        ptx = self.ptx
        for slot in range(self.slots):
            full = at(self.shared, self.barriers + slot * _BARRIERS)
            empty = at(self.shared, self.barriers + slot * _BARRIERS + 8)
            ptx.do("mbarrier.init.shared::cta.b64", full, 1)
            ptx.do("mbarrier.init.shared::cta.b64", empty, self.workers)
        ptx.do("fence.proxy.async.shared::cta")
        first = ptx.op("mul.lo.u32", self.first_tile, self.case.blocks)
        self.codes_from = ptx.op("mad.wide.u32", first, _CODES, self.operands["packed"], kind="b64")
        self.scales_from = ptx.op(
            "mad.wide.u32", first, self.block_scales, self.operands["scales"], kind="b64"
        )
        self.left = ptx.op("mov.u32", self.blocks)
        self._start_round()

    def _start_round(self) -> None:
        ptx = self.ptx
        self.slot = ptx.op("add.u32", self.shared, self.ring)
        self.barrier = ptx.op("add.u32", self.shared, self.barriers)
        self.last_barrier = ptx.op("add.u32", self.barrier, (self.slots - 1) * _BARRIERS)
        self.parity = ptx.op("mov.u32", 0)

    def _next_slot(self) -> None:
        """Moves on to the next slot; behind the last one comes the first one, with the other parity."""
        ptx = self.ptx
        wrap = ptx.op("setp.eq.u32", self.barrier, self.last_barrier, kind="pred")
        ptx.do("add.u32", self.slot, self.slot, self.slot_bytes)
        ptx.do("add.u32", self.barrier, self.barrier, _BARRIERS)
        ptx.do("add.u32", self.slot, self.shared, self.ring, when=wrap)
        ptx.do("add.u32", self.barrier, self.shared, self.barriers, when=wrap)
        ptx.do("xor.b32", self.parity, self.parity, 1, when=wrap)

    def _copy(self, name: str, slots: int | None, *, wait: bool) -> None:
        """Starts the copies of so many slots, or of all that are left, when they are empty."""
        ptx, workers = self.ptx, self.workers
        count = ptx.op("mov.u32", 0)
        ptx.label(f"fdk_copy_{name}")
        none = ptx.op("setp.eq.u32", self.left, 0, kind="pred")
        ptx.do("bra", f"fdk_copied_{name}", when=none)
        if slots is not None:
            enough = ptx.op("setp.eq.u32", count, slots, kind="pred")
            ptx.do("bra", f"fdk_copied_{name}", when=enough)
            ptx.do("add.u32", count, count, 1)
        if wait:
            self._wait(at(self.barrier, 8), name)
        blocks = ptx.op("min.u32", self.left, workers)
        codes = ptx.op("mul.lo.u32", blocks, _CODES)
        scales = ptx.op("mul.lo.u32", blocks, self.block_scales)
        both = ptx.op("add.u32", codes, scales)
        ptx.do("mbarrier.arrive.expect_tx.shared::cta.b64", "_", at(self.barrier), both)
        scales_at = at(self.slot, workers * _CODES)
        for target, source, size in (
            (at(self.slot), at(self.codes_from), codes),
            (scales_at, at(self.scales_from), scales),
        ):
            opcode = "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes"
            opcode += ".L2::cache_hint"
            policy = ptx.policy("evict_first")  # read once: whatever else is in L2 shall stay
            ptx.do(opcode, target, source, size, at(self.barrier), policy)
        ptx.do("add.u64", self.codes_from, self.codes_from, workers * _CODES)
        ptx.do("add.u64", self.scales_from, self.scales_from, workers * self.block_scales)
        ptx.do("sub.u32", self.left, self.left, blocks)
        self._next_slot()
        ptx.do("bra", f"fdk_copy_{name}")
        ptx.label(f"fdk_copied_{name}")

    def _wait(self, barrier: str, name: str) -> None:
        """Waits until a barrier has completed the phase of the parity."""
        ptx = self.ptx
        ptx.label(f"fdk_wait_{name}")
        done = ptx.register("pred")
        ptx.do("mbarrier.try_wait.parity.shared::cta.b64", done, barrier, self.parity)
        ptx.do("bra", f"fdk_wait_{name}", when=f"!{done}")

    # Before the loop: x

    def _prepare(self) -> None:
        """Makes integers of x, and what else is in shared memory: a block a warp at a time."""
        ptx, case = self.ptx, self.case
        self.infinite = ptx.register("pred")
        # Planes 0 and 1 of a fourfold have the even bytes of an operand, planes 2 and 3 the odd ones.
        upper = ptx.op("setp.ne.u32", ptx.op("and.b32", self.row, 2), 0, kind="pred")
        self.bytes = ptx.op("selp.b32", "0xFF00FF00", "0x00FF00FF", upper)
        address = ptx.op("mad.wide.u32", self.warp, _X, self.operands["x"], kind="b64")
        address = ptx.op("mad.wide.u32", self.row, 2 * PLANE, address, kind="b64")
        address = ptx.op("mad.wide.u32", self.quad, 16, address, kind="b64")
        turns = -(-case.blocks // self.workers)
        for first in range(0, turns, 3):
            here = range(first, min(first + 3, turns))
            blocks = [ptx.op("add.u32", self.warp, turn * self.workers) for turn in here]
            there = [ptx.op("setp.lt.u32", b, case.blocks, kind="pred") for b in blocks]
            pairs = [ptx.registers("b32", 8) for _ in here]
            for turn, registers, guard in zip(here, pairs, there, strict=True):
                for half in range(2):
                    source = at(address, turn * self.workers * _X + half * PLANE)
                    part = vector(registers[4 * half : 4 * half + 4])
                    ptx.do("ld.global.nc.v4.b32", part, source, when=guard)
            if not first:  # while x is on its way
                self._prepare_others()
            for turn, registers, block, guard in zip(here, pairs, blocks, there, strict=True):
                ptx.do("bra", f"fdk_no_x_{turn}", when=f"!{guard}")
                halves = (decoding.unpack(ptx, pair, case.x_dtype) for pair in registers)
                self._prepare_block([x for half in halves for x in half], block, f"{turn}")
                ptx.label(f"fdk_no_x_{turn}")

    def _prepare_others(self) -> None:
        """Fills what is in shared memory besides x."""
        threads = 32 * self.workers
        if self.case.blocks < self.workers:  # a warp may have no block of a tile
            self._clear("partial", threads)
        if self.case.squares:
            self._add_squares(self.workers - 1, self.places["squares"])
        self._prepare_books()

    def _clear(self, name: str, threads: int) -> None:
        """Writes noughts."""
        ptx, places = self.ptx, sorted([*self.places.values(), self.ring])
        start = self.places[name]
        size = places[places.index(start) + 1] - start
        zero = ptx.op("mov.u32", 0)
        place = ptx.op("mad.lo.u32", self.thread, 16, self.shared)
        for offset in range(0, size, 16 * threads):
            last = (size - offset) // 16
            there = ptx.op("setp.lt.u32", self.thread, min(last, threads), kind="pred")
            target = at(place, start + offset)
            ptx.do("st.shared.v4.b32", target, vector([zero] * 4), when=there)

    def _prepare_books(self) -> None:
        """Stores the first value of each codebook and the step to the second one."""
        ptx, case = self.ptx, self.case
        for start in range(0, case.books, 32 * self.workers):
            book = ptx.op("add.u32", self.thread, start)
            none = ptx.op("setp.ge.u32", book, case.books, kind="pred")
            ptx.do("bra", f"fdk_no_book_{start}", when=none)
            source = ptx.op("mad.wide.u32", book, 8, self.operands["codebook"], kind="b64")
            _, first, second = self.decoder.first_two(source)
            step = ptx.op("sub.f32", second, first, kind="f32")
            place = ptx.op("mad.lo.u32", book, _BOOK, self.shared)
            target = at(place, self.places["books"])
            ptx.do("st.shared.v2.b32", target, vector([first, step]))
            ptx.label(f"fdk_no_book_{start}")

    def _prepare_block(self, x: list[str], block: str, name: str) -> None:
        """Stores the integers of a block of x, and the scale and the sum of each of its planes.

        The lane has 16 x of the plane that its row counts.
        """
        ptx = self.ptx
        scale, inverses = self._scale_of(x, name)
        high, low, sums = [], [], [ptx.op("mov.u32", 0) for _ in range(2)]
        for i in range(8):
            values = [
                ptx.op("fma.rn.f32", value, inverses[i % 2], float_constant(_MAGIC))
                for value in x[2 * i : 2 * i + 2]
            ]
            for value in values:
                sums[i % 2] = ptx.op("add.u32", sums[i % 2], value)
            # A byte of two integers, each twice.
            both = ptx.op("prmt.b32", *values, "0x5511")
            high.append(ptx.op("and.b32", both, self.bytes))
            both = ptx.op("prmt.b32", *values, "0x4400")
            both = ptx.op("xor.b32", both, "0x80808080")
            low.append(ptx.op("and.b32", both, self.bytes))
        fourfold, plane = ptx.op("shr.u32", self.row, 2), ptx.op("and.b32", self.row, 3)
        place = ptx.op("mad.lo.u32", block, 2 * _INTEGERS, self.shared)
        place = ptx.op("mad.lo.u32", fourfold, _INTEGERS, place)
        place = ptx.op("mad.lo.u32", plane, 8 * 16, place)  # rows 2 p and 2 p + 1 of lanes
        place = ptx.op("mad.lo.u32", self.quad, 16, place)
        for row, words in enumerate((high, low)):
            for half in range(2):
                offset = self.places["integers"] + row * 4 * 16 + half * _INTEGERS // 2
                part = vector(words[4 * half : 4 * half + 4])
                ptx.do("st.shared.v4.b32", at(place, offset), part)
        sum_ = ptx.op("mad.lo.u32", sums[1], 4, sums[0])
        # Eight addends, and eight times four.
        sum_ = ptx.op("sub.u32", sum_, (8 + 8 * 4) * _MAGIC_BITS % 2**32)
        sum_ = over_lanes(ptx, "add.u32", sum_, (1, 2))
        whole = ptx.op("cvt.rn.f32.s32", sum_, kind="f32")
        place = ptx.op("mad.lo.u32", block, 2 * _PLANES * _SUMS, self.shared)
        place = ptx.op("mad.lo.u32", self.row, _SUMS, place)
        mine = ptx.op("setp.eq.u32", self.quad, 0, kind="pred")
        target = at(place, self.places["plane_sums"])
        ptx.do("st.shared.v2.b32", target, vector([scale, whole]), when=mine)

    def _scale_of(self, x: list[str], name: str) -> tuple[str, list[str]]:
        """The scale of the lane's plane, and what makes integers of its x: all of them, a quarter of them.

        Where there is an infinity, all x are brought into the finite range first.
        """
        ptx = self.ptx
        sizes = [ptx.op("abs.f32", value, kind="f32") for value in x]
        most = functools.reduce(lambda a, b: ptx.op("max.NaN.f32", a, b, kind="f32"), sizes)
        most = over_lanes(ptx, "max.NaN.f32", most, (1, 2))
        scale = ptx.op("mul.f32", most, float_constant(1 / _LARGEST), kind="f32")

        ptx.do("setp.eq.f32", self.infinite, most, float_constant(jnp.inf))
        somewhere = ptx.register("pred")
        ptx.do("vote.sync.any.pred", somewhere, self.infinite, "0xffffffff")
        ptx.do("bra", f"fdk_finite{name}", when=f"!{somewhere}")
        for value in x:
            ptx.do("max.f32", value, value, float_constant(-_FINITE))
            ptx.do("min.f32", value, value, float_constant(_FINITE))
        ptx.do("selp.f32", most, float_constant(_FINITE), most, self.infinite)
        ptx.label(f"fdk_finite{name}")
        most = ptx.op("max.f32", most, float_constant(_TINY), kind="f32")
        inverse = ptx.op("rcp.approx.f32", most, kind="f32")
        return scale, [
            ptx.op("mul.f32", inverse, float_constant(_LARGEST / divisor), kind="f32")
            for divisor in (1, 4)
        ]

    # The loop over the program's blocks

    def _loop(self) -> None:
        ptx, case = self.ptx, self.case
        self._start_round()
        self._locate_operands()
        block, tile = ptx.op("mov.u32", self.warp), ptx.op("mov.u32", 0)
        totals = [ptx.op("mov.f32", float_constant(0.0), kind="f32") for _ in range(2)]
        first, *steps = ptx.registers("f32", 3)
        self._load_book(tile, first, steps)
        ptx.label("fdk_loop")
        done = ptx.op("setp.ge.u32", block, self.blocks, kind="pred")
        ptx.do("bra", "fdk_done", when=done)
        current = ptx.quotient(block, case.blocks)
        same = ptx.op("setp.eq.u32", current, tile, kind="pred")
        ptx.do("bra", "fdk_same_tile", when=same)
        self._store_totals(totals, tile)
        for total in totals:
            ptx.do("mov.f32", total, float_constant(0.0))
        ptx.do("mov.u32", tile, current)
        if case.books > 1:
            self._load_book(tile, first, steps)
        ptx.label("fdk_same_tile")
        x = ptx.op("mad.lo.u32", tile, -case.blocks % 2**32, block)
        integers = ptx.op("mad.lo.u32", x, 2 * _INTEGERS, self.integers)
        sums = ptx.op("mad.lo.u32", x, 2 * _PLANES * _SUMS, self.plane_sums)
        operands = []
        for half in range(2):
            plane_sums = ptx.registers("b32", 2)
            place = at(sums, self.places["plane_sums"] + half * _PLANES * _SUMS)
            ptx.do("ld.shared.v2.b32", vector(plane_sums), place)
            operands.append((self._load_integers(integers, half), plane_sums))
        self._wait(at(self.barrier), "full")
        words, factors = self._load_block()
        # The warp has what it needs; another block may take the place.
        ptx.do("bar.warp.sync", "0xffffffff")
        empty = at(self.barrier, 8)
        ptx.do("mbarrier.arrive.shared::cta.b64", "_", empty, when=self.is_first_lane)
        for half, (x, plane_sums) in enumerate(operands):
            part, pair = words[4 * half : 4 * half + 4], factors[2 * half : 2 * half + 2]
            self._multiply(part, pair, x, plane_sums, (first, steps), totals)
        ptx.do("add.u32", block, block, self.workers)
        self._next_slot()
        ptx.do("bra", "fdk_loop")
        ptx.label("fdk_done")
        self._store_totals(totals, tile)

    def _locate_operands(self) -> None:
        """Where this lane's operands are, and constants of the lane."""
        ptx = self.ptx
        self.integers = ptx.op("mad.lo.u32", self.lane, 16, self.shared)
        self.plane_sums = ptx.op("mad.lo.u32", self.quad, _SUMS, self.shared)
        codes = ptx.op("mul.lo.u32", self.warp, _CODES)
        self.codes = ptx.op("mad.lo.u32", self.lane, 16, codes)
        scales = ptx.op("mul.lo.u32", self.warp, self.block_scales)
        self.scales = ptx.op("mad.lo.u32", self.lane, self.block_scales // 64, scales)
        # The lane's columns are those of a plane; the codes of planes 1 and 3 stand four bits higher.
        self.higher = ptx.op("setp.ne.u32", ptx.op("and.b32", self.quad, 1), 0, kind="pred")
        self.unit = ptx.op(
            "selp.f32", float_constant(1 / 16), float_constant(1.0), self.higher, kind="f32"
        )
        self.zero = ptx.op("mov.u32", 0)
        place = ptx.op("mad.lo.u32", self.warp, 4 * TILE_ROWS, self.shared)
        place = ptx.op("mad.lo.u32", self.row, 8, place)
        self.partial = ptx.op("mad.lo.u32", self.quad, 4, place)
        self.keeps = ptx.op("setp.lt.u32", self.quad, 2, kind="pred")

    def _load_book(self, tile: str, first: str, steps: list[str]) -> None:
        """The codebook of a tile's rows: the first value, and the steps that a unit of a row's sums is."""
        ptx, case = self.ptx, self.case
        place = self.shared
        if case.books > 1:
            row = ptx.op("mul.lo.u32", ptx.op("add.u32", self.first_tile, tile), TILE_ROWS)
            book = ptx.quotient(row, case.n // case.books)
            book = ptx.op("min.u32", book, case.books - 1)
            place = ptx.op("mad.lo.u32", book, _BOOK, self.shared)
        ptx.do("ld.shared.v2.b32", vector([first, steps[0]]), at(place, self.places["books"]))
        ptx.do("mul.f32", steps[0], steps[0], self.unit)
        # A lower row's codes stand one bit higher.
        ptx.do("mul.f32", steps[1], steps[0], float_constant(0.5))

    def _load_integers(self, place: str, half: int) -> list[str]:
        """The integers of a fourfold of x."""
        words = self.ptx.registers("b32", 8)
        for i in range(2):
            part = at(place, self.places["integers"] + half * _INTEGERS + i * _INTEGERS // 2)
            self.ptx.do("ld.shared.v4.b32", vector(words[4 * i : 4 * i + 4]), part)
        return words

    def _load_block(self) -> tuple[list[str], list[str]]:
        """The codes of both fourfolds; their scales of the upper and the lower row, float32."""
        ptx, case, words, factors = self.ptx, self.case, self.ptx.registers("b32", 8), []
        codes, scales = (ptx.op("add.u32", self.slot, part) for part in (self.codes, self.scales))
        for half in range(2):
            part = vector(words[4 * half : 4 * half + 4])
            ptx.do("ld.shared.v4.b32", part, at(codes, half * _CODES // 2))
        for half in range(2):
            place = at(scales, self.workers * _CODES + half * self.block_scales // 2)
            if case.scale_dtype == jnp.float32:
                factors += ptx.registers("b32", 2)
                ptx.do("ld.shared.v2.b32", vector(factors[-2:]), place)
            else:
                factors += decoding.unpack(ptx, ptx.op("ld.shared.b32", place), case.scale_dtype)
        return words, factors

    def _multiply(self, words, factors, x, plane_sums, book, totals) -> None:
        """Adds a fourfold's part to the sums of its rows."""
        ptx, (scale, whole), (first, steps) = self.ptx, plane_sums, book
        sums = [ptx.registers("b32", 4) for _ in range(2)]
        for i, word in enumerate(words):
            for part in range(2):
                masks = (0x01010101 << 4 * part + bit for bit in range(4))
                ptx.do(
                    "mma.sync.aligned.m16n8k32.row.col.s32.u8.s8.s32",
                    vector(sums[part]),
                    vector([ptx.op("and.b32", word, f"0x{mask:08x}") for mask in masks]),
                    vector(x[2 * i : 2 * i + 2]),
                    vector(sums[part] if i else [self.zero] * 4),
                )
        base = ptx.op("mul.f32", whole, first, kind="f32")
        for row in range(2):
            both = (part[2 * row : 2 * row + 2] for part in sums)
            both = [ptx.op("mad.lo.u32", high, 256, low) for high, low in both]
            sum_ = ptx.op("selp.b32", both[1], both[0], self.higher)
            value = ptx.op("cvt.rn.f32.s32", sum_, kind="f32")
            value = ptx.op("fma.rn.f32", steps[row], value, base, kind="f32")
            factor = ptx.op("mul.f32", factors[row], scale, kind="f32")
            ptx.do("fma.rn.f32", totals[row], factor, value, totals[row])

    def _store_totals(self, totals: list[str], tile: str) -> None:
        """Adds the sums of the four lanes of a row, and stores them as the warp's part of the tile's."""
        ptx = self.ptx
        upper, lower = totals
        other, rest = ptx.registers("f32", 2)
        # Of the four lanes of a row, two keep the sums of the lower one.
        given = ptx.op("selp.f32", upper, lower, self.higher, kind="f32")
        kept = ptx.op("selp.f32", lower, upper, self.higher, kind="f32")
        ptx.do("shfl.sync.bfly.b32", other, given, 1, 31, "0xffffffff")
        kept = ptx.op("add.f32", kept, other, kind="f32")
        ptx.do("shfl.sync.bfly.b32", rest, kept, 2, 31, "0xffffffff")
        kept = ptx.op("add.f32", kept, rest, kind="f32")
        place = ptx.op("mad.lo.u32", tile, self.workers * 4 * TILE_ROWS, self.partial)
        ptx.do("st.shared.f32", at(place, self.places["partial"]), kept, when=self.keeps)

    # The end

    def _load_residuals(self) -> None:
        """Starts loading what the outputs are added to and scaled by: at the end it would be waited for."""
        ptx, case = self.ptx, self.case
        self.residuals = []
        for start in self.turns if case.residual else ():
            row = ptx.op("mad.lo.u32", self.first_tile, TILE_ROWS, self.thread)
            self.residuals.append(self._load_residual(ptx.op("add.u32", row, start)))

    def _write_outputs(self) -> None:
        """Adds the warps' sums, adds the bias, and writes the outputs."""
        ptx = self.ptx
        rows = ptx.op("mul.lo.u32", self.tiles, TILE_ROWS)
        self.squares = ptx.op("mov.f32", float_constant(0.0), kind="f32")
        for turn, start in enumerate(self.turns):
            index = ptx.op("add.u32", self.thread, start)
            none = ptx.op("setp.ge.u32", index, rows, kind="pred")
            ptx.do("bra", f"fdk_no_row_{start}", when=none)
            self._write_output(index, turn, f"fdk_no_row_{start}")
            ptx.label(f"fdk_no_row_{start}")
        if self.case.residual:
            self._store_squares(self.squares, squares(self.case, self.config) // self.programs)

    def _write_output(self, index: str, turn: int, behind: str) -> None:
        """Writes the output of one of the program's rows, if the weight has it."""
        ptx, case = self.ptx, self.case
        n = ptx.op("mad.lo.u32", self.first_tile, TILE_ROWS, index)
        outside = ptx.op("setp.ge.u32", n, case.n, kind="pred")
        ptx.do("bra", behind, when=outside)
        # Rows r and r + 8 are neighbours among the sums.
        tile, row = ptx.op("shr.u32", index, 4), ptx.op("and.b32", index, 7)
        lower = ptx.op("and.b32", ptx.op("shr.u32", index, 3), 1)
        place = ptx.op("mad.lo.u32", tile, self.workers * 4 * TILE_ROWS, self.shared)
        place = ptx.op("mad.lo.u32", row, 8, place)
        place = ptx.op("mad.lo.u32", lower, 4, place)
        total = ptx.op("mov.f32", float_constant(0.0), kind="f32")
        for warp in range(self.workers):
            part = at(place, self.places["partial"] + warp * 4 * TILE_ROWS)
            ptx.do("add.f32", total, total, ptx.op("ld.shared.f32", part, kind="f32"))
        if case.squares:
            total = self._normalise(total, self.places["squares"])
        if case.bias_dtype is not None:
            self._add_bias(total, n)
        if case.residual:
            self._store_sum(total, n, self.residuals[turn], self.squares)
        else:
            self._store(total, n, "y")
