"""How much random input a test looks at, and until when: `make fuzz` sets both."""

import functools
import os
import time
from collections.abc import Iterator
from typing import Any

RANDOM = "FDK_FUZZ_ROUNDS" in os.environ
ROUNDS = int(os.environ.get("FDK_FUZZ_ROUNDS", "1"))
_SECONDS = float(os.environ.get("FDK_FUZZ_SECONDS", "inf"))
_began: list[float] = []


def begin() -> None:
    """The time for random input begins, when tests have been collected: that may take longer than it."""
    _began[:] = [time.monotonic()]


def over() -> bool:
    """Whether the time for random input is over."""
    return bool(_began) and time.monotonic() > _began[0] + _SECONDS


def rounds(count: int, least: int = 1) -> Iterator[int]:
    """0, 1, ... to count; no more than `least` of them once the time is over."""
    for i in range(count):
        if i >= least and over():
            return
        yield i


def in_rounds(test: Any) -> Any:
    """A test of hypothesis, repeated with other examples until the time is over, `ROUNDS` times at most.

    Its rounds are whole: examples that ended early would have drawn less than hypothesis knows of them.
    """

    @functools.wraps(test)
    def run(*args: Any, **kwargs: Any) -> None:
        for _ in rounds(ROUNDS):
            test(*args, **kwargs)

    return run
