"""A few rows of x times an unquantised weight, bound by reading it.

Glossary: M rows of x (at most 16, padded to 16 by repeating the last), K inputs, N outputs, S runs of K
that programs sum apart. XLA's own choice at M = 1 reads small matrices at half the bandwidth and less
(H200, 2026-11-24: 24 us for 3072 x 5120, 11 us for 3072 x 3072, whose bytes take 7 and 4).
"""

import functools

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl

from pallas_kernels import target, triton_compat

_ROWS = 16  # the least a tensor core takes
# H100, 2026-11-25, 3072 x 128256: 265 us, with tiles of 128 x 64 and three stages 280; the bytes take 248.
_BLOCK_K, _BLOCK_N = 64, 128
_STAGES = 4
# Programs by multiprocessors: three fit on one at once; more only repeat the start.
_PROGRAMS, _MULTIPROCESSORS = 480, 132


def unsupported_reason(
    m: int, k: int, n: int, dtype: jax.typing.DTypeLike, gpu: target.Target
) -> str | None:
    """Why `matmul` does not take a product [m, k] x [k, n] of this dtype on a GPU, or None."""
    if gpu.no_pallas:
        return gpu.no_pallas
    if jnp.dtype(dtype) not in (jnp.bfloat16, jnp.float16):
        return f"{jnp.dtype(dtype)} is not bfloat16 or float16"
    if not 1 <= m <= _ROWS:
        return f"{m} rows are not 1 to {_ROWS}"
    if k % _BLOCK_K or n % _BLOCK_N:
        return f"K={k} and N={n} are not multiples of {_BLOCK_K} and {_BLOCK_N}"
    return None


def matmul(
    x: Array, w: Array, *, out_dtype: jax.typing.DTypeLike, interpret: bool = False
) -> Array:
    """Multiplies x by w, accumulating in float32.

    Args:
        x: bfloat16 or float16 [M, K], M at most 16.
        w: [K, N] of the same dtype; K a multiple of 64, N of 128.
        out_dtype: Of the result.
        interpret: Run in Pallas' interpreter.

    Returns:
        [M, N].

    Raises:
        ValueError: a product that the kernel does not take.
    """
    (m, k), n = x.shape, w.shape[1]
    if (reason := unsupported_reason(m, k, n, w.dtype, target.current())) is not None:
        raise ValueError(f"no kernel multiplies {x.shape} by {w.dtype}{w.shape}: {reason}")
    splits = _splits(k // _BLOCK_K, n // _BLOCK_N)
    parts = pl.pallas_call(
        functools.partial(_kernel, steps=k // _BLOCK_K // splits),
        grid=(n // _BLOCK_N, splits),
        out_shape=jax.ShapeDtypeStruct((splits, m, n), out_dtype if splits == 1 else jnp.float32),
        compiler_params=triton_compat.compiler_params(num_warps=4, num_stages=_STAGES),
        interpret=interpret,
        name="dense_matmul",
    )(x, w)
    return parts[0] if splits == 1 else parts.sum(axis=0).astype(out_dtype)


def _splits(blocks: int, tiles: int) -> int:
    """Runs of K: the most that divide it evenly without too many programs."""
    programs = _PROGRAMS * target.current().multiprocessors // _MULTIPROCESSORS
    fitting = [s for s in range(1, 33) if blocks % s == 0 and s * tiles <= programs]
    return max(fitting, default=1)


def _kernel(x, w, out, *, steps):
    m = x.shape[0]
    row = jnp.minimum(jnp.arange(_ROWS), m - 1)
    column = pl.program_id(0) * _BLOCK_N + jnp.arange(_BLOCK_N)
    inner = jnp.arange(_BLOCK_K)
    split = pl.program_id(1)

    def step(i, acc):
        k = (split * steps + i) * _BLOCK_K + inner
        left = x[row[:, None], k[None, :]]
        # Read once: whatever else is in L2 shall stay.
        right = triton_compat.load(w.at[k[:, None], column[None, :]], eviction_policy="evict_first")
        return acc + jnp.dot(left, right, preferred_element_type=jnp.float32)

    acc = jax.lax.fori_loop(0, steps, step, jnp.zeros((_ROWS, _BLOCK_N), jnp.float32))
    # Rows past M hold the last row's values and are stored to the same address.
    out[split, row[:, None], column[None, :]] = acc.astype(out.dtype)
