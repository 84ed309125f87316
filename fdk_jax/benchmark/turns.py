"""Runs that share a GPU: they use it side by side to make their cases, and each measures alone."""

import contextlib
import fcntl  # of POSIX systems alone
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path


class Turns:
    """A lock on a file that several runs have open, each until it ends.

    A run that needs the GPU to make a case (copies weights, checks results) shares it with others that do.
    A run that measures has it alone: nothing else of these runs is on the GPU then. What needs a processor
    only (compiling, drawing weights) needs no lock.

    Args:
        path: the file; it and one beside it are made where there are none. It holds what runs told each other.
    """

    def __init__(self, path: Path):
        self._file, self._door = (
            os.open(name, os.O_RDWR | os.O_CREAT, 0o666) for name in (path, f"{path}.door")
        )
        self._held = fcntl.LOCK_UN

    def using(self) -> contextlib.AbstractContextManager[None]:
        """Within it other runs may use the GPU, and none measures."""
        return self._holding(fcntl.LOCK_SH)

    def alone(self) -> contextlib.AbstractContextManager[None]:
        """Within it no other run uses the GPU. Inside of `using` it interrupts that."""
        return self._holding(fcntl.LOCK_EX)

    def once(self, name: str, measure: Callable[[], list[float]]) -> list[float]:
        """What one run measures, alone, for all of them; the others read it."""
        with self.alone():
            found = json.loads(os.pread(self._file, 1 << 20, 0) or b"{}")
            if name not in found:
                found[name] = measure()
                os.pwrite(self._file, json.dumps(found).encode(), 0)
            return found[name]

    @contextlib.contextmanager
    def _holding(self, lock: int) -> Iterator[None]:
        before = self._held
        self._take(lock)
        try:
            yield
        finally:
            self._take(before)

    def _take(self, lock: int) -> None:
        # What is held is let go of first, so that two runs that share the lock and want to measure do not
        # wait for each other.
        fcntl.flock(self._file, fcntl.LOCK_UN)
        self._held = fcntl.LOCK_UN
        if lock == fcntl.LOCK_UN:
            return
        # Who waits for the lock keeps the door shut: a lock that is shared would be granted to others again
        # and again, and who wants it alone would never get it.
        fcntl.flock(self._door, fcntl.LOCK_EX)
        try:
            fcntl.flock(self._file, lock)
            self._held = lock
        finally:
            fcntl.flock(self._door, fcntl.LOCK_UN)
