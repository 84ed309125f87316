"""Memory with gaps between operands: every access lies within one, and what is read-only stays as it is."""

import bisect
import dataclasses
import operator
from collections.abc import Iterator
from typing import Any

import numpy as np

from emulator.source import Fault

_GAP = 4096  # unmapped bytes between operands
_ALL = {size: int.from_bytes(bytes([1] * size), "little") for size in (1, 2, 4, 8)}  # of a word


@dataclasses.dataclass
class _Region:
    """An operand's bytes, from an address on; which were loaded as constants, and which stored.

    Of shared memory those that are defined are known.
    """

    start: int
    data: np.ndarray
    constant: np.ndarray
    stored: np.ndarray
    known: np.ndarray | None

    def words(self, array: np.ndarray, size: int) -> np.ndarray:
        """One of these as words of `size` bytes, without a last one that is not whole."""
        return array[: array.size // size * size].view(f"u{size}")


_START = operator.attrgetter("start")


class Memory:
    """An address space."""

    def __init__(self) -> None:
        """Starts without operands."""
        self._regions: list[_Region] = []  # by their addresses
        self._next = _GAP

    def share(self, size: int, start: int) -> None:
        """Adds bytes of shared memory, which are undefined as yet, at an address."""
        constant, stored, known = np.zeros((3, size), bool)
        data = np.full(size, 0xAB, np.uint8)
        self._regions.append(_Region(start, data, constant, stored, known))

    def map(self, array: np.ndarray) -> int:
        """Puts an array (contiguous; it is written to itself) into memory, and returns its address."""
        start = self._next
        if not array.flags.c_contiguous:
            raise ValueError(f"an operand of strides {array.strides} is not contiguous: copy it")
        data = array.reshape(-1).view(np.uint8)
        constant, stored = np.zeros((2, data.size), bool)
        for other in self._regions:  # the same array as another operand
            if other.data.ctypes.data == data.ctypes.data and other.data.size == data.size:
                constant, stored = other.constant, other.stored
        self._regions.append(_Region(start, data, constant, stored, None))
        self._next = -(-(start + data.size) // _GAP) * _GAP + _GAP
        return start

    def load(
        self, addresses: np.ndarray, size: int, constant: bool = False
    ) -> tuple[np.ndarray, np.ndarray]:
        """Values of `size` bytes, and which are defined; a `constant` may never be stored to."""
        values, known = np.zeros(addresses.shape, np.uint64), np.ones(addresses.shape, bool)
        for inside, region, indices in self._find(addresses, size):
            values[inside] = region.words(region.data, size)[indices]
            if constant:
                if region.words(region.stored, size)[indices].any():
                    raise Fault("ld.global.nc reads what this kernel has written")
                region.words(region.constant, size)[indices] = _ALL[size]
            if region.known is not None:
                known[inside] = region.words(region.known, size)[indices] == _ALL[size]
        return values, known

    def store(
        self, addresses: np.ndarray, size: int, values: np.ndarray, known: np.ndarray | None = None
    ) -> None:
        """Stores values of `size` bytes, defined where `known`; in global memory they have to be."""
        for inside, region, indices in self._find(addresses, size):
            if region.words(region.constant, size)[indices].any():
                raise Fault("a store changes what ld.global.nc has read as a constant")
            region.words(region.stored, size)[indices] = _ALL[size]
            defined = True if known is None else known[inside]
            if region.known is not None:
                region.words(region.known, size)[indices] = np.where(defined, _ALL[size], 0)
            elif not np.all(defined):
                raise Fault("a store of undefined values: they come from what was never written")
            data = region.words(region.data, size)
            data[indices] = values[inside].astype(data.dtype)

    def _find(self, addresses: np.ndarray, size: int) -> Iterator[tuple[Any, _Region, np.ndarray]]:
        """For each region that some of the addresses are in: which, the region, and their indices there."""
        if not addresses.size:
            return
        if np.bitwise_or.reduce(addresses, axis=None) % size:
            raise Fault(f"misaligned: {size} bytes at {addresses[addresses % size != 0][:4]}")
        at = bisect.bisect_right(self._regions, addresses.min(), key=_START)
        region = self._regions[max(at - 1, 0)]
        if at and addresses.max() + size <= region.start + region.data.size:  # as nearly always
            yield ..., region, (addresses - region.start) // size
            return
        found = np.zeros(addresses.shape, bool)
        for region in self._regions:
            end = region.start + region.data.size
            inside = (addresses >= region.start) & (addresses + size <= end)
            if inside.any():
                found |= inside
                yield inside, region, (addresses[inside] - region.start) // size
        if not found.all():
            raise Fault(f"outside of all operands: {size} bytes at {addresses[~found][:4]}")
