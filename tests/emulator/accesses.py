"""Loads, stores and atomic additions."""

import re

import numpy as np

from emulator.machine import WINDOW, Machine
from emulator.source import Address, Fault, Instruction
from emulator.table import instruction

_HINTS = r"(\.L1::no_allocate|\.L2::cache_hint)*"
_VALUES = r"(\.v[24])?\.[busf](16|32|64)"


def addresses(machine: Machine, operand: Address, active: np.ndarray) -> np.ndarray:
    """The addresses [threads] that a memory operand stands for."""
    return machine.registers.read(operand.base, active).view(np.int64) + operand.offset


@instruction(
    r"ld(\.acquire\.gpu|\.relaxed\.(sys|gpu))?\.global(\.nc)?" + _HINTS + _VALUES,
    r"ld\.shared(::cluster|::cta)?" + _VALUES,
    r"st(\.relaxed\.(sys|gpu))?\.(global|shared|shared::cta)" + _HINTS + _VALUES,
)
def access(machine: Machine, what: Instruction, active: np.ndarray) -> None:
    """Loads registers from memory, or stores them; a vector is aligned as a whole."""
    loads, opcode = what.opcode.startswith("ld"), what.opcode
    registers, address = what.operands[:2] if loads else what.operands[1::-1]
    registers = registers if isinstance(registers, tuple) else (registers,)
    vector = re.search(r"\.v([24])\.", opcode)
    if len(registers) != (int(vector[1]) if vector else 1):
        raise Fault(f"{len(registers)} registers are not those of the vector")
    size, memory = int(opcode[-2:]) // 8, machine.memory
    where = addresses(machine, address, active)
    if "shared" in opcode:
        memory = machine.shared
        if "::cluster" not in opcode:  # the program's own; what is the cluster's has been mapped
            where = where + machine.window
    machine.check_aligned(where[active], size * len(registers))
    here = where[active] + size * np.arange(len(registers))[:, None]
    if not loads:
        values = np.stack([machine.registers.peek(register, active) for register in registers])
        known = None
        if machine.registers.known(*registers) is not None:
            of_each = [machine.registers.known(register) for register in registers]
            everybody = np.ones(machine.threads, bool)
            known = np.stack([everybody if k is None else k for k in of_each])[:, active]
        memory.store(here, size, values[:, active], known)
        if "relaxed.gpu" in opcode:
            machine.tell_news()
    else:
        found, defined = memory.load(here, size, constant=".nc" in opcode)
        values = np.zeros((len(registers), machine.threads), np.uint64)
        values[:, active] = found
        known = None
        if not defined.all():
            known = np.broadcast_to(active, values.shape).copy()
            known[:, active] = defined
        for i, register in enumerate(registers):
            machine.registers.write(
                register, values[i], active, None if known is None else known[i]
            )
        if "acquire" in opcode:
            machine.wait_for_news(where, values[-1], active)
    if "relaxed.sys" in opcode:
        if loads:
            machine.wait_for_words(active)
        else:
            machine.tell_of_words()


@instruction(
    r"red\.(relaxed|release)\.gpu\.global\.add\.u32",
    r"atom\.(relaxed|acquire|release|acq_rel)\.gpu\.global\.add\.u32",
)
def add_atomically(machine: Machine, what: Instruction, active: np.ndarray) -> None:
    """Adds to memory, a thread at a time, and lets everybody look again."""
    address, value = what.operands[-2:]
    where = addresses(machine, address, active)
    added, before = machine.registers.read(value, active), np.zeros(machine.threads, np.uint64)
    for thread in np.flatnonzero(active):
        before[thread] = machine.memory.load(where[[thread]], 4)[0][0]
        machine.memory.store(where[[thread]], 4, before[[thread]] + added[[thread]])
    if what.opcode.startswith("atom"):
        machine.registers.write(what.operands[0], before, active)
    machine.polling[:] = False


@instruction(r"mapa\.shared::cluster\.u32")
def map_address(machine: Machine, what: Instruction, active: np.ndarray) -> None:
    """The address of another program's shared memory that corresponds to one's own."""
    target, own, rank = what.operands
    ranks = machine.registers.read(rank, active)
    address = machine.registers.read(own, active) + ranks * np.uint64(WINDOW)
    machine.registers.write(target, address, active)
