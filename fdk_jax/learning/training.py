"""Quantisation-aware training: float32 master weights that the forward pass sees quantised.

    model = fdk_jax.training.quantisation_aware(model, bits=1, codebook="kmeans")
    optimizer = nnx.Optimizer(model, optax.adamw(1e-3), wrt=nnx.Param)
    train_step = fdk_jax.training.make_train_step(loss, refresh_every=50)
    for batch in batches:
        train_step(model, optimizer, batch)
    model = fdk_jax.training.export(model)

Gradients pass straight through the rounding (Bengio et al., arXiv 1308.3432). The exported model multiplies by
exactly the weights that the last step saw.
"""

import functools
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from fdk_jax.format import codebooks
from fdk_jax.format.dequantisation import lookup, round_to
from fdk_jax.format.orientation import from_matrix, to_matrix
from fdk_jax.format.quantisation import (
    as_matrix,
    check_options,
    nearest_codes,
    quantise_array,
    resolve_auto,
    resolve_codebook,
    scaled,
)
from fdk_jax.format.quantised_tensor import QuantisedTensor
from fdk_jax.layers.linear import QuantisedEmbed, QuantisedLinear
from fdk_jax.layers.rules import SKIP
from fdk_jax.layers.surgery import replace_layers
from fdk_jax.learning.rounding import spread
from fdk_jax.learning.statistics import linear_layers
from fdk_jax.product.reference import dot

_REFRESH_STEPS = 4


def fake_quantise(
    weight: Array,
    bits: int = 4,
    *,
    group_size: int = 64,
    codebook: Any = "auto",
    scale: str = "auto",
    axes: str = "nk",
    dtype: Any = None,
) -> Array:
    """What a weight is after quantisation; its gradient is that of the identity.

    Equal, bit for bit, to `quantise_array(...)` with the same arguments, dequantised to the weight's dtype.

    Args:
        weight: float [..., *shape] with one axis of `shape` for each letter of `axes`.
        bits: 1, 2, 4 or 8.
        group_size: weights along K that share a scale.
        codebook: a name other than "kmeans", or float32 [2**bits] values, which may be traced.
        scale: see `fdk_jax.quantise`.
        axes: orientation, see `QuantisedTensor`.
        dtype: compute dtype of the quantised weight; None for the weight's own.

    Returns:
        Array like `weight`.
    """
    codebook, kind = resolve_auto(codebook, scale, bits)
    if isinstance(codebook, jax.Array):
        if codebook.shape[-1] != 2**bits:
            raise ValueError(f"{codebook.shape=} must end in {2**bits} for {bits=}")
        check_options(bits, group_size, "uniform", scale)
        levels = codebook.astype(jnp.float32)
    else:
        check_options(bits, group_size, codebook, scale)
        if isinstance(codebook, str) and codebook == "kmeans":
            raise ValueError('codebook="kmeans" is fitted outside of a step: give its values')
        levels = jnp.asarray(resolve_codebook(codebook, bits, kind, group_size))
    # The rounding has no gradient of its own: nothing below is differentiated.
    matrix, _, shape = as_matrix(jax.lax.stop_gradient(weight), axes, dtype)
    quotients, scales = scaled(matrix, group_size, kind)
    codes = nearest_codes(quotients, levels, matrix.dtype)
    values = lookup(codes, round_to(levels, matrix.dtype))
    values = values * spread(scales, group_size, matrix.shape[-1])
    quantised = from_matrix(values.astype(weight.dtype), shape, axes)
    return jax.lax.stop_gradient(quantised) + (weight - jax.lax.stop_gradient(weight))


class Codebook(nnx.Variable):
    """The levels of a layer in training; not an `nnx.Param`: it is refreshed, not learned by gradients."""


class _InTraining(nnx.Module):
    """A master weight in quantisation-aware training, with what its quantisation needs.

    Attributes:
        kernel: float32 master weight in the shape of the Flax layer's.
        codebook: float32 [..., 2**bits].
        active: bool; False multiplies by the master weight as it is.
    """

    def __init__(
        self,
        kernel: Array,
        axes: str,
        *,
        bits: int,
        group_size: int,
        codebook: Any,
        scale: str,
        dtype: Any,
        seed: int,
    ):
        check_options(bits, group_size, codebook, scale)
        self.bits, self.group_size, self.axes = bits, group_size, axes
        codebook, self.scale = resolve_auto(codebook, scale, bits)
        self.weight_dtype = jnp.dtype(kernel.dtype if dtype is None else dtype)
        self.fitted = isinstance(codebook, str) and codebook == "kmeans"
        self.kernel = nnx.Param(kernel.astype(jnp.float32))
        lead = kernel.shape[: kernel.ndim - len(axes)]
        self.codebook = Codebook(self._initial_codebook(codebook, lead, seed))
        self.active = nnx.Variable(jnp.ones(lead, bool))

    def _initial_codebook(self, codebook: Any, lead: tuple[int, ...], seed: int) -> Array:
        if not self.fitted:
            values = resolve_codebook(codebook, self.bits, self.scale, self.group_size)
            return jnp.broadcast_to(jnp.asarray(values), (*lead, *values.shape))
        out = np.zeros((*lead, 2**self.bits), np.float32)
        for index in np.ndindex(*lead):
            quotients, importance = self._sample(self.kernel.get_value()[index])
            out[index] = codebooks.fit(quotients, 2**self.bits, importance=importance, seed=seed)
        return jnp.asarray(out)

    def _sample(self, kernel: Array) -> tuple[Array, Array]:
        """Quotients [N, K] and the squares of their scales: together, the error of the weights."""
        matrix = as_matrix(kernel, self.axes, self.weight_dtype)[0]
        quotients, scales = scaled(matrix, self.group_size, self.scale)
        return quotients, jnp.square(spread(scales, self.group_size, matrix.shape[-1]))

    def refresh(self) -> None:
        """Moves a fitted codebook to the weights as they are now, starting from where it is."""
        if not self.fitted:
            return

        def one(kernel: Array, levels: Array) -> Array:
            quotients, importance = self._sample(kernel)
            return codebooks.refine(quotients, levels, importance=importance, steps=_REFRESH_STEPS)

        levels = self.codebook.get_value()
        for _ in levels.shape[:-1]:
            one = jax.vmap(one)
        self.codebook.set_value(one(self.kernel.get_value(), levels))

    def weight(self) -> Array:
        """The weight that the layer multiplies by, in float32 and the shape of the kernel."""
        kernel = self.kernel.get_value()
        quantised = fake_quantise(
            kernel,
            self.bits,
            group_size=self.group_size,
            codebook=self.codebook.get_value(),
            scale=self.scale,
            axes=self.axes,
            dtype=self.weight_dtype,
        )
        return jnp.where(self.active.get_value(), quantised, kernel)

    def quantised(self) -> QuantisedTensor:
        """The packed weight, as the layer sees it now."""
        kernel, levels = self.kernel.get_value(), np.asarray(self.codebook.get_value())
        lead = kernel.shape[: kernel.ndim - len(self.axes)]
        options: dict[str, Any] = dict(
            group_size=self.group_size, scale=self.scale, axes=self.axes, dtype=self.weight_dtype
        )
        parts = [
            quantise_array(kernel[index], self.bits, codebook=levels[index], **options)
            for index in np.ndindex(*lead)
        ]
        return jax.tree.map(lambda *a: jnp.stack(a).reshape(*lead, *a[0].shape), *parts)


class FakeQuantisedLinear(_InTraining):
    """An `nnx.Linear` or `nnx.LinearGeneral` in quantisation-aware training.

    Attributes:
        kernel: float32 master weight in the shape of the Flax layer.
        bias: the layer's bias, or None.
        codebook: float32 [..., 2**bits].
        active: bool; False multiplies by the master weight as it is.
    """

    def __init__(self, layer: Any, axes: str, **options: Any):
        super().__init__(layer.kernel.get_value(), axes, **options)
        self.dtype = layer.dtype
        axis = getattr(layer, "axis", None)
        self.axis = axis if axis is None or isinstance(axis, int) else tuple(axis)
        self.bias = layer.bias

    def __call__(self, inputs: Array, out_sharding: Any = None) -> Array:
        """Returns inputs times the fake-quantised kernel plus bias."""
        if out_sharding is not None:
            raise NotImplementedError("FakeQuantisedLinear follows its weight: leave out_sharding")
        weight = to_matrix(self.weight(), self.axes)[0]
        shape = self.kernel.get_value().shape
        k_shape = tuple(d for d, a in zip(shape, self.axes, strict=True) if a == "k")
        n_shape = tuple(d for d, a in zip(shape, self.axes, strict=True) if a == "n")
        dtype = self.dtype or jnp.promote_types(inputs.dtype, self.weight_dtype)
        x = inputs.astype(dtype)
        if self.axis is not None:
            axes = [self.axis] if isinstance(self.axis, int) else list(self.axis)
            x = jnp.moveaxis(x, axes, range(-len(axes), 0))
        lead = x.shape[: x.ndim - len(k_shape)]
        if x.shape[len(lead) :] != k_shape:
            raise ValueError(f"the contracted axes of {inputs.shape=} must be {k_shape}")
        y = _product(x.reshape(-1, weight.shape[1]), weight.astype(dtype))
        if self.bias is not None:
            y += self.bias.get_value().astype(jnp.float32).reshape(1, -1)
        return y.astype(dtype).reshape(*lead, *n_shape)


class FakeQuantisedEmbed(_InTraining):
    """An `nnx.Embed` in quantisation-aware training; `kernel` is its table [rows, features]."""

    def __init__(self, layer: nnx.Embed, **options: Any):
        super().__init__(layer.embedding.get_value(), "nk", **options)
        self.dtype = layer.dtype

    def __call__(self, inputs: Array) -> Array:
        """Rows of the fake-quantised table: [..., features] for integers [...]."""
        # Rows are rounded after they are taken: the gradients of a frequent one add up in float32.
        return jnp.take(self.weight(), inputs, axis=0).astype(self.dtype or self.weight_dtype)

    def attend(self, query: Array) -> Array:
        """Query [..., features] times every row: [..., rows], as a tied final projection does."""
        weight = self.weight()
        dtype = self.dtype or jnp.promote_types(query.dtype, self.weight_dtype)
        x = query.astype(dtype).reshape(-1, weight.shape[1])
        y = _product(x, weight.astype(dtype)).astype(dtype)
        return y.reshape(*query.shape[:-1], weight.shape[0])


@jax.custom_jvp
def _product(x: Array, weight: Array) -> Array:
    """X [M, K] times the transpose of a weight [N, K]: float32 [M, N].

    The products of its gradients are of the compute dtype, as those of Flax's layers are: the float32 that
    the result is held in would make them several times slower on a GPU.
    """
    return dot(x, weight, contract=(1, 1))


@_product.defjvp
def _product_jvp(primals: tuple, tangents: tuple) -> tuple[Array, Array]:
    x, weight = primals

    def narrow(a: Array, b: Array) -> Array:
        precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
        dims = (((1,), (1,)), ((), ()))
        return jax.lax.dot_general(a, b, dims, precision=precision).astype(jnp.float32)

    return _product(x, weight), narrow(tangents[0], weight) + narrow(x, tangents[1])


def quantisation_aware(
    model: nnx.Module,
    bits: int = 4,
    *,
    group_size: int = 64,
    codebook: Any = "auto",
    scale: str = "auto",
    skip: str | None = SKIP,
    dtype: Any = None,
    embedding_bits: int | None = None,
    seed: int = 0,
) -> nnx.Module:
    """A copy of a model whose Linears see their weights quantised, for training.

    Args:
        model: an nnx model with `nnx.Linear`s or `nnx.LinearGeneral`s.
        bits: 1, 2, 4 or 8.
        group_size: weights along K that share a scale.
        codebook: see `fdk_jax.quantise`; "kmeans" is fitted to each weight now and can be refreshed.
        scale: "absmax", "absmean", "rms", "none" or "auto".
        skip: regular expression, searched in the dotted name; None skips nothing.
        dtype: compute dtype of the quantised weights; None keeps their own.
        embedding_bits: of the tables of `nnx.Embed`s that are not skipped; None leaves them as they are.
        seed: of the k-means.

    Returns:
        A new module with float32 master weights in `nnx.Param`s.

    Raises:
        TypeError: the model has no such layers.
        ValueError: an argument out of range.
    """
    found = linear_layers(model, lambda name: bool(skip and re.search(skip, name)))
    # An adapter, or an output of another dtype, would be lost here.
    layers = {
        name: linear
        for name, linear in found.items()
        if not isinstance(linear.layer, nnx.LoRALinear)
        and linear.layer.preferred_element_type is None
    }
    if not layers:
        raise TypeError("the model has no nnx.Linear or nnx.LinearGeneral that is not skipped")
    options: dict[str, Any] = dict(
        group_size=group_size, codebook=codebook, scale=scale, dtype=dtype, seed=seed
    )

    _check_ties(model, {f"{name}.kernel": linear.axes for name, linear in layers.items()})
    shared: dict[int, FakeQuantisedLinear] = {}

    def replace(name: str, layer: nnx.Module) -> nnx.Module | None:
        if name in layers and isinstance(layer, (nnx.Linear, nnx.LinearGeneral)):
            new = FakeQuantisedLinear(layer, layers[name].axes, bits=bits, **options)
            first = shared.setdefault(id(layer.kernel), new)
            # Layers of one kernel train one.
            new.kernel, new.codebook = first.kernel, first.codebook
            return new
        if embedding_bits is None or not isinstance(layer, nnx.Embed):
            return None
        if type(layer) is not nnx.Embed:  # a subclass may look rows up in another way
            return None
        if skip and re.search(skip, name):
            return None
        return FakeQuantisedEmbed(layer, bits=embedding_bits, **options)

    return replace_layers(model, replace)


def _check_ties(model: nnx.Module, kernels: dict[str, str]) -> None:
    """Refuses kernels that layers share with what is not trained with them: they would be two from then on.

    Args:
        model: the model.
        kernels: axes of each kernel that becomes a master weight, by its dotted name.

    Raises:
        ValueError: names those that share one.
    """
    holders: dict[int, list[str]] = {}

    def note(name: str, module: nnx.Module) -> None:
        for attribute, value in vars(module).items():
            if isinstance(value, nnx.Variable):
                holders.setdefault(id(value), []).append(f"{name}.{attribute}")

    replace_layers(model, note, in_place=True)
    for names in holders.values():
        if any(name in kernels for name in names) and len({kernels.get(n) for n in names}) > 1:
            raise ValueError(
                f"{' and '.join(names)} are one variable, and not all of it can be trained quantised:"
                " leave these layers out with skip=, or give each a variable of its own"
            )


def export(model: nnx.Module) -> nnx.Module:
    """A copy of a model with the layers in training turned into quantised ones with packed weights.

    Its logits are those that training saw: the weights are the same numbers.
    """

    def replace(_: str, layer: nnx.Module) -> nnx.Module | None:
        if isinstance(layer, FakeQuantisedEmbed):
            return QuantisedEmbed(layer.quantised(), dtype=layer.dtype)
        if not isinstance(layer, FakeQuantisedLinear):
            return None
        return QuantisedLinear.from_weight(
            layer.quantised(), layer.bias, axis=layer.axis, dtype=layer.dtype
        )

    return replace_layers(model, replace)


def trained_layers(model: nnx.Module) -> list[_InTraining]:
    """The layers of a model that are in quantisation-aware training."""
    return [m for _, m in nnx.iter_modules(model) if isinstance(m, _InTraining)]


def refresh_codebooks(model: nnx.Module) -> None:
    """Moves the fitted codebooks of all layers to the weights as they are now; works inside `nnx.jit`."""
    for layer in trained_layers(model):
        layer.refresh()


def make_train_step(
    loss: Callable[[nnx.Module, Any], Array], *, start_step: int = 0, refresh_every: int = 0
) -> Callable[[nnx.Module, nnx.Optimizer, Any], Array]:
    """A compiled step of training.

    Args:
        loss: maps (model, batch) to a scalar.
        start_step: from this step of the optimiser on, weights are quantised; before, they are not.
        refresh_every: fitted codebooks are refreshed at every step that it divides; 0 for never.

    Returns:
        A function of (model, nnx.Optimizer, batch) that updates both in place and returns the loss.
    """
    if start_step < 0 or refresh_every < 0:
        raise ValueError(f"{start_step=} and {refresh_every=} must not be negative")

    @nnx.jit
    def train_step(model: nnx.Module, optimizer: nnx.Optimizer, batch: Any) -> Array:
        step = optimizer.step.get_value().astype(jnp.int32)
        active = step >= start_step
        for layer in trained_layers(model):
            layer.active.set_value(jnp.broadcast_to(active, layer.active.get_value().shape))
        if refresh_every:
            due = active & (step % refresh_every == 0)
            nnx.cond(due, refresh_codebooks, lambda model: None, model)
        value, gradients = nnx.value_and_grad(functools.partial(_apply, loss))(model, batch)
        with jax.numpy_dtype_promotion("standard"):  # optax counts on it
            optimizer.update(model, gradients)
        return value

    return train_step


def _apply(loss: Callable, model: nnx.Module, batch: Any) -> Array:
    return loss(model, batch)
