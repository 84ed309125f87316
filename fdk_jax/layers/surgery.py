"""Layers of an nnx model taken out and others put in."""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jax import Array

from fdk_jax.format.quantised_tensor import QuantisedTensor
from fdk_jax.layers.linear import QuantisedLinear

Replace = Callable[[str, nnx.Module], nnx.Module | None]


def replace_layers(module: nnx.Module, replace: Replace, *, in_place: bool = False) -> nnx.Module:
    """A copy of a model with some of its layers replaced; arrays are shared with the original.

    Args:
        module: the model; it may itself be replaced.
        replace: called once a module with its dotted name; returns what takes its place in every position,
            or None to keep it.
        in_place: changes `module` itself, so that the arrays of a replaced layer can be freed.

    Returns:
        A new module, or `module` if `in_place` (unless it was replaced itself).
    """
    module = module if in_place else nnx.clone(module)
    done: dict[int, Any] = {}

    def visit(name: str, node: Any) -> Any:
        if not isinstance(node, (nnx.Module, list, dict)):
            return node
        if id(node) in done:
            return done[id(node)]
        done[id(node)] = node
        if isinstance(node, nnx.Module):
            new = replace(name, node)
            if new is not None:
                done[id(node)] = new
                return new
        for key, child in _children(node):
            new = visit(f"{name}.{key}" if name else str(key), child)
            if new is not child:
                _set(node, key, new)
        return node

    return visit("", module)


def _children(node: Any) -> list[tuple[Any, Any]]:
    if isinstance(node, list):
        return list(enumerate(node))
    items = node.items() if isinstance(node, dict) else vars(node).items()
    return [(k, v) for k, v in items if not str(k).startswith("_pytree__")]


def _set(node: Any, key: Any, value: Any) -> None:
    if isinstance(node, (list, dict)):
        node[key] = value
    else:
        setattr(node, key, value)


def from_flax(
    layer: nnx.Module, quantise: Callable[[Array, str], QuantisedTensor]
) -> QuantisedLinear | None:
    """The quantised twin of an `nnx.Linear` or `nnx.LinearGeneral`; None for any other module.

    Args:
        layer: the layer; its bias variable is shared.
        quantise: makes the weight from a kernel and its `axes`.
    """
    if isinstance(layer, nnx.Linear):
        weight = quantise(layer.kernel.get_value(), "kn")
        return QuantisedLinear.from_weight(weight, layer.bias, dtype=layer.dtype)
    if isinstance(layer, nnx.LinearGeneral) and not layer.batch_axis:
        axes = "k" * len(layer.in_features) + "n" * len(layer.out_features)
        weight = quantise(layer.kernel.get_value(), axes)
        return QuantisedLinear.from_weight(weight, layer.bias, axis=layer.axis, dtype=layer.dtype)
    return None


def to_flax(layer: QuantisedLinear, dtype: Any = None) -> nnx.Module:
    """The `nnx.Linear` or `nnx.LinearGeneral` with the dequantised weight of a layer."""
    w = layer.weight.get_value()
    order = sorted(range(len(w.axes)), key=lambda i: w.axes[i])  # "k" axes first, as Flax has them
    kernel = w.dequantise(dtype)
    lead = kernel.ndim - len(order)
    kernel = kernel.transpose(*range(lead), *(lead + i for i in order))
    k_shape = tuple(d for d, a in zip(w.shape, w.axes, strict=True) if a == "k")
    n_shape = tuple(d for d, a in zip(w.shape, w.axes, strict=True) if a == "n")
    options: dict[str, Any] = dict(
        use_bias=layer.bias is not None, dtype=layer.dtype, param_dtype=kernel.dtype
    )
    new: Any
    if layer.axis is None and w.axes in ("kn", "nk"):
        new = nnx.eval_shape(lambda: nnx.Linear(*k_shape, *n_shape, **options, rngs=nnx.Rngs(0)))
    else:
        axis = layer.axis if layer.axis is not None else tuple(range(-len(k_shape), 0))
        new = nnx.eval_shape(
            lambda: nnx.LinearGeneral(k_shape, n_shape, axis=axis, **options, rngs=nnx.Rngs(0))
        )
    new.kernel = nnx.Param(jnp.asarray(kernel))
    new.bias = layer.bias
    return new
