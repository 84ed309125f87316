"""Float matrices that are used in this host's memory: several threads read them, and turn them to kernels."""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import numpy as np

from fdk_jax.files.contents import Stored
from fdk_jax.format.host_arrays import aligned, scratch

Each = Callable[[Callable[[int], None], Iterable[int]], None]

_RUN_BYTES = 2 << 20  # that a thread reads at a time, so that they stay in a cache


def are_used() -> bool:
    """Whether the device's arrays lie where files are read to."""
    return jax.default_backend() == "cpu"


def read(stored: Stored, each: Each) -> np.ndarray:
    """A float array.

    Args:
        stored: with `rows`.
        each: calls a function with each of some items, in threads.
    """
    first = stored.some(0, 1)
    target = aligned(math.prod(stored.shape) * first.itemsize)
    rows = target.reshape(stored.shape[0], -1)

    def fill(begin: int, end: int) -> None:
        run = rows[begin:end]
        found = stored.some(begin, end, run.reshape(-1))
        if not np.may_share_memory(found, run):
            run[:] = np.ascontiguousarray(found).view(np.uint8).reshape(run.shape)

    _by_rows(stored, each, fill)
    return target.view(first.dtype).reshape(stored.shape)


def read_kernel(parts: Sequence[Stored], dtype: Any, each: Each) -> np.ndarray | None:
    """The kernel [K, N] of float matrices [n_i, K].

    None where arrays of this memory are not used, and for matrices of another dtype: XLA casts those.

    Args:
        parts: with `rows`.
        dtype: of the kernel.
        each: see `read`.
    """
    dtype = np.dtype(dtype)
    if not are_used() or {part.some(0, 1).dtype for part in parts} != {dtype}:
        return None
    n, k = sum(part.shape[0] for part in parts), parts[0].shape[1]
    bits = np.dtype(f"u{dtype.itemsize}")  # numpy copies its own dtypes faster
    target, first = aligned(n * k * dtype.itemsize).view(bits).reshape(k, n), 0
    for part in parts:
        columns, first = target[:, first : first + part.shape[0]], first + part.shape[0]

        def turn(begin: int, end: int, columns: np.ndarray = columns, part: Stored = part) -> None:
            rows = part.some(begin, end, scratch((end - begin) * k * dtype.itemsize, "run"))
            columns[:, begin:end] = rows.view(bits).T

        _by_rows(part, each, turn)
    return target.view(dtype)


def _by_rows(stored: Stored, each: Each, function: Callable[[int, int], None]) -> None:
    """Calls a function with runs of rows [begin, end) of a float matrix."""
    runs = stored.runs(_RUN_BYTES)
    each(lambda index: function(*runs[index]), range(len(runs)))
