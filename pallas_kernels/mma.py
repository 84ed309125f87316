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
import functools
from typing import ClassVar

from pallas_kernels.case import Case
from pallas_kernels.layout import PLANE, TILE_ROWS
from pallas_kernels.registers import Register, at, vector
from pallas_kernels.target import Target
from pallas_kernels.tile_plan import SumsPlan
from pallas_kernels.tile_sums import SumsWriter
from pallas_kernels.tile_writer import Block

_ROW_BYTES = 2 * PLANE  # of a token's part of a plane
_TEAMS = 15  # named barriers of a thread block, without that of all its threads


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

    def for_groups(self, case: Case) -> "Config":
        """Itself, or with one tile a warp where two would leave registers too few.

        Groups smaller than a plane have more scales, in registers of their own; a thread of 16 warps has 128,
        which are enough for 16 tokens, and 64 tokens of one bit already take all 255.
        """
        few = self.tokens <= 16 and case.bits > 1 and case.group_size >= 32
        full = (self.warps >= 16 and not few) or (self.tokens >= 64 and case.bits == 1)
        return dataclasses.replace(self, tiles=1) if case.group_size < PLANE and full else self


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan(SumsPlan):
    """What follows from a case and a configuration.

    Attributes:
        x_stages: S, planes of x in shared memory a team.
    """

    x_stages: int

    @classmethod
    def of(cls, case: Case, config: Config) -> "Plan":
        """The plan of a case and a configuration."""
        return cls(
            case=case,
            tiles=config.tiles,
            warps=config.warps,
            stages=config.stages,
            row_warps=config.row_warps,
            tokens=config.tokens,
            x_stages=config.x_stages,
        )

    @property
    def plane_bytes(self) -> int:
        """Shared memory of a plane of x."""
        return self.tokens * _ROW_BYTES

    @property
    def team_bytes(self) -> int:
        """Shared memory of a team's planes of x."""
        return self.x_stages * self.plane_bytes

    @property
    def x_end(self) -> int:
        """Where the planes of x end, which follow the decoder's table."""
        return self.decoder_bytes + self.k_warps * self.team_bytes

    @functools.cached_property
    def sum_tokens(self) -> int:
        """As many as have their sums where the table and x were."""
        return self.tokens_within(self.x_end)

    @property
    def shared_bytes(self) -> int:
        """Shared memory of a program."""
        return max(self.x_end, self.sum_tokens * self.token_bytes)


def unsupported_reason(case: Case, config: Config, target: Target) -> str | None:
    """Why the kernel does not take a case, or None."""
    if config.stages * case.planes % config.x_stages or config.x_stages < 2:
        return (
            f"{config.stages} blocks of {case.planes} planes are no multiple of {config.x_stages}"
        )
    if config.teams > _TEAMS:
        return f"{config.teams} teams need a barrier each, of which there are {_TEAMS}"
    if config.tokens % 8 or 8 * config.tokens % (32 * config.row_warps):
        return f"{config.tokens} tokens are not divided among {config.row_warps} warps"
    if case.computes_values and config.warps > 8 and config.tiles * config.tokens > 32:
        return f"{config.warps} warps have too few registers for the sums and evenly spaced values"
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
        ptx.comment("load: the first blocks of codes and scales, the first planes of x")
        blocks = self.blocks_in_flight()
        for stage, block in enumerate(blocks):
            self.load(block, stage)
        for plane in range(plan.x_stages - 1):
            self._copy_x(plane, *divmod(plane, self.case.planes))
        self.set_up_decoder()
        self.loop_over_k(blocks)
        ptx.do("cp.async.wait_group", 0)
        self.reduce_in_parts(self.totals)
        return ptx.text()

    def locate_program(self) -> None:
        """Programs that share rows come next to each other: the second finds the weight in L2."""
        ptx, plan = self.ptx, self.plan
        self.output_row = self.program_row = (ptx.op("mov.u32", "%ctaid.y") * plan.rows).low()
        self.first_token = (ptx.op("mov.u32", "%ctaid.x") * plan.tokens).low()

    # Load: x from memory to shared memory, from there into operands

    def _locate_x(self) -> None:
        """Where this thread copies x from and to, where it reads it, and the accumulators."""
        ptx, case, plan = self.ptx, self.case, self.plan
        team = self.shared + self.k_warp_here * plan.team_bytes + plan.decoder_bytes
        # Eight threads copy a token's part of a plane, 16 bytes each.
        eighth = self.lane & 7
        line = (self.lane >> 3) + self.row_warp * 4
        self.x_target = self._swapped(team, line, eighth)
        self.x, self.is_token = [], []
        self.lines = 4 * plan.row_warps  # tokens that the team copies at a time
        parts = plan.tokens // self.lines
        # What is past the last token stays as it was: nobody stores its sums. To copy that token instead would
        # have all thread blocks read the same few lines of the cache. More parts have no registers left.
        skips = case.m % plan.tokens and parts <= 2
        for i in range(parts):
            token = (line + i * self.lines) + self.first_token
            self.is_token.append(token < case.m if skips else None)
            token = ptx.op("min.u32", token, case.m - 1)
            row_bytes = case.blocks * case.span * 2
            address = self.operands["x"] + token * row_bytes + self.k_warp * (case.span * 2)
            self.x.append(address + eighth * 16)
        # A lane reads 16 bytes of each half of the token that its row counts.
        self.x_addresses = [
            self._swapped(team, self.row, self.thread_in_group + 4 * half) for half in range(2)
        ]
        self.barrier = self.k_warp_here + 1
        self.totals = [
            [[ptx.zero() for _ in range(4)] for _ in range(plan.tokens // 8)]
            for _ in range(plan.tiles)
        ]

    def _swapped(self, team: Register, token: Register, eighth: Register) -> Register:
        """Where an eighth of a token's part of a plane is: odd tokens have their halves swapped."""
        odd = token & 1
        swapped = eighth ^ (odd << 2)
        row = team + token * _ROW_BYTES
        return row + swapped * 16

    def _copy_x(self, flat: int, ahead: int, plane: int) -> None:
        """Starts copying a plane of x, of the block `ahead` steps of this warp after the current one."""
        ptx, case, plan = self.ptx, self.case, self.plan
        in_bounds = self.left > ahead
        wanted = [in_bounds if own is None else in_bounds & own for own in self.is_token]
        offset = (ahead * self.plan.k_warps * case.span + plane * PLANE) * 2
        slot = flat % plan.x_stages * plan.plane_bytes
        for i, (address, when) in enumerate(zip(self.x, wanted, strict=True)):
            target = at(self.x_target, slot + i * self.lines * _ROW_BYTES)
            ptx.do("cp.async.cg.shared.global", target, at(address, offset), 16, when=when)
        ptx.do("cp.async.commit_group")

    def addresses_along_k(self) -> list[Register]:
        """Where this thread copies x from."""
        return self.x

    def _load_x_half(self, flat: int, half: int) -> list[list[Register]]:
        """The operands of two steps of a plane, for each 8 tokens."""
        ptx, slot = self.ptx, flat % self.plan.x_stages * self.plan.plane_bytes
        found = []
        for column in range(self.plan.tokens // 8):
            words = ptx.registers("b32", 4)
            address = at(self.x_addresses[half], slot + column * 8 * _ROW_BYTES)
            ptx.do("ld.shared.v4.b32", vector(words), address)
            found.append(self.decoder.paired(words))
        return found

    # Multiply

    def multiply(self, block: Block, stage: int) -> None:
        """Multiplies a block of each of the warp's tiles with its part of x."""
        case, ptx, plan = self.case, self.ptx, self.plan
        for plane in range(case.planes):
            ptx.comment(f"multiply: block {stage} of those in flight, plane {plane}")
            flat = stage * case.planes + plane
            # The plane is there when each thread's copies are, and nobody still reads the one before it.
            ptx.do("cp.async.wait_group", plan.x_stages - 2)
            ptx.do("bar.sync", self.barrier, 32 * plan.row_warps)
            ahead, next_plane = divmod(plane + plan.x_stages - 1, case.planes)
            self._copy_x(flat + plan.x_stages - 1, stage + ahead, next_plane)
            weights = [
                self.decode_scaled(words, self.plane_scales(scales, plane), plane)
                for words, scales in zip(block.words, block.scales, strict=True)
            ]
            for half in range(2):
                x = self._load_x_half(flat, half)
                for step in range(2):
                    for operands, totals in zip(weights, self.totals, strict=True):
                        self._dot_step(next(operands), x, step, totals)

    def _dot_step(self, weights: list[Register], x, step: int, totals) -> None:
        """Adds a tile's products of a step to the totals of all tokens."""
        kind = self.decoder.kind
        for pairs, sums in zip(x, totals, strict=True):
            self.ptx.multiply_add(kind, sums, weights, pairs[2 * step : 2 * step + 2])
