"""Which function runs which instruction."""

import functools
import re
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from emulator import floats, integers
from emulator.source import Instruction, Source

if TYPE_CHECKING:
    from emulator.machine import Machine

Handler = Callable[["Machine", Instruction, np.ndarray], None]
_handlers: list[tuple[re.Pattern, bool, Handler]] = []


def instruction(*patterns: str, vector: bool = False) -> Callable[[Handler], Handler]:
    """Says which opcodes a function runs; `vector`, only with registers in braces."""

    def add(handler: Handler) -> Handler:
        _handlers.extend((re.compile(pattern), vector, handler) for pattern in patterns)
        return handler

    return add


@functools.cache
def _find(opcode: str, vector: bool) -> Handler | None:
    for pattern, needs_vector, handler in _handlers:
        if pattern.fullmatch(opcode) and vector >= needs_vector:
            return handler
    operation = integers.find(opcode) or floats.find(opcode)
    return None if operation is None or vector else functools.partial(_calculate, operation)


def _calculate(
    operation: integers.Operation, machine: "Machine", what: Instruction, active: np.ndarray
) -> None:
    """What depends on nothing but a thread's own registers."""
    target, *sources = what.operands
    registers = machine.registers
    values = [registers.peek(source, active) for source in sources]
    registers.write(target, operation(*values), active, registers.known(*sources))


def handlers(source: Source) -> list[Handler]:
    """What runs each instruction of a block of PTX."""
    found = []
    for what in source.instructions:
        vector = any(isinstance(operand, tuple) for operand in what.operands)
        handler = _find(what.opcode, vector)
        if handler is None:
            raise NotImplementedError(f"{what.text} is not known to the emulator")
        found.append(handler)
    return found
