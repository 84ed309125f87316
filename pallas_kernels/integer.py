"""One product of one token by sums of integers: `integer_one`, `_quarters`, `_two` or `_four`, by the codes."""

from pallas_kernels import integer_quarters, ring, ring_arithmetic
from pallas_kernels.case import Case
from pallas_kernels.ring_product import Product
from pallas_kernels.target import Target

Config = ring.Config
grid = ring.grid
_CONSUMERS_OF_QUARTERS = 16


def for_groups(case: Case, config: Config, target: Target) -> Config:
    """A configuration that was measured in groups of 64 for those of a case.

    Quarters of planes take so many registers that a multiprocessor has one program. H200, 2026-12-01, by 16, 20
    and 24 warps and by two programs of 12: 4096 x 4096 4.5, 4.7, 4.7, 5.7 us; 8192 x 8192 8.8, 9.3, 9.5, 11.6.
    """
    is_small = case.bits == 1 and case.group_size == integer_quarters.GROUP
    if not is_small:
        return config
    return Config(_CONSUMERS_OF_QUARTERS, target.multiprocessors, config.lane_copies)


def unsupported_reason(case: Case, config: Config, target: Target) -> str | None:
    """Why the kernel does not take a case, or None."""
    reason = ring_arithmetic.unsupported_integers(case, config.consumers)
    return reason or ring.unsupported_reason(case, config, target, _arithmetic(case, config))


def squares(case: Case, config: Config, target: Target) -> int:
    """How many partial sums of squares a case with a residual leaves."""
    del target
    return ring.squares(case, config, _arithmetic(case, config))


def source(case: Case, config: Config, target: Target) -> str:
    """The kernel's PTX."""
    return ring.source(case, config, target, _arithmetic(case, config))


def _arithmetic(case: Case, config: Config) -> type[Product]:
    return ring_arithmetic.of(case, config.consumers)
