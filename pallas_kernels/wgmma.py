"""The kernel for tens to hundreds of rows of x: decoded weights go from registers into `wgmma`.

A warpgroup decodes 64 rows of the weight into the operand registers of `wgmma.m64nTk16`; the fragments are
those of `matvec`, so the weight never passes through shared memory. T tokens of x are the other operand, in
shared memory, two planes deep. Scales multiply the decoded weights, so that the sums stay in the
instruction's accumulators over the whole of K.

Glossary: T tokens a program (`Config.tokens`); V warpgroups with rows of their own (`Config.row_groups`);
U warpgroups that share K (`Config.k_groups`), each with V * 64 rows: a team; D blocks in flight a warp
(`Config.stages`); C programs that share K (`Config.cluster`), see `matvec`.
"""

import dataclasses
import functools

from pallas_kernels.case import Case
from pallas_kernels.layout import PLANE
from pallas_kernels.registers import Register, at, vector
from pallas_kernels.target import Target
from pallas_kernels.tile_plan import SumsPlan
from pallas_kernels.tile_sums import SumsWriter
from pallas_kernels.tile_writer import Block

_X_DEPTH = 4  # planes of x being loaded, at most
_X_LOADS = 8  # loads of x under way, at most, 4 registers each
_CORE_BYTES = 128  # 8 tokens by 8 weights, what the instruction reads as a unit


@dataclasses.dataclass(frozen=True)
class Config:
    """Launch configuration: T, V, U, D and C of the module's glossary.

    Attributes:
        ring: whether blocks in flight are in shared memory instead of registers.
    """

    tokens: int = 64
    row_groups: int = 2
    k_groups: int = 1
    stages: int = 2
    cluster: int = 1
    ring: bool = False

    @property
    def rows(self) -> int:
        """Rows of the weight a program."""
        return 64 * self.row_groups

    @property
    def warps(self) -> int:
        """Warps a program."""
        return 4 * self.row_groups * self.k_groups


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan(SumsPlan):
    """What follows from a case and a configuration."""

    @classmethod
    def of(cls, case: Case, config: Config) -> "Plan":
        """The plan of a case and a configuration."""
        return cls(
            case=case,
            tiles=1,
            warps=config.warps,
            stages=config.stages,
            row_warps=4 * config.row_groups,
            cluster=config.cluster,
            ring=config.ring,
            tokens=config.tokens,
        )

    @property
    def cores(self) -> int:
        """Eights of tokens."""
        return self.tokens // 8

    @property
    def half_bytes(self) -> int:
        """From the first half of a plane of x to the second, in other banks for the same token."""
        return 4 * self.cores * _CORE_BYTES + _CORE_BYTES // 2

    @property
    def x_bytes(self) -> int:
        """Shared memory of a plane of x, of which each team has two."""
        return self.tokens * PLANE * 2 + _CORE_BYTES

    @property
    def x_items(self) -> int:
        """Loads of x a thread and plane: a warp's load has 4 tokens."""
        return -(-2 * self.cores // self.row_warps)

    @functools.cached_property
    def x_depth(self) -> int:
        """Planes of x being loaded into registers: enough to cover the latency of L2, a divisor of the loop."""
        depth = 1
        while (
            depth < _X_DEPTH
            and depth * self.x_items < _X_LOADS
            and self.stages * self.case.planes % (2 * depth) == 0
        ):
            depth *= 2
        return depth

    @property
    def ring_offset(self) -> int:
        """Where the ring starts: after the decoder's memory and two planes of x for each team."""
        return self.decoder_bytes + 2 * self.k_warps_here * self.x_bytes

    @property
    def shared_bytes(self) -> int:
        """Shared memory of a program."""
        return max(self.ring_offset + self.ring_bytes, 8 * self.token_bytes)

    @functools.cached_property
    def sum_tokens(self) -> int:
        """As many as have their sums in the same memory at the end."""
        return self.tokens_within(self.shared_bytes)


def unsupported_reason(case: Case, config: Config, target: Target) -> str | None:
    """Why the kernel does not take a case, or None."""
    if not target.has_wgmma:
        return f"{target.architecture} has no wgmma, which is sm_90's alone"
    if config.stages * case.planes % 2:
        return f"{config.stages} stages of {case.planes} planes are odd"
    return case.unsupported_reason(config, target, lambda: Plan.of(case, config).shared_bytes)


def grid(case: Case, config: Config) -> tuple[int, int]:
    """Programs along M and N."""
    return -(-case.m // config.tokens), -(-case.n // config.rows)


def source(case: Case, config: Config, target: Target) -> str:
    """The kernel's PTX."""
    return _Writer(Plan.of(case, config), target).write()


class _Writer(SumsWriter):
    """Writes the kernel: `write` is its stages in order."""

    plan: Plan

    def write(self) -> str:
        plan, ptx = self.plan, self.ptx
        ptx.share(plan.shared_bytes)
        self.locate()
        self._locate_x()
        self.locate_ring(plan.ring_offset)
        ptx.comment("load: the first blocks of codes and scales, the first planes of x")
        blocks = self.blocks_in_flight()
        for stage, block in enumerate(blocks):
            self.load(block, stage)
        for plane in range(plan.x_depth):
            self._load_x(plane % plan.x_depth, *divmod(plane, self.case.planes))
        self._store_x(0)
        self._load_x(0, *divmod(plan.x_depth, self.case.planes))
        self.set_up_decoder()
        self.loop_over_k(blocks)
        ptx.do("wgmma.wait_group.sync.aligned", 0)
        self.reduce_in_parts(self.totals)
        return ptx.text()

    def locate_program(self) -> None:
        """Programs that share rows come next to each other: the second finds the weight in L2."""
        ptx, plan = self.ptx, self.plan
        self.output_row = self.program_row = (ptx.op("mov.u32", "%ctaid.y") * plan.rows).low()
        self.first_token = (self._index_along_x() * plan.tokens).low()

    def _locate_x(self) -> None:
        """Where this thread loads x, where it stores it, and the descriptors of both buffers."""
        ptx, case, plan = self.ptx, self.case, self.plan
        within = self.warp % (plan.row_warps)
        team = self.shared + self.k_warp_here * (2 * plan.x_bytes) + plan.decoder_bytes
        self.x, self.x_targets = [], []
        # A warp moves 4 tokens by a plane at a time: a lane 8 weights, four pairs for one lane of four.
        line = self.lane >> 3
        half = (self.lane >> 2) & 1
        eighth = self.lane & 7
        items = 2 * self.plan.cores
        for i in range(plan.x_items):
            item = within + i * plan.row_warps
            if items % (plan.row_warps):
                item = ptx.op("min.u32", item, items - 1)
            index = line + item * 4
            token = index + self.first_token
            token = ptx.op("min.u32", token, case.m - 1)
            row_bytes = case.blocks * case.span * 2
            address = self.operands["x"] + token * row_bytes + self.k_warp * (case.span * 2)
            self.x.append(address + eighth * 16)
            target = team + half * self.plan.half_bytes + index * 16
            self.x_targets.append(target + self.thread_in_group * 4)
        self.x_registers = [
            [ptx.registers("b32", 4) for _ in self.x] for _ in range(self.plan.x_depth)
        ]
        start = (team & 0x3FFFF) >> 4
        low = start | (self.plan.cores * _CORE_BYTES // 16 << 16)
        high = ptx.op("mov.u32", _CORE_BYTES // 16)
        self.descriptor = ptx.register("b64")
        ptx.do("mov.b64", self.descriptor, vector([low, high]))
        self.barrier = self.k_warp_here + 1
        self.true = ptx.op("setp.eq.u32", 0, 0)
        zero = "0f00000000"
        self.totals = [
            [[ptx.op("mov.f32", zero) for _ in range(4)] for _ in range(self.plan.cores)]
        ]

    def _load_x(self, slot: int, ahead: int, plane: int) -> None:
        """Starts the loads of a plane of x into one of the sets of registers."""
        ptx, case = self.ptx, self.case
        in_bounds = self.left > ahead
        offset = (ahead * self.plan.k_warps * case.span + plane * PLANE) * 2
        for address, values in zip(self.x, self.x_registers[slot], strict=True):
            ptx.do("ld.global.nc.v4.b32", vector(values), at(address, offset), when=in_bounds)

    def addresses_along_k(self) -> list[Register]:
        """Where this thread loads x from."""
        return self.x

    def _store_x(self, flat: int) -> None:
        """Stores the loaded plane in the order that the decoded weights have: step, pair, token."""
        ptx = self.ptx
        values_of_plane = self.x_registers[flat % self.plan.x_depth]
        for target, values in zip(self.x_targets, values_of_plane, strict=True):
            for i, value in enumerate(self.decoder.paired(values)):
                offset = flat % 2 * self.plan.x_bytes + i * self.plan.cores * _CORE_BYTES
                ptx.do("st.shared.b32", at(target, offset), value)

    def multiply(self, block: Block, stage: int) -> None:
        """Decodes a block of a plane at a time, while the products of the plane before are under way."""
        case, ptx, plan = self.case, self.ptx, self.plan
        [words], [scales] = block.words, block.scales
        for plane in range(case.planes):
            ptx.comment(f"multiply: block {stage} of those in flight, plane {plane}")
            flat = stage * case.planes + plane
            factors = self.plane_scales(scales, plane)
            operands = list(self.decode_scaled(words, factors, plane))
            ptx.do("wgmma.wait_group.sync.aligned", 0)
            ptx.do("fence.proxy.async.shared::cta")
            ptx.do("bar.sync", self.barrier, 32 * plan.row_warps)
            self._dot(operands, flat % 2)
            self._store_x(flat + 1)
            ahead, next_plane = divmod(plane + 1 + self.plan.x_depth, case.planes)
            self._load_x((flat + 1) % self.plan.x_depth, stage + ahead, next_plane)

    def _dot(self, operands: list[list[Register]], buffer: int) -> None:
        """Starts the products of a plane with the tokens in a buffer."""
        ptx, kind = self.ptx, self.decoder.kind
        totals = vector([t for core in self.totals[0] for t in core])
        ptx.do("wgmma.fence.sync.aligned")
        for step, a in enumerate(operands):
            half, step_of_half = divmod(step, 2)
            offset = half * self.plan.half_bytes + step_of_half * 2 * self.plan.cores * _CORE_BYTES
            offset = (buffer * self.plan.x_bytes + offset) // 16
            descriptor = self.descriptor + offset
            ptx.do(
                f"wgmma.mma_async.sync.aligned.m64n{self.plan.tokens}k16.f32.{kind}.{kind}",
                totals,
                vector(a),
                descriptor,
                self.true,
                1,
                1,
                0,
            )
        ptx.do("wgmma.commit_group.sync.aligned")
