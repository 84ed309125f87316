"""Scales and levels of least output error for given codes: both have their optimum in closed form.

For given codes and levels the error of the output, see `fdk_jax.learning.rounding`, whose glossary this is, is
quadratic in the scales, and for given codes and scales in the levels. So they are learned by linear systems in
turns, not by steps along a gradient (docs/decisions/020-learned-scales-and-levels.md compares).
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from fdk_jax.format.dequantisation import lookup, round_to, spread
from fdk_jax.learning import compiling
from fdk_jax.learning.rounding import EXACT, descend, elements, grouped

# Turns end when one lowers the error by less than this part of it, or after so many.
_LEAST_GAIN = 1e-3
_TURNS = 16


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
        # A step from what is there: at 8 bits a sum over whole weights would round off most of its error.
        system, residual = systems(w - old[..., None] * c, c)
        size = old.shape[1]
        ridge = 1e-4 * jnp.trace(system, axis1=1, axis2=2) / size + jnp.finfo(jnp.float32).tiny
        damped = system + ridge[:, None, None] * jnp.eye(size, dtype=jnp.float32)[None]
        root = jnp.linalg.cholesky(damped)  # NaN where it has none: then the row keeps its scales
        step = jax.scipy.linalg.cho_solve((root, True), residual[..., None])[..., 0]
        new = round_to(old + step, dtype)
        new = jnp.where((new > 0) & jnp.isfinite(new), new, old)
        step = new - old
        square = jnp.einsum("rg,rgh,rh->r", step, system, step, precision=EXACT)
        return jnp.where((square < 2 * jnp.sum(step * residual, axis=1))[:, None], new, old)

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
) -> tuple[Array, Array]:
    """The codebook of least output error for given codes and scales: a linear system of 2**bits unknowns.

    Args:
        weight: float32 [N, K].
        codes: uint8 [N, K].
        scales: float32 [N, ceil(K / G)].
        codebook: float32 [2**bits]; levels that are equal stay equal, and those without a code where they are.
        second: float32 [K, K].
        group_size: G.
        dtype: compute dtype of the levels.

    Returns:
        (codes uint8 [N, K], levels float32 [2**bits] on the grid of `dtype`, ascending): the codes are other
        numbers where levels changed places. What was given, levels rounded, where the error would not fall.
    """
    factors = spread(scales, group_size, weight.shape[1])
    old = round_to(codebook, dtype)
    size = codebook.shape[0]
    every = jnp.arange(size, dtype=codes.dtype)
    first = jnp.searchsorted(codebook, codebook).astype(codes.dtype)  # of those that are equal
    known = lookup(codes, first)
    error = weight - factors * lookup(codes, old)

    def of_level(code: Array) -> Array:
        """What a level adds to the weight at a value of one: [N, K]."""
        return jnp.where(known == code, factors, 0)

    def row(code: Array) -> tuple[Array, Array]:
        spread_out = jnp.matmul(of_level(code), second, precision=EXACT)
        return (
            jax.lax.map(lambda other: jnp.sum(spread_out * of_level(other)), every),
            jnp.sum(spread_out * error),
        )

    system, residual = jax.lax.map(row, every)
    ridge = 1e-6 * jnp.trace(system) / size + jnp.finfo(jnp.float32).tiny
    damped = system + ridge * jnp.eye(size, dtype=jnp.float32)
    new = round_to(old + jnp.linalg.solve(damped, residual), dtype)[first]
    step = jnp.where(first == every, new - old, 0)
    lower = step @ jnp.matmul(system, step, precision=EXACT) < 2 * jnp.dot(step, residual)
    better = jnp.all(jnp.isfinite(new)) & lower
    order = jnp.argsort(new)
    moved = lookup(codes, jnp.argsort(order).astype(codes.dtype))
    return jnp.where(better, moved, codes), jnp.where(better, new[order], old)


def learn(
    weight: Array,
    codes: Array,
    scales: Array,
    codebook: Array,
    second: Array,
    *,
    group_size: int,
    dtype: Any,
    learns_scales: bool,
    learns_levels: bool,
    sweeps: bool,
    damping: float,
) -> tuple[Array, Array, Array]:
    """Scales and levels of least output error, in turns, until the error hardly falls.

    Args:
        weight: float32 [N, K].
        codes: uint8 [N, K].
        scales: float32 [N, ceil(K / G)].
        codebook: float32 [2**bits], or [C, 2**bits], each learned from its rows.
        second: float32 [K, K].
        group_size: G.
        dtype: compute dtype, on whose grid scales and levels are.
        learns_scales: False leaves them.
        learns_levels: False leaves them; levels that are equal stay equal.
        sweeps: chooses the codes anew in each turn (`rounding.descend`).
        damping: this part of the mean of the moments' diagonal is added to the diagonal.

    Returns:
        (codes, scales, codebook) whose `output_error` with damped moments is less than that of what was given;
        otherwise that, with levels rounded to `dtype`.

    Raises:
        ValueError: moments for which an error is negative.
    """
    options: dict[str, Any] = dict(group_size=group_size, dtype=jnp.dtype(dtype))
    if codebook.ndim == 2:
        rows, parts = len(weight) // len(codebook), []
        for block, own in enumerate(codebook):
            cut = slice(block * rows, (block + 1) * rows)
            parts.append(
                learn(
                    weight[cut], codes[cut], scales[cut], own, second, learns_scales=learns_scales,
                    learns_levels=learns_levels, sweeps=sweeps, damping=damping, **options,
                )
            )  # fmt: skip
        made = list(zip(*parts, strict=True))
        return jnp.concatenate(made[0]), jnp.concatenate(made[1]), jnp.stack(made[2])
    second = _damped(second, jnp.float32(damping))
    best = codes, scales, round_to(codebook, dtype)
    error = output_error(weight, *best, second, **options)
    for _ in range(_TURNS):
        codes, scales, levels = best
        if sweeps:
            codes = descend(weight, codes, scales, levels, second, damping=0.0, **options)
        if learns_levels:
            codes, levels = refit_levels(weight, codes, scales, levels, second, **options)
        if learns_scales:
            scales = refit_scales(weight, codes, scales, levels, second, **options)
        new = output_error(weight, codes, scales, levels, second, **options)
        if min(error, new) < 0:
            raise ValueError(
                f"an error of the outputs is {min(error, new)}: second moments must be a mean of x x^T"
            )
        if not new < error:
            break
        gain, error, best = 1 - new / error, new, (codes, scales, levels)
        if gain < _LEAST_GAIN:
            break
    return best


def output_error(
    weight: Array,
    codes: Array,
    scales: Array,
    codebook: Array,
    second: Array,
    *,
    group_size: int,
    dtype: Any,
) -> float:
    """E |(W - Q) x|**2 = trace((W - Q) second (W - Q)^T) of the rounded scales and levels."""
    options: dict[str, Any] = dict(group_size=group_size, dtype=jnp.dtype(dtype))
    return float(_output_error(weight, codes, scales, codebook, second, **options))


@functools.partial(
    jax.jit, static_argnames=("group_size", "dtype"), compiler_options=compiling.OPTIONS
)
def _output_error(weight, codes, scales, codebook, second, *, group_size, dtype) -> Array:
    values = lookup(codes, round_to(codebook, dtype))
    error = weight - spread(round_to(scales, dtype), group_size, weight.shape[1]) * values
    return jnp.sum(jnp.matmul(error, second, precision=EXACT) * error)


@jax.jit
def _damped(second: Array, damping: Array) -> Array:
    floor = damping * jnp.diagonal(second).mean()
    return (second + second.T) / 2 + floor * jnp.eye(len(second), dtype=jnp.float32)


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
