"""Stages of kernels that stream a weight through registers: locate, load, decode, and the loop over K.

Which lane holds what, from the first load to the operands of the tensor cores:

- A lane is (row, thread_in_group): row = lane / 4 is a row g of a tile, together with g + 8;
  thread_in_group = lane % 4 is its index along K.
- `load` brings 16 bytes of each part of a tile's codes (of two halves 8 words) and its scales, of rows g and
  g + 8 next to each other.
- `decode` makes of them, for a plane of 64 weights a row, four steps of four registers, each with two
  neighbours along K: the operand of `mma.sync.m16n8k16` and `wgmma` that a lane has.

Nothing is shuffled and no lane waits for another: `fdk_jax.format.packing` has put the codes in this order.
"""

import abc
import dataclasses
from collections.abc import Iterator

import jax.numpy as jnp

from pallas_kernels import decoding
from pallas_kernels.layout import FOUR_SCALES, PART_BYTES, PLANE, scale_offset
from pallas_kernels.outputs import OutputWriter
from pallas_kernels.registers import Register, at, wide
from pallas_kernels.target import Target
from pallas_kernels.tile_plan import TilePlan

STEPS = 4  # of 16 weights along K: instructions of the tensor cores a plane


@dataclasses.dataclass(frozen=True)
class Block:
    """One block in flight, for each of the warp's tiles.

    Attributes:
        words: codes, four registers of each part of a tile; in the ring the offset of the tile, in bytes.
        scales: `TilePlan.scale_words` registers; in the ring their offset.
    """

    words: list
    scales: list


class TileWriter(OutputWriter, abc.ABC):
    """Writes how a program reads its rows of a weight.

    The order is `locate`, then `load` for each block of `blocks_in_flight`, `set_up_decoder`, `loop_over_k`.
    Between them the kernels do the same for x.

    Attributes:
        plan: what is planned.
        tokens: rows of x a program.
        program_row, output_row: registers with the program's first row, where it reads and where it writes.
        first_token: and its first token.
        k_warp: this warp's index among those that share K.
        block, left: its current block along K, and how many are left.
        packed, scales: of each tile the address of this lane's codes and scales in the current block.
    """

    def __init__(self, plan: TilePlan, target: Target, tokens: int) -> None:
        super().__init__(plan.case, target)
        self.plan, self.tokens = plan, tokens
        self.decoder = decoding.decoder(
            self.ptx,
            self.case.bits,
            self.case.x_dtype,
            uniform=self.case.computes_values,
            exact=plan.exact,
        )

    @abc.abstractmethod
    def multiply(self, block: Block, stage: int) -> None:
        """Decodes a block, which has arrived in registers, and uses it; `stage` is its index in the round."""

    @abc.abstractmethod
    def addresses_along_k(self) -> list[Register]:
        """Addresses of bfloat16 or float16 that move on with the blocks, such as those of x."""

    def end_round(self) -> None:
        """What is to be done when all blocks in flight have been multiplied once."""

    # Locate

    def locate(self) -> None:
        """Registers for who this lane is and where its operands start."""
        plan, ptx = self.plan, self.ptx
        ptx.comment("locate: this lane's rows, range of K and addresses")
        self._locate_lane()
        self.sums = self.shared
        self.locate_program()
        # Which of the program's rows are this warp's, and which of its blocks along K.
        self.row_warp = self.warp % plan.row_warps
        self.k_warp_here = self.warp // plan.row_warps
        self.k_warp = self.k_warp_here
        if plan.cluster > 1:
            first = (self.rank * plan.k_warps_here).low()
            self.k_warp = first + self.k_warp_here
        self.block = ptx.op("mov.u32", self.k_warp)
        self.left = self._blocks_of_warp()
        self.packed, self.scales = self._row_addresses()

    def _blocks_of_warp(self) -> Register:
        """How many blocks along K this warp has."""
        k_warps = self.plan.k_warps
        left = (self.case.blocks + k_warps - 1) - self.k_warp
        return left // k_warps

    def _row_addresses(self) -> tuple[list[Register], list[Register]]:
        """Where this lane's codes and scales of the program's rows start, for each tile."""
        case, plan, ptx = self.case, self.plan, self.ptx
        first_tile = (self.program_row >> 4) + self.row_warp * plan.tiles
        codes, factors = [], []
        for r in range(plan.tiles):
            tile = ptx.op("min.u32", first_tile + r, case.tiles - 1)
            index = self.k_warp + tile * case.blocks
            address = self.operands["packed"] + index * case.tile_bytes
            codes.append(address + self.lane * 16)
            index = (tile * case.scale_fours).low()
            address = (
                self.operands["scales"]
                + index * (FOUR_SCALES * plan.scale_bytes)
                + self.row * (8 * plan.scale_bytes)
            )
            if self.plan.scale_mode == "vector":
                address = self._advance_to_warp(address)
            factors.append(address)
        return codes, factors

    def _index_along_x(self) -> Register:
        """The program's index along the first axis of the grid, where a cluster is one program."""
        ptx, cluster = self.ptx, self.plan.cluster
        index = ptx.op("mov.u32", "%ctaid.x")
        if cluster > 1:
            self.rank = index % cluster
            index = index // cluster
        return index

    def locate_program(self) -> None:
        """The program's rows and tokens, by its index in the grid."""
        self.output_row = self.program_row = (self._index_along_x() * self.plan.rows).low()
        self.first_token = (self.ptx.op("mov.u32", "%ctaid.y") * self.tokens).low()

    def _advance_to_warp(self, address: Register) -> Register:
        """The scales of the warp's first block, where a block holds one or more whole groups."""
        per_block = self.case.span // self.case.group_size
        group = (self.k_warp * per_block).low()
        four = group >> 2
        address = address + four * (FOUR_SCALES * self.plan.scale_bytes)
        within = group & 3
        return address + within * (2 * self.plan.scale_bytes)

    def locate_ring(self, offset: int) -> None:
        """This lane's addresses in the warp's part of the ring, for words, pairs and fours of them."""
        if self.plan.ring:
            warp_bytes = self.plan.ring_bytes // self.plan.warps
            warp = self.shared + self.warp * warp_bytes + offset
            self.lane_addresses = {words: warp + self.lane * (4 * words) for words in (1, 2, 4)}

    # Load

    def blocks_in_flight(self) -> list[Block]:
        """Registers or offsets in the ring for the blocks that a warp has in flight."""
        return [self._block(stage) for stage in range(self.plan.stages)]

    def _block(self, stage: int) -> Block:
        tiles = range(self.plan.tiles)
        if self.plan.ring:
            first = stage * self.plan.tiles
            offsets = [(first + r) * self.plan.tile_bytes for r in tiles]
            return Block(offsets, [offset + self.case.tile_bytes for offset in offsets])
        words = [self.ptx.registers("b32", 4 * self.case.parts) for _ in tiles]
        return Block(words, [self.ptx.registers("b32", self.plan.scale_words) for _ in tiles])

    def load(self, block: Block, ahead: int) -> None:
        """Starts the loads of the block `ahead` steps of this warp after the current one."""
        ptx, plan = self.ptx, self.plan
        in_bounds = self.left > ahead
        step = ahead * plan.k_warps * self.case.tile_bytes
        for words, packed in zip(block.words, self.packed, strict=True):
            for part in range(self.case.parts):
                self._start(words, 4 * part, 4, packed, step + part * PART_BYTES, in_bounds)
        if self.plan.scale_mode == "vector":
            self._load_scale_vectors(block, ahead, in_bounds)
        else:
            self._load_scales(block, ahead, in_bounds)
        if plan.ring:
            ptx.do("cp.async.commit_group")

    def _load_scales(self, block: Block, ahead: int, in_bounds: Register) -> None:
        plan, width = self.plan, self.plan.scale_width
        number = self.block + ahead * plan.k_warps
        for run in range(plan.scale_runs):
            group = self._group(number, run)
            four = group >> 2
            within = group & 3
            for registers, scales in zip(block.scales, self.scales, strict=True):
                address = scales + four * (FOUR_SCALES * plan.scale_bytes)
                address = address + within * (2 * plan.scale_bytes)
                self._start(registers, run * width, width, address, 0, in_bounds)

    def _group(self, block: Register, run: int) -> Register:
        """The group of a run in a block (scale modes "single", "plane" and "lane")."""
        case = self.case
        if self.plan.scale_mode == "single":
            return block // (case.group_size // case.span)
        if self.plan.scale_mode == "plane":
            plane = run + block * case.planes
            return plane // (case.group_size // PLANE)
        eighth = (4 * run) + block * (case.span // 8) + self.thread_in_group
        return eighth // (case.group_size // 8)

    def _load_scale_vectors(self, block: Block, ahead: int, in_bounds: Register) -> None:
        case, plan = self.case, self.plan
        per_block = case.span // case.group_size
        # Blocks start at those indices in a four that the offsets below reach, see `scale_mode`.
        start = scale_offset(ahead * plan.k_warps * per_block, plan.scale_bytes)
        width = plan.scale_width
        for registers, scales in zip(block.scales, self.scales, strict=True):
            for word in range(0, plan.scale_words, width):
                group = 2 * word // plan.scale_bytes
                offset = start + scale_offset(group, plan.scale_bytes)
                self._start(registers, word, width, scales, offset, in_bounds)

    def _start(
        self, target, first: int, count: int, address: Register, offset: int, in_bounds: Register
    ) -> None:
        """Starts loading words of a block from the `first` on, as `fetch` takes them."""
        if not self.plan.ring:
            hint = ".L1::no_allocate" if count == 4 else ""
            registers = target[first : first + count]
            self._load_vector(registers, address, offset, in_bounds, f"global.nc{hint}")
            return
        for i in range(first, first + count, 4):
            width = min(count, 4)
            target_at = at(self.lane_addresses[width], target + 128 * i)
            kind = "cg" if width == 4 else "ca"
            source = at(address, offset + 4 * (i - first))
            self.ptx.do(
                f"cp.async.{kind}.shared.global", target_at, source, 4 * width, when=in_bounds
            )

    def _load_vector(
        self,
        registers: list[Register],
        address: Register,
        offset: int,
        in_bounds: Register | None = None,
        space: str = "global.nc",
    ) -> None:
        for i in range(0, len(registers), 4):
            part = registers[i : i + 4]
            width, values = wide(part)
            self.ptx.do(
                f"ld.{space}{width}.b32", values, at(address, offset + 4 * i), when=in_bounds
            )

    def fetch(self, block: Block) -> Block:
        """The registers of the oldest block in flight."""
        if not self.plan.ring:
            return block
        self.ptx.do("cp.async.wait_group", self.plan.stages - 1)
        words = [self._from_ring(offset, 4 * self.case.parts, 4) for offset in block.words]
        count, width = self.plan.scale_words, min(4, self.plan.scale_width)
        return Block(words, [self._from_ring(offset, count, width) for offset in block.scales])

    def _from_ring(self, offset: int, count: int, width: int) -> list[Register]:
        registers = self.ptx.registers("b32", count)
        for i in range(0, count, width):
            part = registers[i : i + width]
            self._load_vector(part, self.lane_addresses[width], offset + 128 * i, space="shared")
        return registers

    # Decode

    def set_up_decoder(self) -> None:
        """Makes the decoder's table or constants, of the codebook of the program's rows."""
        self.ptx.comment("decode: the table or constants of the codebook")
        self.decoder.set_up(self._codebook(), self.thread, 32 * self.plan.warps)
        if self.decoder.shared_bytes:
            self.ptx.do("bar.sync", 0)

    def _codebook(self) -> Register:
        """The address of the codebook of the program's rows."""
        case, codebook = self.case, self.operands["codebook"]
        if case.codebooks > 1:
            number = self.program_row // (case.n // case.codebooks)
            codebook = codebook + number * (4 * 2**case.bits)
        return codebook

    def decode(self, words: list[Register], plane: int) -> Iterator[list[Register]]:
        """The operands of a plane's steps, from the words of a tile.

        Of each step four registers with two weights each: of rows g and g + 8, then of them 8 weights further.
        """
        return (self.decoder.operands(words, plane, i) for i in range(STEPS))

    def decode_scaled(
        self, words: list[Register], factors: list[Register], plane: int
    ) -> Iterator[list[Register]]:
        """The same times the scales of `plane_scales`: for groups below a plane, or sums that span groups."""
        multiply, kind = self.ptx.multiply_halves, self.decoder.kind
        doubled = [self.decoder.pack(f, f) for f in factors]
        halves = [doubled[:2], doubled[-2:]]  # of the plane; upper and lower row each
        for i, operands in enumerate(self.decode(words, plane)):
            pairs = zip(operands, 2 * halves[i // 2], strict=True)
            yield [multiply(kind, weights, factor) for weights, factor in pairs]

    def plane_scales(self, registers: list[Register], plane: int) -> list[Register]:
        """The plane's scales, float32: for upper and lower row; maybe of each half of the plane."""
        if (each := self.plan.scale_runs // self.case.planes) > 1:
            runs = range(each * plane, each * (plane + 1))
            return [scale for run in runs for scale in self._scale_pair(registers, run)]
        return self._scale_pair(registers, plane * self.plan.scale_runs // self.case.planes)

    def _scale_pair(self, registers: list[Register], run: int) -> list[Register]:
        """The scales of a run for the upper and the lower row, float32."""
        ptx = self.ptx
        if self.case.scale_dtype == jnp.float32:
            return registers[2 * run : 2 * run + 2]
        return decoding.unpack(ptx, registers[run], self.case.scale_dtype)

    # The loop over K

    def loop_over_k(self, blocks: list[Block]) -> None:
        """Multiplies all of the warp's blocks. Each frees its registers for the one that is so many further."""
        ptx, case, plan = self.ptx, self.case, self.plan
        ptx.comment("multiply: the warp's blocks along K")
        ptx.label("fdk_loop")
        for stage, block in enumerate(blocks):
            ptx.do("bra", "fdk_done", when=self.left <= stage)
            self.multiply(self.fetch(block), stage)
            self.load(block, stage + len(blocks))
        self.end_round()
        step = len(blocks) * plan.k_warps
        for address in self.packed:
            ptx.do("add.u64", address, address, step * case.tile_bytes)
        for address in self.addresses_along_k():
            ptx.do("add.u64", address, address, step * case.span * 2)
        if plan.scale_mode == "vector":
            distance = scale_offset(step * (case.span // case.group_size), plan.scale_bytes)
            for address in self.scales:
                ptx.do("add.u64", address, address, distance)
        ptx.do("add.u32", self.block, self.block, step)
        more = self.left > len(blocks)
        ptx.do("sub.u32", self.left, self.left, len(blocks))
        ptx.do("bra", "fdk_loop", when=more)
        ptx.label("fdk_done")
