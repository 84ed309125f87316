"""From codes in shared memory to operand registers of `wgmma`, a plane (64 columns of K) at a time, in MLIR.

The planar layout (`fdk_jax.format.packing`) gives a lane 8 neighbours of a row, a step of `wgmma` wants pairs
that lie 8 apart. So a lane reads the codes of its pairs from shared memory, chunk by chunk (8 columns), see
`code_offsets`. Copies with the 128-byte swizzle put what the lanes of a warp read into different banks.

2, 4 and 8 bits look values up in a table with a copy for each lane's banks; 1 bit selects one of two values.
"""

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax._src.lib.mlir import ir
from jax._src.lib.mlir.dialects import arith, llvm
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.mosaic.gpu import fragmented_array, utils

from pallas_kernels import mosaic_even_values
from pallas_kernels.case import Case
from pallas_kernels.mosaic_matmul import computes_values
from pallas_kernels.mosaic_values import (
    U32,
    address,
    do,
    f32,
    i32,
    lane_of,
    load,
    op,
    pack,
    sync_warpgroups,
    thread,
    widen,
)
from pallas_kernels.ptx import half_kind

_TABLE_ROW = 128  # bytes of the table for one byte of codes: copies for all lanes
CHUNKS = 8


def code_offsets(bits: int, thread: Any, plane: Any, blocks: int) -> list[tuple[Any, Any]]:
    """Where a thread finds its codes of a plane, for each chunk of 8 columns.

    Args:
        bits: width of a code.
        thread: its number in the warpgroup or program; of any type with the operators of integers.
        plane: which plane of the slab.
        blocks: of the slab.

    Returns:
        Of each chunk the offset of the bits in shared memory, in bytes from the slab's start with swizzled
        lines of 128 bytes, and the bit at which they start: of columns 2 c and 2 c + 1 of the chunk, first of
        row g, then of row g + 8. They follow each other, lowest first; with 1 bit the second column's 16
        bits after the first one's. Where `swaps_halves`, those of the first four chunks and of the last four
        are in each other's places.
    """
    warp, g, c = lane_of(thread)
    planes = 8 // bits
    inner = plane % planes
    word, quarter = c // 2, c % 2  # of four neighbours, see `fdk_jax.format.packing`
    half = quarter if bits == 8 else inner // max(1, planes // 2)
    within = inner % max(1, planes // 2)
    line = half * 4 + g // 2
    start = (warp * blocks + plane // planes) * 1024 + line * 128 + word * 4
    bit = within * 0
    if bits == 4:
        start += quarter * 2
    if bits == 2:
        start += within * 2 + quarter
    if bits == 1:
        bit = within * 4 + quarter * 2
    offsets = []
    for chunk in range(CHUNKS):
        column = (g % 2 * 4 + chunk % 4) ^ line
        half = (swaps_halves(bits, thread) + chunk // 4) % 2
        offsets.append((start + column * 16 + half * 8, bit))
    return offsets


def swaps_halves(bits: int, thread: Any) -> Any:
    """1 where a thread reads the last four chunks of a plane first, else 0.

    With 8 bits the lanes of a warp read 8 of the 16 bytes at each place of a line, which two lines share: if
    all read the same half, half of the banks would be idle.
    """
    _, g, _ = lane_of(thread)
    return g % 2 if bits == 8 else g * 0


def scale_offset(thread: Any, group: Any, fours: int) -> Any:
    """Where the scales of rows g and g + 8 for a group stand, from the slab's first four groups.

    In bytes, if a scale has two.
    """
    warp, g, _ = lane_of(thread)
    return (warp * fours + group // 4) * 128 + g * 16 + group % 4 * 4


def own_codes(
    bits: int, thread: Any, plane: Any, blocks: int
) -> tuple[list[Any], list[tuple[int, int, Any]]]:
    """Where a thread's own 16 columns of a plane are, if their order is free: 8 c to 8 c + 7 of each half.

    Args:
        bits: see `code_offsets`.
        thread: see `code_offsets`.
        plane: see `code_offsets`.
        blocks: see `code_offsets`.

    Returns:
        Offsets of 16 bytes each; and for each pair of columns, in order, which of these, which of their four
        words, and the bit at which its codes start, as `code_offsets` has it.
    """
    warp, g, c = lane_of(thread)
    planes = 8 // bits
    inner, per_half = plane % planes, max(1, planes // 2)
    within = inner % per_half
    halves = [inner * 0, inner * 0 + 1] if bits == 8 else [inner // per_half]
    offsets = []
    for half in halves:
        line = half * 4 + g // 2
        start = (warp * blocks + plane // planes) * 1024 + line * 128
        offsets.append(start + ((g % 2 * 4 + c) ^ line) * 16)
    pairs = []
    for word in range(4):
        for quarter in range(2):
            bit = {8: inner * 0, 4: inner * 0 + 16 * quarter}.get(bits)
            if bits == 2:
                bit = within * 16 + 8 * quarter
            if bits == 1:
                bit = within * 4 + 2 * quarter
            pairs.append((quarter if bits == 8 else 0, word, bit))
    return offsets, pairs


@dataclasses.dataclass(frozen=True)
class Decoder:
    """Writes the code that decodes.

    Attributes:
        bits: 1, 2, 4 or 8.
        group_size: weights a scale, see `mosaic_matmul.unsupported_reason`.
        half: bfloat16 or float16, of the values.
        integers: whether these are rounded to integers of 8 bits, of two planes.
        scales: "bf16", "f16" or "f32", of the scales in memory; they are rounded to `half`.
    """

    bits: int
    group_size: int
    half: str
    scales: str
    integers: bool = False
    computes: bool = False

    @classmethod
    def of(cls, case: Case) -> "Decoder":
        """The decoder of a case."""
        single = case.scale_dtype == jnp.float32
        kind = "f32" if single else half_kind(case.scale_dtype)
        if case.x_dtype == jnp.int8:
            return cls(case.bits, case.group_size, "f16", kind, True)
        half, computes = half_kind(case.x_dtype), computes_values(case)
        return cls(case.bits, case.group_size, half, kind, computes=computes)

    @property
    def table_bytes(self) -> int:
        """Shared memory of the table."""
        if self.computes:
            return mosaic_even_values.TABLE_BYTES
        return 16 if self.bits == 1 else 256 * _TABLE_ROW

    @property
    def entry_bytes(self) -> int:
        """Bytes of the table that a lane reads for a byte of codes."""
        return max(4, 16 // self.bits)

    def set_up(
        self, codebook: ir.Value, table: ir.Value, codebook_index: U32, threads: int
    ) -> None:
        """Fills the table from float32 [2**bits] values of one of the codebooks, then waits for all threads."""
        base = utils.memref_ptr(codebook)

        def value(code: U32) -> ir.Value:
            index = (codebook_index * 2**self.bits + code).value
            return llvm.load(f32(), utils.getelementptr(base, [index], f32()))

        # More than 256 threads write some rows twice.
        byte, start = thread() % 256, address(table)
        if self.bits == 1:
            for i in range(2):  # all threads store the same
                both = value(U32(i))
                do(f"st.shared.b32 [$0+{4 * i}], $1;", start, pack(both, both, self.half))
            sync_warpgroups(threads)
            return
        if self.computes:
            mosaic_even_values.measure(value(U32(0)), value(U32(255)), start, self.half)
            sync_warpgroups(threads)
            return
        values = [value((byte >> i) % 2**self.bits) for i in range(0, 8, self.bits)]
        if self.bits == 8:
            values *= 2
        pairs = [pack(*two, self.half) for two in zip(values[::2], values[1::2], strict=True)]
        pairs *= 4 // len(pairs)
        for i in range(_TABLE_ROW // 16):
            # Lanes start at different columns: otherwise all would write to the same banks.
            column = (byte + i) % (_TABLE_ROW // 16)
            offset = start + byte * _TABLE_ROW + column * 16
            do("st.shared.v4.b32 [$0], {$1, $2, $3, $4};", offset, *pairs)
        sync_warpgroups(threads)

    def factor(self, table: ir.Value) -> ir.Value | None:
        """What sums are multiplied by, if anything."""
        return mosaic_even_values.factor(address(table)) if self.computes else None

    def plane(
        self, codes: ir.Value, scales: ir.Value, table: ir.Value, group: U32, plane: U32
    ) -> mgpu.FragmentedArray:
        """The weights of a plane for the warpgroup's 64 rows, [64, 64]; of integers those of two, [64, 128].

        Args:
            codes: uint16 [4, blocks, 8, 64] in shared memory, swizzled: a tile for each warp.
            scales: [4, fours, 64] in shared memory.
            table: what `set_up` has filled.
            group: the group of the first four with which the slab starts.
            plane: which one of the slab, or which two.
        """
        decode = self._select if self.bits == 1 else self._looked_up
        decode = self._computed if self.computes else decode
        planes = [plane * 2, plane * 2 + 1] if self.integers else [plane]
        values = []
        for one in planes:
            values += decode(self._chunks(codes, one), table, self._scales(scales, group, one))
        element = ir.BF16Type.get() if self.half == "bf16" else ir.F16Type.get()
        count, layout, signed = 2, mgpu.WGMMA_LAYOUT, None
        if self.integers:
            # The lower bytes of four halves: what two pairs have of a row.
            pairs = zip(values[::2], values[1::2], strict=True)
            values = [
                [op("prmt.b32 $0, $1, $2, 0x6420;", *two) for two in zip(*chunks, strict=True)]
                for chunks in pairs
            ]
            element, count = ir.IntegerType.get_signless(8), 4
            layout, signed = mgpu.WGMMA_LAYOUT_8BIT, True
        vector = ir.VectorType.get((count,), element)
        registers = np.empty(layout.registers_shape((64, 64 * len(planes))), dtype=object)
        registers.flat[:] = [llvm.bitcast(vector, value.value) for two in values for value in two]
        a = mgpu.FragmentedArray(_registers=registers, _layout=layout, _is_signed=signed)
        # Otherwise the compiler decodes later, when the products of the plane before have been waited for.
        return fragmented_array.optimization_barrier(a)

    def _chunks(self, codes: ir.Value, plane: U32) -> list[tuple[U32, U32]]:
        """For each chunk a register with its codes, and the bit at which they start.

        Of integers the chunks are the pairs of a lane's own columns.
        """
        start, blocks = address(codes), ir.MemRefType(codes.type).shape[1]
        if self.integers:
            offsets, pairs = own_codes(self.bits, thread(), plane, blocks)
            four = ir.VectorType.get((4,), i32())
            units = [load(start + offset, four) for offset in offsets]
            return [
                (U32(llvm.extractelement(units[unit], U32(word).value)), bit)
                for unit, word, bit in pairs
            ]
        kind = ir.IntegerType.get_signless({1: 32, 2: 8, 4: 16, 8: 32}[self.bits])
        offsets = code_offsets(self.bits, thread(), plane, blocks)
        words = [load(start + offset, kind) for offset, _ in offsets]
        if kind.width < 32:
            words = [arith.extui(i32(), word) for word in words]
        if self.bits == 8:
            swapped = swaps_halves(self.bits, thread()).value
            swapped = arith.cmpi(arith.CmpIPredicate.ne, swapped, U32(0).value)
            first, last = words[:4], words[4:]
            words = [
                arith.select(swapped, b, a)
                for two in ((first, last), (last, first))
                for a, b in zip(*two, strict=True)
            ]
        return [(U32(word), bit) for word, (_, bit) in zip(words, offsets, strict=True)]

    def _computed(self, chunks, table, scales) -> list[list[U32]]:
        """For each chunk the values of both rows times their scales."""
        values = []
        for (word, _), scale in zip(chunks, scales, strict=True):
            pairs = mosaic_even_values.weights(word, address(table), self.half)
            values.append([self._multiply(*two) for two in zip(pairs, scale, strict=True)])
        return values

    def _looked_up(self, chunks, table, scales) -> list[list[U32]]:
        """As `_computed`."""
        copies = _TABLE_ROW // self.entry_bytes
        copy = address(table) + thread() % copies * self.entry_bytes
        values = []
        for (word, bit), scale in zip(chunks, scales, strict=True):
            if self.bits == 2:
                row = self._row(word, bit, copy) if self.integers else copy + word * _TABLE_ROW
                pairs = [U32(load(row + 4 * i, i32())) for i in range(2)]
            else:
                pairs = self._bytes(word, bit, copy)
            values.append([self._multiply(*two) for two in zip(pairs, scale, strict=True)])
        return values

    def _row(self, word: U32, bit: U32, copy: U32) -> U32:
        """Where the table has the values of the byte that starts at a bit of a word."""
        # The dot product of a word's bytes with a row's size and three zeros is an address.
        return op("dp4a.u32.u32 $0, $1, $2, $3;", word, U32(_TABLE_ROW) << bit, copy)

    def _bytes(self, word: U32, bit: U32, copy: U32) -> list[U32]:
        """The values of a word's bytes from a bit on, two or (8 bits) four."""
        starts = [bit + 8 * byte for byte in range(self.bits // 2)]
        values = [U32(load(self._row(word, start, copy), i32())) for start in starts]
        if self.bits == 4:
            return values
        pairs = zip(values[::2], values[1::2], strict=True)
        return [op("prmt.b32 $0, $1, $2, 0x5410;", *two) for two in pairs]

    def _scales(self, scales: ir.Value, group: U32, plane: U32) -> list[list[U32]]:
        """For each chunk the scales of both rows, each twice in a register."""
        fours, known = ir.MemRefType(scales.type).shape[1], {}
        if self.integers and self.group_size < 64:
            # Of a lane's own columns: 8 in each half of the plane.
            _, _, c = lane_of(thread())
            pairs = []
            for half in range(2):
                own = (c * 8 + 32 * half) // self.group_size
                index = group + plane * (64 // self.group_size) + own
                where = scale_offset(thread(), index, fours)
                pairs += 4 * [self._scale_pair(address(scales), where)]
            return pairs
        for part in range(max(1, 64 // self.group_size)):
            if self.group_size >= 64:
                index = group + plane // (self.group_size // 64)
            else:
                index = group + plane * (64 // self.group_size) + part
            known[part] = self._scale_pair(address(scales), scale_offset(thread(), index, fours))
        return [known[8 * chunk // self.group_size] for chunk in range(CHUNKS)]

    def _scale_pair(self, start: U32, offset: U32) -> list[U32]:
        """The scales of a group for rows g and g + 8, each twice in a register."""
        if self.scales == "f32":
            values = [load(start + (2 * offset + 4 * i), f32()) for i in range(2)]
            return [pack(value, value, self.half) for value in values]
        both = U32(load(start + offset, i32()))
        if self.scales == self.half:
            orders = "0x1010", "0x3232"
            return [op(f"prmt.b32 $0, $1, $1, {order};", both) for order in orders]
        values = [widen(both, i, self.scales) for i in range(2)]
        return [pack(value, value, self.half) for value in values]

    def _multiply(self, a: U32, b: U32) -> U32:
        if self.integers:
            # Between 1024 and 2048 halves are integers: 1536 + i has i in its lower byte.
            return op("fma.rn.f16x2 $0, $1, $2, $3;", a, b, U32(0x66006600))
        return op(f"mul.rn.{self.half}x2 $0, $1, $2;", a, b)

    def _select(self, chunks, table, scales) -> list[list[U32]]:
        """For each chunk and row one of two values, which are multiplied by the scale before."""
        start = address(table)
        both = [U32(load(start + 4 * i, i32())) for i in range(2)]
        values, known = [], {}
        for (word, bit), scale in zip(chunks, scales, strict=True):
            word, two = word >> bit, []
            for row in range(2):
                if scale[row] not in known:
                    known[scale[row]] = [self._multiply(value, scale[row]) for value in both]
                low, high = known[scale[row]]
                # Bits 15 and 31, 16 times each.
                mask = op("prmt.b32 $0, $1, $1, 0xBB99;", word << 15 - row)
                two.append(op("lop3.b32 $0, $1, $2, $3, 0xE4;", high, low, mask))
            values.append(two)
        return values
