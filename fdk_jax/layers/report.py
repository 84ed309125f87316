"""`summary`: what is quantised in a tree or module, what was kept, and why."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from flax import nnx

from fdk_jax.format.quantised_tensor import is_quantised
from fdk_jax.layers import trees
from fdk_jax.layers.rules import SKIP, Rules
from fdk_jax.layers.surgery import why_not


@dataclasses.dataclass(frozen=True)
class Summary:
    """What `quantise` made of a tree.

    Attributes:
        quantised: name of each quantised weight, with its `QuantisedTensor` repr.
        kept: name of each other leaf, with shape and dtype.
        reasons: why each kept leaf with two or more axes was kept.
        bytes_before: of the whole tree with its weights in their compute dtype.
        bytes_after: of the whole tree as it is.
    """

    quantised: dict[str, str]
    kept: dict[str, str]
    reasons: dict[str, str]
    bytes_before: int
    bytes_after: int

    def __str__(self) -> str:
        lines = [f"{name}: {text}" for name, text in self.quantised.items()]
        for name, text in self.kept.items():
            reason = f" ({self.reasons[name]})" if name in self.reasons else ""
            lines.append(f"{name}: kept, {text}{reason}")
        ratio = self.bytes_before / max(1, self.bytes_after)
        change = f"{ratio:.2f}x smaller" if ratio >= 1 else f"{1 / ratio:.2f}x larger"
        lines.append(
            f"{len(self.quantised)} quantised, {len(self.kept)} kept; {self.bytes_before:,} bytes"
            f" before, {self.bytes_after:,} after ({change})"
        )
        return "\n".join(lines)


def summary(
    source: Any,
    bits: int = 4,
    *,
    group_size: int = 64,
    skip: str | None = SKIP,
    axes: Mapping[str, str | None] | None = None,
    dtype: Any = None,
) -> Summary:
    """Lists what is quantised in a tree or module and what was kept and why, with the bytes before and after.

    Args:
        source: what `fdk_jax.quantise` returned, or what it will be given.
        bits: as in `quantise`: the reasons are those of a call with these arguments.
        group_size: as in `quantise`.
        skip: as in `quantise`.
        axes: as in `quantise`.
        dtype: as in `quantise`.
    """
    chosen = Rules(bits, group_size, skip, axes or {}, dtype)
    of_modules: dict[str, str] = {}
    tree = source
    if isinstance(source, nnx.Module):
        of_modules = _module_reasons(source, chosen)
        tree = nnx.state(source)
    leaves = trees.named_leaves(tree)
    quantised, kept, reasons, before, after = {}, {}, {}, 0, 0
    for path, _ in trees.leaves_with_path(tree):
        name = trees.dotted(path)
        value = leaves[name]
        if is_quantised(value):
            quantised[name] = repr(value)
            before += value.size * value.dtype.itemsize
            after += value.nbytes
        elif hasattr(value, "dtype"):
            kept[name] = f"{value.dtype}{list(value.shape)}"
            size = math.prod(value.shape) * getattr(value.dtype, "itemsize", 0)
            before, after = before + size, after + size
            if len(value.shape) > 1:
                reason = of_modules.get(name)
                if reason is None and not isinstance(source, nnx.Module):
                    classes = trees.classes_on(tree, path)
                    reason = trees.decide(name, value, chosen, leaves, classes)[1]
                reasons[name] = reason or "left out, or not quantised yet"
    return Summary(quantised, kept, reasons, before, after)


def _module_reasons(module: nnx.Module, chosen: Rules) -> dict[str, str]:
    """Why weights are not quantised, by the name that `nnx.state` gives them."""
    found = {}
    for path, layer in nnx.iter_modules(module):
        name = ".".join(map(str, path))
        for attribute, _, reason in trees.module_weights(name, layer, chosen):
            full = f"{name}.{attribute}" if name else attribute
            if reason is not None:
                found[full] = reason
            elif isinstance(layer, nnx.Linear | nnx.LinearGeneral) and (why := why_not(layer)):
                found[full] = f"not quantised yet; it keeps its class: {why}"
    return found
