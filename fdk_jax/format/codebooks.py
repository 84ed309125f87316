"""Codebooks: uniform, NF4, FP4, ternary, and k-means (Lloyd-Max)."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from fdk_jax.format import packing

if TYPE_CHECKING:
    from jaxtyping import Float, Float32

# Table E.1 of QLoRA (Dettmers et al., arXiv 2305.14314): quantiles of N(0, 1) scaled to [-1, 1].
NF4 = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)

# E2M1 of the OCP Microscaling formats (version 1.0, table 5), magnitudes without the sign bit.
FP4 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)

# Histogram cells of the k-means: the cells hold exact sums, so only a cell that a boundary cuts is
# approximated; with 2**16 of them the error of a fit is far below the 0.5% that a user could notice.
_CELLS = 2**16
_CHUNK = 2**22
_MAX_STEPS = 1000
# Levels whose sums `refine` takes one by one: a GPU adds to so few places one after another, in any order.
_FEW = 16


def uniform(bits: int) -> Float32[np.ndarray, " values"]:
    """float32 [2**bits], evenly spaced on [-1, 1]."""
    packing.check_bits(bits)
    return np.linspace(-1.0, 1.0, 2**bits, dtype=np.float32)


def nf4() -> Float32[np.ndarray, " 16"]:
    """The 16 NF4 levels, float32 [16]."""
    return np.asarray(NF4, np.float32)


def fp4() -> Float32[np.ndarray, " 16"]:
    """The 15 values of FP4 (E2M1), divided by the largest: float32 [16] with zero twice."""
    positive = np.asarray(FP4, np.float32) / np.float32(FP4[-1])
    return np.concatenate([-positive[:0:-1], [np.float32(0)], positive])


def ternary() -> Float32[np.ndarray, " 3"]:
    """-1, 0 and 1: three of the four values of a 2-bit code, float32 [3]."""
    return np.asarray([-1, 0, 1], np.float32)


def check(values: ArrayLike, bits: int) -> np.ndarray:
    """A given codebook as float32 [2**bits], padded with its last entry.

    Args:
        values: at most 2**bits ascending finite numbers, or [C, entries] of them.
        bits: width of a code.

    Raises:
        ValueError: too many entries, none, not ascending or not finite.
    """
    packing.check_bits(bits)
    values = np.asarray(values, np.float32)
    if values.ndim not in (1, 2) or not 1 <= values.shape[-1] <= 2**bits:
        raise ValueError(f"a codebook has 1 to {2**bits} entries at {bits=}, got {values.shape=}")
    if not np.isfinite(values).all():
        raise ValueError(f"codebook values must be finite, got {values}")
    if (np.diff(values, axis=-1) < 0).any():
        raise ValueError(f"codebook values must ascend, got {values}; sort them first")
    pad = [(0, 0)] * (values.ndim - 1) + [(0, 2**bits - values.shape[-1])]
    return np.pad(values, pad, mode="edge")


def is_uniform(codebook: np.ndarray) -> bool:
    """Whether the values of float32 [..., 2**bits] are evenly spaced around 0, to float32 accuracy.

    That is, they ascend in equal steps, and 0 is one of them or lies halfway between two. Any two values are.
    """
    entries = codebook.shape[-1]
    if entries == 2:
        return True
    first, last = (codebook[..., i].astype(np.float64)[..., None] for i in (0, -1))
    step = (last - first) / (entries - 1)
    if not ((first <= 0) & (last >= 0) & (step > 0)).all():
        return False
    halves = -2 * first / step
    around_zero = np.abs(halves - np.rint(halves)) <= 2.0**-20 * entries
    span = np.maximum(np.abs(first), np.abs(last))
    even = np.abs(codebook - (first + step * np.arange(entries))) <= 2.0**-22 * span
    return bool(around_zero.all() and even.all())


def kmeans(
    values: Float[ArrayLike, "*S"],
    bits: int,
    *,
    importance: Float[ArrayLike, "*S"] | None = None,
    seed: int = 0,
) -> Float32[Array, " values"]:
    """The codebook of least squared error for a sample: weighted Lloyd-Max in one dimension.

    minimises sum_i importance_i * min_q (values_i - codebook_q)**2

    The sample is reduced once to a histogram of exact sums, so memory stays near one copy of it. Lloyd's
    iteration (Lloyd, 1982; Max, 1960) then runs to convergence from several starts (evenly spaced,
    quantiles, cube-root density of Panter and Dite, 1951, and random ones), and the best is returned: never
    worse than evenly spaced levels.

    Args:
        values: float array of any shape, finite.
        bits: 1, 2, 4 or 8; the codebook has 2**bits entries.
        importance: non-negative weights of the same shape; None for ones.
        seed: of the random starts.

    Returns:
        float32 [2**bits], ascending.

    Raises:
        ValueError: nothing to fit, values that are not finite, or an importance that does not fit them.
    """
    packing.check_bits(bits)
    return fit(values, 2**bits, importance=importance, seed=seed)


def fit(
    values: Float[ArrayLike, "*S"],
    entries: int,
    *,
    importance: Float[ArrayLike, "*S"] | None = None,
    seed: int = 0,
) -> Float32[Array, " values"]:
    """`kmeans` for any number of entries: float32 [entries], ascending."""
    return fit_parts([lambda: (jnp.asarray(values), importance)], entries, seed=seed)


def fit_parts(
    parts: Sequence[Callable[[], tuple[Array, ArrayLike | None]]],
    entries: int,
    *,
    seed: int = 0,
    start: ArrayLike | None = None,
) -> Float32[Array, " values"]:
    """One k-means codebook for samples that need not exist at the same time, e.g. all layers of a model.

    Args:
        parts: functions that return (values, importance or None); each is called twice.
        entries: number of levels.
        seed: of the random starts.
        start: float [entries], ascending: goes on from these levels, of a sample much like this one, alone.

    Returns:
        float32 [entries], ascending.
    """
    ranges = [_check_sample(*part()) for part in parts]
    if not ranges or not any(size for size, *_ in ranges):
        raise ValueError("k-means needs at least one value")
    low = min(low for size, low, _ in ranges if size)
    high = max(high for size, _, high in ranges if size)
    if not np.isfinite([low, high]).all():
        raise ValueError("k-means needs finite values, got NaN or infinity")
    if low == high:
        return jnp.full((entries,), low, jnp.float32)
    # Means are taken in a frame where the sample spans [0, 1]: float32 sums stay accurate.
    mass, first = np.zeros(_CELLS), np.zeros(_CELLS)
    for part in parts:
        values, importance = part()
        weight = None if importance is None else jnp.asarray(importance)
        more = _histogram(values, weight, low, high)
        mass, first = mass + more[0], first + more[1]
    if start is not None:
        start = np.clip((np.asarray(start, np.float64) - low) / (high - low), 0, 1)
    centroids = _lloyd(mass, first, entries, seed, start)
    return jnp.asarray((low + centroids * (high - low)).astype(np.float32))


def _check_sample(values: Array, importance: ArrayLike | None) -> tuple[int, float, float]:
    """Size, minimum and maximum of a sample; NaN where it holds NaN."""
    if importance is not None:
        importance = jnp.asarray(importance)
        if importance.shape != values.shape:
            raise ValueError(f"{importance.shape=} must match {values.shape=}")
        if not bool(_is_importance(importance)):
            raise ValueError("importance must be finite, non-negative and not zero everywhere")
    if not values.size:
        return 0, 0.0, 0.0
    low, high = jax.device_get(_range(values))
    return values.size, float(low), float(high)


# Few programs for a fit: a GPU's take a tenth of a second each to compile, for every shape again.
@jax.jit
def _is_importance(values: Array) -> Array:
    return jnp.all((values >= 0) & jnp.isfinite(values)) & jnp.any(values > 0)


@jax.jit
def _range(values: Array) -> tuple[Array, Array]:
    return values.min(), values.max()


@functools.partial(jax.jit, static_argnames="steps")
def refine(
    values: Float[Array, "*S"],
    codebook: Float32[Array, " values"],
    *,
    importance: Float[Array, "*S"] | None = None,
    steps: int = 4,
) -> Float32[Array, " values"]:
    """Steps of Lloyd's iteration from a given codebook: cheap, inside jit, for values that moved a little.

    Args:
        values: float array of any shape.
        codebook: float32 [entries], ascending.
        importance: non-negative weights of the same shape as `values`; None for ones.
        steps: iterations.

    Returns:
        float32 [entries], ascending; its squared error is at most that of `codebook`. A level that no
        value is nearest to stays.
    """
    values = values.astype(jnp.float32).ravel()
    weight = jnp.ones_like(values) if importance is None else importance.astype(jnp.float32).ravel()

    def step(levels: Array) -> Array:
        middle = (levels[1:] + levels[:-1]) / 2
        if len(levels) <= _FEW:
            codes = jnp.sum(values[None] > middle[:, None], axis=0)

            def sums(code: Array) -> tuple[Array, Array]:
                chosen = jnp.where(codes == code, weight, 0)
                return jnp.sum(chosen), jnp.sum(chosen * (values - levels[code]))

            mass, offset = jax.vmap(sums)(jnp.arange(len(levels)))
        else:
            codes = jnp.searchsorted(middle, values, side="left")
            mass = jnp.zeros_like(levels).at[codes].add(weight)
            offset = jnp.zeros_like(levels).at[codes].add(weight * (values - levels[codes]))
        # Sums of offsets from a level stay accurate where sums of values would not.
        return jnp.sort(levels + jnp.where(mass > 0, offset / jnp.where(mass > 0, mass, 1), 0))

    return jax.lax.fori_loop(0, steps, lambda _, levels: step(levels), codebook)


def _histogram(values, importance, low, high) -> tuple[np.ndarray, np.ndarray]:
    """Weight and weighted mean position of each cell; float64 sums over chunks."""
    ends = jnp.float32(low), jnp.float32(high)
    # All chunks are on their way before the first one is waited for.
    chunks = [
        _chunk_histogram(values, importance, jnp.int32(s), *ends, min(_CHUNK, values.size - s))
        for s in range(0, values.size, _CHUNK)
    ]
    mass, first = np.zeros(_CELLS), np.zeros(_CELLS)
    for m, f in jax.device_get(chunks):
        mass += m
        first += f
    # `first` holds offsets from the centre of a cell.
    return mass, first + mass * ((np.arange(_CELLS) + 0.5) / _CELLS)


@functools.partial(jax.jit, static_argnums=5)
def _chunk_histogram(values, weight, start, low, high, count):
    """Of `count` values and their weights from `start` on."""

    def cut(a: Array) -> Array:
        return jax.lax.dynamic_slice_in_dim(a.ravel(), start, count)

    x = (cut(values).astype(jnp.float32) - low) / (high - low)
    cell = jnp.clip((x * _CELLS).astype(jnp.int32), 0, _CELLS - 1)
    weight = jnp.ones_like(x) if weight is None else cut(weight).astype(jnp.float32)
    offset = x - (cell.astype(jnp.float32) + 0.5) / _CELLS
    zeros = jnp.zeros(_CELLS, jnp.float32)
    return zeros.at[cell].add(weight), zeros.at[cell].add(weight * offset)


def _lloyd(
    mass: np.ndarray, first: np.ndarray, entries: int, seed: int, start: np.ndarray | None = None
) -> np.ndarray:
    """Best of several Lloyd runs on the histogram, or the run from `start`; float64 [entries] in [0, 1].

    A step reads 2**bits entries of running sums, microseconds in numpy; the sums need float64, which JAX has
    switched off by default.
    """
    sums = np.stack([np.cumsum(mass), np.cumsum(first)])
    sums = np.pad(sums, ((0, 0), (1, 0)))
    if start is not None:
        return _lloyd_runs(sums, start[None])[0]
    near = np.clip(np.arange(_CELLS)[:, None] + (-32, 33), 0, _CELLS)
    density = np.maximum(np.diff(sums[0][near])[:, 0], 0)  # of 65 cells around each
    uniform_start = np.linspace(0.0, 1.0, entries)
    ranks = (np.arange(entries) + 0.5) / entries
    starts = [uniform_start]
    for cdf in (np.cumsum(density), np.cumsum(np.cbrt(density))):
        starts.append(np.searchsorted(cdf / cdf[-1], ranks) / _CELLS)
    generator = np.random.default_rng(seed)
    for _ in range(3):
        starts.append(np.sort(np.searchsorted(cdf / cdf[-1], generator.random(entries)) / _CELLS))
    runs = _lloyd_runs(sums, np.stack(starts))
    # The starting points of the first run are evenly spaced levels: they take part as they are.
    found = np.stack([*runs, uniform_start])
    return found[np.argmax(_explained(sums, found))]


def _cells(sums: np.ndarray, centroids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Weight and weighted positions of what is nearest to each of centroids [..., entries]."""
    middle = np.rint((centroids[..., 1:] + centroids[..., :-1]) / 2 * _CELLS)
    ends = np.zeros((*centroids.shape[:-1], 1))
    edges = np.concatenate([ends, np.clip(middle, 0, _CELLS), ends + _CELLS], axis=-1).astype(int)
    return np.diff(sums[0][edges]), np.diff(sums[1][edges])


def _explained(sums: np.ndarray, centroids: np.ndarray) -> np.ndarray:
    """Squared errors of centroids [..., entries] are a constant of the sample minus this."""
    mass, first = _cells(sums, centroids)
    return np.sum(2 * centroids * first - centroids**2 * mass, axis=-1)


def _lloyd_runs(sums: np.ndarray, starts: np.ndarray) -> np.ndarray:
    """Where runs from starts [runs, entries] converge; side by side, since a step of numpy takes its time."""
    found, going = starts.copy(), np.arange(len(starts))
    for _ in range(_MAX_STEPS):
        centroids = found[going]
        mass, first = _cells(sums, centroids)
        moved = np.sort(np.where(mass > 0, first / np.where(mass > 0, mass, 1), centroids))
        found[going] = moved
        going = going[np.abs(moved - centroids).max(-1) >= 1e-9]
        if not len(going):
            break
    return found
