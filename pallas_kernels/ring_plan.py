"""What a launch with a ring is: its configuration, its products and its shared memory, before any PTX.

See `ring` for how it works, and for W and P.
"""

import abc
import dataclasses
import functools
from typing import ClassVar

import jax.numpy as jnp

from pallas_kernels.case import Case
from pallas_kernels.layout import FOUR_SCALES, TILE_ROWS
from pallas_kernels.target import Target

BARRIER = 8  # bytes of a barrier
BARRIERS = 2 * BARRIER  # those of a slot


@dataclasses.dataclass(frozen=True)
class Config:
    """Launch configuration: W and P of the glossary of `ring`, and who copies into the ring.

    Attributes:
        consumers: W.
        programs: P.
        lane_copies: whether the lanes of the producer warp copy 16 bytes each where the GPU has bulk copies,
            too; where it has none they always do.
    """

    consumers: int = 16
    programs: int = 132
    lane_copies: bool = False
    cluster: ClassVar[int] = 1
    rows: ClassVar[int] = TILE_ROWS  # at whose multiples the codebook may change

    @property
    def warps(self) -> int:
        """Warps of a program: the consumers and the producer."""
        return self.consumers + 1

    def copies_in_bulk(self, target: Target) -> bool:
        """Whether one lane of the producer warp starts bulk copies; else each lane copies its part."""
        return target.has_bulk_copies and not self.lane_copies


@dataclasses.dataclass(frozen=True, kw_only=True)
class ProductPlan(abc.ABC):
    """One product of a launch; the arithmetic (`integer`, `stream`) adds what it has in shared memory.

    Attributes:
        case: what is static about it; with `gated`, N rows of the gate are followed by N others.
        consumers: W.
        programs: P.
        position: its index among the launch's products.
        gated: whether an output is the product of a row of the second half and of the SiLU of the first's.
    """

    # Slots copied before the outputs of the product before it are in memory.
    ahead: ClassVar[int] = 2

    case: Case
    consumers: int
    programs: int
    position: int = 0
    gated: bool = False

    @abc.abstractmethod
    def areas(self) -> dict[str, int]:
        """Names and bytes of what it has in shared memory besides "partial" and "squares"."""

    @property
    def runs(self) -> int:
        """Ranges of rows: that of the gate and that of what it lets through, or one."""
        return 2 if self.gated else 1

    @property
    def run_tiles(self) -> int:
        """Tiles of a run."""
        return self.case.tiles // self.runs

    @property
    def max_tiles(self) -> int:
        """Tiles of a program of each run, or one less."""
        return -(-self.run_tiles // self.programs)

    @property
    def scale_bytes(self) -> int:
        """Bytes of a scale."""
        return jnp.dtype(self.case.scale_dtype).itemsize

    @property
    def keeps_scales(self) -> bool:
        """Whether the scales of all rows of a program are in shared memory, instead of in slots."""
        return _splits_fours(self.case, self.consumers)

    @property
    def tile_scales(self) -> int:
        """Bytes of a tile's scales, as the planar layout has them."""
        return self.case.scale_fours * FOUR_SCALES * self.scale_bytes

    @property
    def kept_scales(self) -> int:
        """Bytes of the scales that are kept of a run."""
        return self.max_tiles * self.tile_scales if self.keeps_scales else 0

    @property
    def scales_name(self) -> str:
        """The area of the scales that it keeps, its own for the same reason as that of its codebooks."""
        return f"scales{self.position}"

    @property
    def block_scales(self) -> int:
        """Bytes of a block's scales in a slot; blocks that share a group have each its part of them."""
        if self.keeps_scales:
            return 0
        return self.case.span * TILE_ROWS * self.scale_bytes // self.case.group_size

    @property
    def codes_bytes(self) -> int:
        """Bytes of a slot's codes; its scales follow them."""
        return self.consumers * self.case.tile_bytes

    @property
    def slot_bytes(self) -> int:
        """Bytes of a slot of the ring: a block of each consumer."""
        return self.codes_bytes + self.consumers * self.block_scales

    @property
    def slots(self) -> int:
        """Slots that a program fills in all, at most."""
        return self.runs * -(-self.max_tiles * self.case.blocks // self.consumers)

    @property
    def tokens(self) -> int:
        """Tokens that a tile has sums of."""
        return self.case.m

    @property
    def tile_bytes(self) -> int:
        """Shared memory of a tile's sums of each token, warp and row."""
        return self.tokens * self.consumers * TILE_ROWS * 4

    @property
    def partial_bytes(self) -> int:
        """Shared memory of the sums of all runs and tiles."""
        return self.runs * self.max_tiles * self.tile_bytes

    @property
    def square_parts(self) -> int:
        """Partial sums of squares that a program leaves: those of each warp with outputs, a tile's."""
        return min(self.consumers, self.max_tiles)

    @property
    def codebooks_name(self) -> str:
        """The area of its codebooks, its own: all are fetched at the start, later they would queue up."""
        return f"codebooks{self.position}"


def unsupported_groups(case: Case, consumers: int) -> str | None:
    """Why the scales of a product's groups are neither copied with its blocks nor kept, or None.

    Those of four groups are interleaved: each tile and each slot must begin with such a four, or the scales of
    all rows are kept, if groups are whole blocks or rows.
    """
    g, span = case.group_size, case.span
    if g >= span and (g % span == 0 or g >= case.k):
        return None
    if span % g:
        return f"groups of {g} are neither whole blocks of {span} nor parts of one"
    if _splits_fours(case, consumers):
        return f"{case.k} weights a row, {consumers} blocks of {span} at a time, split fours of groups of {g}"
    return None


def _splits_fours(case: Case, consumers: int) -> bool:
    """Whether not every tile and every slot begins with a four of groups."""
    four = 4 * case.group_size
    return bool(case.blocks * case.span % four or consumers * case.span % four)


@dataclasses.dataclass(frozen=True)
class LaunchPlan:
    """The shared memory of a launch: areas, which the products share, then the ring.

    Attributes:
        products: with the same W, P and bytes of a slot.
        capacity: shared memory that a program may have.
        others: areas of what else the launch computes, or needs more of: names and bytes.
        rounds: how often it runs the products one after another.
        signals: barriers at which the producer waits for outputs, one for each product that another follows.
        bulk: see `Config.copies_in_bulk`.
    """

    products: tuple[ProductPlan, ...]
    capacity: int
    others: tuple[tuple[str, int], ...] = ()
    rounds: int = 1
    signals: int = 1
    bulk: bool = True

    @functools.cached_property
    def sizes(self) -> dict[str, int]:
        """Bytes of each area: what the product that needs most of it needs."""
        sizes: dict[str, int] = {}
        for product in self.products:
            areas = {**product.areas(), "partial": product.partial_bytes, "squares": 4}
            if product.keeps_scales:
                areas[product.scales_name] = product.runs * product.kept_scales
            if product.case.devices > 1:
                areas["peers"] = 8 * (1 + product.case.devices)
            for name, size in areas.items():
                sizes[name] = max(sizes.get(name, 0), size)
        for name, size in self.others:
            sizes[name] = max(sizes.get(name, 0), size)
        return sizes

    @functools.cached_property
    def offsets(self) -> dict[str, int]:
        """Where in shared memory each area is."""
        offsets, end = {}, 0
        for name, size in self.sizes.items():
            offsets[name] = end
            end += -(-size // 128) * 128
        return offsets

    @property
    def ring_start(self) -> int:
        """Where the ring starts, after the areas."""
        return sum(-(-size // 128) * 128 for size in self.sizes.values())

    @property
    def slots(self) -> int:
        """As many as the capacity holds, at most what a program fills; two at least."""
        slot_bytes = self.products[0].slot_bytes + BARRIERS
        free = (self.capacity - self.ring_start - BARRIER * self.signals) // slot_bytes
        filled = self.rounds * sum(product.slots for product in self.products)
        return max(2, min(free, filled))

    @property
    def barriers(self) -> int:
        """Where the barriers of the slots are: of each one that it is full, one that it is empty."""
        return self.ring_start + self.slots * self.products[0].slot_bytes

    @property
    def signalled(self) -> int:
        """Where the first barrier is at which the producer waits for a product's outputs."""
        return self.barriers + self.slots * BARRIERS

    @property
    def shared_bytes(self) -> int:
        """Shared memory of a program."""
        return self.signalled + self.signals * BARRIER
