"""The plan of a product by integers: which parts of shared memory it has, and how x is divided. No PTX."""

import dataclasses

from pallas_kernels.layout import HALF_PLANE, PLANE
from pallas_kernels.ring_plan import ProductPlan

PLANES = 4  # of which an operand has codes
CHUNK = 512  # x that a warp makes integers of at a time: two fours of planes
INTEGERS = 1024  # bytes of the integers of four planes of x: 8 words a lane
MIN_GROUP = HALF_PLANE  # whose sums are sums of whole instructions
CODEBOOK_BYTES = 8  # bytes of a codebook's first value and the step to the second


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan(ProductPlan):
    """A product by integers."""

    @property
    def parts(self) -> int:
        """Sums of a plane, each with a scale: one, or two halves, or four quarters."""
        return max(1, PLANE // self.case.group_size)

    @property
    def sums_bytes(self) -> int:
        """Shared memory of a plane's scale of x and sums of x."""
        return 8 * self.parts

    @property
    def fours(self) -> int:
        """Fours of planes of a block."""
        return self.case.planes // PLANES

    @property
    def chunks(self) -> int:
        """Parts of a token's x that a warp makes integers of at a time."""
        return self.case.blocks * self.case.span // CHUNK

    @property
    def sharers(self) -> int:
        """Warps that share a chunk of x: two, if there are as many for each one."""
        return 2 if self.case.m == 1 and 2 * self.chunks <= self.consumers else 1

    def areas(self) -> dict[str, int]:
        """Integers, scales and sums of x, and codebooks."""
        return {
            "integers": self.chunks * 2 * INTEGERS,
            "plane_sums": self.chunks * 2 * PLANES * self.sums_bytes,
            self.codebooks_name: self.case.codebooks * CODEBOOK_BYTES,
        }
