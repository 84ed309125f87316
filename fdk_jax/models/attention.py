"""Grouped-query attention in jnp: over a prompt, and of one token or several over the cache."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import Array

# Queries and keys of which all scores exist at a time: bounds the memory of long prompts.
_BLOCK = 512


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
        scores = product(equation, q, k)
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
    if tokens <= 2 * _BLOCK:
        grouped = q.reshape(batch, tokens, kv_heads, heads // kv_heads, head_dim)
        at = jnp.arange(tokens)
        scores = mask.scores(grouped, k, "btkgd,bskd->bkgts")
        seen = mask.seen(at[:, None], at[None, :])
        if sinks is not None:
            sinks = sinks.reshape(1, kv_heads, heads // kv_heads, 1)
        weights = _softmax(scores, seen[None, None, None], sinks).astype(v.dtype)
        out = product("bkgts,bskd->btkgd", weights, v)
        return out.astype(q.dtype).reshape(q.shape)
    keys, values = (a.transpose(0, 2, 1, 3) for a in (k, v))
    return over_chunk(q, keys, values, jnp.zeros(1, jnp.int32), mask, sinks)


def over_chunk(
    q: Array,
    keys: Array,
    values: Array,
    starts: Array,
    mask: Mask = Mask(),
    sinks: Array | None = None,
) -> Array:
    """Causal attention of a run of tokens over the cache that holds them and those before them.

    Of all scores only those of one block of queries and one of keys exist at a time, and blocks that no
    query sees are skipped.

    Args:
        q: [batch, tokens, heads, head_dim].
        keys: [batch, kv_heads, cache_length, head_dim].
        values: Like keys.
        starts: int32 [batch] or [1], the slot of each sequence's first token.
        mask: Which slots a query sees.
        sinks: See `over_prompt`.

    Returns:
        [batch, tokens, heads, head_dim]. Softmax is in float32.
    """
    batch, tokens, heads, head_dim = q.shape
    kv_heads, slots = keys.shape[1:3]
    group = heads // kv_heads
    size, width = (min(_BLOCK, n) for n in (tokens, slots))
    q_blocks = _in_blocks(q.reshape(batch, tokens, kv_heads, group, head_dim), size, axis=1)
    k_blocks, v_blocks = (_in_blocks(a, width, axis=2) for a in (keys, values))
    if sinks is not None:
        sinks = sinks.reshape(1, kv_heads, group, 1).astype(jnp.float32)

    def of_queries(block: tuple[Array, Array]) -> Array:
        first, queries = block
        at = starts[:, None] + first + jnp.arange(size)[None, :]  # [batch or 1, size]
        run = functools.partial(_over_blocks, k_blocks, v_blocks, mask=mask, sinks=sinks)
        return run(queries, at).astype(q.dtype)

    firsts = jnp.arange(len(q_blocks)) * size
    out = jax.lax.map(of_queries, (firsts, q_blocks))
    return out.swapaxes(0, 1).reshape(batch, -1, heads, head_dim)[:, :tokens]


def _in_blocks(a: Array, size: int, axis: int) -> Array:
    """Cuts an axis into blocks of `size`, zeros past its end: [blocks, ..., size, ...]."""
    blocks = -(-a.shape[axis] // size)
    padding = [(0, 0)] * a.ndim
    padding[axis] = (0, blocks * size - a.shape[axis])
    shape = (*a.shape[:axis], blocks, size, *a.shape[axis + 1 :])
    return jnp.moveaxis(jnp.pad(a, padding).reshape(shape), axis, 0)


def _over_blocks(k_blocks, v_blocks, queries, at, *, mask: Mask, sinks) -> Array:
    """Queries [B, T, KV, G, d] at positions `at` [B or 1, T] over blocks of keys, one after the other.

    A scan and not a loop of as many blocks as are seen, so that it has a gradient.
    """
    batch, size, kv_heads, group, head_dim = queries.shape
    width = k_blocks.shape[3]
    begins = jnp.arange(len(k_blocks)) * width

    def add(state, block):
        peak, total, mixed = state
        begin, keys, values = block
        scores = mask.scores(queries, keys, "btkgd,bksd->bkgts")
        seen = mask.seen(at[:, :, None], begin + jnp.arange(width)[None, None, :])
        scores = jnp.where(seen[:, None, None], scores, -jnp.inf)
        higher = jnp.maximum(peak, scores.max(axis=-1))
        shrink = jnp.exp(peak - higher)
        weights = jnp.exp(scores - higher[..., None])
        new = product("bkgts,bksd->bkgtd", weights.astype(values.dtype), values)
        return higher, total * shrink + weights.sum(axis=-1), mixed * shrink[..., None] + new

    def step(state, block):
        needed = block[0] <= at.max()
        if mask.window is not None:
            needed &= block[0] + width > at.min() + 1 - mask.window
        return jax.lax.cond(needed, add, lambda state, _: state, state, block), None

    rows = (batch, kv_heads, group, size)
    # Finite, so that a row that has seen nothing yet shrinks by 1 and not by NaN.
    state = (
        jnp.full(rows, -1e30, jnp.float32),
        jnp.zeros(rows, jnp.float32),
        jnp.zeros((*rows, head_dim), jnp.float32),
    )
    (peak, total, mixed), _ = jax.lax.scan(step, state, (begins, k_blocks, v_blocks))
    if sinks is not None:
        total += jnp.exp(sinks - peak)
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
    out = product("bkgs,bksd->bkgd", weights, values)
    return out.reshape(q.shape).astype(q.dtype)


def product(equation: str, a: Array, b: Array) -> Array:
    """A product in float32; of float32 arrays without TensorFloat-32, whatever a GPU's default is."""
    precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return jnp.einsum(equation, a, b, precision=precision, preferred_element_type=jnp.float32)


def _softmax(scores: Array, seen: Array, sinks: Array | None) -> Array:
    """float32 softmax over the last axis of the scores that are `seen`, and of `sinks` beside them."""
    scores = jnp.where(seen, scores, -jnp.inf)
    if sinks is None:
        return jax.nn.softmax(scores, axis=-1)
    sinks = jnp.broadcast_to(sinks.astype(jnp.float32), scores.shape[:-1])[..., None]
    return jax.nn.softmax(jnp.concatenate([scores, sinks], axis=-1), axis=-1)[..., :-1]
