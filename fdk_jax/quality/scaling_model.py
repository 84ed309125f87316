"""Language models of the scaling table: layers stacked under one scan, so that depth compiles once."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from fdk_jax.layers.linear import QuantisedWeight
from fdk_jax.learning import compiling

_HEAD = 64
_THETA = 10_000.0
_EPSILON = 1e-6


@dataclasses.dataclass(frozen=True)
class Shape:
    """Sizes of a model.

    Attributes:
        hidden: D, a multiple of 64.
        intermediate: width of the gated block.
        layers: L.
        vocabulary: V.
    """

    hidden: int
    intermediate: int
    layers: int
    vocabulary: int

    @property
    def parameters(self) -> int:
        """Of the layers, without the embedding and the norms."""
        return self.layers * (4 * self.hidden**2 + 3 * self.hidden * self.intermediate)


class Norm(nnx.Module):
    """Division by the root mean square, in float32, times a learned scale."""

    def __init__(self, size: int):
        self.scale = nnx.Param(jnp.ones(size, jnp.float32))

    def __call__(self, x: Array) -> Array:
        """[..., size] -> the same shape and dtype."""
        wide = x.astype(jnp.float32)
        square = jnp.mean(jnp.square(wide), axis=-1, keepdims=True)
        scale = self.scale.get_value().reshape((1,) * (x.ndim - 1) + (-1,))
        return (wide * jax.lax.rsqrt(square + _EPSILON) * scale).astype(x.dtype)


class Block(nnx.Module):
    """Causal attention and a gated feed-forward block, each with a norm before it."""

    def __init__(self, shape: Shape, attention: str, rngs: nnx.Rngs):
        self.attention = attention
        d, inner = shape.hidden, shape.intermediate

        def linear(k: int, n: int, gain: float = 1.0) -> nnx.Linear:
            init = nnx.initializers.variance_scaling(gain, "fan_in", "normal")
            return nnx.Linear(k, n, use_bias=False, dtype=jnp.bfloat16, kernel_init=init, rngs=rngs)

        # What is added to the stream shrinks with the number of layers that add to it.
        gain = 0.5 / shape.layers
        self.before_attention = Norm(d)
        self.qkv, self.out = linear(d, 3 * d), linear(d, d, gain)
        self.before_inner = Norm(d)
        self.gate_up, self.down = linear(d, 2 * inner), linear(inner, d, gain)

    def __call__(self, x: Array) -> Array:
        """bfloat16 [B, T, D] -> the same shape."""
        heads = (*x.shape[:-1], 3, x.shape[-1] // _HEAD, _HEAD)
        q, k, v = jnp.moveaxis(self.qkv(self.before_attention(x)).reshape(heads), -3, 0)
        mixed = attend(rotated(q), rotated(k), v, self.attention)
        x = x + self.out(mixed.reshape(x.shape))
        gate, up = jnp.split(self.gate_up(self.before_inner(x)), 2, axis=-1)
        return x + self.down(jax.nn.silu(gate) * up)


def attend(q: Array, k: Array, v: Array, implementation: Any) -> Array:
    """Causal attention [B, T, heads, 64] by an implementation of `jax.nn.dot_product_attention`."""
    return jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation=implementation)


def rotated(x: Array) -> Array:
    """Rotary position embedding of [B, T, heads, 64]."""
    half = x.shape[-1] // 2
    rates = _THETA ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angles = jnp.arange(x.shape[1], dtype=jnp.float32)[:, None] * rates[None]
    cos, sin = (f(angles)[None, :, None].astype(x.dtype) for f in (jnp.cos, jnp.sin))
    a, b = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)


class LanguageModel(nnx.Module):
    """A decoder-only model with float32 master weights, computed in bfloat16; the embedding is the head too.

    Args:
        shape: sizes.
        attention: "xla" or "cudnn", see `jax.nn.dot_product_attention`.
        seed: of the weights.
    """

    def __init__(self, shape: Shape, *, attention: str = "xla", seed: int = 0):
        rngs = nnx.Rngs(seed)

        @nnx.vmap(in_axes=0, out_axes=0)
        def make(key: Array) -> Block:
            return Block(shape, attention, nnx.Rngs(key))

        self.embedding: Any = nnx.Embed(
            shape.vocabulary, shape.hidden, dtype=jnp.bfloat16, rngs=rngs
        )
        self.layers = make(jax.random.split(rngs.params(), shape.layers))
        self.norm = Norm(shape.hidden)

    def __call__(self, tokens: Array) -> Array:
        """Logits bfloat16 [B, T, V] of tokens int [B, T]."""
        x = self._rows(tokens).astype(jnp.bfloat16)
        x = x * jnp.asarray(x.shape[-1] ** 0.5, x.dtype)
        graph, stacked = nnx.split(self.layers)
        x, _ = jax.lax.scan(lambda x, one: (nnx.merge(graph, one)(x), None), x, stacked)
        return self.embedding.attend(self.norm(x))

    def _rows(self, tokens: Array) -> Array:
        """Rows in the dtype of the table where it is a float one, so that gradients of a frequent token add up
        in float32: `nnx.Embed` rounds the table first, and adds in bfloat16.
        """
        if isinstance(self.embedding, nnx.Embed):
            return _taken(self.embedding.embedding.get_value(), tokens)
        return self.embedding(tokens)


@jax.custom_vjp
def _taken(table: Array, tokens: Array) -> Array:
    """Rows of a float32 table [V, D]; their gradients are summed by a product, in the same order every time."""
    return jnp.take(table, tokens, axis=0)


def _taken_forward(table: Array, tokens: Array) -> tuple[Array, tuple[Array, int]]:
    return _taken(table, tokens), (tokens, len(table))


def _taken_backward(kept: tuple[Array, int], gradients: Array) -> tuple[Array, None]:
    tokens, rows = kept
    # The rows are rounded to bfloat16 at once, so that their gradients are bfloat16 values.
    chosen = jax.nn.one_hot(tokens.reshape(-1), rows, dtype=jnp.bfloat16)
    gradients = gradients.reshape(-1, gradients.shape[-1]).astype(jnp.bfloat16)
    return jnp.matmul(chosen.T, gradients, preferred_element_type=jnp.float32), None


_taken.defvjp(_taken_forward, _taken_backward)


@functools.lru_cache(maxsize=64)
def best_attention(batch: int, length: int) -> str:
    """The attention of the models: "cudnn" where that runs on this device and agrees with XLA's, else "xla"."""
    if jax.default_backend() != "gpu":
        return "xla"
    shape = (batch, length, 4, _HEAD)
    keys = jax.random.split(jax.random.key(0), 3)
    q, k, v = (jax.random.normal(key, shape, jnp.bfloat16) for key in keys)

    def gradients(implementation: str) -> tuple[Array, ...]:
        def loss(q: Array, k: Array, v: Array) -> Array:
            out = attend(q, k, v, implementation)
            return jnp.sum(jnp.square(out.astype(jnp.float32)))

        compiled = jax.jit(jax.grad(loss, argnums=(0, 1, 2)), compiler_options=compiling.OPTIONS)
        return compiled(q, k, v)

    try:
        fused = gradients("cudnn")
        plain = gradients("xla")
        errors = [
            float(
                jnp.linalg.norm((a - b).astype(jnp.float32))
                / jnp.linalg.norm(b.astype(jnp.float32))
            )
            for a, b in zip(fused, plain, strict=True)
        ]
    except Exception:  # whatever a library that is missing or too old says
        return "xla"
    return "cudnn" if max(errors) < 0.03 else "xla"


def stored_bytes(model: nnx.Module) -> int:
    """Bytes of a model in memory: packed weights, scales and codebooks; matrices in float count as bfloat16.

    Vectors, those of norms, are counted as they are.
    """
    total = sum(leaf.nbytes for leaf in jax.tree.leaves(nnx.state(model, QuantisedWeight)))
    for path, variable in nnx.to_flat_state(nnx.state(model, nnx.Param)):
        value = variable.get_value()
        total += 2 * value.size if path[-1] in ("kernel", "embedding") else value.nbytes
    return total
