"""`quantise`, `dequantise`, `prepare` and `summary` of arrays, parameter trees and nnx modules."""

import dataclasses
import math
import re
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax import Array

from fdk_jax.format.quantisation import quantise_array
from fdk_jax.format.quantised_tensor import FLOAT_DTYPES, is_quantised
from fdk_jax.layers.linear import QuantisedLinear, QuantisedWeight
from fdk_jax.layers.surgery import from_flax, replace_layers, to_flax
from fdk_jax.product import cpu_backend
from fdk_jax.product.dispatch import check_backend, prepare_tensor
from pallas_kernels import target

_KERNELS = ("kernel", "weight")
_NEVER = re.compile(
    r"(^|[._])(embed\w*|\w*embeddings?|wte|wpe|conv\w*|\w*norm\w*|ln\w*)([._]|$)", re.I
)


def quantise(
    source: Any,
    bits: int = 4,
    *,
    group_size: int = 64,
    codebook: Any = "uniform",
    scale: str = "auto",
    skip: str | None = r"^lm_head$",
    axes: str | Mapping[str, str] | None = None,
    dtype: Any = None,
    importance: Any = None,
    seed: int = 0,
) -> Any:
    """Turns the weights of linear layers into `QuantisedTensor`s in the interchange layout.

    In a tree, every float leaf called "kernel" or "weight" with two or more axes is a linear layer's,
    unless its name matches `skip` or says embedding, norm or convolution. All other leaves stay as they
    are; `fdk_jax.summary` of the result tells what became of each.

    Args:
        source: an array; a tree of parameters (dict, FrozenDict, nnx.State, lists, tuples); or an
            `nnx.Module`, which comes back as a new module with its Linears replaced (layers that were
            shared stay shared; the original is untouched).
        bits: 1, 2, 4 or 8.
        group_size: weights along K that share a scale.
        codebook: "uniform", "nf4", "fp4", "ternary", "normal", "laplace", "student", "kmeans" (fitted to
            each weight), ascending values for all weights, or {regular expression on the dotted name: any
            of these} (all others are uniform). See `quantise_array`; `fdk_jax.calibrate` does better.
        scale: "absmax", "absmean", "rms", "none" or "auto" (absmean up to 2 bits, else absmax).
        skip: regular expression, searched in the dotted name (without "params" and "kernel"); None skips
            nothing.
        axes: for an array, its orientation (see `QuantisedTensor`), "nk" if None. For a tree,
            {regular expression: orientation} for leaves whose default is wrong: a "kernel" is "kn", with
            stacked layers in front; below attention's query, key and value "knn", below its out "kkn";
            a "weight" is "nk".
        dtype: compute dtype of the weights; None keeps their own.
        importance: for "kmeans" of an array: non-negative weights of the same shape.
        seed: for "kmeans".

    Returns:
        The same structure with quantised weights.

    Raises:
        TypeError: `source` holds nothing that can be quantised, or has a wrong dtype.
        ValueError: an argument out of range; the message names the leaf.
    """
    options: dict[str, Any] = dict(group_size=group_size, scale=scale, dtype=dtype, seed=seed)
    if isinstance(source, nnx.Module):
        return _quantise_module(source, bits, codebook, skip, options)
    if _is_array(source):
        if not isinstance(axes, (str, type(None))):
            raise ValueError(f'{axes=} must be an orientation such as "kn" for an array')
        options |= dict(codebook=codebook, axes=axes or "nk", importance=importance)
        return quantise_array(source, bits, **options)
    if isinstance(axes, str) or importance is not None:
        raise ValueError("for a tree, axes maps names to orientations and importance must be None")

    def convert(name: str, leaf: Any) -> Any:
        orientation = _orientation(name, leaf, axes or {})
        module = _module_name(name)
        if orientation is None or _skipped(module, skip):
            return leaf
        return _named(
            name,
            lambda: quantise_array(
                leaf, bits, codebook=_codebook_of(codebook, module), axes=orientation, **options
            ),
        )

    return _map(convert, source, QuantisedWeight)


def dequantise(source: Any, dtype: Any = None) -> Any:
    """The inverse map of `quantise`: float weights of the original shapes.

    Args:
        source: a `QuantisedTensor`, a tree that holds some, or an `nnx.Module` (whose QuantisedLinears
            become Linears again, in a new module).
        dtype: dtype of the weights; None for the compute dtype of each.
    """
    if isinstance(source, nnx.Module):

        def back(_, layer):
            return to_flax(layer, dtype) if isinstance(layer, QuantisedLinear) else None

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


def default_backend() -> str:
    """The backend whose kernels run on JAX's default platform: "pallas", "cpu" or "xla"."""
    platform = jax.default_backend()
    if platform in ("gpu", "cuda"):
        return "pallas" if target.current().has_kernels else "xla"
    return "cpu" if platform == "cpu" and cpu_backend.unavailable_reason() is None else "xla"


@dataclasses.dataclass(frozen=True)
class Summary:
    """What `quantise` made of a tree.

    Attributes:
        quantised: name of each quantised weight, with its `QuantisedTensor` repr.
        kept: name of each other leaf, with shape and dtype.
        bytes_before: of the whole tree with its weights in their compute dtype.
        bytes_after: of the whole tree as it is.
    """

    quantised: dict[str, str]
    kept: dict[str, str]
    bytes_before: int
    bytes_after: int

    def __str__(self) -> str:
        lines = [f"{name}: {text}" for name, text in self.quantised.items()]
        lines += [f"{name}: kept, {text}" for name, text in self.kept.items()]
        ratio = self.bytes_before / max(1, self.bytes_after)
        lines.append(
            f"{len(self.quantised)} quantised, {len(self.kept)} kept; {self.bytes_before:,} bytes"
            f" before, {self.bytes_after:,} after ({ratio:.2f}x smaller)"
        )
        return "\n".join(lines)


def summary(source: Any) -> Summary:
    """Lists what is quantised in a tree or module and what was kept, with the bytes before and after."""
    if isinstance(source, nnx.Module):
        source = nnx.state(source)
    quantised, kept, before, after = {}, {}, 0, 0
    for path, leaf in _leaves(source):
        name, value = _dotted(path), leaf.get_value() if isinstance(leaf, nnx.Variable) else leaf
        if is_quantised(value):
            quantised[name] = repr(value)
            count = math.prod(value.batch_shape) * math.prod(value.shape)
            before += count * value.dtype.itemsize
            after += value.nbytes
        elif hasattr(value, "dtype"):
            kept[name] = f"{value.dtype}{list(value.shape)}"
            size = math.prod(value.shape) * getattr(value.dtype, "itemsize", 0)
            before, after = before + size, after + size
    return Summary(quantised, kept, before, after)


def _is_array(x: Any) -> bool:
    return isinstance(x, (jax.Array, np.ndarray))


def _is_leaf(x: Any) -> bool:
    return is_quantised(x) or isinstance(x, nnx.Variable)


def _leaves(tree: Any):
    return jax.tree_util.tree_flatten_with_path(tree, is_leaf=_is_leaf)[0]


def _dotted(path: tuple) -> str:
    keys = [getattr(k, "key", getattr(k, "name", getattr(k, "idx", k))) for k in path]
    return ".".join(map(str, keys))


def _module_name(name: str) -> str:
    """The layer that a leaf belongs to: "params.block.q_proj.kernel" is of "block.q_proj"."""
    parts = name.split(".")
    return ".".join(parts[parts[0] == "params" : -1])


def _named(name: str, action: Callable[[], Any]) -> Any:
    try:
        return action()
    except (TypeError, ValueError) as error:
        raise type(error)(f"{name}: {error}") from error


def _map(function: Callable[[str, Any], Any], tree: Any, variable: type) -> Any:
    """Maps leaves by name; a changed nnx Variable becomes one of class `variable`."""

    def one(path, leaf):
        if not isinstance(leaf, nnx.Variable):
            return function(_dotted(path), leaf)
        value = leaf.get_value()
        changed = function(_dotted(path), value)
        if changed is value:
            return leaf
        return variable(changed)

    return jax.tree_util.tree_map_with_path(one, tree, is_leaf=_is_leaf)


def _skipped(module: str, skip: str | None) -> bool:
    return skip is not None and re.search(skip, module) is not None


def _codebook_of(codebook: Any, module: str) -> Any:
    if not isinstance(codebook, Mapping):
        return codebook
    for pattern, values in codebook.items():
        if re.search(pattern, module):
            return values
    return "uniform"


def _orientation(name: str, leaf: Any, axes: Mapping[str, str]) -> str | None:
    """The `axes` of a leaf, or None where it is no linear layer's weight."""
    if not _is_array(leaf) or leaf.ndim < 2 or leaf.dtype not in FLOAT_DTYPES:
        return None
    for pattern, orientation in axes.items():
        if re.search(pattern, name):
            return orientation
    parts = name.split(".")
    if parts[-1] not in _KERNELS or _NEVER.search(_module_name(name)):
        return None
    if parts[-1] == "weight":
        return "nk"
    layer = parts[-2] if len(parts) > 1 else ""
    if leaf.ndim >= 3 and layer in ("query", "key", "value"):
        return "knn"
    if leaf.ndim >= 3 and layer == "out":
        return "kkn"
    return "kn" if leaf.ndim <= 3 else None


def _quantise_module(module, bits, codebook, skip, options) -> nnx.Module:
    def replace(name: str, layer: nnx.Module) -> nnx.Module | None:
        if _skipped(name, skip):
            return None

        def one(kernel: Array, axes: str):
            return quantise_array(
                kernel, bits, codebook=_codebook_of(codebook, name), axes=axes, **options
            )

        return _named(name, lambda: from_flax(layer, one))

    return replace_layers(module, replace)
