"""A weight of any axes as a matrix [N, K], and back."""

import math

import numpy as np
from jax import Array


def to_matrix(weight: Array, axes: str) -> tuple[Array, tuple[int, ...], tuple[int, ...]]:
    """[..., N, K] from [..., *shape], with the leading shape and `shape`."""
    lead = weight.ndim - len(axes)
    batch, shape = weight.shape[:lead], weight.shape[lead:]
    order = [lead + i for i, a in enumerate(axes) if a == "n"]
    order += [lead + i for i, a in enumerate(axes) if a == "k"]
    n = math.prod(d for d, a in zip(shape, axes, strict=True) if a == "n")
    k = math.prod(d for d, a in zip(shape, axes, strict=True) if a == "k")
    return weight.transpose(*range(lead), *order).reshape(*batch, n, k), batch, shape


def from_matrix(matrix: Array, shape: tuple[int, ...], axes: str) -> Array:
    """The inverse of `to_matrix`: [..., *shape] from [..., N, K]."""
    batch = matrix.shape[:-2]
    order = [i for i, a in enumerate(axes) if a == "n"] + [
        i for i, a in enumerate(axes) if a == "k"
    ]
    weight = matrix.reshape(*batch, *(shape[i] for i in order))
    lead = len(batch)
    return weight.transpose(*range(lead), *(lead + int(i) for i in np.argsort(order)))
