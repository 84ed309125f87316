"""Formats of the table on real networks: what each makes of one matrix."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from fdk_jax.format import codebooks
from fdk_jax.format.quantisation import quantise_array, resolve_codebook, resolve_scale, scaled
from fdk_jax.learning.fitting import calibrate_array
from fdk_jax.learning.rounding import spread

_GROUP = 64
_MX_GROUP = 32
_PUBLISHED_GROUP = 128  # of the GPTQ checkpoints that people share
_DTYPE = jnp.bfloat16


@dataclasses.dataclass(frozen=True)
class Format:
    """One way to quantise a matrix.

    Attributes:
        bits: 8, 4, 3 (8 levels, held in codes of 4 bits here), 2 or 1.
        levels: "uniform" (no zero among them), "symmetric" (one level fewer, with a zero), "integers"
            (-8..7 at 4 bits), a codebook of `fdk_jax.quantise`, "kmeans" (fitted to the quotients, there
            "kmeans-quotients"), "kmeans-weights" (fitted for the error of the weights), "mxfp4" or "published"
            (those of `published_gptq`).
        scale: a rule of `fdk_jax.quantise`; "signed" (the extreme of a group is the lowest level, so a scale
            may be negative); or "search".
        rounding: "nearest"; "weighted" (scales and fitted levels weighted by the activations); "corrected" (and
            rounding that makes up for errors, as GPTQ); "descended" (and sweeps of coordinate descent);
            "learned" (and scales and levels learned after that), or "nearest-learned" (after "weighted");
            "gptq" (of auto-gptq, see `published_gptq`); or "trained" (a network's `trained`, not `apply`).
        seed: of the text for calibration.
        group_size: weights along K that share a scale.
    """

    bits: int
    levels: str
    scale: str = "absmax"
    rounding: str = "nearest"
    seed: int = 0
    group_size: int = _GROUP

    @property
    def name(self) -> str:
        """Unique."""
        parts = [str(self.bits), self.levels, self.scale, self.rounding]
        parts += [f"seed {self.seed}"] * (self.seed > 0)
        return " ".join(
            parts + [f"group {self.group_size}"] * (self.group_size == _PUBLISHED_GROUP)
        )

    @property
    def width(self) -> int:
        """Bits of its codes in memory."""
        return 4 if self.bits == 3 else self.bits

    @property
    def trained_codebook(self) -> Any:
        """What a network is trained with: "kmeans" or float32 levels."""
        fitted = self.levels.startswith("kmeans")
        return "kmeans" if fitted else even_or_named(self.levels, self.bits, self.scale)

    @property
    def needs_data(self) -> bool:
        """Whether it is fitted to activations."""
        return self.rounding not in ("nearest", "trained")

    def bytes_per_weight(self, shape: tuple[int, ...]) -> float:
        """Codes, scales and the codebook of a matrix over its weights."""
        if self.levels == "mxfp4":
            return self.bits / 8 + 1 / self.group_size
        scales = _DTYPE.dtype.itemsize / self.group_size
        if self.levels == "published":
            zero_points = self.bits / 8 / self.group_size
            return self.bits / 8 + scales + zero_points
        return self.bits / 8 + scales + 4 * 2**self.bits / math.prod(shape)

    def apply(self, matrix: Array, second: Array | None = None) -> Array:
        """The quantised matrix.

        Args:
            matrix: float [N, K].
            second: float32 [K, K], second moments of its inputs, if `needs_data`.

        Returns:
            float32 [N, K].
        """
        matrix = matrix.astype(_DTYPE)
        if self.levels == "mxfp4":
            return _mxfp4(matrix)
        if self.rounding == "gptq":
            from fdk_jax.quality import published_gptq  # which needs torch

            return published_gptq.quantised(
                matrix,
                second,
                bits=self.bits,
                group_size=self.group_size,
                search=self.scale == "search",
            )
        if self.scale == "signed":
            signs = _signs(matrix)
            made = dataclasses.replace(self, scale="absmax").apply(matrix * signs, second)
            return made * signs.astype(made.dtype)
        fixed = isinstance(levels := self._codebook(matrix), np.ndarray)
        width = self.width
        options: dict[str, Any] = dict(
            group_size=self.group_size, scale=self.scale, codebook=levels
        )
        if not self.needs_data and self.scale != "search":
            if not fixed and self.levels == "kmeans":
                options["codebook"] = "kmeans-quotients"
            return quantise_array(matrix, width, **options).dequantise(jnp.float32)
        if self.needs_data and second is None:
            raise ValueError(f"{self.name} needs second moments")
        if self.rounding == "weighted":
            options["importance"] = jnp.diagonal(jnp.asarray(second))
        if self.rounding in ("corrected", "descended", "learned", "nearest-learned"):
            options["second_moment"] = second
        if self.rounding == "corrected":
            options["sweeps"] = 0
        if self.rounding.endswith("learned"):
            options["learn"] = True
        if self.rounding == "nearest-learned":
            options["rounding"] = "nearest"
        return calibrate_array(matrix, width, **options).dequantise(jnp.float32)

    def _codebook(self, matrix: Array) -> Any:
        """Levels as float32 [2**bits], or "kmeans" where they are fitted by the library."""
        if self.levels.startswith("kmeans"):
            if self.bits != 3:
                return "kmeans"
            quotients, scales = scaled(matrix, _GROUP, "absmax")
            importance = jnp.square(spread(scales, _GROUP, matrix.shape[1]))
            return np.asarray(codebooks.fit(quotients, 8, importance=importance))
        return even_or_named(self.levels, self.bits, self.scale)


def even_or_named(name: str, bits: int, scale: str) -> np.ndarray:
    """float32 levels, at most 2**bits, of a name that is not fitted."""
    half = 2 ** (bits - 1)
    if name == "uniform":  # 3 bits, which have no layout, too
        return np.linspace(-1, 1, 2**bits, dtype=np.float32)
    if name == "symmetric":
        return (np.arange(1 - half, half) / max(1, half - 1)).astype(np.float32)
    if name == "integers":
        return (np.arange(-half, half) / half).astype(np.float32)
    rule = resolve_scale("auto", bits) if scale == "search" else resolve_scale(scale, bits)
    return resolve_codebook(name, bits, rule, _GROUP)


@jax.jit
def _signs(matrix: Array) -> Array:
    """[N, K] of -1 and 1: by which a group's extreme becomes negative."""
    n, k = matrix.shape
    groups = jnp.pad(matrix, ((0, 0), (0, -k % _GROUP))).reshape(n, -1, _GROUP)
    extreme = jnp.take_along_axis(groups, jnp.argmax(jnp.abs(groups), -1)[..., None], -1)[..., 0]
    return spread(jnp.where(extreme > 0, -1, 1).astype(matrix.dtype), _GROUP, k)


@jax.jit
def _mxfp4(matrix: Array) -> Array:
    """E2M1 in groups of 32 with scales that are powers of two (OCP Microscaling formats, version 1.0)."""
    n, k = matrix.shape
    wide = jnp.pad(matrix.astype(jnp.float32), ((0, 0), (0, -k % _MX_GROUP)))
    groups = wide.reshape(n, -1, _MX_GROUP)
    exponent = jnp.frexp(jnp.abs(groups).max(-1))[1] - 1 - 2
    scale = jnp.ldexp(jnp.float32(1), exponent)[..., None]
    levels = jnp.asarray(codebooks.fp4() * np.float32(6))
    codes = jnp.searchsorted((levels[1:] + levels[:-1]) / 2, groups / scale)
    return (levels[codes] * scale).reshape(n, -1)[:, :k]


def _table() -> tuple[Format, ...]:
    """In an order in which the first rows say the most."""
    plain = {
        4: (
            "uniform", "symmetric", "integers", "nf4", "fp4", "mxfp4", "normal", "laplace", "student",
            "kmeans", "kmeans-weights",
        ),
        2: ("uniform", "symmetric", "integers", "normal", "kmeans-weights"),
        8: ("uniform", "symmetric", "integers", "normal", "kmeans"),
        3: ("uniform", "symmetric", "integers", "normal", "kmeans-weights"),
    }  # fmt: skip
    found = [
        Format(bits, levels, group_size=_MX_GROUP if levels == "mxfp4" else _GROUP)
        for bits, names in plain.items()
        for levels in names
    ]
    found += [
        Format(2, levels, "absmean")
        for levels in ("uniform", "symmetric", "normal", "kmeans", "kmeans-weights")
    ]
    found += [Format(2, levels, "rms") for levels in ("normal", "kmeans-weights")]
    found += [Format(1, levels, "absmean") for levels in ("uniform", "normal", "kmeans-weights")]
    found += [Format(bits, "integers", "signed") for bits in (4, 3, 2)]
    found.append(Format(4, "kmeans-weights", "signed"))
    searched = {
        4: ("uniform", "symmetric", "integers", "nf4", "normal", "kmeans"),
        2: ("uniform", "symmetric", "integers", "normal", "kmeans"),
        1: ("uniform", "kmeans"),
        3: ("uniform", "integers", "normal", "kmeans"),
    }
    found += [Format(bits, lv, "search") for bits, names in searched.items() for lv in names]
    corrected = {
        4: ("kmeans", "integers", "nf4", "uniform"),
        2: ("kmeans", "symmetric", "normal"),
        1: ("kmeans", "uniform"),
        3: ("kmeans", "integers"),
        8: ("symmetric",),
    }
    found += [
        Format(bits, levels, "search", "corrected")
        for bits, names in corrected.items()
        for levels in names
    ]
    descended = {
        4: ("kmeans", "nf4", "integers"),
        2: ("kmeans", "normal"),
        1: ("kmeans",),
        3: ("kmeans", "integers"),
    }
    found += [
        Format(bits, levels, "search", "descended")
        for bits, names in descended.items()
        for levels in names
    ]
    learned = {4: ("kmeans", "nf4", "integers"), 2: ("kmeans",), 1: ("kmeans",), 3: ("kmeans",)}
    found += [
        Format(bits, levels, "search", "learned")
        for bits, names in learned.items()
        for levels in names
    ]
    found += [Format(bits, "kmeans", "search", "nearest-learned") for bits in (4, 2, 1)]
    found += [Format(4, levels, "absmax", "corrected") for levels in ("integers", "nf4")]
    found += [Format(bits, "kmeans", "search", "weighted") for bits in (4, 2, 1, 3)]
    found += [
        Format(bits, "kmeans", "search", rounding, seed=1)
        for rounding in ("corrected", "descended")
        for bits in (4, 2, 1)
    ]
    trained = {
        1: ("uniform",),
        2: ("normal", "uniform"),
        4: ("nf4", "uniform", "integers"),
        3: ("normal", "integers"),
    }
    found += [Format(bits, "kmeans-weights", "auto", "trained") for bits in (1, 2, 4)]
    found += [
        Format(bits, lv, "auto", "trained") for bits, names in trained.items() for lv in names
    ]
    # Beside a published GPTQ, with its groups.
    found += [
        Format(4, levels, "search", rounding, group_size=_PUBLISHED_GROUP)
        for levels, rounding in (
            ("integers", "corrected"), ("integers", "descended"), ("nf4", "descended"), ("kmeans", "descended"),
        )
    ]  # fmt: skip
    found += [
        Format(4, "published", scale, "gptq", group_size=_PUBLISHED_GROUP)
        for scale in ("absmax", "search")
    ]
    return tuple(found)


FORMATS = _table()
