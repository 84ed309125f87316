"""`python -m fdk_jax.doctor`: what is installed, which backends work, and whether they compute rightly.

The report is plain text for a bug report. The exit status is 1 when a check fails.
"""

import dataclasses
import importlib.metadata
import itertools
import os
import platform
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import fdk_jax
import pallas_kernels
from fdk_jax import usage
from fdk_jax.format import packing
from fdk_jax.format.quantised_tensor import QuantisedTensor
from fdk_jax.product import cpu_backend
from pallas_kernels import attention, chain, dense, norm, ring_arithmetic, target
from pallas_kernels.case import Case

_PACKAGES = ("fdk-jax", "jax", "jaxlib", "flax", "numpy", "safetensors", "ml-dtypes")
_PACKAGES += ("jax-cuda12-plugin", "jax-cuda13-plugin")
_VARIABLES = ("FDK_", "OMP_", "KMP_", "GOMP_", "JAX_", "XLA_", "CUDA_VISIBLE")
# Relative RMS of the arithmetic. The integer arithmetics round activations, in blocks of at most 64.
_TOLERANCE = {"float32": 1e-5, "float16": 2e-3, "bfloat16": 1e-2}
_INTEGER_TOLERANCE = {"int16": 2e-3, "int8": 3e-2}
_N, _K = 48, 200  # neither is a whole number of a kernel's tiles


@dataclasses.dataclass(frozen=True)
class Check:
    """One product compared with numpy in float64.

    Attributes:
        name: backend, instruction set, width, codebook and arithmetic.
        error: relative RMS, or the message of an exception.
        passed: whether the error is that of the arithmetic.
        seconds: what the product took, compilation included.
    """

    name: str
    error: str
    passed: bool
    seconds: float

    def __str__(self) -> str:
        verdict = "ok  " if self.passed else "FAIL"
        return f"  {verdict} {self.name:<46} error {self.error}, {self.seconds * 1e3:.0f} ms"


def versions() -> dict[str, str]:
    """Versions of this package, of what it builds on, and of the platform."""
    found = {}
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    if found["fdk-jax"] == "not installed":
        found["fdk-jax"] = f"not installed, run from {Path(fdk_jax.__file__).parent}"
    return found | {
        "python": f"{platform.python_version()} ({platform.python_implementation()})",
        "platform": f"{platform.platform()}, {platform.machine()}",
    }


def backends() -> dict[str, str]:
    """For each backend what runs it here, or why nothing does."""
    gpus = [d for d in jax.devices() if d.platform in ("gpu", "cuda")]
    gpu = target.current()
    if gpus and not gpu.has_kernels:
        pallas = f"missing: {gpu.unknown}"
    elif gpus:
        pallas = f"{gpu} x {len(gpus)}"
        pallas += f"; plain kernels, because {gpu.unknown}" * bool(gpu.unknown)
        pallas += f"; no launch waits for all its programs: {gpu.no_grid_barriers}" * bool(
            gpu.no_grid_barriers
        )
    else:
        pallas = f"missing: JAX sees no NVIDIA GPU, its platform is {jax.default_backend()!r}"
    if (reason := cpu_backend.unavailable_reason()) is not None:
        cpu = f"missing: {reason}"
    elif not _has_cpu_platform():
        cpu = f"missing: JAX has no CPU platform (JAX_PLATFORMS={os.environ.get('JAX_PLATFORMS')})"
    else:
        library = cpu_backend.library()
        usable = ", ".join(library.isas())
        cpu = f"{cpu_backend.describe()}; usable ISAs: {usable}; {library.__file__}"
        cpu += f", compiled by {cpu_backend.compiler()}"
    return {"pallas": pallas, "cpu": cpu, "xla": f"on {jax.default_backend()}"}


def plans(n: int = 4096, k: int = 4096) -> Iterator[str]:
    """The kernel of each width and several numbers of tokens for the GPU at hand, and why; runs nothing."""
    for bits, m in itertools.product(packing.BITS, (1, 16, 64, 512)):
        spec: dict[str, Any] = dict(
            bits=bits, group_size=64, out_features=n, in_features=k, uniform=bits == 1
        )
        yield f"{bits} bits, {m} tokens: {pallas_kernels.plan(m, dtype=jnp.bfloat16, **spec)}"


def step_plans(hidden: int = 4096, inner: int = 14336) -> Iterator[str]:
    """The kernels of a decoding step's other parts for the GPU at hand, and why; runs nothing.

    Args:
        hidden: D, in 32 heads of 128, 8 of keys and values.
        inner: of the feed-forward layers.
    """
    gpu, half = target.current(), jnp.dtype(jnp.bfloat16)
    for slots in (512, 8192):
        kernel, reason = attention.choose(half, (1, 8, slots, 128), 32, gpu)
        yield f"attention over {slots} slots: {kernel or 'xla'}" + (reason and f" ({reason})")
    shapes = [(hidden, hidden), (2 * inner, hidden), (hidden, inner), (hidden + 2048, hidden)]
    for bits in packing.BITS:
        products = [Case(1, n, k, bits, 64, 1, half, half, None, half) for n, k in shapes]
        config = ring_arithmetic.config(products, gpu, chain.GATED)
        reason = chain.unsupported_reason(products, config, gpu)
        launches = f"a launch each ({reason})" if reason else "chain, one launch"
        yield f"products of {bits} bits between two attentions: {launches}"
    reason = norm.unsupported_reason(hidden, half, gpu)
    yield "residual sum and norm: " + (f"xla ({reason})" if reason else "norm")
    reason = dense.unsupported_reason(1, hidden, 32 * hidden, half, gpu)
    yield "one token by an unquantised matrix: " + (f"xla ({reason})" if reason else "dense")


def _has_cpu_platform() -> bool:
    try:
        return bool(jax.devices("cpu"))
    except RuntimeError:
        return False


def checks() -> Iterator[Check]:
    """Runs a product of every kind on every backend that exists here."""
    present = [name for name, text in backends().items() if not text.startswith("missing")]
    for backend in ("xla", "pallas"):
        if backend in present:
            yield from _checks_of(backend)
    if "cpu" in present:
        with jax.default_device(jax.devices("cpu")[0]):
            yield from _cpu_checks()


def _cpu_checks() -> Iterator[Check]:
    """The checks of each instruction set, with those of the integer arithmetics."""
    library = cpu_backend.library()
    try:
        for isa in library.isas():
            library.set_isa(isa)
            yield from _checks_of("cpu", f" {isa}")
            for arithmetic in _INTEGER_TOLERANCE:
                for bits in (1, 4):
                    yield _check("cpu", f" {isa}", bits, "kmeans", "float32", 2, arithmetic)
    finally:
        library.set_isa(None)


def _checks_of(backend: str, detail: str = "") -> Iterator[Check]:
    for bits, codebook in (
        (1, "uniform"),
        (2, "kmeans"),
        (4, "uniform"),
        (4, "kmeans"),
        (8, "kmeans"),
    ):
        yield _check(backend, detail, bits, codebook, "float32", 1)
    yield _check(backend, detail, 4, "kmeans", "bfloat16", 1)
    yield _check(backend, detail, 4, "kmeans", "bfloat16", 17)
    yield _check(backend, detail, 2, "uniform", "float16", 3)


def _check(
    backend: str,
    detail: str,
    bits: int,
    codebook: str,
    dtype: str,
    m: int,
    arithmetic: str = "exact",
) -> Check:
    name = f"{backend}{detail} {bits}-bit {codebook} {dtype} m={m}"
    name += f" {arithmetic}" if arithmetic != "exact" else ""
    rng = np.random.default_rng(bits)
    start = time.perf_counter()
    try:
        weight = _weight(rng, bits, codebook, dtype)
        x = jnp.asarray(rng.standard_normal((m, _K)), jnp.float32).astype(dtype)
        y = fdk_jax.matmul(
            x, fdk_jax.prepare(weight, backend), backend=backend, arithmetic=arithmetic
        )
        expected = np.asarray(x).astype(np.float64) @ _dequantised(weight).T
        error = np.linalg.norm(np.asarray(y).astype(np.float64) - expected)
        error /= np.linalg.norm(expected)
    except Exception as problem:  # a report names whatever went wrong
        seconds = time.perf_counter() - start
        return Check(name, f"{type(problem).__name__}: {problem}", False, seconds)
    seconds = time.perf_counter() - start
    limit = _INTEGER_TOLERANCE.get(arithmetic, _TOLERANCE[dtype])
    return Check(name, f"{error:.1e}", bool(error <= limit), seconds)


def _weight(rng: np.random.Generator, bits: int, codebook: str, dtype: str) -> QuantisedTensor:
    """A random weight made directly of its arrays: no code of `quantise` takes part."""
    levels = np.linspace(-1, 1, 2**bits)
    uniform = codebook == "uniform" or bits == 1
    if not uniform:
        levels = np.sort(rng.uniform(-1, 1, 2**bits))
    return QuantisedTensor(
        packed=jnp.asarray(rng.integers(0, 256, (_N, _K * bits // 8), np.uint8)),
        scales=jnp.asarray(rng.uniform(0.5, 2, (_N, -(-_K // 64))), jnp.float32).astype(dtype),
        codebook=jnp.asarray(levels, jnp.float32),
        bits=bits,
        group_size=64,
        shape=(_N, _K),
        uniform=uniform,
    )


def _dequantised(w: QuantisedTensor) -> np.ndarray:
    """float64 [N, K] by numpy alone."""
    fields = np.unpackbits(np.asarray(w.packed), axis=-1).reshape(_N, _K, w.bits)
    codes = fields @ (1 << np.arange(w.bits)[::-1])
    scales = np.asarray(w.scales)
    levels = np.asarray(w.codebook).astype(scales.dtype).astype(np.float64)
    return levels[codes] * np.repeat(scales.astype(np.float64), w.group_size, axis=-1)[:, :_K]


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the report; 1 when a check failed."""
    usage.Parser(prog="fdk-jax doctor", description=__doc__).parse_args(argv)
    return usage.exit_status(_report)


def _report() -> int:
    print("fdk_jax doctor")
    print("\nversions")
    for name, version in versions().items():
        print(f"  {name}: {version}")
    print("\nmachine")
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else "?"
    print(f"  processors: {os.cpu_count()}, usable by this process: {usable}")
    for device in jax.devices():
        print(f"  device: {device} ({device.device_kind})")
    for name in sorted(os.environ):
        if name.startswith(_VARIABLES):
            print(f"  {name}={os.environ[name]}")
    print("\nbackends")
    for name, text in backends().items():
        print(f"  {name}: {text}")
    if not backends()["pallas"].startswith("missing") or "FDK_JAX_TARGET" in os.environ:
        print(f"\nkernels of a bfloat16 product [M, 4096] x [4096, 4096] on {target.current()}")
        for plan in plans():
            print(f"  {plan}")
        print("\nkernels of the rest of a token's step, bfloat16, one sequence")
        for plan in step_plans():
            print(f"  {plan}")
    print("\nchecks against numpy in float64")
    failed = 0
    for check in checks():
        print(check, flush=True)
        failed += not check.passed
    print(f"\n{failed} checks failed" if failed else "\neverything works")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
