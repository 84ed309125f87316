"""The kernel for one row of x and codes of one bit: a launch of `ring` whose arithmetic is sums of integers."""

from pallas_kernels import integer_one, integer_quarters, ring
from pallas_kernels.case import Case
from pallas_kernels.ring_plan import unsupported_groups
from pallas_kernels.target import Target

Config = ring.Config
grid = ring.grid
_WORKERS_OF_QUARTERS = 16


def arithmetic(case: Case) -> type[integer_one.Product]:
    """What multiplies by the weight: groups that are quarters of a plane have an arithmetic of their own."""
    is_small = case.group_size == integer_quarters.GROUP
    return integer_quarters.Product if is_small else integer_one.Product


def for_groups(case: Case, config: Config, target: Target) -> Config:
    """A configuration that was measured in groups of 64 for those of a case.

    Quarters of planes take so many registers that a multiprocessor has one program. H200, 2026-12-01, by 16, 20
    and 24 warps and by two programs of 12: 4096 x 4096 4.5, 4.7, 4.7, 5.7 us; 8192 x 8192 8.8, 9.3, 9.5, 11.6.
    """
    is_small = case.group_size == integer_quarters.GROUP
    return Config(_WORKERS_OF_QUARTERS, target.multiprocessors) if is_small else config


def unsupported_reason(case: Case, config: Config, target: Target) -> str | None:
    """Why the kernel does not take a case, or None."""
    reason = unsupported_product(case, config.workers)
    return reason or ring.unsupported_reason(case, config, target, arithmetic(case))


def unsupported_product(case: Case, workers: int) -> str | None:
    """Why the arithmetic does not take a case, or None."""
    if case.bits != 1 or case.m != 1 or case.group_size < integer_quarters.GROUP:
        return (
            f"{case.m} tokens, {case.bits} bits in groups of {case.group_size} are not 1, 1 and"
            f" {integer_quarters.GROUP} or more"
        )
    return unsupported_groups(case, workers)


def squares(case: Case, config: Config, target: Target) -> int:
    """How many partial sums of squares a case with a residual leaves."""
    del target
    return ring.squares(case, config, arithmetic(case))


def source(case: Case, config: Config, target: Target) -> str:
    """The kernel's PTX."""
    return ring.source(case, config, target, arithmetic(case))
