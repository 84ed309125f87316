"""Runs a kernel: all programs of its grid, one index after the other."""

import numpy as np

# The modules of instructions add theirs to the table.
from emulator import accesses, control, copies, lanes, matrices  # noqa: F401
from emulator.machine import Machine
from emulator.memory import Memory
from emulator.source import Fault, parse
from emulator.table import handlers

_MOST_SHARED = 227 * 1024


def run(
    source: str,
    operands: list[np.ndarray],
    grid: tuple[int, int],
    threads: int,
    cluster: int = 1,
    chance: np.random.Generator | None = None,
) -> None:
    """Runs all programs of a kernel, `cluster` of them at each index of the grid.

    Args:
        source: the PTX, which calls its operands $1, $2, ...
        operands: of the kernel, then its results, which are written in place.
        grid: programs, or clusters of them.
        threads: threads a program, whole warps.
        cluster: programs that run at the same time.
        chance: picks the warps that go on; None for lockstep.

    Raises:
        Fault: what a GPU refuses, or need not do the same way every time.
        NotImplementedError: an instruction that the emulator does not know.
    """
    parsed = parse(source)
    if parsed.shared_bytes > _MOST_SHARED:
        raise Fault(f"{parsed.shared_bytes} bytes of shared memory are more than {_MOST_SHARED}")
    if threads % 32:
        raise ValueError(f"{threads=} must be a multiple of 32: whole warps")
    run_by, memory = handlers(parsed), Memory()
    starts = [[memory.map(operand)] for operand in operands]
    for y in range(grid[1]):
        for x in range(grid[0]):
            Machine(parsed, run_by, memory, starts, (x, y), threads, cluster, chance).run()


def run_devices(
    source: str,
    operands: list[list[np.ndarray]],
    grid: int,
    threads: int,
    cluster: int = 1,
    chance: np.random.Generator | None = None,
) -> None:
    """Runs a kernel on several devices at the same time, which reach each other's memory.

    Args:
        source: see `run`.
        operands: those of each device.
        grid: programs of each, or clusters of them; one after the other runs, on all devices together.
        threads: see `run`.
        cluster: see `run`.
        chance: see `run`.
    """
    parsed, memory = parse(source), Memory()
    run_by, count = handlers(parsed), len(operands)
    starts = [list(each) for each in zip(*_addresses(operands, memory), strict=True)]
    for x in range(grid):
        together = count * cluster
        Machine(parsed, run_by, memory, starts, (x, 0), threads, together, chance, count).run()


def addresses(operands: list[list[np.ndarray]]) -> list[list[int]]:
    """Where `run_devices` puts each device's operands."""
    return _addresses(operands, Memory())


def _addresses(operands: list[list[np.ndarray]], memory: Memory) -> list[list[int]]:
    return [[memory.map(array) for array in own] for own in operands]
