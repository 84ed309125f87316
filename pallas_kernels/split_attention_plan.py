"""What a launch of `split_attention` is: which cases it takes, its programs and its shared memory."""

import dataclasses

from pallas_kernels.attention_stages import AttentionCase
from pallas_kernels.target import Target

WARPS = 4
TILE = 16  # slots
_MAX_GROUP = 16  # query heads that share a key-value head: rows of the tensor cores' instruction
_PROGRAMS = 2  # that a multiprocessor runs at once, by their registers


@dataclasses.dataclass(frozen=True)
class Case(AttentionCase):
    """What is static about a launch.

    Attributes:
        window: slots that a token sees, its own included; None for all.
    """

    window: int | None = None

    @property
    def chunks(self) -> int:
        """Runs of 8 elements that a lane has of a query or a key."""
        return self.dim // 32

    @property
    def blocks(self) -> int:
        """Runs of 8 elements that a lane has of a value."""
        return self.dim // 64

    @property
    def halves(self) -> int:
        """Rows of a lane: query head g, and g + 8 if there are more than 8."""
        return 2 if self.group > 8 else 1

    @property
    def pairs_offset(self) -> int:
        """Where in shared memory the warps' peaks and totals are, after their sums."""
        return WARPS * 4 * self.group * self.dim

    @property
    def shared_bytes(self) -> int:
        """Shared memory of a program."""
        return self.pairs_offset + WARPS * 8 * self.group

    def unsupported_reason(self, target: Target) -> str | None:
        """Why the kernel does not take the case, or None."""
        if target.unknown:
            return target.unknown
        if (reason := self.unsupported_shape((64, 128), 4 * TILE)) is not None:
            return reason
        if self.group > _MAX_GROUP:
            return f"{self.group} query heads a key-value head are more than {_MAX_GROUP}"
        if self.capacity * self.dim >= 2**30:
            return f"{self.capacity} slots of {self.dim} elements are not below 2**30"
        return None

    def splits(self, batch: int, target: Target) -> int:
        """Programs that share a key-value head: as many as run at once, each with a tile a warp at least."""
        seen = min(self.capacity, self.window or self.capacity)
        capacity = max(1, _PROGRAMS * target.multiprocessors // (batch * self.kv_heads))
        return max(1, min(capacity, seen // (WARPS * TILE)))
