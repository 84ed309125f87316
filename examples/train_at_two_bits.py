"""Quantisation-aware training: a layer is quantised to 2 bits, and trained further as it is then.

python examples/train_at_two_bits.py
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import fdk_jax

RNG = np.random.default_rng(0)
MAP = RNG.standard_normal((32, 16)).astype(np.float32) / 32**0.5  # what is learned


def batch(rows: int) -> tuple[np.ndarray, np.ndarray]:
    """Inputs [rows, 32] and what the layer should make of them, [rows, 16]."""
    x = RNG.standard_normal((rows, 32)).astype(np.float32)
    return x, np.tanh(x @ MAP)


def loss(model: nnx.Module, batch) -> jax.Array:
    """Mean squared error."""
    x, y = batch
    return jnp.mean((model(x) - y) ** 2)


def train(model: nnx.Module, steps: int, rate: float) -> nnx.Module:
    """Trains a model in place."""
    optimizer = nnx.Optimizer(model, optax.adam(rate), wrt=nnx.Param)
    step = fdk_jax.training.make_train_step(loss)
    for _ in range(steps):
        step(model, optimizer, batch(64))
    return model


test, evaluate = batch(1024), nnx.jit(loss)
model = train(nnx.Sequential(nnx.Linear(32, 16, rngs=nnx.Rngs(0))), steps=150, rate=1e-2)
print(f"float32: loss {evaluate(model, test):.3f}")
options: dict[str, Any] = dict(bits=2, group_size=16, codebook="uniform")
small = fdk_jax.quantise(model, **options)
print(f"2 bits, quantised after training: loss {evaluate(small, test):.3f}")
aware = train(fdk_jax.training.quantisation_aware(model, **options), steps=200, rate=1e-3)
small = fdk_jax.training.export(aware)
print(f"2 bits, quantisation-aware training: loss {evaluate(small, test):.3f}")
