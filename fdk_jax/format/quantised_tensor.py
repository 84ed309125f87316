"""`QuantisedTensor`: low-bit weights as a pytree."""

from __future__ import annotations

import dataclasses
import functools
import math
import weakref
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.core import Tracer

from fdk_jax.format import codebooks, dequantisation, packing
from fdk_jax.format.array_like import ArrayLike
from fdk_jax.format.orientation import check_axes, from_matrix

if TYPE_CHECKING:
    from jaxtyping import Float, Float32, UInt

FLOAT_DTYPES = (jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float16), jnp.dtype(jnp.float32))
_DATA_FIELDS = ("packed", "scales", "codebook")
_META_FIELDS = ("bits", "group_size", "shape", "axes", "layout", "uniform")
# What a layout depends on: keyword arguments of `packing.convert`.
SPEC_FIELDS = ("bits", "group_size", "out_features", "in_features")
# Codebooks whose values were found right, by (id, uniform). Reading one waits for the device, and a jax.Array
# never changes, so each is read once.
_checked: weakref.WeakValueDictionary[tuple[int, bool], Array] = weakref.WeakValueDictionary()


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class QuantisedTensor(ArrayLike):
    """A weight matrix of `bits`-bit codes, one scale a group and a codebook.

        w[n, k] = scales[n, k // group_size] * codebook[codes[n, k]]

    with the codebook rounded to the dtype of the scales. N is the number of output features, K of
    input features, G the group size, E = 8 / bits. The arrays may have leading axes: those of stacked
    layers, then the batch axes ("b") of `axes`; `vmap` and `scan` take them off from the left. A batch axis
    that was taken off no longer counts, see `orientation`. Invariants, checked by `validate`:

    Attributes:
        packed: uint8 [..., N, ceil(K / E)] in the layout "interchange" (`fdk_jax.format.packing`); the
            kernels' layouts have shapes and dtypes of their own.
        scales: bfloat16, float16 or float32 [..., N, ceil(K / G)]; the last group may be short.
        codebook: float32 [..., 2**bits] ascending; or [..., C, 2**bits] where C divides N and row n
            uses codebook[n // (N // C)], so that projections joined along N keep their own.
        bits: 1, 2, 4 or 8.
        group_size: G >= 1.
        shape: shape of the original weight without leading axes, e.g. (K, N) for a Flax kernel.
        axes: one letter for each axis of `shape`: "k" contracted, "n" output, "b" batch (one matrix for
            each index, e.g. experts); "kn" is a Flax kernel, "nk" a PyTorch weight, "knn" and "kkn" are
            DenseGeneral kernels, "bkn" are experts [E, K, N].
        layout: "interchange", "planar" (Pallas kernels) or "tiled" (CPU library).
        uniform: the values of the codebook are evenly spaced, and 0 is one of them or lies halfway between
            two (at 1 bit: always); kernels may then compute them from the first and the last one, without
            rounding them.
    """

    packed: UInt[Array, " ..."]
    scales: Float[Array, " ..."]
    codebook: Float32[Array, "*C values"]
    bits: int
    group_size: int
    shape: tuple[int, ...]
    axes: str = "nk"
    layout: str = "interchange"
    uniform: bool = False

    @property
    def in_features(self) -> int:
        """K, the size of the contraction."""
        return math.prod(d for d, a in zip(self.shape, self.axes, strict=True) if a == "k")

    @property
    def out_features(self) -> int:
        """N, the number of outputs."""
        return math.prod(d for d, a in zip(self.shape, self.axes, strict=True) if a == "n")

    @property
    def num_groups(self) -> int:
        """Groups in a row, ceil(K / G)."""
        return -(-self.in_features // self.group_size)

    @property
    def spec(self) -> dict[str, Any]:
        """The arguments of `packing.convert`."""
        return {name: getattr(self, name) for name in SPEC_FIELDS}

    @property
    def batch_shape(self) -> tuple[int, ...]:
        """The leading axes, () for one matrix."""
        return tuple(self.packed.shape[: self.packed.ndim - len(self._struct()[0].shape)])

    @property
    def orientation(self) -> tuple[tuple[int, ...], str]:
        """Shape and axes of the weight as it is now: without batch axes that `vmap` or `scan` took off."""
        gone = max(0, self.axes.count("b") - len(self.batch_shape))
        batch = [i for i, a in enumerate(self.axes) if a == "b"][:gone]
        keep = [i for i in range(len(self.axes)) if i not in batch]
        return tuple(self.shape[i] for i in keep), "".join(self.axes[i] for i in keep)

    @property
    def stack_shape(self) -> tuple[int, ...]:
        """The leading axes that `axes` does not name: stacked layers."""
        return self.batch_shape[: max(0, len(self.batch_shape) - self.axes.count("b"))]

    @property
    def dtype(self) -> Any:
        """Compute dtype of the weight: the dtype of its scales."""
        return self.scales.dtype

    @property
    def nbytes(self) -> int:
        """Bytes that the three arrays hold."""
        arrays = (self.packed, self.scales, self.codebook)
        return sum(math.prod(a.shape) * a.dtype.itemsize for a in arrays)

    @property
    def bytes_per_weight(self) -> float:
        """Measured bytes a weight: close to bits / 8 + scale bytes / group_size."""
        return self.nbytes / self.size if self.size else 0.0

    @property
    def size(self) -> int:
        """Number of weights, stacked ones included."""
        return math.prod(self.batch_shape) * self.in_features * self.out_features

    def validate(self) -> None:
        """Checks every invariant of the class docstring.

        The values of a codebook that is a `jax.Array` are read once in its life, and not at all under jit.

        Raises:
            TypeError: an array has the wrong dtype.
            ValueError: shapes, static metadata or codebook values do not fit together.
        """
        _validate_static(self)
        if self.scales.dtype not in FLOAT_DTYPES:
            raise TypeError(f"scales must be bfloat16, float16 or float32, got {self.scales.dtype}")
        if self.codebook.dtype != jnp.float32:
            raise TypeError(
                f"codebook must be float32, got {self.codebook.dtype}; w.astype(dtype) casts a whole"
                " QuantisedTensor, jax.tree.map casts its parts"
            )
        packed, scales = self._struct()
        if self.packed.dtype != packed.dtype:
            raise TypeError(
                f"packed must be {packed.dtype}, got {self.packed.dtype}; jax.tree.map maps the codes too:"
                " dataclasses.replace(w, scales=...) changes the scales alone"
            )
        batch = self.packed.shape[: max(0, self.packed.ndim - len(packed.shape))]
        if self.packed.shape != batch + packed.shape:
            raise ValueError(
                f"{self.packed.shape=} does not end in {packed.shape}: {self._metadata()}"
            )
        if self.scales.shape != batch + scales.shape:
            raise ValueError(
                f"{self.scales.shape=} must be {batch + scales.shape}: {self._metadata()}"
            )
        tail = self.codebook.shape[len(batch) :]
        if (
            self.codebook.shape[: len(batch)] != batch
            or len(tail) not in (1, 2)
            or tail[-1] != 2**self.bits
        ):
            raise ValueError(
                f"{self.codebook.shape=} must be {batch} + (2**bits,) or {batch} + (C, 2**bits):"
                f" {self._metadata()}"
            )
        if len(tail) == 2 and (tail[0] == 0 or self.out_features % tail[0]):
            raise ValueError(f"{tail[0]} codebooks do not divide {self.out_features} output rows")
        expected = tuple(d for d, a in zip(*self.orientation, strict=True) if a == "b")
        if batch[len(batch) - len(expected) :] != expected:
            raise ValueError(
                f"the leading axes {batch} must end in the batch axes {expected} of {self._metadata()}"
            )
        _validate_values(self.codebook, self.uniform)

    def to_layout(self, layout: str) -> QuantisedTensor:
        """The same weight in another layout, a key of `packing.LAYOUTS`."""
        packed, scales = packing.convert(self.packed, self.scales, self.layout, layout, **self.spec)
        return dataclasses.replace(self, packed=packed, scales=scales, layout=layout)

    def dequantise(self, dtype: Any = None) -> Float[Array, " ..."]:
        """The weight as a float array of its original shape; see `fdk_jax.dequantise`."""
        w = self.to_layout("interchange")
        one = functools.partial(
            dequantisation.dequantise_matrix,
            bits=w.bits,
            group_size=w.group_size,
            in_features=w.in_features,
            dtype=w.dtype if dtype is None else jnp.dtype(dtype),
        )
        for _ in w.batch_shape:
            one = jax.vmap(one)
        return from_matrix(one(w.packed, w.scales, w.codebook), *w.orientation)

    def _struct(self) -> tuple[jax.ShapeDtypeStruct, jax.ShapeDtypeStruct]:
        return packing.layout_struct(self.layout, dtype=self.scales.dtype, **self.spec)

    def _metadata(self) -> str:
        return ", ".join(f"{f}={getattr(self, f)!r}" for f in _META_FIELDS)

    def __repr__(self) -> str:
        if not all(_is_shaped(a) for a in (self.packed, self.scales, self.codebook)):
            # jax and flax put placeholders of any kind into pytrees (axis numbers, None, text to print).
            return f"QuantisedTensor({self._metadata()})"
        shape, axes = self.orientation
        shown = "x".join(map(str, (*self.stack_shape, *shape)))
        before = self.size * self.dtype.itemsize
        return (
            f"QuantisedTensor({shown} {axes}, {self.bits} bits, group {self.group_size},"
            f" {self.dtype}, {self.layout}, {self.nbytes:,} bytes, {before / max(1, self.nbytes):.2f}x"
            f" smaller)"
        )


def _is_shaped(a: Any) -> bool:
    """Whether a child is an array, or stands for one as a `jax.ShapeDtypeStruct` does."""
    return isinstance(a, (Array, np.ndarray, jax.ShapeDtypeStruct))


def _validate_static(w: QuantisedTensor) -> None:
    packing.check_widths(w.bits, w.group_size)
    if not isinstance(w.uniform, bool):
        raise TypeError(f"uniform must be a bool, got {w.uniform!r}")
    if not all(type(d) is int and d >= 0 for d in w.shape):
        raise ValueError(f"shape must hold non-negative integers, got {w.shape}")
    check_axes(w.axes)
    if len(w.axes) != len(w.shape):
        raise ValueError(f"axes={w.axes!r} must have a letter for each axis of shape={w.shape}")
    if w.layout not in packing.LAYOUTS:
        raise ValueError(f"layout={w.layout!r} is not one of {tuple(packing.LAYOUTS)}")


def _validate_values(codebook: Array, uniform: bool) -> None:
    key = (id(codebook), uniform)
    if isinstance(codebook, Tracer) or _checked.get(key) is codebook:
        return
    values = np.asarray(codebook)
    if not np.isfinite(values).all() or (np.diff(values, axis=-1) < 0).any():
        raise ValueError(f"codebook must be finite and ascending, got {values}; sort it first")
    if uniform and not codebooks.is_uniform(values):
        raise ValueError(f"codebook {values} is not evenly spaced around 0; set uniform=False")
    if isinstance(codebook, Array):
        _checked[key] = codebook


def _flatten_with_keys(w: QuantisedTensor):
    # The key of `packed` carries the static metadata: a checkpointer that names arrays by their path
    # then fails on a tensor whose metadata changed, instead of restoring a silently wrong model.
    shape = "x".join(map(str, w.shape))
    kind = "uniform" if w.uniform else "codebook"
    name = f"packed_{w.bits}bit_g{w.group_size}_{shape}_{w.axes}_{w.layout}_{kind}"
    key = jax.tree_util.DictKey
    children = ((key(name), w.packed), (key("scales"), w.scales), (key("codebook"), w.codebook))
    return children, tuple(getattr(w, f) for f in _META_FIELDS)


def _flatten(w: QuantisedTensor):
    children = tuple(getattr(w, f) for f in _DATA_FIELDS)
    return children, tuple(getattr(w, f) for f in _META_FIELDS)


def _unflatten(meta, children) -> QuantisedTensor:
    return QuantisedTensor(*children, *meta)


jax.tree_util.register_pytree_with_keys(QuantisedTensor, _flatten_with_keys, _unflatten, _flatten)


def is_quantised(leaf: Any) -> bool:
    """Whether a pytree node is a `QuantisedTensor`; use as `is_leaf`."""
    return isinstance(leaf, QuantisedTensor)
