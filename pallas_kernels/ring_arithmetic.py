"""Which arithmetic a product in the program of `ring` has."""

from collections.abc import Sequence

from pallas_kernels import (
    integer_four,
    integer_one,
    integer_quarters,
    integer_two,
    ring_product,
    stream,
)
from pallas_kernels.case import Case
from pallas_kernels.ring_plan import Config, ProductPlan, unsupported_groups
from pallas_kernels.target import Target

CONSUMERS = {2: 16, 4: 24, 8: 24}  # consumer warps of `stream` by bits (H100)
# Consumer warps of sums of integers: with more a thread has too few registers.
MIN_CONSUMERS, MAX_CONSUMERS = 15, 24
_ROUND = 4  # warps that one of the parts of a multiprocessor has more than another, if they are not whole fours


def config(products: Sequence[Case], target: Target, gated: int | None = None) -> Config:
    """W and P for a GPU, of which each multiprocessor has a program.

    Sums of integers have the fewest warps by which the blocks of all products fill the fewest slots, and with
    the producer whole fours of them, if that is possible. H200, 2026-11-30, a token of Qwen3-1.7B at 1 bit (5
    slots a layer by 12 warps or more) by 12 / 15 / 22 / 24 warps: 437 / 431 / 476 / 492 us; of 8B (12 slots by
    22 warps, 8 by 24) by 12 / 22 / 24: 955 / 895 / 879 us.

    Args:
        products: of the launch.
        target: the GPU.
        gated: the index of the product whose outputs are gated.
    """
    programs = target.multiprocessors
    if any(of(case, MAX_CONSUMERS) is stream.Product for case in products):
        return Config(CONSUMERS.get(products[0].bits, MAX_CONSUMERS), programs)

    def plans(consumers: int) -> list[ProductPlan]:
        return [
            of(case, consumers).plan_class(
                case=case, consumers=consumers, programs=programs, gated=index == gated
            )
            for index, case in enumerate(products)
        ]

    def slots(consumers: int) -> int:
        return sum(plan.slots for plan in plans(consumers))

    possible = [
        consumers
        for consumers in range(MIN_CONSUMERS, MAX_CONSUMERS + 1)
        if all(unsupported_integers(case, consumers) is None for case in products)
        and len({plan.slot_bytes for plan in plans(consumers)}) == 1
    ]
    if not possible:
        return Config(MAX_CONSUMERS, programs)
    fewest = min(map(slots, possible))
    best = [consumers for consumers in possible if slots(consumers) == fewest]
    whole = [consumers for consumers in best if (consumers + 1) % _ROUND == 0]
    return Config(min(whole or best), programs)


def of(case: Case, consumers: int) -> type[ring_product.Product]:
    """What multiplies by the weight; groups that are quarters of a plane have an arithmetic of their own."""
    if case.bits == 1:
        is_small = case.group_size == integer_quarters.GROUP
        return integer_quarters.Product if is_small else integer_one.Product
    if unsupported_integers(case, consumers) is not None:
        return stream.Product
    return integer_two.Product if case.bits == 2 else integer_four.Product


def unsupported_integers(case: Case, consumers: int) -> str | None:
    """Why a product is no sum of integers, or None."""
    if case.bits != 1:
        return integer_two.unsupported_product(case, consumers)
    if case.m != 1 or case.group_size < integer_quarters.GROUP:
        return (
            f"{case.m} tokens, 1 bit in groups of {case.group_size} are not 1 in groups of"
            f" {integer_quarters.GROUP} or more"
        )
    return unsupported_groups(case, consumers)


def unsupported_product(case: Case, consumers: int, programs: int) -> str | None:
    """Why no arithmetic takes a product, or None."""
    reason = unsupported_integers(case, consumers)
    if reason is None or case.bits == 1:
        return reason
    return stream.unsupported_product(case, consumers, programs)
