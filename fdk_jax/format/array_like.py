"""What an ordinary array does and a `QuantisedTensor` does too."""

import dataclasses
import sys
import warnings
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NoReturn

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from fdk_jax.format import packing

if TYPE_CHECKING:
    from fdk_jax.format.quantised_tensor import QuantisedTensor

_INNER = ("fdk_jax", "flax", "jax")
FUSED = (
    "fdk_jax.matmul(x, w), fdk_jax.einsum(equation, x, w) and functions inside fdk_jax.quantised_apply"
    " multiply by the packed codes; fdk_jax.dequantise(w) unpacks on purpose"
)


class UnfusedWarning(UserWarning):
    """A weight is unpacked as a whole where a fused product was within reach."""


def warn_unfused(text: str) -> None:
    """An `UnfusedWarning` at the caller's own line: the nearest frame outside of this package, JAX and Flax."""
    level, frame = 1, sys._getframe()
    while frame.f_back is not None and frame.f_globals["__name__"].split(".")[0] in _INNER:
        level, frame = level + 1, frame.f_back
    warnings.warn(text, UnfusedWarning, stacklevel=level)


class ArrayLike:
    """The array protocol of `QuantisedTensor`.

    Results are those of the dequantised weight. `w[i]` along a leading axis, `w[...]`, `w.T` and `w.astype`
    stay quantised; `w[ids]` of an [N, K] table unpacks the rows of `ids` alone; all else unpacks the whole
    weight, with an `UnfusedWarning` where JAX asked for it and not the caller.
    """

    @property
    def ndim(self: Any) -> int:
        """Number of axes in `shape`."""
        return len(self.shape)

    @property
    def T(self: Any) -> "QuantisedTensor":
        """A matrix with its axes swapped: the same arrays."""
        shape, axes = self.orientation
        if len(shape) != 2 or self.batch_shape:
            raise ValueError(f"{self} is no single matrix: {FUSED}, which can be transposed freely")
        return dataclasses.replace(self, shape=shape[::-1], axes=axes[::-1])

    def astype(self: Any, dtype: Any) -> "QuantisedTensor":
        """The same codes with scales in another float dtype, which is the dtype of the weight."""
        wanted = jax.dtypes.canonicalize_dtype(dtype)
        if wanted.name not in ("bfloat16", "float16", "float32"):
            raise TypeError(
                f"a QuantisedTensor is bfloat16, float16 or float32, not {wanted}: fdk_jax.dequantise(w)"
                " first"
            )
        if wanted == self.dtype:
            return self
        return dataclasses.replace(self, scales=self.scales.astype(wanted))

    def __array__(self: Any, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        if copy is False:
            raise ValueError(
                "a QuantisedTensor holds no float array to share: leave out copy=False"
            )
        return np.asarray(self.dequantise(), dtype)

    def __jax_array__(self: Any) -> Array:
        warn_unfused(f"{self} is unpacked for an ordinary operation: {FUSED}")
        return self.dequantise()

    if not TYPE_CHECKING:

        def __getattr__(self, name: str) -> NoReturn:
            remedy = f": {FUSED}" if hasattr(Array, name) and not name.startswith("_") else ""
            raise AttributeError(
                f"{type(self).__name__!r} object has no attribute {name!r}{remedy}"
            )

    def __len__(self: Any) -> int:
        return (*self.stack_shape, *self.orientation[0])[0]

    def __iter__(self: Any) -> Iterator[Any]:
        return (self[i] for i in range(len(self)))

    def __getitem__(self: Any, index: Any) -> Any:
        first = index[0] if isinstance(index, tuple) and len(index) == 1 else index
        if first is Ellipsis or (isinstance(first, (tuple, slice)) and first in ((), slice(None))):
            return self
        is_number = isinstance(first, (int, np.integer)) and not isinstance(first, bool)
        if is_number or _is_indices(first):
            letters = "b" * len(self.stack_shape) + self.orientation[1]
            if letters[0] == "b":
                return _take_matrix(self, first)
            if letters == "nk" and self.codebook.ndim == 1:
                rows = wide_indices(jnp.asarray(first))
                return take_rows(self, jnp.where(rows < 0, rows + self.out_features, rows))
        return self.dequantise()[index]


def take_rows(w: Any, rows: Array, *, fill: bool = False) -> Array:
    """Rows of an [N, K] weight with one codebook: [*rows.shape, K], unpacked after they were chosen.

    Args:
        w: the weight; of a kernel's layout the tiles that hold the rows are turned back.
        rows: integers, counted from 0.
        fill: rows out of range are NaN; otherwise the nearest row is taken.
    """
    flat = wide_indices(rows).reshape(-1)
    packed, scales = _packed_rows(w, jnp.clip(flat, 0, w.out_features - 1))
    if fill:
        inside = (flat >= 0) & (flat < w.out_features)
        scales = jnp.where(inside[:, None], scales, jnp.asarray(jnp.nan, scales.dtype))
    shape = (flat.size, w.in_features)
    part = dataclasses.replace(
        w, packed=packed, scales=scales, shape=shape, axes="nk", layout="interchange"
    )
    return part.dequantise().reshape(*rows.shape, w.in_features)


def _packed_rows(w: Any, rows: Array) -> tuple[Array, Array]:
    """(packed, scales) of rows [R] in the interchange layout."""
    tile = _tile_of_rows(w)
    if tile is None:  # the rows lie in no tiles of their own
        whole = w.to_layout("interchange")
        return jnp.take(whole.packed, rows, axis=0), jnp.take(whole.scales, rows, axis=0)
    spec = w.spec | dict(out_features=tile)
    structs = packing.layout_struct(w.layout, dtype=w.scales.dtype, **spec)

    def one(row: Array) -> tuple[Array, Array]:
        parts = (
            jax.lax.dynamic_slice_in_dim(array, row // tile * struct.shape[0], struct.shape[0])
            for array, struct in zip((w.packed, w.scales), structs, strict=True)
        )
        packed, scales = packing.convert(*parts, source=w.layout, target="interchange", **spec)
        return packed[row % tile], scales[row % tile]

    return jax.vmap(one)(rows)


def _tile_of_rows(w: Any) -> int | None:
    """The fewest rows whose prepared form is a slice of the prepared weight along its first axis."""
    for tile in (1, 8, 16, 32, 64, 128):
        spec = w.spec | dict(out_features=tile)
        structs = packing.layout_struct(w.layout, dtype=w.scales.dtype, **spec)
        if w.out_features % tile == 0 and all(
            array.shape == (w.out_features // tile * struct.shape[0], *struct.shape[1:])
            for array, struct in zip((w.packed, w.scales), structs, strict=True)
        ):
            return tile
    return None


def _take_matrix(w: Any, index: Any) -> Any:
    """W[index] along the first leading axis of the arrays; an array of indices gives as many leading axes."""
    shape, axes = w.orientation
    if not w.stack_shape:  # the axis is the first batch axis of `axes`: it is no longer named there
        at = axes.index("b")
        shape, axes = shape[:at] + shape[at + 1 :], axes[:at] + axes[at + 1 :]
    taken = jax.tree.map(lambda a: a[index], w)
    return dataclasses.replace(taken, shape=shape, axes=axes)


def wide_indices(indices: Array) -> Array:
    """Integers of 32 bits where they have 8 or 16, in which neither a number of rows nor a sum with it fits."""
    return indices.astype(jnp.int32) if indices.dtype.itemsize < 4 else indices


def _is_indices(index: Any) -> bool:
    return isinstance(index, (Array, np.ndarray)) and jnp.issubdtype(index.dtype, jnp.integer)
