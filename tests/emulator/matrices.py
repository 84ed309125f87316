"""Products of matrices: `mma.sync` of a warp and `wgmma` of four, with the layouts of their registers.

Lane 4 g + c of a warp holds rows g and g + 8 of A, column g of B, and rows g and g + 8 of D at columns 2 c and
2 c + 1.
Sums are made in float64 and rounded once, or in integers.
"""

import re
from collections.abc import Sequence

import numpy as np

from emulator import floats
from emulator.machine import Machine
from emulator.registers import Known
from emulator.source import Fault, Instruction
from emulator.table import instruction

_BYTES = {"u8": np.uint8, "s8": np.int8}


def _lanes(machine: Machine) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Each thread's warp, and its g and c in it."""
    thread = np.arange(machine.threads)
    return thread // 32, thread % 32 // 4, thread % 4


def _known(
    machine: Machine, a: Sequence[str], of_b: np.ndarray | None, c: Sequence[str]
) -> list[Known]:
    """Of which lanes registers of D are defined: row of A, column of B [warps, columns], and C have to be."""
    registers, of_c = machine.registers, [machine.registers.known(register) for register in c]
    if registers.known(*a) is None and of_b is None:
        return of_c
    warp, g, t = _lanes(machine)
    rows = np.ones((machine.threads // 32, 16), bool)
    for i, register in enumerate(a):
        if (known := registers.known(register)) is not None:
            rows[:, 8 * (i % 2) :][:, :8] &= known.reshape(-1, 8, 4).all(axis=2)
    found = []
    for i, known in enumerate(of_c):
        known = rows[warp, g + 8 * (i % 4 // 2)] & (True if known is None else known)
        if of_b is not None:
            known &= of_b[warp, i // 4 * 8 + 2 * t + i % 2]
        found.append(known)
    return found


def _columns(machine: Machine, b: tuple[str, ...]) -> np.ndarray | None:
    """Which columns [warps, 8] of B are defined."""
    known: Known = machine.registers.known(*b)
    return None if known is None else np.asarray(known.reshape(-1, 8, 4).all(axis=2))


def _sums(
    machine: Machine, a: list[np.ndarray], right: np.ndarray, c: list[np.ndarray], dtype: type
) -> list[np.ndarray]:
    """A B + C for B [warps, 16, columns], as registers: eight columns take four of them.

    A holds rows g, g + 8 and columns 2 c, 2 c + 1, then those 8 further.
    """
    left = np.empty((machine.threads // 32, 16, 16))
    for i, bits in enumerate(a):
        row, column = 8 * (i % 2), 8 * (i // 2)
        left[:, row : row + 8, column : column + 8] = _neighbours(bits, dtype)
    with np.errstate(all="ignore"):
        product = left @ right
        totals = [floats.singles(bits) + _result(product, i) for i, bits in enumerate(c)]
        return [floats.bits_of(total.astype(np.float32)) for total in totals]


def _neighbours(bits: np.ndarray, dtype: type) -> np.ndarray:
    """What registers of the lanes hold, side by side: [warps, 8, 4 times the values of a register]."""
    words = bits.astype(np.uint32)
    return words.view(dtype).reshape(-1, 8, 4 * (4 // np.dtype(dtype).itemsize))


def _result(product: np.ndarray, i: int) -> np.ndarray:
    """What the lanes hold in their register i of a product [warps, 16, columns]."""
    row, column = 8 * (i % 4 // 2), 8 * (i // 4) + i % 2
    return product[:, row : row + 8, column : column + 8 : 2].reshape(-1)


@instruction(r"mma\.sync\.aligned\.m16n8k16\.row\.col\.f32\.(bf16\.bf16|f16\.f16)\.f32")
def multiply(machine: Machine, what: Instruction, active: np.ndarray) -> None:
    """D = A [16, 16] B [16, 8] + C; of B a lane holds rows 2 c, 2 c + 1 and those 8 further."""
    machine.check_whole(active)
    dtype, (d, a, b, c) = floats.HALVES[what.opcode.split(".")[-2]], what.operands
    right = np.empty((machine.threads // 32, 16, 8))
    for i, register in enumerate(b):
        bits = machine.registers.peek(register, active)
        right[:, 8 * i : 8 * i + 8] = _neighbours(bits, dtype).swapaxes(1, 2)
    left, added = ([machine.registers.peek(r, active) for r in part] for part in (a, c))
    known = _known(machine, a, _columns(machine, b), c)
    sums = _sums(machine, left, right, added, dtype)
    for target, bits, defined in zip(d, sums, known, strict=True):
        machine.registers.write(target, bits, active, defined)


@instruction(r"mma\.sync\.aligned\.m16n8k32\.row\.col\.s32\.[us]8\.[us]8\.s32")
def multiply_bytes(machine: Machine, what: Instruction, active: np.ndarray) -> None:
    """D = A [16, 32] B [32, 8] + C modulo 2**32; a register holds columns of A, rows of B, 4 c to 4 c + 3."""
    machine.check_whole(active)
    of_a, of_b = what.opcode.split(".")[-3:-1]
    d, a, b, c = what.operands
    # In float64, which holds sums of 32 products of bytes.
    left = np.empty((machine.threads // 32, 16, 32))
    right = np.empty((machine.threads // 32, 32, 8))
    for i, register in enumerate(a):
        row, column = 8 * (i % 2), 16 * (i // 2)
        held = _neighbours(machine.registers.peek(register, active), _BYTES[of_a])
        left[:, row : row + 8, column : column + 16] = held
    for i, register in enumerate(b):
        held = _neighbours(machine.registers.peek(register, active), _BYTES[of_b])
        right[:, 16 * i : 16 * i + 16] = held.swapaxes(1, 2)
    product = (left @ right).astype(np.int64).astype(np.uint32)
    totals = []
    for i, register in enumerate(c):
        bits = machine.registers.peek(register, active).astype(np.uint32)
        totals.append(bits + _result(product, i))
    known = _known(machine, a, _columns(machine, b), c)
    for target, total, defined in zip(d, totals, known, strict=True):
        machine.registers.write(target, total, active, defined)


@instruction(r"wgmma\.mma_async\.sync\.aligned\.m64n\d+k16\.f32\.(bf16\.bf16|f16\.f16)")
def multiply_group(machine: Machine, what: Instruction, active: np.ndarray) -> None:
    """D += A B: a warp's 16 rows of A in registers, B [16, tokens] in shared memory, K-major, not swizzled.

    B lies in cores of 8 tokens x 16 bytes; the descriptor says where it begins, how far its cores are apart
    along K (bits 16 to 29) and along the tokens (bits 32 to 45), in units of 16 bytes.
    """
    machine.check_whole(active)
    dtype = floats.HALVES[what.opcode.split(".")[-1]]
    d, a, descriptor, add, scale_a, scale_b, transposed = what.operands
    if (scale_a, scale_b, transposed) != ("1", "1", "0"):
        raise NotImplementedError(f"{what.text}: operands negated or transposed")
    if not machine.registers.read(add, active)[active].all():
        raise NotImplementedError(f"{what.text}: a product that is not added")
    for register in (*d, *a):
        if (active & machine.registers.unfenced.get(register, False)).any():
            raise Fault(f"{register} was written after the last wgmma.fence")
    bits = machine.registers.read(descriptor, active)
    if (bits[active] >> np.uint64(46)).any():
        raise NotImplementedError(f"{what.text}: a swizzled operand")
    fields = [(bits >> np.uint64(s) & np.uint64(0x3FFF)).view(np.int64) * 16 for s in (0, 16, 32)]
    start, by_k, by_token = (f[::32, None, None] for f in fields)
    tokens = int(re.search(r"n(\d+)k", what.opcode)[1])
    k, token = np.arange(16)[None, :, None], np.arange(tokens)[None, None, :]
    addresses = start + machine.window[::32, None, None] + k // 8 * by_k + token // 8 * by_token
    addresses = addresses + token % 8 * 16 + k % 8 * 2
    running = active[::32]
    right = np.zeros((machine.threads // 32, 16, tokens))
    words, defined = machine.shared.load(addresses[running].reshape(-1), 2)
    right[running] = words.astype(np.uint16).view(dtype).reshape(-1, 16, tokens)
    of_b = np.ones((machine.threads // 32, tokens), bool)
    of_b[running] = defined.reshape(-1, 16, tokens).all(axis=1)
    # The same sums may be in flight, and be added to again: these products follow each other.
    left, added = ([machine.registers.operand(r) for r in part] for part in (a, d))
    known = _known(machine, a, of_b, d)
    sums = _sums(machine, left, right, added, dtype)
    for target, bits, defined in zip(d, sums, known, strict=True):
        machine.registers.replace(target, bits, active, defined)
    for warp in machine.warps(active):
        machine.products[warp].append((*d, *a))
    machine.registers.hold((*d, *a), active)


@instruction(r"wgmma\.fence\.sync\.aligned")
def fence(machine: Machine, what: Instruction, active: np.ndarray) -> None:
    """Lets `wgmma` see what registers hold."""
    machine.check_whole(active)
    machine.registers.fence(active)


@instruction(r"wgmma\.commit_group\.sync\.aligned")
def commit(machine: Machine, what: Instruction, active: np.ndarray) -> None:
    """Makes a group of the products since the last one."""
    for warp in machine.warps(active):
        machine.product_groups[warp].append(machine.products[warp])
        machine.products[warp] = []


@instruction(r"wgmma\.wait_group\.sync\.aligned")
def wait(machine: Machine, what: Instruction, active: np.ndarray) -> None:
    """Waits until so many groups of products are left: the registers of the others may be touched again."""
    for warp in machine.warps(active):
        groups = machine.product_groups[warp]
        machine.product_groups[warp] = groups[max(len(groups) - int(what.operands[0]), 0) :]
    machine.registers.in_flight = {}
    warps = np.arange(machine.threads) // 32
    for warp in range(machine.threads // 32):
        for group in (*machine.product_groups[warp], machine.products[warp]):
            for registers in group:
                machine.registers.hold(registers, warps == warp)
