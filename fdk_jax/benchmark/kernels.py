"""The kernel suite: one matrix product a case."""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

import fdk_jax
from fdk_jax.benchmark import accuracy, environment, inputs, probes, records, timing
from fdk_jax.benchmark.cases import KernelCase, make_cases

__all__ = ["Workload", "group", "make_cases", "measure", "prepare"]

_SEED = 0
_MAX_COPIES = 96
_HELD = 6  # weights, of several widths: they serve all numbers of tokens
# Below 8 tokens XLA's float product on a CPU is fastest over rows [n, k], above over [k, n] (2 cores
# of a Zen 4 server, 2026-11-23: 1.5 against 2.7 ms at m = 1, 8.4 against 5.3 ms at m = 16, 4096 x 4096).
_ROWS_BELOW = 8
# Seconds that a sample should take: at the start of each program the host of a GPU writes the addresses of a
# pass into a graph, 9 to 12 us a call, and the device waits, 0.5 to 1.5 ms in all (H100, 2026-11-26: 17.6
# instead of 15.0 us a call in samples of 7 ms). So it is longer for each copy of the weight: the start is a
# fiftieth of it.
_SAMPLE = {"cpu": 0.05, "gpu": 0.1}
_SAMPLE_A_COPY = {"cpu": 0.0, "gpu": 5e-4}
# Calls of a pass and passes that follow the first call, which alone takes far longer to start than to run.
_MORE_CALLS = {"cpu": (1, 0), "gpu": (8, 24)}


@dataclasses.dataclass(frozen=True)
class Workload:
    """A case made ready: `step(x, weight)` is the product, `reference` what it should give."""

    case: KernelCase
    device: jax.Device
    step: Callable[[jax.Array, Any], jax.Array]
    x: jax.Array
    weight: Any
    reference: inputs.Reference

    @property
    def weight_bytes(self) -> int:
        """Bytes of one copy of the weight."""
        return sum(a.nbytes for a in jax.tree.leaves(self.weight))

    @property
    def bytes_rw(self) -> int:
        """Least bytes that a call moves: the weight, the input and the output, once each."""
        return self.weight_bytes + self.x.nbytes + self.case.m * self.case.n * self.x.dtype.itemsize

    @property
    def ops(self) -> int:
        """Multiplications and additions of a call."""
        return 2 * self.case.m * self.case.k * self.case.n


def prepare(case: KernelCase, session: timing.Session | None = None) -> Workload:
    """Random inputs of a case on its device, with the weight in the layout of its backend.

    Args:
        case: what to make ready.
        session: how it will be measured.

    Raises:
        NotImplementedError: this machine or the backend cannot run the case.
    """
    session = session or timing.Session()
    device = environment.device_for("xla" if case.dense else case.backend)
    rows = case.m < _ROWS_BELOW
    tokens = 1 if rows or not case.dense else _ROWS_BELOW
    like = dataclasses.replace(case, m=tokens, arithmetic="exact")
    held, weight = _weight(like, device, session)
    x = inputs.activations(case, np.random.default_rng(_SEED))
    reference = inputs.reference(case, x, held, session.checked_rows)
    if case.dense:
        step = functools.partial(_dense_product, rows=rows)
    else:
        step = functools.partial(fdk_jax.matmul, backend=case.backend, arithmetic=case.arithmetic)
    # Without a turn: its copy takes next to nothing from what another run measures.
    return Workload(case, device, jax.jit(step), jax.device_put(x, device), weight, reference)


@functools.lru_cache(maxsize=_HELD)
def _weight(case: KernelCase, device: jax.Device, session: timing.Session) -> tuple[Any, Any]:
    """The weight of a case, on the host as `inputs.reference` takes it and on its device."""
    rng = np.random.default_rng(_SEED + 1)
    if case.dense:
        dense = inputs.dense_weight(case, rng)
        laid = dense if case.m < _ROWS_BELOW else np.ascontiguousarray(dense.T)
        with session.using():
            return dense, jax.block_until_ready(jax.device_put(laid, device))
    with session.using(), jax.default_device(device):
        quantised = inputs.quantised_weight(case, rng)
        prepared = fdk_jax.prepare(quantised, backend=case.backend)
        return jax.tree.map(np.asarray, quantised), jax.block_until_ready(prepared)


def _dense_product(x: jax.Array, w: jax.Array, *, rows: bool) -> jax.Array:
    # "highest" keeps float32 from being rounded to TF32; other dtypes know no difference.
    return jax.lax.dot_general(
        x, w, (((1,), (1 if rows else 0,)), ((), ())), precision=jax.lax.Precision.HIGHEST
    )


def group(case: KernelCase) -> tuple[int, ...]:
    """Products of one shape are sampled in turn: their ratios are what the suite is for."""
    return case.m, case.k, case.n


def measure(case: KernelCase, session: timing.Session) -> timing.Measurement:
    """Checks one case against the oracle, then has it timed; see the module `records` for the keys."""
    result, run, calls = _ready(case, session)
    if run is None:
        return result
    seconds = yield run
    return result | records.statistics([s / calls * 1e6 for s in seconds])


def _ready(case: KernelCase, session: timing.Session):
    """What is known of a case before it is timed, its compiled loop (None: it is wrong), its calls."""
    work = prepare(case, session)
    with jax.default_device(work.device):
        result = probes.bound(
            session, work.device, work.bytes_rw, work.ops, case.dtype, case.arithmetic
        )
        y, seconds = _first_call(work, session)
        y, expected = y[:, work.reference.rows], work.reference.expected
        result["rel_rms_error"] = inputs.relative_rms_error(y, expected[0].value)
        result["plain_rel_rms_error"] = work.reference.plain
        outcome = accuracy.compare(y, expected)
        if not outcome.ok:
            return result | {"status": "failed", "reason": str(outcome)}, None, 0
        copies = session.copies or copies_for(work)
        estimate = max(result["bound_us"] * 1e-6, seconds)
        sample = _sample_seconds(work, copies, session)
        loops, run = _of_length(work, copies, max(1, round(sample / estimate / copies)), session)
    held = {
        "checked_rows": len(work.reference.rows),
        "working_set_bytes": copies * work.weight_bytes,
        "cache_bytes": environment.cache_bytes(work.device),
    }
    return result | {"copies": copies, "calls": copies * loops} | held, run, copies * loops


def _first_call(work: Workload, session: timing.Session) -> tuple[np.ndarray, float]:
    """What the loop that is timed gives in its first call, and about how long one takes.

    By the same program, of one pass over one weight; on a GPU it goes on with calls enough to be timed.
    """
    first = timing.loop_program(work.step, work.x, [work.weight], loops=1, link_every=True)
    more, loops = _MORE_CALLS[_kind(work)]
    rest = timing.loop_program(
        work.step, work.x, [work.weight] * more, loops=loops, link_every=False
    )
    arguments = work.x, (work.weight,)
    compiled = timing.compiled_in_turn(
        jax.jit(lambda x, w: (first(x, w), rest(x, w * more))).lower(*arguments), session
    )
    with session.using():
        (last, results), _ = compiled(*arguments)
        y = np.asarray(results[0] if results else last)
        seconds = timing.seconds_of_call(lambda: compiled(*arguments)) - timing.seconds_to_start()
    return y, max(0.0, seconds) / (1 + more * loops)


def _of_length(
    work: Workload, copies: int, loops: int, session: timing.Session, tries: int = 3
) -> tuple[int, Callable[[], float]]:
    """The passes of a sample and its compiled loop, made anew where its time is off by half."""
    run = build(work, copies, loops)
    target = _sample_seconds(work, copies, session)
    with session.turn():  # beside other runs it would take several times as long
        seconds = min(run(), run())  # the first one also makes graphs
    alright = target / 2 < seconds < 2 * target or (loops == 1 and seconds > target)
    if alright or tries == 1:
        return loops, run
    del run  # and with it its copies of the weight
    return _of_length(work, copies, math.ceil(loops * target / seconds), session, tries - 1)


def _sample_seconds(work: Workload, copies: int, session: timing.Session) -> float:
    kind = _kind(work)
    return (session.sample_seconds or _SAMPLE[kind]) + copies * _SAMPLE_A_COPY[kind]


def _kind(work: Workload) -> str:
    return "cpu" if work.device.platform == "cpu" else "gpu"


def build(work: Workload, copies: int, loops: int) -> Callable[[], float]:
    """The compiled loop of a workload; see `timing.loop_program`."""
    weights = [work.weight] * copies
    # XLA runs independent calls side by side on a CPU, in order on a GPU.
    link_every = work.device.platform == "cpu"
    program = timing.loop_program(work.step, work.x, weights, loops=loops, link_every=link_every)
    return timing.compile_loop(program, work.x, work.weight, copies)


def copies_for(work: Workload) -> int:
    """Copies of the weight that no cache holds, within reason."""
    case, footprint = work.case, work.weight_bytes
    if work.device.platform == "cpu" and case.backend == "xla" and case.bits != 32:
        # XLA writes the whole weight in float32 first, which drives everything else out of the caches;
        # and as it does so for every copy at once, more of them would fill the memory.
        footprint += 4 * case.k * case.n
    needed = math.ceil(environment.working_set_bytes(work.device) / footprint)
    return min(max(2, needed), _MAX_COPIES)
