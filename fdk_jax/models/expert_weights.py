"""The stacked matrices of a mixture of experts, from the arrays of a checkpoint.

Glossary: E experts, N outputs, K inputs.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from fdk_jax.format.quantised_tensor import QuantisedTensor
from fdk_jax.models.experts import QuantisedStack, StackedLinear
from fdk_jax.models.names import Stack

HostArray = np.ndarray | QuantisedTensor


def read_stack(stack: Stack, take: Callable[[str], HostArray]) -> HostArray:
    """All matrices of a stack: float [E, N, K], or a quantised tensor of as many.

    Args:
        stack: Where they come from.
        take: Reads an array by its name.

    Raises:
        NotImplementedError: parts of one expert that are quantised with codebooks of their own.
    """
    if stack.array:
        whole = take(stack.array)
        if not isinstance(whole, QuantisedTensor):
            if not jnp.issubdtype(whole.dtype, jnp.floating) or whole.dtype.itemsize == 1:
                raise ValueError(f"{stack.array} is {whole.dtype} without scales")
            whole = np.asarray(whole).swapaxes(-1, -2)
        return _in_halves(whole) if stack.alternating else whole
    matrices = [[take(f"{part.name}.weight") for part in parts] for parts in stack.experts]
    quantised = [[p for p in parts if isinstance(p, QuantisedTensor)] for parts in matrices]
    if sum(map(len, quantised)) < sum(map(len, matrices)):
        return np.stack([np.concatenate([_float(p) for p in parts]) for parts in matrices])
    return _stacked(stack, quantised)


def stack_arrays(stack: Stack) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the float arrays that `read_stack` and `read_bias` take."""
    count, rows, k = stack.shape
    arrays: dict[str, tuple[int, ...]] = {
        f"{part.name}.weight": part.shape for parts in stack.experts for part in parts
    }
    if stack.array:
        arrays[stack.array] = (count, k, rows)
    if stack.bias:
        arrays[stack.bias] = (count, rows)
    return arrays


def read_bias(stack: Stack, take: Callable[[str], HostArray]) -> np.ndarray | None:
    """The biases [E, N] of a stack, if it has any."""
    if not stack.bias:
        return None
    bias = np.asarray(take(stack.bias))
    return np.concatenate([bias[:, ::2], bias[:, 1::2]], axis=1) if stack.alternating else bias


def set_stack(owner: nnx.Module, name: str, weight: Any, bias: Array | None) -> None:
    """Gives a mixture of experts its stacked layer `name`.

    Args:
        owner: The `MixtureOfExperts`.
        name: "gate_up" or "down".
        weight: Kernels [E, K, N], or a quantised tensor of as many matrices.
        bias: [E, N] or None.
    """
    if isinstance(weight, QuantisedTensor):
        setattr(owner, name, nnx.data(QuantisedStack(weight, bias)))
        return
    layer: StackedLinear = getattr(owner, name)
    layer.kernel = nnx.Param(weight)
    if bias is not None:
        layer.bias = nnx.Param(bias)


def _in_halves(rows: HostArray) -> HostArray:
    """Rows [E, N, ...] of gate and up that alternate, as all of gate and then all of up."""
    if isinstance(rows, QuantisedTensor):
        halves: Any = [_in_halves(np.asarray(array)) for array in (rows.packed, rows.scales)]
        return dataclasses.replace(rows, packed=halves[0], scales=halves[1])
    return np.concatenate([rows[:, ::2], rows[:, 1::2]], axis=1)


def _stacked(stack: Stack, matrices: Sequence[Sequence[QuantisedTensor]]) -> QuantisedTensor:
    parts = [part for row in matrices for part in row]
    first = parts[0]
    kinds = {(p.bits, p.group_size, np.dtype(p.scales.dtype)) for p in parts}
    codebooks = [[np.asarray(part.codebook) for part in row] for row in matrices]
    if len(kinds) > 1 or any(not np.array_equal(row[0], b) for row in codebooks for b in row):
        raise NotImplementedError(
            f"{stack.experts[0][0].name}: experts that are quantised in different ways"
        )
    arrays: Any = (
        np.stack([np.concatenate([part.packed for part in row]) for row in matrices]),
        np.stack([np.concatenate([part.scales for part in row]) for row in matrices]),
        np.stack([row[0] for row in codebooks]),
    )
    return QuantisedTensor(
        *arrays,
        bits=first.bits,
        group_size=first.group_size,
        shape=stack.shape[1:],
        uniform=all(part.uniform for part in parts),
    )


def _float(weight: HostArray) -> np.ndarray:
    if isinstance(weight, QuantisedTensor):
        return np.asarray(weight.dequantise(jnp.float32))
    return np.asarray(weight)
