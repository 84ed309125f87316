"""Reads a block of PTX: its instructions, labels and shared memory."""

import dataclasses
import functools
import re
from typing import Any


class Fault(AssertionError):
    """What a GPU would refuse, or would not do the same way every time."""


@dataclasses.dataclass(frozen=True)
class Address:
    """A memory operand: a register and a number of bytes after it."""

    base: str
    offset: int


# A name or literal, an Address, or the registers of a vector as a tuple: which one, the opcode says.
Operand = Any


@dataclasses.dataclass(frozen=True)
class Instruction:
    """An instruction.

    Attributes:
        text: the line.
        opcode: with all that belongs to it, "mad.lo.u32".
        operands: names and literals, addresses, and the registers of a vector as a tuple.
        guard: the predicate that it is under, or "".
        negated: whether it runs where the predicate is false.
    """

    text: str
    opcode: str
    operands: tuple[Operand, ...]
    guard: str = ""
    negated: bool = False


@dataclasses.dataclass(frozen=True)
class Source:
    """A block of PTX: instructions, where its labels are among them, and bytes of shared memory."""

    instructions: tuple[Instruction, ...]
    labels: dict[str, int]
    shared_bytes: int


@functools.lru_cache(4)
def parse(text: str) -> Source:
    """Reads a block of PTX, an instruction a line, as `pallas_kernels.ptx` writes it."""
    shared = re.search(r"fdk_shared\[(\d+)\]", text)
    instructions, labels = [], {}
    for line in map(str.strip, text.splitlines()):
        if line in ("", "{", "}") or line.startswith((".", "//")):
            continue
        if line.endswith(":"):
            labels[line[:-1]] = len(instructions)
        else:
            instructions.append(_instruction(line))
    return Source(tuple(instructions), labels, int(shared[1]) if shared else 0)


def _instruction(line: str) -> Instruction:
    found = re.fullmatch(r"(?:@(!?)(\w+) )?(\S+)(?: (.*))?;", line)
    if found is None:
        raise ValueError(f"{line!r} is no line of PTX: an instruction ends with a semicolon")
    negated, guard, opcode, rest = found.groups()
    operands = re.findall(r"\{[^}]*\}|[^,\s]+", rest or "")
    return Instruction(line, opcode, tuple(map(_operand, operands)), guard or "", bool(negated))


def _operand(text: str) -> Operand:
    if text.startswith("{"):
        return tuple(part.strip() for part in text[1:-1].split(","))
    if text.startswith("["):
        base, _, offset = text[1:-1].partition("+")
        return Address(base, int(offset or 0))
    return text
