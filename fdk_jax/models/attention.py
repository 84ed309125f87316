"""Grouped-query attention in jnp: over a prompt, and of one token over the cache."""

import dataclasses

import jax
import jax.numpy as jnp
from jax import Array

_BLOCK = (
    512  # queries and keys of which all scores exist at a time: bounds the memory of long prompts
)


@dataclasses.dataclass(frozen=True)
class Mask:
    """Which keys a query sees, and what is done to its scores; static.

    Attributes:
        window: Keys that a query sees, its own included; None for all before it.
        soft_cap: Scores s become soft_cap * tanh(s / soft_cap); None leaves them.
    """

    window: int | None = None
    soft_cap: float | None = None

    def seen(self, queries: Array, keys: Array) -> Array:
        """Whether queries at these positions see keys at those: bool, broadcast of both."""
        seen = keys <= queries
        return seen if self.window is None else seen & (keys > queries - self.window)

    def scores(self, q: Array, k: Array, equation: str) -> Array:
        """float32 scores of queries and keys, before the softmax."""
        scores = jnp.einsum(equation, q, k, preferred_element_type=jnp.float32)
        scores *= jnp.float32(q.shape[-1] ** -0.5)
        if self.soft_cap is None:
            return scores
        return self.soft_cap * jnp.tanh(scores / self.soft_cap)


def over_prompt(
    q: Array, k: Array, v: Array, mask: Mask = Mask(), sinks: Array | None = None
) -> Array:
    """Causal attention among the tokens of each sequence.

    Args:
        q: [batch, tokens, heads, head_dim].
        k: [batch, tokens, kv_heads, head_dim].
        v: Like k.
        mask: Which of the keys before it a query sees.
        sinks: [heads], a score of each head that takes part in its softmax and adds nothing; or None.

    Returns:
        [batch, tokens, heads, head_dim]. Softmax is in float32.
    """
    batch, tokens, heads, head_dim = q.shape
    kv_heads = k.shape[2]
    grouped = q.reshape(batch, tokens, kv_heads, heads // kv_heads, head_dim)
    if sinks is not None:
        sinks = sinks.reshape(1, kv_heads, heads // kv_heads, 1)

    if tokens <= 2 * _BLOCK:
        at = jnp.arange(tokens)
        scores = mask.scores(grouped, k, "btkgd,bskd->bkgts")
        seen = mask.seen(at[:, None], at[None, :])
        weights = _softmax(scores, seen[None, None, None], sinks).astype(v.dtype)
        out = jnp.einsum("bkgts,bskd->btkgd", weights, v, preferred_element_type=jnp.float32)
        return out.astype(q.dtype).reshape(q.shape)

    blocks = -(-tokens // _BLOCK)
    q_blocks, k_blocks, v_blocks = (_in_blocks(a, blocks) for a in (grouped, k, v))
    starts = jnp.arange(blocks) * _BLOCK

    def of_queries(block: tuple[Array, Array]) -> Array:
        start, queries = block
        return _over_blocks(queries, start, starts, k_blocks, v_blocks, mask, sinks)

    out = jax.lax.map(of_queries, (starts, q_blocks)).astype(q.dtype)
    return out.swapaxes(0, 1).reshape(batch, blocks * _BLOCK, heads, head_dim)[:, :tokens]


def _in_blocks(a: Array, blocks: int) -> Array:
    """[batch, tokens, ...] to [blocks, batch, _BLOCK, ...], zeros past the tokens."""
    padding = [(0, 0)] * a.ndim
    padding[1] = (0, blocks * _BLOCK - a.shape[1])
    return jnp.pad(a, padding).reshape(a.shape[0], blocks, _BLOCK, *a.shape[2:]).swapaxes(0, 1)


def _over_blocks(queries, start, starts, k_blocks, v_blocks, mask: Mask, sinks) -> Array:
    """A block of queries over blocks of keys, with the softmax of what has been seen so far.

    A scan and not a loop of as many blocks as are seen, so that it has a gradient.
    """
    batch, size, kv_heads, group, head_dim = queries.shape
    at = start + jnp.arange(size)

    def add(state, block):
        peak, total, mixed = state
        begin, keys, values = block
        scores = mask.scores(queries, keys, "btkgd,bskd->bkgts")
        seen = mask.seen(at[:, None], begin + jnp.arange(size)[None, :])[None, None, None]
        scores = jnp.where(seen, scores, -jnp.inf)
        higher = jnp.maximum(peak, scores.max(axis=-1))
        shrink = jnp.exp(peak - higher)
        weights = jnp.exp(scores - higher[..., None])
        new = jnp.einsum(
            "bkgts,bskd->bkgtd",
            weights.astype(values.dtype),
            values,
            preferred_element_type=jnp.float32,
        )
        return (
            higher,
            total * shrink + weights.sum(axis=-1),
            mixed * shrink[..., None] + new,
        )

    def step(state, block):
        begin = block[0]
        needed = begin <= start
        if mask.window is not None:
            needed &= begin + size > start + 1 - mask.window
        return jax.lax.cond(needed, add, lambda state, _: state, state, block), None

    rows = (batch, kv_heads, group, size)
    # Finite, so that a row that has seen nothing yet shrinks by 1 and not by NaN.
    state = (
        jnp.full(rows, -1e30, jnp.float32),
        jnp.zeros(rows, jnp.float32),
        jnp.zeros((*rows, head_dim), jnp.float32),
    )
    (peak, total, mixed), _ = jax.lax.scan(step, state, (starts, k_blocks, v_blocks))
    if sinks is not None:
        total += jnp.exp(sinks.astype(jnp.float32) - peak)
    return (mixed / total[..., None]).transpose(0, 3, 1, 2, 4)


def over_cache(
    q: Array,
    keys: Array,
    values: Array,
    lengths: Array,
    mask: Mask = Mask(),
    sinks: Array | None = None,
) -> Array:
    """Attention of one token a sequence over the first `lengths` slots of the cache.

    Args:
        q: [batch, heads, head_dim].
        keys: [batch, kv_heads, cache_length, head_dim].
        values: Like keys.
        lengths: int32 [batch], at least 1: the token itself is in the cache already.
        mask: Which of these slots a token sees.
        sinks: See `over_prompt`.

    Returns:
        [batch, heads, head_dim].
    """
    batch, heads, head_dim = q.shape
    kv_heads, cache_length = keys.shape[1:3]
    grouped = q.reshape(batch, kv_heads, heads // kv_heads, head_dim)
    scores = mask.scores(grouped, keys, "bkgd,bksd->bkgs")
    seen = mask.seen(lengths[:, None] - 1, jnp.arange(cache_length)[None, :])
    if sinks is not None:
        sinks = sinks.reshape(1, kv_heads, heads // kv_heads)
    weights = _softmax(scores, seen[:, None, None], sinks).astype(values.dtype)
    out = jnp.einsum("bkgs,bksd->bkgd", weights, values, preferred_element_type=jnp.float32)
    return out.reshape(q.shape).astype(q.dtype)


def _softmax(scores: Array, seen: Array, sinks: Array | None) -> Array:
    """float32 softmax over the last axis of the scores that are `seen`, and of `sinks` beside them."""
    scores = jnp.where(seen, scores, -jnp.inf)
    if sinks is None:
        return jax.nn.softmax(scores, axis=-1)
    sinks = jnp.broadcast_to(sinks.astype(jnp.float32), scores.shape[:-1])[..., None]
    return jax.nn.softmax(jnp.concatenate([scores, sinks], axis=-1), axis=-1)[..., :-1]
