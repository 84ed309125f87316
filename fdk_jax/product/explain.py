"""`explain`: which path a product takes, and why."""

import dataclasses
import math
from typing import Any

import jax
from jax import Array

from fdk_jax.format.quantised_tensor import QuantisedTensor
from fdk_jax.product import cpu_backend
from fdk_jax.product.choice import (
    LAYOUT_OF,
    Product,
    check_backend,
    choose,
    default_backend,
    gpu_plan,
)
from pallas_kernels.case import Arrays


@dataclasses.dataclass(frozen=True)
class Explanation:
    """The path of one product.

    Attributes:
        backend: "pallas", "cpu" or "xla".
        kernel: what runs, with its launch configuration; on a GPU with the architecture it is written for.
        reason: why.
    """

    backend: str
    kernel: str
    reason: str

    def __str__(self) -> str:
        return f"{self.backend}: {self.kernel} ({self.reason})"


def explain(
    x: Array | jax.ShapeDtypeStruct,
    w: QuantisedTensor,
    *,
    backend: str | None = None,
    bias: Array | jax.ShapeDtypeStruct | None = None,
    out_dtype: Any = None,
    arithmetic: str = "exact",
    platform: str | None = None,
) -> Explanation:
    """Says which path `matmul` with these arguments takes, and why. Runs nothing.

    Args:
        x: activations [..., K], or their shape and dtype.
        w: the weight.
        backend: as given to `matmul`.
        bias: as given to `matmul`, or its shape and dtype.
        out_dtype: as given to `matmul`.
        arithmetic: as given to `matmul`.
        platform: "cpu", "cuda", ... that the program is lowered for; None for JAX's default.

    Returns:
        The backend, the kernel with its launch configuration, and the reason; printed, they are a line.

    Raises:
        ValueError: an unknown backend, or an x that does not end in K.
    """
    if not len(x.shape) or x.shape[-1] != w.in_features:
        raise ValueError(f"{x.shape=} must end in K={w.in_features} of {w}")
    if backend is not None:
        check_backend(backend)
    platform = platform or jax.default_backend()
    platform = "cuda" if platform == "gpu" else platform
    product = Product.of(x, w, backend=backend, out_dtype=out_dtype, arithmetic=arithmetic)
    row: Any = jax.ShapeDtypeStruct((max(1, math.prod(x.shape[:-1])), w.in_features), x.dtype)
    shapes: Any = bias
    operands = Arrays(row, w.packed, w.scales, w.codebook, shapes)
    choice = choose(product, operands, platform)
    reason = choice.reason
    if backend is not None and w.layout != LAYOUT_OF[backend]:
        reason += f"; reformats the {w.layout} weight at each call: fdk_jax.prepare it once"
    if backend is None and w.layout == "interchange" and default_backend() != "xla":
        reason += f'; fdk_jax.prepare makes it one for "{default_backend()}"'
    if choice.backend == "pallas":
        kernel = str(gpu_plan(product, operands))
    elif choice.backend == "cpu":
        kernel = cpu_backend.describe()
        if (name := cpu_backend.kernel_name(x, w, arithmetic)) is not None:
            kernel += f", {name}"
    else:
        kernel = "dequantise, then dot"
    return Explanation(choice.backend, kernel, reason)
