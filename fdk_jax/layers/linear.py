"""Flax layers with quantised weights: the nnx module, its linen twin, and linen models left as they are."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.typing import DTypeLike

from fdk_jax.format.quantisation import quantise_array
from fdk_jax.format.quantised_tensor import QuantisedTensor, is_quantised
from fdk_jax.product.dispatch import matmul


class QuantisedWeight(nnx.Variable):
    """Holds a `QuantisedTensor`; not an `nnx.Param`, so gradients and optimisers pass it by."""


def apply_linear(
    x: Array,
    w: QuantisedTensor,
    bias: Array | None = None,
    *,
    axis: int | Sequence[int] | None = None,
    dtype: DTypeLike | None = None,
    backend: str | None = None,
    arithmetic: str = "exact",
) -> Array:
    """Applies a weight of any `axes` as Flax's Linear and LinearGeneral apply theirs.

    Args:
        x: float array whose axes `axis` have the sizes of the "k" axes of `w`.
        w: the weight; its "n" axes become the last axes of the result.
        bias: any shape with N elements, or None.
        axis: axes of x to contract; None for the last ones.
        dtype: computation dtype; None promotes x and the weight as Flax does.
        backend: see `fdk_jax.matmul`.
        arithmetic: see `fdk_jax.matmul`.

    Returns:
        Array [..., *n_shape] in the computation dtype.
    """
    k_shape = tuple(d for d, a in zip(w.shape, w.axes, strict=True) if a == "k")
    n_shape = tuple(d for d, a in zip(w.shape, w.axes, strict=True) if a == "n")
    dtype = jnp.promote_types(x.dtype, w.dtype) if dtype is None else dtype
    if axis is not None:
        axes = [axis] if isinstance(axis, int) else list(axis)
        x = jnp.moveaxis(x, axes, range(-len(axes), 0))
    lead = x.shape[: x.ndim - len(k_shape)]
    if x.shape[len(lead) :] != k_shape:
        raise ValueError(f"the contracted axes of {x.shape=} must be {k_shape} for {w}")
    y = matmul(
        x.reshape(*lead, w.in_features).astype(dtype),
        w,
        backend=backend,
        bias=None if bias is None else bias.reshape(-1),
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
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        bits: int = 4,
        group_size: int = 64,
        codebook: Any = "uniform",
        use_bias: bool = True,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        backend: str | None = None,
        arithmetic: str = "exact",
        rngs: nnx.Rngs | None = None,
        weight: QuantisedTensor | None = None,
        bias: Array | nnx.Variable | None = None,
        axis: int | Sequence[int] | None = None,
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
        self.weight = QuantisedWeight(weight)
        self.bias = bias if bias is None or isinstance(bias, nnx.Variable) else nnx.Param(bias)
        self.axis = axis if axis is None or isinstance(axis, int) else tuple(axis)
        self.dtype = dtype
        self.backend = backend
        self.arithmetic = arithmetic

    @classmethod
    def from_weight(
        cls,
        weight: QuantisedTensor,
        bias: Array | nnx.Variable | None = None,
        *,
        axis: int | Sequence[int] | None = None,
        dtype: DTypeLike | None = None,
        backend: str | None = None,
        arithmetic: str = "exact",
    ) -> "QuantisedLinear":
        """A layer around a weight that is quantised already.

        Args:
            weight: any `axes`; leading axes are for layers under `nnx.scan` or `nnx.vmap`.
            bias: N elements (an `nnx.Param` is shared, not copied), or None.
            axis: axes of the input to contract; None for the last ones.
            dtype: computation dtype; None promotes input and weight.
            backend: see `fdk_jax.matmul`.
            arithmetic: see `fdk_jax.matmul`.
        """
        return cls(
            weight.in_features,
            weight.out_features,
            weight=weight,
            bias=bias,
            axis=axis,
            dtype=dtype,
            backend=backend,
            arithmetic=arithmetic,
        )

    def __call__(self, inputs: Array, out_sharding: None = None) -> Array:
        """Returns inputs times kernel plus bias; the last axes are the output features."""
        if out_sharding is not None:
            raise NotImplementedError(
                "QuantisedLinear follows its weight's sharding; leave out_sharding"
            )
        return apply_linear(
            inputs,
            self.weight.get_value(),
            None if self.bias is None else self.bias.get_value(),
            axis=self.axis,
            dtype=self.dtype,
            backend=self.backend,
            arithmetic=self.arithmetic,
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
    codebook: Any = "uniform"
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
            else self.param("kernel", init)
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


def quantised_apply(
    apply: Callable, *, backend: str | None = None, arithmetic: str = "exact"
) -> Callable:
    """Lets an unchanged linen model run on quantised parameters.

        apply = fdk_jax.quantised_apply(model.apply)
        logits = apply({"params": fdk_jax.quantise(params)}, tokens)

    Args:
        apply: `model.apply`, or a function that calls it.
        backend: see `fdk_jax.matmul`.
        arithmetic: see `fdk_jax.matmul`.

    Returns:
        A function of the same signature, in which `nn.Dense` and `nn.DenseGeneral` take kernels that are
        `QuantisedTensor`s.
    """

    def intercept(call, args, kwargs, context):
        module = context.module
        quantised = (
            context.method_name == "__call__"
            and module.scope is not None
            and module.has_variable("params", "kernel")
            and is_quantised(module.get_variable("params", "kernel"))
        )
        if not quantised or isinstance(module, QuantisedDense):
            return call(*args, **kwargs)
        if not isinstance(module, (nn.Dense, nn.DenseGeneral)) or getattr(module, "batch_dims", ()):
            raise NotImplementedError(
                f"{type(module).__name__} {'/'.join(module.path)} cannot use a quantised kernel;"
                " leave it out with the skip argument of fdk_jax.quantise"
            )
        kernel = module.get_variable("params", "kernel")
        bias = module.get_variable("params", "bias") if module.use_bias else None
        (inputs,) = args
        return apply_linear(
            inputs,
            kernel,
            bias,
            axis=getattr(module, "axis", None),
            dtype=module.dtype,
            backend=backend,
            arithmetic=arithmetic,
        )

    @functools.wraps(apply)
    def wrapped(*args, **kwargs):
        with nn.intercept_methods(intercept):
            return apply(*args, **kwargs)

    return wrapped
