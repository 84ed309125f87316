"""A packed weight on its way through a traced program; see `fdk_jax.product.interpretation`."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from fdk_jax.format.array_like import take_rows
from fdk_jax.format.quantised_tensor import FLOAT_DTYPES, QuantisedTensor
from fdk_jax.product.dispatch import matmul

Axes = tuple[int, ...]


class Unfused(Exception):
    """Why an operation cannot take a packed weight."""


@dataclasses.dataclass(frozen=True)
class Packed:
    """A weight as a program has it now: its axes in some order, in some dtype.

    Attributes:
        tensor: the packed weight; its axes are the stacked ones, then those of its orientation.
        order: the axes of `tensor` in the order in which the program has them.
        dtype: the dtype in which the program has it.
        name: what to call it in messages.
    """

    tensor: QuantisedTensor
    order: Axes
    dtype: Any
    name: str

    @classmethod
    def whole(cls, tensor: QuantisedTensor, name: str) -> "Packed":
        """A weight as the program first sees it."""
        rank = len(tensor.stack_shape) + len(tensor.orientation[0])
        return cls(tensor, tuple(range(rank)), tensor.dtype, name)

    @property
    def letters(self) -> str:
        """The letter of each axis of `tensor`; stacked layers are a batch."""
        return "b" * len(self.tensor.stack_shape) + self.tensor.orientation[1]

    @property
    def shape(self) -> Axes:
        """Shape as the program has it."""
        full = (*self.tensor.stack_shape, *self.tensor.orientation[0])
        return tuple(full[i] for i in self.order)

    def unpack(self) -> Array:
        """The float array that the program means."""
        return self.tensor.dequantise().transpose(self.order).astype(self.dtype)

    def value(self) -> Any:
        """What stands for it outside of the program: the packed weight itself if nothing was done to it."""
        untouched = self.order == tuple(sorted(self.order)) and self.dtype == self.tensor.dtype
        return self.tensor if untouched else self.unpack()

    def transpose(self, permutation: Axes) -> "Packed":
        """With its axes in another order."""
        return dataclasses.replace(self, order=tuple(self.order[i] for i in permutation))

    def cast(self, dtype: Any) -> "Packed":
        """In another float dtype."""
        if jnp.dtype(dtype) not in FLOAT_DTYPES:
            raise Unfused(f"it is cast to {jnp.dtype(dtype)}")
        return dataclasses.replace(self, dtype=jnp.dtype(dtype))

    def along(self, axis: int, function: Callable[[Array, int], Array]) -> "Packed":
        """Applies `function` to its arrays along a batch axis, which stays."""
        position = self._position(axis)
        arrays = jax.tree.map(lambda a: function(a, position), self.tensor)
        shape, axes = self.tensor.orientation
        at = self.order[axis] - len(self.tensor.stack_shape)
        if at >= 0:
            size = arrays.packed.shape[position]
            arrays = dataclasses.replace(
                arrays, shape=(*shape[:at], size, *shape[at + 1 :]), axes=axes
            )
        return dataclasses.replace(self, tensor=arrays)

    def drop(self, axis: int) -> "Packed":
        """Without a batch axis of size 1."""
        position = self._position(axis)
        arrays = jax.tree.map(lambda a: jnp.squeeze(a, position), self.tensor)
        return dataclasses.replace(
            self, tensor=self._unnamed(arrays, axis), order=self._order_without(axis)
        )

    def unstack(self, axis: int) -> tuple[QuantisedTensor, Callable[[QuantisedTensor], "Packed"]]:
        """A tensor whose first leading axis is a batch axis of this one, and the view of one slice of it."""
        position = self._position(axis)
        arrays = jax.tree.map(lambda a: jnp.moveaxis(a, position, 0), self.tensor)
        order = self._order_without(axis)
        tensor = self._unnamed(arrays, axis)
        return tensor, lambda one: dataclasses.replace(self, tensor=one, order=order)

    def rows(self, indices: Array, fill: bool) -> Array:
        """[*indices.shape, K] of an [N, K] table."""
        if self.letters != "nk" or self.tensor.codebook.ndim != 1 or self.order != (0, 1):
            raise Unfused(f"rows of a weight with axes {self.letters!r} are looked up")
        return take_rows(self.tensor, indices, fill=fill).astype(self.dtype)

    def dot(
        self,
        x: Array,
        contract: tuple[Axes, Axes],
        batch: tuple[Axes, Axes],
        *,
        weight_first: bool,
        out_dtype: Any,
        backend: str | None,
        arithmetic: str,
    ) -> Array:
        """`jax.lax.dot_general` of x and this weight (or of this weight and x), by `matmul`.

        Args:
            x: a float array.
            contract: axes of x and of the weight.
            batch: axes of x and of the weight.
            weight_first: the order of the operands, and so of the axes of the result.
            out_dtype: dtype of the result.
            backend: see `matmul`.
            arithmetic: see `matmul`.

        Raises:
            Unfused: the weight was not packed for this product.
        """
        letters, w = self.letters, self.tensor
        k_axes, b_axes, n_axes = (tuple(i for i, a in enumerate(letters) if a == c) for c in "kbn")
        contracted = [self.order[i] for i in contract[1]]
        shared = [self.order[i] for i in batch[1]]
        if sorted(contracted) != list(k_axes) or not set(shared) <= set(b_axes):
            used = "".join(
                "k" if i in contracted else "b" if i in shared else "n" for i in range(len(letters))
            )
            remedy = f"; axes={{{self.name!r}: {used!r}}} of fdk_jax.quantise makes it fit"
            raise Unfused(
                f"it is multiplied as {used!r} and was quantised as {letters!r}"
                + (remedy if self.name and {"k", "n"} <= set(used) else "")
            )
        if x.dtype not in FLOAT_DTYPES or out_dtype not in FLOAT_DTYPES:
            raise Unfused(f"it is multiplied by {x.dtype} to give {out_dtype}")
        # x: the batch axes that it shares, in the order of the weight's, then the free axes, then K.
        of_batch = dict(zip(shared, batch[0], strict=True))
        of_k = dict(zip(contracted, contract[0], strict=True))
        taken = {*batch[0], *contract[0]}
        free = [i for i in range(x.ndim) if i not in taken]
        in_x = [i for i in b_axes if i in of_batch]
        order = (*(of_batch[i] for i in in_x), *free, *(of_k[i] for i in k_axes))
        lead = tuple(x.shape[i] for i in order[: len(in_x) + len(free)])
        x = x.transpose(order).reshape(*lead, w.in_features)

        product = lambda x, w: matmul(  # noqa: E731
            x, w, out_dtype=out_dtype, backend=backend, arithmetic=arithmetic
        )
        for axis in reversed(b_axes):
            product = jax.vmap(product, in_axes=(0 if axis in of_batch else None, 0))
        y = product(x, w)
        full = (*w.stack_shape, *w.orientation[0])
        y = y.reshape(*y.shape[:-1], *(full[i] for i in n_axes))

        # The result: shared batch axes, then the free axes of the first operand, then of the second.
        labels = [("w", i) for i in b_axes] + [("x", i) for i in free] + [("w", i) for i in n_axes]
        own = [("w", i) for i in self.order if i not in contracted and i not in shared]
        others = [("x", i) for i in free]
        wanted = [("w", i) for i in shared] + (own + others if weight_first else others + own)
        return y.transpose([labels.index(label) for label in wanted])

    def _position(self, axis: int) -> int:
        """Which leading axis of the arrays an axis of the program is."""
        own = self.order[axis]
        if self.letters[own] != "b":
            raise Unfused(f"axis {own} of a weight with axes {self.letters!r} is taken apart")
        return self.letters[:own].count("b")

    def _unnamed(self, arrays: QuantisedTensor, axis: int) -> QuantisedTensor:
        """Arrays whose metadata do not name an axis of the program any more."""
        at = self.order[axis] - len(self.tensor.stack_shape)
        if at < 0:
            return arrays
        shape, axes = self.tensor.orientation
        return dataclasses.replace(
            arrays, shape=shape[:at] + shape[at + 1 :], axes=axes[:at] + axes[at + 1 :]
        )

    def _order_without(self, axis: int) -> Axes:
        gone = self.order[axis]
        return tuple(i - (i > gone) for i in self.order if i != gone)


@dataclasses.dataclass(frozen=True)
class Recorded:
    """A float weight on its way through a program, whose uses are noted: the twin of `Packed` that finds axes.

    Attributes:
        array: the weight as the program has it now.
        order: for each axis of `array` the axis of the whole weight that it is.
        name: of the weight.
        notes: what was found: by name, a set of letters for each axis of the whole weight, and other uses.
    """

    array: Array
    order: Axes
    name: str
    notes: "Notes"

    @property
    def shape(self) -> Axes:
        """Shape as the program has it."""
        return self.array.shape

    def unpack(self) -> Array:
        """The array, for any use."""
        return self.array

    def value(self) -> Array:
        """The array."""
        return self.array

    def transpose(self, permutation: Axes) -> "Recorded":
        """See `Packed.transpose`."""
        order = tuple(self.order[i] for i in permutation)
        return dataclasses.replace(self, array=self.array.transpose(permutation), order=order)

    def cast(self, dtype: Any) -> "Recorded":
        """See `Packed.cast`."""
        return dataclasses.replace(self, array=self.array.astype(dtype))

    def along(self, axis: int, function: Callable[[Array, int], Array]) -> "Recorded":
        """See `Packed.along`."""
        self.notes.letter(self.name, self.order[axis], "b")
        return dataclasses.replace(self, array=function(self.array, axis))

    def drop(self, axis: int) -> "Recorded":
        """See `Packed.drop`."""
        self.notes.letter(self.name, self.order[axis], "b")
        order = self.order[:axis] + self.order[axis + 1 :]
        return dataclasses.replace(self, array=jnp.squeeze(self.array, axis), order=order)

    def unstack(self, axis: int) -> tuple[Array, Callable[[Array], "Recorded"]]:
        """See `Packed.unstack`."""
        self.notes.letter(self.name, self.order[axis], "b")
        order = self.order[:axis] + self.order[axis + 1 :]
        return jnp.moveaxis(self.array, axis, 0), lambda one: dataclasses.replace(
            self, array=one, order=order
        )

    def rows(self, indices: Array, fill: bool) -> Array:
        """See `Packed.rows`."""
        self.notes.lookups.add(self.name)
        return jnp.take(self.array, indices, axis=0)

    def dot(self, x, contract, batch, *, weight_first: bool, out_dtype: Any, **_: Any) -> Array:
        """See `Packed.dot`."""
        for i, own in enumerate(self.order):
            used = "k" if i in contract[1] else "b" if i in batch[1] else "n"
            self.notes.letter(self.name, own, used)
        self.notes.products.add(self.name)
        dims = ((contract[0], contract[1]), (batch[0], batch[1]))
        if weight_first:
            dims = ((contract[1], contract[0]), (batch[1], batch[0]))
        operands = (self.array, x) if weight_first else (x, self.array)
        return jax.lax.dot_general(*operands, dims, preferred_element_type=out_dtype)


@dataclasses.dataclass
class Notes:
    """What a program does with its weights.

    Attributes:
        letters: for each weight, the letters found for each of its axes.
        products: weights that are multiplied.
        lookups: weights whose rows are looked up.
        others: for each weight, other operations that take it.
    """

    letters: dict[str, dict[int, set[str]]] = dataclasses.field(default_factory=dict)
    products: set[str] = dataclasses.field(default_factory=set)
    lookups: set[str] = dataclasses.field(default_factory=set)
    others: dict[str, set[str]] = dataclasses.field(default_factory=dict)

    def letter(self, name: str, axis: int, letter: str) -> None:
        """Notes a letter of an axis."""
        self.letters.setdefault(name, {}).setdefault(axis, set()).add(letter)

    def axes(self, name: str) -> str | None:
        """The axes of a weight, or None if it is not used as one matrix (or one for each batch index)."""
        found = self.letters.get(name, {})
        # An axis that is a batch for one use (a slice of it) and a batch for all is a batch.
        if any(len(letters) > 1 for letters in found.values()):
            return None
        axes = "".join(next(iter(found[i])) for i in sorted(found))
        return axes if {"k", "n"} <= set(axes) else None
