"""Quantises a Flax model to 4 bits and compares it with itself."""

import jax
import jax.numpy as jnp
from flax import nnx

import fdk_jax

model = nnx.Sequential(
    nnx.Linear(256, 512, rngs=nnx.Rngs(0)), jax.nn.gelu, nnx.Linear(512, 64, rngs=nnx.Rngs(1))
)
small = fdk_jax.prepare(fdk_jax.quantise(model, bits=4, codebook="kmeans"))
print(fdk_jax.summary(small))
x = jax.random.normal(jax.random.key(0), (8, 256))
before, after = model(x), nnx.jit(lambda m, x: m(x))(small, x)
error = float(jnp.linalg.norm(after - before) / jnp.linalg.norm(before))
print(f"relative error of the outputs {error:.3f}")
