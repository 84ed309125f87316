"""The ring in shared memory through which a producer warp hands blocks of the weight to consumer warps."""

import dataclasses

from pallas_kernels.ptx import Ptx
from pallas_kernels.registers import Memory, Register, at
from pallas_kernels.ring_plan import BARRIER, BARRIERS, LaunchPlan


@dataclasses.dataclass(frozen=True)
class Position:
    """Registers for where in the ring a warp is: the slot, its barriers, and the parity of their phase."""

    slot: Register
    barrier: Register
    parity: Register


class Ring:
    """The slots of a program, each with two barriers: the producer fills one, the consumers empty it.

    Attributes:
        bulk: see `ring_plan.Config.copies_in_bulk`.
        is_first_lane: whether this is the lane that signals for its warp.
    """

    def __init__(self, ptx: Ptx, plan: LaunchPlan) -> None:
        self.ptx, self.plan, self.bulk = ptx, plan, plan.bulk
        self.consumers, self.slot_bytes = plan.products[0].consumers, plan.products[0].slot_bytes
        self.is_first_lane: Register | None = None

    def make(self, shared: Register) -> None:
        """Makes the barriers: a slot is full when its bytes are there, empty when each warp has arrived."""
        ptx, fillers = self.ptx, 1 if self.bulk else 32
        first = None if self.bulk else self.is_first_lane
        for signal in range(self.plan.signals):
            barrier = at(shared, self.plan.signalled + signal * BARRIER)
            ptx.do("mbarrier.init.shared::cta.b64", barrier, 1, when=first)
        for slot in range(self.plan.slots):
            full = at(shared, self.plan.barriers + slot * BARRIERS)
            empty = at(shared, self.plan.barriers + slot * BARRIERS + BARRIER)
            ptx.do("mbarrier.init.shared::cta.b64", full, fillers, when=first)
            ptx.do("mbarrier.init.shared::cta.b64", empty, self.consumers, when=first)
        if self.bulk:
            ptx.do("fence.proxy.async.shared::cta")
        else:
            ptx.do("bar.warp.sync", "0xffffffff")

    def locate(self, shared: Register, parity: int) -> Position:
        """The first slot; who fills it starts with parity 1, as an empty slot has no phase before it."""
        ptx = self.ptx
        self.first_slot = shared + self.plan.ring_start
        self.first_barrier = shared + self.plan.barriers
        self.last_barrier = shared + (self.plan.barriers + (self.plan.slots - 1) * BARRIERS)
        registers = (ptx.op("mov.u32", self.first_slot), ptx.op("mov.u32", self.first_barrier))
        return Position(*registers, ptx.op("mov.u32", parity))

    def next_slot(self, position: Position) -> None:
        """Moves on to the next slot; after the last one comes the first one, with the other parity."""
        ptx = self.ptx
        wrap = position.barrier.eq(self.last_barrier)
        ptx.do("add.u32", position.slot, position.slot, self.slot_bytes)
        ptx.do("add.u32", position.barrier, position.barrier, BARRIERS)
        ptx.do("mov.u32", position.slot, self.first_slot, when=wrap)
        ptx.do("mov.u32", position.barrier, self.first_barrier, when=wrap)
        ptx.do("xor.b32", position.parity, position.parity, 1, when=wrap)

    def wait(self, barrier: Memory, parity: Register | int, name: str) -> None:
        """Waits until a barrier has completed the phase of a parity."""
        ptx = self.ptx
        ptx.label(f"fdk_wait_{name}")
        done = ptx.register("pred")
        # Copies by lanes are as sm_80 has them, which has no `try_wait`: that lets a thread sleep.
        look = "try_wait" if self.bulk else "test_wait"
        ptx.do(f"mbarrier.{look}.parity.shared::cta.b64", done, barrier, parity)
        ptx.do("bra", f"fdk_wait_{name}", when=~done)

    def signal_empty(self, position: Position) -> None:
        """This warp has what it needs of a slot: another block may take its memory."""
        empty = at(position.barrier, BARRIER)
        self.ptx.do("mbarrier.arrive.shared::cta.b64", "_", empty, when=self.is_first_lane)
