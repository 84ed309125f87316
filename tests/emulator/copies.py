"""Asynchronous copies into shared memory: in groups of a warp's, and in bulk with barriers in shared memory."""

import dataclasses
import functools

import numpy as np

from emulator.accesses import addresses
from emulator.machine import Machine
from emulator.source import Address, Fault, Instruction
from emulator.table import instruction


@instruction(r"cp\.async\.(ca|cg)\.shared(::cta)?\.global(\.L2::cache_hint)?")
def copy(machine: Machine, what: Instruction, active: np.ndarray) -> None:
    """Begins to copy 4, 8 or 16 bytes a thread: they arrive at once, or when the warp waits for them."""
    to, source, size = what.operands[0], what.operands[1], int(what.operands[2])
    if len(what.operands) > 3 and "cache_hint" not in what.opcode:
        raise NotImplementedError(f"{what.text}: a copy of less than its size")
    if size not in ((16,) if ".cg." in what.opcode else (4, 8, 16)):
        raise Fault(f"cp.async does not copy {size} bytes")
    targets = addresses(machine, to, active) + machine.window
    sources = addresses(machine, source, active)
    machine.check_aligned(targets[active], size)
    machine.check_aligned(sources[active], size)
    warps = np.arange(machine.threads) // 32
    for warp in np.unique(warps[active]):
        own = active & (warps == warp)
        late = machine.chance.random() < 0.5
        for i in range(0, size, 4):
            values, _ = machine.memory.load(sources[own] + i, 4)
            if late:
                machine.copies[warp].append((targets[own] + i, values))
                machine.shared.load(targets[own] + i, 4)  # is within it
            else:
                machine.shared.store(targets[own] + i, 4, values)


@instruction(r"cp\.async\.commit_group")
def commit(machine: Machine, what: Instruction, active: np.ndarray) -> None:
    """Makes a group of the warp's copies since the last one."""
    for warp in machine.warps(active):
        machine.groups[warp].append(machine.copies[warp])
        machine.copies[warp] = []


@instruction(r"cp\.async\.wait_group")
def wait(machine: Machine, what: Instruction, active: np.ndarray) -> None:
    """Waits until so many of the warp's groups are left: the copies of the others have arrived."""
    for warp in machine.warps(active):
        ready = max(len(machine.groups[warp]) - int(what.operands[0]), 0)
        for target, values in (c for group in machine.groups[warp][:ready] for c in group):
            machine.shared.store(target, 4, values)
        machine.groups[warp] = machine.groups[warp][ready:]


@dataclasses.dataclass
class Barrier:
    """A barrier in shared memory: arrivals a phase, those missing, bytes missing, the phase's number."""

    count: int
    missing: int
    bytes: int = 0
    phase: int = 0


def _shared_addresses(machine: Machine, operand: Address, active: np.ndarray) -> np.ndarray:
    return addresses(machine, operand, active) + machine.window


def _barrier(machine: Machine, address: int) -> Barrier:
    if address not in machine.barriers:
        raise Fault(f"there is no barrier at {address}: mbarrier.init was not there")
    return machine.barriers[address]


def _turn(machine: Machine, barrier: Barrier) -> None:
    """Begins a barrier's next phase if nothing is missing, and lets everybody look again."""
    if barrier.missing < 0:
        raise Fault("more arrivals than the barrier counts")
    if barrier.missing == barrier.bytes == 0:
        barrier.missing, barrier.phase = barrier.count, barrier.phase + 1
        machine.polling[:] = False


@instruction(r"mbarrier\.init\.shared(::cta)?\.b64")
def begin(machine: Machine, what: Instruction, active: np.ndarray) -> None:
    """Makes a barrier for so many arrivals a phase."""
    count = int(machine.registers.read(what.operands[1], active)[active][0])
    addresses = _shared_addresses(machine, what.operands[0], active)[active]
    machine.check_aligned(addresses, 8)
    machine.shared.load(addresses, 8)  # is within it
    for address in addresses:
        machine.barriers[int(address)] = Barrier(count, count)


@instruction(r"mbarrier\.arrive(\.expect_tx)?\.shared(::cta)?\.b64")
def arrive(machine: Machine, what: Instruction, active: np.ndarray) -> None:
    """Arrives at barriers, and makes them wait for so many bytes more."""
    sizes = np.zeros(machine.threads, np.uint64)
    if "expect_tx" in what.opcode:
        sizes = machine.registers.read(what.operands[2], active)
    addresses = _shared_addresses(machine, what.operands[1], active)
    for address, size in zip(addresses[active], sizes[active], strict=True):
        barrier = _barrier(machine, int(address))
        barrier.missing -= 1
        barrier.bytes += int(size)
        _turn(machine, barrier)


@instruction(r"cp\.async\.mbarrier\.arrive\.noinc\.shared(::cta)?\.b64")
def arrive_with_copies(machine: Machine, what: Instruction, active: np.ndarray) -> None:
    """Arrives at a barrier, for each thread, when the copies that the warp has begun so far are there."""
    barriers = _shared_addresses(machine, what.operands[0], active)
    for warp in machine.warps(active):
        begun, machine.copies[warp] = machine.copies[warp], []
        lanes = active.reshape(-1, 32)[warp]
        found = barriers.reshape(-1, 32)[warp][lanes]
        machine.bulk.append(functools.partial(_arrive_all, machine, begun, found))


def _arrive_all(machine: Machine, copies: list, barriers: np.ndarray) -> None:
    for target, values in copies:
        machine.shared.store(target, 4, values)
    for address in barriers:
        barrier = _barrier(machine, int(address))
        barrier.missing -= 1
        _turn(machine, barrier)


@instruction(r"mbarrier\.(try|test)_wait\.parity\.shared(::cta)?\.b64")
def try_wait(machine: Machine, what: Instruction, active: np.ndarray) -> None:
    """Whether the phase of a parity is over; if not, the thread may stand still before it goes on."""
    addresses = _shared_addresses(machine, what.operands[1], active)
    parity = machine.registers.read(what.operands[2], active)
    done = np.zeros(machine.threads, bool)
    for address in np.unique(addresses[active]):
        here = active & (addresses == address)
        done[here] = _barrier(machine, int(address)).phase % 2 != parity[here]
    machine.registers.write(what.operands[0], done, active)
    if machine.chance.random() < 0.75:  # else its time is over, and it says so
        machine.polling |= active & ~done


@instruction(
    r"cp\.async\.bulk\.shared::cluster\.global\.mbarrier::complete_tx::bytes(\.L2::cache_hint)?"
)
def copy_bulk(machine: Machine, what: Instruction, active: np.ndarray) -> None:
    """Begins to copy so many bytes; a barrier learns of their arrival."""
    to, source, size, full = what.operands[:4]
    targets, fulls = (
        _shared_addresses(machine, to, active),
        _shared_addresses(machine, full, active),
    )
    sources, sizes = addresses(machine, source, active), machine.registers.read(size, active)
    for thread in np.flatnonzero(active):
        target, start, count = int(targets[thread]), int(sources[thread]), int(sizes[thread])
        machine.check_aligned(np.asarray([target, start, count]), 16)
        if not count:
            raise Fault("a bulk copy of nothing")
        steps = np.arange(0, count, 4)
        what_and_where = target + steps, start + steps, int(fulls[thread])
        machine.bulk.append(functools.partial(_deliver, machine, *what_and_where))
        if machine.chance.random() < 0.5:
            machine.bulk.pop()()


def _deliver(machine: Machine, target: np.ndarray, source: np.ndarray, full: int) -> None:
    """What happens when a bulk copy arrives."""
    machine.shared.store(target, 4, machine.memory.load(source, 4)[0])
    barrier = _barrier(machine, full)
    barrier.bytes -= 4 * len(target)
    _turn(machine, barrier)
