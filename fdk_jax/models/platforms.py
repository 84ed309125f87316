"""Operations whose best form depends on the platform that a program is lowered for."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

import pallas_kernels
from fdk_jax.layers.linear import QuantisedLinear
from fdk_jax.product import cpu_backend
from pallas_kernels import dense, norm
from pallas_kernels.case import Arrays


def linear(x: Array, kernel: Array, out_dtype: Any) -> Array:
    """Multiplies by an unquantised kernel: [..., K] x [K, N] -> [..., N] in `out_dtype`."""

    def dot(x: Array, kernel: Array) -> Array:
        y = jnp.einsum("...k,kn->...n", x, kernel, preferred_element_type=jnp.float32)
        return y.astype(out_dtype)

    def fused(x: Array, kernel: Array) -> Array:
        return dense.matmul(x, kernel, out_dtype=out_dtype)

    def on_cpu(x: Array, kernel: Array) -> Array:
        y = cpu_backend.dense(x.reshape(-1, k), kernel, rows=False, out_dtype=out_dtype)
        return y.reshape(*x.shape[:-1], n)

    k, n = kernel.shape
    few = x.ndim == 2 and dense.supported(x.shape[0], k, n, kernel.dtype)
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
        return jnp.einsum("...k,nk->...n", x, rows, preferred_element_type=jnp.float32)

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


def add_rms_norm(x: Array, delta: Array, scale: Array, eps: float) -> tuple[Array, Array]:
    """(x + delta, its RMS norm times `scale`) of [B, D] each; see `pallas_kernels.norm`."""

    def plain(x: Array, delta: Array, scale: Array) -> tuple[Array, Array]:
        total = x + delta
        return total, rms_norm(total, scale, eps)

    def fused(x: Array, delta: Array, scale: Array) -> tuple[Array, Array]:
        return norm.add_rms_norm(x, delta, scale, eps=eps)

    good = norm.supported(x.shape[1], x.dtype)
    return jax.lax.platform_dependent(x, delta, scale, cuda=fused if good else plain, default=plain)


def residual_kernel(linear: nnx.Module, x: Array) -> Callable | None:
    """`pallas_kernels.residual_matmul` with the weight of a layer, for inputs like x [B, K].

    None if no GPU kernel takes the norm before this product, and the residual sum behind it, with it.
    """
    found = _planar(linear, x)
    if found is None or pallas_kernels.residual_plan(found[0], **found[1]) is None:
        return None
    arrays, facts = found
    weight = {name: array for name, array in arrays._asdict().items() if name != "x"}
    return functools.partial(pallas_kernels.residual_matmul, **weight, **facts)


def chain_kernel(linears: Sequence[nnx.Module], x: Array) -> Callable | None:
    """`pallas_kernels.chain_matmul` with the weights of layers, for inputs like x [B, K].

    None if no GPU kernel takes them in one launch.
    """
    found = [_planar(linear, x) for linear in linears]
    weights = [weight for weight in found if weight is not None]
    if len(weights) < len(found) or pallas_kernels.chain_plan(weights) is None:
        return None
    return functools.partial(pallas_kernels.chain_matmul, weights=weights)


def _planar(linear: nnx.Module, x: Array) -> tuple[Arrays, dict[str, Any]] | None:
    """The weight of a layer as `residual_plan` takes it, for inputs like x [B, K]; None if it is another's."""
    if not isinstance(linear, QuantisedLinear) or linear.axis is not None:
        return None
    w, bias = linear.weight.get_value(), linear.bias
    dtype = linear.dtype or jnp.promote_types(x.dtype, w.dtype)
    if w.layout != "planar" or linear.backend not in (None, "pallas") or dtype != x.dtype:
        return None
    row: Any = jax.ShapeDtypeStruct((x.shape[0], w.in_features), x.dtype)
    arrays = Arrays(row, w.packed, w.scales, w.codebook, None if bias is None else bias.get_value())
    facts = {name: value for name, value in w.facts.items() if name != "in_features"}
    return arrays, facts | {"uniform": w.uniform}


def to_scaled(x: Array, scale: Array) -> pallas_kernels.Scaled:
    """A residual stream [1, D] on its way through a norm."""
    squares = jnp.square(x.astype(jnp.float32)).sum(axis=1)
    return pallas_kernels.Scaled(x, x * scale[None, :], squares)


def from_scaled(x: pallas_kernels.Scaled, eps: float) -> Array:
    """The norm of a sum, [1, D]."""
    mean = x.squares.sum() / x.total.shape[1]
    return (x.scaled.astype(jnp.float32) * jax.lax.rsqrt(mean + eps)).astype(x.scaled.dtype)


def rms_norm(x: Array, scale: Array, eps: float) -> Array:
    """RMS norm over the last axis: scale * x / sqrt(mean(x**2) + eps), the mean in float32."""
    wide = x.astype(jnp.float32)
    wide *= jax.lax.rsqrt(jnp.mean(wide * wide, -1, keepdims=True) + jnp.float32(eps))
    return wide.astype(x.dtype) * jnp.expand_dims(scale, tuple(range(x.ndim - 1)))


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
