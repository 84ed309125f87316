"""A launch of `ring`: the producer warp, the consumer warps, and the barriers between products."""

import functools
import operator
from collections.abc import Sequence
from typing import Any, NamedTuple

from pallas_kernels.ptx import Writer
from pallas_kernels.registers import Memory, Register, at
from pallas_kernels.ring_plan import BARRIER, LaunchPlan
from pallas_kernels.ring_product import Product
from pallas_kernels.ring_slots import Position, Ring

_CONSUMERS = 1  # the barrier of the consumer warps
# How often a program polls whether the others are ready, about a minute. Then it traps, an error instead of
# waiting for ever: some other launch holds multiprocessors, and waits for this one.
_LOOKS = 1 << 26
_READ_ONCE = "evict_first"  # whatever else is in L2 shall stay

Range = tuple[Register, Register]  # where in memory it starts, and its bytes


class _Kept(NamedTuple):
    """Scales that are copied once: from where, their bytes (zero once they are), to where, bytes at most."""

    start: Register
    size: Register
    offset: int
    most: int


class Launch(Writer):
    """Writes a whole launch: products one after another, each with the outputs of the one before as x.

    Args:
        plan: what is planned.
        products: writers of the plan's products, with a common block of PTX.
        counters: the address of a zero for each product, if there are several.
    """

    def __init__(self, plan: LaunchPlan, products: Sequence[Product], counters: Any = None) -> None:
        self.plan, self.products, self.counters = plan, products, counters
        first = products[0]
        self.ptx, self.consumers, self.programs = first.ptx, first.consumers, first.plan.programs
        for product in products:
            product.offsets = plan.offsets
            if product is not first:
                # What this launch has written is not read-only data.
                product.load_opcode = "ld.global"
        self.ring = Ring(self.ptx, plan)

    def write(self) -> str:
        """The kernel's PTX."""
        ptx, ring, first = self.ptx, self.ring, self.products[0]
        ptx.share(self.plan.shared_bytes)
        ptx.comment("locate: this lane and its program's rows")
        self._locate_lane()
        ring.is_first_lane = self.lane.eq(0)
        is_producer = self.warp.eq(self.consumers)
        copies = self.thread.eq(32 * self.consumers) if ring.bulk else is_producer
        first.locate(self)
        ptx.do("bra", "fdk_prepare", when=~copies)
        ptx.comment("copy: the producer makes the ring and fills it")
        ring.make(self.shared)
        position, weight_range = ring.locate(self.shared, 1), first.weight_range(0)
        self._copy(first, weight_range, position, "start", self.plan.slots, empty=True, run=0)
        ptx.label("fdk_prepare")
        ptx.comment("prepare: the consumers' x, codebooks and constants")
        ptx.do("bra", "fdk_prepared", when=is_producer)
        first.prepare_x(self._prepare_others)
        ptx.label("fdk_prepared")
        ptx.do("barrier.sync", 0)
        ptx.do("bra", "fdk_multiply", when=~is_producer)
        if ring.bulk:
            ptx.do("bra", "fdk_end", when=~copies)
        ptx.comment("copy: the producer fills what the consumers have emptied")
        self._copy(first, weight_range, position, "rest")
        self._copy_others(position)
        ptx.do("bra", "fdk_end")
        ptx.label("fdk_multiply")
        self._multiply()
        ptx.label("fdk_end")
        return ptx.text()

    def _prepare_others(self) -> None:
        """What is to be done while the first x is being loaded."""
        first, *others = self.products
        for product in others:
            product.locate(self)
        stores = [product.load_codebooks() for product in self.products]
        first.beside_x()
        for store in stores:
            store()
        self._sync_consumers()
        first.constants()

    def _signalled(self, number: int) -> Memory:
        """The barrier at which the outputs of a product are signalled to the producer warp."""
        return at(self.shared, self.plan.signalled + number * BARRIER)

    # The producer warp

    def _copy_others(self, position: Position) -> None:
        """Copies what follows the first run of the first product."""
        for number, product in enumerate(self.products):
            if number:
                product.locate(self)
            for run in range(0 if number else 1, product.plan.runs):
                weight_range = product.weight_range(run)
                if number and not run:
                    self._copy(
                        product,
                        weight_range,
                        position,
                        f"{number}_ahead",
                        product.plan.ahead,
                        run=0,
                    )
                    # Each barrier is used once: however late the producer looks, its first phase is over.
                    self.ring.wait(self._signalled(number - 1), 0, f"signalled_{number}")
                begins = run or None  # of the first one some slots are under way
                self._copy(product, weight_range, position, f"{number}_{run}", run=begins)

    def _copy(
        self,
        product: Product,
        weight_range: tuple[Register, Register, Register],
        position: Position,
        name: str,
        slots: int | None = None,
        empty: bool = False,
        run: int | None = None,
    ) -> None:
        """Starts the copies of a range of the weight into so many slots, or of all that is left.

        Each waits until its slot is empty, unless with `empty` it is known to be. Kept scales come with the
        first slot of a run: of `run`, if that slot is among these.
        """
        ptx, consumers, (codes_from, scales_from, left) = self.ptx, self.consumers, weight_range
        count = ptx.op("mov.u32", 0)
        kept = None
        if product.plan.keeps_scales and run is not None:
            kept = self._kept_scales(product, scales_from, run)
        ptx.label(f"fdk_copy_{name}")
        none = left.eq(0)
        ptx.do("bra", f"fdk_copied_{name}", when=none)
        if slots is not None:
            enough = count.eq(slots)
            ptx.do("bra", f"fdk_copied_{name}", when=enough)
            ptx.do("add.u32", count, count, 1)
        if not empty:
            self.ring.wait(at(position.barrier, BARRIER), position.parity, name)
        blocks = ptx.op("min.u32", left, consumers)
        codes = (blocks * product.case.tile_bytes).low()
        ranges, scale_bytes = [(codes_from, codes)], product.plan.block_scales
        if scale_bytes:
            ranges.append((scales_from, (blocks * scale_bytes).low()))
        copy = self._copy_in_bulk if self.ring.bulk else self._copy_by_lanes
        copy(product, position, kept, *ranges)
        if kept is not None:
            ptx.do("mov.u32", kept.size, 0)
        ptx.do("add.u64", codes_from, codes_from, product.plan.codes_bytes)
        if scale_bytes:
            ptx.do("add.u64", scales_from, scales_from, consumers * scale_bytes)
        ptx.do("sub.u32", left, left, blocks)
        self.ring.next_slot(position)
        ptx.do("bra", f"fdk_copy_{name}")
        ptx.label(f"fdk_copied_{name}")

    def _kept_scales(self, product: Product, start: Register, run: int) -> _Kept:
        """The scales of all of the program's rows of a run."""
        plan = product.plan
        offset = self.plan.offsets[plan.scales_name] + run * plan.kept_scales
        return _Kept(start, (product.tiles * plan.tile_scales).low(), offset, plan.kept_scales)

    def _copy_in_bulk(
        self, product: Product, position: Position, kept: _Kept | None, *ranges: Range
    ) -> None:
        """Starts copies of codes and, if a slot has any, of scales; the slot's barrier counts their bytes."""
        ptx, full = self.ptx, at(position.barrier)
        sizes = [size for _, size in ranges]
        sizes += [] if kept is None else [kept.size]
        all_bytes = functools.reduce(operator.add, sizes)
        ptx.do("mbarrier.arrive.expect_tx.shared::cta.b64", "_", full, all_bytes)
        opcode = "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes"
        opcode += ".L2::cache_hint"
        if kept is not None:
            target = at(self.shared, kept.offset)
            operands = target, at(kept.start), kept.size, full, ptx.policy(_READ_ONCE)
            ptx.do(opcode, *operands, when=kept.size.ne(0))
        for i, (start, size) in enumerate(ranges):
            target, source = at(position.slot, i * product.plan.codes_bytes), at(start)
            ptx.do(opcode, target, source, size, full, ptx.policy(_READ_ONCE))

    def _copy_by_lanes(
        self, product: Product, position: Position, kept: _Kept | None, *ranges: Range
    ) -> None:
        """Starts copies of 16 bytes a lane; at the slot's barrier each lane arrives when its own are there."""
        ptx, target = self.ptx, position.slot + self.lane * 16
        own = (self.lane * 16).low()
        if kept is not None:
            source, area = kept.start + self.lane * 16, self.shared + self.lane * 16
            for first in range(0, kept.most, 32 * 16):
                opcode = "cp.async.cg.shared.global.L2::cache_hint"
                operands = at(area, kept.offset + first), at(source, first), 16
                in_bounds = (own + first) < kept.size
                ptx.do(opcode, *operands, ptx.policy(_READ_ONCE), when=in_bounds)
        for (start, size), block_bytes in zip(
            ranges, (product.case.tile_bytes, product.plan.block_scales), strict=False
        ):
            source = start + self.lane * 16
            for first in range(0, self.consumers * block_bytes, 32 * 16):
                in_bounds = (own + first) < size
                opcode = "cp.async.cg.shared.global.L2::cache_hint"
                operands = at(target, first), at(source, first), 16, ptx.policy(_READ_ONCE)
                ptx.do(opcode, *operands, when=in_bounds)
            target = target + product.plan.codes_bytes
        ptx.do("cp.async.mbarrier.arrive.noinc.shared::cta.b64", at(position.barrier))

    # The consumer warps

    def _multiply(self) -> None:
        position, last = self.ring.locate(self.shared, 0), len(self.products) - 1
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
            product.loop(self.ring, position)
            self._sync_consumers()
            product.reduce_and_store()
            if number < last:
                # All have stored theirs, and the next product's constants may take the memory of the sums.
                self._sync_consumers()
                self._signal_outputs(number)
        self.ptx.prefix = ""

    def _sync_consumers(self) -> None:
        """All consumers wait for each other."""
        self.ptx.do("barrier.sync", _CONSUMERS, 32 * self.consumers)

    def _first_thread(self) -> Register:
        return self.thread.eq(0)

    def _signal_outputs(self, number: int) -> None:
        """Signals that the program's outputs are in memory: to the other programs, and to the producer warp."""
        first = self._first_thread()
        counter = at(self.counters, 4 * number)
        self.ptx.do("red.release.gpu.global.add.u32", counter, 1, when=first)
        signal = self._signalled(number)
        self.ptx.do("mbarrier.arrive.shared::cta.b64", "_", signal, when=first)

    def _wait_for_programs(self, number: int) -> None:
        """Waits until the outputs of all programs are in memory."""
        ptx = self.ptx
        ptx.comment("barrier: the outputs of all programs, of the whole grid")
        ptx.do("bra", "fdk_others_are_ready", when=~self._first_thread())
        looks = ptx.op("mov.u32", 0)
        ptx.label("fdk_others")
        ready = ptx.op("ld.acquire.gpu.global.b32", at(self.counters, 4 * number))
        all_ready = ready >= self.programs
        ptx.do("bra", "fdk_others_are_ready", when=all_ready)
        ptx.do("add.u32", looks, looks, 1)
        again = looks < _LOOKS
        ptx.do("bra", "fdk_others", when=again)
        ptx.do("trap")
        ptx.label("fdk_others_are_ready")
        self._sync_consumers()

    def _clear_counters(self, last: int) -> None:
        """The last program that has met all others leaves the counters as it found them."""
        ptx = self.ptx
        ptx.do("bra", "fdk_counters_in_use", when=~self._first_thread())
        before = ptx.op("atom.relaxed.gpu.global.add.u32", at(self.counters, 4 * last), 1)
        not_last = before.ne(self.programs - 1)
        ptx.do("bra", "fdk_counters_in_use", when=not_last)
        zero = ptx.op("mov.u32", 0)
        for number in range(last + 1):
            ptx.do("st.global.b32", at(self.counters, 4 * number), zero)
        ptx.label("fdk_counters_in_use")
