"""The transformer as Flax NNX modules: one set for all families, options in `ModelConfig`.

Glossary: B batch, T tokens of a prompt, D hidden size, H heads, KV key-value heads, d head size,
S cache length, V vocabulary. Activations are in the configuration's dtype; norms, softmax, RoPE and
logits in float32.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from fdk_jax.models import attention, platforms, rope
from fdk_jax.models.cache import KVCache, append, fill
from fdk_jax.models.config import ModelConfig
from fdk_jax.models.parallel import Parallel
from fdk_jax.product import cpu_backend
from pallas_kernels import attention as pallas_attention


class RMSNorm(nnx.Module):
    """y = scale * x / sqrt(mean(x**2) + eps) over the last axis."""

    def __init__(self, size: int, config: ModelConfig):
        self.eps = config.norm_eps
        self.scale = nnx.Param(jnp.ones(size, config.dtype))

    def __call__(self, x: Array) -> Array:
        """Normalises x [..., size] with a mean in float32; same shape and dtype."""
        return platforms.rms_norm(x, self.scale[...], self.eps)

    def after_add(self, x: Array, delta: Array) -> tuple[Array, Array]:
        """(x + delta, its norm), both [B, size]."""
        return platforms.add_rms_norm(x, delta, self.scale[...], self.eps)


class Linear(nnx.Linear):
    """`nnx.Linear` that reads its kernel at full speed for a few tokens."""

    def __call__(self, inputs: Array, out_dtype: Any = None) -> Array:
        """Maps [..., K] to [..., N]."""
        y = platforms.linear(inputs, self.kernel[...], out_dtype or inputs.dtype)
        if self.bias is None:
            return y
        return y + jnp.expand_dims(self.bias[...].astype(y.dtype), tuple(range(y.ndim - 1)))


def _linear(inputs: int, outputs: int, config: ModelConfig, bias: bool, rngs: nnx.Rngs):
    dtype = jnp.dtype(config.dtype)
    return Linear(inputs, outputs, use_bias=bias, dtype=dtype, param_dtype=dtype, rngs=rngs)


class Attention(nnx.Module):
    """Grouped-query attention; queries, keys and values come from one fused projection."""

    def __init__(self, config: ModelConfig, parallel: Parallel | None, rngs: nnx.Rngs):
        self.config = config
        self.axis = parallel.axis if parallel else None
        hidden, width = config.hidden_size, config.num_heads * config.head_dim
        self.qkv = _linear(hidden, config.qkv_features, config, config.qkv_bias, rngs)
        self.out = _linear(width, hidden, config, config.output_bias, rngs)
        self.q_norm = RMSNorm(config.head_dim, config) if config.qk_norm else None
        self.k_norm = RMSNorm(config.head_dim, config) if config.qk_norm else None

    def prompt(self, x: Array, cos: Array, sin: Array) -> tuple[Array, Array, Array]:
        """Maps x [B, T, D] to (output [B, T, D], keys [B, T, KV, d], values [B, T, KV, d])."""
        q, k, v = self._heads(self.qkv(x), cos[:, :, None], sin[:, :, None])
        mixed = platforms.in_float32_on_cpu(attention.over_prompt, q, k, v)
        return self._out(mixed.reshape(*x.shape[:-1], -1)), k, v

    def token(self, x, cos, sin, lengths, keys, values) -> tuple[Array, Array, Array]:
        """Maps x [B, D] of the tokens at `lengths` to (output [B, D], keys, values)."""
        mixed, keys, values = self.mix(self.qkv(x), cos, sin, lengths, keys, values)
        return self._out(mixed), keys, values

    def mix(self, qkv, cos, sin, lengths, keys, values) -> tuple[Array, Array, Array]:
        """What is between the projections: [B, qkv_features] to ([B, H * d], keys, values)."""
        supported = pallas_attention.supported(qkv.dtype, keys.shape, self.config.head_dim)
        no_library = cpu_backend.unavailable_reason()
        return jax.lax.platform_dependent(
            qkv,
            cos,
            sin,
            lengths,
            keys,
            values,
            cuda=self._fused(pallas_attention.decode) if supported else self._token_jnp,
            cpu=self._token_jnp if no_library else self._fused(cpu_backend.attention),
            default=self._token_jnp,
        )

    def _fused(self, kernel: Callable) -> Callable:
        """One kernel for everything between the projections."""
        norms = None
        if self.q_norm is not None and self.k_norm is not None:
            norms = (self.q_norm.scale[...], self.k_norm.scale[...])
        return functools.partial(kernel, norms=norms, norm_eps=self.config.norm_eps)

    def _token_jnp(self, qkv, cos, sin, lengths, keys, values):
        q, k, v = self._heads(qkv, cos[:, None], sin[:, None])
        keys, values = append(keys, k, lengths), append(values, v, lengths)
        mixed = platforms.in_float32_on_cpu(attention.over_cache, q, keys, values, lengths + 1)
        return mixed.reshape(qkv.shape[0], -1), keys, values

    def _heads(self, qkv: Array, cos: Array, sin: Array) -> tuple[Array, Array, Array]:
        """Cuts [..., qkv_features] into q [..., H, d], k and v [..., KV, d]; turns q and k."""
        c = self.config
        heads = qkv.reshape(*qkv.shape[:-1], -1, c.head_dim)
        q, k, v = jnp.split(heads, (c.num_heads, c.num_heads + c.num_kv_heads), axis=-2)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        return rope.rotate(q, cos, sin), rope.rotate(k, cos, sin), v

    def _out(self, mixed: Array) -> Array:
        y = self.out(mixed)
        return y if self.axis is None else jax.lax.psum(y, self.axis)


class MLP(nnx.Module):
    """down(silu(gate(x)) * up(x)); gate and up come from one fused projection."""

    def __init__(self, config: ModelConfig, parallel: Parallel | None, rngs: nnx.Rngs):
        self.axis = parallel.axis if parallel else None
        hidden, inner = config.hidden_size, config.intermediate_size
        self.gate_up = _linear(hidden, 2 * inner, config, config.mlp_bias, rngs)
        self.down = _linear(inner, hidden, config, config.mlp_bias, rngs)

    def __call__(self, x: Array) -> Array:
        """Maps x [..., D] to [..., D]."""
        y = self.down(self.gate(self.gate_up(x)))
        return y if self.axis is None else jax.lax.psum(y, self.axis)

    def gate(self, gate_up: Array) -> Array:
        """What is between the projections: [..., 2 inner] to [..., inner]."""
        gate, up = jnp.split(gate_up, 2, axis=-1)
        return nnx.silu(gate) * up


class Layer(nnx.Module):
    """Attention and a gated block, each behind a norm and around a residual."""

    def __init__(self, config: ModelConfig, parallel: Parallel | None, rngs: nnx.Rngs):
        self.attention_norm = RMSNorm(config.hidden_size, config)
        self.attention = Attention(config, parallel, rngs)
        self.mlp_norm = RMSNorm(config.hidden_size, config)
        self.mlp = MLP(config, parallel, rngs)

    def prompt(self, x: Array, cos: Array, sin: Array) -> tuple[Array, Array, Array]:
        """Maps x [B, T, D] to (x, keys, values)."""
        mixed, keys, values = self.attention.prompt(self.attention_norm(x), cos, sin)
        x = x + mixed
        return x + self.mlp(self.mlp_norm(x)), keys, values

    def token(self, x, delta, cos, sin, lengths, keys, values) -> tuple[Array, ...]:
        """One token a sequence.

        Args:
            x: [B, D], the residual stream before the previous layer's last sum.
            delta: [B, D], what that sum adds: it and the norm behind it are one operation.
            cos: float32 [B, d / 2].
            sin: Like cos.
            lengths: int32 [B].
            keys: [B, KV, S, d].
            values: Like keys.

        Returns:
            (x, delta, keys, values), the cache arrays one token longer.
        """
        x, normed = self.attention_norm.after_add(x, delta)
        mixed, keys, values = self.attention.token(normed, cos, sin, lengths, keys, values)
        x, normed = self.mlp_norm.after_add(x, mixed)
        return x, self.mlp(normed), keys, values

    def residual_kernels(self, x: Array) -> list[Any]:
        """GPU kernels that have sums and norms in the products of `token`; None for those that have not."""
        linears = (self.attention.qkv, self.attention.out, self.mlp.gate_up, self.mlp.down)
        return [platforms.residual_kernel(linear, x) for linear in linears]

    def token_in_four_products(self, at, scale, cos, sin, lengths, keys, values):
        """`token` by `residual_kernels`: the sums and norms come with the products.

        Args:
            at: the residual stream on its way through this layer's first norm.
            scale: [D], of the norm behind this layer.
            cos: See `token`.
            sin: See `token`.
            lengths: See `token`.
            keys: See `token`.
            values: See `token`.

        Returns:
            (the stream on its way through the next norm, keys, values).
        """
        qkv, out, gate_up, down = self.residual_kernels(at.total)
        projected = qkv(at, eps=self.attention_norm.eps)
        mixed, keys, values = self.attention.mix(projected, cos, sin, lengths, keys, values)
        at = out(mixed, residual=at.total, norm_scale=self.mlp_norm.scale[...])
        gated = self.mlp.gate(gate_up(at, eps=self.mlp_norm.eps))
        return down(gated, residual=at.total, norm_scale=scale), keys, values

    def chain_kernel(self, following: nnx.Module | None, x: Array) -> Any:
        """The GPU kernel of all products from attention to the next layer's projection; None without one."""
        linears = (self.attention.out, self.mlp.gate_up, self.mlp.down)
        return platforms.chain_kernel(linears if following is None else (*linears, following), x)

    def token_in_a_chain(self, projected, total, following, norm, cos, sin, lengths, keys, values):
        """`token` by `chain_kernel`.

        Args:
            projected: [1, qkv_features], this layer's queries, keys and values.
            total: [1, D], the residual stream before this layer.
            following: the next layer's projection to queries, keys and values, or None.
            norm: the norm behind this layer.
            cos: See `token`.
            sin: See `token`.
            lengths: See `token`.
            keys: See `token`.
            values: See `token`.

        Returns:
            (the stream on its way through that norm, the next `projected` or None, keys, values).
        """
        mixed, keys, values = self.attention.mix(projected, cos, sin, lengths, keys, values)
        norms = self.mlp_norm, norm
        at, projected = self.chain_kernel(following, total)(
            mixed,
            total,
            norm_scales=[n.scale[...] for n in norms],
            eps=[n.eps for n in norms],
        )
        return at, projected, keys, values


# The layers are alike: jit traces the first and reuses it, and XLA inlines the calls.
@functools.partial(jax.jit, static_argnums=(0, 1))
def _run_layer(method: str, graphdef: nnx.GraphDef, state: nnx.State, *args: Array):
    return getattr(nnx.merge(graphdef, state), method)(*args)


@functools.partial(jax.jit, static_argnums=0)
def _run_chain(graphdef: nnx.GraphDef, state: nnx.State, projected, total, *args: Array):
    layer, following, norm = nnx.merge(graphdef, state)
    return layer.token_in_a_chain(projected, total, following, norm, *args)


class Transformer(nnx.Module):
    """A decoder-only language model.

    Args:
        config: Shapes and options of the whole model.
        parallel: None for one device. Otherwise this is what one device of the mesh runs inside
            `jax.shard_map`, while the arrays are global: see `fdk_jax.models.Generator`.
        rngs: Random weights for a new model; `load` fills a checkpoint in.
    """

    def __init__(self, config: ModelConfig, *, parallel: Parallel | None = None, rngs: nnx.Rngs):
        self.config = config
        self.parallel = parallel
        local = parallel.local(config) if parallel else config
        dtype, shape = jnp.dtype(config.dtype), (local.vocab_size, config.hidden_size)
        scale = jnp.asarray(config.hidden_size**-0.5, dtype)
        self.embedding = nnx.Param(jax.random.normal(rngs.params(), shape, dtype) * scale)
        self.layers = nnx.List([Layer(local, parallel, rngs) for _ in range(config.num_layers)])
        self.norm = RMSNorm(config.hidden_size, config)
        self.lm_head = (
            None
            if config.tie_embeddings
            else _linear(config.hidden_size, local.vocab_size, config, False, rngs)
        )

    def __call__(self, tokens: Array) -> Array:
        """Logits of every position: int [B, T] -> float32 [B, T, V]."""
        return self._logits(self.norm(self._prompt(tokens)[0]))

    def prefill(self, tokens: Array, lengths: Array, cache_length: int) -> tuple[Array, KVCache]:
        """Reads prompts.

        Args:
            tokens: int [B, T], each row padded on the right.
            lengths: int32 [B], tokens of each prompt, at least 1.
            cache_length: Slots of the new cache, at least T.

        Returns:
            float32 [B, V], the logits behind each prompt's last token; and the cache.
        """
        x, keys, values = self._prompt(tokens)
        last = jnp.take_along_axis(x, (lengths - 1)[:, None, None], axis=1)[:, 0]
        cache = KVCache(
            tuple(fill(k, cache_length) for k in keys),
            tuple(fill(v, cache_length) for v in values),
            lengths.astype(jnp.int32),
        )
        return self._logits(self.norm(last)), cache

    def decode(self, tokens: Array, cache: KVCache) -> tuple[Array, KVCache]:
        """Reads one token a sequence: int [B] -> (logits float32 [B, V], the longer cache)."""
        x = self._embed(tokens)
        turn = (*rope.cos_sin(self.config, cache.lengths), cache.lengths)
        run, arrays = self._decode_layers, (x, turn, cache.keys, cache.values)
        if self.parallel is None and all(
            None not in layer.residual_kernels(x) for layer in self.layers
        ):
            fused = self._decode_in_chains if self._has_chains(x) else self._decode_in_products
            run = functools.partial(jax.lax.platform_dependent, cuda=fused, default=run)
        normed, keys, values = run(*arrays)
        return self._logits(normed), KVCache(keys, values, cache.lengths + 1)

    def _decode_layers(self, x, turn, cache_keys, cache_values):
        """All layers and the last norm of one token a sequence."""
        delta = jnp.zeros_like(x)
        keys, values = [], []
        for layer, k, v in zip(self.layers, cache_keys, cache_values, strict=True):
            x, delta, k, v = _run_layer("token", *nnx.split(layer), x, delta, *turn, k, v)
            keys.append(k)
            values.append(v)
        return self.norm.after_add(x, delta)[1], tuple(keys), tuple(values)

    def _decode_in_products(self, x, turn, cache_keys, cache_values):
        """The same by kernels that have sums and norms in their products."""
        norms = [layer.attention_norm for layer in self.layers] + [self.norm]
        at = platforms.to_scaled(x, norms[0].scale[...])
        keys, values = [], []
        rows = zip(self.layers, norms[1:], cache_keys, cache_values, strict=True)
        for layer, following, k, v in rows:
            at, k, v = _run_layer(
                "token_in_four_products", *nnx.split(layer), at, following.scale[...], *turn, k, v
            )
            keys.append(k)
            values.append(v)
        return platforms.from_scaled(at, self.norm.eps), tuple(keys), tuple(values)

    @property
    def _behind_layers(self) -> list[tuple[nnx.Module | None, RMSNorm]]:
        """What is behind each layer: the next one's projection, if there is a next one, and the norm."""
        following = [(layer.attention.qkv, layer.attention_norm) for layer in self.layers[1:]]
        return [*following, (None, self.norm)]

    def _has_chains(self, x: Array) -> bool:
        behind = zip(self.layers, self._behind_layers, strict=True)
        return all(layer.chain_kernel(qkv, x) is not None for layer, (qkv, _) in behind)

    def _decode_in_chains(self, x, turn, cache_keys, cache_values):
        """The same by kernels that have all products between two attentions in one launch."""
        first = self.layers[0]
        at = platforms.to_scaled(x, first.attention_norm.scale[...])
        projected = first.residual_kernels(x)[0](at, eps=first.attention_norm.eps)
        keys, values = [], []
        rows = zip(self.layers, self._behind_layers, cache_keys, cache_values, strict=True)
        for layer, (qkv, norm), k, v in rows:
            at, projected, k, v = _run_chain(
                *nnx.split((layer, qkv, norm)), projected, at.total, *turn, k, v
            )
            keys.append(k)
            values.append(v)
        return platforms.from_scaled(at, self.norm.eps), tuple(keys), tuple(values)

    def _prompt(self, tokens: Array) -> tuple[Array, list[Array], list[Array]]:
        x = self._embed(tokens)
        cos, sin = rope.cos_sin(self.config, jnp.arange(tokens.shape[1])[None])
        keys, values = [], []
        for layer in self.layers:
            x, k, v = _run_layer("prompt", *nnx.split(layer), x, cos, sin)
            keys.append(k)
            values.append(v)
        return x, keys, values

    def _embed(self, tokens: Array) -> Array:
        table = self.embedding[...]
        if self.parallel is None:
            return platforms.take_rows(table, tokens)
        # Each device holds a run of the vocabulary and adds zeros for the other tokens.
        local = tokens - jax.lax.axis_index(self.parallel.axis) * table.shape[0]
        mine = (local >= 0) & (local < table.shape[0])
        rows = platforms.take_rows(table, jnp.where(mine, local, 0))
        return jax.lax.psum(
            jnp.where(mine[..., None], rows, jnp.zeros((), rows.dtype)), self.parallel.axis
        )

    def _logits(self, x: Array) -> Array:
        head = self.lm_head
        if head is None:
            logits = platforms.linear_of_rows(x, self.embedding[...])
        elif isinstance(head, Linear):
            logits = head(x, jnp.float32)
        else:
            logits = head(x).astype(jnp.float32)
        if self.parallel is None:
            return logits
        axis = logits.ndim - 1
        return jax.lax.all_gather(logits, self.parallel.axis, axis=axis, tiled=True)
