"""The attention suite: one token's attention over a cache on a GPU, a layer a case."""

import dataclasses
import functools
import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fdk_jax.benchmark import environment, inputs, probes, records, timing
from pallas_kernels import attention
from pallas_kernels.target import current

__all__ = ["AttentionCase", "group", "make_cases", "measure"]

_HEADS, _KV_HEADS, _DIM = 32, 8, 128
_SAMPLE = 0.1  # seconds
# Of a head: the query that was turned, weights of the sum and the result are rounded to 8 bits. What is exact
# but for these has an error of 0.0040 in the worst of 512 heads over 1024 tokens.
_TOLERANCE = 1.2 * 2**-8


@dataclasses.dataclass(frozen=True)
class AttentionCase:
    """A token of each of `batch` sequences over a cache of `slots`, all of them filled but the token's own.

    There are 32 heads of 128, of which four each share one of 8 key-value heads.
    """

    batch: int
    slots: int
    dtype: str = "bfloat16"
    backend: str = "pallas"

    @property
    def name(self) -> str:
        """Unique, safe as a file name."""
        return f"attention-batch{self.batch}-slots{self.slots}-{self.dtype}"

    def fields(self) -> dict[str, Any]:
        """The keys of a row that say what is measured."""
        return {
            "suite": "attention",
            "name": self.name,
            "m": self.batch,
            **dataclasses.asdict(self),
        }


def make_cases(
    *, batches: Sequence[int], slots: Sequence[int], dtypes: Sequence[str]
) -> list[AttentionCase]:
    """Every combination once."""
    return [AttentionCase(b, s, dtype) for s in slots for b in batches for dtype in dtypes]


def group(case: AttentionCase) -> AttentionCase:
    """Each case alone."""
    return case


def measure(case: AttentionCase, session: timing.Session) -> timing.Measurement:
    """Compares one call with float64, then times a loop of them over rotating caches.

    Raises:
        NotImplementedError: there is no GPU, or no kernel for the case.
    """
    device = environment.device_for(case.backend)
    with jax.default_device(device):
        shape = case.batch, _KV_HEADS, case.slots, _DIM
        kernel, reason = attention.choose(case.dtype, shape, _HEADS, current())
        if kernel is None:
            raise NotImplementedError(f"no kernel for {case.name}: {reason}")
        with session.using():
            token, cache = _arguments(case, np.random.default_rng(0))
        size = sum(a.nbytes for a in cache)
        ops = 4 * case.batch * _HEADS * case.slots * _DIM
        result = probes.bound(session, device, size, ops, case.dtype)
        needed = math.ceil(environment.working_set_bytes(device) / size)
        copies = session.copies or max(2, needed)
        with session.using():
            result["rel_rms_error"], worst = _errors(token, cache)
        if not worst < _TOLERANCE:
            reason = f"the error of a head, {worst:.2g}, is above {_TOLERANCE:.2g}"
            return result | {"status": "failed", "reason": reason}
        seconds = result["bound_us"] * 1e-6 + 5e-6  # what a launch takes to start and to end
        target = session.sample_seconds or _SAMPLE
        loops = max(1, round(target / seconds / copies))
        with session.using():
            run = _compiled(token, cache, copies, loops)
        samples = yield run
    calls = copies * loops
    found = {"copies": copies, "calls": calls, "working_set_bytes": copies * size}
    return result | found | records.statistics([s / calls * 1e6 for s in samples])


def _arguments(case: AttentionCase, rng: np.random.Generator) -> tuple[tuple, tuple]:
    """(qkv, cos, sin, lengths) of the token, and (keys, values)."""

    def random(*shape: int) -> jax.Array:
        return jnp.asarray(rng.standard_normal(shape, np.float32).astype(jnp.dtype(case.dtype)))

    qkv = random(case.batch, (_HEADS + 2 * _KV_HEADS) * _DIM)
    angles = np.float32(case.slots - 1) * np.float32(500000) ** (
        -np.arange(_DIM // 2, dtype=np.float32) / (_DIM // 2)
    )
    cos, sin = (
        jnp.asarray(np.tile(f(angles), (case.batch, 1)), jnp.float32) for f in (np.cos, np.sin)
    )
    lengths = jnp.full((case.batch,), case.slots - 1, jnp.int32)
    cache = tuple(random(case.batch, _KV_HEADS, case.slots, _DIM) for _ in range(2))
    return (qkv, cos, sin, lengths), cache


def _errors(token: tuple, cache: tuple) -> tuple[float, float]:
    """Relative RMS errors against float64: of the output, and of its worst head."""
    found = np.asarray(jax.jit(attention.decode)(*token, *cache)[0])
    qkv, cos, sin, _ = (np.asarray(a).astype(np.float64) for a in token)
    keys, values = (np.asarray(a).astype(np.float64) for a in cache)
    heads = qkv.reshape(len(qkv), -1, _DIM)
    q, k, v = np.split(heads, (_HEADS, _HEADS + _KV_HEADS), axis=1)
    q, k = (_turned(a, cos, sin) for a in (q, k))
    keys[:, :, -1], values[:, :, -1] = k, v
    q = q.reshape(len(q), _KV_HEADS, -1, _DIM)
    scores = q @ keys.swapaxes(2, 3) / math.sqrt(_DIM)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    wanted = weights @ values / weights.sum(-1, keepdims=True)
    pairs = zip(found.reshape(-1, _DIM), wanted.reshape(-1, _DIM), strict=True)
    worst = max(inputs.relative_rms_error(*pair) for pair in pairs)
    return inputs.relative_rms_error(found, wanted.reshape(found.shape)), worst


def _turned(a: np.ndarray, cos: np.ndarray, sin: np.ndarray) -> np.ndarray:
    first, second = np.split(a, 2, axis=-1)
    cos, sin = cos[:, None], sin[:, None]
    return np.concatenate([first * cos - second * sin, second * cos + first * sin], -1)


def _compiled(token: tuple, cache: tuple, copies: int, loops: int) -> Callable[[], float]:
    """A function that runs so many passes over the caches, whose token they keep, and returns its seconds."""
    first, cos, sin, lengths = token

    def one_pass(_, carry):
        x, caches, mixed = carry
        kept = []
        for keys, values in caches:
            mixed, keys, values = attention.decode(x, cos, sin, lengths, keys, values)
            kept.append((keys, values))
        # The next pass depends on this one; what it changes is the token's alone.
        x = jax.lax.dynamic_update_slice(x, mixed[:1, :1], (0, 0))
        return x, tuple(kept), mixed

    @functools.partial(jax.jit, donate_argnums=1)
    def program(x, caches):
        mixed = jnp.zeros((x.shape[0], _HEADS * _DIM), x.dtype)
        return jax.lax.fori_loop(0, loops, one_pass, (x, caches, mixed))

    held = [tuple(tuple(map(jnp.copy, cache)) for _ in range(copies))]
    compiled = program.lower(first, held[0]).compile()

    def run() -> float:
        jax.block_until_ready(held)
        begin = time.perf_counter()
        _, caches, _ = jax.block_until_ready(compiled(first, held[0]))
        seconds = time.perf_counter() - begin
        held[0] = caches
        return seconds

    return run
