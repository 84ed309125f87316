"""Persistent kernels, one thread block a multiprocessor, that never pause reading: a token, chains of products.

At batch 1 memory is what there is to wait for, and it must never stand still. A program's rows of a weight are
one range of memory. A producer warp copies that to a ring in shared memory, as far ahead as its capacity
allows, from the first instruction on: in bulk where the GPU can and the configuration does not say otherwise,
else 16 bytes a lane at a time. Consumer warps prepare x, once a program, and multiply. How they do that is an
arithmetic, which `ring_arithmetic` chooses: sums of integers for one bit and for evenly spaced values
(`integer_one` and its like), else `stream`.

A launch may have several products, each with the outputs of the one before it as its x. Between two of them
is a grid barrier, a counter in memory, while the copies of what comes next go on; but stores queue up after
copies, so these are throttled: all but a few wait for the program's outputs. There are as many programs as
the device runs at once: more would never all arrive. The first launch finds the counters at zero, and each
leaves them so.

Glossary: W consumer warps (`Config.consumers`), P programs (`Config.programs`). A tile has 16 rows, a block
of it `Case.span` weights a row. A slot of the ring holds a block for each of the W warps. A run is a range of
rows; a product whose outputs are gated has two, those of the gate and those of what it lets through.
"""

from pallas_kernels.case import Case
from pallas_kernels.ring_launch import Launch
from pallas_kernels.ring_plan import Config, LaunchPlan, ProductPlan
from pallas_kernels.ring_product import Product
from pallas_kernels.target import Target

__all__ = ["Config", "grid", "source", "squares", "unsupported_chain", "unsupported_reason"]


def grid(case: Case, config: Config) -> tuple[int, int]:
    """Programs along N and M."""
    return min(config.programs, case.tiles), 1


def squares(case: Case, config: Config, arithmetic: type[Product]) -> int:
    """How many partial sums of squares a product with a residual leaves."""
    plan = _plan(case, config, arithmetic)
    return plan.programs * plan.square_parts


def source(case: Case, config: Config, target: Target, arithmetic: type[Product]) -> str:
    """The PTX of a launch with one product."""
    launch = _launch(case, config, target, arithmetic)
    return Launch(launch, [arithmetic(launch.products[0], target)]).write()


def unsupported_reason(
    case: Case, config: Config, target: Target, arithmetic: type[Product]
) -> str | None:
    """Why a launch with one product does not take a case, or None."""

    def shared_bytes() -> int:
        return _launch(case, config, target, arithmetic).shared_bytes

    return target.unknown or case.unsupported_reason(config, target, shared_bytes)


def unsupported_chain(config: Config, target: Target) -> str | None:
    """Why no launch of several products with a configuration runs on a GPU, or None: they copy in bulk."""
    if target.unknown or config.copies_in_bulk(target):
        return target.unknown or None
    if target.has_bulk_copies:
        return f"{config}: launches of several products copy in bulk"
    return f"{target.architecture} has no bulk copies, which are sm_90's and newer ones'"


def _launch(case: Case, config: Config, target: Target, arithmetic: type[Product]) -> LaunchPlan:
    plan, bulk = _plan(case, config, arithmetic), config.copies_in_bulk(target)
    return LaunchPlan((plan,), target.shared_bytes, bulk=bulk)


def _plan(case: Case, config: Config, arithmetic: type[Product]) -> ProductPlan:
    programs = grid(case, config)[0]
    return arithmetic.plan_class(case=case, consumers=config.consumers, programs=programs)
