"""Rotary position embedding, split halves (the order of Hugging Face's checkpoints)."""

import math

import jax.numpy as jnp
import numpy as np
from jax import Array

from fdk_jax.models.config import ModelConfig


def inverse_frequencies(config: ModelConfig) -> np.ndarray:
    """Radians a position turns each pair by: float32 [head_dim / 2], scaling applied."""
    exponents = np.arange(0, config.head_dim, 2, dtype=np.float32) / np.float32(config.head_dim)
    freq = (1.0 / np.float32(config.rope_theta) ** exponents).astype(np.float32)
    scaling = config.rope_scaling
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


def cos_sin(config: ModelConfig, positions: Array) -> tuple[Array, Array]:
    """Cosines and sines of the angles at `positions`: float32 [*positions.shape, head_dim / 2]."""
    angles = positions.astype(jnp.float32)[..., None] * jnp.expand_dims(
        inverse_frequencies(config), tuple(range(positions.ndim))
    )
    return jnp.cos(angles), jnp.sin(angles)


def rotate(x: Array, cos: Array, sin: Array) -> Array:
    """Turns pair (i, i + D/2) of the last axis by its angle, in float32; returns x's dtype.

    Args:
        x: [..., D].
        cos: float32, broadcastable to [..., D/2] with as many axes as x.
        sin: Like cos.
    """
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    turned = (first * cos - second * sin, second * cos + first * sin)
    return jnp.concatenate(turned, axis=-1).astype(x.dtype)
