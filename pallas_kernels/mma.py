"""The kernel for tens to hundreds of rows of x on every GPU: `mma.sync` with x in shared memory.

As in `matvec` a warp decodes tiles of the weight into operand registers of `mma.sync.m16n8k16`. But here many
tokens share a decoded tile: x comes into shared memory once for all warps that have the same range of K, a
plane at a time, copied there by `cp.async` while the planes before it are multiplied. The planar order puts
what a lane needs of a token for two steps side by side, 16 bytes; odd tokens have their halves swapped, so
that no two lanes of a load meet in a bank. Scales multiply the decoded weights: the sums stay in the
accumulators over all of K.

Glossary: T tokens a program (`Config.tokens`); R tiles of 16 rows a warp (`Config.tiles`); V warps with rows
of their own (`Config.row_warps`) that share a range of K, a team; U teams (`Config.teams`); D blocks of codes
in flight a warp (`Config.stages`); S planes of x in shared memory a team (`Config.x_stages`). See `matvec`.
"""

import dataclasses
from typing import ClassVar

from pallas_kernels import matvec
from pallas_kernels.case import PLANE, TILE_ROWS, Case
from pallas_kernels.ptx import at, float_constant, vector
from pallas_kernels.target import Target

_ROW_BYTES = 2 * PLANE  # of a token's part of a plane


@dataclasses.dataclass(frozen=True)
class Config:
    """Launch configuration: T, R, V, U, D and S of the module's glossary."""

    tokens: int = 64
    tiles: int = 2
    row_warps: int = 2
    teams: int = 4
    stages: int = 2
    x_stages: int = 2
    cluster: ClassVar[int] = 1

    @property
    def rows(self) -> int:
        """Rows of the weight a program."""
        return TILE_ROWS * self.tiles * self.row_warps

    @property
    def warps(self) -> int:
        """Warps a program."""
        return self.row_warps * self.teams

    @property
    def as_matvec(self) -> matvec.Config:
        """What the parts shared with `matvec` see."""
        return matvec.Config(
            tiles=self.tiles,
            warps=self.warps,
            stages=self.stages,
            columns=self.tokens // 8,
            row_warps=self.row_warps,
        )


def unsupported_reason(case: Case, config: Config, target: Target) -> str | None:
    """Why the kernel does not take a case, or None."""
    if config.stages * case.planes % config.x_stages or config.x_stages < 2:
        return (
            f"{config.stages} blocks of {case.planes} planes are no multiple of {config.x_stages}"
        )
    if config.tokens % 8 or 8 * config.tokens % (32 * config.row_warps):
        return f"{config.tokens} tokens are not divided among {config.row_warps} warps"
    if case.even and config.warps > 8 and config.tiles * config.tokens > 32:
        return f"{config.warps} warps have too few registers for the sums and evenly spaced values"
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
        self.single = False
        self.plane_bytes = config.tokens * _ROW_BYTES
        # As many tokens as have their sums in the memory of the table and of x at the end.
        room = max(8, self._x_end // self._token_bytes)
        parts = (t for t in range(config.tokens, 0, -8) if config.tokens % t == 0)
        self.sum_tokens = next(tokens for tokens in parts if tokens <= room)

    @property
    def _token_bytes(self) -> int:
        """Bytes of a token's sums of all teams."""
        return self.launch.teams * self.sum_stride * 4

    @property
    def _x_end(self) -> int:
        """Where the planes of x end, which follow the decoder's table."""
        config = self.launch
        return self.decoder.shared_bytes + config.teams * config.x_stages * self.plane_bytes

    @property
    def shared_bytes(self) -> int:
        """Shared memory of a program."""
        return max(self._x_end, self.sum_tokens * self._token_bytes)

    def write(self) -> str:
        config, ptx = self.launch, self.ptx
        ptx.share(self.shared_bytes)
        ptx.comment("locate: this lane's rows, range of K and addresses")
        self._locate()
        self._locate_x()
        ptx.comment("load: the first blocks of codes and scales, the first planes of x")
        buffers = [self._buffer(i) for i in range(config.stages)]
        for stage, buffer in enumerate(buffers):
            self._load(buffer, stage)
        for plane in range(config.x_stages - 1):
            self._copy_x(plane, *divmod(plane, self.case.planes))
        ptx.comment("decode: the table or constants of the codebook")
        self._set_up_decoder()
        self._loop(buffers)
        ptx.do("cp.async.wait_group", 0)
        self._reduce()
        return ptx.text()

    def _locate_program(self) -> None:
        """Programs that share rows come next to each other: the second finds the weight in L2."""
        ptx, config = self.ptx, self.launch
        self.program_row = ptx.op("mul.lo.u32", ptx.op("mov.u32", "%ctaid.y"), config.rows)
        self.first_token = ptx.op("mul.lo.u32", ptx.op("mov.u32", "%ctaid.x"), config.tokens)

    # x: from memory to shared memory, from there into operands

    def _locate_x(self) -> None:
        """Where this thread copies x from and to, where it reads it, and the accumulators."""
        ptx, case, config = self.ptx, self.case, self.launch
        team_bytes = config.x_stages * self.plane_bytes
        team = ptx.op("mad.lo.u32", self.k_warp_here, team_bytes, self.shared)
        team = ptx.op("add.u32", team, self.decoder.shared_bytes)
        # Eight threads copy a token's part of a plane, 16 bytes each.
        eighth = ptx.op("and.b32", self.lane, 7)
        line = ptx.op("shr.u32", self.lane, 3)
        line = ptx.op("mad.lo.u32", self.row_warp, 4, line)
        self.x_target = self._swapped(team, line, eighth)
        self.x = []
        self.lines = 4 * config.row_warps  # tokens that the team copies at a time
        for i in range(config.tokens // self.lines):
            token = ptx.op("add.u32", ptx.op("add.u32", line, i * self.lines), self.first_token)
            token = ptx.op("min.u32", token, case.m - 1)
            row_bytes = case.blocks * case.span * 2
            address = ptx.op("mad.wide.u32", token, row_bytes, self.operands["x"], kind="b64")
            address = ptx.op("mad.wide.u32", self.k_warp, case.span * 2, address, kind="b64")
            self.x.append(ptx.op("mad.wide.u32", eighth, 16, address, kind="b64"))
        # A lane reads 16 bytes of each half of the token that its row counts.
        self.x_places = [
            self._swapped(team, self.row, ptx.op("add.u32", self.quad, 4 * half))
            for half in range(2)
        ]
        self.barrier = ptx.op("add.u32", self.k_warp_here, 1)
        self.totals = [
            [
                [ptx.op("mov.f32", float_constant(0.0), kind="f32") for _ in range(4)]
                for _ in range(config.tokens // 8)
            ]
            for _ in range(config.tiles)
        ]

    def _swapped(self, team: str, token: str, eighth: str) -> str:
        """Where an eighth of a token's part of a plane is: odd tokens have their halves swapped."""
        ptx = self.ptx
        odd = ptx.op("and.b32", token, 1)
        place = ptx.op("xor.b32", eighth, ptx.op("shl.b32", odd, 2))
        row = ptx.op("mad.lo.u32", token, _ROW_BYTES, team)
        return ptx.op("mad.lo.u32", place, 16, row)

    def _copy_x(self, flat: int, ahead: int, plane: int) -> None:
        """Starts copying a plane of x, of the block `ahead` steps of this warp after the current one."""
        ptx, case, config = self.ptx, self.case, self.launch
        in_bounds = ptx.op("setp.gt.u32", self.left, ahead, kind="pred")
        offset = (ahead * self.config.k_warps * case.span + plane * PLANE) * 2
        slot = flat % config.x_stages * self.plane_bytes
        for i, address in enumerate(self.x):
            target = at(self.x_target, slot + i * self.lines * _ROW_BYTES)
            ptx.do("cp.async.cg.shared.global", target, at(address, offset), 16, when=in_bounds)
        ptx.do("cp.async.commit_group")

    def _turn_x(self, loads: int) -> None:
        """Nothing to do: a turn of the loop is a multiple of the planes in shared memory."""

    def _load_x_half(self, flat: int, half: int) -> list[list[str]]:
        """The operands of two steps of a plane, for each 8 tokens."""
        ptx, slot = self.ptx, flat % self.launch.x_stages * self.plane_bytes
        found = []
        for column in range(self.launch.tokens // 8):
            words = ptx.registers("b32", 4)
            place = at(self.x_places[half], slot + column * 8 * _ROW_BYTES)
            ptx.do("ld.shared.v4.b32", vector(words), place)
            found.append(self.decoder.paired(words))
        return found

    # The loop

    def _multiply(self, buffer, stage: int) -> None:
        """Multiplies a block of each of the warp's tiles with its part of x."""
        case, ptx, config = self.case, self.ptx, self.launch
        for plane in range(case.planes):
            flat = stage * case.planes + plane
            # The plane is there when each thread's copies are, and nobody still reads the one before it.
            ptx.do("cp.async.wait_group", config.x_stages - 2)
            ptx.do("bar.sync", self.barrier, 32 * config.row_warps)
            ahead, next_plane = divmod(plane + config.x_stages - 1, case.planes)
            self._copy_x(flat + config.x_stages - 1, stage + ahead, next_plane)
            weights = [
                self._scaled_plane(words, self._plane_factors(scales, plane), plane)
                for words, scales in zip(buffer["words"], buffer["scales"], strict=True)
            ]
            for half in range(2):
                x = self._load_x_half(flat, half)
                for step in range(2):
                    for operands, totals in zip(weights, self.totals, strict=True):
                        self._dot_step(next(operands), x, step, totals)

    def _dot_step(self, weights: list[str], x, step: int, totals) -> None:
        """Adds a tile's products of a step to the totals of all tokens."""
        kind = self.decoder.kind
        for pairs, sums in zip(x, totals, strict=True):
            self.ptx.do(
                f"mma.sync.aligned.m16n8k16.row.col.f32.{kind}.{kind}.f32",
                vector(sums),
                vector(weights),
                vector(pairs[2 * step : 2 * step + 2]),
                vector(sums),
            )

    # The end

    def _reduce(self) -> None:
        """Adds the teams' sums, adds the bias, and writes the outputs, some tokens at a time."""
        ptx, config = self.ptx, self.launch
        ptx.comment("reduce: the teams' sums through shared memory")
        per_team = self.sum_tokens * self.sum_stride * 4
        address = ptx.op("mad.lo.u32", self.k_warp_here, per_team, self.shared)
        row = ptx.op("mad.lo.u32", self.row_warp, config.tiles * TILE_ROWS, self.row)
        address = ptx.op("mad.lo.u32", row, 4, address)
        address = ptx.op("mad.lo.u32", self.quad, 2 * self.sum_stride * 4, address)
        for first in range(0, config.tokens, self.sum_tokens):
            ptx.do("bar.sync", 0)
            for tile, row_totals in enumerate(self.totals):
                for column in range(self.sum_tokens // 8):
                    for i, total in enumerate(row_totals[first // 8 + column]):
                        token, row = 8 * column + i % 2, TILE_ROWS * tile + 8 * (i // 2)
                        offset = (token * self.sum_stride + row) * 4
                        ptx.do("st.shared.f32", at(address, offset), total)
            ptx.do("bar.sync", 0)
            self._write_outputs(self.sum_tokens, per_team, f"{first}_")
            ptx.do("add.u32", self.first_token, self.first_token, self.sum_tokens)
