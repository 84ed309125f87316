"""Runs that share a GPU: they make their cases side by side, and each measures alone."""

import contextlib
import fcntl  # of POSIX systems alone
import os
import time
from collections.abc import Iterator
from pathlib import Path

# Who has measured waits so long before making the next case: those that wait for their turn come first.
_PAUSE = 0.1


class Turns:
    """A lock on a file that several runs have open, each until it ends.

    A run that makes a case (compiles, draws weights, checks results) shares it with others that do. A run
    that measures has it alone: nothing else of these runs is on the GPU then.

    Args:
        path: the file; it is made where there is none, and holds nothing.
    """

    def __init__(self, path: Path):
        self._file = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        self._held = fcntl.LOCK_UN

    @contextlib.contextmanager
    def making(self) -> Iterator[None]:
        """Within it other runs may make cases, and none measures."""
        time.sleep(_PAUSE)
        with self._holding(fcntl.LOCK_SH):
            yield

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """Within it other runs do neither. Inside of `making` it interrupts that: others may measure before."""
        with self._holding(fcntl.LOCK_EX):
            yield

    @contextlib.contextmanager
    def _holding(self, lock: int) -> Iterator[None]:
        # The lock that is held is let go of before the other kind is waited for, so that two runs that make
        # cases and want to measure do not wait for each other.
        before = self._held
        fcntl.flock(self._file, lock)
        self._held = lock
        try:
            yield
        finally:
            self._held = before
            fcntl.flock(self._file, before)
