"""Writes PTX: registers, operations and the few idioms that the kernels share."""

import re

import jax.numpy as jnp
import numpy as np

from pallas_kernels.target import H200, Target

LOG2_E = 1.4426950408889634  # powers are those of two


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
        self._policies: dict[str, str] = {}
        self._constants: dict[int, str] = {}

    def register(self, kind: str) -> str:
        """A fresh register: "b32", "b64", "f32", "b16" or "pred"."""
        number = self._counts.get(kind, 0)
        self._counts[kind] = number + 1
        return f"{kind}_{number}"

    def registers(self, kind: str, count: int) -> list[str]:
        """Fresh registers of one kind."""
        return [self.register(kind) for _ in range(count)]

    def do(self, opcode: str, *operands: object, when: str | None = None) -> None:
        """Appends an instruction, under a predicate (`p` or `!p`) if `when` names one."""
        guard = f"@{when} " if when else ""
        if opcode == "bra":
            operands = (f"{self.prefix}{operands[0]}",)
        self._lines.append(f"{guard}{opcode} {', '.join(map(str, operands))};")

    def op(self, opcode: str, *operands: object, kind: str = "b32") -> str:
        """Appends an instruction that fills a fresh register, and returns the register."""
        result = self.register(kind)
        self.do(opcode, result, *operands)
        return result

    def quotient(self, value: str, divisor: int) -> str:
        """Value // divisor, for values below 2**30.

        `ptxas` divides by a constant as by any number: a reciprocal in floats, a hundred cycles.
        """
        shift = divisor.bit_length() - 1
        if divisor == 1 << shift:
            return self.op("shr.u32", value, shift)
        # Too large by less than 1 / divisor, so that the part before the point is right.
        product = self.op("mul.hi.u32", value, -(-(1 << 31 + shift) // divisor))
        return self.op("shr.u32", product, shift - 1)

    def remainder(self, value: str, divisor: int) -> str:
        """The remainder of value / divisor, for values below 2**30."""
        if divisor.bit_count() == 1:
            return self.op("and.b32", value, divisor - 1)
        return self.op("mad.lo.u32", self.quotient(value, divisor), -divisor % 2**32, value)

    def multiply_halves(self, kind: str, a: str, b: str) -> str:
        """Two products of a register's halves ("bf16" or "f16"), each rounded once."""
        if kind == "bf16" and not self.target.has_bfloat16_arithmetic:
            minus_zero = self.constant(0x80008000)  # plus zero would change the sign of a zero
            return self.op("fma.rn.bf16x2", a, b, minus_zero)
        return self.op(f"mul.rn.{kind}x2", a, b)

    def subtract_halves(self, kind: str, a: str, b: str) -> str:
        """Two differences of a register's halves, each rounded once."""
        if kind == "bf16" and not self.target.has_bfloat16_arithmetic:
            return self.op("fma.rn.bf16x2", b, self.constant(0xBF80BF80), a)  # minus one
        return self.op(f"sub.rn.{kind}x2", a, b)

    def constant(self, value: int) -> str:
        """A register with a value, set at the start: for operands that may not be literals."""
        if value not in self._constants:
            self._constants[value] = self.register("b32")
        return self._constants[value]

    def policy(self, priority: str) -> str:
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
    """What writers of kernels share: registers for who this lane is, among those of `mma.sync`."""

    ptx: Ptx

    def _locate_lane(self) -> None:
        ptx = self.ptx
        self.shared = ptx.op("mov.u32", "fdk_shared")
        self.thread = ptx.op("mov.u32", "%tid.x")
        self.lane = ptx.op("and.b32", self.thread, 31)
        self.warp = ptx.op("shr.u32", self.thread, 5)
        self.row = ptx.op("shr.u32", self.lane, 2)
        self.quad = ptx.op("and.b32", self.lane, 3)


def shared_declaration(size: int | str) -> str:
    """The declaration of a program's shared memory; its only one."""
    return f".shared .align 128 .b8 fdk_shared[{size}];"


def shared_bytes(source: str) -> int:
    """The size of `fdk_shared`, zero if a block of PTX has none."""
    size = re.search(r"fdk_shared\[(\d+)\]", source)
    return int(size[1]) if size else 0


def vector(registers: list[str]) -> str:
    """Registers as the operand of a vector load or store."""
    return "{" + ", ".join(registers) + "}"


def wide(registers: list[str]) -> tuple[str, str]:
    """What a load or store of one or more registers adds to its opcode, and its operand."""
    if len(registers) == 1:
        return "", registers[0]
    return f".v{len(registers)}", vector(registers)


def at(address: str, offset: int = 0) -> str:
    """A memory operand."""
    return f"[{address}+{offset}]"


def float_constant(value: float) -> str:
    """A float32 as PTX writes it."""
    return f"0f{int(np.float32(value).view(np.uint32)):08X}"


def half_kind(dtype) -> str:
    """What PTX calls bfloat16 or float16."""
    return "bf16" if dtype == jnp.bfloat16 else "f16"


def load_float(ptx: Ptx, base: str, index: str, dtype, *, opcode: str = "ld.global.nc") -> str:
    """An element of a float array in memory as float32."""
    size = jnp.dtype(dtype).itemsize
    address = ptx.op("mad.wide.u32", index, size, base, kind="b64")
    if dtype == jnp.float32:
        return ptx.op(f"{opcode}.f32", at(address), kind="f32")
    half = ptx.op(f"{opcode}.b16", at(address), kind="b16")
    if dtype == jnp.float16:
        return ptx.op("cvt.f32.f16", half, kind="f32")
    zero = ptx.op("mov.b16", 0, kind="b16")
    return ptx.op("mov.b32", vector([zero, half]), kind="f32")


def store_float(ptx: Ptx, address: str, value: str, dtype) -> None:
    """Stores a float32 as an element of a float array in memory."""
    if dtype == jnp.float32:
        ptx.do("st.global.f32", at(address), value)
        return
    half = ptx.op(f"cvt.rn.{half_kind(dtype)}.f32", value, kind="b16")
    ptx.do("st.global.b16", at(address), half)


def over_lanes(
    ptx: Ptx, opcode: str, value: str, distances: tuple[int, ...] = (1, 2, 4, 8, 16)
) -> str:
    """What an operation makes of the values of the lanes at these distances: of a warp, or of (1, 2) a row."""
    kind = "f32" if opcode.endswith("f32") else "b32"
    for distance in distances:
        other = ptx.register(kind)
        ptx.do("shfl.sync.bfly.b32", other, value, distance, 31, "0xffffffff")
        value = ptx.op(opcode, value, other, kind=kind)
    return value
