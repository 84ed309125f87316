"""Operations whose best form depends on the platform that a program is lowered for."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from pallas_kernels import dense, norm


def linear(x: Array, kernel: Array, out_dtype: Any) -> Array:
    """Multiplies by an unquantised kernel: [..., K] x [K, N] -> [..., N] in `out_dtype`."""

    def dot(x: Array, kernel: Array) -> Array:
        y = jnp.einsum("...k,kn->...n", x, kernel, preferred_element_type=jnp.float32)
        return y.astype(out_dtype)

    def fused(x: Array, kernel: Array) -> Array:
        return dense.matmul(x, kernel, out_dtype=out_dtype)

    k, n = kernel.shape
    few = x.ndim == 2 and dense.supported(x.shape[0], k, n, kernel.dtype)
    return jax.lax.platform_dependent(
        x, kernel, cuda=fused if few else dot, cpu=_widened(dot), default=dot
    )


def linear_of_rows(x: Array, rows: Array) -> Array:
    """Multiplies by a table of rows: [..., K] x [N, K] -> float32 [..., N]."""

    def dot(x: Array, rows: Array) -> Array:
        return jnp.einsum("...k,nk->...n", x, rows, preferred_element_type=jnp.float32)

    def row_sums(x: Array, rows: Array) -> Array:
        # A CPU reads bfloat16 ten times faster so than through a dot (2 cores of a Zen 4 server,
        # 2026-11-24: 28 against 272 ms for 32064 x 2048), and no float32 copy is made.
        wide = rows.astype(jnp.float32) * x.reshape(1, -1).astype(jnp.float32)
        return wide.sum(axis=1).reshape(*x.shape[:-1], -1)

    one = x.size == x.shape[-1] and rows.dtype != jnp.float32
    cpu = row_sums if one else _widened(dot)
    return jax.lax.platform_dependent(x, rows, cpu=cpu, default=dot)


def add_rms_norm(x: Array, delta: Array, scale: Array, eps: float) -> tuple[Array, Array]:
    """(x + delta, its RMS norm times `scale`) of [B, D] each; see `pallas_kernels.norm`."""

    def plain(x: Array, delta: Array, scale: Array) -> tuple[Array, Array]:
        total = x + delta
        return total, rms_norm(total, scale, eps)

    def fused(x: Array, delta: Array, scale: Array) -> tuple[Array, Array]:
        return norm.add_rms_norm(x, delta, scale, eps=eps)

    good = norm.supported(x.shape[1], x.dtype)
    return jax.lax.platform_dependent(x, delta, scale, cuda=fused if good else plain, default=plain)


def rms_norm(x: Array, scale: Array, eps: float) -> Array:
    """RMS norm over the last axis: scale * x / sqrt(mean(x**2) + eps), the mean in float32."""
    wide = x.astype(jnp.float32)
    wide *= jax.lax.rsqrt(jnp.mean(wide * wide, -1, keepdims=True) + jnp.float32(eps))
    return wide.astype(x.dtype) * jnp.expand_dims(scale, tuple(range(x.ndim - 1)))


def in_float32_on_cpu(function: Callable[..., Array], *arrays: Array) -> Array:
    """function(*arrays), with float arrays widened where XLA multiplies narrow ones slowly."""
    return jax.lax.platform_dependent(*arrays, cpu=_widened(function), default=function)


def _widened(function: Callable[..., Array]) -> Callable[..., Array]:
    """XLA's products of bfloat16 on a CPU run at a tenth of the speed of float32."""

    def wide(*arrays: Array) -> Array:
        narrow = jax.eval_shape(function, *arrays).dtype
        floats = [
            a.astype(jnp.float32) if jnp.issubdtype(a.dtype, jnp.floating) else a for a in arrays
        ]
        return function(*floats).astype(narrow)

    return wide
