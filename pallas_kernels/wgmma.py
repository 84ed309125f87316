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

from pallas_kernels import matvec
from pallas_kernels.case import PLANE, Case
from pallas_kernels.ptx import at, vector
from pallas_kernels.target import Target

_STEPS = 4
_X_DEPTH = 4  # most planes of x on their way
_X_LOADS = 8  # most loads of x on their way, 4 registers each
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

    @property
    def as_matvec(self) -> matvec.Config:
        """What the parts shared with `matvec` see."""
        return matvec.Config(
            tiles=1,
            warps=self.warps,
            stages=self.stages,
            columns=self.tokens // 8,
            row_warps=4 * self.row_groups,
            cluster=self.cluster,
            ring=self.ring,
        )


def unsupported_reason(case: Case, config: Config, target: Target) -> str | None:
    """Why the kernel does not take a case, or None."""
    if not target.has_wgmma:
        return f"{target.architecture} has no wgmma, which is sm_90's alone"
    if config.stages * case.planes % 2:
        return f"{config.stages} stages of {case.planes} planes are odd"
    return case.unsupported_reason(
        config, target, lambda: _Writer(case, config, target).shared_bytes
    )


def grid(case: Case, config: Config) -> tuple[int, int]:
    """Programs along M and N."""
    return -(-case.m // config.tokens), -(-case.n // config.rows)


def source(case: Case, config: Config, target: Target) -> str:
    """The kernel's PTX."""
    return _Writer(case, config, target).write()


class _Writer(matvec._Writer):
    """Writes the PTX of one case."""

    def __init__(self, case: Case, config: Config, target: Target) -> None:
        self.launch = config
        super().__init__(case, config.as_matvec, target)
        self.cores = config.tokens // 8
        # Of a plane of x, whose second half starts in other banks.
        self.x_bytes = config.tokens * PLANE * 2 + _CORE_BYTES
        self.single = False
        # As many tokens as have their sums in the same memory at the end.
        self.sum_tokens = config.tokens
        while self.sum_tokens * self._token_bytes > self.shared_bytes:
            self.sum_tokens //= 2

    @property
    def _token_bytes(self) -> int:
        """Bytes of a token's sums of all teams."""
        return self.launch.k_groups * self.sum_stride * 4

    @property
    def _ring_offset(self) -> int:
        """Where the ring starts: behind the decoder's memory and two planes of x for each team."""
        return self.decoder.shared_bytes + 2 * self.launch.k_groups * self.x_bytes

    @property
    def shared_bytes(self) -> int:
        """Shared memory of a program."""
        return max(self._ring_offset + self.ring_bytes, 8 * self._token_bytes)

    def write(self) -> str:
        config, ptx = self.launch, self.ptx
        ptx.share(self.shared_bytes)
        ptx.comment("locate: this lane's rows, range of K and addresses")
        self._locate()
        self._locate_x()
        self._locate_ring(self._ring_offset)
        buffers = [self._buffer(i) for i in range(config.stages)]
        for stage, buffer in enumerate(buffers):
            self._load(buffer, stage)
        for plane in range(self.x_depth):
            self._load_x(plane % self.x_depth, *divmod(plane, self.case.planes))
        self._store_x(0)
        self._load_x(0, *divmod(self.x_depth, self.case.planes))
        self._set_up_decoder()
        self._loop(buffers)
        ptx.do("wgmma.wait_group.sync.aligned", 0)
        self._reduce()
        return ptx.text()

    def _locate_program(self) -> None:
        """Programs that share rows come next to each other: the second finds the weight in L2."""
        ptx, config = self.ptx, self.launch
        self.program_row = ptx.op("mul.lo.u32", ptx.op("mov.u32", "%ctaid.y"), config.rows)
        self.first_token = ptx.op("mul.lo.u32", self._place_along_x(), config.tokens)

    def _locate_x(self) -> None:
        """Where this thread loads x, where it stores it, and the descriptors of both buffers."""
        ptx, case, config = self.ptx, self.case, self.launch
        within = ptx.remainder(self.warp, 4 * config.row_groups)
        team_bytes = 2 * self.x_bytes
        team = ptx.op("mad.lo.u32", self.k_warp_here, team_bytes, self.shared)
        team = ptx.op("add.u32", team, self.decoder.shared_bytes)
        self.x, self.x_targets = [], []
        # A warp moves 4 tokens by a plane at a time: a lane 8 weights, four pairs for one lane of four.
        line = ptx.op("shr.u32", self.lane, 3)
        half = ptx.op("and.b32", ptx.op("shr.u32", self.lane, 2), 1)
        eighth = ptx.op("and.b32", self.lane, 7)
        items = 2 * self.cores
        per_warp = -(-items // (4 * config.row_groups))
        for i in range(per_warp):
            item = ptx.op("add.u32", within, i * 4 * config.row_groups)
            if items % (4 * config.row_groups):
                item = ptx.op("min.u32", item, items - 1)
            place = ptx.op("mad.lo.u32", item, 4, line)
            token = ptx.op("add.u32", place, self.first_token)
            token = ptx.op("min.u32", token, case.m - 1)
            row_bytes = case.blocks * case.span * 2
            address = ptx.op("mad.wide.u32", token, row_bytes, self.operands["x"], kind="b64")
            address = ptx.op("mad.wide.u32", self.k_warp, case.span * 2, address, kind="b64")
            self.x.append(ptx.op("mad.wide.u32", eighth, 16, address, kind="b64"))
            target = ptx.op("mad.lo.u32", half, self._half_bytes, team)
            target = ptx.op("mad.lo.u32", place, 16, target)
            self.x_targets.append(ptx.op("mad.lo.u32", self.quad, 4, target))
        # Planes of x on their way in registers: enough to cover the latency of L2, a divisor of the loop.
        self.x_depth = 1
        while (
            self.x_depth < _X_DEPTH
            and self.x_depth * per_warp < _X_LOADS
            and config.stages * case.planes % (2 * self.x_depth) == 0
        ):
            self.x_depth *= 2
        self.x_registers = [[ptx.registers("b32", 4) for _ in self.x] for _ in range(self.x_depth)]
        start = ptx.op("shr.u32", ptx.op("and.b32", team, 0x3FFFF), 4)
        low = ptx.op("or.b32", start, self.cores * _CORE_BYTES // 16 << 16)
        high = ptx.op("mov.u32", _CORE_BYTES // 16)
        self.descriptor = ptx.register("b64")
        ptx.do("mov.b64", self.descriptor, vector([low, high]))
        self.barrier = ptx.op("add.u32", self.k_warp_here, 1)
        self.true = ptx.op("setp.eq.u32", 0, 0, kind="pred")
        zero = "0f00000000"
        self.totals = [
            [[ptx.op("mov.f32", zero, kind="f32") for _ in range(4)] for _ in range(self.cores)]
        ]

    @property
    def _half_bytes(self) -> int:
        """From the first half of a plane of x to the second, in other banks for the same token."""
        return 4 * self.cores * _CORE_BYTES + _CORE_BYTES // 2

    def _load_x(self, slot: int, ahead: int, plane: int) -> None:
        """Starts the loads of a plane of x into one of the sets of registers."""
        ptx, case = self.ptx, self.case
        in_bounds = ptx.op("setp.gt.u32", self.left, ahead, kind="pred")
        offset = (ahead * self.config.k_warps * case.span + plane * PLANE) * 2
        for address, values in zip(self.x, self.x_registers[slot], strict=True):
            ptx.do("ld.global.nc.v4.b32", vector(values), at(address, offset), when=in_bounds)

    def _turn_x(self, loads: int) -> None:
        """Nothing to do: a turn of the loop is an even number of planes."""

    def _store_x(self, flat: int) -> None:
        """Stores the loaded plane in the order that the decoded weights have: step, pair, token."""
        ptx = self.ptx
        values_of_plane = self.x_registers[flat % self.x_depth]
        for target, values in zip(self.x_targets, values_of_plane, strict=True):
            for i, value in enumerate(self.decoder.paired(values)):
                offset = flat % 2 * self.x_bytes + i * self.cores * _CORE_BYTES
                ptx.do("st.shared.b32", at(target, offset), value)

    def _multiply(self, buffer, stage: int) -> None:
        case, ptx, config = self.case, self.ptx, self.launch
        [words], [scales] = buffer["words"], buffer["scales"]
        for plane in range(case.planes):
            flat = stage * case.planes + plane
            factors = self._plane_factors(scales, plane)
            operands = list(self._scaled_plane(words, factors, plane))
            ptx.do("wgmma.wait_group.sync.aligned", 0)
            ptx.do("fence.proxy.async.shared::cta")
            ptx.do("bar.sync", self.barrier, 128 * config.row_groups)
            self._dot(operands, flat % 2)
            self._store_x(flat + 1)
            ahead, next_plane = divmod(plane + 1 + self.x_depth, case.planes)
            self._load_x((flat + 1) % self.x_depth, stage + ahead, next_plane)

    def _dot(self, operands: list[list[str]], buffer: int) -> None:
        """Starts the products of a plane with the tokens in a buffer."""
        ptx, kind = self.ptx, self.decoder.kind
        totals = vector([t for core in self.totals[0] for t in core])
        ptx.do("wgmma.fence.sync.aligned")
        for step, a in enumerate(operands):
            half, step_of_half = divmod(step, 2)
            offset = half * self._half_bytes + step_of_half * 2 * self.cores * _CORE_BYTES
            offset = (buffer * self.x_bytes + offset) // 16
            descriptor = ptx.op("add.u64", self.descriptor, offset, kind="b64")
            ptx.do(
                f"wgmma.mma_async.sync.aligned.m64n{self.launch.tokens}k16.f32.{kind}.{kind}",
                totals,
                vector(a),
                descriptor,
                self.true,
                1,
                1,
                0,
            )
        ptx.do("wgmma.commit_group.sync.aligned")

    def _reduce(self) -> None:
        """Adds the teams' sums, adds the bias, and writes the outputs, some tokens at a time."""
        ptx, config = self.ptx, self.launch
        per_team = self.sum_tokens * self.sum_stride * 4
        address = ptx.op("mad.lo.u32", self.k_warp_here, per_team, self.shared)
        row = ptx.op("mad.lo.u32", self.row_warp, 16, self.row)
        address = ptx.op("mad.lo.u32", row, 4, address)
        address = ptx.op("mad.lo.u32", self.quad, 2 * self.sum_stride * 4, address)
        for first in range(0, config.tokens, self.sum_tokens):
            self._join_programs()
            for core in range(self.sum_tokens // 8):
                for i, total in enumerate(self.totals[0][first // 8 + core]):
                    offset = ((8 * core + i % 2) * self.sum_stride + 8 * (i // 2)) * 4
                    ptx.do("st.shared.f32", at(address, offset), total)
            self._join_programs()
            self._write_outputs(self.sum_tokens, per_team, f"{first}_")
            ptx.do("add.u32", self.first_token, self.first_token, self.sum_tokens)
        self._leave_cluster()
