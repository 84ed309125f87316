"""The programs that run at the same time: their threads, whose turn it is, and barriers between them."""

from collections.abc import Callable
from typing import Any

import numpy as np

from emulator.memory import Memory
from emulator.registers import Registers
from emulator.source import Fault, Source
from emulator.table import Handler

WINDOW = 1 << 20  # from one program's shared memory in a cluster to the next one's
_SHARED = 1024  # where a program's shared memory begins
_LOOKS = 3  # how often threads look again when nothing else happens
_TURN = 300  # instructions that a warp runs at most before another's turn


class Machine:
    """Programs that run at the same time.

    Attributes:
        threads: of all programs.
        registers, memory, shared: what they work with; `shared` holds each program's `window` further on.
        window: [threads] where the thread's program's shared memory is, less where the first one's is.
        polling: [threads] who stands still until a barrier in memory turns or something is added to memory.
        chance: what happens by chance: the order of warps, when copies arrive.
        copies, groups, products, product_groups: of each warp, asynchronous copies and products of matrices
            since their last group, and the groups.
        barriers, bulk: barriers in shared memory by their addresses, and copies that they wait for.
    """

    def __init__(
        self,
        source: Source,
        run_by: list[Handler],
        memory: Memory,
        starts: list[list[int]],
        index: tuple[int, int],
        threads: int,
        cluster: int,
        chance: np.random.Generator | None,
        devices: int = 1,
    ) -> None:
        """Puts the threads of an index of the grid at the first instruction.

        The programs are those of `devices`, as many of each; `starts` has the operands' addresses on each.
        """
        self._source, self._handlers, self._by_chance = source, run_by, chance is not None
        self.threads = threads * cluster
        rank, thread = np.divmod(np.arange(self.threads), threads)
        self.window = rank * WINDOW
        fixed = {"fdk_shared": _SHARED, "%tid.x": thread}
        device, rank = np.divmod(rank, cluster // devices)
        fixed |= {"%ctaid.x": index[0] * (cluster // devices) + rank, "%ctaid.y": index[1]}
        own = [np.asarray(start)[device] for start in starts]
        fixed |= {f"${i + 1}": start for i, start in enumerate(own)}
        fixed = {k: np.full(self.threads, v).astype(np.uint64) for k, v in fixed.items()}
        has_wgmma = any(what.opcode.startswith("wgmma") for what in source.instructions)
        self.registers = Registers(self.threads, fixed, has_wgmma)
        self.memory, self.shared = memory, Memory()
        for i in range(cluster if source.shared_bytes else 0):
            self.shared.share(source.shared_bytes, _SHARED + i * WINDOW)
        self.chance = np.random.default_rng(index[0]) if chance is None else chance
        self._counter = np.zeros(self.threads, np.int64)
        self.polling, self._waiting = np.zeros((2, self.threads), bool)
        # Who is at a barrier, by its number, and how many it is for.
        self._at: dict[int, np.ndarray] = {}
        self._counts: dict[int, int | None] = {}
        self._at_cluster = np.zeros(self.threads, bool)
        self._arrivals, self._waits = np.zeros((2, self.threads), np.int64)
        self._seen = np.full((self.threads, 2), -1)
        self._news, self._last_look, self._looked = 0, *np.full((2, self.threads), -1)
        warps = self.threads // 32
        self.copies, self.groups, self.products, self.product_groups = (
            [[] for _ in range(warps)] for _ in range(4)
        )
        self.barriers: dict[int, Any] = {}
        self.bulk: list[Callable[[], None]] = []
        self._warp, self._turn, self._looks = 0, 0, _LOOKS

    def run(self) -> None:
        """Runs the threads until all are through."""
        while True:
            if self.bulk and self._by_chance and self.chance.random() < 0.01:
                self._deliver()
            elif (active := self._next()) is not None:
                self._step(active)
            elif self.bulk:
                self._deliver()
            elif not self._running().any():
                return
            elif any(self._release(number) for number in list(self._at)):
                continue
            elif self.polling.any() and self._looks:  # what they wait for may be there already
                self._looks -= 1
                self.polling[:] = False
            else:
                raise Fault("a deadlock: all threads wait, and nobody is left to wake them")

    def _deliver(self) -> None:
        """Lets a bulk copy arrive: any by chance, in lockstep the oldest."""
        self.bulk.pop(self.chance.integers(len(self.bulk)) if self._by_chance else 0)()

    def _next(self) -> np.ndarray | None:
        """Whose turn it is: the threads that are the least far of all, or of their warp."""
        if self._turn:
            warp = slice(32 * self._warp, 32 * self._warp + 32)
            active = np.zeros(self.threads, bool)
            active[warp] = self._last(warp)
            if np.count_nonzero(active):
                self._turn -= 1
                return active
        active = self._last(slice(None))
        if not np.count_nonzero(active):
            return None
        if not self._by_chance:
            return active
        warps = self._ready(slice(None)).reshape(-1, 32).any(axis=1)
        self._warp = self.chance.choice(np.flatnonzero(warps))
        self._turn = self.chance.integers(1, _TURN)
        return self._next()

    def _ready(self, of: slice) -> np.ndarray:
        """Which threads can go on."""
        standing = self.polling[of] | self._waiting[of]
        return ~standing & (self._counter[of] < len(self._handlers))

    def _last(self, of: slice) -> np.ndarray:
        """Those of them that are the least far."""
        ready, counter = self._ready(of), self._counter[of]
        return ready & (counter == counter.min(where=ready, initial=len(self._handlers)))

    def _step(self, active: np.ndarray) -> None:
        """An instruction of the threads that are at it."""
        at = self._counter[active.argmax()]
        what = self._source.instructions[at]
        self._counter[active] += 1
        try:
            if what.guard:
                active = active & ((self.registers.read(what.guard, active) != 0) != what.negated)
            if np.count_nonzero(active):
                self._handlers[at](self, what, active)
        except Fault as fault:
            raise Fault(f"{fault}\n  in instruction {at}: {what.text}") from None

    def jump(self, label: str, active: np.ndarray) -> None:
        """Makes threads go on at a label."""
        self._counter[active] = self._source.labels[label]

    def warps(self, active: np.ndarray) -> np.ndarray:
        """The numbers of the warps that have active threads."""
        return np.flatnonzero(active.reshape(-1, 32).any(axis=1))

    def check_whole(self, active: np.ndarray) -> None:
        """Refuses part of a warp."""
        lanes = active.reshape(-1, 32)
        if (lanes.any(axis=1) != lanes.all(axis=1)).any():
            raise Fault("a warp has diverged: some of its threads are elsewhere")

    def check_aligned(self, addresses: np.ndarray, size: int) -> None:
        """Refuses addresses that are no multiples of a size."""
        if (addresses % size).any():
            raise Fault(f"misaligned: {size} bytes at {addresses[addresses % size != 0][:4]}")

    def tell_news(self) -> None:
        """Lets those look again that stand still: something in memory has changed."""
        self.polling[:], self._looks = False, _LOOKS

    def wait_for_news(self, where: np.ndarray, values: np.ndarray, active: np.ndarray) -> None:
        """Lets threads that have found the same as the last time stand still until somebody adds to it."""
        found = np.stack([where, values.view(np.int64)], axis=1)
        self.polling |= active & (found == self._seen).all(axis=1)
        self._seen[active] = found[active]

    def wait_for_words(self, active: np.ndarray) -> None:
        """Lets threads that begin to look at the same words again stand still until a device stores another."""
        again = active & (self._counter <= self._last_look)
        self.polling |= again & (self._looked == self._news)
        self._looked[again] = self._news
        self._last_look[active] = self._counter[active]

    def tell_of_words(self) -> None:
        """Lets everybody look again: a device has stored a word."""
        self._news += 1
        self.polling[:] = False

    def meet(self, number: int, count: int | None, active: np.ndarray) -> None:
        """Lets threads wait at a barrier until `count` of their program, or all that still run, are there."""
        here = self._at.setdefault(number, np.zeros(self.threads, bool))
        if here.any() and self._counts[number] != count:
            raise Fault(f"a barrier of {count} threads is one of {self._counts[number]} to others")
        here[active] = True
        self._counts[number] = count
        self._waiting |= active
        self._release(number)

    def _release(self, number: int) -> bool:
        """Lets those go on that have met at a barrier, and says whether any have."""
        waiting, count, anybody = self._at[number], self._counts[number], False
        for window in np.unique(self.window[waiting]):
            own = self.window == window
            here = waiting & own
            expected = (own & self._running()).sum() if count is None else count
            if here.sum() > expected:
                raise Fault(f"{here.sum()} threads are at a barrier of {expected}")
            if here.sum() == expected:
                waiting[here] = self._waiting[here] = False
                anybody = True
        return anybody

    def arrive_at_cluster(self, active: np.ndarray) -> None:
        """Says that threads have come to the cluster's barrier."""
        if (self._arrivals[active] != self._waits[active]).any():
            raise Fault("a thread comes twice to the cluster's barrier")
        self._arrivals[active] += 1
        self._leave_cluster()

    def wait_for_cluster(self, active: np.ndarray) -> None:
        """Lets threads wait until all of the cluster have come as often as they."""
        self._waits[active] += 1
        if (self._arrivals[active] != self._waits[active]).any():
            raise Fault("a thread waits at the cluster's barrier without having come to it")
        self._at_cluster |= active
        self._waiting |= active
        self._leave_cluster()

    def _leave_cluster(self) -> None:
        come = self._arrivals[self._running()].min()
        gone = self._at_cluster & (self._arrivals <= come)
        self._at_cluster[gone] = self._waiting[gone] = False

    def _running(self) -> np.ndarray:
        """The threads that are not through; one that waits after the last instruction is not."""
        return (self._counter < len(self._handlers)) | self._waiting
