"""Which arithmetic a product in the program of `ring` has, where there are several products in a launch."""

from collections.abc import Sequence

from pallas_kernels import integer, integer_two, ring_product, stream
from pallas_kernels.case import Case
from pallas_kernels.ring_plan import Config
from pallas_kernels.target import Target

# Consumer warps by bits (4 and 8 on an H100), and where all products are sums of integers: as many as there is
# room for. Blocks of a program's tiles fill fewer slots then: those of a layer of Qwen3-8B at 1 bit fill 8
# slots of 24, where they fill 12 of 22.
WORKERS = {1: 24, 2: 16, 4: 24, 8: 24}
_WORKERS_OF_INTEGERS = 24


def config(products: Sequence[Case], target: Target) -> Config:
    """W and P for a GPU, of which each multiprocessor has a program."""
    workers = WORKERS[products[0].bits]
    if all(of(case, _WORKERS_OF_INTEGERS) is integer_two.Product for case in products):
        workers = _WORKERS_OF_INTEGERS
    return Config(workers, target.multiprocessors)


def of(case: Case, workers: int) -> type[ring_product.Product]:
    """What multiplies by the weight."""
    if case.bits == 1:
        return integer.Product
    if integer_two.unsupported_product(case, workers) is None:
        return integer_two.Product
    return stream.Product


def unsupported_product(case: Case, workers: int, programs: int) -> str | None:
    """Why no arithmetic takes a product, or None."""
    if case.bits == 1:
        return integer.unsupported_product(case, workers)
    if of(case, workers) is integer_two.Product:
        return None
    return stream.unsupported_product(case, workers, programs)
