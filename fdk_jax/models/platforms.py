"""Operations whose best form depends on the platform that a program is lowered for."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from fdk_jax.models import attention
from fdk_jax.models.attention import Mask
from fdk_jax.models.cache import append
from fdk_jax.product import cpu_backend
from pallas_kernels import attention as pallas_attention
from pallas_kernels import dense, norm, target


def linear(x: Array, kernel: Array, out_dtype: Any) -> Array:
    """Multiplies by an unquantised kernel: [..., K] x [K, N] -> [..., N] in `out_dtype`."""

    def dot(x: Array, kernel: Array) -> Array:
        y = attention.product("...k,kn->...n", x, kernel)
        return y.astype(out_dtype)

    def fused(x: Array, kernel: Array) -> Array:
        return dense.matmul(x, kernel, out_dtype=out_dtype)

    def on_cpu(x: Array, kernel: Array) -> Array:
        y = cpu_backend.dense(x.reshape(-1, k), kernel, rows=False, out_dtype=out_dtype)
        return y.reshape(*x.shape[:-1], n)

    k, n = kernel.shape
    shape = x.shape[0], k, n, kernel.dtype
    few = x.ndim == 2 and dense.unsupported_reason(*shape, target.current()) is None
    return jax.lax.platform_dependent(
        x,
        kernel,
        cuda=fused if few else dot,
        cpu=on_cpu if _few_on_cpu(x, kernel) else _widened(dot),
        default=dot,
    )


def linear_of_rows(x: Array, rows: Array) -> Array:
    """Multiplies by a table of rows: [..., K] x [N, K] -> float32 [..., N]."""

    def dot(x: Array, rows: Array) -> Array:
        return attention.product("...k,nk->...n", x, rows)

    def on_cpu(x: Array, rows: Array) -> Array:
        y = cpu_backend.dense(x.reshape(-1, rows.shape[1]), rows, rows=True, out_dtype=jnp.float32)
        return y.reshape(*x.shape[:-1], -1)

    cpu = on_cpu if _few_on_cpu(x, rows) else _widened(dot)
    return jax.lax.platform_dependent(x, rows, cpu=cpu, default=dot)


def _few_on_cpu(x: Array, matrix: Array) -> bool:
    """Whether the C++ library should multiply: XLA would write a float32 copy of the matrix first."""
    few = x.size <= cpu_backend.FEW_TOKENS * x.shape[-1]
    return few and matrix.dtype.itemsize == 2 and cpu_backend.unavailable_reason() is None


def take_rows(table: Array, index: Array) -> Array:
    """Rows of a table [N, D] at int [...], out of range the nearest one: [..., D]."""

    def take(table: Array, index: Array) -> Array:
        return jnp.take(table, index, axis=0, mode="clip")

    def on_cpu(table: Array, index: Array) -> Array:
        rows = cpu_backend.take_rows(table, index.reshape(-1).astype(jnp.int32))
        return rows.reshape(*index.shape, -1)

    # XLA would write a float32 copy of the whole table first.
    narrow = table.dtype.itemsize == 2 and cpu_backend.unavailable_reason() is None
    return jax.lax.platform_dependent(table, index, cpu=on_cpu if narrow else take, default=take)


def add_rms_norm(
    x: Array, delta: Array, scale: Array, eps: float, offset: float = 0.0
) -> tuple[Array, Array]:
    """(x + delta, its `rms_norm`) of [B, D] each; see `pallas_kernels.norm`."""

    def plain(x: Array, delta: Array, scale: Array) -> tuple[Array, Array]:
        total = x + delta
        return total, rms_norm(total, scale, eps, offset)

    def fused(x: Array, delta: Array, scale: Array) -> tuple[Array, Array]:
        return norm.add_rms_norm(x, delta, scale, eps=eps)

    reason = norm.unsupported_reason(x.shape[1], x.dtype, target.current())
    good = offset == 0 and reason is None
    on_cpu = offset == 0 and x.ndim == 2 and x.dtype == delta.dtype == scale.dtype
    on_cpu = on_cpu and cpu_backend.unavailable_reason() is None
    return jax.lax.platform_dependent(
        x,
        delta,
        scale,
        cuda=fused if good else plain,
        cpu=functools.partial(cpu_backend.add_rms_norm, eps=eps) if on_cpu else plain,
        default=plain,
    )


def rms_norm(x: Array, scale: Array, eps: float, offset: float = 0.0) -> Array:
    """RMS norm over the last axis: (offset + scale) * x / sqrt(mean(x**2) + eps), the mean in float32.

    As the models do that have them: without an offset the quotient is rounded before it is scaled, with
    one the scale is added and multiplied in float32.
    """
    wide = x.astype(jnp.float32)
    wide *= jax.lax.rsqrt(jnp.mean(wide * wide, -1, keepdims=True) + jnp.float32(eps))
    scale = jnp.expand_dims(scale, tuple(range(x.ndim - 1)))
    if offset == 0:
        return wide.astype(x.dtype) * scale
    return (wide * (jnp.float32(offset) + scale.astype(jnp.float32))).astype(x.dtype)


def in_float32_on_cpu(function: Callable[..., Array], *arrays: Array) -> Array:
    """function(*arrays), with float arrays widened where XLA multiplies narrow ones slowly."""
    return jax.lax.platform_dependent(*arrays, cpu=_widened(function), default=function)


def _widened(function: Callable[..., Array]) -> Callable[..., Array]:
    """XLA's products of bfloat16 on a CPU run at a tenth of the speed of float32."""

    def wide(*arrays: Array) -> Array:
        narrow = jax.eval_shape(function, *arrays).dtype
        floats = [
            a.astype(jnp.float32) if jnp.issubdtype(a.dtype, jnp.floating) else a for a in arrays
        ]
        return function(*floats).astype(narrow)

    return wide


def prompt_attention(q: Array, k: Array, v: Array, mask: Mask, sinks: Array | None) -> Array:
    """`attention.over_prompt`, by cuDNN on GPUs where it has the case."""
    blocked = functools.partial(attention.over_prompt, mask=mask, sinks=sinks)
    window = None if mask.window is None else (mask.window - 1, 0)
    library = functools.partial(_cudnn, is_causal=True, local_window_size=window)
    return jax.lax.platform_dependent(
        q,
        k,
        v,
        cuda=library if _cudnn_takes(library, mask, sinks, q, k, v) else blocked,
        cpu=_on_cpu(_widened(blocked), mask, sinks, q.dtype, by_token=True),
        default=blocked,
    )


def chunk_attention(
    q: Array, keys: Array, values: Array, starts: Array, mask: Mask, sinks: Array | None
) -> Array:
    """`attention.over_chunk`, by cuDNN on GPUs where it has the case."""

    def library(q, keys, values, starts):
        tokens, slots = q.shape[1], keys.shape[2]
        at = starts[:, None] + jnp.arange(tokens)[None, :]
        seen = mask.seen(at[:, :, None], jnp.arange(slots)[None, None, :])[:, None]
        ends = jnp.broadcast_to(starts + tokens, q.shape[:1])
        keys, values = (a.transpose(0, 2, 1, 3) for a in (keys, values))
        return _cudnn(q, keys, values, mask=seen, key_value_seq_lengths=ends)

    blocked = functools.partial(attention.over_chunk, mask=mask, sinks=sinks)
    arrays = q, keys, values, starts
    return jax.lax.platform_dependent(
        *arrays,
        cuda=library if _cudnn_takes(library, mask, sinks, *arrays) else blocked,
        cpu=_on_cpu(_widened(blocked), mask, sinks, q.dtype, by_token=False),
        default=blocked,
    )


def _on_cpu(
    plain: Callable[..., Array], mask: Mask, sinks: Array | None, dtype: Any, *, by_token: bool
) -> Callable[..., Array]:
    """Attention by the C++ library where it has the case, with the derivatives of `plain`."""
    narrow = jnp.dtype(dtype) in (jnp.float32, jnp.bfloat16, jnp.float16)
    if (
        mask.soft_cap is not None
        or sinks is not None
        or not narrow
        or cpu_backend.unavailable_reason() is not None
    ):
        return plain

    @jax.custom_jvp
    def attend(q: Array, keys: Array, values: Array, *starts: Array) -> Array:
        places = starts[0] if starts else jnp.zeros(1, jnp.int32)
        return cpu_backend.prompt_attention(
            q, keys, values, places, window=mask.window, by_token=by_token
        )

    @attend.defjvp
    def _(primals, tangents):
        return jax.jvp(plain, primals, tangents)

    return attend


def _cudnn(q: Array, k: Array, v: Array, **options: Any) -> Array:
    return jax.nn.dot_product_attention(q, k, v, implementation="cudnn", **options)


def _cudnn_takes(
    function: Callable[..., Array], mask: Mask, sinks: Array | None, *arrays: Array
) -> bool:
    """Whether cuDNN computes function(*arrays) on the GPU at hand, as JAX's checks say."""
    capability = target.current().capability
    # JAX does not ask whether the GPU is too old.
    if (
        (capability or (0, 0)) < (8, 0)
        or arrays[0].dtype not in (jnp.bfloat16, jnp.float16)
        or mask.soft_cap is not None
        or sinks is not None
    ):
        return False
    try:
        jax.eval_shape(function, *arrays)
    except (NotImplementedError, RuntimeError):  # a shape or dtype; no cuDNN
        return False
    return True


def token_attention(
    qkv: Array,
    cos: Array,
    sin: Array,
    lengths: Array,
    keys: Array,
    values: Array,
    *,
    heads_of: Callable[[Array, Array, Array], tuple[Array, Array, Array]],
    norms: tuple[Array, Array] | None,
    norm_eps: float,
    mask: Mask,
    sinks: Array | None,
    fusible: bool,
) -> tuple[Array, Array, Array]:
    """Attention of one new token a sequence over the cache and itself, which it adds to the cache.

    Args:
        qkv: [B, (H + 2 KV) * D], what the projection gives.
        cos: float32 [B, D / 2], of the tokens' positions.
        sin: Like cos.
        lengths: int32 [B], tokens in the cache.
        keys: [B, KV, S, D].
        values: Like keys.
        heads_of: (qkv, cos [B, 1, D / 2], sin) to queries [B, H, D], keys and values [B, KV, D]: norms and
            RoPE applied, where no kernel does all at once.
        norms: Scales [D] of RMS norms of each query and key in one kernel, or None.
        norm_eps: Of these norms.
        mask: Which slots a token sees.
        sinks: See `attention.over_prompt`.
        fusible: Whether `heads_of` is no more than these norms and RoPE.

    Returns:
        ([B, H * D], keys, values).
    """

    def plain(qkv, cos, sin, lengths, keys, values):
        q, k, v = heads_of(qkv, cos[:, None], sin[:, None])
        keys, values = append(keys, k, lengths), append(values, v, lengths)
        over_cache = functools.partial(attention.over_cache, mask=mask, sinks=sinks)
        mixed = in_float32_on_cpu(over_cache, q, keys, values, lengths + 1)
        return mixed.reshape(qkv.shape[0], -1), keys, values

    kv_heads, capacity, dim = keys.shape[1:]
    heads = qkv.shape[1] // dim - 2 * kv_heads
    # A window that the whole cache fits into hides nothing.
    window = None if mask.window is None or mask.window >= capacity else mask.window
    fusible = fusible and mask.soft_cap is None and sinks is None
    alike = all(array.dtype == keys.dtype for array in (qkv, values, *(norms or ())))
    kernel, _ = pallas_attention.choose(
        keys.dtype, keys.shape, heads, target.current(), window=window, alike=alike
    )
    on_gpu = fusible and kernel is not None
    on_cpu = fusible and window is None and cpu_backend.unavailable_reason() is None
    options = dict(norms=norms, norm_eps=norm_eps)
    gpu = functools.partial(pallas_attention.decode, **options, window=window)
    return jax.lax.platform_dependent(
        qkv,
        cos,
        sin,
        lengths,
        keys,
        values,
        cuda=gpu if on_gpu else plain,
        cpu=functools.partial(cpu_backend.attention, **options) if on_cpu else plain,
        default=plain,
    )
