"""Rotary position embedding, split halves (the order of Hugging Face's checkpoints).

Kernels rotate pairs (i, i + head_dim / 2) of a whole head. Other pairs become these by `order`: the
product of a query and a key does not depend on the order of their elements.
"""

import math

import jax.numpy as jnp
import numpy as np
from jax import Array

from fdk_jax.models.config import ModelConfig, Rope, RopeScaling


def inverse_frequencies(rope: Rope, head_dim: int) -> np.ndarray:
    """Radians that a position rotates each pair by: float32 [rotary_dim / 2], scaling applied.

    Of a scaling that follows the length of a sequence: those of short ones.
    """
    rotary, scaling = rope.rotary_dim or head_dim, rope.scaling
    exponents = np.arange(0, rotary, 2, dtype=np.float32) / np.float32(rotary)
    freq = (1.0 / np.float32(rope.theta) ** exponents).astype(np.float32)
    if scaling is None or scaling.kind == "dynamic":
        return freq
    if scaling.kind == "linear":
        freq = freq / scaling.factor
    elif scaling.kind == "llama3":
        freq = _llama3(freq, scaling)
    elif scaling.kind == "yarn":
        freq = _yarn(freq, scaling, rope.theta)
    else:
        freq = freq / np.asarray(scaling.short_factors, np.float32)
    return freq.astype(np.float32)


def _llama3(freq: np.ndarray, scaling: RopeScaling) -> np.ndarray:
    wavelength = 2 * math.pi / freq
    low = scaling.original_context / scaling.low_freq_factor
    high = scaling.original_context / scaling.high_freq_factor
    blend = (scaling.original_context / wavelength - scaling.low_freq_factor) / (
        scaling.high_freq_factor - scaling.low_freq_factor
    )
    blended = (1 - blend) * freq / scaling.factor + blend * freq
    scaled = np.where(wavelength > low, freq / scaling.factor, freq)
    middle = (wavelength <= low) & (wavelength >= high)
    return np.where(middle, blended, scaled)


def _yarn(freq: np.ndarray, scaling: RopeScaling, theta: float) -> np.ndarray:
    """Interpolates pairs with few rotations in the original context (arXiv 2309.00071, section 3.2)."""
    rotary = 2 * len(freq)

    def pair_of(rotations: float) -> float:
        wavelength = scaling.original_context / (rotations * 2 * math.pi)
        return rotary * math.log(wavelength) / (2 * math.log(theta))

    first, last = pair_of(scaling.beta_fast), pair_of(scaling.beta_slow)
    if scaling.truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, rotary - 1)
    width = last - first if last != first else 0.001
    ramp = np.clip((np.arange(len(freq), dtype=np.float32) - first) / width, 0, 1)
    return freq / scaling.factor * ramp + freq * (1 - ramp)


def _of_length(rope: Rope, head_dim: int, lengths: Array) -> Array:
    """The frequencies in sequences of these lengths: float32 [*lengths.shape, rotary_dim / 2]."""
    scaling, rotary = rope.scaling, rope.rotary_dim or head_dim
    freq = inverse_frequencies(rope, head_dim)
    lead = tuple(range(lengths.ndim))
    short = jnp.expand_dims(freq, lead)
    if scaling is None or not scaling.follows_length:
        return short
    if scaling.kind == "longrope":
        ratio = np.asarray(scaling.short_factors, np.float32) / np.asarray(scaling.long_factors)
        long = jnp.expand_dims((freq * ratio).astype(np.float32), lead)
        return jnp.where((lengths > scaling.original_context)[..., None], long, short)
    over = jnp.maximum(lengths, scaling.original_context).astype(jnp.float32)
    growth = scaling.factor * over / scaling.original_context - (scaling.factor - 1)
    base = rope.theta * growth ** (rotary / (rotary - 2))
    exponents = np.arange(0, rotary, 2, dtype=np.float32) / np.float32(rotary)
    return base[..., None] ** -jnp.expand_dims(exponents, lead)


def order(rope: Rope | None, head_dim: int) -> np.ndarray | None:
    """Where the elements of a head come from so that pairs are (i, i + head_dim / 2): int [head_dim].

    None where they are so already.
    """
    if rope is None:
        return None
    rotary = rope.rotary_dim or head_dim
    rotated, rest = np.arange(rotary), np.arange(rotary, head_dim)
    first, second = (rotated[::2], rotated[1::2]) if rope.interleaved else np.split(rotated, 2)
    found = np.concatenate([first, *np.split(rest, 2)[:1], second, *np.split(rest, 2)[1:]])
    return None if (found == np.arange(head_dim)).all() else found


def cos_sin(
    config: ModelConfig, rope: Rope | None, positions: Array, lengths: Array
) -> tuple[Array, Array]:
    """Cosines and sines of the angles at `positions`: float32 [..., head_dim / 2].

    Args:
        config: Of the model.
        rope: Of the layer.
        positions: int32.
        lengths: int32, broadcast against `positions` where a scaling of the frequencies follows it: tokens of
            the sequences that they are in.

    Pairs that carry no position have the angle 0. `rope.factor` and a `query_scale` of the model that is
    not the usual one multiply both, so that the scores have them in every kernel; a key is kept so.
    """
    dim = config.head_dim
    if rope is None:
        angles = jnp.zeros((*positions.shape, dim // 2), jnp.float32)
    else:
        if rope.scaling is not None and rope.scaling.follows_length:
            positions, lengths = jnp.broadcast_arrays(positions, lengths)
        freq = _of_length(rope, dim, lengths)
        angles = positions.astype(jnp.float32)[..., None] * freq
        still = [(0, 0)] * positions.ndim + [(0, dim // 2 - angles.shape[-1])]
        angles = jnp.pad(angles, still)
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    each = _factors(config, rope)
    if rope is not None and rope.query_growth is not None:
        growth, context = rope.query_growth
        grown = 1 + growth * jnp.log(1 + (positions // context).astype(jnp.float32))
        cos, sin = cos * grown[..., None], sin * grown[..., None]
    if (each == 1).all():
        return cos, sin
    each = jnp.expand_dims(each, tuple(range(positions.ndim)))
    return cos * each, sin * each


def _factors(config: ModelConfig, rope: Rope | None) -> np.ndarray:
    """What cosines and sines of each pair are multiplied by at every position: float32 [head_dim / 2]."""
    dim, factor = config.head_dim, 1.0
    if config.query_scale is not None:
        factor = math.sqrt(config.query_scale * math.sqrt(dim))
    each = np.full(dim // 2, factor, np.float32)
    if rope is not None:  # its factor leaves what it does not rotate as it is
        each[: (rope.rotary_dim or dim) // 2] *= rope.factor
    return each


def of_keys(config: ModelConfig, rope: Rope | None, cos: Array, sin: Array) -> tuple[Array, Array]:
    """Cosines and sines for keys: `cos_sin` without the growth of queries, which is the length of each pair."""
    if rope is None or rope.query_growth is None:
        return cos, sin
    grown = jnp.hypot(cos[..., :1], sin[..., :1]) / _factors(config, rope)[0]
    return cos / grown, sin / grown


def rotate(x: Array, cos: Array, sin: Array) -> Array:
    """Rotates pair (i, i + D/2) of the last axis by its angle, in float32; returns x's dtype.

    Args:
        x: [..., D].
        cos: float32, broadcastable to [..., D/2] with as many axes as x.
        sin: Like cos.
    """
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    rotated = (first * cos - second * sin, second * cos + first * sin)
    return jnp.concatenate(rotated, axis=-1).astype(x.dtype)
