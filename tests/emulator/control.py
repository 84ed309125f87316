"""Branches, barriers of programs and clusters, and what changes no values."""

import numpy as np

from emulator.machine import Machine
from emulator.source import Fault, Instruction
from emulator.table import instruction

_WARPS = 16  # where the numbers of warps' barriers begin, after those of programs


@instruction(r"bra")
def branch(machine: Machine, what: Instruction, active: np.ndarray) -> None:
    """Goes on at a label."""
    machine.jump(what.operands[0], active)


@instruction(r"trap")
def trap(machine: Machine, what: Instruction, active: np.ndarray) -> None:
    """Where a kernel gives up."""
    raise Fault("a trap: the other programs never came")


@instruction(r"createpolicy\.fractional\.L2::evict_(first|last)\.b64")
def make_policy(machine: Machine, what: Instruction, active: np.ndarray) -> None:
    """Cache policies change no values."""
    machine.registers.write(what.operands[0], np.zeros(machine.threads, np.uint64), active)


@instruction(
    r"griddepcontrol\.(launch_dependents|wait)",
    r"fence(\.\S+)?",
)
def order(machine: Machine, what: Instruction, active: np.ndarray) -> None:
    """Orders what is in order anyway: memory is consistent."""


@instruction(r"bar\.warp\.sync")
def meet_warp(machine: Machine, what: Instruction, active: np.ndarray) -> None:
    """Joins the threads of whole warps."""
    for warp in machine.warps(active):
        own = np.zeros(machine.threads, bool)
        own[32 * warp : 32 * warp + 32] = active[32 * warp : 32 * warp + 32]
        machine.meet(_WARPS + int(warp), 32, own)


@instruction(r"nanosleep\.u32")
def sleep(machine: Machine, what: Instruction, active: np.ndarray) -> None:
    """Stands still until something in memory changes."""
    machine.polling |= active


@instruction(r"bar(rier)?\.sync")
def meet(machine: Machine, what: Instruction, active: np.ndarray) -> None:
    """A barrier of a program, by its number; or of so many of its threads, whole warps."""
    values = [machine.registers.read(name, active)[active] for name in what.operands]
    count = int(values[1][0]) if len(values) > 1 else None
    if count is not None and (count % 32 or not count):
        raise Fault(f"a barrier of {count} threads: there are only whole warps")
    for number in np.unique(values[0]):
        if number > 15:
            raise Fault(f"there is no barrier {number}")
        own = active.copy()
        own[active] = values[0] == number
        machine.meet(int(number), count, own)


@instruction(r"barrier\.cluster\.arrive(\.release|\.relaxed)?(\.aligned)?")
def arrive(machine: Machine, what: Instruction, active: np.ndarray) -> None:
    """Comes to the cluster's barrier, and goes on."""
    machine.arrive_at_cluster(active)


@instruction(r"barrier\.cluster\.wait(\.acquire)?(\.aligned)?")
def wait(machine: Machine, what: Instruction, active: np.ndarray) -> None:
    """Waits at the cluster's barrier."""
    machine.wait_for_cluster(active)
