"""One token's attention in one launch: head norms, RoPE, cache update, softmax over the cache.

Glossary: B sequences, H heads, KV key-value heads, D head size, S cache length, R = H / KV heads that
share a key-value head. A program serves one sequence and one key-value head; with a long cache the
keys are split over several programs, whose partial results one small fusion joins. Halves of a head (RoPE's
pairs) stay apart in registers, because Triton has no slices of values. This is the plain kernel; where they
take a case, `short_attention` and `split_attention` are faster.
"""

import functools

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl

from pallas_kernels import short_attention, split_attention, target, triton_compat
from pallas_kernels.attention_stages import NEVER

_BLOCK = 64  # keys a loop step reads
_SPLIT = 512  # cache slots from which on another program pays (H200, 2026-11-23)


def choose(
    dtype: jax.typing.DTypeLike,
    cache_shape: tuple[int, ...],
    heads: int,
    gpu: target.Target,
    *,
    window: int | None = None,
    alike: bool = True,
) -> tuple[str | None, str]:
    """The kernel that `decode` takes for a cache [B, KV, S, D] and so many query heads, and why no faster one.

    Args:
        dtype: of the cache.
        cache_shape: of keys, and of values.
        heads: H.
        gpu: what it runs on.
        window: slots that the token sees, its own included; None for all.
        alike: whether queries and the scales of norms have that dtype, too.

    Returns:
        "short", "split", "plain" or None, and why none of those before it takes the case.
    """
    batch, kv_heads, capacity, dim = cache_shape
    mixed = None if alike else "queries, cache and norms have several dtypes"
    short = short_attention.Case(heads, kv_heads, dim, capacity, jnp.dtype(dtype), None)
    split = split_attention.Case(heads, kv_heads, dim, capacity, jnp.dtype(dtype), None, window)
    why_not = {
        "short": mixed or _not_short(window, capacity) or short.unsupported_reason(batch, gpu),
        "split": mixed or split.unsupported_reason(gpu),
        "plain": _unsupported_reason(dtype, cache_shape, window, gpu),
    }
    reasons = []
    for kernel, reason in why_not.items():
        if reason is None:
            return kernel, "; ".join(reasons)
        reasons.append(f"{kernel}: {reason}")
    return None, "; ".join(reasons)


def _not_short(window: int | None, capacity: int) -> str | None:
    """Why the kernel for short caches is not made for a cache, or None."""
    if window is not None:
        return "it sees all slots"
    if capacity >= short_attention.SLOTS:
        return f"{capacity} slots are not below {short_attention.SLOTS}"
    return None


def _unsupported_reason(
    dtype: jax.typing.DTypeLike,
    cache_shape: tuple[int, ...],
    window: int | None,
    gpu: target.Target,
) -> str | None:
    """Why the plain kernel does not take a cache, or None."""
    *_, capacity, dim = cache_shape
    if gpu.no_pallas:
        return gpu.no_pallas
    if window is not None:
        return "it sees all slots"
    if dim not in (32, 64, 128, 256):
        return f"heads of {dim} are not of 32, 64, 128, 256"
    if capacity % _BLOCK:
        return f"{capacity} slots are no multiple of {_BLOCK}"
    if jnp.dtype(dtype) not in (jnp.bfloat16, jnp.float16, jnp.float32):
        return f"{jnp.dtype(dtype)} is not bfloat16, float16 or float32"
    return None


def decode(
    qkv: Array,
    cos: Array,
    sin: Array,
    lengths: Array,
    keys: Array,
    values: Array,
    *,
    norms: tuple[Array, Array] | None = None,
    norm_eps: float = 1e-6,
    window: int | None = None,
    splits: int | None = None,
    interpret: bool = False,
) -> tuple[Array, Array, Array]:
    """Attention of one new token a sequence over the cache and itself.

    Args:
        qkv: [B, (H + 2 KV) * D], the token's queries, keys and values as the projection left them.
        cos: float32 [B, D / 2] of the token's position.
        sin: Like cos.
        lengths: int32 [B], tokens in the cache: the slot of the new one (the last slot at most).
        keys: [B, KV, S, D]; updated in place where the caller donates it.
        values: Like keys.
        norms: Scales [D] of the RMS norms of queries and keys, or None.
        norm_eps: Of these norms.
        window: Slots that the token sees, its own included; None for all.
        splits: Programs that share a key-value head's cache in the plain kernel; None chooses one of the
            kernels in PTX where they take the case.
        interpret: Run in Pallas' interpreter.

    Returns:
        ([B, H * D], keys, values).

    Raises:
        NotImplementedError: a window that no kernel takes, see `choose`.
    """
    batch, kv_heads, capacity, dim = keys.shape
    heads = qkv.shape[1] // dim - 2 * kv_heads
    gpu, eps = target.current(), norm_eps if norms else None
    alike = all(a.dtype == keys.dtype for a in (qkv, values, *(norms or ())))
    if splits is None and not interpret:
        arrays = qkv, cos, sin, lengths, keys, values, norms or ()
        shape = heads, kv_heads, dim, capacity, keys.dtype, eps
        kernel, _ = choose(keys.dtype, keys.shape, heads, gpu, window=window, alike=alike)
        if kernel == "short":
            return short_attention.decode(short_attention.Case(*shape), *arrays, gpu)
        if kernel == "split":
            return split_attention.decode(split_attention.Case(*shape, window), *arrays, gpu)
    if window is not None:
        raise NotImplementedError(
            f"no kernel for {window=}, {keys.dtype}{keys.shape}; see `choose`"
        )
    splits = splits or max(1, min(16, capacity // _SPLIT))
    kernel = functools.partial(
        _kernel, group=heads // kv_heads, kv_heads=kv_heads, eps=norm_eps, normed=bool(norms)
    )
    part = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.float32)
    mixed, high, total, keys, values = pl.pallas_call(
        kernel,
        grid=(batch, kv_heads, splits),
        out_shape=(
            jax.ShapeDtypeStruct(
                (batch, splits, heads * dim), qkv.dtype if splits == 1 else jnp.float32
            ),
            part((batch, splits, heads)),
            part((batch, splits, heads)),
            jax.ShapeDtypeStruct(keys.shape, keys.dtype),
            jax.ShapeDtypeStruct(values.shape, values.dtype),
        ),
        input_output_aliases={4: 3, 5: 4},
        compiler_params=triton_compat.compiler_params(num_warps=4, num_stages=2),
        interpret=interpret,
        name="decode_attention",
    )(qkv, cos, sin, lengths, keys, values, *(norms or ()))
    if splits == 1:
        return mixed[:, 0], keys, values
    weight = jnp.exp(high - high.max(axis=1, keepdims=True))
    weight /= (weight * total).sum(axis=1, keepdims=True)
    joined = (mixed.reshape(batch, splits, heads, dim) * weight[..., None]).sum(axis=1)
    return joined.reshape(batch, heads * dim).astype(qkv.dtype), keys, values


def _kernel(qkv, cos, sin, lengths, keys, values, *refs, group, kv_heads, eps, normed):
    norms, (mixed, high, total, keys_out, values_out) = refs[:-5], refs[-5:]
    b, h, split = pl.program_id(0), pl.program_id(1), pl.program_id(2)
    splits, dim, dtype = mixed.shape[1], keys.shape[3], keys.dtype
    half = dim // 2
    rows = max(16, pl.next_power_of_2(group))  # the tensor cores' least; the surplus rows repeat
    row = jnp.minimum(jnp.arange(rows), group - 1)
    column = jnp.arange(half)
    angles = (cos[b, column], sin[b, column])
    scale = jnp.float32(dim**-0.5)
    length = jnp.minimum(lengths[b], keys.shape[2] - 1)  # a full cache loses its last token

    # The new token. Every split needs the queries; the first also takes and keeps the new key.
    at = ((h * group + row) * dim)[:, None] + column[None, :]
    query = [qkv[b, at].astype(jnp.float32), qkv[b, at + half].astype(jnp.float32)]
    at_key = (kv_heads * group + h) * dim + column
    key = [qkv[b, at_key].astype(jnp.float32), qkv[b, at_key + half].astype(jnp.float32)]
    if normed:
        query = _norm(query, norms[0], column, eps)
        key = _norm(key, norms[1], column, eps)
    query = [(part * scale).astype(dtype) for part in _rotate(query, *(t[None, :] for t in angles))]
    key = [part.astype(dtype) for part in _rotate(key, *angles)]
    whole = jnp.arange(dim)
    value = qkv[b, (kv_heads * (group + 1) + h) * dim + whole].astype(dtype)

    @pl.when(split == 0)
    def _():
        keys_out[b, h, length, column] = key[0]
        keys_out[b, h, length, column + half] = key[1]
        values_out[b, h, length, whole] = value

    own = sum(
        (q.astype(jnp.float32) * k.astype(jnp.float32)[None, :]).sum(axis=1)
        for q, k in zip(query, key, strict=True)
    )
    first = split == 0
    state = (
        jnp.where(first, own, NEVER),
        jnp.where(first, jnp.ones(rows, jnp.float32), 0.0),
        jnp.where(first, jnp.broadcast_to(value.astype(jnp.float32)[None, :], (rows, dim)), 0.0),
    )

    # The keys before it, in whole blocks: those past `length` are masked.
    blocks = pl.cdiv(length, _BLOCK)
    each = pl.cdiv(blocks, splits)
    dot = functools.partial(
        jax.lax.dot_general,
        preferred_element_type=jnp.float32,
        precision=jax.lax.Precision.HIGHEST if dtype == jnp.float32 else None,
    )

    def step(i, state):
        peak, norm, acc = state
        slot = i * _BLOCK + jnp.arange(_BLOCK)
        halves = [keys[b, h, slot[:, None], (column + offset)[None, :]] for offset in (0, half)]
        scores = sum(
            dot(q, k, (((1,), (1,)), ((), ()))) for q, k in zip(query, halves, strict=True)
        )
        scores = jnp.where((slot < length)[None, :], scores, NEVER)
        higher = jnp.maximum(peak, scores.max(axis=1))
        shrink, weights = jnp.exp(peak - higher), jnp.exp(scores - higher[:, None])
        value = values[b, h, slot[:, None], whole[None, :]]
        mixed = dot(weights.astype(dtype), value, (((1,), (0,)), ((), ())))
        return higher, norm * shrink + weights.sum(axis=1), acc * shrink[:, None] + mixed

    start = split * each
    stop = jnp.minimum(start + each, blocks)
    peak, norm, acc = jax.lax.fori_loop(start, stop, step, state)
    if splits == 1:
        acc = acc / norm[:, None]
    mixed[b, split, ((h * group + row) * dim)[:, None] + whole[None, :]] = acc.astype(mixed.dtype)
    high[b, split, h * group + row] = peak
    total[b, split, h * group + row] = norm


def _norm(halves, scale, column, eps):
    """RMS norm of heads whose halves are apart."""
    size = 2 * halves[0].shape[-1]
    square = sum((part * part).sum(axis=-1, keepdims=True) for part in halves) / size
    inverse = jax.lax.rsqrt(square + jnp.float32(eps))
    scales = (scale[column], scale[column + size // 2])
    shape = (1,) * (halves[0].ndim - 1) + (-1,)
    return [
        (part * inverse).astype(s.dtype).astype(jnp.float32) * s.astype(jnp.float32).reshape(shape)
        for part, s in zip(halves, scales, strict=True)
    ]


def _rotate(halves, cos, sin):
    first, second = halves
    return first * cos - second * sin, second * cos + first * sin
