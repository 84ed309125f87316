"""Arrays in the host's memory on their way to a device, and threads that work on parts of them."""

import ctypes
import os
import sys
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import numpy as np

_ALIGNMENT = 64  # of arrays that XLA takes on a CPU without a copy
_MOST_THREADS = 16
Item = TypeVar("Item")
_of_thread = threading.local()


def native(array: Item) -> Item:
    """A numpy array in the machine's order of bytes, which JAX asks for; anything else as it is."""
    if isinstance(array, np.ndarray) and not array.dtype.isnative:
        return array.astype(array.dtype.newbyteorder("="))
    return array


def aligned(size: int) -> np.ndarray:
    """Bytes uint8 [size] of any values, which `jax.device_put` need not copy on a CPU."""
    whole = np.empty(size + _ALIGNMENT, np.uint8)
    first = -whole.ctypes.data % _ALIGNMENT
    return whole[first : first + size]


def scratch(size: int, name: str = "scratch") -> np.ndarray:
    """Bytes uint8 [size] of any values, a thread's own of that name: to touch new memory takes longer."""
    found = getattr(_of_thread, name, None)
    if found is None or found.size < size:
        found = aligned(size)
        setattr(_of_thread, name, found)
    return found[:size]


def return_freed_memory() -> None:
    """To the system: glibc's heaps of threads, XLA's compiler's among them, keep what they freed."""
    if sys.platform == "linux" and (trim := getattr(ctypes.CDLL(None), "malloc_trim", None)):
        trim(0)


def threads() -> int:
    """How many threads work on arrays: the processors of this process, 16 at most."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return min(_MOST_THREADS, count or 1)


def on_threads(function: Callable[[Item], object], items: Iterable[Item]) -> None:
    """Calls a function, which does not hold the interpreter's lock, with each of the items."""
    items = list(items)
    if len(items) < 2 or threads() == 1:
        for item in items:
            function(item)
        return
    with ThreadPoolExecutor(min(threads(), len(items))) as pool:
        list(pool.map(function, items))
