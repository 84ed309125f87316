"""What bounds a product on cards that are not there: instructions, shared-memory cycles and bytes, counted.

    python tests/bounds.py             prints the table of docs/gpu/support.md
    python tests/bounds.py --check     how far the same model is from what an H200 took

A program of each kernel runs on the emulator, which counts what its warps issue and what their accesses cost. A
model, not a measurement: it knows no latencies.
"""

import argparse
import dataclasses
import functools
import json
import math
import re
import sys
from collections.abc import Iterator
from pathlib import Path

if __name__ == "__main__":  # from the project's root
    sys.path.insert(0, str(Path(__file__).parent.parent))

import golden
import numpy as np
from emulator import accesses, running
from emulator.machine import Machine
from emulator.memory import Memory
from emulator.source import Address, Instruction

from pallas_kernels import choice
from pallas_kernels.case import Case
from pallas_kernels.target import SHARED_BYTES, Target

N = K = 8192
SHAPES = [(8, 1), (4, 1), (2, 1), (1, 1), (4, 16), (4, 64)]  # bits and tokens
_TABLE = re.compile(r"(?<=<!-- bounds -->\n).*?(?=<!-- end -->)", re.DOTALL)  # of the document
DOCUMENT = Path(__file__).parent.parent / "docs/gpu/support.md"
ROWS = Path(__file__).parent.parent / "results/h200_portable.jsonl"
_WORD, _SECTOR, _LINE = 4, 32, 128  # bytes: of a bank, that L2 gives at least, of all banks
_L2 = 64  # bytes a multiprocessor and cycle
_MACS = 2048  # of `mma.sync`: 16 x 8 x 16 of halves, and twice as many of bytes in the same time
_ACCESS = re.compile(
    r"(?P<bulk>cp\.async\.bulk)|(?P<copy>cp\.async\.c[ag])"
    r"|(?:ld|st)[\w.:]*?\.(?:global|(?P<shared>shared))"
)
# Of a program, by opcode: what the integer pipe of a multiprocessor does.
_INTEGER = re.compile(
    r"(and|or|xor|lop3|shl|shr|prmt|selp|setp|dp4a|min|max|bfe)\b|(add|sub)\.[us]|cvt\.rn\.\w+x2"
)
# What the kernels lose beside these counts, by rows of an H200 as sm_80: `--check`.
_START_US = 2.5  # of a launch: its start, the first loads, the end
_SLACK, _BANDWIDTH = (
    1.4,
    0.85,
)  # a pipe's time as it is counted becomes so much; a share of the bandwidth


@dataclasses.dataclass(frozen=True)
class Card:
    """A GPU: multiprocessors, clock and bandwidth as its maker says, and rates of a multiprocessor and cycle.

    Attributes:
        target: its architecture and multiprocessors.
        ghz: the clock under load.
        gb_s: of memory.
        macs: multiply-adds of bfloat16 with float32 sums, of the tensor cores by `mma.sync`.
        integers: warps' integer instructions.
    """

    target: Target
    ghz: float
    gb_s: float
    macs: int
    integers: int = 2


def _card(capability, multiprocessors, *rates) -> Card:
    return Card(Target(capability, multiprocessors, SHARED_BYTES[capability], "modelled"), *rates)


CARDS = {
    "A100": _card((8, 0), 108, 1.41, 2039, 1024),
    "3090": _card((8, 6), 82, 1.70, 936, 256),
    "L4": _card((8, 9), 58, 2.04, 300, 512),
    "L40S": _card((8, 9), 142, 2.52, 864, 512),
    "4090": _card((8, 9), 128, 2.52, 1008, 256),
    "5090": _card((12, 0), 170, 2.41, 1792, 256, 4),
    "GB10": _card((12, 1), 48, 2.42, 273, 512, 4),
    "B200": _card((10, 0), 148, 1.97, 8000, 1024),
}
# As which `--check` compares: the kernels of sm_80 on this card.
H200 = _card((8, 0), 132, 1.98, 4800, 1024)


@dataclasses.dataclass
class Counts:
    """Of one program: warps' instructions, those of integers, multiply-adds, cycles of the pipe that shared
    memory and L1 have together, bytes from L2.
    """

    issued: int = 0
    integers: int = 0
    macs: int = 0
    cycles: int = 0
    bytes: int = 0


class _Counting(Machine):
    """A machine that counts."""

    def __init__(self, *arguments) -> None:
        super().__init__(*arguments)
        self.counts = Counts()

    def _step(self, active: np.ndarray) -> None:
        what = self._source.instructions[self._counter[active.argmax()]]
        warps, counts = len(self.warps(active)), self.counts
        counts.issued += warps
        counts.integers += warps * bool(_INTEGER.match(what.opcode))
        counts.macs += warps * _MACS * what.opcode.startswith("mma.sync")
        found = _ACCESS.match(what.opcode)
        if found is not None:
            where = active
            if what.guard:
                where = active & ((self.registers.peek(what.guard, active) != 0) != what.negated)
            if where.any():
                self._count(what, where, **found.groupdict())
        super()._step(active)

    def _count(self, what: Instruction, active: np.ndarray, bulk, copy, shared) -> None:
        """Adds the cycles and the bytes of a load, a store or an asynchronous copy."""
        if bulk:
            size = int(self.registers.peek(what.operands[2], active)[active][0])
            self.counts.cycles += -(-size // _LINE)
            self.counts.bytes += size
            return
        operands = [operand for operand in what.operands if isinstance(operand, Address)]
        size = int(what.operands[2]) if copy else _lane_bytes(what)
        for operand in operands:
            addresses = accesses.addresses(self, operand, active)
            for warp in self.warps(active):
                threads = 32 * warp + np.flatnonzero(active[32 * warp : 32 * warp + 32])
                own = addresses[threads]
                if shared or (copy and operand is operands[0]):
                    self.counts.cycles += _bank_cycles(own, threads % 32, size)
                    continue
                sectors = len(np.unique(np.concatenate([own, own + size - 1]) // _SECTOR))
                self.counts.bytes += sectors * _SECTOR
                self.counts.cycles += 0 if copy else -(-sectors * _SECTOR // _LINE)


def _lane_bytes(what: Instruction) -> int:
    """Bytes of a lane's load or store."""
    vector = re.search(r"\.v([24])\.", what.opcode)
    return int(what.opcode[-2:]) // 8 * (int(vector[1]) if vector else 1)


def _bank_cycles(addresses: np.ndarray, lanes: np.ndarray, size: int) -> int:
    """Cycles of a warp's access to shared memory: a word of each bank a cycle, for so many lanes at a time."""
    together, cycles = max(1, _LINE // max(size, _WORD)), 0
    for part in np.unique(lanes // together):
        starts = addresses[lanes // together == part]
        words = np.unique(starts[:, None] // _WORD + np.arange(max(1, size // _WORD)))
        cycles += int(np.bincount(words % (_LINE // _WORD)).max())
    return cycles


def run(text: str, operands: list[np.ndarray], threads: int) -> Counts:
    """What the first program of a kernel does, by its PTX."""
    source, memory = running.parse(text), Memory()
    starts = [[memory.map(operand)] for operand in operands]
    machine = _Counting(source, running.handlers(source), memory, starts, (0, 0), threads, 1, None)
    machine.run()
    return machine.counts


@functools.cache
def _count(case: Case, config, text: str) -> Counts:
    """What the first program of a kernel does."""
    rng = np.random.default_rng(0)
    arrays = {
        "x": rng.normal(size=(case.m, case.k)).astype(case.x_dtype),
        "packed": np.zeros((case.tiles, case.blocks, 2, 8, 32), np.uint16),
        "scales": np.ones((case.tiles, case.scale_fours, 64), case.scale_dtype),
        "codebook": np.sort(rng.normal(size=2**case.bits)).astype(np.float32),
        "y": np.zeros((case.m, case.n), case.out_dtype),
    }
    first = arrays["packed"][:32]  # more than the program's
    first[:] = rng.integers(0, 2**16, first.shape)
    return run(text, [arrays[name] for name in case.operands], 32 * config.warps)


@dataclasses.dataclass(frozen=True)
class Bound:
    """The time of a product on a card, in microseconds, and what share of it each resource is busy."""

    us: float
    shares: dict[str, float]


def bound(case: Case, card: Card) -> Bound:
    """What the counts of a product's kernel give."""
    target = card.target
    plan = choice.choose(case, target)
    module = choice.KERNELS[plan.kernel]
    counts = _count(case, plan.config, module.source(case, plan.config, target))
    programs = math.prod(module.grid(case, plan.config))
    # Microseconds a cycle of each program, of which a multiprocessor has so many.
    each = max(1.0, programs / target.multiprocessors) / card.ghz / 1e3
    memory = case.n * case.k * case.bits / 8 + case.tiles * case.scale_fours * 64 * 2
    pipes = {
        "issue": counts.issued / 4 * each,
        "integers": counts.integers / card.integers * each,
        "tensor cores": counts.macs / card.macs * each,
        "shared": counts.cycles * each,
        "L2": counts.bytes / _L2 * each,
        "memory": memory / card.gb_s / 1e3,
    }
    busiest = max(us * _SLACK for name, us in pipes.items() if name != "memory")
    us = max(busiest, pipes["memory"] / _BANDWIDTH) + _START_US
    return Bound(us, {name: busy / us for name, busy in pipes.items()})


def table() -> str:
    """For each shape and card microseconds, and the shares of them that resources are busy."""
    lines = ["| | " + " | ".join(CARDS) + " |", "| --- |" + " --- |" * len(CARDS)]
    for bits, m in SHAPES:
        cells = []
        for card in CARDS.values():
            found = bound(golden.case(m, N, K, bits), card)
            shares = (found.shares[name] for name in ("issue", "shared", "tensor cores", "memory"))
            us = f"{found.us:.0f}" if found.us >= 20 else f"{found.us:.1f}"
            cells.append(f"{us}: " + ", ".join(f"{100 * share:.0f}" for share in shares))
        lines.append(f"| {bits} bit{'s' * (bits > 1)}, m = {m} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def compared() -> Iterator[tuple[int, int, float, float]]:
    """Bits, tokens, the microseconds of a row of an H200 as sm_80, and those of the model."""
    for line in ROWS.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        if row["device"].endswith("as sm_80"):
            case = golden.case(row["m"], row["n"], row["k"], row["bits"])
            yield row["bits"], row["m"], row["median_us"], bound(case, H200).us


def main() -> int:
    """The command line; 1 where the document has another table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--check", action="store_true", help="beside rows of an H200 as sm_80")
    if parser.parse_args().check:
        for bits, m, measured, modelled in compared():
            error = modelled / measured - 1
            print(
                f"{bits} bits, m = {m}: {measured:.1f} us, by the model {modelled:.1f} ({error:+.0%})"
            )
        return 0
    found = table()
    print(found)
    return int(_TABLE.findall(DOCUMENT.read_text(encoding="utf-8")) != [found])


if __name__ == "__main__":
    sys.exit(main())
