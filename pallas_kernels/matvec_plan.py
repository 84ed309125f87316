"""What a launch of `matvec` is: its configuration, its grid and its shared memory, before any PTX."""

import dataclasses
import functools

from pallas_kernels.case import Case
from pallas_kernels.layout import PLANE, TILE_ROWS
from pallas_kernels.tile_plan import SumsPlan

QUARTER = PLANE // 4  # weights of a row that two of the four lanes of a half of a plane have


@dataclasses.dataclass(frozen=True)
class Config:
    """Launch configuration: R, W, D, J, V, C and P of the glossary of `matvec`.

    Attributes:
        diagonal: whether eight planes of x take the columns of one token.
        ring: whether blocks in flight are in shared memory instead of registers.
        programs: zero for as many as there are rows for; a product with a residual has always as many.
    """

    tiles: int = 2
    warps: int = 8
    stages: int = 2
    columns: int = 1
    row_warps: int = 1
    diagonal: bool = False
    cluster: int = 1
    ring: bool = False
    programs: int = 0

    @property
    def rows(self) -> int:
        """Rows of the weight a program."""
        return self.tiles * self.row_warps * TILE_ROWS


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan(SumsPlan):
    """What follows from a case and a configuration.

    Attributes:
        diagonal: see `Config`.
        programs: most programs along N, if a program takes its rows in several rounds; else zero.
    """

    diagonal: bool
    programs: int

    @classmethod
    def of(cls, case: Case, config: Config) -> "Plan":
        """The plan of a case and a configuration."""
        return cls(
            case=case,
            tiles=config.tiles,
            warps=config.warps,
            stages=config.stages,
            row_warps=config.row_warps,
            cluster=config.cluster,
            ring=config.ring,
            tokens=8 * config.columns,
            diagonal=config.diagonal,
            programs=config.programs,
        )

    @property
    def has_quarters(self) -> bool:
        """Whether the first column has x of the first 16 of 32 weights, and the second one of the others."""
        case = self.case
        return self.single and not self.diagonal and case.bits == 4 and case.group_size == QUARTER

    @functools.cached_property
    def scale_mode(self) -> str:
        """See `TilePlan.scale_mode`; quarters of planes have sums of their own."""
        return "vector" if self.has_quarters else super().scale_mode

    @property
    def scale_width(self) -> int:
        """See `TilePlan.scale_width`; by fours, eight scales take more registers than two programs have."""
        tokens = self.single and not self.diagonal
        if tokens and self.case.bits == 2 and self.has_halves and self.scale_mode == "vector":
            return self.scale_bytes
        return super().scale_width

    @property
    def columns(self) -> int:
        """J, groups of 8 tokens: columns of an instruction of the tensor cores."""
        return self.tokens // 8

    @property
    def single(self) -> bool:
        """Whether there is one token, whose sums every column holds or, with `diagonal`, a part of."""
        return self.case.m == 1

    @property
    def sum_tokens(self) -> int:
        """All tokens of the program."""
        return 1 if self.single else self.tokens

    @property
    def x_planes(self) -> int:
        """Planes of x that are loaded together."""
        return 8 if self.diagonal else 1

    @functools.cached_property
    def grid(self) -> tuple[int, int]:
        """Programs along N and M."""
        case = self.case
        programs = -(-case.n // self.rows)
        if self.programs and not case.residual:  # as many for each codebook
            each = min(max(self.programs // case.codebooks, 1), programs // case.codebooks)
            programs = each * case.codebooks
        return programs, -(-case.m // self.tokens)

    @property
    def is_persistent(self) -> bool:
        """Whether a program has more than `rows` rows, and takes them in several rounds."""
        return self.grid[0] < -(-self.case.n // self.rows)

    @property
    def shares(self) -> int:
        """Shares of `rows` rows of each codebook."""
        return -(-self.case.n // self.rows) // self.case.codebooks

    @property
    def codebook_programs(self) -> int:
        """Programs that take the shares of a codebook."""
        return self.grid[0] // self.case.codebooks

    @property
    def sums_bytes(self) -> int:
        """Shared memory of the warps' sums."""
        return self.k_warps_here * self.warp_sums_bytes

    @property
    def shared_bytes(self) -> int:
        """Shared memory of a program.

        The sums take the memory of the table and the ring, which nobody needs any more; in several rounds there
        are two of them after the table, for even and odd rounds.
        """
        if self.is_persistent:
            end = self.decoder_bytes + 2 * self.sums_bytes
        else:
            end = max(self.decoder_bytes + self.ring_bytes, self.sums_bytes)
        return end + 4 * (self.case.squares > 0)
