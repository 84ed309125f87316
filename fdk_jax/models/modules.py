"""A transformer's layers as Flax NNX modules: one set for all families, options in `ModelConfig`.

Glossary: B batch, T tokens of a prompt, D hidden size, H heads, KV key-value heads, d head size,
S cache length, V vocabulary. Activations are in the configuration's dtype; norms, softmax, RoPE and
logits in float32.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from fdk_jax.models import cache, platforms, rope
from fdk_jax.models.attention import Mask
from fdk_jax.models.config import LayerOptions, ModelConfig
from fdk_jax.models.experts import MixtureOfExperts
from fdk_jax.models.parallel import Parallel

_ACTIVATION = {
    "silu": nnx.silu,
    "gelu": functools.partial(nnx.gelu, approximate=False),
    "gelu_tanh": functools.partial(nnx.gelu, approximate=True),
}


class RMSNorm(nnx.Module):
    """y = (offset + scale) * x / sqrt(mean(x**2) + eps) over the last axis."""

    def __init__(self, size: int, config: ModelConfig):
        self.eps, self.offset = config.norm_eps, config.norm_offset
        self.scale = nnx.Param(jnp.full(size, 1 - self.offset, config.dtype))

    def __call__(self, x: Array) -> Array:
        """Normalises x [..., size] with a mean in float32; same shape and dtype."""
        return platforms.rms_norm(x, self.scale[...], self.eps, self.offset)

    def after_add(self, x: Array, delta: Array) -> tuple[Array, Array]:
        """(x + delta, its norm), both [B, size]."""
        return platforms.add_rms_norm(x, delta, self.scale[...], self.eps, self.offset)


class Linear(nnx.Linear):
    """`nnx.Linear` that reads its kernel at full speed for a few tokens."""

    computes_as = nnx.Linear

    def __call__(self, inputs: Array, out_dtype: Any = None) -> Array:
        """Maps [..., K] to [..., N]."""
        y = platforms.linear(inputs, self.kernel[...], out_dtype or inputs.dtype)
        if self.bias is None:
            return y
        return y + jnp.expand_dims(self.bias[...].astype(y.dtype), tuple(range(y.ndim - 1)))


def make_linear(inputs: int, outputs: int, config: ModelConfig, bias: bool, rngs: nnx.Rngs):
    dtype = jnp.dtype(config.dtype)
    return Linear(inputs, outputs, use_bias=bias, dtype=dtype, param_dtype=dtype, rngs=rngs)


class Attention(nnx.Module):
    """Grouped-query attention; queries, keys and values come from one fused projection."""

    def __init__(
        self,
        config: ModelConfig,
        options: LayerOptions,
        parallel: Parallel | None,
        rngs: nnx.Rngs,
    ):
        self.config, self.rope = config, options.rope
        self.mask = Mask(options.window, config.attention_soft_cap)
        self.axis = parallel.axis if parallel else None
        hidden, width = config.hidden_size, config.num_heads * config.head_dim
        self.qkv = make_linear(hidden, config.qkv_features, config, config.qkv_bias, rngs)
        self.out = make_linear(width, hidden, config, config.output_bias, rngs)
        per_head = config.qk_norm_of == "head"
        sizes = ((1 if per_head else n) for n in (config.num_heads, config.num_kv_heads))
        self.q_norm, self.k_norm = (
            RMSNorm(n * config.head_dim, config) if config.qk_norm else None for n in sizes
        )
        self.sinks = nnx.Param(jnp.zeros(config.num_heads)) if config.attention_sinks else None

    def rotation(self, positions: Array, lengths: Array) -> tuple[Array, Array]:
        """Cosines and sines for this layer's heads, float32 [..., d / 2]; see `rope.cos_sin`."""
        return rope.cos_sin(self.config, self.rope, positions, lengths)

    def prompt(self, x: Array, cos: Array, sin: Array) -> tuple[Array, Array, Array]:
        """Maps x [B, T, D] to (output [B, T, D], keys [B, T, KV, d], values [B, T, KV, d])."""
        q, k, v = self._heads(self.qkv(x), cos[:, :, None], sin[:, :, None])
        mixed = platforms.prompt_attention(q, k, v, self.mask, self._sinks)
        return self.output(mixed.reshape(*x.shape[:-1], -1)), k, v

    def chunk(self, x, cos, sin, starts, keys, values) -> tuple[Array, Array, Array]:
        """A run of tokens x [B, T, D] from slots `starts` [B or 1] on: (output [B, T, D], keys, values)."""
        q, k, v = self._heads(self.qkv(x), cos[:, :, None], sin[:, :, None])
        keys, values = cache.write(keys, k, starts), cache.write(values, v, starts)
        mixed = platforms.chunk_attention(q, keys, values, starts, self.mask, self._sinks)
        return self.output(mixed.reshape(*x.shape[:-1], -1)), keys, values

    def mix(self, qkv, cos, sin, lengths, keys, values) -> tuple[Array, Array, Array]:
        """What is between the projections of one token a sequence; see `platforms.token_attention`.

        Args:
            qkv: [B, qkv_features], of the tokens at `lengths`.
            cos: float32 [B, d / 2].
            sin: Like cos.
            lengths: int32 [B].
            keys: [B, KV, S, d].
            values: Like keys.

        Returns:
            ([B, H * d], keys, values), the cache one token longer.
        """
        return platforms.token_attention(
            qkv,
            cos,
            sin,
            lengths,
            keys,
            values,
            heads_of=self._heads,
            norms=self.head_norms,
            norm_eps=self.config.norm_eps,
            mask=self.mask,
            sinks=self._sinks,
            fusible=self.has_usual_heads,
        )

    @property
    def head_norms(self) -> tuple[Array, Array] | None:
        """Scales of the norms of queries and keys, if there are any."""
        if self.q_norm is None or self.k_norm is None:
            return None
        return self.q_norm.scale[...], self.k_norm.scale[...]

    @property
    def has_usual_heads(self) -> bool:
        """Whether nothing but norms of each head and RoPE of its halves is between projection and scores."""
        plain = True
        if self.q_norm is not None:
            plain = self.q_norm.offset == 0 and self.config.qk_norm_of == "head"
        order = rope.order(self.rope, self.config.head_dim)
        return plain and order is None and not (self.rope and self.rope.query_growth)

    @property
    def is_plain(self) -> bool:
        """Whether its scores are those of all earlier tokens, without caps or sinks."""
        return self.mask == Mask(None, None) and self.sinks is None

    def output(self, mixed: Array) -> Array:
        """The output projection: [..., H * d] to [..., D], summed over devices."""
        y = self.out(mixed)
        return y if self.axis is None else jax.lax.psum(y, self.axis)

    @property
    def _sinks(self) -> Array | None:
        return None if self.sinks is None else self.sinks[...]

    def _heads(self, qkv: Array, cos: Array, sin: Array) -> tuple[Array, Array, Array]:
        """Cuts [..., qkv_features] into q [..., H, d], k and v [..., KV, d]; rotates q and k."""
        c = self.config
        heads = qkv.reshape(*qkv.shape[:-1], -1, c.head_dim)
        q, k, v = jnp.split(heads, (c.num_heads, c.num_heads + c.num_kv_heads), axis=-2)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = _norm_heads(self.q_norm, q), _norm_heads(self.k_norm, k)
        order = rope.order(self.rope, c.head_dim)
        if order is not None:
            q, k = (jnp.take(a, order, axis=-1) for a in (q, k))
        key_turn = rope.of_keys(c, self.rope, cos, sin)
        return rope.rotate(q, cos, sin), rope.rotate(k, *key_turn), v


def _norm_heads(norm: RMSNorm, heads: Array) -> Array:
    """The norm of [..., heads, d], over each head or over all, as long as the norm's scale is."""
    rows = heads.reshape(*heads.shape[:-2], -1, norm.scale[...].size)
    return norm(rows).reshape(heads.shape)


class MLP(nnx.Module):
    """down(act(gate(x)) * up(x)); gate and up come from one fused projection."""

    def __init__(self, config: ModelConfig, parallel: Parallel | None, rngs: nnx.Rngs):
        self.activation = config.activation
        self.axis = parallel.axis if parallel else None
        hidden, inner = config.hidden_size, config.intermediate_size
        self.gate_up = make_linear(hidden, 2 * inner, config, config.mlp_bias, rngs)
        self.down = make_linear(inner, hidden, config, config.mlp_bias, rngs)

    def __call__(self, x: Array) -> Array:
        """Maps x [..., D] to [..., D], summed over devices."""
        y = self.partial(x)
        return y if self.axis is None else jax.lax.psum(y, self.axis)

    def partial(self, x: Array) -> Array:
        """What this device has of the sum: [..., D] to [..., D]."""
        return self.down(self.gate(self.gate_up(x)))

    def gate(self, gate_up: Array) -> Array:
        """What is between the projections: [..., 2 inner] to [..., inner]."""
        gate, up = jnp.split(gate_up, 2, axis=-1)
        return _ACTIVATION[self.activation](gate) * up


def make_feed_forward(
    config: ModelConfig, options: LayerOptions, parallel: Parallel | None, rngs: nnx.Rngs
) -> MLP | MixtureOfExperts:
    """The block after attention, which maps [..., D] to [..., D]: the place for other kinds than `MLP`."""
    if options.experts is not None:
        experts, hidden = options.experts, config.hidden_size
        router = make_linear(hidden, experts.count, config, experts.bias, rngs)
        activation = _ACTIVATION[config.activation]
        return MixtureOfExperts(router, experts, hidden, config.dtype, activation, rngs, parallel)
    return MLP(config, parallel, rngs)


class Layer(nnx.Module):
    """Attention and a feed-forward block, each around a residual, with norms before or after it.

    Attributes:
        attention_norm: Norm before attention, or None.
        attention_post_norm: Norm of what attention adds to the residual stream, or None.
        mlp_norm: Norm before the feed-forward block, or None.
        mlp_post_norm: Norm of what that adds, or None.
    """

    def __init__(
        self,
        config: ModelConfig,
        options: LayerOptions,
        parallel: Parallel | None,
        rngs: nnx.Rngs,
    ):
        def norm(there: bool) -> RMSNorm | None:
            return RMSNorm(config.hidden_size, config) if there else None

        self.scale = config.residual_scale
        self.attention_norm = norm(config.pre_norms)
        self.attention = Attention(config, options, parallel, rngs)
        self.attention_post_norm = norm(config.post_norms)
        self.mlp_norm = norm(config.pre_norms)
        self.mlp = make_feed_forward(config, options, parallel, rngs)
        self.mlp_post_norm = norm(config.post_norms)

    def prompt(self, x: Array, cos: Array, sin: Array, *cache: Array) -> tuple[Array, Array, Array]:
        """A run of tokens of each sequence.

        Args:
            x: [B, T, D].
            cos: float32 [B or 1, T, d / 2].
            sin: Like cos.
            *cache: Nothing, if the run is all that there is. Otherwise the slots of its first tokens, int32
                [B or 1], and the layer's keys and values [B, KV, S, d].

        Returns:
            (x, keys, values): those of the run, [B, T, KV, d], or the cache that has them too.
        """
        rows = normed(self.attention_norm, x)
        attend = self.attention.chunk if cache else self.attention.prompt
        mixed, keys, values = attend(rows, cos, sin, *cache)
        x = x + self._scaled(normed(self.attention_post_norm, mixed))
        y = self.mlp(normed(self.mlp_norm, x))
        return x + self._scaled(normed(self.mlp_post_norm, y)), keys, values

    def after_attention(self, x: Array, mixed: Array) -> tuple[Array, Array]:
        """What follows the attention of one token a sequence.

        Args:
            x: [B, D], the residual stream before this layer.
            mixed: [B, H * d], what attention leaves.

        Returns:
            (x, delta), whose sum is the residual stream after this layer: it and the norm after it are
            one operation.
        """
        delta = self._scaled(normed(self.attention_post_norm, self.attention.output(mixed)))
        x, rows = add_and_norm(self.mlp_norm, x, delta)
        return x, self._scaled(normed(self.mlp_post_norm, self.mlp(rows)))

    def _scaled(self, delta: Array) -> Array:
        """What is added to the residual stream."""
        return delta if self.scale == 1 else delta * jnp.asarray(self.scale, delta.dtype)


def normed(norm: RMSNorm | None, x: Array) -> Array:
    """The norm of x, where there is one."""
    return x if norm is None else norm(x)


def add_and_norm(norm: RMSNorm | None, x: Array, delta: Array) -> tuple[Array, Array]:
    """(x + delta, the same after a norm where there is one), both [B, D]."""
    if norm is None:
        return x + delta, x + delta
    return norm.after_add(x, delta)
