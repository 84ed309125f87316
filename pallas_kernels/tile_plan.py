"""How the warps of a program share a weight and what that takes of shared memory: plain data, before any PTX.

A program has rows of the weight, in tiles of 16, and all of K; its warps divide both. A block is the tiles
that a warp has at one index along K. `tile_writer` writes what is planned here; `matvec`, `mma`, `wgmma`
and `dequantise` add what they do with the weight.
"""

import abc
import dataclasses
import functools

import jax.numpy as jnp

from pallas_kernels import decoding
from pallas_kernels.case import Case
from pallas_kernels.layout import HALF_PLANE, PLANE, TILE_ROWS


@dataclasses.dataclass(frozen=True, kw_only=True)
class TilePlan:
    """What the warps of a program read.

    Attributes:
        case: the product.
        tiles: R, tiles of 16 rows a warp.
        warps: W, warps a program.
        stages: D, blocks in flight a warp.
        row_warps: V, warps with rows of their own; the others share their K.
        cluster: C, programs that have the same rows and share K.
        ring: whether blocks in flight are in shared memory instead of registers.
        exact: whether weights are decoded to the values of the codebook themselves, see `decoding.decoder`.
    """

    case: Case
    tiles: int
    warps: int
    stages: int
    row_warps: int = 1
    cluster: int = 1
    ring: bool = False
    exact: bool = False

    @property
    def k_warps_here(self) -> int:
        """Warps of a program that share K."""
        return self.warps // self.row_warps

    @property
    def k_warps(self) -> int:
        """Warps of a cluster that share K: a warp's next block is so many further."""
        return self.k_warps_here * self.cluster

    @property
    def rows(self) -> int:
        """Rows of the weight a program."""
        return self.tiles * self.row_warps * TILE_ROWS

    @property
    def scale_bytes(self) -> int:
        """Bytes of a scale."""
        return jnp.dtype(self.case.scale_dtype).itemsize

    @functools.cached_property
    def scale_mode(self) -> str:
        """How the scales of a block are loaded.

        - "single": one for all of a row's weights in it.
        - "vector": one for each group, next to each other in memory, and the same ones in each block.
        - "plane": one for each plane of 64 weights.
        - "lane": two for each plane, which may differ between lanes, as groups are no multiples of planes.
        """
        case = self.case
        if case.group_size % case.span == 0 and case.group_size > case.span:
            return "single"
        per_block, rest = divmod(case.span, case.group_size)
        # From a block of the warp to its next one. Four groups' scales are neighbours: its own stay within one.
        step = self.k_warps * per_block
        is_even = step % 4 == 0 or (step in (1, 2) and self.stages * step % 4 == 0)
        is_vector = case.group_size % HALF_PLANE == 0 and rest == 0 and is_even
        if case.group_size % PLANE and not is_vector:
            return "lane"
        return "vector" if is_vector else "plane"

    @property
    def has_halves(self) -> bool:
        """Whether each half of a plane has scales of its own."""
        return self.scale_runs == 2 * self.case.planes

    @property
    def scale_runs(self) -> int:
        """Scales that a lane loads for a row of a block."""
        if self.scale_mode == "vector":
            return self.case.span // self.case.group_size
        planes = self.case.planes
        return {"single": 1, "plane": planes, "lane": 2 * planes}[self.scale_mode]

    @property
    def scale_words(self) -> int:
        """Registers of a lane for the scales of a tile: of an upper and a lower row."""
        return self.scale_runs * self.scale_bytes // 2

    @property
    def scale_width(self) -> int:
        """Words of scales that are loaded together."""
        runs = min(self.scale_runs, 4) if self.scale_mode == "vector" else 1
        return runs * self.scale_bytes // 2

    @property
    def tile_bytes(self) -> int:
        """Shared memory of a tile in the ring: its codes, and a word of each lane for each word of scales."""
        return self.case.tile_bytes + 128 * self.scale_words

    @property
    def ring_bytes(self) -> int:
        """Shared memory of a program's blocks in flight."""
        return self.ring * self.warps * self.stages * self.tiles * self.tile_bytes

    @property
    def decoder_bytes(self) -> int:
        """Shared memory of the decoder's table, which is the first thing there."""
        return decoding.shared_bytes(
            self.case.bits, uniform=self.case.computes_values, exact=self.exact
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class SumsPlan(TilePlan, abc.ABC):
    """What the warps of a program read and add up.

    Attributes:
        tokens: rows of x a program.
    """

    tokens: int

    @property
    @abc.abstractmethod
    def shared_bytes(self) -> int:
        """Shared memory of a program."""

    @property
    @abc.abstractmethod
    def sum_tokens(self) -> int:
        """Tokens whose sums are in shared memory at once."""

    @property
    def sum_stride(self) -> int:
        """Floats from a token's sums to the next one's: so the lanes of a warp write to different banks."""
        return self.rows + 4

    @property
    def token_bytes(self) -> int:
        """Shared memory of a token's sums of all warps that share K."""
        return self.k_warps_here * self.sum_stride * 4

    def tokens_within(self, size: int) -> int:
        """As many tokens as have their sums in so many bytes: a divisor of all in whole eights, 8 at least."""
        parts = (t for t in range(self.tokens, 0, -8) if self.tokens % t == 0)
        return next(t for t in parts if t == 8 or t * self.token_bytes <= size)

    @property
    def warp_sums_bytes(self) -> int:
        """Shared memory of the sums of the warps that have the same index among those that share K."""
        return self.sum_tokens * self.sum_stride * 4

    @property
    def squares_offset(self) -> int:
        """Where the sum of the squares of x is, if there is one: in the last word."""
        return self.shared_bytes - 4

    @property
    def square_parts(self) -> int:
        """Partial sums of squares that a program with a residual leaves: those of each warp with outputs."""
        return min(self.warps, -(-self.rows // 32))
