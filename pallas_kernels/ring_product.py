"""One product in the program of `ring`: what all arithmetics have in common, and what each of them has to say.

The order of the stages, which `ring_launch` writes: `locate`; `load_codebooks`, `prepare_x` and `constants`,
which fill shared memory; `loop`, which multiplies; `reduce_and_store`.
"""

import abc
from collections.abc import Callable
from typing import ClassVar

from pallas_kernels import mailbox
from pallas_kernels.layout import FOUR_SCALES, TILE_ROWS
from pallas_kernels.outputs import OutputWriter
from pallas_kernels.ptx import LOG2_E, Ptx, Writer, over_lanes
from pallas_kernels.registers import Register, at, vector
from pallas_kernels.ring_plan import ProductPlan
from pallas_kernels.ring_slots import Position, Ring
from pallas_kernels.target import Target


class Product(OutputWriter, abc.ABC):
    """Writes one product of such a program: stages that depend on the arithmetic, and those that do not.

    Attributes:
        plan: what is planned.
        offsets: where its areas are in shared memory.
        first_tile, tiles: registers with the first of the program's tiles, and how many it has, of each run.
        blocks: a register with its blocks of a run.
        totals: this lane's sums of the current tile, of its upper and lower row; if it has sums of several
            tokens, of both rows for each.
    """

    plan_class: ClassVar[type[ProductPlan]]
    lane_totals = 2

    def __init__(
        self,
        plan: ProductPlan,
        target: Target,
        ptx: Ptx | None = None,
        operands: dict[str, Register] | None = None,
    ) -> None:
        super().__init__(plan.case, target, ptx, operands)
        self.plan, self.consumers = plan, plan.consumers
        self.offsets: dict[str, int] = {}

    @property
    def codebooks_offset(self) -> int:
        """Where in shared memory its codebooks are."""
        return self.offsets[self.plan.codebooks_name]

    # What depends on the arithmetic

    @abc.abstractmethod
    def load_codebooks(self) -> Callable[[], None]:
        """Starts loading the codebooks, and returns what stores them in shared memory."""

    def prepare_constants(self) -> None:
        """Fills what else is in shared memory and does not depend on x."""

    @abc.abstractmethod
    def prepare_x(self, meanwhile: Callable[[], object]) -> None:
        """Fills what is in shared memory of x; `meanwhile` writes what to do while it is being loaded."""

    @abc.abstractmethod
    def start_run(self, run: int) -> None:
        """Sets what the tiles of a run share."""

    @abc.abstractmethod
    def start_tile(self, tile: Register, run: int) -> None:
        """Sets what the blocks of a tile share."""

    @abc.abstractmethod
    def load_x(self, block: Register) -> None:
        """Loads what it needs of x for a block, by its index along K."""

    @abc.abstractmethod
    def load_block(self, slot: Register) -> None:
        """Loads this warp's block from a slot."""

    @abc.abstractmethod
    def multiply(self) -> None:
        """Adds the block's part to the totals."""

    @abc.abstractmethod
    def store_totals(self, tile: Register) -> None:
        """Stores the totals as the warp's part of a tile's."""

    # What does not

    def locate(self, like: Writer) -> None:
        """Registers for who this lane is, as of another writer, and what its program has to do."""
        for name in ("shared", "thread", "lane", "warp", "row", "thread_in_group"):
            setattr(self, name, getattr(like, name))
        ptx = self.ptx
        self.first_tile, self.tiles = self._share(ptx.op("mov.u32", "%ctaid.x"))
        self.blocks = (self.tiles * self.case.blocks).low()
        self.residuals: list[list[Register]] = []

    def _share(self, program: Register) -> tuple[Register, Register]:
        """The first tile of a program, and how many it has, of each run."""
        return self._among(program, self.plan.run_tiles, self.plan.programs)

    def _among(self, program: Register, tiles: int, programs: int) -> tuple[Register, Register]:
        """The same of so many tiles and programs: the first have one tile more, if not all have as many."""
        ptx, (each, more) = self.ptx, divmod(tiles, programs)
        before = ptx.op("min.u32", program, more)
        has_more = program < more
        first = before + program * each
        return first, ptx.op("selp.b32", each + 1, each, has_more)

    def weight_range(self, run: int) -> tuple[Register, Register, Register]:
        """Where the codes and the scales of the program's rows start, and how many blocks there are."""
        ptx, case = self.ptx, self.case
        tile = self.first_tile + run * self.plan.run_tiles
        first = (tile * case.blocks).low()
        codes = self.operands["packed"] + first * case.tile_bytes
        if self.plan.keeps_scales:
            scales = self.operands["scales"] + tile * self.plan.tile_scales
        else:
            scales = self.operands["scales"] + first * self.plan.block_scales
        return codes, scales, ptx.op("mov.u32", self.blocks)

    def constants(self) -> None:
        """What can be done before x is there."""
        if self.case.blocks < self.consumers:  # a warp may have no block of a tile
            self._clear(self.offsets["partial"], self.plan.partial_bytes)
        self.prepare_constants()

    def beside_x(self) -> None:
        """What else comes from the product before it."""
        if self.case.devices > 1 and self.plan.position == 0:
            self._open_mailboxes()
        if self.case.squares:
            self._add_squares(self.consumers - 1, self.offsets["squares"])
        self._load_residuals()

    def _open_mailboxes(self) -> None:
        """One thread leaves in shared memory where this device's words go, and the launch's number."""
        ptx, case = self.ptx, self.case
        ptx.do("bra", "fdk_mailboxes_open", when=self.thread.ne(0))
        rank, addresses = mailbox.open_all(
            ptx, self.operands["mailbox"], self.operands["addresses"], case.devices
        )
        start = mailbox.chain_start(case.devices, case.n)
        count = self.operands["mailbox"] + ptx.op("mov.u32", "%ctaid.x") * 4
        number = ptx.op("ld.global.b32", at(count, start)) + 1
        ptx.do("st.global.b32", at(count, start), number)
        area = self.offsets["peers"]
        ptx.do("st.shared.b32", at(self.shared, area), number)
        own = (rank * (case.n * mailbox.WORD)).wide() + (start + 4 * mailbox.MAX_PROGRAMS)
        for i, address in enumerate(addresses):
            ptx.do("st.shared.b64", at(self.shared, area + 8 + 8 * i), address + own)
        ptx.label("fdk_mailboxes_open")

    def _over_devices(self, total: Register, row: Register, name: str) -> Register:
        """The sum of all devices' results of a row: each sends its own to all, and adds them in one order."""
        ptx, case, area = self.ptx, self.case, self.offsets["peers"]
        number = ptx.op("ld.shared.b32", at(self.shared, area))
        stride = case.n * mailbox.WORD
        # The two sums of a launch have a part each.
        part = (self.plan.position // 2) * case.devices * stride
        for i in range(case.devices):
            box = ptx.op("ld.shared.b64", at(self.shared, area + 8 + 8 * i))
            address = box + row * mailbox.WORD
            mailbox.send(ptx, address, [total], number, offset=part)
        words = mailbox.chain_start(case.devices, case.n) + 4 * mailbox.MAX_PROGRAMS + part
        here = self.operands["mailbox"] + row * mailbox.WORD
        rows = [(here, words + i * stride) for i in range(case.devices)]
        first, *others = [own[0] for own in mailbox.receive(ptx, rows, 1, number, name)]
        total = first.as_float()
        for other in others:
            total = total + other.as_float()
        return total

    def _clear(self, start: int, size: int) -> None:
        """Writes zeros."""
        ptx, threads = self.ptx, 32 * self.consumers
        zero = ptx.op("mov.u32", 0)
        address = self.shared + self.thread * 16
        for offset in range(0, size, 16 * threads):
            last = -(-(size - offset) // 16)
            in_bounds = self.thread < min(last, threads)
            target = at(address, start + offset)
            ptx.do("st.shared.v4.b32", target, vector([zero] * 4), when=in_bounds)

    def loop(self, ring: Ring, position: Position) -> None:
        """Multiplies the program's blocks of all runs."""
        ptx = self.ptx
        ptx.comment("multiply: the program's blocks as they arrive")
        self.totals = [ptx.zero() for _ in range(self.lane_totals)]
        for run in range(self.plan.runs):
            self._loop_run(ring, position, run)

    def _loop_run(self, ring: Ring, position: Position, run: int) -> None:
        ptx, case = self.ptx, self.case
        block, tile = ptx.op("mov.u32", self.warp), ptx.op("mov.u32", 0)
        slot_end = ptx.op("mov.u32", 0)
        self.start_run(run)
        self.start_tile(tile, run)
        ptx.label(f"fdk_loop_{run}")
        done = slot_end >= self.blocks
        ptx.do("bra", f"fdk_done_{run}", when=done)
        none = block >= self.blocks
        ptx.do("bra", f"fdk_next_{run}", when=none)
        current = block // case.blocks
        same = current.eq(tile)
        ptx.do("bra", f"fdk_same_tile_{run}", when=same)
        self._end_tile(tile, run)
        ptx.do("mov.u32", tile, current)
        self.start_tile(tile, run)
        ptx.label(f"fdk_same_tile_{run}")
        index = block - tile * case.blocks
        self.load_x(index)
        if self.plan.keeps_scales:
            self._locate_kept(tile, index, run)
        ring.wait(at(position.barrier), position.parity, f"full_{run}")
        self.load_block(position.slot)
        ptx.do("bar.warp.sync", "0xffffffff")
        ring.signal_empty(position)
        self.multiply()
        ptx.do("bra", f"fdk_after_{run}")
        # A warp without a block in the run's last slot signals too, but not before the slot is this round's.
        ptx.label(f"fdk_next_{run}")
        ring.wait(at(position.barrier), position.parity, f"unused_{run}")
        ring.signal_empty(position)
        ptx.label(f"fdk_after_{run}")
        ptx.do("add.u32", block, block, self.consumers)
        ptx.do("add.u32", slot_end, slot_end, self.consumers)
        ring.next_slot(position)
        ptx.do("bra", f"fdk_loop_{run}")
        ptx.label(f"fdk_done_{run}")
        self._end_tile(tile, run)

    def _end_tile(self, tile: Register, run: int) -> None:
        """Stores the totals, and begins new ones."""
        ptx = self.ptx
        if run:
            tile = tile + self.tiles * run
        self.store_totals(tile)
        for total in self.totals:
            ptx.do("mov.f32", total, 0.0)

    # Where a lane's part of the warp's block is, in a slot

    def codes_in_slot(self) -> Register:
        """Where this lane's codes are: 16 bytes of each part of a block."""
        return (self.warp * self.case.tile_bytes).low() + self.lane * 16

    def group_in_slot(self) -> Register:
        """Which group of its row the warp's block starts with, counted from the slot's first one."""
        span, g = self.case.span, self.case.group_size
        return (self.warp * (span // g)).low() if g <= span else self.warp // (g // span)

    def locate_scales(self) -> None:
        """Where in a slot the lane's scales are, if they are there."""
        if not self.plan.keeps_scales:
            self.scales = self.first_scales()

    def first_scales(self) -> Register:
        """Where in a slot the scales of a lane's first group are."""
        return self.scales_in_slot(self.group_in_slot())

    def block_scales(self, slot: Register) -> Register:
        """Where the lane's scales of its block of a slot are, from `scales_offset` on."""
        return self.kept if self.plan.keeps_scales else slot + self.scales

    @property
    def scales_offset(self) -> int:
        """Where in a slot its scales begin, or in shared memory those that are kept."""
        plan = self.plan
        return self.offsets[plan.scales_name] if plan.keeps_scales else plan.codes_bytes

    def _locate_kept(self, tile: Register, block: Register, run: int) -> None:
        """Where the lane's scales of a block are, if all are kept."""
        case, plan = self.case, self.plan
        if case.group_size >= case.k:
            scales = (self.row * (8 * plan.scale_bytes)).low()
        else:
            scales = self.scales_in_slot(block // (case.group_size // case.span))
        self.kept = self.shared + run * plan.kept_scales + tile * plan.tile_scales + scales

    def scales_in_slot(self, group: Register) -> Register:
        """Where the scales of a group are, after the codes: of this lane's upper row, then of the lower one.

        Four groups of a row are neighbours.
        """
        size = self.plan.scale_bytes
        scales = ((group >> 2) * (FOUR_SCALES * size)).low() + (group & 3) * (2 * size)
        return scales + self.row * (8 * size)

    # The end

    @property
    def _row_starts(self) -> range:
        """The first of the rows that the program's threads take at a time, two threads a row."""
        return range(0, self.plan.max_tiles * TILE_ROWS, TILE_ROWS * self.consumers)

    def _load_residuals(self) -> None:
        """Starts loading what the outputs are added to and scaled by: at the end it would be waited for."""
        case = self.case
        for start in self._row_starts if case.residual else ():
            row = (self.thread >> 1) + self.first_tile * TILE_ROWS
            self.residuals.append(self._load_residual(row + start))

    def reduce_and_store(self) -> None:
        """Adds the warps' sums, adds the bias, and writes the outputs."""
        ptx, case = self.ptx, self.case
        ptx.comment("reduce and store: the warps' sums through shared memory")
        rows = (self.tiles * TILE_ROWS).low()
        self.squares = ptx.zero()
        # One thread of a row sums up what the even warps have stored, the other one what the odd ones have.
        self.odd = self.thread & 1
        for number, start in enumerate(self._row_starts):
            index = (self.thread >> 1) + start
            none = index >= rows
            ptx.do("bra", f"fdk_no_row_{start}", when=none)
            self._store_outputs(index, number, f"fdk_no_row_{start}")
            ptx.label(f"fdk_no_row_{start}")
            # Devices wait for each other's words, each lane as long as its own takes.
            if case.devices > 1:
                ptx.do("bar.warp.sync", "0xffffffff")
        if case.residual:
            self._store_squares(self.squares, self.plan.square_parts)

    def _store_outputs(self, index: Register, number: int, after: str) -> None:
        """Writes the outputs of one of the program's rows, if the weight has it; else goes on after them."""
        ptx, case, runs = self.ptx, self.case, range(self.plan.runs)
        n = index + self.first_tile * TILE_ROWS
        totals = [[self._total(index, run, token) for run in runs] for token in range(case.m)]
        outside = n >= (case.n // self.plan.runs)
        outside = ptx.op("selp.b32", 1, self.odd, outside)
        ptx.do("bra", after, when=outside.ne(0))
        for token, of_runs in enumerate(totals):
            self._store_output(of_runs, n, number, token)

    def _store_output(self, totals: list[Register], n: Register, number: int, token: int) -> None:
        """Writes a token's output of a row, from its sums of each run."""
        ptx, case = self.ptx, self.case
        for run, total in enumerate(totals):
            total = self.finish(total, run)
            if case.squares:
                total = self._normalise(total, self.offsets["squares"])
            if case.bias_dtype is not None:
                self._add_bias(total, n + run * case.n // self.plan.runs)
            totals[run] = total
        if self.plan.gated:
            self._store(self._gate(*totals), n, "y")
        elif case.residual:
            if case.devices > 1:
                totals[0] = self._over_devices(totals[0], n, str(number))
            self._store_sum(totals[0], n, self.residuals[number], self.squares)
        else:
            self._store(totals[0], n, "y", ptx.op("mov.u32", token) if token else None)

    def _total(self, index: Register, run: int, token: int) -> Register:
        """The sum of what the warps have stored of a token and one of the program's rows."""
        ptx = self.ptx
        # Rows r and r + 8 are neighbours among the sums.
        tile, row = index >> 4, index & 7
        lower = (index >> 3) & 1
        if run:
            tile = tile + self.tiles * run
        address = (
            self.shared
            + tile * self.plan.tile_bytes
            + self.odd * (4 * TILE_ROWS)
            + row * 8
            + lower * 4
        )
        parts = ptx.registers("f32", -(-self.consumers // 2))
        for i, part in enumerate(parts):
            in_bounds = None
            if 2 * i + 1 == self.consumers:
                ptx.do("mov.f32", part, 0.0)
                in_bounds = self.odd.eq(0)
            offset = (token * self.consumers + 2 * i) * 4 * TILE_ROWS
            source = at(address, self.offsets["partial"] + offset)
            ptx.do("ld.shared.f32", part, source, when=in_bounds)
        total = parts[0]
        for part in parts[1:]:
            total = total + part
        return over_lanes(ptx, "add.f32", total, (1,))

    def finish(self, total: Register, run: int) -> Register:
        """A row's sum, from what `store_totals` has stored."""
        del run
        return total

    def _gate(self, gate: Register, value: Register) -> Register:
        """The SiLU of the one times the other."""
        ptx = self.ptx
        power = gate * (-LOG2_E)
        power = ptx.op("ex2.approx.f32", power) + 1.0
        share = ptx.op("rcp.approx.f32", power)
        share = gate * share
        return share * value
