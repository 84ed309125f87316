"""Values of a Mosaic GPU kernel with Python's operators, and single instructions of PTX, in MLIR.

What `ptx.Register` is to kernels in PTX; see `mosaic_kernel`.
"""

from typing import Any

from jax._src.lib.mlir import ir
from jax._src.lib.mlir.dialects import arith, llvm
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.mosaic.gpu import utils
from jax.experimental.pallas import mosaic_gpu as plgpu

SCALAR = plgpu.Layout.WG_SPLAT(())
inline: Any = plgpu.inline_mgpu  # by its type, callers would pass the context too
_BARRIER = 9  # of the compute warpgroups
_TURNS = 10  # and the next one: of each of two warpgroups that take turns
# What an instruction changes that loads before and after it may see: without it they move across barriers.
MEMORY = "~{memory}"
inline_asm: Any = llvm.inline_asm  # its type does not say that what it returns is a value


class U32:
    """An unsigned integer of a kernel, with Python's operators; the other operand may be a constant."""

    def __init__(self, value: ir.Value | int) -> None:
        """Wraps a value of the program, or a constant."""
        if isinstance(value, int):
            # MLIR's constants are signed.
            value = arith.constant(i32(), value - (value >> 31 << 32))
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
        return U32(arith.extui(i32(), self._with(_not_below, other).value))

    __radd__, __rmul__ = __add__, __mul__


def _not_below(a: ir.Value, b: ir.Value) -> ir.Value:
    return arith.cmpi(arith.CmpIPredicate.uge, a, b)


def i32() -> ir.Type:
    """The type of integers."""
    return ir.IntegerType.get_signless(32)


def f32() -> ir.Type:
    """The type of floats."""
    return ir.F32Type.get()


def do(text: str, *operands: U32) -> None:
    """An instruction without a result."""
    void = ir.Type.parse("!llvm.void")
    values = [operand.value for operand in operands]
    constraints = ",".join([*"r" * len(values), MEMORY])
    llvm.inline_asm(void, values, text, constraints, has_side_effects=True)


def op(text: str, *operands: U32) -> U32:
    """An instruction whose result depends on its operands alone."""
    values = [operand.value for operand in operands]
    return U32(inline_asm(i32(), values, text, ",".join(["=r"] + ["r"] * len(values))))


def pack(low: ir.Value, high: ir.Value, half: str) -> U32:
    """Two float32 as a register of bfloat16 or float16."""
    text = f"cvt.rn.{half}x2.f32 $0, $1, $2;"
    return U32(inline_asm(i32(), [high, low], text, "=r,f,f"))


def widen(both: U32, half: int, kind: str) -> ir.Value:
    """The lower (0) or upper (1) bfloat16 ("bf16") or float16 ("f16") of a register as float32."""
    if kind == "bf16":
        order = f"0x{'10' if half == 0 else '32'}44"
        return arith.bitcast(f32(), op(f"prmt.b32 $0, $1, 0, {order};", both).value)
    word = (both >> 16 * half).value
    bits = arith.trunci(ir.IntegerType.get_signless(16), word)
    return arith.extf(f32(), arith.bitcast(ir.F16Type.get(), bits))


def load(address: U32, kind: ir.Type) -> ir.Value:
    """Loads from an address in shared memory."""
    return llvm.load(kind, llvm.inttoptr(llvm.PointerType.get(3), address.value))


def minimum(a: U32, b: U32) -> U32:
    """The smaller one."""
    return U32(arith.minui(a.value, b.value))


def address(ref: ir.Value) -> U32:
    """Where a reference to shared memory starts."""
    return U32(llvm.ptrtoint(i32(), utils.memref_ptr(ref)))


def thread() -> U32:
    """The thread's number in the program."""
    return op("mov.u32 $0, %tid.x;")


def scalar(value: U32) -> mgpu.FragmentedArray:
    """An integer as a scalar of Pallas."""
    layout = mgpu.WGSplatFragLayout(())
    return mgpu.FragmentedArray.splat(value.value, (), layout, is_signed=True)


def lane_of(thread: Any) -> tuple[Any, Any, Any]:
    """Warp of its warpgroup, row g of 8 and column c of 4 in the operands of the tensor cores."""
    return thread // 32 % 4, thread // 4 % 8, thread % 4


def sync_warpgroups(threads: int) -> None:
    """Waits for all threads of the compute warpgroups, which are so many."""
    do(f"bar.sync {_BARRIER}, {threads};")


def take_turn(warpgroup: U32) -> None:
    """A warpgroup waits until the other one gives it the turn."""
    do("bar.sync $0, 256;", warpgroup + _TURNS)


def give_turn(warpgroup: U32) -> None:
    """Gives a warpgroup the turn; the other one's threads call it, and go on."""
    do("bar.arrive $0, 256;", warpgroup + _TURNS)


def sync_cluster() -> None:
    """Waits for all threads of a cluster's programs, and for what they have stored."""
    do("barrier.cluster.arrive.release.aligned;")
    do("barrier.cluster.wait.acquire.aligned;")
