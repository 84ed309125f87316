"""Grouped-query attention in jnp: over a prompt, and of one token over the cache."""

import jax
import jax.numpy as jnp
from jax import Array

_QUERY_BLOCK = 512  # queries whose scores exist at a time: bounds the memory of long prompts


def over_prompt(q: Array, k: Array, v: Array) -> Array:
    """Causal attention among the tokens of each sequence.

    Args:
        q: [batch, tokens, heads, head_dim].
        k: [batch, tokens, kv_heads, head_dim].
        v: Like k.

    Returns:
        [batch, tokens, heads, head_dim]. Softmax is in float32.
    """
    batch, tokens, heads, head_dim = q.shape
    kv_heads = k.shape[2]
    grouped = q.reshape(batch, tokens, kv_heads, heads // kv_heads, head_dim)

    def block(start: Array | int, queries: Array) -> Array:
        scores = jnp.einsum("btkgd,bskd->bkgts", queries, k, preferred_element_type=jnp.float32)
        at = start + jnp.arange(queries.shape[1])
        seen = jnp.arange(tokens)[None, :] <= at[:, None]
        weights = _softmax(scores, seen[None, None, None], head_dim).astype(v.dtype)
        out = jnp.einsum("bkgts,bskd->btkgd", weights, v, preferred_element_type=jnp.float32)
        return out.astype(q.dtype)

    if tokens <= 2 * _QUERY_BLOCK or tokens % _QUERY_BLOCK:
        return block(0, grouped).reshape(q.shape)
    blocks = tokens // _QUERY_BLOCK
    parts = grouped.reshape(batch, blocks, _QUERY_BLOCK, *grouped.shape[2:]).swapaxes(0, 1)
    out = jax.lax.map(lambda a: block(*a), (jnp.arange(blocks) * _QUERY_BLOCK, parts))
    return out.swapaxes(0, 1).reshape(q.shape)


def over_cache(q: Array, keys: Array, values: Array, lengths: Array) -> Array:
    """Attention of one token a sequence over the first `lengths` slots of the cache.

    Args:
        q: [batch, heads, head_dim].
        keys: [batch, kv_heads, cache_length, head_dim].
        values: Like keys.
        lengths: int32 [batch], at least 1: the token itself is in the cache already.

    Returns:
        [batch, heads, head_dim].
    """
    batch, heads, head_dim = q.shape
    kv_heads, cache_length = keys.shape[1:3]
    grouped = q.reshape(batch, kv_heads, heads // kv_heads, head_dim)
    scores = jnp.einsum("bkgd,bksd->bkgs", grouped, keys, preferred_element_type=jnp.float32)
    seen = jnp.arange(cache_length)[None, :] < lengths[:, None]
    weights = _softmax(scores, seen[:, None, None], head_dim).astype(values.dtype)
    out = jnp.einsum("bkgs,bksd->bkgd", weights, values, preferred_element_type=jnp.float32)
    return out.reshape(q.shape).astype(q.dtype)


def _softmax(scores: Array, seen: Array, head_dim: int) -> Array:
    """float32 softmax over the last axis of scores / sqrt(head_dim) where `seen`."""
    scores = jnp.where(seen, scores * jnp.float32(head_dim**-0.5), -jnp.inf)
    return jax.nn.softmax(scores, axis=-1)
