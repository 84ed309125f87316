"""Registers of PTX with operators that write instructions, memory operands, and the checks of their types."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from pallas_kernels.ptx import Ptx

_WIDTHS = {"b16": 16, "b32": 32, "b64": 64, "f32": 32, "pred": 1}  # of registers, in bits
_KINDS = {"f32": "f32", "b64": "b64", "u64": "b64", "bf16": "b16", "f16": "b16", "b16": "b16"}
_KINDS |= {"pred": "pred"}  # by an instruction's type; all others have 32 bits
# Instructions whose operands are all as wide as their result.
_ALIKE = {"add", "sub", "mul", "mad", "fma", "min", "max", "and", "or", "xor", "prmt", "lop3"}


class Register:
    """A register, a predicate or an operand of a block of PTX, with operators that write instructions.

    Integers are unsigned. `a * b` of integers is no instruction yet, see `Times`. Comparisons give
    predicates, of which `~` is the negation; equality has `eq` and `ne`.

    Attributes:
        ptx: the block.
        name: in its text.
        kind: "b32" (an integer, an address in shared memory, a pair of bfloat16 or float16), "b64" (an address
            in memory), "f32", "b16" (half a pair) or "pred".
    """

    __slots__ = ("kind", "name", "ptx")

    def __init__(self, ptx: Ptx, name: str, kind: str) -> None:
        self.ptx, self.name, self.kind = ptx, name, kind

    def __str__(self) -> str:
        return self.name

    def __bool__(self) -> bool:
        raise TypeError(f"{self.name} has its value on the GPU; use it as `when` of an instruction")

    def _arithmetic(self, operation: str, first: Any, second: Any) -> Register:
        kind = {"b32": "u32", "b64": "u64", "f32": "f32"}.get(self.kind)
        other = second if first is self else first
        if isinstance(other, Register):
            fits = other.kind == self.kind
        else:
            fits = isinstance(other, float) == (self.kind == "f32")
        if kind is None or not fits:
            raise TypeError(f"{operation} of {self}, which is {self.kind}, and {other}")
        return self.ptx.op(f"{operation}.{kind}", first, second)

    def _bitwise(self, operation: str, other: Any) -> Register:
        kind = "pred" if self.kind == "pred" else f"b{_WIDTHS[self.kind]}"
        return self.ptx.op(f"{operation}.{kind}", self, other)

    def __add__(self, other: Any) -> Register:
        return other + self if isinstance(other, Times) else self._arithmetic("add", self, other)

    def __radd__(self, other: Any) -> Register:
        return self._arithmetic("add", other, self)

    def __sub__(self, other: Any) -> Register:
        if isinstance(other, Times):
            return Times(other.a, -other.b % 2**32) + self
        return self._arithmetic("sub", self, other)

    def __rsub__(self, other: Any) -> Register:
        return self._arithmetic("sub", other, self)

    def __mul__(self, other: Any) -> Any:
        """A product of floats; of integers a `Times`."""
        return self._arithmetic("mul", self, other) if self.kind == "f32" else Times(self, other)

    def __floordiv__(self, divisor: int) -> Register:
        return self.ptx.quotient(self, divisor)

    def __mod__(self, divisor: int) -> Register:
        return self.ptx.remainder(self, divisor)

    def __and__(self, other: Any) -> Register:
        return self._bitwise("and", other)

    def __or__(self, other: Any) -> Register:
        return self._bitwise("or", other)

    def __xor__(self, other: Any) -> Register:
        return self._bitwise("xor", other)

    def __lshift__(self, count: Any) -> Register:
        return self.ptx.op("shl.b32", self, count)

    def __rshift__(self, count: Any) -> Register:
        return self.ptx.op("shr.u32", self, count)

    def __invert__(self) -> Register:
        if self.kind != "pred":
            raise TypeError(f"~ is of predicates, {self.name} is {self.kind}")
        return Register(self.ptx, f"!{self.name}", "pred")

    def as_float(self) -> Register:
        """The same register, whose bits are a float32."""
        return Register(self.ptx, self.name, "f32")

    def _compare(self, relation: str, other: Any) -> Register:
        return self._arithmetic(f"setp.{relation}", self, other)

    def __lt__(self, other: Any) -> Register:
        return self._compare("lt", other)

    def __le__(self, other: Any) -> Register:
        return self._compare("le", other)

    def __gt__(self, other: Any) -> Register:
        return self._compare("gt", other)

    def __ge__(self, other: Any) -> Register:
        return self._compare("ge", other)

    def eq(self, other: Any) -> Register:
        """Whether both are equal."""
        return self._compare("eq", other)

    def ne(self, other: Any) -> Register:
        """Whether they differ."""
        return self._compare("ne", other)


@dataclasses.dataclass(frozen=True)
class Times:
    """`a * b` of unsigned integers, which waits for what it is added to: both are one instruction."""

    a: Register
    b: Any

    def __add__(self, other: Any) -> Register:
        wide = isinstance(other, Register) and other.kind == "b64"
        return self.a.ptx.op(f"mad.{'wide' if wide else 'lo'}.u32", self.a, self.b, other)

    __radd__ = __add__

    def low(self) -> Register:
        """The product by itself, 32 bits."""
        return self.a.ptx.op("mul.lo.u32", self.a, self.b)

    def wide(self) -> Register:
        """The product by itself, 64 bits."""
        return self.a.ptx.op("mul.wide.u32", self.a, self.b)

    def __str__(self) -> str:
        raise TypeError(f"{self.a} times {self.b} is added to nothing: call low() or wide()")


@dataclasses.dataclass(frozen=True)
class Memory:
    """A memory operand: bytes from an address on."""

    address: Register
    offset: int

    def __str__(self) -> str:
        return f"[{self.address}+{self.offset}]"


def at(address: Register, offset: int = 0) -> Memory:
    """A memory operand, so many bytes after an address."""
    return Memory(address, offset)


def vector(registers: Sequence[Register]) -> str:
    """Registers as the operand of a vector load or store, or of an instruction of the tensor cores."""
    return "{" + ", ".join(map(str, registers)) + "}"


def wide(registers: Sequence[Register]) -> tuple[str, str]:
    """What a load or store of one or more registers adds to its opcode, and its operand."""
    if len(registers) == 1:
        return "", str(registers[0])
    return f".v{len(registers)}", vector(registers)


def float_constant(value: float) -> str:
    """A float32 as PTX writes it."""
    return f"0f{int(np.float32(value).view(np.uint32)):08X}"


@functools.lru_cache(maxsize=512)  # the opcodes of all kernels are fewer
def result_kind(opcode: str) -> str:
    """The kind of register that an instruction fills: by its type, of a conversion the first of two."""
    name, *modifiers = opcode.split(".")
    if name == "setp":
        return "pred"
    if "wide" in modifiers:
        return "b64"
    return _KINDS.get(modifiers[-2 if name == "cvt" else -1], "b32")


@functools.lru_cache(maxsize=512)  # the opcodes of all kernels are fewer
def _operand_types(opcode: str) -> tuple[int | None, str | None]:
    """Bits of all of an instruction's registers, and the kind of its addresses; None where they differ."""
    name, *modifiers = opcode.split(".")
    if name in ("ld", "st"):
        return None, "b64" if "global" in modifiers else "b32"
    alike = name in _ALIKE and "wide" not in modifiers
    return _WIDTHS[_KINDS.get(modifiers[-1], "b32")] if alike else None, None


def check(opcode: str, operands: Sequence[object]) -> None:
    """Raises TypeError for operands that an instruction does not take: of another width, of another memory."""
    width, address = _operand_types(opcode)
    for operand in operands:
        if isinstance(operand, Register) and width not in (None, _WIDTHS[operand.kind]):
            raise TypeError(f"{opcode} takes {width} bits, {operand} is {operand.kind}")
        if isinstance(operand, Memory) and address not in (None, operand.address.kind):
            raise TypeError(f"{opcode} takes an address of {address}, {operand} is none")
