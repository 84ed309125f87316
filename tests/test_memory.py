"""Long runs: memory stays flat over varied calls, and nothing outlives JAX's own caches.

FDK_FUZZ_ROUNDS multiplies the number of calls (`make fuzz`).
"""

import gc
import os
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from backends import BACKENDS, running
from fuzzing import ROUNDS, rounds

import fdk_jax
from fdk_jax import checkpoint
from fdk_jax.format import packing


def resident() -> int:
    """Bytes of this process in memory."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def settled() -> tuple[int, int]:
    """Objects that Python tracks, bytes of live arrays, after a collection."""
    gc.collect()
    return len(gc.get_objects()), sum(a.nbytes for a in jax.live_arrays())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("prepared", [True, False])
def test_repeated_calls_keep_nothing(backend, prepared, rng):
    """The same calls over and over, in and out of jit, with gradients: no object and no array is kept."""
    w = fdk_jax.quantise(rng.standard_normal((32, 128)).astype(np.float32), 4)
    w = fdk_jax.prepare(w, backend) if prepared else w
    x = jnp.asarray(rng.standard_normal((2, 128)), jnp.float32)
    # A prepared weight finds its kernel by itself, except for the interpreter.
    options = {} if prepared and backend != "pallas" else {"backend": backend}
    jitted = jax.jit(lambda x, w: fdk_jax.matmul(x, w, **options))
    gradient = jax.jit(jax.grad(lambda x: fdk_jax.matmul(x, w, **options).sum()))

    def calls(count: int) -> None:
        for _ in rounds(count, least=5):
            fdk_jax.matmul(x, w, **options)
            jitted(x, w)
            gradient(x)

    with running(backend):
        calls(5)
        objects, arrays = settled()
        calls(50 * ROUNDS)
        more_objects, more_arrays = settled()
    assert more_arrays <= arrays
    assert more_objects - objects < 25  # a call would have to keep less than half an object


def varied(rng: np.random.Generator, count: int, folder: Path) -> None:
    """Calls of every kind, each of another shape."""
    for _ in range(count):
        n, k = (int(size) for size in rng.integers(1, 90, 2))
        bits, group = int(rng.choice([1, 2, 4, 8])), int(rng.choice([8, 16, 64]))
        w = fdk_jax.quantise(rng.standard_normal((n, k)).astype(np.float32), bits, group_size=group)
        x = jnp.asarray(rng.standard_normal((int(rng.integers(1, 5)), k)), jnp.float32)
        backend = str(rng.choice(["xla", "cpu"]))
        if backend == "cpu" and fdk_jax.product.cpu_backend.unavailable_reason() is not None:
            backend = "xla"
        fdk_jax.matmul(x, fdk_jax.prepare(w, backend))
        checkpoint.save(folder / "w", {"w": w})
        checkpoint.load(folder / "w")
        if rng.random() < 0.2:
            assert "float32" in repr(w)
            fdk_jax.explain(x, w)


def test_varied_shapes_leave_nothing_behind(rng, tmp_path):
    """Programs for ever new shapes live in JAX's caches alone: clearing those gives everything back."""
    sizes, objects = [], []
    for _ in rounds(3 + ROUNDS, least=3):
        varied(rng, 5, tmp_path)
        packing.layout_struct.cache_clear()
        jax.clear_caches()
        objects.append(settled()[0])
        sizes.append(resident())
    print(f"objects {objects}, resident MiB {[size >> 20 for size in sizes]}")
    # The first batches import and warm up. Of every program for a new shape, plain jit's too, JAX keeps about
    # a dozen small objects for good: 130 to 215 a call, by the shapes that are drawn. With their programs,
    # which a cache of ours could keep, they are some 5000.
    assert objects[-1] - objects[-2] < 300 * 5
    assert sizes[-1] - sizes[-2] < 64 << 20
