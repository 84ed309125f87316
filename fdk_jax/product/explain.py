"""`explain`: which path a product takes, and why."""

import dataclasses
import math
from typing import Any

import jax
from jax import Array

import pallas_kernels
from fdk_jax.format.quantised_tensor import QuantisedTensor
from fdk_jax.layers.trees import default_backend
from fdk_jax.product import cpu_backend
from fdk_jax.product.dispatch import LAYOUT_OF, check_backend
from pallas_kernels import target


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
    platform: str | None = None,
) -> Explanation:
    """Says which path `matmul(x, w, backend=backend)` takes, and why. Runs nothing.

    Args:
        x: activations [..., K], or their shape and dtype.
        w: the weight.
        backend: as given to `matmul`.
        platform: "cpu", "cuda", ... that the program is lowered for; None for JAX's default.

    Raises:
        ValueError: an unknown backend, or an x that does not end in K.
    """
    if not len(x.shape) or x.shape[-1] != w.in_features:
        raise ValueError(f"{x.shape=} must end in K={w.in_features} of {w}")
    if backend is not None:
        check_backend(backend)
        reason = "asked for"
        if w.layout != LAYOUT_OF[backend]:
            reason += f"; reformats the {w.layout} weight at each call: fdk_jax.prepare it once"
        return _path(backend, x, w, reason)
    platform = platform or jax.default_backend()
    platform = "cuda" if platform == "gpu" else platform
    if w.layout == "interchange":
        reason = "the weight is in the interchange layout"
        if default_backend() != "xla":
            reason += f'; fdk_jax.prepare makes it one for "{default_backend()}"'
        return _path("xla", x, w, reason)
    if w.layout == "planar" and platform == "cuda":
        gpu = target.current()
        path = _path("pallas", x, w, f"the weight is prepared for it, on {gpu}")
        if path.kernel.startswith("xla"):
            return _path("xla", x, w, path.kernel.partition(": ")[2])
        return path
    if w.layout == "tiled" and platform == "cpu":
        missing = cpu_backend.unsupported_reason(w.group_size)
        if missing is None:
            return _path("cpu", x, w, "the weight is prepared for it, on a CPU")
        return _path("xla", x, w, missing)
    return _path("xla", x, w, f"a {w.layout} weight has no kernel on {platform}")


def _path(backend: str, x: Any, w: QuantisedTensor, reason: str) -> Explanation:
    m = math.prod(x.shape[:-1])
    if backend == "pallas":
        kernel = str(pallas_kernels.plan(m, uniform=w.uniform, dtype=x.dtype, **w.facts))
    elif backend == "cpu":
        kernel = cpu_backend.describe()
        if (name := cpu_backend.kernel_name(x, w)) is not None:
            kernel += f", {name}"
    else:
        kernel = "dequantise, then dot"
    return Explanation(backend, kernel, reason)
