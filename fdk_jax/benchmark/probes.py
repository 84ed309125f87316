"""What a device can do, measured in the same run: the bounds that rows are compared with."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import fdk_jax
from fdk_jax.benchmark import environment, inputs, timing
from fdk_jax.benchmark.cases import KernelCase
from fdk_jax.product import cpu_backend

_PASSES = 8  # on a GPU, whose launches take as long as a pass otherwise
_REPETITIONS = 3
_ROW = 16384


def bound(
    session: timing.Session,
    device: jax.Device,
    bytes_rw: int,
    ops: int,
    dtype: str,
    arithmetic: str = "exact",
) -> dict[str, Any]:
    """The keys of a row that say what the device could attain at best.

    Args:
        session: of the run; what the device attains is measured once for all that take turns.
        device: the device.
        bytes_rw: bytes that a call moves at least.
        ops: its multiplications and additions.
        dtype: of its activations.
        arithmetic: of the activations inside the CPU library.
    """
    copy, read, rate = _attained(session, device, dtype, arithmetic)
    # A CPU's links carry reads and writes side by side: what a copy attains, reading alone does not.
    bandwidth = read if device.platform == "cpu" else max(copy, read)
    return {
        "bytes_rw": bytes_rw,
        "ops": ops,
        "copy_gb_s": round(copy, 2),
        "read_gb_s": round(read, 2),
        "matmul_gflop_s": round(rate, 1),
        "bound_us": round(max(bytes_rw / bandwidth, ops / rate) / 1e3, 4),
    }


@functools.lru_cache(maxsize=16)
def _attained(
    session: timing.Session, device: jax.Device, dtype: str, arithmetic: str
) -> tuple[float, float, float]:
    def measure() -> list[float]:
        rate = matmul_gflop_s(device, dtype, arithmetic)
        return [copy_gb_s(device), read_gb_s(device), rate]

    if session.turns is None:
        copy, read, rate = measure()
    else:
        name = f"{environment.device_name(device)} {dtype} {arithmetic}"
        copy, read, rate = session.turns.once(name, measure)
    return copy, read, rate


@functools.lru_cache(maxsize=16)
def copy_gb_s(device: jax.Device) -> float:
    """Bytes read plus bytes written a nanosecond by an elementwise pass over a large array."""
    size, passes = environment.probe_bytes(device), _passes(device)

    def program(a):
        step = lambda i, a: a ^ (i.astype(jnp.uint32) | jnp.uint32(1))  # noqa: E731
        return jax.lax.fori_loop(0, passes, step, a)

    return 2 * size * passes / _best_seconds(program, _words(size, device), donate=True) / 1e9


@functools.lru_cache(maxsize=16)
def read_gb_s(device: jax.Device) -> float:
    """Bytes read a nanosecond by a sum over a large array.

    XLA's sum keeps too few reads in flight on a CPU: there the CPU library's counts too.
    """
    size, passes = environment.probe_bytes(device), _passes(device)

    def program(a):
        # Each pass starts from a sum of the one before, so none is dropped.
        def one_pass(_, total):
            return jax.lax.reduce(a, total[0], jax.lax.add, (1,))

        return jax.lax.fori_loop(0, passes, one_pass, a[:, 0])

    array = _words(size, device)
    rate = size * passes / _best_seconds(program, array.reshape(-1, _ROW)) / 1e9
    if device.platform != "cpu" or cpu_backend.unavailable_reason() is not None:
        return rate
    words = np.asarray(array).view(np.int32)
    seconds = timing.seconds_of_call(lambda: cpu_backend.library().reduce_sum(words))
    return max(rate, size / seconds / 1e9)


@functools.lru_cache(maxsize=16)
def matmul_gflop_s(device: jax.Device, dtype: str, arithmetic: str = "exact") -> float:
    """Operations a nanosecond of the fastest large product at hand for activations of `dtype`.

    That is XLA's own square product. XLA multiplies narrow dtypes in float32 on a CPU and so leaves
    some processors' faster instructions idle: there the CPU library's product counts too.
    """
    rates = [_xla_rate(device, dtype)]
    if device.platform == "cpu":
        rates.append(_xla_rate(device, "float32"))
        if cpu_backend.unavailable_reason() is None:
            rates.append(_library_rate(dtype, arithmetic))
    return max(rates)


def _library_rate(dtype: str, arithmetic: str) -> float:
    case = KernelCase("cpu", 256, 2048, 2048, 8, 64, "uniform", dtype, arithmetic)
    rng = np.random.default_rng(0)
    with jax.default_device(jax.devices("cpu")[0]):
        weight = fdk_jax.prepare(inputs.quantised_weight(case, rng), backend="cpu")
        x = jnp.asarray(inputs.activations(case, rng))

    def program(x):
        return fdk_jax.matmul(x, weight, backend="cpu", arithmetic=arithmetic)

    return 2 * case.m * case.k * case.n / _best_seconds(program, x) / 1e9


@functools.lru_cache(maxsize=16)
def _xla_rate(device: jax.Device, dtype: str) -> float:
    size, passes = 1536 if device.platform == "cpu" else 8192, _passes(device)
    with jax.default_device(device):
        key = jax.random.key(0)
        # Entries of variance 1 / size keep the products of products near one.
        w = jax.random.normal(key, (size, size), jnp.dtype(dtype)) * size**-0.5

    def program(w):
        return jax.lax.fori_loop(0, passes, lambda _, x: _product(x, w), w)

    return 2 * size**3 * passes / _best_seconds(program, w) / 1e9


def _passes(device: jax.Device) -> int:
    return 1 if device.platform == "cpu" else _PASSES


def _product(x: jax.Array, w: jax.Array) -> jax.Array:
    return jnp.matmul(x, w, precision=jax.lax.Precision.HIGHEST)


def _words(size: int, device: jax.Device) -> jax.Array:
    with jax.default_device(device):
        return jnp.arange(size // 4, dtype=jnp.uint32)


def _best_seconds(program, array: jax.Array, donate: bool = False) -> float:
    run = jax.jit(program, donate_argnums=(0,) if donate else ())
    state = [array]

    def once():
        result = run(state[0])
        if donate:
            state[0] = result
        return result

    once()
    return min(timing.seconds_of_call(once) for _ in range(_REPETITIONS))
