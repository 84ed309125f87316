"""The key-value cache: static shapes, one pair of arrays a layer, updated in place inside jit."""

import dataclasses

import jax
import jax.numpy as jnp
from jax import Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KVCache:
    """Keys and values of the tokens seen so far, for a batch of sequences.

    Attributes:
        keys: One [batch, kv_heads, cache_length, head_dim] a layer, RoPE applied.
        values: Like keys.
        lengths: int32 [batch], tokens held for each sequence: the position of its next one.
        ends: int32 [batch], tokens that each sequence will have at most, where RoPE has to know; else None.
    """

    keys: tuple[Array, ...]
    values: tuple[Array, ...]
    lengths: Array
    ends: Array | None = None

    @property
    def capacity(self) -> int:
        """Tokens that each sequence can hold."""
        return self.keys[0].shape[2]


def fill(kept: Array, cache_length: int) -> Array:
    """A cache array that holds a prompt.

    Args:
        kept: [batch, tokens, kv_heads, head_dim] of the prompt.
        cache_length: At least `tokens`.

    Returns:
        [batch, kv_heads, cache_length, head_dim], zero past the prompt.
    """
    space = cache_length - kept.shape[1]
    return jnp.pad(kept.transpose(0, 2, 1, 3), ((0, 0), (0, 0), (0, space), (0, 0)))


def append(cache: Array, new: Array, lengths: Array) -> Array:
    """Writes one token's keys (or values) after those that each sequence holds.

    A full cache has its last slot overwritten.

    Args:
        cache: [batch, kv_heads, cache_length, head_dim].
        new: [batch, kv_heads, head_dim].
        lengths: int32 [batch].
    """
    if cache.shape[0] == 1:
        # A dynamic slice is updated in place on every backend; a scatter is slower on some.
        return jax.lax.dynamic_update_slice(cache, new[:, :, None], (0, 0, lengths[0], 0))
    return jax.vmap(lambda c, n, i: jax.lax.dynamic_update_slice(c, n[:, None], (0, i, 0)))(
        cache, new, lengths
    )


def write(cache: Array, new: Array, starts: Array) -> Array:
    """Writes the keys (or values) of a run of tokens.

    Args:
        cache: [batch, kv_heads, cache_length, head_dim].
        new: [batch, tokens, kv_heads, head_dim].
        starts: int32 [batch] or [1], slot of the first token of each sequence. The run has to fit after it: a
            dynamic slice that does not is moved, over what came before.
    """
    rows = new.transpose(0, 2, 1, 3).astype(cache.dtype)
    if starts.shape[0] == 1:
        return jax.lax.dynamic_update_slice(cache, rows, (0, 0, starts[0], 0))
    return jax.vmap(lambda c, n, i: jax.lax.dynamic_update_slice(c, n, (0, i, 0)))(
        cache, rows, starts
    )
