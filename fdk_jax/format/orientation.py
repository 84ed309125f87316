"""A weight of any axes as a matrix [N, K], and back."""

import math

import numpy as np
from jax import Array


def check_axes(axes: str) -> None:
    """Raises ValueError unless `axes` names an orientation: "k", "n" and "b" letters, some "k" and some "n"."""
    if not isinstance(axes, str) or not {"k", "n"} <= set(axes) <= {"k", "n", "b"}:
        raise ValueError(
            f'axes={axes!r} must hold a "k" (contracted), "n" (output) or "b" (batch) for each axis, with at'
            ' least one "k" and one "n", e.g. "kn"'
        )


def to_matrix(weight: Array, axes: str) -> tuple[Array, tuple[int, ...], tuple[int, ...]]:
    """[..., *b, N, K] from [..., *shape], with the leading shape (batch axes last) and `shape`."""
    lead = weight.ndim - len(axes)
    shape = weight.shape[lead:]
    order = [lead + i for letter in "bnk" for i, a in enumerate(axes) if a == letter]
    sizes = {
        letter: [d for d, a in zip(shape, axes, strict=True) if a == letter] for letter in "bnk"
    }
    batch = (*weight.shape[:lead], *sizes["b"])
    matrix = weight.transpose(*range(lead), *order)
    return matrix.reshape(*batch, math.prod(sizes["n"]), math.prod(sizes["k"])), batch, shape


def from_matrix(matrix: Array, shape: tuple[int, ...], axes: str) -> Array:
    """The inverse of `to_matrix`: [..., *shape] from [..., *b, N, K]."""
    order = [i for letter in "bnk" for i, a in enumerate(axes) if a == letter]
    lead = matrix.ndim - 2 - axes.count("b")
    weight = matrix.reshape(*matrix.shape[:lead], *(shape[i] for i in order))
    return weight.transpose(*range(lead), *(lead + int(i) for i in np.argsort(order)))
