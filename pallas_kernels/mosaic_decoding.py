"""From codes in shared memory to operand registers of `wgmma`, a plane (64 columns of K) at a time, in MLIR.

The planar layout (`fdk_jax.format.packing`) gives a lane 8 neighbours of a row, a step of `wgmma` wants pairs
that lie 8 apart. So a lane reads the codes of its pairs from shared memory, chunk by chunk (8 columns), see
`code_places`. Copies with the 128-byte swizzle put what the lanes of a warp read into different banks.

2, 4 and 8 bits look values up in a table with a copy for each lane's banks; 1 bit selects one of two values.
"""

import dataclasses
from collections.abc import Iterator
from typing import Any

import numpy as np
from jax._src.lib.mlir import ir
from jax._src.lib.mlir.dialects import arith, llvm
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.mosaic.gpu import fragmented_array, utils

from pallas_kernels.case import Case
from pallas_kernels.ptx import half_kind

_TABLE_ROW = 128  # bytes of the table for one byte of codes: copies for all lanes
_BARRIER = 9  # of the threads that compute
CHUNKS = 8
# What an instruction changes that loads before and after it may see: without it they move across barriers.
_MEMORY = "~{memory}"


class U32:
    """An unsigned integer of a kernel, with Python's operators; the other operand may be a constant."""

    def __init__(self, value: ir.Value | int) -> None:
        """Wraps a value of the program, or a constant."""
        if isinstance(value, int):
            # MLIR's constants are signed.
            value = arith.constant(_i32(), value - (value >> 31 << 32))
        self.value = value

    def _with(self, operation: Any, other: "U32 | int") -> "U32":
        return U32(operation(self.value, (other if isinstance(other, U32) else U32(other)).value))

    def __add__(self, other: "U32 | int") -> "U32":
        return self._with(arith.addi, other)

    def __sub__(self, other: "U32 | int") -> "U32":
        return self._with(arith.subi, other)

    def __mul__(self, other: "U32 | int") -> "U32":
        return self._with(arith.muli, other)

    def __floordiv__(self, other: "U32 | int") -> "U32":
        return self._with(arith.divui, other)

    def __mod__(self, other: "U32 | int") -> "U32":
        return self._with(arith.remui, other)

    def __xor__(self, other: "U32 | int") -> "U32":
        return self._with(arith.xori, other)

    def __rshift__(self, other: "U32 | int") -> "U32":
        return self._with(arith.shrui, other)

    def __lshift__(self, other: "U32 | int") -> "U32":
        return self._with(arith.shli, other)

    def __rsub__(self, other: int) -> "U32":
        return U32(other) - self

    def __ge__(self, other: "U32 | int") -> "U32":
        """1 or 0."""
        return U32(arith.extui(_i32(), self._with(_not_below, other).value))

    __radd__, __rmul__ = __add__, __mul__


def _not_below(a: ir.Value, b: ir.Value) -> ir.Value:
    return arith.cmpi(arith.CmpIPredicate.uge, a, b)


def _i32() -> ir.Type:
    return ir.IntegerType.get_signless(32)


def _f32() -> ir.Type:
    return ir.F32Type.get()


def _do(text: str, *operands: U32) -> None:
    """An instruction without a result."""
    void = ir.Type.parse("!llvm.void")
    values = [operand.value for operand in operands]
    constraints = ",".join([*"r" * len(values), _MEMORY])
    llvm.inline_asm(void, values, text, constraints, has_side_effects=True)


def _op(text: str, *operands: U32) -> U32:
    """An instruction whose result depends on its operands alone."""
    values = [operand.value for operand in operands]
    return U32(llvm.inline_asm(_i32(), values, text, ",".join(["=r"] + ["r"] * len(values))))


def _pack(low: ir.Value, high: ir.Value, half: str) -> U32:
    """Two float32 as a register of bfloat16 or float16."""
    text = f"cvt.rn.{half}x2.f32 $0, $1, $2;"
    return U32(llvm.inline_asm(_i32(), [high, low], text, "=r,f,f"))


def _load(address: U32, kind: ir.Type) -> ir.Value:
    """Loads from an address in shared memory."""
    return llvm.load(kind, llvm.inttoptr(llvm.PointerType.get(3), address.value))


def address(ref: ir.Value) -> U32:
    """Where a reference to shared memory starts."""
    return U32(llvm.ptrtoint(_i32(), utils.memref_ptr(ref)))


def thread() -> U32:
    """The thread's number in the program."""
    return _op("mov.u32 $0, %tid.x;")


def scalar(value: U32) -> mgpu.FragmentedArray:
    """An integer as a scalar of Pallas."""
    layout = mgpu.WGSplatFragLayout(())
    return mgpu.FragmentedArray.splat(value.value, (), layout, is_signed=True)


def lane_of(thread: Any) -> tuple[Any, Any, Any]:
    """Warp of its warpgroup, row g of 8 and column c of 4 in the operands of the tensor cores."""
    return thread // 32 % 4, thread // 4 % 8, thread % 4


def meet(threads: int) -> None:
    """Waits for all threads of the compute warpgroups, which are so many."""
    _do(f"bar.sync {_BARRIER}, {threads};")


def meet_cluster() -> None:
    """Waits for all threads of a cluster's programs, and for what they have stored."""
    _do("barrier.cluster.arrive.release.aligned;")
    _do("barrier.cluster.wait.acquire.aligned;")


def code_places(bits: int, thread: Any, plane: Any, blocks: int) -> list[tuple[Any, Any]]:
    """Where a thread finds its codes of a plane, for each chunk of 8 columns.

    Args:
        bits: width of a code.
        thread: its number in the warpgroup or program; of any type with the operators of integers.
        plane: which plane of the slab.
        blocks: of the slab.

    Returns:
        Of each chunk the place of the bits in shared memory, in bytes from the slab's start with swizzled
        lines of 128 bytes, and the bit at which they start: of columns 2 c and 2 c + 1 of the chunk, first of
        row g, then of row g + 8. They stand behind each other, lowest first; with 1 bit the second column's 16
        bits behind the first one's.
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
    places = []
    for chunk in range(CHUNKS):
        column = (g % 2 * 4 + chunk % 4) ^ line
        places.append((start + column * 16 + chunk // 4 * 8, bit))
    return places


def scale_place(thread: Any, group: Any, quads: int) -> Any:
    """Where the scales of rows g and g + 8 for a group stand, in bytes from the slab's first quad of groups."""
    warp, g, _ = lane_of(thread)
    return (warp * quads + group // 4) * 128 + g * 16 + group % 4 * 4


@dataclasses.dataclass(frozen=True)
class Decoder:
    """Writes the code that decodes.

    Attributes:
        bits: 1, 2, 4 or 8.
        group_size: weights a scale, a power of two from 8 on.
        half: bfloat16 or float16, of the values and the scales.
    """

    bits: int
    group_size: int
    half: str

    @classmethod
    def of(cls, case: Case) -> "Decoder":
        """The decoder of a case."""
        return cls(case.bits, case.group_size, half_kind(case.x_dtype))

    @property
    def table_bytes(self) -> int:
        """Shared memory of the table."""
        return 16 if self.bits == 1 else 256 * _TABLE_ROW

    @property
    def entry_bytes(self) -> int:
        """Bytes of the table that a lane reads for a byte of codes."""
        return max(4, 16 // self.bits)

    def set_up(self, codebook: ir.Value, table: ir.Value, book: U32, threads: int) -> None:
        """Fills the table from float32 [2**bits] values of one of the codebooks; the threads meet."""
        base = utils.memref_ptr(codebook)

        def value(code: U32) -> ir.Value:
            index = (book * 2**self.bits + code).value
            return llvm.load(_f32(), utils.getelementptr(base, [index], _f32()))

        # More than 256 threads write some rows twice.
        byte, start = thread() % 256, address(table)
        if self.bits == 1:
            for i in range(2):  # all threads store the same
                both = value(U32(i))
                _do(f"st.shared.b32 [$0+{4 * i}], $1;", start, _pack(both, both, self.half))
            meet(threads)
            return
        values = [value((byte >> i) % 2**self.bits) for i in range(0, 8, self.bits)]
        if self.bits == 8:
            values *= 2
        pairs = [_pack(*two, self.half) for two in zip(values[::2], values[1::2], strict=True)]
        pairs *= 4 // len(pairs)
        for turn in range(_TABLE_ROW // 16):
            # Lanes start at different columns: otherwise all would write to the same banks.
            column = (byte + turn) % (_TABLE_ROW // 16)
            place = start + byte * _TABLE_ROW + column * 16
            _do("st.shared.v4.b32 [$0], {$1, $2, $3, $4};", place, *pairs)
        meet(threads)

    def plane(
        self, codes: ir.Value, scales: ir.Value, table: ir.Value, group: U32, plane: U32
    ) -> mgpu.FragmentedArray:
        """The weights of a plane for the warpgroup's 64 rows, [64, 64].

        Args:
            codes: uint16 [4, blocks, 8, 64] in shared memory, swizzled: a tile for each warp.
            scales: [4, quads, 64] in shared memory.
            table: what `set_up` has filled.
            group: the group of the first quad with which the slab starts.
            plane: which one of the slab.
        """
        scale = self._scales(scales, group, plane)
        values = (self._select if self.bits == 1 else self._looked_up)(codes, table, scale, plane)
        element = ir.BF16Type.get() if self.half == "bf16" else ir.F16Type.get()
        vector = ir.VectorType.get((2,), element)
        layout = mgpu.WGMMA_LAYOUT
        registers = np.empty(layout.registers_shape((64, 64)), dtype=object)
        registers.flat = [llvm.bitcast(vector, value.value) for two in values for value in two]
        a = mgpu.FragmentedArray(_registers=registers, _layout=layout, _is_signed=None)
        # Otherwise the compiler decodes later, when the products of the plane before have been waited for.
        return fragmented_array.optimization_barrier(a)

    def _codes(self, codes: ir.Value, plane: U32) -> Iterator[tuple[U32, U32]]:
        """For each chunk a register with its codes, and the bit at which they start."""
        start, blocks = address(codes), ir.MemRefType(codes.type).shape[1]
        kind = ir.IntegerType.get_signless({1: 32, 2: 8, 4: 16, 8: 32}[self.bits])
        for place, bit in code_places(self.bits, thread(), plane, blocks):
            word = _load(start + place, kind)
            yield U32(word if kind.width == 32 else arith.extui(_i32(), word)), bit

    def _looked_up(self, codes, table, scales, plane: U32) -> list[list[U32]]:
        """For each chunk the values of both rows times their scales."""
        copies = _TABLE_ROW // self.entry_bytes
        copy = address(table) + thread() % copies * self.entry_bytes
        values = []
        for (word, _), scale in zip(self._codes(codes, plane), scales, strict=True):
            if self.bits == 2:
                row = copy + word * _TABLE_ROW
                pairs = [U32(_load(row + 4 * i, _i32())) for i in range(2)]
            else:
                pairs = self._bytes(word, copy)
            values.append([self._multiply(*two) for two in zip(pairs, scale, strict=True)])
        return values

    def _bytes(self, word: U32, copy: U32) -> list[U32]:
        """The values of a word's bytes, two or (8 bits) four."""
        values = []
        for byte in range(self.bits // 2):
            # The dot product of a word's bytes with a row's size and three zeros is an address.
            row = U32(_TABLE_ROW << 8 * byte)
            place = _op("dp4a.u32.u32 $0, $1, $2, $3;", word, row, copy)
            values.append(U32(_load(place, _i32())))
        if self.bits == 4:
            return values
        pairs = zip(values[::2], values[1::2], strict=True)
        return [_op("prmt.b32 $0, $1, $2, 0x5410;", *two) for two in pairs]

    def _scales(self, scales: ir.Value, group: U32, plane: U32) -> list[list[U32]]:
        """For each chunk the scales of both rows, each twice in a register."""
        quads, known = ir.MemRefType(scales.type).shape[1], {}
        for part in range(max(1, 64 // self.group_size)):
            if self.group_size >= 64:
                index = group + plane // (self.group_size // 64)
            else:
                index = group + plane * (64 // self.group_size) + part
            both = U32(_load(address(scales) + scale_place(thread(), index, quads), _i32()))
            orders = "0x1010", "0x3232"
            known[part] = [_op(f"prmt.b32 $0, $1, $1, {order};", both) for order in orders]
        return [known[8 * chunk // self.group_size] for chunk in range(CHUNKS)]

    def _multiply(self, a: U32, b: U32) -> U32:
        return _op(f"mul.rn.{self.half}x2 $0, $1, $2;", a, b)

    def _select(self, codes, table, scales, plane: U32) -> list[list[U32]]:
        """For each chunk and row one of two values, which are multiplied by the scale before."""
        start = address(table)
        both = [U32(_load(start + 4 * i, _i32())) for i in range(2)]
        values, known = [], {}
        for (word, bit), scale in zip(self._codes(codes, plane), scales, strict=True):
            word, two = word >> bit, []
            for row in range(2):
                if scale[row] not in known:
                    known[scale[row]] = [self._multiply(value, scale[row]) for value in both]
                low, high = known[scale[row]]
                # Bits 15 and 31, 16 times each.
                mask = _op("prmt.b32 $0, $1, $1, 0xBB99;", word << 15 - row)
                two.append(_op("lop3.b32 $0, $1, $2, $3, 0xE4;", high, low, mask))
            values.append(two)
        return values


def _floats(total: mgpu.FragmentedArray) -> list[ir.Value]:
    """This thread's float32 values of [64, T]: for 8 tokens each, two of row g, two of row g + 8."""
    registers = total.registers.flat
    return [llvm.extractelement(register, U32(i).value) for register in registers for i in range(2)]


def add_over_k(
    shared: ir.Value,
    total: mgpu.FragmentedArray,
    warpgroup: U32,
    row_groups: int,
    k_groups: int,
    splits: int,
) -> mgpu.FragmentedArray:
    """The sums of warpgroups and then programs that share K, in the first of them.

    They meet in shared memory where x was. Every thread of the cluster has to come to two `meet_cluster`, if
    there are `splits`.
    """
    values = _floats(total)
    size = 512 * len(values)  # bytes of a warpgroup's sums
    start = address(shared) + thread() % 128 * 16
    threads = 128 * row_groups * k_groups
    meet(threads)
    others = warpgroup >= row_groups
    if k_groups > 1:
        _store_sums(start + (warpgroup - row_groups) * size, values, others)
        meet(threads)
    mine = start + warpgroup % row_groups * size
    for other in range(k_groups - 1):
        place = mine + other * row_groups * size
        for i, value in enumerate(values):
            there = place + (2048 * (i // 4) + 4 * (i % 4))
            values[i] = arith.addf(value, _load(there, _f32()))
    if splits > 1:
        _store_sums(mine, values, others ^ 1)
        meet_cluster()
        for other in range(1, splits):
            there = _op("mapa.shared::cluster.u32 $0, $1, $2;", mine, U32(other))
            values = [
                arith.addf(value, other)
                for value, other in zip(values, _load_sums(there, len(values)), strict=True)
            ]
        meet_cluster()
    registers, vector = total.registers.copy(), ir.VectorType.get((2,), _f32())
    for i in range(registers.size):
        pair = llvm.mlir_undef(vector)
        for j in range(2):
            pair = llvm.insertelement(pair, values[2 * i + j], U32(j).value)
        registers.flat[i] = pair
    return mgpu.FragmentedArray(_registers=registers, _layout=total.layout, _is_signed=None)


def _store_sums(place: U32, values: list[ir.Value], flag: U32) -> None:
    """Stores a thread's values four by four, 2 KiB apart, unless the flag is 0."""
    for i in range(0, len(values), 4):
        store = f"@p st.shared.v4.f32 [$0+{512 * i}], {{$1, $2, $3, $4}};"
        llvm.inline_asm(
            ir.Type.parse("!llvm.void"),
            [place.value, *values[i : i + 4], flag.value],
            f"{{ .reg .pred p; setp.ne.b32 p, $5, 0; {store} }}",
            f"r,f,f,f,f,r,{_MEMORY}",
            has_side_effects=True,
        )


def _load_sums(place: U32, count: int) -> list[ir.Value]:
    """Loads what `_store_sums` has stored, of any program of the cluster."""
    values = []
    for i in range(0, count, 4):
        four = llvm.inline_asm(
            llvm.StructType.get_literal([_f32()] * 4),
            [place.value],
            f"ld.shared::cluster.v4.f32 {{$0, $1, $2, $3}}, [$4+{512 * i}];",
            f"=f,=f,=f,=f,r,{_MEMORY}",
            has_side_effects=True,
        )
        values += [llvm.extractvalue(_f32(), four, [j]) for j in range(4)]
    return values


def store_turned(
    target: ir.Value,
    total: mgpu.FragmentedArray,
    case: Case,
    first_row: U32,
    group: U32,
    bias: ir.Value | None = None,
) -> None:
    """Stores [64, T] float32 sums, plus a group's bias, as [T, 64] swizzled halves in shared memory."""
    warp, g, _ = lane_of(thread())
    values = _floats(total)
    if bias is not None:
        base, kind = utils.memref_ptr(bias), ir.MemRefType(bias.type).element_type
        added = []
        for h in range(2):
            row = _minimum(first_row + warp * 16 + g + 8 * h, U32(case.n - 1))
            row = row + group * case.n
            one = llvm.load(kind, utils.getelementptr(base, [row.value], kind))
            added.append(one if kind == _f32() else arith.extf(_f32(), one))
        values = [arith.addf(value, added[i // 2 % 2]) for i, value in enumerate(values)]
    half = half_kind(case.x_dtype)
    pairs = [_pack(*two, half) for two in zip(values[::2], values[1::2], strict=True)]
    # Lane 8 i + j gives the place of line j of the i-th of four 8 by 8 matrices: token j, 8 rows of the weight.
    matrix, line = thread() % 32 // 8, thread() % 8
    column, token = warp * 2 + matrix % 2, matrix // 2 * 8 + line
    place = address(target) + token * 128 + (column ^ line) * 16
    for i in range(0, len(pairs), 4):
        store = "stmatrix.sync.aligned.m8n8.x4.trans.shared.b16"
        _do(f"{store} [$0+{512 * i}], {{$1, $2, $3, $4}};", place, *pairs[i : i + 4])


def find_tile(
    sizes: ir.Value, visit: U32, *, groups: int, tokens: int, rows: int
) -> tuple[U32, U32, U32]:
    """The tile of a grouped product that a program computes: its group, first row, and number of rows.

    Tiles of T rows start with each group; group E stands for the rows that belong to none. The lanes of each
    warp add the sizes of some neighbours each, and ask each other for the sums of those before.

    Args:
        sizes: int32 [E] in device memory.
        visit: which tile.
        groups: E.
        tokens: T.
        rows: of x.

    Returns:
        (group, first, rows); no rows if there is no such tile.
    """
    lane, each = thread() % 32, -(-groups // 32)
    base, limit = utils.memref_ptr(sizes), U32(rows)
    found = []
    for i in range(each):
        index = lane * each + i
        known = 1 - (index >= groups)
        place = _minimum(index, U32(groups - 1))
        size = llvm.load(_i32(), utils.getelementptr(base, [place.value], _i32()))
        # A negative size counts as none, one past x as its end: no sum overflows.
        size = arith.minsi(arith.maxsi(size, U32(0).value), limit.value)
        found.append(U32(size) * known)
    tiles = [(size + (tokens - 1)) // tokens for size in found]
    row, tile = _before(sum(found, U32(0)), lane), _before(sum(tiles, U32(0)), lane)
    all_rows, all_tiles = (
        _op("shfl.sync.idx.b32 $0, $1, 31, 31, 0xffffffff;", total)
        for total in (row + sum(found, U32(0)), tile + sum(tiles, U32(0)))
    )
    results = [U32(0)] * 3
    for i, (size, count) in enumerate(zip(found, tiles, strict=True)):
        here = (visit >= tile) * (1 - (visit >= tile + count))
        first = row + (visit - tile) * tokens
        for j, value in enumerate((lane * each + i, first, row + size)):
            results[j] = results[j] + here * value
        row, tile = row + size, tile + count
    group, first, end = (_op("redux.sync.add.u32 $0, $1, 0xffffffff;", r) for r in results)
    past = visit >= all_tiles
    group = group + past * groups
    first = first + past * (all_rows + (visit - all_tiles) * tokens)
    end = _minimum(end + past * rows, limit)
    return group, first, (end - first) * (end >= first)


def _minimum(a: U32, b: U32) -> U32:
    return U32(arith.minui(a.value, b.value))


def _before(value: U32, lane: U32) -> U32:
    """The sum of the values of the lanes before."""
    total = value
    for distance in (1, 2, 4, 8, 16):
        other = _op(f"shfl.sync.up.b32 $0, $1, {distance}, 0, 0xffffffff;", total)
        total = total + other * (lane >= distance)
    return total - value


def copy_rows(
    source: ir.Value | None, y: ir.Value, first: U32, rows: U32, column: U32, tokens: int
) -> None:
    """Copies the first `rows` of [T, 64] swizzled halves to a place in y; zeros if there is no source."""
    n = ir.MemRefType(y.type).shape[1]
    i64 = ir.IntegerType.get_signless(64)
    base = llvm.ptrtoint(i64, utils.memref_ptr(y))
    here, line = thread() % 128, thread() % 128 // 8
    chunk = here % 8
    inside = 1 - (column + chunk * 8 >= n)
    for i in range(tokens // 16):
        token = line + 16 * i
        flag = inside * (1 - (token >= rows))
        place = arith.muli(arith.extui(i64, (first + token).value), _wide(n))
        place = arith.addi(place, arith.extui(i64, (column + chunk * 8).value))
        place = arith.addi(base, arith.muli(place, _wide(2)))
        if source is None:
            moves = "mov.b32 a, 0; mov.b32 b, 0; mov.b32 c, 0; mov.b32 d, 0;"
            shared = U32(0)
        else:
            moves = "ld.shared.v4.b32 {a, b, c, d}, [$1];"
            shared = address(source) + token * 128 + (chunk ^ token % 8) * 16
        llvm.inline_asm(
            ir.Type.parse("!llvm.void"),
            [place, shared.value, flag.value],
            "{ .reg .pred p; .reg .b32 a, b, c, d; setp.ne.b32 p, $2, 0; "
            + moves
            + " @p st.global.v4.b32 [$0], {a, b, c, d}; }",
            f"l,r,r,{_MEMORY}",
            has_side_effects=True,
        )


def _wide(value: int) -> ir.Value:
    return arith.constant(ir.IntegerType.get_signless(64), value)
