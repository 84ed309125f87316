"""Runs the kernels' PTX on numpy, a program or cluster at a time: values and every access, without a GPU.

Threads run in lockstep over the least program counter, which joins branches again by itself and makes
barriers order what they should. Threads that wait for a barrier in memory, or in such a program for others
of theirs, stand still meanwhile; bulk copies arrive now and then at once, else when nobody can go on.
Or warps run by turns as chance has it, each for a while, so that only what the program orders is in order.
Registers hold raw bits; an access outside of an operand, or a misaligned one, raises. Only what the kernels
use is known.
"""

import re

import ml_dtypes
import numpy as np

_HALVES = {"bf16": ml_dtypes.bfloat16, "f16": np.float16}
_FLOAT = {
    "add": np.add,
    "sub": np.subtract,
    "mul": np.multiply,
    "div": np.divide,
    "rcp": np.reciprocal,
    "ex2": np.exp2,
    "rsqrt": lambda a: 1 / np.sqrt(a),
    "abs": np.abs,
    "fma": lambda a, b, c: a * b + c,
}
_GAP = 4096  # unmapped bytes between operands
_WINDOW = 1 << 20  # from one program's shared memory in a cluster to the next one's
_POISON = 0x7FFF7FFF  # NaN in every type


def run(
    source: str,
    operands: list[np.ndarray],
    grid: tuple[int, int],
    threads: int,
    cluster: int = 1,
    chance: np.random.Generator | None = None,
) -> None:
    """Runs all programs of a kernel, `cluster` of them a place of the grid; the last operand is written.

    Args:
        source: the PTX.
        operands: of the kernel, then its results.
        grid: programs, or clusters of them.
        threads: threads a program.
        cluster: programs that run at the same time.
        chance: picks the warps that go on; None for lockstep.
    """
    for y in range(grid[1]):
        for x in range(grid[0]):
            program = _Program(source, operands, (x, y), threads, cluster)
            if chance is None:
                program.run()
            else:
                program.run_by_chance(chance)


class _Program:
    def __init__(self, source, operands, place, threads, cluster):
        self.threads, self.registers, self.labels, self.code = threads * cluster, {}, {}, []
        self.memory, starts = _Memory(), []
        # Of each warp the copies since its last group of them, and its groups.
        self.copies, self.groups = {}, {}
        self.acquired = np.full((self.threads, 2), -1)
        self.barriers, self.bulk = {}, []
        self.chance = np.random.default_rng(place[0])
        for operand in operands:
            starts.append(self.memory.map(operand))
        shared = re.search(r"fdk_shared\[(\d+)\]", source)
        self.shared = _Memory()
        assert int(shared[1]) <= 227 * 1024
        for rank in range(cluster):
            self.shared.map(np.full(int(shared[1]), 0xAB, np.uint8), 1024 + rank * _WINDOW)
        rank, thread = np.divmod(np.arange(self.threads), threads)
        self.window = rank * _WINDOW
        fixed = {"fdk_shared": 1024, "%ctaid.x": place[0] * cluster + rank, "%ctaid.y": place[1]}
        fixed |= {f"${i + 1}": start for i, start in enumerate(starts)} | {"%tid.x": thread}
        self.fixed = {k: np.full(self.threads, v).astype(np.uint64) for k, v in fixed.items()}
        for line in source.splitlines():
            line = line.strip()
            if line in "{}" or line.startswith((".", "createpolicy", "//")):
                continue
            if line.endswith(":"):
                self.labels[line[:-1]] = len(self.code)
                continue
            match = re.fullmatch(r"(?:@(!?\w+) )?(\S+)(?: (.*))?;", line)
            parts = re.findall(r"\{[^}]*\}|[^,\s]+", match[3] or "")
            self.code.append((match[1], match[2], [_operand(p) for p in parts]))

    def run(self):
        self.counter = counter = np.zeros(self.threads, np.int64)
        self.still = np.zeros(self.threads, bool)
        while (counter < len(self.code)).any():
            ready = ~self.still & (counter < len(self.code))
            if not ready.any():
                assert self.bulk, "a deadlock"
                self.arrive(*self.bulk.pop(0))
                continue
            at = counter[ready].min()
            _, opcode, operands = self.code[at]
            active = ready & (counter == at)
            if opcode == "barrier.sync" and self.barriers and not self.meet(active, operands[1:]):
                continue
            self.go_on(active)

    def run_by_chance(self, chance):
        """The same, a warp at a time; all that meet do so by the barrier's number."""
        self.chance = chance
        self.counter = np.zeros(self.threads, np.int64)
        self.still, self.waiting = np.zeros(self.threads, bool), {}
        warps, warp, left = np.arange(self.threads) // 32, 0, 0
        while (self.counter < len(self.code)).any():
            ready = ~self.still & (self.counter < len(self.code))
            if self.bulk and (not ready.any() or chance.random() < 0.01):
                self.arrive(*self.bulk.pop(chance.integers(len(self.bulk))))
                continue
            assert ready.any(), "a deadlock"
            if not left or not ready[warps == warp].any():
                warp, left = chance.choice(np.unique(warps[ready])), chance.integers(1, 300)
            left -= 1
            mine = ready & (warps == warp)
            active = mine & (self.counter == self.counter[mine].min())
            _, opcode, operands = self.code[self.counter[active][0]]
            if opcode in ("barrier.sync", "bar.sync"):
                self.meet_by_number(active, operands)
            else:
                self.go_on(active)

    def meet_by_number(self, active, operands):
        """Lets threads wait until so many of their program, or all that still run, are at the barrier."""
        waiting = self.waiting.setdefault(operands[0], np.zeros(self.threads, bool))
        waiting |= active
        self.still |= active
        mine = self.window == self.window[active][0]
        here = waiting & mine
        running = mine & (self.counter < len(self.code))
        if here.sum() == (int(operands[1]) if len(operands) > 1 else running.sum()):
            self.counter[here] += 1
            self.still[here] = waiting[here] = False

    def go_on(self, active):
        """An instruction of the threads that are at it."""
        counter = self.counter
        guard, opcode, operands = self.code[counter[active][0]]
        counter[active] += 1
        if guard:
            active &= (self.registers[guard.lstrip("!")] != 0) != guard.startswith("!")
        if opcode == "bra":
            counter[active] = self.labels[operands[0]]
        elif active.any():
            self.step(opcode.split("."), operands, active)

    def read(self, name):
        if name in self.registers:
            return self.registers[name]
        if name in self.fixed:
            return self.fixed[name]
        if re.fullmatch(r"\w+_\d+", name):
            return np.full(self.threads, _POISON, np.uint64)  # a register that nothing has filled
        value = int(name[2:], 16) if name.startswith("0f") else int(name, 0)
        return np.full(self.threads, value, np.uint64)

    def write(self, name, value, active):
        old = self.registers.get(name, np.full(self.threads, _POISON, np.uint64))
        self.registers[name] = np.where(active, value.astype(np.uint64), old)

    def floats(self, name):
        return self.read(name).astype(np.uint32).view(np.float32)

    def step(self, opcode, operands, active):
        name, kind = opcode[0], opcode[-1]
        wide = kind in ("u64", "b64") or "wide" in opcode
        mask = np.uint64(2**64 - 1 if wide else 2**32 - 1)
        if name in ("ld", "st"):
            self.access(opcode, operands, active)
        elif name == "mbarrier":
            self.barrier(opcode, operands, active)
        elif "bulk" in opcode:
            self.copy_bulk(operands, active)
        elif name == "cp":
            self.copy(opcode, operands, active)
        elif name == "trap":
            raise AssertionError("a trap: the other programs never came")
        elif name in ("bar", "barrier", "fence", "griddepcontrol"):
            return
        elif name in ("red", "atom"):
            self.add_atomically(name, operands, active)
        elif name == "mapa":
            window = np.uint64(int(operands[2]) * _WINDOW)
            self.write(operands[0], self.read(operands[1]) + window, active)
        elif name == "mma":
            assert active.reshape(-1, 32).all(1).sum() * 32 == active.sum(), "a warp diverged"
            self.multiply(opcode, operands, active)
        elif name == "wgmma":
            if opcode[1] == "mma_async":
                self.multiply_group(opcode, operands, active)
        elif name == "setp":
            test = dict(
                gt="greater", lt="less", le="less_equal", ge="greater_equal", ne="not_equal"
            )
            compare = getattr(np, test.get(opcode[1], "equal"))
            self.write(operands[0], compare(self.read(operands[1]), self.read(operands[2])), active)
        elif name == "mov" and isinstance(operands[0], list):
            for i, half in enumerate(operands[0]):
                self.write(
                    half, self.read(operands[1]) >> np.uint64(16 * i) & np.uint64(0xFFFF), active
                )
        elif name == "mov" and isinstance(operands[1], list):
            low, high = (self.read(half) for half in operands[1])
            place = np.uint64(32 if wide else 16)
            self.write(operands[0], low | high << place, active)
        elif name == "selp":
            a, b, which = (self.read(o) for o in operands[1:])
            self.write(operands[0], np.where(which, a, b), active)
        elif kind == "f32" and name in ("max", "min"):
            a, b = (self.floats(o) for o in operands[1:])
            self.write(operands[0], _extreme(opcode)(a, b).view(np.uint32), active)
        elif kind == "f32" and name in _FLOAT:
            values = (self.floats(o).astype(np.float64) for o in operands[1:])
            with np.errstate(all="ignore"):
                value = _FLOAT[name](*values).astype(np.float32)
            self.write(operands[0], value.view(np.uint32), active)
        elif name == "cvt":
            self.convert(opcode, operands, active)
        elif opcode[1] == "rn" and kind[:-2] in _HALVES:
            half = _HALVES[kind[:-2]]
            # One rounding: products and sums of halves are exact, or nearly so, in float64.
            values = (_halves(self.read(o), half).astype(np.float64) for o in operands[1:])
            self.write(operands[0], _join(_FLOAT[name](*values).astype(half)), active)
        elif name == "shfl":
            lanes = np.arange(self.threads) ^ int(operands[2])
            assert active[lanes[active]].all(), "from a lane that does not take part"
            self.write(operands[0], self.read(operands[1])[lanes], active)
        elif name == "vote":
            any_lane = self.read(operands[1]).reshape(-1, 32).any(axis=1)
            self.write(operands[0], np.repeat(any_lane, 32), active)
        else:
            values = [self.read(o) for o in operands[1:]]
            self.write(operands[0], _integer(name, opcode, values) & mask, active)

    def access(self, opcode, operands, active):
        memory = self.memory if "global" in opcode else self.shared
        size = {"b16": 2}.get(opcode[-1], 4)
        operands = operands[:2]  # without a cache policy
        registers, (base, offset) = operands if opcode[0] == "ld" else operands[::-1]
        registers = registers if isinstance(registers, list) else [registers]
        addresses = self.read(base).astype(np.int64) + offset
        if opcode[1] == "shared":  # the program's own; shared::cluster has been mapped
            addresses += self.window
        assert (addresses[active] % (size * len(registers)) == 0).all(), "misaligned"
        for i, register in enumerate(registers):
            where = addresses[active] + i * size
            if opcode[0] == "ld":
                value = np.zeros(self.threads, np.uint64)
                value[active] = memory.load(where, size)
                self.write(register, value, active)
                if opcode[1] == "acquire":  # nothing new: until somebody adds to it
                    found = np.stack([addresses, value.astype(np.int64)], axis=1)
                    self.still |= active & (found == self.acquired).all(axis=1)
                    self.acquired[active] = found[active]
            else:
                memory.store(where, size, self.read(register)[active])

    def add_atomically(self, name, operands, active):
        """Adds to memory, a thread at a time, and lets everybody look again."""
        (base, offset), value = operands[-2:]
        for thread in np.flatnonzero(active):
            place = self.read(base).astype(np.int64)[[thread]] + offset
            before = self.memory.load(place, 4)
            self.memory.store(place, 4, before + self.read(value)[[thread]])
            if name == "atom":
                self.write(
                    operands[0], np.full(self.threads, before), np.arange(self.threads) == thread
                )
        self.still[:] = False

    def copy(self, opcode, operands, active):
        """Asynchronous copies: they arrive when their warp waits for them, not before."""
        threads = np.arange(self.threads)
        for warp in np.unique(threads[active] // 32):
            copies = self.copies.setdefault(warp, [])
            groups = self.groups.setdefault(warp, [])
            if opcode[2] == "commit_group":
                groups.append(copies)
                self.copies[warp] = []
            elif opcode[2] == "wait_group":
                ready = max(len(groups) - int(operands[0]), 0)
                for target, values in (c for group in groups[:ready] for c in group):
                    self.shared.store(target, 4, values)
                self.groups[warp] = groups[ready:]
            else:
                (to, to_offset), (base, offset), size = *operands[:2], int(operands[2])
                mine = active & (threads // 32 == warp)
                target = (self.read(to).astype(np.int64) + self.window)[mine] + to_offset
                source = self.read(base).astype(np.int64)[mine] + offset
                assert not (target % size).any() and not (source % size).any(), "misaligned"
                for i in range(0, size, 4):
                    copies.append((target + i, self.memory.load(source + i, 4)))

    def meet(self, active, count):
        """Which threads have met: all that still run, or so many of a program; the others stand still."""
        here = self.counter == self.counter[active][0]
        if count:
            programs = self.window // _WINDOW
            met = (
                here
                & (np.bincount(programs[here], minlength=programs[-1] + 1) == int(count[0]))[
                    programs
                ]
            )
        else:
            met = here & (here == (self.counter < len(self.code))).all()
        self.still[active] = True
        self.still[met] = False
        active[:] = met
        return met.any()

    def barrier(self, opcode, operands, active):
        """Barriers in shared memory: [arrivals a phase, those missing, bytes missing, phase]."""
        name = operands[0] if opcode[1] == "init" else operands[1]
        places = self.read(name[0]).astype(np.int64) + name[1] + self.window
        if opcode[1] == "init":
            for place in places[active]:
                assert place % 8 == 0
                self.shared.load(np.asarray([place]), 8)
                count = int(operands[1])
                self.barriers[place] = [count, count, 0, 0]
        elif opcode[1] == "arrive":
            size = self.read(operands[2]) if "expect_tx" in opcode else np.zeros(self.threads)
            for place, bytes_ in zip(places[active], size[active], strict=True):
                self.barriers[place][1] -= 1
                self.barriers[place][2] += int(bytes_)
                self.turn(place)
        else:
            parity = self.read(operands[2])
            done = np.asarray(
                [
                    a and self.barriers[p][3] % 2 != parity[i]
                    for i, (p, a) in enumerate(zip(places, active, strict=True))
                ]
            )
            self.write(operands[0], done, active)
            self.still |= active & ~done

    def turn(self, place):
        """Begins a barrier's next phase if nothing is missing, and lets everybody look again."""
        count, arrivals, bytes_, phase = self.barriers[place]
        assert arrivals >= 0
        if arrivals == bytes_ == 0:
            self.barriers[place] = [count, count, 0, phase + 1]
            self.still[:] = False

    def copy_bulk(self, operands, active):
        (to, to_offset), (base, offset), size, (barrier, barrier_offset), _ = operands
        for thread in np.flatnonzero(active):
            target, source, count, full = (
                int(self.read(name)[thread]) for name in (to, base, size, barrier)
            )
            window = self.window[thread]
            target, source = target + to_offset, source + offset
            assert target % 16 == source % 16 == count % 16 == 0 and count
            steps = np.arange(0, count, 4)
            places = target + window + steps, source + steps, full + barrier_offset + window
            self.bulk.append(places)
            if self.chance.random() < 0.5:
                self.arrive(*self.bulk.pop())

    def arrive(self, target, source, barrier):
        self.shared.store(target, 4, self.memory.load(source, 4))
        self.barriers[barrier][2] -= 4 * len(target)
        self.turn(barrier)

    def convert(self, opcode, operands, active):
        if opcode[-1] == "s32":
            value = self.read(operands[1]).astype(np.uint32).view(np.int32).astype(np.float32)
            self.write(operands[0], value.view(np.uint32), active)
        elif opcode[1] == "f32":
            value = self.read(operands[1]).astype(np.uint16).view(np.float16).astype(np.float32)
            self.write(operands[0], value.view(np.uint32), active)
        elif opcode[2].endswith("x2"):
            half = _HALVES[opcode[2][:-2]]
            pair = [self.floats(o).astype(half) for o in operands[:0:-1]]
            self.write(operands[0], _join(np.stack(pair)), active)
        else:
            value = self.floats(operands[1]).astype(_HALVES[opcode[2]])
            self.write(operands[0], value.view(np.uint16), active)

    def multiply(self, opcode, operands, active):
        """m16n8k16: lane 4 g + c; A rows g, g + 8 and columns 2 c, 2 c + 8; B column g; D columns 2 c."""
        if opcode[3] == "m16n8k32":
            self.multiply_bytes(opcode, operands, active)
            return
        half = _HALVES[opcode[-2]]
        d, a, b, c = operands
        warp, g, quad = self.places()
        right = np.zeros((self.threads // 32, 16, 8))
        for i, register in enumerate(b):
            pair = _halves(self.read(register), half)
            for e in range(2):
                right[warp, 2 * quad + e + 8 * i, g] = pair[e]
        self.add_product(d, a, right, c, half, active)

    def multiply_bytes(self, opcode, operands, active):
        """m16n8k32 of bytes: A rows g, g + 8 and columns 4 c, 4 c + 16; B column g; D columns 2 c."""
        d, a, b, c = operands
        warp, g, quad = self.places()
        left = np.zeros((self.threads // 32, 16, 32), np.int64)
        right = np.zeros((self.threads // 32, 32, 8), np.int64)
        for byte in range(4):
            for i, register in enumerate(a):
                column = 4 * quad + byte + 16 * (i // 2)
                left[warp, g + 8 * (i % 2), column] = self.byte(register, byte, opcode[-3])
            for i, register in enumerate(b):
                right[warp, 4 * quad + byte + 16 * i, g] = self.byte(register, byte, opcode[-2])
        product = left @ right
        sums = [
            self.read(r).astype(np.uint32)
            + product[warp, g + 8 * (i // 2), 2 * quad + i % 2].astype(np.uint32)
            for i, r in enumerate(c)
        ]
        for register, value in zip(d, sums, strict=True):
            self.write(register, value, active)

    def byte(self, register, byte, kind):
        value = (self.read(register) >> np.uint64(8 * byte)).astype(np.uint8)
        return value.view(np.int8) if kind == "s8" else value

    def multiply_group(self, opcode, operands, active):
        """A warpgroup's product with B in shared memory, K-major in cores of 8 x 16 bytes, not swizzled."""
        half = _HALVES[opcode[-1]]
        d, a, descriptor = operands[:3]
        tokens = int(re.search(r"n(\d+)k", opcode[4])[1])
        fields = [self.read(descriptor) >> np.uint64(s) & np.uint64(0x3FFF) for s in (0, 16, 32)]
        start, by_k, by_token = (f.astype(np.int64)[::32, None, None] * 16 for f in fields)
        start += self.window[::32, None, None]
        k, token = np.arange(16)[None, :, None], np.arange(tokens)[None, None, :]
        places = start + k // 8 * by_k + token // 8 * by_token + token % 8 * 16 + k % 8 * 2
        running = active[::32]
        right = np.zeros((self.threads // 32, 16, tokens))
        words = self.shared.load(places[running].reshape(-1), 2).astype(np.uint16)
        right[running] = words.view(half).reshape(-1, 16, tokens)
        self.add_product(d, a, right, d, half, active)

    def places(self):
        lane = np.arange(self.threads)
        return lane // 32, lane % 32 // 4, lane % 4

    def add_product(self, d, a, right, c, half, active):
        warp, g, quad = self.places()
        left = np.zeros((self.threads // 32, 16, 16))
        for i, register in enumerate(a):
            pair = _halves(self.read(register), half)
            for e in range(2):
                left[warp, g + 8 * (i % 2), 2 * quad + e + 8 * (i // 2)] = pair[e]
        with np.errstate(all="ignore"):
            product = left @ right
            sums = [
                self.floats(r) + product[warp, g + 8 * (i % 4 // 2), i // 4 * 8 + 2 * quad + i % 2]
                for i, r in enumerate(c)
            ]
        for register, value in zip(d, sums, strict=True):
            self.write(register, value.astype(np.float32).view(np.uint32), active)


class _Memory:
    """Operands in one address space with gaps between them."""

    def __init__(self):
        self.regions, self.next = [], _GAP

    def map(self, array, start=None):
        start = self.next if start is None else start
        assert array.flags.c_contiguous
        self.regions.append((start, array.reshape(-1).view(np.uint8)))
        self.next = -(-(start + array.nbytes) // _GAP) * _GAP + _GAP
        return start

    def _find(self, addresses, size):
        """For each region: which of the addresses are in it, its data, and their places there."""
        found = np.zeros(addresses.shape, bool)
        for start, data in self.regions:
            inside = (addresses >= start) & (addresses + size <= start + data.size)
            if inside.any():
                found |= inside
                yield inside, data.view(f"u{size}"), (addresses[inside] - start) // size
        if not found.all():
            raise IndexError(f"access outside of the operands: {addresses[~found]}")

    def load(self, addresses, size):
        values = np.zeros(addresses.shape, np.uint64)
        for inside, data, places in self._find(addresses, size):
            values[inside] = data[places]
        return values

    def store(self, addresses, size, values):
        for inside, data, places in self._find(addresses, size):
            data[places] = values[inside].astype(data.dtype)


def _operand(text):
    if text.startswith("{"):
        return [part.strip() for part in text[1:-1].split(",")]
    if text.startswith("["):
        base, offset = text[1:-1].split("+")
        return base, int(offset)
    return text


def _halves(bits, half):
    words = bits.astype(np.uint32)
    return np.stack([words & 0xFFFF, words >> 16]).astype(np.uint16).view(half)


def _join(pair):
    low, high = pair.view(np.uint16).astype(np.uint64)
    return low | high << np.uint64(16)


def _extreme(opcode):
    """The larger or smaller of two; a NaN wins with .NaN, loses without."""
    names = {"max": ("fmax", "maximum"), "min": ("fmin", "minimum")}
    return getattr(np, names[opcode[0]]["NaN" in opcode])


def _permute_bytes(source, selectors):
    """The byte of each selector's low three bits, or its sign eight times if the fourth is set."""
    result = np.zeros_like(source)
    for i in range(4):
        selector = selectors >> np.uint64(4 * i) & np.uint64(15)
        byte = source >> np.uint64(8) * (selector & np.uint64(7)) & np.uint64(0xFF)
        signs = (byte >> np.uint64(7)) * np.uint64(0xFF)
        byte = np.where(selector & np.uint64(8), signs, byte)
        result |= byte << np.uint64(8 * i)
    return result


def _integer(name, opcode, v):
    if name == "prmt":
        return _permute_bytes(v[0] & np.uint64(0xFFFFFFFF) | v[1] << np.uint64(32), v[2])
    if name == "dp4a":
        bytes_ = (x >> np.arange(0, 32, 8, dtype=np.uint64)[:, None] & np.uint64(0xFF) for x in v)
        return (next(bytes_) * next(bytes_)).sum(0) + v[2]
    if name == "lop3":
        table, result = int(v[3][0]), np.zeros_like(v[0])
        for i in range(8):
            if table >> i & 1:
                a, b, c = (x if i & bit else ~x for x, bit in zip(v, (4, 2, 1), strict=False))
                result |= a & b & c
        return result
    simple = {
        "mov": lambda: v[0],
        "and": lambda: v[0] & v[1],
        "or": lambda: v[0] | v[1],
        "xor": lambda: v[0] ^ v[1],
        "shl": lambda: v[0] << v[1],
        "shr": lambda: v[0] >> v[1],
        "add": lambda: v[0] + v[1],
        "sub": lambda: v[0] - v[1],
        "mul": lambda: v[0] * v[1] >> np.uint64(32 if "hi" in opcode else 0),
        "mad": lambda: v[0] * v[1] + v[2],
        "min": lambda: np.minimum(v[0], v[1]),
    }
    return simple[name]()
