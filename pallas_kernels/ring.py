"""A program a multiprocessor that never pauses reading: one token, and products one after another.

At batch 1 memory is what there is to wait for, and it must never stand still. A program's rows of a weight are
one range of memory. A warp of its own copies that in bulk to a ring in shared memory, as far ahead as there
is room, from the first instruction on; the others prepare x, once a program, and multiply. How they do that is
`integer` for codes of one bit and `stream` for the others.

A launch may have several products, each with the outputs of the one before it as its x. Between two of them all
programs of the grid meet at a counter in memory, while the copies of what comes next go on; but stores queue up
behind copies, so that all but a few of those wait for the program's outputs. There are as many programs as the
device runs at once: more would never meet. The first launch finds the counters at zero, and each leaves them
so.

Glossary: W consumer warps (`Config.workers`), P programs (`Config.programs`). A tile has 16 rows, a block
of it `Case.span` weights a row. A slot of the ring holds a block for each of the W warps. A run is a range of
rows; a product whose outputs are gated has two, those of the gate and those of what it lets through.
"""

import abc
import dataclasses
from collections.abc import Callable, Sequence
from typing import ClassVar

import jax.numpy as jnp

from pallas_kernels.case import TILE_ROWS, Case
from pallas_kernels.outputs import OutputWriter
from pallas_kernels.ptx import LOG2_E, Ptx, Writer, at, float_constant, over_lanes
from pallas_kernels.target import Target

_CODES = 1024  # bytes of a block's codes
_BARRIER = 8  # bytes of a barrier
_BARRIERS = 2 * _BARRIER  # those of a slot
_WORKERS = 1  # the barrier at which those that multiply meet
# How often a program looks whether the others are ready, about a minute. Then it traps, an error instead of
# waiting for ever: some other launch holds multiprocessors, and waits for this one.
_LOOKS = 1 << 26
_AHEAD = 2  # slots copied of a product before the outputs of the one before it are in memory


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


@dataclasses.dataclass(frozen=True)
class _Place:
    """Registers for where in the ring a warp is: the slot, its barriers, and whose turn of them it is."""

    slot: str
    barrier: str
    parity: str


class Product(OutputWriter, abc.ABC):
    """Writes one product of such a program; one method a part of it.

    Args:
        case: what is static about it; with `gated`, N rows of the gate are followed by N others.
        workers: W.
        programs: P.
        target: the GPU.
        ptx: what it is written to, or None for a block of its own.
        operands: what the block calls them, if it is not its own.
        position: its place among the launch's products.
        gated: whether an output is the product of a row of the second half and of the SiLU of the first's.
    """

    def __init__(
        self,
        case: Case,
        workers: int,
        programs: int,
        target: Target,
        *,
        ptx: Ptx | None = None,
        operands: dict[str, str] | None = None,
        position: int = 0,
        gated: bool = False,
    ) -> None:
        super().__init__(case, target, ptx, operands)
        # The codebooks of all products are fetched at the start: later they would queue up behind the weights.
        self.books_name = f"books{position}"
        self.workers, self.programs, self.gated = workers, programs, gated
        self.runs = 2 if gated else 1
        self.run_tiles = case.tiles // self.runs
        self.max_tiles = self._max_tiles()
        self.block_scales = case.planes * TILE_ROWS * jnp.dtype(case.scale_dtype).itemsize
        self.slot_bytes = workers * (_CODES + self.block_scales)
        self.partial_bytes = self.runs * self.max_tiles * workers * TILE_ROWS * 4
        self.places: dict[str, int] = {}

    def _max_tiles(self) -> int:
        """Tiles of a program of each run, or one less."""
        return -(-self.run_tiles // self.programs)

    @property
    def books_place(self) -> int:
        """Where in shared memory its codebooks are."""
        return self.places[self.books_name]

    @property
    def parts(self) -> int:
        """How many partial sums of squares a program leaves: those of each warp with outputs, a tile's."""
        return min(self.workers, self.max_tiles)

    # What depends on the arithmetic

    @abc.abstractmethod
    def areas(self) -> dict[str, int]:
        """Names and bytes of what it has in shared memory besides "partial" and "squares"."""

    @abc.abstractmethod
    def load_books(self) -> Callable[[], None]:
        """Starts loading the codebooks, and returns what stores them in shared memory."""

    def prepare_constants(self) -> None:
        """Fills what else is in shared memory and does not depend on x."""

    @abc.abstractmethod
    def prepare_x(self, meanwhile: Callable[[], object]) -> None:
        """Fills what is in shared memory of x; `meanwhile` writes what to do while it is on its way."""

    @abc.abstractmethod
    def start_run(self, run: int) -> None:
        """Sets what the tiles of a run share."""

    @abc.abstractmethod
    def start_tile(self, tile: str, run: int) -> None:
        """Sets what the blocks of a tile share."""

    @abc.abstractmethod
    def load_x(self, block: str) -> None:
        """Loads what it needs of x for a block, by its place along K."""

    @abc.abstractmethod
    def load_block(self, slot: str) -> None:
        """Loads this warp's block from a slot."""

    @abc.abstractmethod
    def multiply(self) -> None:
        """Adds the block's part to the totals."""

    @abc.abstractmethod
    def store_totals(self, tile: str) -> None:
        """Stores the totals as the warp's part of a tile's."""

    # What does not

    def locate(self, like: Writer) -> None:
        """Registers for who this lane is, as of another writer, and what its program has to do."""
        for name in ("shared", "thread", "lane", "warp", "row", "quad"):
            setattr(self, name, getattr(like, name))
        ptx = self.ptx
        self.first_tile, self.tiles = self._share(ptx.op("mov.u32", "%ctaid.x"))
        self.blocks = ptx.op("mul.lo.u32", self.tiles, self.case.blocks)
        self.residuals: list[list[str]] = []

    def _share(self, program: str) -> tuple[str, str]:
        """The first tile of a program, and how many it has, of each run."""
        return self._among(program, self.run_tiles, self.programs)

    def _among(self, program: str, tiles: int, programs: int) -> tuple[str, str]:
        """The same of so many tiles and programs: the first have one tile more, if not all have as many."""
        ptx, (each, more) = self.ptx, divmod(tiles, programs)
        before = ptx.op("min.u32", program, more)
        has_more = ptx.op("setp.lt.u32", program, more, kind="pred")
        first = ptx.op("mad.lo.u32", program, each, before)
        return first, ptx.op("selp.b32", each + 1, each, has_more)

    def weight_range(self, run: int) -> tuple[str, str, str]:
        """Where the codes and the scales of the program's rows start, and how many blocks there are."""
        ptx, case = self.ptx, self.case
        tile = ptx.op("add.u32", self.first_tile, run * self.run_tiles)
        first = ptx.op("mul.lo.u32", tile, case.blocks)
        codes = ptx.op("mad.wide.u32", first, _CODES, self.operands["packed"], kind="b64")
        scales = ptx.op(
            "mad.wide.u32", first, self.block_scales, self.operands["scales"], kind="b64"
        )
        return codes, scales, ptx.op("mov.u32", self.blocks)

    def constants(self) -> None:
        """What can be done before x is there."""
        if self.case.blocks < self.workers:  # a warp may have no block of a tile
            self._clear(self.places["partial"], self.partial_bytes)
        self.prepare_constants()

    def beside_x(self) -> None:
        """What else comes from the product before it."""
        if self.case.squares:
            self._add_squares(self.workers - 1, self.places["squares"])
        self._load_residuals()

    def _clear(self, start: int, size: int) -> None:
        """Writes zeros."""
        ptx, threads = self.ptx, 32 * self.workers
        zero = ptx.op("mov.u32", 0)
        place = ptx.op("mad.lo.u32", self.thread, 16, self.shared)
        for offset in range(0, size, 16 * threads):
            last = -(-(size - offset) // 16)
            in_bounds = ptx.op("setp.lt.u32", self.thread, min(last, threads), kind="pred")
            target = at(place, start + offset)
            ptx.do("st.shared.v4.b32", target, f"{{{', '.join([zero] * 4)}}}", when=in_bounds)

    def loop(self, ring: "Ring", place: _Place) -> None:
        """Multiplies the program's blocks of all runs."""
        ptx = self.ptx
        ptx.comment("multiply: the program's blocks as they arrive")
        self.totals = [ptx.op("mov.f32", float_constant(0.0), kind="f32") for _ in range(2)]
        for run in range(self.runs):
            self._loop_run(ring, place, run)

    def _loop_run(self, ring: "Ring", place: _Place, run: int) -> None:
        ptx, case = self.ptx, self.case
        block, tile = ptx.op("mov.u32", self.warp), ptx.op("mov.u32", 0)
        slot_end = ptx.op("mov.u32", 0)
        self.start_run(run)
        self.start_tile(tile, run)
        ptx.label(f"fdk_loop_{run}")
        done = ptx.op("setp.ge.u32", slot_end, self.blocks, kind="pred")
        ptx.do("bra", f"fdk_done_{run}", when=done)
        none = ptx.op("setp.ge.u32", block, self.blocks, kind="pred")
        ptx.do("bra", f"fdk_next_{run}", when=none)
        current = ptx.quotient(block, case.blocks)
        same = ptx.op("setp.eq.u32", current, tile, kind="pred")
        ptx.do("bra", f"fdk_same_tile_{run}", when=same)
        self._end_tile(tile, run)
        ptx.do("mov.u32", tile, current)
        self.start_tile(tile, run)
        ptx.label(f"fdk_same_tile_{run}")
        self.load_x(ptx.op("mad.lo.u32", tile, -case.blocks % 2**32, block))
        ring.wait(at(place.barrier), place.parity, f"full_{run}")
        self.load_block(place.slot)
        # The warp has what it needs; another block may take the place.
        ptx.do("bar.warp.sync", "0xffffffff")
        empty = at(place.barrier, _BARRIER)
        ptx.do("mbarrier.arrive.shared::cta.b64", "_", empty, when=ring.is_first_lane)
        self.multiply()
        ptx.do("bra", f"fdk_behind_{run}")
        # A warp without a block in the run's last slot says so, but not before it is this round's.
        ptx.label(f"fdk_next_{run}")
        ring.wait(at(place.barrier), place.parity, f"unused_{run}")
        ptx.do(
            "mbarrier.arrive.shared::cta.b64",
            "_",
            at(place.barrier, _BARRIER),
            when=ring.is_first_lane,
        )
        ptx.label(f"fdk_behind_{run}")
        ptx.do("add.u32", block, block, self.workers)
        ptx.do("add.u32", slot_end, slot_end, self.workers)
        ring.next_slot(place)
        ptx.do("bra", f"fdk_loop_{run}")
        ptx.label(f"fdk_done_{run}")
        self._end_tile(tile, run)

    def _end_tile(self, tile: str, run: int) -> None:
        """Stores the totals, and begins new ones."""
        ptx = self.ptx
        if run:
            tile = ptx.op("mad.lo.u32", self.tiles, run, tile)
        self.store_totals(tile)
        for total in self.totals:
            ptx.do("mov.f32", total, float_constant(0.0))

    # The end

    @property
    def _row_starts(self) -> range:
        """The first of the rows that the program's threads take at a time, two threads a row."""
        return range(0, self.max_tiles * TILE_ROWS, TILE_ROWS * self.workers)

    def _load_residuals(self) -> None:
        """Starts loading what the outputs are added to and scaled by: at the end it would be waited for."""
        ptx, case = self.ptx, self.case
        for start in self._row_starts if case.residual else ():
            row = ptx.op("shr.u32", self.thread, 1)
            row = ptx.op("mad.lo.u32", self.first_tile, TILE_ROWS, row)
            self.residuals.append(self._load_residual(ptx.op("add.u32", row, start)))

    def write_outputs(self) -> None:
        """Adds the warps' sums, adds the bias, and writes the outputs."""
        ptx, case = self.ptx, self.case
        ptx.comment("reduce and write: the warps' sums through shared memory")
        rows = ptx.op("mul.lo.u32", self.tiles, TILE_ROWS)
        self.squares = ptx.op("mov.f32", float_constant(0.0), kind="f32")
        # One thread of a row sums up what the even warps have stored, the other one what the odd ones have.
        self.odd = ptx.op("and.b32", self.thread, 1)
        for turn, start in enumerate(self._row_starts):
            index = ptx.op("add.u32", ptx.op("shr.u32", self.thread, 1), start)
            none = ptx.op("setp.ge.u32", index, rows, kind="pred")
            ptx.do("bra", f"fdk_no_row_{start}", when=none)
            self._write_output(index, turn, f"fdk_no_row_{start}")
            ptx.label(f"fdk_no_row_{start}")
        if case.residual:
            self._store_squares(self.squares, self.parts)

    def _write_output(self, index: str, turn: int, behind: str) -> None:
        """Writes the output of one of the program's rows, if the weight has it."""
        ptx, case = self.ptx, self.case
        n = ptx.op("mad.lo.u32", self.first_tile, TILE_ROWS, index)
        totals = [self._total(index, run) for run in range(self.runs)]
        outside = ptx.op("setp.ge.u32", n, case.n // self.runs, kind="pred")
        outside = ptx.op("selp.b32", 1, self.odd, outside)
        ptx.do("bra", behind, when=ptx.op("setp.ne.u32", outside, 0, kind="pred"))
        for run, total in enumerate(totals):
            total = self.finish(total, run)
            if case.squares:
                total = self._normalise(total, self.places["squares"])
            if case.bias_dtype is not None:
                self._add_bias(total, ptx.op("add.u32", n, run * case.n // self.runs))
            totals[run] = total
        if self.gated:
            self._store(self._gate(*totals), n, "y")
        elif case.residual:
            self._store_sum(totals[0], n, self.residuals[turn], self.squares)
        else:
            self._store(totals[0], n, "y")

    def _total(self, index: str, run: int) -> str:
        """The sum of what the warps have stored of one of the program's rows."""
        ptx = self.ptx
        # Rows r and r + 8 are neighbours among the sums.
        tile, row = ptx.op("shr.u32", index, 4), ptx.op("and.b32", index, 7)
        lower = ptx.op("and.b32", ptx.op("shr.u32", index, 3), 1)
        if run:
            tile = ptx.op("mad.lo.u32", self.tiles, run, tile)
        place = ptx.op("mad.lo.u32", tile, self.workers * 4 * TILE_ROWS, self.shared)
        place = ptx.op("mad.lo.u32", self.odd, 4 * TILE_ROWS, place)
        place = ptx.op("mad.lo.u32", row, 8, place)
        place = ptx.op("mad.lo.u32", lower, 4, place)
        parts = ptx.registers("f32", -(-self.workers // 2))
        for i, part in enumerate(parts):
            in_bounds = None
            if 2 * i + 1 == self.workers:
                ptx.do("mov.f32", part, float_constant(0.0))
                in_bounds = ptx.op("setp.eq.u32", self.odd, 0, kind="pred")
            source = at(place, self.places["partial"] + 2 * i * 4 * TILE_ROWS)
            ptx.do("ld.shared.f32", part, source, when=in_bounds)
        total = parts[0]
        for part in parts[1:]:
            total = ptx.op("add.f32", total, part, kind="f32")
        return over_lanes(ptx, "add.f32", total, (1,))

    def finish(self, total: str, run: int) -> str:
        """A row's sum, from what `store_totals` has stored."""
        del run
        return total

    def _gate(self, gate: str, value: str) -> str:
        """The SiLU of the one times the other."""
        ptx = self.ptx
        power = ptx.op("mul.f32", gate, float_constant(-LOG2_E), kind="f32")
        power = ptx.op("ex2.approx.f32", power, kind="f32")
        power = ptx.op("add.f32", power, float_constant(1.0), kind="f32")
        share = ptx.op("rcp.approx.f32", power, kind="f32")
        share = ptx.op("mul.f32", gate, share, kind="f32")
        return ptx.op("mul.f32", share, value, kind="f32")


def grid(case: Case, config: Config) -> tuple[int, int]:
    """Programs along N and M."""
    return min(config.programs, case.tiles), 1


def squares(case: Case, config: Config, target: Target, arithmetic: type[Product]) -> int:
    """How many partial sums of squares a product with a residual leaves."""
    programs = grid(case, config)[0]
    return programs * arithmetic(case, config.workers, programs, target).parts


def source(case: Case, config: Config, target: Target, arithmetic: type[Product]) -> str:
    """The PTX of a launch with one product."""
    return _single(case, config, target, arithmetic).write()


def unsupported_reason(
    case: Case, config: Config, target: Target, arithmetic: type[Product]
) -> str | None:
    """Why a launch with one product does not take a case, or None."""
    return unsupported_target(target) or case.unsupported_reason(
        config, target, lambda: _single(case, config, target, arithmetic).shared_bytes
    )


def unsupported_target(target: Target) -> str | None:
    """Why no such launch runs on a GPU, or None."""
    if target.unknown or target.has_bulk_copies:
        return target.unknown or None
    return f"{target.architecture} has no bulk copies, which are sm_90's and newer ones'"


def _single(case: Case, config: Config, target: Target, arithmetic: type[Product]) -> "Launch":
    return Launch([arithmetic(case, config.workers, grid(case, config)[0], target)])


class Ring:
    """The ring of a program: slots in shared memory, each with two barriers."""

    def __init__(self, ptx: Ptx, workers: int, start: int, slots: int, slot_bytes: int) -> None:
        self.ptx, self.workers, self.start = ptx, workers, start
        self.slots, self.slot_bytes = slots, slot_bytes
        self.barriers = start + slots * slot_bytes
        self.signalled = (
            self.barriers + slots * _BARRIERS
        )  # where copies wait for a product's outputs
        self.end = self.signalled + _BARRIER
        self.is_first_lane = ""

    def make(self, shared: str) -> None:
        """Makes the barriers: a slot is full when its bytes are there, empty when each warp says so."""
        ptx = self.ptx
        ptx.do("mbarrier.init.shared::cta.b64", at(shared, self.signalled), 1)
        for slot in range(self.slots):
            full = at(shared, self.barriers + slot * _BARRIERS)
            empty = at(shared, self.barriers + slot * _BARRIERS + _BARRIER)
            ptx.do("mbarrier.init.shared::cta.b64", full, 1)
            ptx.do("mbarrier.init.shared::cta.b64", empty, self.workers)
        ptx.do("fence.proxy.async.shared::cta")

    def locate(self, shared: str, parity: int) -> _Place:
        """The first slot; who fills it starts with parity 1, as an empty slot has no phase behind it."""
        ptx = self.ptx
        self.first_slot = ptx.op("add.u32", shared, self.start)
        self.first_barrier = ptx.op("add.u32", shared, self.barriers)
        self.last_barrier = ptx.op("add.u32", shared, self.barriers + (self.slots - 1) * _BARRIERS)
        registers = (ptx.op("mov.u32", self.first_slot), ptx.op("mov.u32", self.first_barrier))
        return _Place(*registers, ptx.op("mov.u32", parity))

    def next_slot(self, place: _Place) -> None:
        """Moves on to the next slot; behind the last one comes the first one, with the other parity."""
        ptx = self.ptx
        wrap = ptx.op("setp.eq.u32", place.barrier, self.last_barrier, kind="pred")
        ptx.do("add.u32", place.slot, place.slot, self.slot_bytes)
        ptx.do("add.u32", place.barrier, place.barrier, _BARRIERS)
        ptx.do("mov.u32", place.slot, self.first_slot, when=wrap)
        ptx.do("mov.u32", place.barrier, self.first_barrier, when=wrap)
        ptx.do("xor.b32", place.parity, place.parity, 1, when=wrap)

    def wait(self, barrier: str, parity: str | int, name: str) -> None:
        """Waits until a barrier has completed the phase of a parity."""
        ptx = self.ptx
        ptx.label(f"fdk_wait_{name}")
        done = ptx.register("pred")
        ptx.do("mbarrier.try_wait.parity.shared::cta.b64", done, barrier, parity)
        ptx.do("bra", f"fdk_wait_{name}", when=f"!{done}")


class Launch(Writer):
    """Writes a whole launch: products one after another, each with the outputs of the one before as x.

    Args:
        products: with a common block of PTX, numbers of warps and programs, and size of a slot.
        counters: the address of a zero for each product, if there are several.
    """

    def __init__(self, products: Sequence[Product], counters: str = "") -> None:
        self.products, self.counters = products, counters
        first = products[0]
        self.ptx, self.workers, self.programs = first.ptx, first.workers, first.programs
        sizes: dict[str, int] = {}
        for product in products:
            areas = {**product.areas(), "partial": product.partial_bytes, "squares": 4}
            for name, size in areas.items():
                sizes[name] = max(sizes.get(name, 0), size)
        places, end = {}, 0
        for name, size in sizes.items():
            places[name] = end
            end += -(-size // 128) * 128
        for product in products:
            product.places = places
            if product is not first:
                product.load = "ld.global"
        # As many slots as there is room for, at most what a program has; two at least.
        most = sum(p.runs * -(-p.max_tiles * p.case.blocks // p.workers) for p in products)
        room = (first.target.shared_bytes - end - _BARRIER) // (first.slot_bytes + _BARRIERS)
        self.ring = Ring(self.ptx, self.workers, end, max(2, min(room, most)), first.slot_bytes)

    @property
    def shared_bytes(self) -> int:
        """Shared memory of a program."""
        return self.ring.end

    def write(self) -> str:
        """The kernel's PTX."""
        ptx, ring, first = self.ptx, self.ring, self.products[0]
        ptx.share(self.shared_bytes)
        ptx.comment("locate: this lane and its program's rows")
        self._locate_lane()
        ring.is_first_lane = ptx.op("setp.eq.u32", self.lane, 0, kind="pred")
        is_producer = ptx.op("setp.eq.u32", self.warp, self.workers, kind="pred")
        copies = ptx.op("setp.eq.u32", self.thread, 32 * self.workers, kind="pred")
        first.locate(self)
        ptx.do("bra", "fdk_prepare", when=f"!{copies}")
        ptx.comment("copy: the producer makes the ring and fills it")
        ring.make(self.shared)
        place, weight_range = ring.locate(self.shared, 1), first.weight_range(0)
        self._copy(first, weight_range, place, "start", ring.slots, empty=True)
        ptx.label("fdk_prepare")
        ptx.comment("prepare: the consumers' x, codebooks and constants")
        ptx.do("bra", "fdk_prepared", when=is_producer)
        first.prepare_x(self._prepare_others)
        ptx.label("fdk_prepared")
        ptx.do("barrier.sync", 0)
        ptx.do("bra", "fdk_multiply", when=f"!{is_producer}")
        ptx.do("bra", "fdk_end", when=f"!{copies}")
        ptx.comment("copy: the producer fills what the consumers have emptied")
        self._copy(first, weight_range, place, "rest")
        self._copy_others(place)
        ptx.do("bra", "fdk_end")
        ptx.label("fdk_multiply")
        self._multiply()
        ptx.label("fdk_end")
        return ptx.text()

    def _prepare_others(self) -> None:
        """What is to be done while the first x is on its way."""
        first, *others = self.products
        for product in others:
            product.locate(self)
        stores = [product.load_books() for product in self.products]
        first.beside_x()
        for store in stores:
            store()
        self._sync_consumers()
        first.constants()

    # The producer warp

    def _copy_others(self, place: _Place) -> None:
        """Copies what is behind the first run of the first product."""
        for number, product in enumerate(self.products):
            if number:
                product.locate(self)
            for run in range(0 if number else 1, product.runs):
                weight_range = product.weight_range(run)
                if number and not run:
                    self._copy(product, weight_range, place, f"{number}_ahead", _AHEAD)
                    signalled = at(self.shared, self.ring.signalled)
                    self.ring.wait(signalled, (number - 1) % 2, f"said_{number}")
                self._copy(product, weight_range, place, f"{number}_{run}")

    def _copy(
        self,
        product: Product,
        weight_range: tuple[str, str, str],
        place: _Place,
        name: str,
        slots: int | None = None,
        empty: bool = False,
    ) -> None:
        """Starts the copies of so many slots of a stretch, or of all that are left, when they are empty.

        With `empty` they are known to be.
        """
        ptx, workers, (codes_from, scales_from, left) = self.ptx, self.workers, weight_range
        count = ptx.op("mov.u32", 0)
        ptx.label(f"fdk_copy_{name}")
        none = ptx.op("setp.eq.u32", left, 0, kind="pred")
        ptx.do("bra", f"fdk_copied_{name}", when=none)
        if slots is not None:
            enough = ptx.op("setp.eq.u32", count, slots, kind="pred")
            ptx.do("bra", f"fdk_copied_{name}", when=enough)
            ptx.do("add.u32", count, count, 1)
        if not empty:
            self.ring.wait(at(place.barrier, _BARRIER), place.parity, name)
        blocks = ptx.op("min.u32", left, workers)
        codes = ptx.op("mul.lo.u32", blocks, _CODES)
        scales = ptx.op("mul.lo.u32", blocks, product.block_scales)
        both = ptx.op("add.u32", codes, scales)
        ptx.do("mbarrier.arrive.expect_tx.shared::cta.b64", "_", at(place.barrier), both)
        for target, source, size in (
            (at(place.slot), at(codes_from), codes),
            (at(place.slot, workers * _CODES), at(scales_from), scales),
        ):
            opcode = "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes"
            opcode += ".L2::cache_hint"
            policy = ptx.policy("evict_first")  # read once: whatever else is in L2 shall stay
            ptx.do(opcode, target, source, size, at(place.barrier), policy)
        ptx.do("add.u64", codes_from, codes_from, workers * _CODES)
        ptx.do("add.u64", scales_from, scales_from, workers * product.block_scales)
        ptx.do("sub.u32", left, left, blocks)
        self.ring.next_slot(place)
        ptx.do("bra", f"fdk_copy_{name}")
        ptx.label(f"fdk_copied_{name}")

    # The consumer warps

    def _multiply(self) -> None:
        place, last = self.ring.locate(self.shared, 0), len(self.products) - 1
        for number, product in enumerate(self.products):
            self.ptx.prefix = f"p{number}_"
            if number:
                product.locate(self)
                product.constants()
                self._wait_for_programs(number - 1)
                if number == last:
                    self._clear_counters(last)
                product.prepare_x(product.beside_x)
                self._sync_consumers()
            product.loop(self.ring, place)
            self._sync_consumers()
            product.write_outputs()
            if number < last:
                # All have stored theirs, and the next product's constants may take the places of the sums.
                self._sync_consumers()
                self._signal_outputs(number)
        self.ptx.prefix = ""

    def _sync_consumers(self) -> None:
        """All consumers wait for each other."""
        self.ptx.do("barrier.sync", _WORKERS, 32 * self.workers)

    def _first_thread(self) -> str:
        return self.ptx.op("setp.eq.u32", self.thread, 0, kind="pred")

    def _signal_outputs(self, number: int) -> None:
        """Says that the program's outputs are in memory: to the other programs, and to the producer warp."""
        first = self._first_thread()
        counter = at(self.counters, 4 * number)
        self.ptx.do("red.release.gpu.global.add.u32", counter, 1, when=first)
        signalled = at(self.shared, self.ring.signalled)
        self.ptx.do("mbarrier.arrive.shared::cta.b64", "_", signalled, when=first)

    def _wait_for_programs(self, number: int) -> None:
        """Waits until the outputs of all programs are in memory."""
        ptx = self.ptx
        ptx.comment("barrier: the outputs of all programs, of the whole grid")
        ptx.do("bra", "fdk_others_are_ready", when=f"!{self._first_thread()}")
        looks = ptx.op("mov.u32", 0)
        ptx.label("fdk_others")
        ready = ptx.op("ld.acquire.gpu.global.b32", at(self.counters, 4 * number))
        all_ready = ptx.op("setp.ge.u32", ready, self.programs, kind="pred")
        ptx.do("bra", "fdk_others_are_ready", when=all_ready)
        ptx.do("add.u32", looks, looks, 1)
        again = ptx.op("setp.lt.u32", looks, _LOOKS, kind="pred")
        ptx.do("bra", "fdk_others", when=again)
        ptx.do("trap")
        ptx.label("fdk_others_are_ready")
        self._sync_consumers()

    def _clear_counters(self, last: int) -> None:
        """The last program that has met all others leaves the counters as it found them."""
        ptx = self.ptx
        ptx.do("bra", "fdk_counters_in_use", when=f"!{self._first_thread()}")
        before = ptx.op("atom.relaxed.gpu.global.add.u32", at(self.counters, 4 * last), 1)
        not_last = ptx.op("setp.ne.u32", before, self.programs - 1, kind="pred")
        ptx.do("bra", "fdk_counters_in_use", when=not_last)
        zero = ptx.op("mov.u32", 0)
        for number in range(last + 1):
            ptx.do("st.global.b32", at(self.counters, 4 * number), zero)
        ptx.label("fdk_counters_in_use")
