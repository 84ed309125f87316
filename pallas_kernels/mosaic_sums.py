"""The end of the Mosaic GPU kernel: sums over warpgroups and programs that share K, and the stores, in MLIR."""

from collections.abc import Sequence

import numpy as np
from jax._src.lib.mlir import ir
from jax._src.lib.mlir.dialects import arith, llvm
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.mosaic.gpu import utils

from pallas_kernels.case import Case
from pallas_kernels.mosaic_values import (
    MEMORY,
    U32,
    address,
    do,
    f32,
    inline_asm,
    lane_of,
    load,
    minimum,
    op,
    pack,
    sync_cluster,
    sync_warpgroups,
    thread,
)
from pallas_kernels.ptx import half_kind


def values_of(total: mgpu.FragmentedArray) -> list[ir.Value]:
    """This thread's values of [64, T]: for 8 tokens each, two of row g, two of row g + 8."""
    registers = total.registers.flat
    return [llvm.extractelement(register, U32(i).value) for register in registers for i in range(2)]


def array_of(values: list[ir.Value], total: mgpu.FragmentedArray) -> mgpu.FragmentedArray:
    """Values (`values_of`) as an array like `total`, perhaps of fewer tokens."""
    shape = total.shape[0], 2 * len(values)
    registers = np.empty(total.layout.registers_shape(shape), dtype=object)
    vector = ir.VectorType.get((2,), f32())
    for i in range(registers.size):
        pair = llvm.mlir_undef(vector)
        for j in range(2):
            pair = llvm.insertelement(pair, values[2 * i + j], U32(j).value)
        registers.flat[i] = pair
    return mgpu.FragmentedArray(_registers=registers, _layout=total.layout, _is_signed=None)


def times(values: list[ir.Value], factor: ir.Value) -> list[ir.Value]:
    """Each value times a factor."""
    return [arith.mulf(value, factor) for value in values]


def own_tokens(tokens: int) -> int:
    """Tokens whose sums a program ends with, of two that share K: the first so many, or the last.

    Of 16 or 48 the ones in the middle are both programs', which write the same.
    """
    return -(-tokens // 32) * 16


def add_over_k(
    shared: ir.Value,
    total: mgpu.FragmentedArray,
    warpgroup: U32,
    row_groups: int,
    k_groups: int,
    program: U32 | None,
) -> mgpu.FragmentedArray:
    """The sums of warpgroups and then programs that share K, in the first warpgroups.

    They are added in shared memory where x was.

    Args:
        shared: where x was.
        total: [64, T], this warpgroup's.
        warpgroup: its number.
        row_groups: warpgroups with rows of their own.
        k_groups: warpgroups that share the K of these rows.
        program: of the two of a cluster that share K, each of which ends with `own_tokens`: every thread of
            the cluster has to come to two `sync_cluster`. None if programs share nothing.
    """
    values = values_of(total)
    size = 512 * len(values)  # bytes of a warpgroup's sums
    start = address(shared) + thread() % 128 * 16
    threads = 128 * row_groups * k_groups
    sync_warpgroups(threads)
    others = warpgroup >= row_groups
    if k_groups > 1:
        _store_sums(start + (warpgroup - row_groups) * size, values, others)
        sync_warpgroups(threads)
    own = start + warpgroup % row_groups * size
    for other in range(k_groups - 1):
        pointer = own + other * row_groups * size
        for i, value in enumerate(values):
            part = pointer + (2048 * (i // 4) + 4 * (i % 4))
            values[i] = arith.addf(value, load(part, f32()))
    if program is not None:
        values = _exchange(own, values, program, others ^ 1)
    return array_of(values, total)


def _exchange(pointer: U32, values: list[ir.Value], program: U32, flag: U32) -> list[ir.Value]:
    """The sums of both programs for the program's own tokens, unless the flag is 0."""
    count = own_tokens(2 * len(values)) // 2
    is_second = arith.cmpi(arith.CmpIPredicate.ne, program.value, U32(0).value)
    first, last = values[:count], values[-count:]
    own, given = (
        [arith.select(is_second, b, a) for a, b in zip(*two, strict=True)]
        for two in ((first, last), (last, first))
    )
    _store_sums(pointer, given, flag)
    sync_cluster()
    remote = op("mapa.shared::cluster.u32 $0, $1, $2;", pointer, program ^ 1)
    received = _load_sums(remote, count, flag)
    sums: list[ir.Value] = [arith.addf(*two) for two in zip(own, received, strict=True)]
    sync_cluster()
    return sums


def _store_sums(pointer: U32, values: Sequence[ir.Value], flag: U32) -> None:
    """Stores a thread's values four by four, 2 KiB apart, unless the flag is 0."""
    for i in range(0, len(values), 4):
        store = f"@p st.shared.v4.f32 [$0+{512 * i}], {{$1, $2, $3, $4}};"
        llvm.inline_asm(
            ir.Type.parse("!llvm.void"),
            [pointer.value, *values[i : i + 4], flag.value],
            f"{{ .reg .pred p; setp.ne.b32 p, $5, 0; {store} }}",
            f"r,f,f,f,f,r,{MEMORY}",
            has_side_effects=True,
        )


def _load_sums(pointer: U32, count: int, flag: U32) -> list[ir.Value]:
    """Loads what `_store_sums` has stored, of any program of the cluster; anything if the flag is 0."""
    values = []
    for i in range(0, count, 4):
        load = f"@p ld.shared::cluster.v4.f32 {{$0, $1, $2, $3}}, [$4+{512 * i}];"
        four = inline_asm(
            llvm.StructType.get_literal([f32()] * 4),
            [pointer.value, flag.value],
            f"{{ .reg .pred p; setp.ne.b32 p, $5, 0; {load} }}",
            f"=f,=f,=f,=f,r,r,{MEMORY}",
            has_side_effects=True,
        )
        values += [llvm.extractvalue(f32(), four, [j]) for j in range(4)]
    return values


def scale(
    sums: list[ir.Value],
    case: Case,
    first_row: U32,
    first_token: U32,
    token_factors: ir.Value,
    row_factors: ir.Value,
) -> list[ir.Value]:
    """Sums of integers (`values_of`) times the float32 factors of their rows of x and of the weight."""
    warp, g, c = lane_of(thread())
    of_rows = []
    for h in range(2):
        row = minimum(first_row + warp * 16 + g + 8 * h, U32(case.n - 1))
        pointer = utils.getelementptr(utils.memref_ptr(row_factors), [row.value], f32())
        of_rows.append(llvm.load(f32(), pointer))
    scaled, of_tokens = [], []
    for i, value in enumerate(sums):
        if i % 4 == 0:  # two tokens of row g, the same two of row g + 8
            token = first_token + (2 * c + 2 * i)
            pointer = utils.getelementptr(utils.memref_ptr(token_factors), [token.value], f32())
            pair = llvm.load(ir.VectorType.get((2,), f32()), pointer)
            of_tokens = [llvm.extractelement(pair, U32(e).value) for e in range(2)]
        value = arith.mulf(arith.sitofp(f32(), value), of_rows[i // 2 % 2])
        scaled.append(arith.mulf(value, of_tokens[i % 2]))
    return scaled


def store_transposed(
    target: ir.Value,
    values: list[ir.Value],
    case: Case,
    first_row: U32,
    group: U32,
    bias: ir.Value | None = None,
) -> None:
    """Stores [64, T] sums (`values_of`), plus a group's bias, as [T, 64] swizzled halves in shared memory."""
    warp, g, _ = lane_of(thread())
    if bias is not None:
        base, kind = utils.memref_ptr(bias), ir.MemRefType(bias.type).element_type
        added = []
        for h in range(2):
            row = minimum(first_row + warp * 16 + g + 8 * h, U32(case.n - 1))
            row = row + group * case.n
            one = llvm.load(kind, utils.getelementptr(base, [row.value], kind))
            added.append(one if kind == f32() else arith.extf(f32(), one))
        values = [arith.addf(value, added[i // 2 % 2]) for i, value in enumerate(values)]
    half = half_kind(case.out_dtype)
    pairs = [pack(*two, half) for two in zip(values[::2], values[1::2], strict=True)]
    # Lane 8 i + j has the address of line j of the i-th of four 8 by 8 matrices: token j, 8 rows of a weight.
    matrix, line = thread() % 32 // 8, thread() % 8
    column, token = warp * 2 + matrix % 2, matrix // 2 * 8 + line
    pointer = address(target) + token * 128 + (column ^ line) * 16
    for i in range(0, len(pairs), 4):
        store = "stmatrix.sync.aligned.m8n8.x4.trans.shared.b16"
        do(f"{store} [$0+{512 * i}], {{$1, $2, $3, $4}};", pointer, *pairs[i : i + 4])


def copy_rows(
    source: ir.Value | None, y: ir.Value, first: U32, rows: U32, column: U32, tokens: int
) -> None:
    """Copies the first `rows` of [T, 64] swizzled halves to rows of y; zeros if there is no source."""
    n = ir.MemRefType(y.type).shape[1]
    i64 = ir.IntegerType.get_signless(64)
    base = llvm.ptrtoint(i64, utils.memref_ptr(y))
    here, line = thread() % 128, thread() % 128 // 8
    chunk = here % 8
    inside = 1 - (column + chunk * 8 >= n)
    for i in range(tokens // 16):
        token = line + 16 * i
        flag = inside * (1 - (token >= rows))
        pointer = arith.muli(arith.extui(i64, (first + token).value), _wide(n))
        pointer = arith.addi(pointer, arith.extui(i64, (column + chunk * 8).value))
        pointer = arith.addi(base, arith.muli(pointer, _wide(2)))
        if source is None:
            moves = "mov.b32 a, 0; mov.b32 b, 0; mov.b32 c, 0; mov.b32 d, 0;"
            shared = U32(0)
        else:
            moves = "ld.shared.v4.b32 {a, b, c, d}, [$1];"
            shared = address(source) + token * 128 + (chunk ^ token % 8) * 16
        llvm.inline_asm(
            ir.Type.parse("!llvm.void"),
            [pointer, shared.value, flag.value],
            "{ .reg .pred p; .reg .b32 a, b, c, d; setp.ne.b32 p, $2, 0; "
            + moves
            + " @p st.global.v4.b32 [$0], {a, b, c, d}; }",
            f"l,r,r,{MEMORY}",
            has_side_effects=True,
        )


def _wide(value: int) -> ir.Value:
    return arith.constant(ir.IntegerType.get_signless(64), value)
