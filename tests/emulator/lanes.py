"""Instructions between the lanes of a warp: shuffles and votes; predicates and selections."""

import numpy as np

from emulator import floats, integers
from emulator.machine import Machine
from emulator.source import Instruction
from emulator.table import instruction

_COMPARE = {
    "eq": np.equal,
    "ne": np.not_equal,
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
}


@instruction(r"setp\.(eq|ne)\.b(16|32|64)|setp\.(eq|ne|lt|le|gt|ge)\.([us](16|32|64)|f32)")
def compare(machine: Machine, what: Instruction, active: np.ndarray) -> None:
    """Compares; with a NaN every comparison is false, also `ne`."""
    _, test, kind = what.opcode.split(".")
    a, b = (machine.registers.peek(name, active) for name in what.operands[1:])
    if kind == "f32":
        a, b = floats.singles(a), floats.singles(b)
        result = _COMPARE[test](a, b) & ~np.isnan(a) & ~np.isnan(b)
    else:
        width = int(kind[1:])
        of = integers.signed if kind[0] == "s" else integers.low
        result = _COMPARE[test](of(a, width), of(b, width))
    known = machine.registers.known(*what.operands[1:])
    machine.registers.write(what.operands[0], result, active, known)


@instruction(r"selp\.[busf](16|32|64)")
def select(machine: Machine, what: Instruction, active: np.ndarray) -> None:
    """The first where the predicate is true, else the second; the other one may be undefined."""
    target, first, second, predicate = what.operands
    registers = machine.registers
    which = registers.peek(predicate, active) != 0
    values = np.where(which, registers.peek(first, active), registers.peek(second, active))
    known = registers.known(predicate)
    for name, chosen in ((first, which), (second, ~which)):
        if (defined := registers.known(name)) is not None:
            known = (defined | ~chosen) & (True if known is None else known)
    registers.write(target, values, active, known)


@instruction(r"mov\.b(32|64)", vector=True)
def pack(machine: Machine, what: Instruction, active: np.ndarray) -> None:
    """Puts two halves together, or takes a register apart; the low half comes first."""
    target, source = what.operands
    half, registers = int(what.opcode[-2:]) // 2, machine.registers
    if isinstance(target, tuple):
        bits, known = registers.peek(source, active), registers.known(source)
        for i, part in enumerate(target):
            part_bits = integers.low(bits >> np.uint64(half * i), half)
            registers.write(part, part_bits, active, known)
        return
    low, high = (integers.low(registers.peek(part, active), half) for part in source)
    registers.write(target, low | high << np.uint64(half), active, registers.known(*source))


@instruction(r"shfl\.sync\.(up|down|bfly|idx)\.b32")
def shuffle(machine: Machine, what: Instruction, active: np.ndarray) -> None:
    """Reads other lanes' registers; a lane whose source is beyond the end keeps its own."""
    target, source, distance, ends, members = what.operands
    machine.check_whole(active)
    if int(members, 0) != 2**32 - 1:
        raise NotImplementedError(f"{what.text}: a shuffle of part of a warp")
    mode = what.opcode.split(".")[2]
    b, c = (machine.registers.read(v, active).astype(np.int64) for v in (distance, ends))
    lane, b, clamp, segments = np.arange(machine.threads) % 32, b & 31, c & 31, c >> 8 & 31
    first, last = lane & segments, lane & segments | clamp & ~segments
    way = {"up": lane - b, "down": lane + b, "bfly": lane ^ b, "idx": first | b & ~segments}[mode]
    inside = way >= last if mode == "up" else way <= last
    lanes = np.where(inside, way, lane) + np.arange(machine.threads) // 32 * 32
    values, known = machine.registers.peek(source, active), machine.registers.known(source)
    machine.registers.write(target, values[lanes], active, None if known is None else known[lanes])


@instruction(r"vote\.sync\.(any|all)\.pred")
def vote(machine: Machine, what: Instruction, active: np.ndarray) -> None:
    """Whether a predicate is true in any lane of the warp, or in all."""
    target, source, members = what.operands
    machine.check_whole(active)
    if int(members, 0) != 2**32 - 1:
        raise NotImplementedError(f"{what.text}: a vote of part of a warp")
    lanes = machine.registers.read(source, active).reshape(-1, 32) != 0
    result = lanes.any(axis=1) if ".any." in what.opcode else lanes.all(axis=1)
    machine.registers.write(target, np.repeat(result, 32), active)
