"""`quantise`, `dequantise` and `prepare` of arrays, parameter trees and nnx modules."""

import re
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
from flax import nnx
from flax.nnx.nn import dtypes
from jax import Array

from fdk_jax.format.quantisation import check_options, quantise_array
from fdk_jax.format.quantised_tensor import is_quantised
from fdk_jax.layers import rules
from fdk_jax.layers.interpreted import interpreted_class
from fdk_jax.layers.linear import QuantisedEmbed, QuantisedLinear, QuantisedWeight
from fdk_jax.layers.rules import SKIP, Rules
from fdk_jax.layers.surgery import (
    axes_of,
    from_flax,
    plain_linear,
    replace_layers,
    to_flax,
    to_flax_embed,
)
from fdk_jax.product.choice import check_backend, default_backend
from fdk_jax.product.dispatch import prepare_tensor
from fdk_jax.product.interpretation import dotted as dotted


def quantise(
    source: Any,
    bits: int = 4,
    *,
    group_size: int = 64,
    codebook: Any = "auto",
    scale: str = "auto",
    skip: str | None = SKIP,
    axes: str | Mapping[str, str | None] | None = None,
    dtype: Any = None,
    importance: Any = None,
    seed: int = 0,
) -> Any:
    """Turns the weights of linear layers into `QuantisedTensor`s in the interchange layout.

    In a tree, the float leaves called "kernel", "weight" or "w" whose orientation is plain from their name,
    shape and bias are linear layers'; not so embeddings, convolutions, normalisations, routers and states of
    optimisers. In an nnx model, `nnx.Linear`, `nnx.LinearGeneral` and `nnx.LoRALinear` (which keeps its
    adapter) become `QuantisedLinear`s; subclasses, layers with functions of their own and Einsum modules keep
    their class and their computation and run it on packed codes. A subclass that computes what its base does
    is replaced too if its body says so: `computes_as = nnx.Linear`. A weight that would grow stays as it is.
    All other leaves stay too; `fdk_jax.summary` tells what became of each, and why.

    Args:
        source: an array; a tree of parameters (dicts, also flat ones with names "a/b" or tuples as keys,
            FrozenDict, nnx.State, lists, tuples, dataclasses, `nn.Partitioned` boxes); or an `nnx.Module`,
            which comes back as a new module (shared layers stay shared; the original is untouched).
        bits: 1, 2, 4 or 8.
        group_size: weights along K that share a scale.
        codebook: "auto" (the best fixed levels for the bits), "uniform", "nf4", "fp4", "ternary", "normal",
            "laplace", "student", "kmeans" or "kmeans-quotients" (fitted to each weight), ascending values for
            all weights, or {regular expression on the dotted name: any of these} (all others are "auto"). See
            `quantise_array`; `fdk_jax.calibrate` does better.
        scale: "absmax", "absmean", "rms", "none" or "auto" (what belongs to codebook "auto"; for all others
            absmean up to 2 bits, else absmax).
        skip: regular expression, searched in the dotted name of the layer (without "params" and "kernel"); None
            skips nothing.
        axes: for an array, its orientation (see `QuantisedTensor`), "nk" if None. Otherwise {regular expression
            on the dotted name of a leaf: its orientation, or None to leave it out}, for leaves whose
            default is wrong or that have none (a table is "nk"); the first that matches counts.
            `fdk_jax.infer_axes` makes these rules from a model and its inputs.
        dtype: compute dtype of the weights; None keeps their own.
        importance: for "kmeans" of an array: non-negative weights of the same shape.
        seed: for "kmeans".

    Returns:
        The same structure with quantised weights.

    Raises:
        TypeError: `source` holds nothing that can be quantised, or has a wrong dtype.
        ValueError: an argument out of range; the message names the leaf, and the rule if there was one.
    """
    options: dict[str, Any] = dict(group_size=group_size, scale=scale, dtype=dtype, seed=seed)
    if rules.is_array(source):
        if not isinstance(axes, (str, type(None))):
            raise ValueError(f'{axes=} must be an orientation such as "kn" for an array')
        options |= dict(codebook=codebook, axes=axes or "nk", importance=importance)
        return quantise_array(source, bits, **options)
    if isinstance(axes, str) or importance is not None:
        raise ValueError("for a tree, axes maps names to orientations and importance must be None")
    check_options(bits, group_size, "auto" if isinstance(codebook, Mapping) else codebook, scale)
    rules.check_rules(axes or {})
    chosen = Rules(bits, group_size, skip, axes or {}, dtype)

    def one(name: str, leaf: Array, orientation: str) -> Any:
        try:
            levels = _codebook_of(codebook, rules.layer_of(name))
            return quantise_array(leaf, bits, codebook=levels, axes=orientation, **options)
        except (TypeError, ValueError) as error:
            rule = chosen.rule(name)
            by = f" (by the rule {rule[0]!r}: {rule[1]!r} of axes)" if rule else ""
            raise type(error)(f"{name}: {error}{by}") from error

    decisions: dict[str, str | None] = {}
    if isinstance(source, nnx.Module):
        result = _quantise_module(source, chosen, one, decisions)
        for name, leaf in named_leaves(nnx.state(source)).items():
            why = rules.unfit(leaf) or "in a container: which computation reads it is not known"
            decisions.setdefault(name, why)
    else:
        result = _quantise_tree(source, chosen, one, decisions)
    _check_something(source, decisions)
    return result


def _check_something(source: Any, decisions: dict[str, str | None]) -> None:
    """Raises TypeError if no decision is None, which stands for a quantised weight."""
    if any(reason is None for reason in decisions.values()):
        return
    seen = [f"{name or 'the source'} ({reason})" for name, reason in decisions.items()]
    shown = "; ".join(seen[:8]) + (f"; and {len(seen) - 8} more" if len(seen) > 8 else "")
    raise TypeError(
        f"nothing in this {type(source).__name__} can be quantised: {shown or 'it holds no arrays'}."
        " Say the orientation of a leaf with axes={regular expression on its name: e.g. 'kn'};"
        " fdk_jax.infer_axes(function, tree, *inputs) finds them all. A linen, haiku or keras module holds no"
        " weights: give its parameters"
    )


def _quantise_tree(
    tree: Any, chosen: Rules, one: Callable, decisions: dict[str, str | None]
) -> Any:
    leaves = named_leaves(tree)

    def convert(path: tuple, leaf: Any) -> Any:
        name = dotted(path)
        value = value_of(leaf)
        if is_quantised(value):
            decisions[name] = None
            return leaf
        orientation, reason = decide(
            name, value, chosen, leaves, classes_on(tree, path), _box_names(leaf)
        )
        decisions[name] = reason
        if orientation is None:
            return leaf
        new = one(name, value, orientation)
        return QuantisedWeight(new) if isinstance(leaf, nnx.Variable) else new

    return jax.tree_util.tree_map_with_path(convert, tree, is_leaf=is_leaf)


def decide(
    name: str,
    leaf: Any,
    chosen: Rules,
    leaves: Mapping[str, Any],
    classes: tuple[str, ...] = (),
    box: tuple[Any, ...] = (),
) -> tuple[str | None, str | None]:
    """(axes, None) of a leaf that is to be quantised, or (None, why it is not).

    Args:
        name: dotted name of the leaf.
        leaf: its value.
        chosen: the rules of the call.
        leaves: all leaves by name.
        classes: names of the classes that hold it, outermost first.
        box: names of its axes, if it is an `nn.Partitioned`.
    """
    rule = chosen.rule(name)
    if rule is not None:
        if rule[1] is None:
            return None, f"the rule {rule[0]!r}: None of axes"
        # A rule says "kernel" and means kernels: what has too few axes for it is left alone.
        reason = chosen.fits(name, leaf, rule[1])
        if reason is not None:
            reason += f" (the rule {rule[0]!r}: {rule[1]!r} of axes)"
        return (rule[1] if reason is None else None), reason
    reason = (
        rules.unfit(leaf, chosen.dtype)
        or rules.not_linear(name, classes, leaf.ndim)
        or chosen.skipped(rules.layer_of(name))
    )
    if reason is not None:
        return None, reason
    bias = leaves.get(".".join([*name.split(".")[:-1], "bias"]))
    orientation, reason = rules.orientation_of(name, leaf, bias)
    if orientation is not None and "layers" in box and (at := box.index("layers")) > 0:
        if leaf.ndim > 3:
            return None, f"its layers are axis {at} of {leaf.ndim}: say its orientation with axes="
        orientation = "kn"[:at] + "b" + "kn"[at:]
    if orientation is None:
        return None, reason
    reason = chosen.fits(name, leaf, orientation)
    return (orientation if reason is None else None), reason


def _quantise_module(
    module: nnx.Module, chosen: Rules, one: Callable, decisions: dict[str, str | None]
) -> nnx.Module:
    shared: dict[Any, QuantisedWeight] = {}

    def weight_of(name: str, variable: nnx.Variable, orientation: str) -> QuantisedWeight:
        # Layers that share a variable share the quantised one.
        key = (id(variable), orientation)
        if key not in shared:
            shared[key] = QuantisedWeight(one(name, variable.get_value(), orientation))
        return shared[key]

    def replace(layer_name: str, layer: nnx.Module) -> nnx.Module | None:
        if isinstance(layer, (QuantisedLinear, QuantisedEmbed)):
            decisions[layer_name] = None
            return layer
        chosen_axes = {}
        for attribute, orientation, reason in module_weights(layer_name, layer, chosen):
            name = f"{layer_name}.{attribute}" if layer_name else attribute
            decisions[name] = reason
            if orientation is not None:
                chosen_axes[attribute] = (name, orientation)
        if not chosen_axes:
            return None
        if type(layer) is nnx.Embed and chosen_axes["embedding"][1] == "nk" and _is_plain(layer):
            table = one(chosen_axes["embedding"][0], layer.embedding.get_value(), "nk")
            return QuantisedEmbed(table, dtype=layer.dtype)
        plain = plain_linear(layer)
        # Its class stays where a rule says other axes than those that it multiplies by.
        if plain is not None and _same_axes(chosen_axes["kernel"][1], axes_of(plain)["kernel"]):
            name, orientation = chosen_axes["kernel"]
            variable = plain.kernel
            return from_flax(layer, lambda *_: weight_of(name, variable, orientation))
        for attribute, (name, orientation) in chosen_axes.items():
            setattr(layer, attribute, weight_of(name, getattr(layer, attribute), orientation))
        layer.__class__ = interpreted_class(type(layer))
        return None

    return replace_layers(module, replace)


def _same_axes(found: str, known: str) -> bool:
    """Whether axes are those of a layer, perhaps of stacked ones."""
    return found.lstrip("b") == known.lstrip("b")


def _is_plain(layer: nnx.Embed) -> bool:
    return layer.promote_dtype is dtypes.promote_dtype


def module_weights(
    name: str, layer: nnx.Module, chosen: Rules
) -> list[tuple[str, str | None, str | None]]:
    """(attribute, axes, None) or (attribute, None, reason) of each weight that a module itself holds."""
    known = axes_of(layer)
    found = []
    for attribute, variable in vars(layer).items():
        if not isinstance(variable, nnx.Variable):
            continue
        value, full = variable.get_value(), f"{name}.{attribute}" if name else attribute
        if is_quantised(value):
            found.append((attribute, None, "quantised already"))
            continue
        rule = chosen.rule(full)
        orientation = known.get(attribute)
        if rule is not None:
            if rule[1] is None:
                found.append((attribute, None, f"the rule {rule[0]!r}: None of axes"))
                continue
            orientation, reason = rule[1], chosen.fits(full, value, rule[1])
        elif isinstance(variable, getattr(nnx, "OptState", ())):
            reason = "state of an optimiser"
        elif (unfit := rules.unfit(value, chosen.dtype)) is not None:
            reason = unfit
        elif isinstance(variable, nnx.LoRAParam):
            reason = "a low-rank adapter"
        elif orientation is None:
            kind = getattr(layer, "quantised_class", type(layer)).__name__
            reason = rules.not_linear(full, (kind,)) or (
                f"{kind} is no layer whose computation is known: name it in axes="
            )
        else:
            router = rules.not_linear(full)
            reason = router if router and "router" in router else chosen.skipped(name)
            reason = reason or chosen.fits(full, value, orientation)
        found.append((attribute, orientation if reason is None else None, reason))
    return found


def dequantise(source: Any, dtype: Any = None) -> Any:
    """The inverse map of `quantise`: float weights of the original shapes.

    Args:
        source: a `QuantisedTensor`, a tree that holds some, or an `nnx.Module` (whose QuantisedLinears
            become Linears again, in a new module).
        dtype: dtype of the weights; None for the compute dtype of each.

    Returns:
        An array, or the same structure with arrays; everything that is not quantised stays as it is.
    """
    if isinstance(source, nnx.Module):

        def back(_: str, layer: nnx.Module) -> nnx.Module | None:
            if isinstance(layer, QuantisedLinear):
                return to_flax(layer, dtype)
            if isinstance(layer, QuantisedEmbed):
                return to_flax_embed(layer, dtype)
            for name, variable in list(vars(layer).items()):
                if isinstance(variable, QuantisedWeight):
                    setattr(layer, name, nnx.Param(variable.get_value().dequantise(dtype)))
            if (cls := getattr(type(layer), "quantised_class", None)) is not None:
                layer.__class__ = cls
            return None

        return replace_layers(source, back)
    return _map(
        lambda _, leaf: leaf.dequantise(dtype) if is_quantised(leaf) else leaf,
        source,
        nnx.Param,
    )


def prepare(source: Any, backend: str | None = None) -> Any:
    """Puts quantised weights into the layout that a backend's kernels read. Do it once, before the loop.

    Args:
        source: a `QuantisedTensor`, a tree that holds some, or an `nnx.Module` (a new one is returned).
        backend: "pallas", "cpu" or "xla" (back to the interchange layout); None for the kernels of
            JAX's default platform.

    Returns:
        The same structure; the weights are exactly the same numbers.

    Raises:
        ValueError: an unknown backend.
    """
    backend = default_backend() if backend is None else check_backend(backend)
    if isinstance(source, nnx.Module):
        graph, state = nnx.split(source)
        return nnx.merge(graph, prepare(state, backend))
    return _map(
        lambda _, leaf: prepare_tensor(leaf, backend) if is_quantised(leaf) else leaf,
        source,
        QuantisedWeight,
    )


def is_leaf(x: Any) -> bool:
    """Whether a node of a tree is one weight: quantised, a Variable, or a box with names of axes."""
    return is_quantised(x) or isinstance(x, (nnx.Variable, nn.meta.AxisMetadata))


def with_value(leaf: Any, value: Any) -> Any:
    """A leaf (see `is_leaf`) that holds another value."""
    if isinstance(leaf, nnx.Variable):
        return leaf.replace(value)
    return leaf.replace_boxed(value) if isinstance(leaf, nn.meta.AxisMetadata) else value


def value_of(leaf: Any) -> Any:
    """What a leaf (see `is_leaf`) holds: an array or a `QuantisedTensor`."""
    if isinstance(leaf, nnx.Variable):
        return leaf.get_value()
    if is_quantised(leaf):
        return leaf
    return leaf.unbox(apply_constraint=False) if _has_names(leaf) else nn.meta.unbox(leaf)


def _has_names(leaf: Any) -> bool:
    return isinstance(leaf, nn.Partitioned)


def _box_names(leaf: Any) -> tuple[Any, ...]:
    """Names of the axes of a boxed leaf."""
    return tuple(leaf.names) if _has_names(leaf) else ()


def leaves_with_path(tree: Any) -> list[tuple[tuple, Any]]:
    """The leaves of a tree with their paths; see `is_leaf`."""
    return jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_leaf)[0]


def named_leaves(tree: Any) -> dict[str, Any]:
    """The values of the leaves of a tree by dotted name."""
    return {dotted(path): value_of(leaf) for path, leaf in leaves_with_path(tree)}


def classes_on(tree: Any, path: tuple) -> tuple[str, ...]:
    """Names of the classes that hold a leaf, outermost first, as far as its path can be followed."""
    names = []
    for key in path:
        names.append(type(tree).__name__)
        try:
            if hasattr(key, "name"):
                tree = getattr(tree, key.name)
            else:
                tree = tree[key.key if hasattr(key, "key") else key.idx]
        except (AttributeError, KeyError, IndexError, TypeError):
            break
    return tuple(names)


def _map(function: Callable[[str, Any], Any], tree: Any, variable: type) -> Any:
    """Maps leaves by name; a changed nnx Variable becomes one of class `variable`."""

    def one(path, leaf):
        if not isinstance(leaf, nnx.Variable):
            return function(dotted(path), leaf)
        value = leaf.get_value()
        changed = function(dotted(path), value)
        if changed is value:
            return leaf
        return variable(changed)

    return jax.tree_util.tree_map_with_path(one, tree, is_leaf=is_leaf)


def _codebook_of(codebook: Any, module: str) -> Any:
    if not isinstance(codebook, Mapping):
        return codebook
    for pattern, values in codebook.items():
        if re.search(pattern, module):
            return values
    return "auto"
