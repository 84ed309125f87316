"""Flax layers with quantised weights: linear, with a low-rank adapter, embedding; and the linen twin."""

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.typing import DTypeLike

from fdk_jax.format.array_like import take_rows, wide_indices
from fdk_jax.format.quantisation import quantise_array
from fdk_jax.format.quantised_tensor import QuantisedTensor, is_quantised
from fdk_jax.product.dispatch import matmul


class QuantisedWeight(nnx.Variable):
    """Holds a `QuantisedTensor`; not an `nnx.Param`, so gradients and optimisers pass it by."""


def apply_linear(
    x: Array,
    w: QuantisedTensor | Array,
    bias: Array | None = None,
    *,
    axes: str | None = None,
    axis: int | Sequence[int] | None = None,
    dtype: DTypeLike | None = None,
    out_dtype: DTypeLike | None = None,
    backend: str | None = None,
    arithmetic: str = "exact",
) -> Array:
    """Applies a weight of any `axes` as Flax's Linear and LinearGeneral apply theirs.

    Args:
        x: float array whose axes `axis` have the sizes of the "k" axes of `w`.
        w: the weight; its "n" axes become the last axes of the result. A float array inside a traced call of
            `quantised_apply`.
        bias: any shape with N elements, or None.
        axes: the axes of a float `w`.
        axis: axes of x to contract; None for the last ones.
        dtype: computation dtype; None promotes x and the weight as Flax does.
        out_dtype: dtype of the result; None for the computation dtype.
        backend: see `fdk_jax.matmul`.
        arithmetic: see `fdk_jax.matmul`.

    Returns:
        Array [..., *n_shape].
    """
    x = jnp.asarray(x)  # a list or a float64 of numpy, which Flax's layers take
    quantised = isinstance(w, QuantisedTensor)
    shape, letters = w.orientation if quantised else (w.shape, axes or "kn")
    k_shape = tuple(d for d, a in zip(shape, letters, strict=True) if a == "k")
    n_shape = tuple(d for d, a in zip(shape, letters, strict=True) if a == "n")
    dtype = jnp.promote_types(x.dtype, w.dtype) if dtype is None else dtype
    if axis is not None:
        moved = [axis] if isinstance(axis, int) else list(axis)
        x = jnp.moveaxis(x, moved, range(-len(moved), 0))
    lead = x.shape[: x.ndim - len(k_shape)]
    if x.shape[len(lead) :] != k_shape:
        raise ValueError(
            f"the contracted axes of {x.shape=} must be {k_shape} for {w}; if it was quantised along the wrong"
            " axes, say the right ones with axes={regular expression: orientation} of fdk_jax.quantise"
        )
    if not quantised:
        contracted = [i for i, a in enumerate(letters) if a == "k"]
        dims = ((range(len(lead), x.ndim), contracted), ((), ()))
        y = jax.lax.dot_general(
            x.astype(dtype), w.astype(dtype), dims, preferred_element_type=out_dtype
        )
        return y if bias is None else y + bias.reshape((1,) * len(lead) + n_shape).astype(y.dtype)
    y = matmul(
        x.reshape(*lead, w.in_features).astype(dtype),
        w,
        backend=backend,
        bias=None if bias is None else bias.reshape(-1),
        out_dtype=out_dtype,
        arithmetic=arithmetic,
    )
    return y.reshape(*lead, *n_shape)


class QuantisedLinear(nnx.Module):
    """`nnx.Linear` and `nnx.LinearGeneral` with a quantised kernel.

    `fdk_jax.quantise(module)` puts it in the place of every Linear. Made by hand, it starts from a
    quantised LeCun-normal kernel.

    Args:
        in_features: K.
        out_features: N.
        bits: 1, 2, 4 or 8.
        group_size: weights that share a scale.
        codebook: see `fdk_jax.quantise`.
        use_bias: adds a trainable bias [N].
        dtype: computation dtype; None promotes input and weight.
        param_dtype: dtype of scales and bias.
        backend: see `fdk_jax.matmul`.
        arithmetic: see `fdk_jax.matmul`.
        rngs: random streams for the initial kernel.
        weight: None; or a finished weight (see `from_weight`), which makes the arguments about the
            initial one void.
        bias: beside `weight`: N elements (an `nnx.Param` is shared, not copied), or None.
        axis: axes of the input to contract; None for the last ones.
        out_dtype: dtype of the output; None for the computation dtype.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        bits: int = 4,
        group_size: int = 64,
        codebook: Any = "auto",
        use_bias: bool = True,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        backend: str | None = None,
        arithmetic: str = "exact",
        rngs: nnx.Rngs | None = None,
        weight: QuantisedTensor | QuantisedWeight | None = None,
        bias: Array | nnx.Variable | None = None,
        axis: int | Sequence[int] | None = None,
        out_dtype: DTypeLike | None = None,
    ):
        if weight is None:
            if rngs is None:
                raise ValueError("QuantisedLinear needs rngs for its initial kernel, or a weight")
            kernel = nnx.initializers.lecun_normal()(
                rngs.params(), (in_features, out_features), jnp.dtype(param_dtype)
            )
            weight = quantise_array(
                kernel, bits, group_size=group_size, codebook=codebook, axes="kn"
            )
            bias = jnp.zeros((out_features,), jnp.dtype(param_dtype)) if use_bias else None
        self.weight = weight if isinstance(weight, QuantisedWeight) else QuantisedWeight(weight)
        self.axes = self.weight.get_value().orientation[1]
        self.in_features = self.weight.get_value().in_features
        self.out_features = self.weight.get_value().out_features
        self.bias = bias if bias is None or isinstance(bias, nnx.Variable) else nnx.Param(bias)
        self.axis = axis if axis is None or isinstance(axis, int) else tuple(axis)
        self.dtype = dtype
        self.out_dtype = out_dtype
        self.backend = backend
        self.arithmetic = arithmetic

    @property
    def kernel(self) -> QuantisedWeight:
        """The variable that holds the weight, under Flax's name."""
        return self.weight

    @property
    def use_bias(self) -> bool:
        """Whether there is a bias."""
        return self.bias is not None

    @classmethod
    def from_weight(
        cls,
        weight: QuantisedTensor | QuantisedWeight,
        bias: Array | nnx.Variable | None = None,
        *,
        axis: int | Sequence[int] | None = None,
        dtype: DTypeLike | None = None,
        out_dtype: DTypeLike | None = None,
        backend: str | None = None,
        arithmetic: str = "exact",
    ) -> "QuantisedLinear":
        """A layer around a weight that is quantised already.

        Args:
            weight: any `axes` without "b", or a variable that holds it and is then shared; leading axes are for
                layers under `nnx.scan` or `nnx.vmap`.
            bias: N elements (an `nnx.Param` is shared, not copied), or None.
            axis: axes of the input to contract; None for the last ones.
            dtype: computation dtype; None promotes input and weight.
            out_dtype: dtype of the output; None for the computation dtype.
            backend: see `fdk_jax.matmul`.
            arithmetic: see `fdk_jax.matmul`.
        """
        tensor = weight.get_value() if isinstance(weight, QuantisedWeight) else weight
        return cls(
            tensor.in_features,
            tensor.out_features,
            weight=weight,
            bias=bias,
            axis=axis,
            dtype=dtype,
            out_dtype=out_dtype,
            backend=backend,
            arithmetic=arithmetic,
        )

    def __call__(self, inputs: Array, out_sharding: None = None) -> Array:
        """Returns inputs times kernel plus bias; the last axes are the output features."""
        _no_out_sharding(self, out_sharding)
        if hasattr(self, "qwix_path") and is_quantised(self.weight.get_value()):
            return _as_qwix_expects(self, inputs)
        return apply_linear(
            inputs,
            self.weight.get_value(),
            None if self.bias is None else self.bias.get_value(),
            axes=self.axes,
            axis=self.axis,
            dtype=self.dtype,
            out_dtype=self.out_dtype,
            backend=self.backend,
            arithmetic=self.arithmetic,
        )


def _as_qwix_expects(layer: QuantisedLinear, inputs: Array) -> Array:
    """A call in which the weight is a float `nnx.Param`: beside such ones qwix puts its adapters."""
    from fdk_jax.layers.interpreted import quantised_apply  # it knows these layers

    options: dict[str, Any] = dict(backend=layer.backend, arithmetic=layer.arithmetic)
    return quantised_apply(QuantisedLinear.__call__, **options)(layer, inputs)


class QuantisedLoRALinear(QuantisedLinear):
    """`nnx.LoRALinear` with a quantised kernel; `lora` is the layer's own adapter, and trains as before."""

    lora: nnx.LoRA

    def __call__(self, inputs: Array, out_sharding: None = None) -> Array:
        """Returns what the quantised layer gives plus what the adapter gives."""
        return super().__call__(inputs, out_sharding) + self.lora(inputs)


class QuantisedEmbed(nnx.Module):
    """`nnx.Embed` with a quantised table: rows are unpacked after they were looked up; `attend` is a `matmul`.

    Args:
        table: an [N, K] weight with axes "nk" and one codebook: N rows of K features.
        dtype: dtype of the output; None for the dtype of the table.
        backend: see `fdk_jax.matmul`; for `attend`.
        arithmetic: see `fdk_jax.matmul`; for `attend`.
    """

    def __init__(
        self,
        table: QuantisedTensor,
        *,
        dtype: DTypeLike | None = None,
        backend: str | None = None,
        arithmetic: str = "exact",
    ):
        if table.axes != "nk":
            raise ValueError(f'a table has axes "nk", one row for each index, got {table}')
        self.embedding = QuantisedWeight(table)
        self.num_embeddings, self.features = table.shape
        self.dtype = table.dtype if dtype is None else dtype
        self.backend = backend
        self.arithmetic = arithmetic

    def __call__(self, inputs: Array, out_sharding: None = None) -> Array:
        """Rows of the table: [..., K] for integers [...]; NaN for indices out of range."""
        if not jnp.issubdtype(inputs.dtype, jnp.integer):
            raise ValueError(f"indices must be integers, got {inputs.dtype}")
        _no_out_sharding(self, out_sharding)
        table = self.embedding.get_value()
        inputs = wide_indices(inputs)
        if self.num_embeddings == 1:
            inputs = jnp.zeros_like(inputs)
        inputs = jnp.where(inputs < 0, inputs + self.num_embeddings, inputs)
        if not is_quantised(table):
            return jnp.take(table, inputs, axis=0, mode="fill").astype(self.dtype)
        return take_rows(table, inputs, fill=True).astype(self.dtype)

    def attend(self, query: Array, out_sharding: None = None) -> Array:
        """Query [..., K] times every row: [..., N], as a tied final projection does."""
        _no_out_sharding(self, out_sharding)
        return apply_linear(
            query,
            self.embedding.get_value(),
            axes="nk",
            dtype=self.dtype,
            backend=self.backend,
            arithmetic=self.arithmetic,
        )


def _no_out_sharding(layer: nnx.Module, out_sharding: Any) -> None:
    if out_sharding is not None:
        raise NotImplementedError(
            f"{type(layer).__name__} follows its weight's sharding; leave out_sharding"
        )


class QuantisedDense(nn.Module):
    """The linen twin of `QuantisedLinear`: `nn.Dense` whose "kernel" is a `QuantisedTensor`.

    Attributes:
        features: N.
        bits: 1, 2, 4 or 8.
        group_size: weights that share a scale.
        codebook: of the initial kernel, see `fdk_jax.quantise`.
        use_bias: adds a bias [N].
        dtype: computation dtype; None promotes input and weight.
        param_dtype: dtype of scales and bias.
        backend: see `fdk_jax.matmul`.
        arithmetic: see `fdk_jax.matmul`.
    """

    features: int
    bits: int = 4
    group_size: int = 64
    codebook: Any = "auto"
    use_bias: bool = True
    dtype: Any = None
    param_dtype: Any = jnp.float32
    backend: str | None = None
    arithmetic: str = "exact"

    @nn.compact
    def __call__(self, inputs: Array) -> Array:
        """Returns inputs [..., K] times kernel plus bias: [..., features]."""

        def init(key):
            shape = (inputs.shape[-1], self.features)
            kernel = nn.initializers.lecun_normal()(key, shape, jnp.dtype(self.param_dtype))
            return quantise_array(
                kernel,
                self.bits,
                group_size=self.group_size,
                codebook=self.codebook,
                axes="kn",
            )

        # A kernel from the outside may be in a kernel's layout: the initial one has no say in it.
        kernel = (
            self.get_variable("params", "kernel")
            if self.has_variable("params", "kernel")
            else self.param("kernel", init, unbox=False)
        )
        bias = None
        if self.use_bias:
            bias = self.param("bias", nn.initializers.zeros, (self.features,), self.param_dtype)
        return apply_linear(
            inputs,
            kernel,
            bias,
            dtype=self.dtype,
            backend=self.backend,
            arithmetic=self.arithmetic,
        )
