"""How much random input a test looks at, and until when: `make fuzz` sets both."""

import functools
import os
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

RANDOM = "FDK_FUZZ_ROUNDS" in os.environ
ROUNDS = int(os.environ.get("FDK_FUZZ_ROUNDS", "1"))
DEADLINE = time.monotonic() + float(os.environ.get("FDK_FUZZ_SECONDS", "inf"))


def over() -> bool:
    """Whether the time for random input is over."""
    return time.monotonic() > DEADLINE


def rounds(count: int, least: int = 1) -> Iterator[int]:
    """0, 1, ... to count; no more than `least` of them once the time is over."""
    for i in range(count):
        if i >= least and over():
            return
        yield i


def until_over(test: Any) -> Any:
    """A test of hypothesis that ends, as skipped, once the time is over: its examples so far have passed.

    Examples that return early would draw less than hypothesis knows of them, which it calls flaky.
    """
    inner: Callable = test.hypothesis.inner_test

    @functools.wraps(inner)
    def run(*args: Any, **kwargs: Any) -> None:
        if over():
            pytest.skip("the time for random input is over; what was drawn before passed")
        inner(*args, **kwargs)

    test.hypothesis.inner_test = run
    return test
