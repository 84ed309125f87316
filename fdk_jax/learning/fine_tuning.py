"""The parts of a quantised model that gradients can change: scales, codebooks, adapters; the codes stay."""

import dataclasses
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from fdk_jax.format.quantised_tensor import is_quantised
from fdk_jax.layers import trees
from fdk_jax.layers.rules import is_array


def trainable(
    source: Any, select: str = r"\.(scales|codebook)$"
) -> tuple[dict[str, Array], Callable[[Mapping[str, Array]], Any]]:
    """Takes arrays out of a quantised model, for `jax.grad` and optax, which cannot take integer codes.

        trained, whole = fdk_jax.trainable(model, r"lora|scales")
        state = optimiser.init(trained)
        grads = jax.grad(lambda trained: loss(whole(trained), batch))(trained)

    Args:
        source: an nnx model or a tree of parameters with `QuantisedTensor`s.
        select: regular expression, searched in the dotted name of each float array. The scales and the codebook
            of a weight "up.kernel" are "up.kernel.scales" and "up.kernel.codebook".

    Returns:
        ({name: array}, function). Given arrays of these names the function returns `source` with them in their
        places (a new model or tree); `source` stays as it is. A trained codebook is not `uniform`; outside of
        jit its values must still ascend, so take small steps.

    Raises:
        ValueError: no float array has such a name.
    """
    graph, tree = nnx.split(source) if isinstance(source, nnx.Module) else (None, source)
    names = {
        name: array
        for path, leaf in trees.leaves_with_path(tree)
        for name, array in _parts(trees.dotted(path), trees.value_of(leaf))
    }
    found = {name: array for name, array in names.items() if re.search(select, name)}
    if not found:
        raise ValueError(f"{select=} finds none of {sorted(names)[:8]} and {len(names)} in all")

    def put(arrays: Mapping[str, Array], path: tuple, leaf: Any) -> Any:
        name, old = trees.dotted(path), trees.value_of(leaf)
        own = {part: arrays[part] for part, _ in _parts(name, old) if part in found}
        if not own:
            return leaf
        if is_quantised(old):
            changes: dict[str, Any] = {part.rpartition(".")[2]: a for part, a in own.items()}
            new = dataclasses.replace(
                old, **changes, uniform=old.uniform and "codebook" not in changes
            )
        else:
            new = own[name]
        return trees.with_value(leaf, new)

    def whole(arrays: Mapping[str, Array]) -> Any:
        filled = jax.tree_util.tree_map_with_path(
            lambda path, leaf: put(arrays, path, leaf), tree, is_leaf=trees.is_leaf
        )
        return filled if graph is None else nnx.merge(graph, filled)

    return found, whole


def _parts(name: str, value: Any) -> Iterator[tuple[str, Array]]:
    """The float arrays of a leaf with their names."""
    if is_quantised(value):
        yield f"{name}.scales", value.scales
        yield f"{name}.codebook", value.codebook
    elif is_array(value) and jnp.issubdtype(value.dtype, jnp.floating):
        yield name, value
