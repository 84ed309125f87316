"""Writes PTX: a block of instructions, and the few idioms that the kernels share. `registers` has the operands.

    ptx = Ptx(target)
    lane = ptx.op("mov.u32", "%laneid")           any instruction that fills a register
    address = x + row * 128 + lane * 16           two of `mad.wide.u32`: x is an address of 64 bits
    in_bounds = lane < 24                         `setp.lt.u32`, a predicate
    ptx.do("st.global.b32", at(address, 4), word, when=in_bounds)

An operator writes its instruction when it is evaluated, so that the text has the order of the Python code.
"""

import re
from collections.abc import Sequence

import jax.numpy as jnp

from pallas_kernels.registers import Register, at, check, float_constant, result_kind, vector
from pallas_kernels.target import H200, Target

LOG2_E = 1.4426950408889634  # powers are those of two
ROW_LANES = (1, 2)  # distances of the four lanes that have a row of a fragment, see `Writer.row`
_WARP_LANES = (1, 2, 4, 8, 16)


class Ptx:
    """A block of PTX under construction; its text goes into a kernel as inline assembly.

    Attributes:
        target: the GPU that it is written for.
        prefix: what stands before the names of labels, so that a part can be written more than once.
    """

    prefix = ""

    def __init__(self, target: Target = H200) -> None:
        """Starts an empty block."""
        self.target = target
        self._lines: list[str] = []
        self._counts: dict[str, int] = {}
        self._shared = 0
        self._policies: dict[str, Register] = {}
        self._constants: dict[int, Register] = {}

    def operands(self, *names: str) -> dict[str, Register]:
        """The addresses of a kernel's operands and results by their names, in order from $1."""
        return {name: Register(self, f"${i}", "b64") for i, name in enumerate(names, 1)}

    def register(self, kind: str) -> Register:
        """A fresh register: "b32", "b64", "f32", "b16" or "pred"."""
        number = self._counts.get(kind, 0)
        self._counts[kind] = number + 1
        return Register(self, f"{kind}_{number}", kind)

    def registers(self, kind: str, count: int) -> list[Register]:
        """Fresh registers of one kind."""
        return [self.register(kind) for _ in range(count)]

    def do(self, opcode: str, *operands: object, when: Register | None = None) -> None:
        """Appends an instruction, under a predicate if there is one. A Python float is a float32 constant."""
        if when is not None and when.kind != "pred":
            raise TypeError(f"{opcode}: {when} is {when.kind}, no predicate")
        check(opcode, operands)
        if opcode == "bra":
            operands = (f"{self.prefix}{operands[0]}",)
        texts = (float_constant(o) if isinstance(o, float) else str(o) for o in operands)
        guard = "" if when is None else f"@{when} "
        self._lines.append(f"{guard}{opcode} {', '.join(texts)};")

    def op(self, opcode: str, *operands: object, kind: str | None = None) -> Register:
        """Appends an instruction that fills a fresh register, by default of the opcode's type."""
        result = self.register(kind or result_kind(opcode))
        self.do(opcode, result, *operands)
        return result

    def zero(self) -> Register:
        """A fresh float32 register that holds zero."""
        return self.op("mov.f32", 0.0)

    def quotient(self, value: Register, divisor: int) -> Register:
        """Value // divisor, for values below 2**30.

        `ptxas` divides by a constant as by any number: a reciprocal in floats, a hundred cycles.
        """
        shift = divisor.bit_length() - 1
        if divisor == 1 << shift:
            return self.op("shr.u32", value, shift)
        # Too large by less than 1 / divisor, so that the part before the point is right.
        product = self.op("mul.hi.u32", value, -(-(1 << 31 + shift) // divisor))
        return self.op("shr.u32", product, shift - 1)

    def remainder(self, value: Register, divisor: int) -> Register:
        """The remainder of value / divisor, for values below 2**30."""
        if divisor.bit_count() == 1:
            return self.op("and.b32", value, divisor - 1)
        return self.op("mad.lo.u32", self.quotient(value, divisor), -divisor % 2**32, value)

    def multiply_halves(self, kind: str, a: Register, b: Register) -> Register:
        """Two products of a register's halves ("bf16" or "f16"), each rounded once."""
        if kind == "bf16" and not self.target.has_bfloat16_arithmetic:
            minus_zero = self.constant(0x80008000)  # plus zero would change the sign of a zero
            return self.op("fma.rn.bf16x2", a, b, minus_zero)
        return self.op(f"mul.rn.{kind}x2", a, b)

    def subtract_halves(self, kind: str, a: Register, b: Register) -> Register:
        """Two differences of a register's halves, each rounded once."""
        if kind == "bf16" and not self.target.has_bfloat16_arithmetic:
            return self.op("fma.rn.bf16x2", b, self.constant(0xBF80BF80), a)  # minus one
        return self.op(f"sub.rn.{kind}x2", a, b)

    def multiply_add(
        self,
        kind: str,
        sums: Sequence[Register],
        a: Sequence[Register],
        b: Sequence[Register],
        start: Sequence[Register] | None = None,
    ) -> None:
        """A product of the tensor cores, `mma.sync.m16n8k16`: sums = a b + start, [16, 8] in float32.

        Of the lane 4 g + t, as the PTX ISA has its fragments:

        Args:
            kind: "bf16" or "f16".
            sums: four registers: columns 2 t and 2 t + 1 of row g, then of row g + 8.
            a: four, of two neighbours along K each: 2 t and 2 t + 1 of rows g and g + 8, then 8 further.
            b: two, of two neighbours along K each: 2 t and 2 t + 1 of column g, then 8 further.
            start: None for `sums` themselves.
        """
        self.do(
            f"mma.sync.aligned.m16n8k16.row.col.f32.{kind}.{kind}.f32",
            *(vector(registers) for registers in (sums, a, b, sums if start is None else start)),
        )

    def constant(self, value: int) -> Register:
        """A register with a value, set at the start: for operands that may not be literals."""
        if value not in self._constants:
            self._constants[value] = self.register("b32")
        return self._constants[value]

    def policy(self, priority: str) -> Register:
        """A cache policy for loads with `.L2::cache_hint`: "evict_first" or "evict_last"."""
        if priority not in self._policies:
            self._policies[priority] = self.register("b64")
        return self._policies[priority]

    def label(self, name: str) -> None:
        """Places a label."""
        self._lines.append(f"{self.prefix}{name}:")

    def comment(self, text: str) -> None:
        """Begins a stage of the kernel: its name stands in the PTX, where a profiler shows it."""
        self._lines.append(f"// {text}")

    def share(self, size: int) -> None:
        """Declares `fdk_shared`, the program's shared memory, of so many bytes."""
        self._shared = size

    def text(self) -> str:
        """The block, in a scope of its own."""
        types = {"b32": ".b32", "b64": ".b64", "f32": ".f32", "b16": ".b16", "pred": ".pred"}
        registers = [f".reg {types[k]} {k}_<{n}>;" for k, n in self._counts.items()]
        shared = [shared_declaration(self._shared)] if self._shared else []
        policies = [
            f"createpolicy.fractional.L2::{priority}.b64 {register}, 1.0;"
            for priority, register in self._policies.items()
        ]
        constants = [f"mov.b32 {name}, 0x{value:08x};" for value, name in self._constants.items()]
        return "\n".join(["{", *shared, *registers, *policies, *constants, *self._lines, "}"])


class Writer:
    """What writers of kernels share: registers for who this thread is.

    Attributes:
        shared: the address of the program's shared memory.
        thread, warp, lane: its number in the program, its warp's, and its own in that.
        row, thread_in_group: lane / 4 and lane % 4: `groupID` and `threadID_in_group`, by which the
            PTX ISA describes the fragments of the tensor cores.
    """

    ptx: Ptx

    def _locate_lane(self) -> None:
        ptx = self.ptx
        self.shared = ptx.op("mov.u32", "fdk_shared")
        self.thread = ptx.op("mov.u32", "%tid.x")
        self.lane = self.thread & 31
        self.warp = self.thread >> 5
        self.row = self.lane >> 2
        self.thread_in_group = self.lane & 3


def shared_declaration(size: int | str) -> str:
    """The declaration of a program's shared memory; its only one."""
    return f".shared .align 128 .b8 fdk_shared[{size}];"


def shared_bytes(source: str) -> int:
    """The size of `fdk_shared`, zero if a block of PTX has none."""
    size = re.search(r"fdk_shared\[(\d+)\]", source)
    return int(size[1]) if size else 0


def half_kind(dtype) -> str:
    """What PTX calls bfloat16 or float16."""
    return "bf16" if dtype == jnp.bfloat16 else "f16"


def load_float(
    ptx: Ptx, base: Register, index: Register, dtype, *, opcode: str = "ld.global.nc"
) -> Register:
    """An element of a float array in memory as float32."""
    size = jnp.dtype(dtype).itemsize
    address = base + index * size
    if dtype == jnp.float32:
        return ptx.op(f"{opcode}.f32", at(address))
    half = ptx.op(f"{opcode}.b16", at(address), kind="b16")
    if dtype == jnp.float16:
        return ptx.op("cvt.f32.f16", half)
    zero = ptx.op("mov.b16", 0)
    return ptx.op("mov.b32", vector([zero, half]), kind="f32")


def store_float(ptx: Ptx, address: Register, value: Register, dtype) -> None:
    """Stores a float32 as an element of a float array in memory."""
    if dtype == jnp.float32:
        ptx.do("st.global.f32", at(address), value)
        return
    half = ptx.op(f"cvt.rn.{half_kind(dtype)}.f32", value, kind="b16")
    ptx.do("st.global.b16", at(address), half)


def over_lanes(
    ptx: Ptx, opcode: str, value: Register, distances: tuple[int, ...] = _WARP_LANES
) -> Register:
    """What an operation makes of the values of the lanes at these distances: by default of the whole warp."""
    kind = "f32" if opcode.endswith("f32") else "b32"
    for distance in distances:
        other = ptx.register(kind)
        ptx.do("shfl.sync.bfly.b32", other, value, distance, 31, "0xffffffff")
        value = ptx.op(opcode, value, other, kind=kind)
    return value
