"""Scales and levels of least output error for given codes: both have their optimum in closed form.

The glossary is that of `fdk_jax.learning.rounding`.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from fdk_jax.format.dequantisation import lookup, round_to, spread
from fdk_jax.learning import compiling
from fdk_jax.learning.rounding import EXACT, elements, grouped


@functools.partial(
    jax.jit, static_argnames=("group_size", "dtype"), compiler_options=compiling.OPTIONS
)
def refit_scales(
    weight: Array,
    codes: Array,
    scales: Array,
    codebook: Array,
    second: Array,
    *,
    group_size: int,
    dtype: Any,
) -> Array:
    """Scales of least output error for given codes: a small linear system a row.

    Returns:
        float32 [N, ceil(K / G)] on the grid of `dtype`, all positive; a row whose error would not fall
        keeps its scales.
    """
    values = lookup(codes, round_to(codebook, dtype))
    columns = _columns(second, group_size)  # [groups, K', G]
    padded = columns.transpose(1, 0, 2).reshape(columns.shape[1], -1)
    rows = tuple(grouped(a, group_size) for a in (weight, values))

    def systems(w: Array, c: Array) -> tuple[Array, Array]:
        """[R, groups, groups] and [R, groups]: c second c^T of pairs of groups, c second w of groups."""
        of_columns = jnp.einsum("hkb,rhb->rhk", columns, c, precision=EXACT)
        of_columns = of_columns.reshape(*c.shape[:2], *c.shape[1:])
        left = jnp.einsum("rga,rhga->rgh", c, of_columns, precision=EXACT)
        pulled = jnp.matmul(w.reshape(len(w), -1), padded, precision=EXACT)
        return left, jnp.sum(c * pulled.reshape(c.shape), axis=-1)

    def some(part: tuple[Array, Array, Array]) -> Array:
        w, c, old = part
        system, right = systems(w, c)
        size = old.shape[1]
        ridge = 1e-4 * jnp.trace(system, axis1=1, axis2=2) / size + jnp.finfo(jnp.float32).tiny
        damped = system + ridge[:, None, None] * jnp.eye(size, dtype=jnp.float32)[None]
        residual = right - jnp.einsum("rgh,rh->rg", system, old, precision=EXACT)
        root = jnp.linalg.cholesky(damped)  # NaN where it has none: then the row keeps its scales
        step = jax.scipy.linalg.cho_solve((root, True), residual[..., None])[..., 0]
        new = round_to(old + step, dtype)
        new = jnp.where((new > 0) & jnp.isfinite(new), new, old)

        def error(scales: Array) -> Array:
            square = jnp.einsum("rg,rgh,rh->r", scales, system, scales, precision=EXACT)
            return square - 2 * jnp.sum(scales * right, axis=1)

        return jnp.where((error(new) < error(old))[:, None], new, old)

    n, groups = scales.shape
    # Products of a row with each block of the second moments are in memory for so many rows at a time.
    count = max(1, min(n, elements() // max(1, groups * columns.shape[1])))
    parts = jax.tree.map(lambda a: _cut(a, count), (*rows, scales))
    return jax.lax.map(some, parts).reshape(-1, groups)[:n]


@functools.partial(
    jax.jit, static_argnames=("group_size", "dtype"), compiler_options=compiling.OPTIONS
)
def refit_levels(
    weight: Array,
    codes: Array,
    scales: Array,
    codebook: Array,
    second: Array,
    *,
    group_size: int,
    dtype: Any,
) -> Array:
    """The codebook of least output error for given codes and scales: a linear system of 2**bits unknowns.

    Args:
        weight: float32 [N, K].
        codes: uint8 [N, K].
        scales: float32 [N, ceil(K / G)].
        codebook: float32 [2**bits].
        second: float32 [K, K].
        group_size: G.
        dtype: compute dtype of the levels.

    Returns:
        float32 [2**bits], ascending; `codebook` itself where the error would not fall.
    """
    factors = spread(scales, group_size, weight.shape[1])
    every = jnp.arange(codebook.shape[0], dtype=codes.dtype)

    def of_level(code: Array) -> Array:
        """What a level adds to the weight at a value of one: [N, K]."""
        return jnp.where(codes == code, factors, 0)

    def row(code: Array) -> tuple[Array, Array]:
        spread_out = jnp.matmul(of_level(code), second, precision=EXACT)
        return (
            jax.lax.map(lambda other: jnp.sum(spread_out * of_level(other)), every),
            jnp.sum(spread_out * weight),
        )

    system, right = jax.lax.map(row, every)
    size = codebook.shape[0]
    ridge = 1e-6 * jnp.trace(system) / size + jnp.finfo(jnp.float32).tiny
    residual = right - jnp.matmul(system, codebook, precision=EXACT)
    damped = system + ridge * jnp.eye(size, dtype=jnp.float32)
    new = codebook + jnp.linalg.solve(damped, residual)

    def error(levels: Array) -> Array:
        levels = round_to(levels, dtype)
        return levels @ jnp.matmul(system, levels, precision=EXACT) - 2 * jnp.dot(levels, right)

    better = (
        jnp.all(jnp.diff(new) > 0) & jnp.all(jnp.isfinite(new)) & (error(new) < error(codebook))
    )
    return jnp.where(better, new, codebook)


def _columns(second: Array, group_size: int) -> Array:
    """[K, K] -> [groups, K', G], the columns of each group; zeros at the end, K' = groups * G."""
    k = second.shape[0]
    group_size = max(1, min(group_size, k))
    padded = jnp.pad(second, ((0, -k % group_size),) * 2)
    return padded.reshape(len(padded), -1, group_size).transpose(1, 0, 2)


def _cut(rows: Array, count: int) -> Array:
    """[N, ...] -> [ceil(N / count), count, ...], ones at the end."""
    padding = ((0, -len(rows) % count),) + ((0, 0),) * (rows.ndim - 1)
    padded = jnp.pad(rows, padding, constant_values=1)
    return padded.reshape(-1, count, *rows.shape[1:])
