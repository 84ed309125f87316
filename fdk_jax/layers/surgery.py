"""Layers of an nnx model taken out and others put in."""

import inspect
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from fdk_jax.format.quantised_tensor import FLOAT_DTYPES, QuantisedTensor
from fdk_jax.layers.linear import (
    QuantisedEmbed,
    QuantisedLinear,
    QuantisedLoRALinear,
    QuantisedWeight,
)

# These compute with the weights of the layer that they hold: it must stay what it is.
_READS_CHILDREN = tuple(
    getattr(nnx, name) for name in ("WeightNorm", "SpectralNorm") if hasattr(nnx, name)
)
_FLAX_LINEARS = (nnx.Linear, nnx.LinearGeneral, nnx.LoRALinear)
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
        if not isinstance(node, (nnx.Module, list, dict, tuple)):
            return node
        if isinstance(node, tuple):
            return _rebuilt(
                node, [visit(f"{name}.{i}" if name else str(i), v) for i, v in enumerate(node)]
            )
        if id(node) in done:
            return done[id(node)]
        done[id(node)] = node
        if isinstance(node, nnx.Module):
            new = replace(name, node)
            if new is not None:
                done[id(node)] = new
                return new
            if isinstance(node, _READS_CHILDREN):
                return node
        for key, child in _children(node):
            new = visit(f"{name}.{key}" if name else str(key), child)
            if new is not child:
                _set(node, key, new)
        return node

    return visit("", module)


def _rebuilt(old: tuple, items: list[Any]) -> tuple:
    """A tuple (or NamedTuple) of other items; the old one if they are the same."""
    if all(new is item for new, item in zip(items, old, strict=True)):
        return old
    return type(old)(*items) if hasattr(old, "_fields") else tuple(items)


def _children(node: Any) -> list[tuple[Any, Any]]:
    if isinstance(node, (list, tuple)):
        return list(enumerate(node))
    items = node.items() if isinstance(node, dict) else vars(node).items()
    return [(k, v) for k, v in items if not str(k).startswith("_pytree__")]


def _set(node: Any, key: Any, value: Any) -> None:
    if isinstance(node, (list, dict)):
        node[key] = value
    else:
        setattr(node, key, nnx.data(value) if isinstance(value, tuple) else value)


def computed_as(cls: type) -> type | None:
    """The linear layer of Flax whose computation a class has: its own, or the one that its body declares.

    A subclass of `nnx.Linear`, `nnx.LinearGeneral` or `nnx.LoRALinear` that computes what its base computes
    says so by `computes_as = nnx.Linear`. A subclass of that one may compute something else: not trusted.

    Raises:
        ValueError: the declared class is none of the three, or no base of `cls`.
    """
    declared = vars(cls).get("computes_as", cls)
    if declared in _FLAX_LINEARS and issubclass(cls, declared):
        return declared
    if declared is not cls:
        known = " or ".join(f"nnx.{c.__name__}" for c in _FLAX_LINEARS)
        raise ValueError(
            f"{cls.__name__}: computes_as = {declared!r} must be a base of it, {known}"
        )
    return None


def why_not(layer: nnx.Module) -> str | None:
    """Why a layer is not computed as `QuantisedLinear` computes, or None if it is (see `computed_as`)."""
    cls = computed_as(type(layer))
    if not isinstance(layer, (nnx.Linear, nnx.LinearGeneral)):
        return "no Linear"
    if cls is None:
        flax = nnx.Linear if isinstance(layer, nnx.Linear) else nnx.LinearGeneral
        return (
            f"{type(layer).__name__} is a subclass with a computation of its own (if not, say computes_as ="
            f" nnx.{flax.__name__} in its body)"
        )
    own = nnx.Linear if cls is nnx.LoRALinear else cls
    default = inspect.signature(own.__init__).parameters
    for name in ("dot_general", "dot_general_cls", "promote_dtype"):
        if name in default and getattr(layer, name, None) is not default[name].default:
            return f"{name}= of its own"
    if not isinstance(layer.precision, (str, jax.lax.Precision, type(None))):
        return f"precision={layer.precision}"
    for name in ("dtype", "preferred_element_type"):
        value = getattr(layer, name)
        if value is not None and jnp.dtype(value) not in FLOAT_DTYPES:
            return f"{name}={jnp.dtype(value)}"
    if isinstance(layer, nnx.LinearGeneral) and layer.batch_axis:
        return f"batch_axis={dict(layer.batch_axis)}"
    known = {"kernel", "bias", "lora"}
    extra = [
        name
        for name, value in vars(layer).items()
        if isinstance(value, (nnx.Variable, nnx.Module)) and name not in known
    ]
    return f"attributes of its own: {extra}" if extra else None


def axes_of(layer: nnx.Module) -> dict[str, str]:
    """The weights that a layer multiplies by, by attribute, with their axes: of Flax's layers and of Einsums.

    A module with an equation ("BTD,DNH->BTNH" in an attribute called einsum_str, equation or eqn) and one
    variable of the rank that its second operand has is an Einsum, whoever wrote it; variables [E, K, N] of a
    module with `num_experts` E are experts.
    """
    if isinstance(layer, nnx.Linear):
        return {"kernel": "kn"}
    if isinstance(layer, nnx.LinearGeneral):
        parts = (("b", layer.batch_axis), ("k", layer.in_features), ("n", layer.out_features))
        return {"kernel": "".join(letter * len(sizes) for letter, sizes in parts)}
    for name in ("einsum_str", "equation", "eqn"):
        found = axes_of_equation(getattr(layer, name, None))
        if found is None:
            continue
        fitting = [
            attribute
            for attribute, value in vars(layer).items()
            if isinstance(value, nnx.Variable)
            and getattr(value.get_value(), "ndim", 0) >= len(found)
        ]
        if len(fitting) == 1:
            return {fitting[0]: found}
    experts = getattr(layer, "num_experts", None)
    return {
        attribute: "bkn"
        for attribute, value in vars(layer).items()
        if isinstance(value, nnx.Variable)
        and getattr(value.get_value(), "ndim", 0) == 3
        and value.get_value().shape[0] == experts
    }


def axes_of_equation(equation: Any) -> str | None:
    """Axes of the second operand of an einsum equation; None if it is no product with a weight."""
    if not isinstance(equation, str) or equation.count(",") != 1 or "->" not in equation:
        return None
    operands, result = equation.replace(" ", "").split("->")
    x, w = operands.split(",")
    if "." in w or len(set(w)) < len(w) or not set(w) <= set(x) | set(result):
        return None
    axes = "".join("n" if c not in x else "b" if c in result else "k" for c in w)
    return axes if {"k", "n"} <= set(axes) else None


def plain_linear(layer: nnx.Module) -> nnx.Linear | nnx.LinearGeneral | None:
    """A layer that `why_not` has nothing against; None for any other module."""
    if isinstance(layer, (nnx.Linear, nnx.LinearGeneral)) and why_not(layer) is None:
        return layer
    return None


def from_flax(
    layer: nnx.Module, quantise: Callable[[Array, str], QuantisedTensor | QuantisedWeight]
) -> QuantisedLinear | None:
    """The quantised twin of a layer that `why_not` has nothing against; None for any other module.

    Args:
        layer: the layer; its bias variable, and the adapter of an `nnx.LoRALinear`, are shared.
        quantise: makes the weight from a kernel and its `axes`.
    """
    plain = plain_linear(layer)
    if plain is None:
        return None
    weight = quantise(plain.kernel.get_value(), axes_of(plain)["kernel"])
    out_dtype = plain.preferred_element_type
    if out_dtype is not None and plain.bias is not None:
        out_dtype = jnp.promote_types(out_dtype, plain.dtype or plain.bias.get_value().dtype)
    lora = computed_as(type(plain)) is nnx.LoRALinear
    cls = QuantisedLoRALinear if lora else QuantisedLinear
    new: Any = cls.from_weight(
        weight,
        plain.bias,
        axis=getattr(plain, "axis", None),
        dtype=plain.dtype,
        out_dtype=out_dtype,
    )
    if lora and isinstance(plain, nnx.LoRALinear):
        new.lora = plain.lora
    return new


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
        use_bias=layer.bias is not None,
        dtype=layer.dtype,
        param_dtype=kernel.dtype,
        preferred_element_type=layer.out_dtype,
    )
    new: Any
    if isinstance(layer, QuantisedLoRALinear):
        rank = layer.lora.lora_a.get_value().shape[-1]
        new = nnx.eval_shape(
            lambda: nnx.LoRALinear(*k_shape, *n_shape, lora_rank=rank, **options, rngs=nnx.Rngs(0))
        )
        new.lora = layer.lora
    elif layer.axis is None and w.axes in ("kn", "nk"):
        new = nnx.eval_shape(lambda: nnx.Linear(*k_shape, *n_shape, **options, rngs=nnx.Rngs(0)))
    else:
        axis = layer.axis if layer.axis is not None else tuple(range(-len(k_shape), 0))
        new = nnx.eval_shape(
            lambda: nnx.LinearGeneral(k_shape, n_shape, axis=axis, **options, rngs=nnx.Rngs(0))
        )
    new.kernel = nnx.Param(jnp.asarray(kernel))
    new.bias = layer.bias
    return new


def to_flax_embed(layer: QuantisedEmbed, dtype: Any = None) -> nnx.Embed:
    """The `nnx.Embed` with the dequantised table of a layer."""
    table = layer.embedding.get_value().dequantise(dtype)
    new = nnx.eval_shape(
        lambda: nnx.Embed(
            *table.shape, dtype=layer.dtype, param_dtype=table.dtype, rngs=nnx.Rngs(0)
        )
    )
    new.embedding = nnx.Param(table)
    return new
