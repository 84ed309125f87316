"""Rotary position embedding, split halves (the order of Hugging Face's checkpoints).

Kernels rotate pairs (i, i + head_dim / 2) of a whole head. Other pairs become these by `order`: the
product of a query and a key does not depend on the order of their elements.
"""

import math

import jax.numpy as jnp
import numpy as np
from jax import Array

from fdk_jax.models.config import ModelConfig, Rope


def inverse_frequencies(rope: Rope, head_dim: int) -> np.ndarray:
    """Radians that a position rotates each pair by: float32 [rotary_dim / 2], scaling applied."""
    rotary = rope.rotary_dim or head_dim
    exponents = np.arange(0, rotary, 2, dtype=np.float32) / np.float32(rotary)
    freq = (1.0 / np.float32(rope.theta) ** exponents).astype(np.float32)
    scaling = rope.scaling
    if scaling is None:
        return freq
    if scaling.kind == "linear":
        return (freq / scaling.factor).astype(np.float32)
    wavelength = 2 * math.pi / freq
    low = scaling.original_context / scaling.low_freq_factor
    high = scaling.original_context / scaling.high_freq_factor
    blend = (scaling.original_context / wavelength - scaling.low_freq_factor) / (
        scaling.high_freq_factor - scaling.low_freq_factor
    )
    blended = (1 - blend) * freq / scaling.factor + blend * freq
    scaled = np.where(wavelength > low, freq / scaling.factor, freq)
    middle = (wavelength <= low) & (wavelength >= high)
    return np.where(middle, blended, scaled).astype(np.float32)


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


def cos_sin(config: ModelConfig, rope: Rope | None, positions: Array) -> tuple[Array, Array]:
    """Cosines and sines of the angles at `positions`: float32 [*positions.shape, head_dim / 2].

    Pairs that carry no position have the angle 0. `rope.factor` and a `query_scale` of the model that is
    not the usual one multiply both, so that the scores have them in every kernel; a key is kept so.
    """
    dim = config.head_dim
    freq = np.zeros(dim // 2, np.float32)
    if rope is not None:
        rotated = inverse_frequencies(rope, dim)
        freq[: len(rotated)] = rotated
    angles = positions.astype(jnp.float32)[..., None] * jnp.expand_dims(
        freq, tuple(range(positions.ndim))
    )
    factor = 1.0
    if config.query_scale is not None:
        factor = math.sqrt(config.query_scale * math.sqrt(dim))
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    rotation = 1.0 if rope is None else rope.factor
    if factor == rotation == 1.0:
        return cos, sin
    # The factor of RoPE leaves what it does not rotate as it is.
    each = np.full(dim // 2, factor, np.float32)
    if rope is not None:
        each[: (rope.rotary_dim or dim) // 2] *= rotation
    each = jnp.expand_dims(each, tuple(range(positions.ndim)))
    return cos * each, sin * each


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
