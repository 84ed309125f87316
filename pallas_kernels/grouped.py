"""Products of consecutive rows with stacked weights, in one launch: which configuration they take."""

from typing import Any

from jax import Array

from pallas_kernels import mosaic_matmul, target
from pallas_kernels.case import Arrays, Case
from pallas_kernels.mosaic_matmul import Config

# By the rows that a matrix has on average: few rows are bound by reading codes, many by the tensor cores.
_CONFIGS = (
    (8, Config(16, 1, 4, 16, 3)),
    (24, Config(32, 1, 4, 16, 3)),
    (48, Config(64, 2, 1, 8, 3)),
    (160, Config(128, 2, 1, 8, 2)),
    (None, Config(256, 2, 1, 4, 2)),
)


def configuration(case: Case, groups: int, gpu: target.Target) -> tuple[Config | None, str]:
    """The configuration of a grouped product; or None and why there is none.

    Args:
        case: the product of one matrix and all rows.
        groups: E.
        gpu: what it runs on.
    """
    mean = case.m / max(1, min(groups, case.m))
    fitting = [config for rows, config in _CONFIGS if rows is None or mean <= rows]
    reasons = []
    # One with fewer tokens a program needs less shared memory.
    for config in (fitting[0], *(config for _, config in reversed(_CONFIGS))):
        reason = mosaic_matmul.unsupported_reason(case, config, gpu)
        if reason is None:
            return config, ""
        reasons.append(reason)
    return None, reasons[0]


def unsupported_reason(w: Arrays, **weight: Any) -> str | None:
    """Why `grouped_matmul` has no kernel for a product, or None; arguments as there, or shapes and dtypes."""
    case = Case.of(w, **weight)
    return configuration(case, w.packed.shape[0], target.current())[1] or None


def grouped_matmul(w: Arrays, group_sizes: Array, **weight: Any) -> Array:
    """Multiplies each run of consecutive rows by the matrix of its group, in one launch.

    Args:
        w: x [M, K], and with a leading axis E the planar weights, scales, codebooks and biases or None.
        group_sizes: int32 [E], rows of each group; rows past their sum get 0.
        weight: bits, group_size, out_features (N) and out_dtype.

    Returns:
        y [M, N].

    Raises:
        NotImplementedError: there is no kernel for the product, see `unsupported_reason`.
    """
    case = Case.of(w, **weight)
    config, reason = configuration(case, w.packed.shape[0], target.current())
    if config is None:
        raise NotImplementedError(f"no kernel multiplies all groups in one launch: {reason}")
    return mosaic_matmul.matmul(case, config, w, group_sizes)
