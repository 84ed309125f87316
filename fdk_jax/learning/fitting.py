"""One matrix: codebook, scales and codes fitted for the error that they cause. `calibrate_array`."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from fdk_jax.format import codebooks, packing
from fdk_jax.format.orientation import to_matrix
from fdk_jax.format.quantisation import (
    SCALES,
    as_matrix,
    check_options,
    resolve_codebook,
    resolve_scale,
    scaled,
)
from fdk_jax.format.quantised_tensor import QuantisedTensor
from fdk_jax.learning.refitting import learn as learn_matrix
from fdk_jax.learning.refitting import refit_levels, refit_scales
from fdk_jax.learning.rounding import corrected, descend, nearest, search_scales, spread

if TYPE_CHECKING:
    from jaxtyping import Float

# Fitting the codebook and searching scales take turns; the error hardly moves after the third.
_TURNS = 3
# At 4 bits and more what a codebook gains by it is below a part in a hundred of the error.
_REFITTED_BITS = 2
# 256 levels lie too close for their places to matter, and their system takes 256 products of the moments.
_LEARNED_BITS = 4
ROUNDINGS = ("auto", "nearest", "corrected")


@dataclasses.dataclass(frozen=True)
class Format:
    """What to make of each matrix."""

    bits: int
    group_size: int
    codebook: Any
    scale: str
    damping: float
    sweeps: int
    seed: int
    rounding: str = "auto"
    learn: bool | str = False

    @property
    def kind(self) -> str:
        """The rule of the scales that the search starts from."""
        return resolve_scale("auto" if self.scale == "search" else self.scale, self.bits)

    @property
    def fitted(self) -> bool:
        return isinstance(self.codebook, str) and self.codebook in ("auto", "kmeans")

    @property
    def learns_scales(self) -> bool:
        return bool(self.learn) and self.scale != "none"

    @property
    def learns_levels(self) -> bool:
        """Whether levels are learned; even ones stay even, which 1 bit's always are."""
        if self.learn is not True or self.bits > _LEARNED_BITS:
            return False
        if self.fitted or isinstance(self.codebook, str):
            return self.fitted or self.codebook != "uniform"
        return self.bits == 1 or not codebooks.is_uniform(codebooks.check(self.codebook, self.bits))

    def check(self) -> None:
        if self.scale not in (*SCALES, "search"):
            raise ValueError(f"scale={self.scale!r} is not one of {(*SCALES, 'search')}")
        check_options(self.bits, self.group_size, self.codebook, self.kind)
        if not self.damping > 0:
            raise ValueError(f"damping={self.damping} must be above 0")
        if self.sweeps < 0:
            raise ValueError(f"sweeps={self.sweeps} must not be negative")
        if self.rounding not in ROUNDINGS:
            raise ValueError(f"rounding={self.rounding!r} is not one of {ROUNDINGS}")
        if not isinstance(self.learn, bool) and self.learn != "scales":
            raise ValueError(f"learn={self.learn!r} is not False, True or 'scales'")
        if self.learn and not (self.learns_scales or self.learns_levels):
            raise ValueError(
                f"learn={self.learn!r} has nothing to learn: scale='none' has no scales, and the levels of"
                f" codebook={self.codebook!r} stay as they are at bits={self.bits}; take another scale"
            )


@dataclasses.dataclass(frozen=True)
class Matrix:
    """One matrix [N, K] in its compute dtype, with what is known about its inputs."""

    weight: Array
    importance: Array | None  # float32 [N, K] or [1, K]
    second: Array | None = None  # float32 [K, K]

    def wide(self) -> Array:
        return self.weight.astype(jnp.float32)


def calibrate_array(
    weight: Float[ArrayLike, " ..."],
    bits: int = 4,
    *,
    group_size: int = 64,
    codebook: Any = "kmeans",
    scale: str = "search",
    axes: str = "nk",
    dtype: Any = None,
    importance: Float[ArrayLike, " ..."] | None = None,
    second_moment: Float[ArrayLike, "*B K K"] | None = None,
    rounding: str = "auto",
    damping: float = 0.05,
    sweeps: int = 3,
    learn: bool | str = False,
    seed: int = 0,
) -> QuantisedTensor:
    """Quantises one weight for the least weighted error, as `calibrate` does for each layer of a model.

    Args:
        weight: float [..., *shape] with one axis of `shape` for each letter of `axes`.
        bits: 1, 2, 4 or 8.
        group_size: weights along K that share a scale.
        codebook: see `fdk_jax.quantise`; "kmeans", which "auto" stands for here, is fitted with the importance.
        scale: "search" (least weighted error of each group) or a rule of `fdk_jax.quantise`.
        axes: orientation, see `QuantisedTensor`.
        dtype: compute dtype; None keeps that of the weight.
        importance: non-negative, how much an error of each weight matters: [K] for each input, or the
            shape of `weight`. None takes the diagonal of `second_moment`, or ones.
        second_moment: float [..., K, K], the mean of x x^T over inputs x.
        rounding: "corrected" (error correction, `fdk_jax.learning.rounding.corrected`, by `second_moment`),
            "nearest", or "auto": corrected if `second_moment` is given.
        damping: part of the mean of its diagonal that is added to the diagonal.
        sweeps: of coordinate descent after the rounding with error correction, each with refitted scales (of
            "search") and, up to 2 bits, refitted levels (of "kmeans"); 0 for GPTQ's rounding alone.
        learn: True learns scales and levels for the error of the outputs once the codes are chosen, the
            former by any rule but "none", and with "corrected" the codes anew with them; "scales" leaves the
            levels. Evenly spaced levels ("uniform", or given ones with more than two values) stay as they are,
            and so do those of 8 bits; levels that are equal stay equal. The error, with damped moments, is at
            most that of False. Needs `second_moment`.
        seed: of the k-means.

    Returns:
        A `QuantisedTensor` in the interchange layout.

    Raises:
        TypeError: the weight is not a float array.
        ValueError: an argument out of range, or data that is not finite or does not fit.
    """
    form = Format(bits, group_size, codebook, scale, damping, sweeps, seed, rounding, learn)
    form.check()
    if second_moment is None and (learn or rounding == "corrected"):
        raise ValueError(f"{learn=} and {rounding=} need the inputs' moments: give second_moment")
    matrix, batch, shape = as_matrix(weight, axes, dtype)
    if not bool(_finite(matrix)):
        raise ValueError("the weight holds NaN or infinity; it cannot be quantised")
    given = None if importance is None else importance_matrix(importance, matrix, axes)
    second = None if second_moment is None else jnp.asarray(second_moment, jnp.float32)
    k = matrix.shape[-1]
    if second is not None and second.shape != (*batch, k, k):
        raise ValueError(f"second_moment of shape {second.shape} must be {(*batch, k, k)}")
    if second is not None and not bool(_finite(second)):
        raise ValueError("second_moment holds NaN or infinity")
    parts = []
    for index in np.ndindex(*batch):
        here = None if second is None else second[index]
        h = jnp.diagonal(here)[None] if given is None and here is not None else None
        h = given[index] if given is not None else h
        parts.append(_quantise_matrix(Matrix(matrix[index], usable(h), here), form))
    if batch:
        parts = [[jnp.stack(a).reshape(*batch, *a[0].shape) for a in zip(*parts, strict=True)]]
    ((packed, scales, levels),) = parts
    uniform = bits == 1 or codebooks.is_uniform(np.asarray(levels))
    return QuantisedTensor(packed, scales, levels, bits, group_size, shape, axes, uniform=uniform)


def importance_matrix(importance: ArrayLike, matrix: Array, axes: str) -> Array:
    """float32 [..., N, K] or [..., 1, K]."""
    importance = jnp.asarray(importance, jnp.float32)
    k = matrix.shape[-1]
    if importance.shape == (*matrix.shape[:-2], k):
        out = importance[..., None, :]
    elif importance.ndim < len(axes) or to_matrix(importance, axes)[0].shape != matrix.shape:
        raise ValueError(
            f"importance of shape {importance.shape} must be {(*matrix.shape[:-2], k)} or that of the weight"
        )
    else:
        out = to_matrix(importance, axes)[0]
    if not bool(_usable(out)):
        raise ValueError("importance must be finite and non-negative")
    return out


def usable(importance: Array | None) -> Array | None:
    """An importance with mean 1, where dead inputs keep a little: their codes are then the nearest ones."""
    return None if importance is None else _with_mean_one(importance)


# A GPU's programs take a tenth of a second each to compile, for every shape again: so these are few.
@jax.jit
def _finite(values: Array) -> Array:
    return jnp.isfinite(values).all()


@jax.jit
def _usable(importance: Array) -> Array:
    return jnp.all((importance >= 0) & jnp.isfinite(importance))


@jax.jit
def _with_mean_one(importance: Array) -> Array:
    mean = importance.mean()
    return jnp.maximum(importance / jnp.where(mean > 0, mean, 1), jnp.float32(1e-6))


@functools.partial(jax.jit, static_argnums=(1, 2))
def _base_scales(weight: Array, group_size: int, kind: str) -> Array:
    return scaled(weight, group_size, kind)[1]


@functools.partial(jax.jit, static_argnums=3)
def _quotients(
    weight: Array, scales: Array, importance: Array | None, group_size: int
) -> tuple[Array, Array]:
    """What a codebook is fitted to: weights by their scales, and how much an error of each matters."""
    factors = spread(scales, group_size, weight.shape[-1])
    squares = jnp.square(factors) * (1.0 if importance is None else importance)
    return weight.astype(jnp.float32) / factors, squares


def fit(matrices: list[Callable[[], Matrix]], form: Format) -> tuple[Array, list[Array]]:
    """One codebook float32 [2**bits] for some matrices, and the float32 scales of each."""
    bases = [_base_scales(m().weight, form.group_size, form.kind) for m in matrices]
    if not form.fitted:
        levels = jnp.asarray(resolve_codebook(form.codebook, form.bits, form.kind, form.group_size))
        if form.scale == "search":
            bases = [_search(m(), b, levels, form) for m, b in zip(matrices, bases, strict=True)]
        return levels, bases
    scales = bases

    def part(i: int) -> Callable[[], tuple[Array, Array]]:
        def values() -> tuple[Array, Array]:
            m = matrices[i]()
            return _quotients(m.weight, scales[i], m.importance, form.group_size)

        return values

    parts = [part(i) for i in range(len(matrices))]
    levels = codebooks.fit_parts(parts, 2**form.bits, seed=form.seed)
    for turn in range(_TURNS if form.scale == "search" else 0):
        if turn:
            levels = codebooks.fit_parts(parts, 2**form.bits, seed=form.seed, start=levels)
        scales = [_search(m(), b, levels, form) for m, b in zip(matrices, bases, strict=True)]
    return levels, scales


def _search(m: Matrix, base: Array, levels: Array, form: Format) -> Array:
    return search_scales(
        m.wide(), base, levels, m.importance, group_size=form.group_size, dtype=m.weight.dtype
    )


def _quantise_matrix(m: Matrix, form: Format) -> tuple[Array, Array, Array]:
    """(packed, scales, codebook) of a matrix."""
    levels, (scales,) = fit([lambda: m], form)
    options: dict[str, Any] = dict(group_size=form.group_size, dtype=m.weight.dtype)
    corrects = m.second is not None and form.rounding != "nearest"
    if m.second is None or not corrects:
        codes = nearest(m.wide(), scales, levels, **options)
    else:
        codes = corrected(m.wide(), scales, levels, m.second, damping=form.damping, **options)
        for _ in range(form.sweeps):
            if form.fitted and form.bits <= _REFITTED_BITS:
                codes, levels = refit_levels(m.wide(), codes, scales, levels, m.second, **options)
            if form.scale == "search":
                scales = refit_scales(m.wide(), codes, scales, levels, m.second, **options)
            given = (m.wide(), codes, scales, levels, m.second)
            codes = descend(*given, damping=form.damping, **options)
        if form.scale == "search":
            scales = refit_scales(m.wide(), codes, scales, levels, m.second, **options)
    if form.learn and m.second is not None:
        codes, scales, levels = learn_matrix(
            m.wide(), codes, scales, levels, m.second, damping=form.damping, sweeps=corrects,
            learns_scales=form.learns_scales, learns_levels=form.learns_levels, **options,
        )  # fmt: skip
    return packing.pack(codes, form.bits), scales.astype(m.weight.dtype), levels
