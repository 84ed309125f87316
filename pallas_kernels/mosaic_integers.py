"""Products of many rows of x with 8-bit integers on both sides, by the Mosaic GPU kernel: see `mosaic_kernel`.

    x[m, k] = X[m, k] a[m]          w[n, k] = W[n, k] b[n]          y[m, n] = a[m] b[n] (X W^T)[m, n]

X and W are integers from -127 to 127, a and b float32. A row of x is divided by its largest magnitude; the
values of a row of the weight, scales included, by the largest that the row could have. The sums are exact
(int32), so that what is lost is the rounding of x and of w, each by half a step of its row at most.
"""

import dataclasses
import itertools
import math

import jax.numpy as jnp
from jax import Array

from pallas_kernels import mosaic_matmul, rounding
from pallas_kernels.case import Arrays, Case
from pallas_kernels.mosaic_matmul import Config
from pallas_kernels.rounding import LARGEST, RUN
from pallas_kernels.target import Target, current

MIN_TOKENS = 192  # below, the exact kernels are as fast


def integer_case(case: Case) -> Case:
    """The product as the kernel sees it: x of integers, scales relative to their row."""
    return dataclasses.replace(
        case, x_dtype=jnp.dtype(jnp.int8), scale_dtype=jnp.dtype(jnp.float16)
    )


def unsupported_reason(case: Case, config: Config, target: Target) -> str | None:
    """Why the kernel does not take a case, whose x is of halves, or None."""
    if case.k % RUN:
        return f"k={case.k} is no multiple of {RUN}"
    if config.k_groups * config.splits * config.cluster > 1 or config.programs:
        return "programs and warpgroups do not share K or x"
    if (reason := mosaic_matmul.unsupported_reason(case, config, target)) is not None:
        return reason
    needed = mosaic_matmul.shared_bytes(integer_case(case), config)
    return target.lacks_shared_memory(config, needed)


def choose(case: Case, target: Target) -> tuple[Config | None, str]:
    """The configuration for a case whose arithmetic allows integers, or None and why there are none."""
    if case.m < MIN_TOKENS:
        return None, f"{case.m} tokens are as fast without"
    config = guess(case, target)
    return config, "" if config else str(unsupported_reason(case, Config(256, 2, 1, 4, 2), target))


def guess(case: Case, target: Target) -> Config | None:
    """The configuration that should be fastest, by a count of programs and lines of x; None if none runs."""
    tokens = mosaic_matmul.even_tokens(case.m)
    configs = (Config(t, 2, 1, s, 2) for t, s in itertools.product(tokens, (6, 4, 3)))
    found = [c for c in configs if not unsupported_reason(case, c, target)]

    def microseconds(config: Config) -> float:
        programs = math.ceil(case.m / config.tokens) * math.ceil(case.n / config.rows)
        lines = math.ceil(case.k / mosaic_matmul.columns(integer_case(case)))
        line_us = max(0.3, 0.6 * config.tokens / 256)
        return math.ceil(programs / target.multiprocessors) * (6 + lines * line_us)

    return min(found, key=lambda c: (microseconds(c), -c.x_stages), default=None)


def matmul(case: Case, config: Config, arrays: Arrays) -> Array:
    """X [M, K] of halves times the transpose of a planar weight, both rounded to integers: [M, N]."""
    from pallas_kernels import mosaic_kernel  # Mosaic GPU does not load on every platform

    arrays, factors = rounded(case, arrays, case.m + -case.m % config.tokens)
    return mosaic_kernel.matmul(integer_case(case), config, arrays, factors=factors)


def rounded(case: Case, arrays: Arrays, rows: int) -> tuple[Arrays, tuple[Array, Array]]:
    """What the kernel multiplies: x, scales and codebook from `integers` and `relative`; the factors.

    Args:
        case: the product.
        arrays: as `matmul` has them.
        rows: of which x has factors, M at least.
    """
    codebooks = arrays.codebook.reshape(case.codebooks, -1)
    if current().has_pallas and case.k <= rounding.MAX_FEATURES:
        x, of_x = rounding.integers(arrays.x, rows)
        scales, table, of_rows = rounding.relative(case, arrays.scales, codebooks)
    else:
        x, of_x = integers(arrays.x)
        of_x = jnp.pad(of_x, (0, rows - case.m))
        scales, table, of_rows = relative(case, arrays.scales, codebooks)
    return arrays._replace(x=x, scales=scales, codebook=table), (of_x, of_rows)


def integers(x: Array) -> tuple[Array, Array]:
    """Integers of x [M, K] in the order in which a lane decodes weights, and the factors of its rows [M].

    A row that is not finite has a factor that is not, and so have its results.
    """
    m, k = x.shape
    values = x.astype(jnp.float32)
    largest = jnp.abs(values).max(axis=1)
    factors = jnp.where(largest == 0, 1.0, largest / LARGEST)
    # Whether a maximum is NaN where a value is depends on the compiler.
    factors = jnp.where(jnp.isfinite(values).all(axis=1), factors, jnp.nan)
    rounded = jnp.round(values / factors[:, None]).astype(jnp.int8)
    # A lane has columns 8 c to 8 c + 7, where the operand has 4 c to 4 c + 3 and 16 + 4 c to 16 + 4 c + 3.
    runs = rounded.reshape(m, k // RUN, 4, 2, 4)
    return runs.swapaxes(2, 3).reshape(m, k), factors


def relative(case: Case, scales: Array, codebook: Array) -> tuple[Array, Array, Array]:
    """Scales times 127 over the largest of their row, codebooks over their largest value, rows' factors."""
    levels = codebook.reshape(case.codebooks, -1)
    peaks = jnp.abs(levels).max(axis=1)
    peaks = jnp.where(peaks == 0, 1.0, peaks)
    # Of a tile and four groups: row g, group, and whether it is row g + 8; see `fdk_jax.format.packing`.
    values = scales.astype(jnp.float32).reshape(case.tiles, -1, 8, 4, 2)
    largest = jnp.abs(values).max(axis=(1, 3))
    largest = jnp.where(largest == 0, 1.0, largest)
    by_row = values * (LARGEST / largest)[:, None, :, None, :]
    factors = (largest / LARGEST).swapaxes(1, 2).reshape(-1)[: case.n]
    factors = factors * jnp.repeat(peaks, case.n // case.codebooks)
    return by_row.astype(jnp.float16).reshape(scales.shape), levels / peaks[:, None], factors
