"""One token's attention over a cache for the tests of its kernels, with the float64 oracle."""

import jax.numpy as jnp
import numpy as np
import oracle

from fdk_jax.benchmark import accuracy


def inputs(rng, batch, kv_heads, group, head_dim, capacity, dtype, normed, lengths=None):
    """(qkv, cos, sin, lengths, keys, values) and the norms' scales, or None."""

    def random(*shape):
        return jnp.asarray(rng.normal(size=shape), dtype)

    qkv = random(batch, (group + 2) * kv_heads * head_dim)
    cache = (batch, kv_heads, capacity, head_dim)
    keys, values = random(*cache), random(*cache)
    if lengths is None:
        lengths = rng.integers(0, capacity, size=batch)
    lengths = jnp.asarray(lengths, jnp.int32)
    angles = rng.normal(size=(batch, head_dim // 2))
    turn = (jnp.asarray(f(angles), jnp.float32) for f in (np.cos, np.sin))
    norms = (random(head_dim), random(head_dim)) if normed else None
    # What lies beyond the tokens of a sequence must not matter.
    beyond = jnp.arange(capacity)[None, None, :, None] >= lengths[:, None, None, None]
    keys, values = (jnp.where(beyond, jnp.asarray(1e4, dtype), a) for a in (keys, values))
    return (qkv, *turn, lengths, keys, values), norms


def _exact(a):
    return np.asarray(a).astype(np.float64)


def check(found, arguments, norms, eps=1e-6):
    """Compares what a kernel leaves (mixed, keys, values) with float64."""
    new_keys, new_values = map(_exact, found[1:])
    qkv, cos, sin, lengths, keys, values = map(_exact, arguments)
    batch, kv_heads, capacity, dim = keys.shape
    dtype, lengths = arguments[0].dtype, lengths.astype(int)
    heads = qkv.shape[1] // dim - 2 * kv_heads
    q, k, v = np.split(qkv.reshape(batch, -1, dim), (heads, heads + kv_heads), axis=1)
    if norms is not None:
        q, k = (
            a / np.sqrt((a * a).mean(-1, keepdims=True) + eps) * _exact(scale)
            for a, scale in zip((q, k), norms, strict=True)
        )
    turn, half = (cos + 1j * sin)[:, None], dim // 2

    def turned(a):
        pairs = (a[..., :half] + 1j * a[..., half:]) * turn
        return np.concatenate([pairs.real, pairs.imag], -1)

    q, k = turned(q), turned(k)
    wanted, size, shared = np.zeros((3, batch, heads, dim))
    for b, length in enumerate(lengths):
        for h in range(heads):
            kv = h // (heads // kv_heads)
            all_k, all_v = (
                np.concatenate([old[b, kv, :length], new[b, kv][None]])
                for old, new in ((keys, k), (values, v))
            )
            scores = all_k @ q[b, h] / np.sqrt(dim)
            weights = np.exp(scores - scores.max())
            weights /= weights.sum()
            wanted[b, h] = weights @ all_v
            size[b, h] = np.sqrt(weights**2 @ all_v**2)
            # The new key is rounded: all elements of the head share what that makes of its score.
            step = 0.0 if dtype == np.float32 else accuracy.half_ulp(k[b, kv], dtype) * q[b, h]
            score = accuracy.SIGMAS * np.sqrt(np.sum(np.square(step)) / 3 / dim)
            shared[b, h] = score * weights[-1] * np.abs(all_v[-1] - wanted[b, h])
        # What a norm leaves may be rounded before it is turned.
        pairs = np.tile(np.hypot(k[b, :, :half], k[b, :, half:]), 2)
        noise = (
            accuracy.half_ulp(pairs, dtype) if norms is not None and dtype != np.float32 else 0.0
        )
        wanted_key = accuracy.Expected.of(k[b], 1e-5 * pairs, noise)
        oracle.check(new_keys[b, :, length].astype(dtype), wanted_key)
        np.testing.assert_array_equal(new_values[b, :, length], v[b])
        kept = np.arange(capacity) != length
        np.testing.assert_array_equal(new_keys[b][:, kept], keys[b][:, kept])
        np.testing.assert_array_equal(new_values[b][:, kept], values[b][:, kept])
    # Queries, the new key and the weights of the values may be rounded to the dtype.
    noise = 0.0 if dtype == np.float32 else accuracy.half_ulp(1.0, dtype) * size
    slack = 1e-5 * (size + np.abs(wanted)) + shared
    # A row a head, so that one head's mean error shows.
    wanted, slack, noise = (
        np.broadcast_to(a, wanted.shape).reshape(-1, dim) for a in (wanted, slack, noise)
    )
    oracle.check(
        np.asarray(found[0]).reshape(wanted.shape), accuracy.Expected.of(wanted, slack, noise)
    )
