"""`einsum` of activations and a quantised weight, and the operator `@`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import jax.numpy as jnp
import numpy as np
from jax import Array

from fdk_jax.format.array_like import ArrayLike
from fdk_jax.format.quantised_tensor import FLOAT_DTYPES, QuantisedTensor, is_quantised
from fdk_jax.product.interpretation import Options, interpreted

if TYPE_CHECKING:
    from jaxtyping import Float


def einsum(
    equation: str,
    x: Float[Array, " ..."],
    w: QuantisedTensor,
    *,
    backend: str | None = None,
    out_dtype: Any = None,
    arithmetic: str = "exact",
) -> Float[Array, " ..."]:
    """`jnp.einsum(equation, x, w)` by fused products.

        fdk_jax.einsum("BTD,NDH->BTNH", x, w)  # w quantised with axes="nkn"
        fdk_jax.einsum("ECD,EDF->ECF", x, experts)  # axes="bkn"

    Args:
        equation: two operands, x first; letters of w that x has too and the result has not are its "k" axes,
            letters that both have are among its "b" axes, all others are "n" (or "b") axes. x may have "...".
        x: bfloat16, float16 or float32.
        w: the weight; leading axes of stacked layers count as batch axes.
        backend: see `fdk_jax.matmul`.
        out_dtype: dtype of the result; None for the dtype of x.
        arithmetic: see `fdk_jax.matmul`.

    Raises:
        TypeError: w is no `QuantisedTensor`, or x no float array.
        ValueError: the equation does not fit the shapes, or contracts other axes than w was quantised for.
    """
    if not is_quantised(w):
        raise TypeError(
            f"w must be a QuantisedTensor, got {type(w).__name__}; see fdk_jax.quantise"
        )
    if not hasattr(x, "dtype") or x.dtype not in FLOAT_DTYPES:
        kind = getattr(x, "dtype", type(x).__name__)
        raise TypeError(f"x must be a bfloat16, float16 or float32 array, got {kind}; cast it")
    if not isinstance(equation, str) or equation.count(",") != 1:
        raise ValueError(f"{equation=} must have two operands, x and w")

    def product(x: Array, w: Array) -> Array:
        return jnp.einsum(equation, x, w.astype(x.dtype), preferred_element_type=out_dtype)

    try:
        y = interpreted(product, Options(backend, arithmetic, "raise"))(x, w)
    except ValueError as error:
        raise ValueError(
            f"einsum {equation!r} of x {x.shape} and {w}: {error}; quantise with axes= of that form"
        ) from error
    return y if out_dtype is None else y.astype(out_dtype)


def _matmul(w: QuantisedTensor, x: Array) -> Array:
    """`w @ x`, as `jnp.matmul` has it; fused if it contracts the "k" axis."""
    x = jnp.asarray(x)
    return interpreted(lambda w, x: jnp.matmul(w.astype(x.dtype), x), Options())(w, x)


def _rmatmul(w: QuantisedTensor, x: Array) -> Array:
    """`x @ w`, as `jnp.matmul` has it; fused if it contracts the "k" axis.

    A numpy x comes here, by `_array_ufunc`. A JAX array does not: it asks for the unpacked weight, and gets it
    with a warning.
    """
    x = jnp.asarray(x)
    return interpreted(lambda w, x: jnp.matmul(x, w.astype(x.dtype)), Options())(w, x)


def _array_ufunc(w: QuantisedTensor, ufunc: Any, method: str, *inputs: Any, **options: Any) -> Any:
    """What numpy's functions do: products are fused, all else is done with the unpacked weight."""
    if ufunc is np.matmul and method == "__call__" and not options:
        x, other = inputs
        return _matmul(x, other) if is_quantised(x) else _rmatmul(other, x)
    arrays = [np.asarray(a) if is_quantised(a) else a for a in inputs]
    return getattr(ufunc, method)(*arrays, **options)


# The tensor is of a floor that knows no products: its operators are put in here.
ArrayLike.__matmul__ = _matmul  # type: ignore[attr-defined]
ArrayLike.__rmatmul__ = _rmatmul  # type: ignore[attr-defined]
ArrayLike.__array_ufunc__ = _array_ufunc  # type: ignore[attr-defined]
