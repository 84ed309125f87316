"""`matmul`: checks, gradients, batching, sharding, and the choice of a backend.

A call goes through these layers, outermost first:

    matmul            checks; folds the leading axes of x into M
    _compiled         jit, for calls outside of one; JAX bounds its caches and clears them
    _marked           forward-mode differentiation is refused
    _differentiable   custom_vjp: gradients with respect to x and bias, from packed weights
    _batched          custom_vmap: a batch of x folds into M, anything else is a loop
    _sharded          custom_partitioning: a weight sharded along N or K stays where it is
    _on_platform      the backend for the platform that the program is lowered for
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
import math
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.core import Tracer

import pallas_kernels
from fdk_jax.format import packing
from fdk_jax.format.quantised_tensor import FLOAT_DTYPES, QuantisedTensor
from fdk_jax.product import cpu_backend, partitioning, reference
from fdk_jax.product.choice import (
    ARITHMETIC,
    INEXACT,
    LAYOUT_OF,
    PLATFORM_OF,
    Product,
    check_backend,
    choose,
)
from fdk_jax.product.reverse_mode import reverse_only
from pallas_kernels.case import Arrays

if TYPE_CHECKING:
    from jaxtyping import Float

_interpret = contextvars.ContextVar("interpret", default=False)


@contextlib.contextmanager
def interpret_pallas():
    """Inside this context `backend="pallas"` runs in Pallas' interpreter, on any platform. Slow."""
    token = _interpret.set(True)
    try:
        yield
    finally:
        _interpret.reset(token)


def interpreted() -> bool:
    """Whether this is inside `interpret_pallas`."""
    return _interpret.get()


def prepare_tensor(w: QuantisedTensor, backend: str) -> QuantisedTensor:
    """A tensor in the layout that a backend's kernels read."""
    return w.to_layout(LAYOUT_OF[check_backend(backend)])


def matmul(
    x: Float[Array, "*M K"],
    w: QuantisedTensor,
    *,
    backend: str | None = None,
    bias: Float[Array, " N"] | None = None,
    out_dtype: Any = None,
    arithmetic: str = "exact",
) -> Float[Array, "*M N"]:
    """Multiplies activations by a quantised weight, fused with its dequantisation.

        y[..., n] = sum_k x[..., k] * w[n, k] + bias[n]

    Differentiable in reverse mode with respect to x, bias, and the scales and the codebook of w (the codes
    stay as they are): `jax.grad(loss, allow_int=True)` of a tensor gives them. Works under jit, vmap, scan,
    remat and shard_map; under plain jit a weight sharded along N or K is multiplied where it lies (K adds an
    all-reduce).

    Args:
        x: bfloat16, float16 or float32 [..., K]; no leading axes, or empty ones, are fine.
        w: the weight, one matrix (take stacked ones apart with vmap or scan). `fdk_jax.prepare` puts it into
            a kernel's layout once.
        backend: "pallas" (GPU), "cpu" (the C++ library) or "xla" (dequantise, then dot); it never falls
            back to another. None takes the kernel that the weight was prepared for on the platform that
            the program is lowered for, "xla" elsewhere; see `fdk_jax.explain`.
        bias: [N], added in float32; or None.
        out_dtype: dtype of y; None for the dtype of x.
        arithmetic: "exact"; or, with `backend="cpu"`, "int16" or "int8" activations quantised by group
            (docs/cpu.md states their errors); or, with `backend="pallas"`, "int8": many tokens and the weight
            may become integers of a row's range (docs/gpu/many.md).

    Returns:
        y [..., N].

    Raises:
        TypeError: x, w or bias is of the wrong type or dtype.
        ValueError: shapes that do not fit, an unknown name, or a backend that this machine lacks.
        NotImplementedError: the backend cannot do this case.
    """
    _check_call(x, w, backend, bias, out_dtype, arithmetic)
    if backend is not None and w.layout != LAYOUT_OF[backend]:
        w = prepare_tensor(w, backend)
    product = Product.of(
        x,
        w,
        backend=backend,
        out_dtype=out_dtype,
        arithmetic=arithmetic,
        interpret=_interpret.get(),
    )
    lead = x.shape[:-1]
    m = math.prod(lead)
    if m == 0 or w.out_features == 0 or w.in_features == 0:
        y = jnp.zeros((*lead, w.out_features), product.out_dtype)
        return y if bias is None else y + bias.astype(product.out_dtype)[(None,) * len(lead)]
    operands = Arrays(x, w.packed, w.scales, w.codebook, bias)

    def fold(operands: Arrays) -> Array:
        folded = operands._replace(x=operands.x.reshape(m, w.in_features))
        return _compiled(product, folded).reshape(*lead, w.out_features)

    return partitioning.with_automatic_axes(fold, product, operands)


def _check_call(x, w, backend, bias, out_dtype, arithmetic) -> None:
    if not isinstance(w, QuantisedTensor):
        raise TypeError(
            f"w must be a QuantisedTensor, got {type(w).__name__}; see fdk_jax.quantise"
        )
    if not hasattr(x, "dtype") or x.dtype not in FLOAT_DTYPES:
        kind = getattr(x, "dtype", type(x).__name__)
        raise TypeError(f"x must be a bfloat16, float16 or float32 array, got {kind}; cast it")
    w.validate()
    if x.ndim == 0 or x.shape[-1] != w.in_features:
        raise ValueError(f"{x.shape=} must end in K={w.in_features} of {w}")
    if w.batch_shape:
        raise ValueError(f"{w} is a stack of matrices: take one with vmap, scan or tree_map")
    if bias is not None and not hasattr(bias, "dtype"):
        raise TypeError(f"bias must be an array, got {type(bias).__name__}")
    if bias is not None and (bias.shape != (w.out_features,) or bias.dtype not in FLOAT_DTYPES):
        raise ValueError(f"bias must be a float [{w.out_features}], got {bias.dtype}{bias.shape}")
    if out_dtype is not None and jnp.dtype(out_dtype) not in FLOAT_DTYPES:
        raise TypeError(f"out_dtype must be bfloat16, float16 or float32, got {out_dtype}")
    if arithmetic not in ARITHMETIC:
        raise ValueError(f"{arithmetic=} is not one of {ARITHMETIC}")
    if arithmetic != "exact" and arithmetic not in INEXACT.get(backend or "", ()):
        those = " or ".join(f'"{name}"' for name, known in INEXACT.items() if arithmetic in known)
        raise NotImplementedError(f"{arithmetic=} needs backend={those}, got {backend=}")
    check_available(backend, x)


def check_available(backend: str | None, x: Array) -> None:
    """Raises ValueError for a backend that there is not, or that cannot run here on x."""
    if backend is None:
        return
    check_backend(backend)
    if backend == "cpu" and (reason := cpu_backend.unavailable_reason()) is not None:
        raise ValueError(f'backend="cpu" is not available: {reason}')
    if backend == "pallas" and not interpreted() and not isinstance(x, Tracer):
        platform = next(iter(x.devices())).platform if isinstance(x, Array) else None
        if platform not in ("gpu", "cuda"):
            raise ValueError(
                f'backend="pallas" needs x on an NVIDIA GPU, it is on {platform}: use backend="cpu",'
                ' "xla" or None'
            )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _differentiable(product: Product, operands: Arrays) -> Array:
    return _batched(product)(operands)


def _forward(product, operands):
    return _differentiable(product, operands), operands


def _backward(product, operands, g):
    x, packed, scales, codebook, bias = operands
    packed, scales = packing.convert(packed, scales, product.layout, "interchange", **product.spec)
    widths = dict(bits=product.bits, group_size=product.group_size, in_features=product.in_features)
    dx = reference.transposed_matmul(g, packed, scales, codebook, out_dtype=x.dtype, **widths)
    dbias = None if bias is None else g.astype(jnp.float32).sum(0).astype(bias.dtype)
    # Compilers drop the gradients that nobody asks for.
    dscales, dcodebook = reference.weight_gradients(x, g, packed, scales, codebook, **widths)
    _, dscales = packing.convert(packed, dscales, "interchange", product.layout, **product.spec)
    return (Arrays._make((dx, None, dscales, dcodebook, dbias)),)


_differentiable.defvjp(_forward, _backward)


def _marked(product: Product, operands: Arrays) -> Array:
    return _differentiable(product, reverse_only(operands))


# Without it a call outside of jit would be traced anew each time, and the branches of `_on_platform` compiled
# anew and kept. Inlined, so that it leaves no trace in a caller's program.
_compiled = jax.jit(_marked, static_argnums=0, inline=True)


def _batched(product: Product):
    """The product with a batching rule, a function of `Arrays`."""

    @jax.custom_batching.custom_vmap
    def call(operands: Arrays) -> Array:
        return partitioning.sharded(_on_platform, product)(operands)

    @call.def_vmap
    def _rule(axis_size, in_batched, operands):
        if not in_batched[0].x or any(jax.tree.leaves(tuple(in_batched[0])[1:])):
            return _loop(call, in_batched[0], operands), True
        x = operands.x
        y = call(operands._replace(x=x.reshape(-1, x.shape[-1])))
        return y.reshape(axis_size, x.shape[1], -1), True

    return call


def _loop(call, batched: Arrays, operands: Arrays) -> Array:
    """One product after another: stacked weights cannot share a launch."""
    taken = Arrays._make(a if b else None for a, b in zip(operands, batched, strict=True))

    def one(slices: Arrays) -> Array:
        parts = (a if s is None else s for a, s in zip(operands, slices, strict=True))
        return call(Arrays._make(parts))

    return jax.lax.map(one, taken)


def _on_platform(product: Product, operands: Arrays) -> Array:
    """One product by the chosen backend, or by the platform that the program is lowered for."""
    platform = PLATFORM_OF.get(product.layout, "")
    backend = choose(product, operands, platform).backend
    if backend == product.backend or backend == "xla":
        return _run(backend, product, operands)
    branches = {platform: functools.partial(_run, backend, product)}
    return jax.lax.platform_dependent(
        operands, **branches, default=functools.partial(_run, "xla", product)
    )


def _run(backend: str, product: Product, operands: Arrays) -> Array:
    x, packed, scales, codebook, bias = operands
    if backend == "xla":
        packed, scales = packing.convert(
            packed, scales, product.layout, "interchange", **product.spec
        )
        return reference.matmul(
            x,
            packed,
            scales,
            codebook,
            bits=product.bits,
            group_size=product.group_size,
            bias=bias,
            out_dtype=product.out_dtype,
        )
    options: dict[str, Any] = dict(
        bits=product.bits,
        group_size=product.group_size,
        out_features=product.out_features,
        uniform=product.uniform,
        bias=bias,
        out_dtype=product.out_dtype,
    )
    if backend == "pallas":
        options |= dict(arithmetic=product.arithmetic, interpret=product.interpret)
        return pallas_kernels.matmul(x, packed, scales, codebook, **options)
    return cpu_backend.matmul(x, packed, scales, codebook, arithmetic=product.arithmetic, **options)
