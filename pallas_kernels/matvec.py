"""The kernel for few rows of x: a stream of packed weights through the tensor cores, one launch.

At batch 1 a product is limited by reading the weight, if decoding it costs less than reading it. So:

- A lane loads 16 bytes of codes at a time, straight into registers; the planar layout has put there the
  weights that this lane feeds to `mma.sync.m16n8k16`. No shuffle, no shared memory, no wait for others.
- `decoding` turns codes into operands, in registers or through a table in shared memory.
- Tokens are the 8 columns of the instruction. The scale of a group multiplies its float32 sum.
- The warps of a program share K; their partial sums are added in shared memory at the end.

Triton gives no control over which lane holds what, so the body is one block of PTX; Pallas provides the
grid, the operands and the thread's indices in the program.

Glossary: W warps a program (`Config.warps`), of which V have rows of their own (`Config.row_warps`) and the
others share their K; R tiles of 16 rows a warp (`Config.tiles`), D blocks in flight a warp
(`Config.stages`), J groups of 8 tokens (`Config.columns`). C programs are a cluster (`Config.cluster`): they
have the same rows and share K, and read each other's sums at the end. One token leaves seven columns of the
instruction free; `Config.diagonal` gives them to eight planes of x: a lane loads an eighth as much, and plane
p finds its products in column p. P programs (`Config.programs`) are persistent: each takes
several shares of rows one after another, makes the decoder's table once, and loads the next share during the
sums of the one before. A tile holds
E = 8 / bits planes of 64 weights a row, each of 4 steps of the instruction; see `fdk_jax.format.packing`. A
block is a tile of each of the R.
"""

from pallas_kernels.case import Case
from pallas_kernels.layout import PLANE
from pallas_kernels.matvec_plan import Config, Plan
from pallas_kernels.ptx import ROW_LANES, over_lanes
from pallas_kernels.registers import Register, at, vector
from pallas_kernels.target import Target
from pallas_kernels.tile_sums import SumsWriter
from pallas_kernels.tile_writer import Block

__all__ = ["Config", "Plan", "grid", "source", "squares", "unsupported_reason"]


def unsupported_reason(case: Case, config: Config, target: Target) -> str | None:
    """Why the kernel does not take a case, or None."""
    if config.diagonal and (case.m > 1 or config.stages * case.planes % 8):
        return f"{case.m} tokens, {config.stages} stages of {case.planes} planes are not diagonal"
    if config.programs and (case.m > 1 or config.cluster > 1 or config.ring):
        return f"{config} cannot be persistent: it has {case.m} tokens, a cluster or a ring"
    if config.columns >= 4:
        # Sums and totals of each tile and 8 tokens, two planes of x, codes in flight, and all else.
        each = 8 * config.tiles * (config.columns + config.stages) + 16 * config.columns
        needed, available = each + (120 if case.bits == 1 else 40), min(255, 2048 // config.warps)
        if needed > available:
            return f"{config} needs some {needed} registers a thread, there are {available}"
    return case.unsupported_reason(config, target, lambda: Plan.of(case, config).shared_bytes)


def grid(case: Case, config: Config) -> tuple[int, int]:
    """Programs along N and M."""
    return Plan.of(case, config).grid


def squares(case: Case, config: Config, target: Target) -> int:
    """How many partial sums of squares a case with a residual leaves."""
    del target
    plan = Plan.of(case, config)
    return plan.grid[0] * plan.square_parts


def source(case: Case, config: Config, target: Target) -> str:
    """The kernel's PTX."""
    return _Writer(Plan.of(case, config), target).write()


class _Writer(SumsWriter):
    """Writes the kernel: `write` is its stages in order."""

    plan: Plan

    def write(self) -> str:
        plan, ptx = self.plan, self.ptx
        ptx.share(plan.shared_bytes)
        self.locate()
        self._locate_x()
        self.locate_ring(plan.decoder_bytes)
        blocks = self.blocks_in_flight()
        ptx.comment("load: the first blocks of codes and scales, the first x")
        self._start_loads(blocks)
        self.load_residuals()
        self.set_up_decoder()
        if self.case.squares:
            self._add_squares(plan.warps - 1, plan.squares_offset)
        if not plan.is_persistent:
            self.loop_over_k(blocks)
            self._reduce()
            return ptx.text()
        ptx.label("fdk_round")
        self.loop_over_k(blocks)
        more = self._start_next_share(blocks)
        totals = [total for [totals] in self.totals for total in totals]
        self._reduce()
        for total in totals:
            ptx.do("mov.f32", total, 0.0)
        ptx.do("bra", "fdk_round", when=more)
        return ptx.text()

    # Locate

    def locate_program(self) -> None:
        """The program's rows, its first share of them if it is persistent, and tokens."""
        ptx, plan, index = self.ptx, self.plan, self._index_along_x()
        if plan.is_persistent:
            codebook_index = index // plan.codebook_programs
            self.share = index % plan.codebook_programs
            index = self.share + codebook_index * plan.shares
        self.output_row = self.program_row = (index * plan.rows).low()
        self.first_token = (ptx.op("mov.u32", "%ctaid.y") * plan.tokens).low()
        if plan.is_persistent:
            # The loads of the next share begin before the sums of this one are stored.
            self.sums = self.shared + plan.decoder_bytes
            self.output_row = ptx.register("b32")

    def _locate_x(self) -> None:
        """Where this lane's x starts, and registers for it and for the sums."""
        case, plan, ptx = self.case, self.plan, self.ptx
        # Lanes of columns without a token load nothing: what is in these columns nobody reads.
        self.has_token = []
        if case.m % (plan.tokens) and not plan.diagonal and not plan.has_quarters:
            for j in range(plan.columns):
                self.has_token.append(self._token(j) < case.m)
        if plan.has_quarters:
            self.has_token = [self.row.eq(self.thread_in_group >> 1)]
        if plan.diagonal:
            self.is_owner = [self.thread_in_group.eq(i) for i in range(4)]
            self.x_block = self.row // case.planes
        self.x = self._x_addresses()
        zero = ptx.zero()
        self.zeros = [zero] * 4
        self.totals = [[[ptx.zero() for _ in range(4)] for _ in self.x] for _ in self.packed]
        self.x_buffers = [[self._x_registers() for _ in self.x] for _ in range(2)]

    def _x_registers(self) -> list[Register]:
        """Registers for a plane's x; zeros, where lanes leave out the x that is not of their column."""
        if self.plan.has_quarters:
            return [self.ptx.op("mov.u32", 0) for _ in range(8)]
        return self.ptx.registers("b32", 8)

    def _token(self, j: int) -> Register:
        """The token of this lane's column among the program's j-th 8; beyond the last one, if there is none."""
        token = self.first_token + self.row
        return token + 8 * j

    def _x_addresses(self) -> list[Register]:
        """Where this lane's x starts, for each 8 tokens; where it has no token, nobody reads there."""
        case, plan, ptx, addresses = self.case, self.plan, self.ptx, []
        for j in range(plan.columns):
            token = ptx.op("min.u32", self._token(j), case.m - 1)
            row_bytes = case.blocks * case.span * 2
            address = (
                self.operands["x"]
                + token * row_bytes
                + self.thread_in_group * 16
                + self.k_warp * (case.span * 2)
            )
            addresses.append(address)
        if plan.diagonal:
            step = plan.k_warps * case.span * 2
            address = addresses[0] + self.x_block * step
            plane = self.row % case.planes
            addresses = [address + plane * (2 * PLANE)]
        return addresses

    def addresses_along_k(self) -> list[Register]:
        """Where this lane's x is."""
        return self.x

    # Load

    def _start_loads(self, blocks: list[Block]) -> None:
        """Starts the loads of the first blocks and of the first plane's x."""
        for stage, block in enumerate(blocks):
            self.load(block, stage)
        self._load_x(0, 0, 0)

    def _start_next_share(self, blocks: list[Block]) -> Register:
        """Starts the loads of the next round; whether there is one."""
        ptx = self.ptx
        ptx.do("mov.u32", self.output_row, self.program_row)
        ptx.do(
            "add.u32",
            self.program_row,
            self.program_row,
            self.plan.codebook_programs * self.plan.rows,
        )
        ptx.do("add.u32", self.share, self.share, self.plan.codebook_programs)
        more = self.share < self.plan.shares
        packed, scales = self._row_addresses()
        starts = *packed, *scales, *self._x_addresses()
        for address, start in zip((*self.packed, *self.scales, *self.x), starts, strict=True):
            ptx.do("mov.b64", address, start)
        ptx.do("mov.u32", self.block, self.k_warp)
        ptx.do("selp.b32", self.left, self._blocks_of_warp(), 0, more)
        self._start_loads(blocks)
        return more

    def _load_x(self, buffer: int, ahead: int, plane: int) -> None:
        """Starts the loads of a plane's x: for each lane the two pairs of each step."""
        ptx, case = self.ptx, self.case
        block = (self.x_block + ahead) if self.plan.diagonal else ahead
        in_bounds = [self.left > block] * len(self.x)
        if self.has_token:
            in_bounds = [t & in_bounds[0] for t in self.has_token]
        offset = (ahead * self.plan.k_warps * case.span + plane * PLANE) * 2
        for address, values, guard in zip(self.x, self.x_buffers[buffer], in_bounds, strict=True):
            for half in range(2):
                part = vector(values[4 * half : 4 * half + 4])
                ptx.do("ld.global.nc.v4.b32", part, at(address, offset + PLANE * half), when=guard)

    def end_round(self) -> None:
        """Makes the buffer of x that comes next the first one."""
        loads = self.plan.stages * self.case.planes // self.plan.x_planes
        if loads % 2 == 0:
            return
        for first, second in zip(*self.x_buffers, strict=True):
            for target, value in zip(first, second, strict=True):
                self.ptx.do("mov.b32", target, value)

    # Multiply

    def multiply(self, block: Block, stage: int) -> None:
        """Decodes a block and multiplies it with its range of x."""
        case, ptx = self.case, self.ptx
        sums = [[ptx.registers("f32", 4) for _ in self.x] for _ in self.packed]
        per_run = 1 if self.plan.diagonal else max(1, case.planes // self.plan.scale_runs)
        halves = self.plan.scale_mode != "lane" and (self.plan.has_halves or self.plan.has_quarters)
        for plane in range(case.planes):
            ptx.comment(f"multiply: block {stage} of those in flight, plane {plane}")
            flat = stage * case.planes + plane
            current = flat // self.plan.x_planes % 2
            if flat % self.plan.x_planes == 0:
                self.x_in_use = [self.decoder.paired(values) for values in self.x_buffers[current]]
                self._load_x(1 - current, *divmod(flat + self.plan.x_planes, case.planes))
            factors = [self.plane_scales(s, plane) for s in block.scales]
            if self.plan.scale_mode == "lane":
                planes = [
                    self.decode_scaled(words, f, plane)
                    for words, f in zip(block.words, factors, strict=True)
                ]
            else:
                planes = [self.decode(words, plane) for words in block.words]
            for i, operands in enumerate(zip(*planes, strict=True)):
                fresh = (i == 0 and plane % per_run == 0) or (i == 2 and halves)
                self._dot(operands, self.x_in_use, i, sums, fresh=fresh)
                if i == 1 and halves:
                    self._accumulate(sums, factors, flat % self.plan.x_planes)
                    factors = [scales[len(scales) // 2 :] for scales in factors]
            if plane % per_run == per_run - 1:
                self._accumulate(sums, factors, flat % self.plan.x_planes)

    def _dot(self, weights, x, step: int, sums, *, fresh: bool) -> None:
        """Adds a step's products to the sums: an instruction for each tile and 8 tokens."""
        kind = self.decoder.kind
        for operands, row_sums in zip(weights, sums, strict=True):
            for values, column_sums in zip(x, row_sums, strict=True):
                pairs = values[2 * step : 2 * step + 2]
                start = self.zeros if fresh else None
                self.ptx.multiply_add(kind, column_sums, operands, pairs, start)

    def _accumulate(self, sums, factors, column: int) -> None:
        """Adds the sums of a group, times its scale, to the totals."""
        # The lanes whose sums are those of the column; all, if columns are tokens.
        when = self.is_owner[column // 2] if self.plan.diagonal else None
        for row_totals, row_sums, scale in zip(self.totals, sums, factors, strict=True):
            for totals, column_sums in zip(row_totals, row_sums, strict=True):
                if self.plan.has_quarters:
                    self._add_quarters(totals, column_sums, scale)
                    continue
                for i in (0, 2) if self.plan.single else range(4):
                    total, part = totals[i], column_sums[i + column % 2]
                    if self.plan.scale_mode == "lane":
                        self.ptx.do("add.f32", total, total, part, when=when)
                    else:
                        self.ptx.do("fma.rn.f32", total, scale[i // 2], part, total, when=when)

    def _add_quarters(self, totals, sums, scales) -> None:
        """Adds the sums of both quarters of half a plane, times their scales, to the totals of both rows."""
        for quarter in range(2):
            for row in range(2):
                total, part = totals[2 * row], sums[2 * row + quarter]
                self.ptx.do("fma.rn.f32", total, scales[2 * quarter + row], part, total)

    # Reduce

    def _reduce(self) -> None:
        """Adds the warps' totals through shared memory, and stores the outputs."""
        ptx, case, plan = self.ptx, self.case, self.plan
        ptx.comment("reduce: the warps' sums through shared memory")
        # Such products have few programs, whose end is worth hiding: those of the next launch may come.
        if case.residual and self.target.has_dependent_launches:
            ptx.do("griddepcontrol.launch_dependents")
        if plan.diagonal:
            self._add_lanes()
        if plan.is_persistent:
            # A warp may still read the sums of the last round, but nobody those of the one before it.
            offsets = 2 * plan.decoder_bytes + plan.sums_bytes
            both = self.shared * 2 + offsets
            ptx.do("sub.u32", self.sums, both, self.sums)
        else:
            ptx.do("bar.sync", 0)
        address = self.locate_sums(of_one_token=plan.single)
        stores = self.thread_in_group.eq(0) if plan.single else None
        self.store_sums(address, self.totals, of_one_token=plan.single, when=stores)
        self.join_programs()
        self.store_outputs(min(case.m, plan.tokens))
        self.leave_cluster()

    def _add_lanes(self) -> None:
        """Adds the totals of the four lanes of a row, each of which has those of two columns."""
        for [totals] in self.totals:
            for i in (0, 2):
                totals[i] = over_lanes(self.ptx, "add.f32", totals[i], ROW_LANES)
