"""`quantised_apply`, and nnx modules of any class that run on quantised weights."""

import functools
import inspect
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
from flax import nnx

from fdk_jax.format.quantised_tensor import is_quantised
from fdk_jax.layers.linear import QuantisedLinear, QuantisedWeight
from fdk_jax.product.choice import ARITHMETIC, check_backend
from fdk_jax.product.interpretation import UNFUSED, Options, axes_in, interpreted


def quantised_apply(
    apply: Callable,
    *,
    backend: str | None = None,
    arithmetic: str = "exact",
    unfused: str = "warn",
) -> Callable:
    """Lets an unchanged function (linen, nnx, haiku, equinox, keras, JAX) run on quantised parameters.

        apply = fdk_jax.quantised_apply(model.apply)
        logits = apply({"params": fdk_jax.quantise(params)}, tokens)

    The function is traced, and what its program does with a quantised weight is done from the packed codes:
    a product that contracts the "k" axes becomes `fdk_jax.matmul`, a lookup unpacks single rows. Whatever else
    it does (its own arithmetic, adapters, activations, transformations) is kept. An operation that has no fused
    form gets the unpacked weight. Use it under `jax.jit`: each call outside of it traces anew.

    Args:
        apply: `model.apply`, `module.__call__` or any function of trees. Arguments that are not arrays are
            passed as they are.
        backend: see `fdk_jax.matmul`.
        arithmetic: see `fdk_jax.matmul`.
        unfused: what happens where a weight must be unpacked: "warn" (an `UnfusedWarning` with its name and
            the reason), "raise" (a ValueError) or "allow".

    Returns:
        A function of the same signature, whose arguments may hold `QuantisedTensor`s.
    """
    if backend is not None:
        check_backend(backend)
    if arithmetic not in ARITHMETIC:
        raise ValueError(f"{arithmetic=} is not one of {ARITHMETIC}")
    if unfused not in UNFUSED:
        raise ValueError(f"{unfused=} is not one of {UNFUSED}")
    options = Options(backend, arithmetic, unfused)
    of_trees = interpreted(apply, options)

    @functools.wraps(apply)
    def call(*args: Any, **kwargs: Any) -> Any:
        leaves, tree = jax.tree.flatten((args, kwargs), is_leaf=_is_module)
        modules = [leaf for leaf in leaves if _is_module(leaf)]
        if not modules:
            return of_trees(*args, **kwargs)
        others = [None if _is_module(leaf) else leaf for leaf in leaves]
        return _of_modules(apply, options, modules, others, tree, list(map(_is_module, leaves)))

    return call


def infer_axes(
    function: Callable, source: Any, *args: Any, tables: bool = False, **kwargs: Any
) -> dict[str, str]:
    """Finds the orientation of every weight that a function multiplies by. Runs nothing.

        axes = fdk_jax.infer_axes(model.apply, variables, tokens)
        small = fdk_jax.quantise(variables, axes=axes)

    Args:
        function: takes a tree of arrays, as `model.apply` does, or an nnx module.
        source: its first argument, in which weights are sought; arrays or `jax.ShapeDtypeStruct`s.
        *args: its other arguments.
        tables: also tables whose rows are looked up, as those of embeddings are.
        **kwargs: its keyword arguments.

    Returns:
        {regular expression that matches the dotted name of one leaf of `source`: its axes}, for the axes
        argument of `fdk_jax.quantise`. Leaves with a use that needs the unpacked weight are left out.
    """
    if not _is_module(source):
        boxed = any(map(_is_box, jax.tree.leaves(source, is_leaf=_is_box)))
        if not boxed:
            return axes_in(function, (source, *args), kwargs, tables)

        def of_boxes(values: Any, *args: Any, **kwargs: Any) -> Any:
            return function(nn.meta.replace_boxed(source, values), *args, **kwargs)

        return axes_in(of_boxes, (nn.meta.unbox(source), *args), kwargs, tables)
    graph, state = nnx.split(source)

    def of_values(values: Any, *args: Any, **kwargs: Any) -> Any:
        filled = jax.tree.map(lambda x: x, state)
        nnx.replace_by_pure_dict(filled, values)
        return function(nnx.merge(graph, filled), *args, **kwargs)

    return axes_in(of_values, (nnx.to_pure_dict(state), *args), kwargs, tables)


def _is_box(leaf: Any) -> bool:
    """Whether a leaf is an array with names of its axes, which are no part of its own name."""
    return isinstance(leaf, nn.meta.AxisMetadata) and not is_quantised(leaf)


def _is_module(leaf: Any) -> bool:
    return isinstance(leaf, nnx.Module)


def _of_modules(
    apply: Callable,
    options: Options,
    modules: list[nnx.Module],
    others: list[Any],
    tree: Any,
    is_module: list[bool],
) -> Any:
    """A call with nnx modules among its leaves, whose variables and attributes it may change."""
    graph, state = nnx.split(modules)
    graphs = []

    def pure(state: Any, others: list[Any]) -> Any:
        inner = nnx.merge(graph, state)
        it = iter(inner)
        leaves = [next(it) if m else o for m, o in zip(is_module, others, strict=True)]
        args, kwargs = jax.tree.unflatten(tree, leaves)
        restore = _as_params(inner)
        out = apply(*args, **kwargs)
        restore()
        after, changed = nnx.split(inner)
        graphs.append(after)
        return out, changed

    out, changed = interpreted(pure, options)(state, others)
    if graphs[-1] == graph:
        nnx.update(modules, changed)
    else:
        _take_over(modules, nnx.merge(graphs[-1], changed))
    return out


def _take_over(modules: Any, changed: Any) -> None:
    """Gives modules the variables and attributes of others, which were made of them."""
    nodes = dict(nnx.iter_graph(modules))
    for path, new in nnx.iter_graph(changed):
        old = nodes.get(path)
        if isinstance(old, nnx.Variable):
            old.set_value(new.get_value())
        elif isinstance(old, nnx.Module):
            for name in vars(old).keys() - vars(new).keys():
                delattr(old, name)
            for name, value in vars(new).items():
                if name not in vars(old) or not _is_node(value):
                    setattr(old, name, value)


def _is_node(value: Any) -> bool:
    return isinstance(value, (nnx.Variable, nnx.Pytree, list, dict, tuple))


def _as_params(modules: Any) -> Callable[[], None]:
    """Puts an `nnx.Param` in the place of each `QuantisedWeight`, as the code of the modules expects it.

    Returns:
        A function that puts the weights back.
    """
    params: dict[int, nnx.Param] = {}
    replaced = []
    for _, module in nnx.iter_modules(modules):
        for name, weight in list(vars(module).items()):
            if isinstance(weight, QuantisedWeight) and _reads_params(module):
                param = params.setdefault(id(weight), nnx.Param(weight.get_value()))
                replaced.append((module, name, weight))
                setattr(module, name, param)

    def restore() -> None:
        for module, name, weight in replaced:
            weight.set_value(getattr(module, name).get_value())
            setattr(module, name, weight)

    return restore


def _reads_params(module: nnx.Module) -> bool:
    """Whether weights must look like Flax's. QuantisedLinear and its like read theirs by themselves."""
    of_qwix = isinstance(module, QuantisedLinear) and hasattr(module, "qwix_path")
    return of_qwix or hasattr(type(module), "quantised_class")


def owns_quantised(module: nnx.Module) -> bool:
    """Whether a module has a quantised weight among its own attributes."""
    return any(
        is_quantised(value.get_value())
        for value in vars(module).values()
        if isinstance(value, nnx.Variable)
    )


def interpreted_class(cls: type) -> type:
    """A subclass of an nnx module class whose methods run on quantised weights; one for each class.

    Inside a traced call the weights are arrays, and the methods are those of `cls`.
    """
    if getattr(cls, "quantised_class", None) is not None:
        return cls
    for known in cls.__subclasses__():
        if vars(known).get("quantised_class") is cls:
            return known
    methods = {}
    for base in reversed(cls.__mro__[: cls.__mro__.index(nnx.Module)]):
        for name, value in vars(base).items():
            if inspect.isfunction(value) and (name == "__call__" or not name.startswith("_")):
                methods[name] = _method(value)
    doc = {"__doc__": cls.__doc__, "__module__": cls.__module__, "quantised_class": cls}
    return type(cls)(f"Packed{cls.__name__}", (cls,), {**methods, **doc, "__reduce__": _reduce})


def _method(function: Callable) -> Callable:
    run = quantised_apply(function)

    @functools.wraps(function)
    def method(self: nnx.Module, *args: Any, **kwargs: Any) -> Any:
        return (run if owns_quantised(self) else function)(self, *args, **kwargs)

    return method


def _reduce(self: nnx.Module) -> Any:
    """Pickles a module of a made class by the class that it was made from."""
    made: Any = type(self)
    return _restore, (made.quantised_class, dict(vars(self)))


def _restore(cls: type, state: dict[str, Any]) -> nnx.Module:
    made: Any = interpreted_class(cls)
    module = made.__new__(made)
    vars(module).update(state)
    return module
