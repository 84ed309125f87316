"""Timing of one compiled loop over rotating copies of a weight."""

import contextlib
import dataclasses
import functools
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from jax import Array

if TYPE_CHECKING:  # it needs a POSIX system
    from fdk_jax.benchmark.turns import Turns

Step = Callable[[Array, Any], Array]
# A measurement in the making: it yields a function that returns seconds, is sent the samples taken of
# it, and returns the keys of a row that say what came out.
Measurement = Generator[Callable[[], float], list[float], dict[str, Any]]


@dataclasses.dataclass(frozen=True)
class Session:
    """How to measure: what does not differ between the cases of a run.

    Attributes:
        repetitions: samples of each case.
        copies: copies of a weight; None for as many as caches cannot hold.
        max_seconds: a case whose samples have taken as long gets no more of them than ten.
        checked_rows: rows of a weight whose results are compared with float64, about so many; None for all.
        sample_seconds: about how long a sample takes; None for what the suite holds enough.
        turns: what runs on one GPU share: they use it side by side to make cases, and each measures alone.
    """

    repetitions: int = 20
    copies: int | None = None
    max_seconds: float = 20.0
    checked_rows: int | None = None
    sample_seconds: float | None = None
    turns: "Turns | None" = None

    def using(self) -> AbstractContextManager[None]:
        """Within it the device may be used: no other run that takes turns measures."""
        return self.turns.using() if self.turns else contextlib.nullcontext()

    def turn(self) -> AbstractContextManager[None]:
        """Within it no other run that takes turns uses the device."""
        return self.turns.alone() if self.turns else contextlib.nullcontext()


def loop_program(
    step: Step, x: Array, copies: Sequence[Any], *, loops: int, link_every: bool
) -> Callable[[Array, Sequence[Any]], Any]:
    """One program of `loops` passes over `copies`, each copy a call of `step`.

    The calls are unrolled in the body of a loop, since slices of stacked weights would be copied. Each
    pass depends on the one before and all results leave the program, so nothing is hoisted out of the
    loop or dropped. A result with the shape of the input is the next input, at no cost; any other hands
    over one element, which on a GPU costs a launch: `link_every` says whether every call of a pass does
    so, or only the last.

    Args:
        step: x [m, k], weight -> y [m, n].
        x: [m, k], the first input.
        copies: weights in separate buffers.
        loops: number of passes.
        link_every: whether XLA might otherwise run calls of a pass side by side.

    Returns:
        A function of `x` and `copies`, to be compiled; its results hold the output of every call of the
        last pass, or what became of `x` through all of them.
    """
    out = jax.eval_shape(step, x, copies[0])
    chained = (out.shape, out.dtype) == (x.shape, x.dtype)

    def one_pass(weights, _, carry):
        x, results = carry[0], []
        for i, weight in enumerate(weights):
            # The barrier makes a weight look new in each pass: no work on it alone is hoisted.
            x, weight = jax.lax.optimization_barrier((x, weight))
            y = step(x, weight)
            if chained:
                x = y
                continue
            results.append(y)
            if link_every or i == len(weights) - 1:
                x = jax.lax.dynamic_update_slice(x, y[:1, :1].astype(x.dtype), (0, 0))
        return x, results

    def program(x, weights):
        results = [] if chained else [jnp.zeros(out.shape, out.dtype) for _ in weights]
        return jax.lax.fori_loop(0, loops, functools.partial(one_pass, weights), (x, results))

    return program


def compile_loop(
    program: Callable[[Array, Sequence[Any]], Any], x: Array, weight: Any, copies: int
) -> Callable[[], float]:
    """Compiles a `loop_program`; returns a function that runs it and returns the seconds it took.

    The copies of the weight are made by its first call.
    """
    compiled = jax.jit(program).lower(x, (weight,) * copies).compile()
    weights: tuple[Any, ...] = ()

    def run() -> float:
        nonlocal weights
        if not weights:
            weights = tuple(jax.block_until_ready(copy_weight(weight, copies)))
        start = time.perf_counter()
        jax.block_until_ready(compiled(x, weights))
        return time.perf_counter() - start

    return run


def compiled_in_turn(lowered: jax.stages.Lowered, session: Session) -> jax.stages.Compiled:
    """The compiled program, made in this run's turn where XLA measures how to compute it: its own products.

    XLA remembers what it found: a later program with the same product is compiled without.
    """
    with session.turn() if "dot_general" in lowered.as_text() else contextlib.nullcontext():
        return lowered.compile()


def copy_weight(weight: Any, copies: int) -> list[Any]:
    """The weight and `copies - 1` more of it in buffers of their own."""
    return [weight, *(jax.tree.map(jnp.copy, weight) for _ in range(copies - 1))]


def seconds_of_call(function: Callable[[], Any]) -> float:
    """The least of three timed calls, waiting for the result."""
    times = []
    for _ in range(3):
        start = time.perf_counter()
        jax.block_until_ready(function())
        times.append(time.perf_counter() - start)
    return min(times)


@functools.cache
def seconds_to_start() -> float:
    """Time from a call of a compiled function to its result, when there is nothing to compute."""
    x = jnp.zeros((), jnp.float32)
    nothing = jax.jit(lambda x: x + 1)
    nothing(x)
    return seconds_of_call(lambda: nothing(x))
