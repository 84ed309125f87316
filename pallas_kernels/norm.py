"""A residual sum and the RMS norm after it in one launch, where XLA makes two."""

import functools

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl

from pallas_kernels import triton_compat
from pallas_kernels.target import Target

_MAX_FEATURES = 16384  # features that the registers of one program hold


def unsupported_reason(features: int, dtype: jax.typing.DTypeLike, gpu: Target) -> str | None:
    """Why `add_rms_norm` does not take rows of so many features on a GPU, or None."""
    if gpu.no_pallas:
        return gpu.no_pallas
    if features > _MAX_FEATURES:
        return f"{features} features are more than {_MAX_FEATURES}"
    if jnp.dtype(dtype) not in (jnp.bfloat16, jnp.float16, jnp.float32):
        return f"{jnp.dtype(dtype)} is not bfloat16, float16 or float32"
    return None


def add_rms_norm(
    x: Array, delta: Array | None, scale: Array, *, eps: float, interpret: bool = False
) -> tuple[Array, Array]:
    """Adds, then normalises each row by the root of its mean square.

        sum = x + delta;  y = scale * sum / sqrt(mean(sum**2) + eps)

    Args:
        x: [B, D].
        delta: [B, D] of the same dtype, or None.
        scale: [D] of the same dtype.
        eps: Added to the mean.
        interpret: Run in Pallas' interpreter.

    Returns:
        (sum, y), both [B, D] in the dtype of x; the mean is in float32.
    """
    struct = jax.ShapeDtypeStruct(x.shape, x.dtype)
    size = pl.next_power_of_2(x.shape[1])
    outputs = pl.pallas_call(
        functools.partial(_kernel, eps=eps, size=size, added=delta is not None),
        grid=(x.shape[0],),
        out_shape=(struct,) if delta is None else (struct, struct),
        compiler_params=triton_compat.compiler_params(
            num_warps=max(1, min(16, size // 512)), num_stages=1
        ),
        interpret=interpret,
        name="add_rms_norm",
    )(x, scale, *(() if delta is None else (delta,)))
    return (x, outputs[0]) if delta is None else (outputs[1], outputs[0])


def _kernel(x, scale, *refs, eps, size, added):
    features = x.shape[1]
    column = jnp.arange(size)
    mask = None if size == features else column < features
    load = functools.partial(triton_compat.load, mask=mask, other=None if mask is None else 0.0)
    row = pl.program_id(0)
    wide = load(x.at[row, column]).astype(jnp.float32)
    if added:
        wide = (wide + load(refs[0].at[row, column]).astype(jnp.float32)).astype(x.dtype)
        triton_compat.store(refs[2].at[row, column], wide, mask=mask)
        wide = wide.astype(jnp.float32)
    inverse = jax.lax.rsqrt(jnp.sum(wide * wide) / features + jnp.float32(eps))
    # The scale stays in L2 when weights stream by.
    scales = load(scale.at[column], eviction_policy="evict_last")
    normed = (wide * inverse).astype(x.dtype) * scales
    triton_compat.store(refs[-2 if added else -1].at[row, column], normed, mask=mask)
