"""Sums that persistent programs of the Mosaic GPU kernel give to each other through device memory, in MLIR.

See `mosaic_schedule` for who gives what to whom.
"""

from jax._src.lib.mlir import ir
from jax._src.lib.mlir.dialects import arith, llvm
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.mosaic.gpu import utils

from pallas_kernels import mosaic_sums
from pallas_kernels.mosaic_values import MEMORY, U32, do, f32, i32, thread


def give(sums: ir.Value, flags: ir.Value, total: mgpu.FragmentedArray, place: U32) -> None:
    """Stores a warpgroup's sums, and then says so.

    Args:
        sums: float32 [places, 64 * T] in device memory.
        flags: semaphores [places], 1 where there are sums that nobody has taken.
        total: [64, T].
        place: of the program and warpgroup.
    """
    values = mosaic_sums.values_of(total)
    vector = ir.VectorType.get((4,), f32())
    for i in range(0, len(values), 4):
        four = llvm.mlir_undef(vector)
        for j in range(4):
            four = llvm.insertelement(four, values[i + j], U32(j).value)
        llvm.store(four, _pointer(sums, place, len(values), i))
    _sync_warpgroup()  # its threads' stores come before what one of them releases
    _by_first_thread("st.release.gpu.global.b32 [$0], 1;", flags, place)


def take(
    sums: ir.Value, flags: ir.Value, total: mgpu.FragmentedArray, place: U32
) -> mgpu.FragmentedArray:
    """A warpgroup's sums plus those that another program gives, for which it waits; see `give`."""
    text = "AGAIN: ld.acquire.gpu.global.b32 v, [$0]; setp.eq.b32 p, v, 0; @p bra AGAIN;"
    # Nobody gives again in this launch; semaphores are to be 0 at its end.
    _by_first_thread(f"{text} st.relaxed.gpu.global.b32 [$0], 0;", flags, place)
    _sync_warpgroup()
    values = mosaic_sums.values_of(total)
    vector = ir.VectorType.get((4,), f32())
    for i in range(0, len(values), 4):
        four = llvm.load(vector, _pointer(sums, place, len(values), i))
        for j in range(4):
            given = llvm.extractelement(four, U32(j).value)
            values[i + j] = arith.addf(values[i + j], given)
    return mosaic_sums.array_of(values, total)


def _pointer(sums: ir.Value, place: U32, values: int, i: int) -> ir.Value:
    """Where a thread's values i to i + 3 are: beside those of its neighbours."""
    index = place * (128 * values) + (thread() % 128 * 4 + 128 * i)
    return utils.getelementptr(utils.memref_ptr(sums), [index.value], f32())


def _sync_warpgroup() -> None:
    """Waits for the threads of the warpgroup; with the number that Mosaic's own such barrier has."""
    do("bar.sync $0, 128;", thread() // 128 + 1)


def _by_first_thread(text: str, flags: ir.Value, place: U32) -> None:
    """Instructions of the first thread of a warpgroup, on a flag."""
    i64 = ir.IntegerType.get_signless(64)
    flag = utils.getelementptr(utils.memref_ptr(flags), [place.value], i32())
    llvm.inline_asm(
        ir.Type.parse("!llvm.void"),
        [llvm.ptrtoint(i64, flag), (thread() % 128).value],
        f"{{ .reg .pred p; .reg .b32 v; setp.ne.b32 p, $1, 0; @p bra DONE; {text} DONE: }}",
        f"l,r,{MEMORY}",
        has_side_effects=True,
    )
