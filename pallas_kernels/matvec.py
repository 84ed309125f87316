"""The kernel for few rows of x: a stream of packed weights through the tensor cores, one launch.

At batch 1 a product is limited by reading the weight, if decoding it costs less than reading it. So:

- A lane loads 16 bytes of codes at a time, straight into registers; the planar layout has put there the
  weights that this lane feeds to `mma.sync.m16n8k16`. No shuffle, no shared memory, no wait for others.
- `decoding` turns codes into operands, in registers or through a table in shared memory.
- Tokens are the 8 columns of the instruction. The scale of a group multiplies its float32 sum.
- The warps of a program share K; their partial sums meet in shared memory at the end.

Triton gives no control over which lane holds what, so the body is one block of PTX; Pallas provides the
grid, the operands and the place in the program.

Glossary: W warps a program (`Config.warps`), of which V have rows of their own (`Config.row_warps`) and the
others share their K; R tiles of 16 rows a warp (`Config.tiles`), D blocks in flight a warp
(`Config.stages`), J groups of 8 tokens (`Config.columns`). C programs are a cluster (`Config.cluster`): they
have the same rows and share K, and read each other's sums at the end. One token leaves seven columns of the
instruction free; `Config.diagonal` gives them to eight planes of x: a lane loads an eighth as much, and plane
p finds its products in column p. Of many rows P programs (`Config.programs`) take some in turns: the decoder's
table is made once a program, and the loads of the next turn are under way during the sums. A tile holds
E = 8 / bits planes of 64 weights a row, each of 4 steps of the instruction; see `fdk_jax.format.packing`. A
block is a tile of each of the R.
"""

import dataclasses
import itertools
from collections.abc import Iterator

import jax.numpy as jnp

from pallas_kernels import decoding
from pallas_kernels.case import PLANE, TILE_ROWS, Case
from pallas_kernels.outputs import OutputWriter
from pallas_kernels.ptx import at, float_constant, over_lanes, vector, wide
from pallas_kernels.target import Target

_STEPS = 4  # instructions a plane
_TILE_BYTES = 1024


@dataclasses.dataclass(frozen=True)
class Config:
    """Launch configuration: R, W, D, J, V, C and P of the module's glossary.

    Attributes:
        diagonal: whether eight planes of x take the columns of one token.
        ring: whether blocks in flight are in shared memory instead of registers.
        programs: zero for as many as there are rows for; a product with a residual has always as many.
    """

    tiles: int = 2
    warps: int = 8
    stages: int = 2
    columns: int = 1
    row_warps: int = 1
    diagonal: bool = False
    cluster: int = 1
    ring: bool = False
    programs: int = 0

    @property
    def k_warps_here(self) -> int:
        """Warps of a program that share K."""
        return self.warps // self.row_warps

    @property
    def k_warps(self) -> int:
        """Warps of a cluster that share K."""
        return self.k_warps_here * self.cluster

    @property
    def rows(self) -> int:
        """Rows of the weight a program."""
        return self.tiles * self.row_warps * TILE_ROWS


def unsupported_reason(case: Case, config: Config, target: Target) -> str | None:
    """Why the kernel does not take a case, or None."""
    if config.diagonal and (case.m > 1 or config.stages * case.planes % 8):
        return f"{case.m} tokens, {config.stages} stages of {case.planes} planes are not diagonal"
    if config.programs and (case.m > 1 or config.cluster > 1 or config.ring):
        return f"{config} takes no turns: it has {case.m} tokens, a cluster or a ring"
    if config.columns >= 4:
        # Sums and totals of each tile and 8 tokens, two planes of x, codes in flight, and all else.
        each = 8 * config.tiles * (config.columns + config.stages) + 16 * config.columns
        needed, most = each + (120 if case.bits == 1 else 40), min(255, 2048 // config.warps)
        if needed > most:
            return f"{config} needs some {needed} registers a thread, {most} there are"
    return case.unsupported_reason(
        config, target, lambda: _Writer(case, config, target).shared_bytes
    )


def grid(case: Case, config: Config) -> tuple[int, int]:
    """Programs along N and M."""
    programs = -(-case.n // config.rows)
    if config.programs and not case.residual:  # as many for each codebook
        each = min(max(config.programs // case.books, 1), programs // case.books)
        programs = each * case.books
    return programs, -(-case.m // (8 * config.columns))


def is_persistent_loop(case: Case, config: Config) -> bool:
    """Whether a program has more than `Config.rows` rows, and takes them in turns."""
    return grid(case, config)[0] < -(-case.n // config.rows)


def source(case: Case, config: Config, target: Target) -> str:
    """The kernel's PTX."""
    return _Writer(case, config, target).write()


def squares(case: Case, config: Config, target: Target) -> int:
    """How many partial sums of squares a case with a residual leaves: those of each warp with outputs."""
    del target
    return grid(case, config)[0] * min(config.warps, -(-config.rows // 32))


class _Writer(OutputWriter):
    """Writes the PTX of one case; one method a part of the kernel."""

    def __init__(self, case: Case, config: Config, target: Target) -> None:
        super().__init__(case, target)
        self.config = config
        self.scale_bytes = jnp.dtype(case.scale_dtype).itemsize
        self.scale_mode = _scale_mode(case, config)
        self.scale_runs = _scale_runs(case, self.scale_mode)
        self.scale_words = self.scale_runs * self.scale_bytes // 2
        self.tile_bytes = _TILE_BYTES + 128 * self.scale_words  # a word of each lane is 128 bytes
        self.decoder = self._decoder()
        # A column of partial sums is padded so that the lanes of a warp write to different banks.
        self.sum_stride = config.rows + 4
        self.single = case.m == 1
        self.sum_tokens = 1 if self.single else 8 * config.columns
        self.x_planes = 8 if config.diagonal else 1
        # Of each codebook: shares of `Config.rows` rows, and programs that take them.
        self.shares = -(-case.n // config.rows) // case.books
        self.programs = grid(case, config)[0] // case.books
        self.is_persistent = is_persistent_loop(case, config)

    @property
    def shared_bytes(self) -> int:
        """Shared memory of a program."""
        return self._squares_place + 4 * (self.case.squares > 0)

    @property
    def _squares_place(self) -> int:
        """Where the sum of the squares of x is, behind everything else."""
        if self.is_persistent:
            return self.decoder.shared_bytes + 2 * self._sums_bytes
        return max(self.decoder.shared_bytes + self.ring_bytes, self._sums_bytes)

    @property
    def _sums_bytes(self) -> int:
        """Shared memory of the warps' sums. In turns two of them lie behind the table, else one on it."""
        return self.config.k_warps_here * self.sum_tokens * self.sum_stride * 4

    @property
    def ring_bytes(self) -> int:
        """Shared memory of a program's blocks in flight, behind what the decoder needs."""
        config = self.config
        return config.ring * config.warps * config.stages * config.tiles * self.tile_bytes

    def write(self) -> str:
        config, ptx = self.config, self.ptx
        ptx.share(self.shared_bytes)
        ptx.comment("locate: this lane's rows, range of K and addresses")
        self._locate()
        self._locate_x()
        self._locate_ring(self.decoder.shared_bytes)
        buffers = [self._buffer(i) for i in range(config.stages)]
        ptx.comment("load: the first blocks of codes and scales, the first x")
        self._start_loads(buffers)
        self._load_residuals()
        ptx.comment("decode: the table or constants of the codebook")
        self._set_up_decoder()
        if self.case.squares:
            self._add_squares(config.warps - 1, self._squares_place)
        if not self.is_persistent:
            self._loop(buffers)
            self._reduce()
            return ptx.text()
        ptx.label("fdk_turn")
        self._loop(buffers)
        more = self._start_next_share(buffers)
        totals = [total for [totals] in self.totals for total in totals]
        self._reduce()
        for total in totals:
            ptx.do("mov.f32", total, float_constant(0.0))
        ptx.do("bra", "fdk_turn", when=more)
        return ptx.text()

    def _start_next_share(self, buffers) -> str:
        """Starts the loads of the next turn; whether there is one."""
        ptx = self.ptx
        ptx.do("mov.u32", self.output_row, self.program_row)
        ptx.do("add.u32", self.program_row, self.program_row, self.programs * self.config.rows)
        ptx.do("add.u32", self.share, self.share, self.programs)
        more = ptx.op("setp.lt.u32", self.share, self.shares, kind="pred")
        packed, scales = self._row_addresses()
        starts = *packed, *scales, *self._x_addresses()
        for address, start in zip((*self.packed, *self.scales, *self.x), starts, strict=True):
            ptx.do("mov.b64", address, start)
        ptx.do("mov.u32", self.block, self.k_warp)
        ptx.do("selp.b32", self.left, self._blocks_of_warp(), 0, more)
        self._start_loads(buffers)
        return more

    def _start_loads(self, buffers) -> None:
        """Starts the loads of the first blocks and of the first plane's x."""
        for stage, buffer in enumerate(buffers):
            self._load(buffer, stage)
        self._load_x(0, 0, 0)

    def _decoder(self) -> decoding.Decoder:
        case = self.case
        return decoding.decoder(self.ptx, case.bits, case.x_dtype, even=case.even)

    def _set_up_decoder(self) -> None:
        self.decoder.set_up(self._codebook(), self.thread, 32 * self.config.warps)
        if self.decoder.shared_bytes:
            self.ptx.do("bar.sync", 0)

    def _codebook(self) -> str:
        """The address of the codebook of the program's rows."""
        ptx, case, book = self.ptx, self.case, self.operands["codebook"]
        if case.books > 1:
            number = ptx.quotient(self.program_row, case.n // case.books)
            book = ptx.op("mad.wide.u32", number, 4 * 2**case.bits, book, kind="b64")
        return book

    def _locate(self) -> None:
        """Registers for who this lane is and where its operands start."""
        config, ptx = self.config, self.ptx
        self._locate_lane()
        self._locate_program()
        self.sums, self.output_row = self.shared, self.program_row
        if self.is_persistent:
            self.sums = ptx.op("add.u32", self.shared, self.decoder.shared_bytes)
            self.output_row = ptx.register("b32")
        # Which of the program's rows are this warp's, and which of its blocks along K.
        self.row_warp = ptx.remainder(self.warp, config.row_warps)
        self.k_warp_here = ptx.quotient(self.warp, config.row_warps)
        self.k_warp = self.k_warp_here
        if config.cluster > 1:
            first = ptx.op("mul.lo.u32", self.rank, config.k_warps_here)
            self.k_warp = ptx.op("add.u32", first, self.k_warp_here)
        self.block = ptx.op("mov.u32", self.k_warp)
        self.left = self._blocks_of_warp()
        self.packed, self.scales = self._row_addresses()

    def _blocks_of_warp(self) -> str:
        """How many blocks along K this warp has."""
        ptx, k_warps = self.ptx, self.config.k_warps
        left = ptx.op("sub.u32", self.case.blocks + k_warps - 1, self.k_warp)
        return ptx.quotient(left, k_warps)

    def _row_addresses(self) -> tuple[list[str], list[str]]:
        """Where this lane's codes and scales of the program's rows start, for each tile."""
        case, config, ptx = self.case, self.config, self.ptx
        first_tile = ptx.op("shr.u32", self.program_row, 4)
        first_tile = ptx.op("mad.lo.u32", self.row_warp, config.tiles, first_tile)
        codes, factors = [], []
        for r in range(config.tiles):
            tile = ptx.op("min.u32", ptx.op("add.u32", first_tile, r), case.tiles - 1)
            index = ptx.op("mad.lo.u32", tile, case.blocks, self.k_warp)
            address = ptx.op(
                "mad.wide.u32", index, _TILE_BYTES, self.operands["packed"], kind="b64"
            )
            codes.append(ptx.op("mad.wide.u32", self.lane, 16, address, kind="b64"))
            index = ptx.op("mul.lo.u32", tile, case.quads)
            address = ptx.op(
                "mad.wide.u32", index, 64 * self.scale_bytes, self.operands["scales"], kind="b64"
            )
            address = ptx.op("mad.wide.u32", self.row, 8 * self.scale_bytes, address, kind="b64")
            if self.scale_mode == "vector":
                address = self._advance_to_warp(address)
            factors.append(address)
        return codes, factors

    def _place_along_x(self) -> str:
        """The program's place along the first axis of the grid, where a cluster is one program."""
        ptx, cluster = self.ptx, self.config.cluster
        place = ptx.op("mov.u32", "%ctaid.x")
        if cluster > 1:
            self.rank = ptx.remainder(place, cluster)
            place = ptx.quotient(place, cluster)
        return place

    def _locate_program(self) -> None:
        ptx, config, place = self.ptx, self.config, self._place_along_x()
        if self.is_persistent:
            book = ptx.quotient(place, self.programs)
            self.share = ptx.remainder(place, self.programs)
            place = ptx.op("mad.lo.u32", book, self.shares, self.share)
        self.program_row = ptx.op("mul.lo.u32", place, config.rows)
        self.first_token = ptx.op("mul.lo.u32", ptx.op("mov.u32", "%ctaid.y"), 8 * config.columns)

    def _locate_x(self) -> None:
        """Where this lane's x starts, and registers for it and for the sums."""
        case, config, ptx = self.case, self.config, self.ptx
        # Lanes of columns without a token load nothing: what is in these columns nobody reads.
        self.has_token = []
        if case.m % (8 * config.columns) and not config.diagonal:
            for j in range(config.columns):
                self.has_token.append(ptx.op("setp.lt.u32", self._token(j), case.m, kind="pred"))
        if config.diagonal:
            self.is_owner = [ptx.op("setp.eq.u32", self.quad, i, kind="pred") for i in range(4)]
            self.x_block = ptx.quotient(self.row, case.planes)
        self.x = self._x_addresses()
        zero = ptx.op("mov.f32", float_constant(0.0), kind="f32")
        self.zeros = [zero] * 4
        self.totals = [
            [[ptx.op("mov.f32", float_constant(0.0), kind="f32") for _ in range(4)] for _ in self.x]
            for _ in self.packed
        ]
        self.x_buffers = [[ptx.registers("b32", 8) for _ in self.x] for _ in range(2)]

    def _token(self, j: int) -> str:
        """The token of this lane's column among the program's j-th 8; beyond the last one, if there is none."""
        token = self.ptx.op("add.u32", self.first_token, self.row)
        return self.ptx.op("add.u32", token, 8 * j)

    def _x_addresses(self) -> list[str]:
        """Where this lane's x starts, for each 8 tokens; where it has no token, nobody reads there."""
        case, config, ptx, addresses = self.case, self.config, self.ptx, []
        for j in range(config.columns):
            token = ptx.op("min.u32", self._token(j), case.m - 1)
            row_bytes = case.blocks * case.span * 2
            address = ptx.op("mad.wide.u32", token, row_bytes, self.operands["x"], kind="b64")
            address = ptx.op("mad.wide.u32", self.quad, 16, address, kind="b64")
            address = ptx.op("mad.wide.u32", self.k_warp, case.span * 2, address, kind="b64")
            addresses.append(address)
        if config.diagonal:
            step = config.k_warps * case.span * 2
            address = ptx.op("mad.wide.u32", self.x_block, step, addresses[0], kind="b64")
            plane = ptx.remainder(self.row, case.planes)
            addresses = [ptx.op("mad.wide.u32", plane, 2 * PLANE, address, kind="b64")]
        return addresses

    def _advance_to_warp(self, address: str) -> str:
        """The scales of the warp's first block, where a block holds one or more whole groups."""
        ptx, per_block = self.ptx, self.case.span // self.case.group_size
        group = ptx.op("mul.lo.u32", self.k_warp, per_block)
        quad = ptx.op("shr.u32", group, 2)
        address = ptx.op("mad.wide.u32", quad, 64 * self.scale_bytes, address, kind="b64")
        within = ptx.op("and.b32", group, 3)
        return ptx.op("mad.wide.u32", within, 2 * self.scale_bytes, address, kind="b64")

    # Loading

    def _locate_ring(self, offset: int) -> None:
        """This lane's places in the warp's part of the ring, for words, pairs and fours of them."""
        if self.config.ring:
            ptx, warp_bytes = self.ptx, self.ring_bytes // self.config.warps
            warp = ptx.op("mad.lo.u32", self.warp, warp_bytes, self.shared)
            warp = ptx.op("add.u32", warp, offset)
            self.lane_places = {
                words: ptx.op("mad.lo.u32", self.lane, 4 * words, warp) for words in (1, 2, 4)
            }

    def _buffer(self, number: int) -> dict[str, list]:
        """Where one block in flight is, codes and scales of each tile: registers, or places in the ring."""
        tiles = range(self.config.tiles)
        if self.config.ring:
            first = number * self.config.tiles
            words = [(first + r) * self.tile_bytes for r in tiles]
            return {"words": words, "scales": [place + _TILE_BYTES for place in words]}
        return {
            "words": [self.ptx.registers("b32", 8) for _ in tiles],
            "scales": [self.ptx.registers("b32", self.scale_words) for _ in tiles],
        }

    def _start(
        self, target, first: int, count: int, address: str, offset: int, in_bounds: str
    ) -> None:
        """Starts loading words of a buffer from the `first` on, as `_fetch` takes them."""
        if not self.config.ring:
            hint = ".L1::no_allocate" if count == 4 else ""
            registers = target[first : first + count]
            self._load_vector(registers, address, offset, in_bounds, f"global.nc{hint}")
            return
        for i in range(first, first + count, 4):
            width = min(count, 4)
            place = at(self.lane_places[width], target + 128 * i)
            kind = "cg" if width == 4 else "ca"
            source = at(address, offset + 4 * (i - first))
            self.ptx.do(f"cp.async.{kind}.shared.global", place, source, 4 * width, when=in_bounds)

    def _fetch(self, buffer) -> dict[str, list]:
        """The registers of the oldest block in flight."""
        if not self.config.ring:
            return buffer
        self.ptx.do("cp.async.wait_group", self.config.stages - 1)
        return {
            "words": [self._from_ring(place, 8, 4) for place in buffer["words"]],
            "scales": [
                self._from_ring(place, self.scale_words, min(4, self._scale_width))
                for place in buffer["scales"]
            ],
        }

    def _from_ring(self, place: int, count: int, width: int) -> list[str]:
        registers = self.ptx.registers("b32", count)
        for i in range(0, count, width):
            part = registers[i : i + width]
            self._load_vector(part, self.lane_places[width], place + 128 * i, space="shared")
        return registers

    @property
    def _scale_width(self) -> int:
        """Words of scales that are loaded together."""
        runs = min(self.scale_runs, 4) if self.scale_mode == "vector" else 1
        return runs * self.scale_bytes // 2

    def _load(self, buffer, ahead: int) -> None:
        """Starts the loads of the block `ahead` steps of this warp after the current one."""
        ptx, config = self.ptx, self.config
        in_bounds = ptx.op("setp.gt.u32", self.left, ahead, kind="pred")
        step = ahead * config.k_warps * _TILE_BYTES
        for words, packed in zip(buffer["words"], self.packed, strict=True):
            for half in range(2):
                self._start(words, 4 * half, 4, packed, step + half * 512, in_bounds)
        if self.scale_mode == "vector":
            self._load_scale_vectors(buffer, ahead, in_bounds)
        else:
            self._load_scales(buffer, ahead, in_bounds)
        if config.ring:
            ptx.do("cp.async.commit_group")

    def _load_scales(self, buffer, ahead: int, in_bounds: str) -> None:
        ptx, config, width = self.ptx, self.config, self._scale_width
        block = ptx.op("add.u32", self.block, ahead * config.k_warps)
        for run in range(self.scale_runs):
            group = self._group(block, run)
            quad = ptx.op("shr.u32", group, 2)
            within = ptx.op("and.b32", group, 3)
            for registers, scales in zip(buffer["scales"], self.scales, strict=True):
                address = ptx.op("mad.wide.u32", quad, 64 * self.scale_bytes, scales, kind="b64")
                address = ptx.op("mad.wide.u32", within, 2 * self.scale_bytes, address, kind="b64")
                self._start(registers, run * width, width, address, 0, in_bounds)

    def _group(self, block: str, run: int) -> str:
        """The group of a run in a block (scale modes "single", "plane" and "lane")."""
        ptx, case = self.ptx, self.case
        if self.scale_mode == "single":
            return ptx.quotient(block, case.group_size // case.span)
        if self.scale_mode == "plane":
            plane = ptx.op("mad.lo.u32", block, case.planes, run)
            return ptx.quotient(plane, case.group_size // PLANE)
        eighth = ptx.op("mad.lo.u32", block, case.span // 8, 4 * run)
        eighth = ptx.op("add.u32", eighth, self.quad)
        return ptx.quotient(eighth, case.group_size // 8)

    def _load_scale_vectors(self, buffer, ahead: int, in_bounds: str) -> None:
        case, config = self.case, self.config
        per_block = case.span // case.group_size
        # All powers of two: a warp's blocks start at places of a quad that the offsets below hit.
        quads, within = divmod(ahead * config.k_warps * per_block, 4)
        start = (quads * 64 + within * 2) * self.scale_bytes
        width = self._scale_width
        for registers, scales in zip(buffer["scales"], self.scales, strict=True):
            for i in range(self.scale_words // width):
                offset = start + i * 64 * self.scale_bytes
                self._start(registers, i * width, width, scales, offset, in_bounds)

    def _load_vector(
        self,
        registers: list[str],
        address: str,
        offset: int,
        in_bounds: str | None = None,
        space: str = "global.nc",
    ) -> None:
        for i in range(0, len(registers), 4):
            part = registers[i : i + 4]
            width, values = wide(part)
            self.ptx.do(
                f"ld.{space}{width}.b32", values, at(address, offset + 4 * i), when=in_bounds
            )

    # The loop over K

    def _loop(self, buffers) -> None:
        ptx, case, config = self.ptx, self.case, self.config
        ptx.comment("multiply: the warp's blocks along K")
        ptx.label("fdk_loop")
        for stage, buffer in enumerate(buffers):
            done = ptx.op("setp.le.u32", self.left, stage, kind="pred")
            ptx.do("bra", "fdk_done", when=done)
            self._multiply(self._fetch(buffer), stage)
            self._load(buffer, stage + len(buffers))
        self._turn_x(len(buffers) * case.planes // self.x_planes)
        step = len(buffers) * config.k_warps
        for address in self.packed:
            ptx.do("add.u64", address, address, step * _TILE_BYTES)
        for address in self.x:
            ptx.do("add.u64", address, address, step * case.span * 2)
        if self.scale_mode == "vector":
            distance = step * (case.span // case.group_size) // 4 * 64 * self.scale_bytes
            for address in self.scales:
                ptx.do("add.u64", address, address, distance)
        ptx.do("add.u32", self.block, self.block, step)
        more = ptx.op("setp.gt.u32", self.left, len(buffers), kind="pred")
        ptx.do("sub.u32", self.left, self.left, len(buffers))
        ptx.do("bra", "fdk_loop", when=more)
        ptx.label("fdk_done")

    def _multiply(self, buffer, stage: int) -> None:
        """Decodes a block and multiplies it with its range of x."""
        case, ptx = self.case, self.ptx
        sums = [[ptx.registers("f32", 4) for _ in self.x] for _ in self.packed]
        per_run = 1 if self.config.diagonal else max(1, case.planes // self.scale_runs)
        for plane in range(case.planes):
            flat = stage * case.planes + plane
            current = flat // self.x_planes % 2
            if flat % self.x_planes == 0:
                self.x_in_use = [self.decoder.paired(values) for values in self.x_buffers[current]]
                self._load_x(1 - current, *divmod(flat + self.x_planes, case.planes))
            factors = [self._plane_factors(s, plane) for s in buffer["scales"]]
            if self.scale_mode == "lane":
                planes = [
                    self._scaled_plane(words, f, plane)
                    for words, f in zip(buffer["words"], factors, strict=True)
                ]
            else:
                planes = [self._plane(words, plane) for words in buffer["words"]]
            for i, operands in enumerate(zip(*planes, strict=True)):
                self._dot(operands, self.x_in_use, i, sums, fresh=plane % per_run == 0 and i == 0)
            if plane % per_run == per_run - 1:
                self._accumulate(sums, factors, flat % self.x_planes)

    def _load_x(self, buffer: int, ahead: int, plane: int) -> None:
        """Starts the loads of a plane's x: for each lane the two pairs of each step."""
        ptx, case = self.ptx, self.case
        block = ptx.op("add.u32", self.x_block, ahead) if self.config.diagonal else ahead
        in_bounds = [ptx.op("setp.gt.u32", self.left, block, kind="pred")] * len(self.x)
        if self.has_token:
            in_bounds = [ptx.op("and.pred", t, in_bounds[0], kind="pred") for t in self.has_token]
        offset = (ahead * self.config.k_warps * case.span + plane * PLANE) * 2
        for address, values, guard in zip(self.x, self.x_buffers[buffer], in_bounds, strict=True):
            for half in range(2):
                part = vector(values[4 * half : 4 * half + 4])
                ptx.do("ld.global.nc.v4.b32", part, at(address, offset + PLANE * half), when=guard)

    def _turn_x(self, loads: int) -> None:
        """Makes the buffer of x after some loads the first one."""
        if loads % 2 == 0:
            return
        for first, second in zip(*self.x_buffers, strict=True):
            for target, value in zip(first, second, strict=True):
                self.ptx.do("mov.b32", target, value)

    def _dot(self, weights, x, step: int, sums, *, fresh: bool) -> None:
        """Adds a step's products to the sums: an instruction for each tile and 8 tokens."""
        kind = self.decoder.kind
        for operands, row_sums in zip(weights, sums, strict=True):
            for values, column_sums in zip(x, row_sums, strict=True):
                self.ptx.do(
                    f"mma.sync.aligned.m16n8k16.row.col.f32.{kind}.{kind}.f32",
                    vector(column_sums),
                    vector(operands),
                    vector(values[2 * step : 2 * step + 2]),
                    vector(self.zeros if fresh else column_sums),
                )

    def _plane_factors(self, registers: list[str], plane: int) -> list[str]:
        """The plane's scales, float32: for upper and lower row; in mode "lane" by half of the plane."""
        if self.scale_mode == "lane":
            return self._factors(registers, 2 * plane) + self._factors(registers, 2 * plane + 1)
        return self._factors(registers, plane * self.scale_runs // self.case.planes)

    def _factors(self, registers: list[str], run: int) -> list[str]:
        """The scales of a run for the upper and the lower row, float32."""
        ptx = self.ptx
        if self.case.scale_dtype == jnp.float32:
            return registers[2 * run : 2 * run + 2]
        return decoding.unpack(ptx, registers[run], self.case.scale_dtype)

    def _plane(self, words: list[str], plane: int) -> Iterator[list[str]]:
        """The operand registers of a plane's steps."""
        return (self.decoder.operands(words, plane, i) for i in range(_STEPS))

    def _scaled_plane(
        self, words: list[str], factors: list[str], plane: int
    ) -> Iterator[list[str]]:
        """The same, times the scales: for groups below a plane, or sums that span groups."""
        multiply, kind = self.ptx.multiply_halves, self.decoder.kind
        doubled = [self.decoder.pack(f, f) for f in factors]
        halves = [doubled[:2], doubled[-2:]]  # of the plane; upper and lower row each
        for i, operands in enumerate(self._plane(words, plane)):
            pairs = zip(operands, 2 * halves[i // 2], strict=True)
            yield [multiply(kind, weights, factor) for weights, factor in pairs]

    def _accumulate(self, sums, factors, column: int) -> None:
        """Adds the sums of a group, times its scale, to the totals."""
        # The lanes whose sums are those of the column; all, if columns are tokens.
        when = self.is_owner[column // 2] if self.config.diagonal else None
        for row_totals, row_sums, scale in zip(self.totals, sums, factors, strict=True):
            for totals, column_sums in zip(row_totals, row_sums, strict=True):
                for i in (0, 2) if self.single else range(4):
                    total, part = totals[i], column_sums[i + column % 2]
                    if self.scale_mode == "lane":
                        self.ptx.do("add.f32", total, total, part, when=when)
                    else:
                        self.ptx.do("fma.rn.f32", total, scale[i // 2], part, total, when=when)

    # The end

    def _reduce(self) -> None:
        """Adds the warps' totals, adds the bias, and writes the outputs."""
        ptx, case, config = self.ptx, self.case, self.config
        ptx.comment("reduce: the warps' sums through shared memory")
        tokens = min(case.m, 8 * config.columns)
        # Such products have few programs, whose end is worth hiding: those of the next launch may come.
        if case.residual and self.target.has_dependent_launches:
            ptx.do("griddepcontrol.launch_dependents")
        if self.config.diagonal:
            self._add_lanes()
        # In turns a warp may still read the sums of the last one, but those before it nobody.
        if self.is_persistent:
            offsets = 2 * self.decoder.shared_bytes + self._sums_bytes
            both = ptx.op("mad.lo.u32", self.shared, 2, offsets)
            ptx.do("sub.u32", self.sums, both, self.sums)
        else:
            ptx.do("bar.sync", 0)
        per_warp = self.sum_tokens * self.sum_stride * 4
        address = ptx.op("mad.lo.u32", self.k_warp_here, per_warp, self.sums)
        row = ptx.op("mad.lo.u32", self.row_warp, config.tiles * TILE_ROWS, self.row)
        address = ptx.op("mad.lo.u32", row, 4, address)
        is_owner = None
        if self.single:  # every column holds the one token
            is_owner = ptx.op("setp.eq.u32", self.quad, 0, kind="pred")
        else:
            address = ptx.op("mad.lo.u32", self.quad, 2 * self.sum_stride * 4, address)
        for r, row_totals in enumerate(self.totals):
            for j, totals in enumerate(row_totals):
                for i in (0, 2) if self.single else range(4):
                    token, row = 8 * j + i % 2, TILE_ROWS * r + 8 * (i // 2)
                    offset = (token * self.sum_stride + row) * 4
                    ptx.do("st.shared.f32", at(address, offset), totals[i], when=is_owner)
        self._join_programs()
        self._write_outputs(tokens, per_warp)
        self._leave_cluster()

    def _add_lanes(self) -> None:
        """Adds the totals of the four lanes of a row, each of which has those of two columns."""
        for [totals] in self.totals:
            for i in (0, 2):
                totals[i] = over_lanes(self.ptx, "add.f32", totals[i], (1, 2))

    def _join_programs(self) -> None:
        """Waits for the program's other warps, or for those of the cluster."""
        if self.config.cluster == 1:
            self.ptx.do("bar.sync", 0)
        else:
            self.ptx.do("barrier.cluster.arrive.release")
            self.ptx.do("barrier.cluster.wait.acquire")

    def _leave_cluster(self) -> None:
        """Nobody leaves whose sums another program still reads."""
        if self.config.cluster > 1:
            self.ptx.do("barrier.cluster.arrive.relaxed")
            self.ptx.do("barrier.cluster.wait")

    def _load_residuals(self) -> None:
        """Starts loading what this thread's outputs are added to and scaled by."""
        ptx, rows = self.ptx, self.config.rows
        self.residuals = []
        for start in range(0, rows, 32 * self.config.warps) if self.case.residual else ():
            row = ptx.op("min.u32", ptx.op("add.u32", self.thread, start), rows - 1)
            self.residuals.append(self._load_residual(ptx.op("add.u32", self.program_row, row)))

    def _write_outputs(self, tokens: int, per_warp: int, name: str = "") -> None:
        """Adds the sums of so many tokens, and writes them: each program of a cluster its part."""
        ptx, config = self.ptx, self.config
        worker, workers = self.thread, 32 * config.warps * config.cluster
        if config.cluster > 1:
            worker = ptx.op("mad.lo.u32", self.rank, 32 * config.warps, worker)
        ptx.comment("write: each thread's outputs")
        if self.case.residual:
            self.squares = ptx.op("mov.f32", float_constant(0.0), kind="f32")
        for turn, start in enumerate(range(0, config.rows * tokens, workers)):
            index = ptx.op("add.u32", worker, start)
            self._write_output(index, turn, tokens, per_warp, f"fdk_next{name}{start}")
        if self.case.residual:
            warps = squares(self.case, config, self.target) // grid(self.case, config)[0]
            self._store_squares(self.squares, warps)

    def _write_output(self, index: str, turn: int, tokens: int, per_warp: int, behind: str) -> None:
        ptx, case = self.ptx, self.case
        token = ptx.quotient(index, self.config.rows)
        row = ptx.remainder(index, self.config.rows)
        address = ptx.op("mad.lo.u32", token, self.sum_stride, row)
        address = ptx.op("mad.lo.u32", address, 4, self.sums)
        n = ptx.op("add.u32", self.output_row, row)
        m = ptx.op("add.u32", self.first_token, token)
        for value, bound in ((token, tokens), (m, case.m), (n, case.n)):
            outside = ptx.op("setp.ge.u32", value, bound, kind="pred")
            ptx.do("bra", behind, when=outside)
        total = ptx.op("mov.f32", float_constant(0.0), kind="f32")
        space, places = "shared", [address]
        if self.config.cluster > 1:
            space, ranks = "shared::cluster", range(self.config.cluster)
            places = [ptx.op(f"mapa.{space}.u32", address, rank) for rank in ranks]
        for place, warp in itertools.product(places, range(self.config.k_warps_here)):
            part = ptx.op(f"ld.{space}.f32", at(place, warp * per_warp), kind="f32")
            ptx.do("add.f32", total, total, part)
        if self.decoder.factor is not None:
            ptx.do("mul.f32", total, total, self.decoder.factor)
        if case.squares:
            total = self._normalise(total, self._squares_place)
        if case.bias_dtype is not None:
            self._add_bias(total, n)
        if case.residual:
            self._store_sum(total, n, self.residuals[turn], self.squares)
        else:
            self._store(total, n, "y", m)
        ptx.label(behind)


def _scale_mode(case: Case, config: Config) -> str:
    """How scales meet groups: see `_group` and `_load_scale_vectors`."""
    if case.group_size % PLANE:
        return "lane"
    if case.group_size % case.span == 0 and case.group_size > case.span:
        return "single"
    per_block, rest = divmod(case.span, case.group_size)
    quads = config.stages * config.k_warps * per_block
    return "vector" if rest == 0 and quads % 4 == 0 else "plane"


def _scale_runs(case: Case, mode: str) -> int:
    """Scales that a lane loads for a row of a block."""
    if mode == "vector":
        return case.span // case.group_size
    return {"single": 1, "plane": case.planes, "lane": 2 * case.planes}[mode]
