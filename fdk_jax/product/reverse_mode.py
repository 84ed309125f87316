"""Marks what has a derivative in reverse mode only, so that forward mode is refused with a remedy.

JAX's own refusal of a `custom_vjp` function names neither the product nor a way out, and comes so late (when a
program is lowered) that nothing could be added to it.
"""

from typing import Any, NoReturn

import jax
import jax.numpy as jnp
from jax import Array
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir


def reverse_only(operands: Any) -> Any:
    """A tree as it is; forward-mode differentiation of a function that calls this raises TypeError."""
    return jax.tree.map(
        lambda a: _mark.bind(a) if jnp.issubdtype(a.dtype, jnp.floating) else a, operands
    )


def _refuse(*_: Any, **__: Any) -> NoReturn:
    raise TypeError(
        "quantised products have no forward-mode derivative (jax.jvp, jacfwd, hessian, linearize): use jax.vjp,"
        " grad or jacrev, also one inside the other; or multiply by fdk_jax.dequantise(w)"
    )


def _jvp(primals: tuple[Array], tangents: tuple[Any]) -> tuple[Array, Any]:
    (x,), (tangent,) = primals, tangents
    if type(tangent) is not ad.Zero:
        tangent = _tangent.bind(tangent)
    return _mark.bind(x), tangent


def _identity_batch(args: tuple[Array], dims: tuple[Any]) -> tuple[Array, Any]:
    return _mark.bind(*args), dims[0]


_mark = Primitive("fdk_reverse_only")
_mark.def_impl(lambda x: x)
_mark.def_abstract_eval(lambda x: x)
mlir.register_lowering(_mark, lambda _, x: [x])
batching.primitive_batchers[_mark] = _identity_batch
ad.primitive_jvps[_mark] = _jvp

# The tangent of the mark: reverse mode transposes it and never runs it.
_tangent = Primitive("fdk_reverse_only_tangent")
_tangent.def_impl(_refuse)
_tangent.def_abstract_eval(lambda x: x)
mlir.register_lowering(_tangent, _refuse)
batching.primitive_batchers[_tangent] = _refuse
ad.primitive_transposes[_tangent] = lambda cotangent, _: [cotangent]
