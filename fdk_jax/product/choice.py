"""Which backend computes a product, and why: the one decision that `matmul` follows and `explain` tells."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

import pallas_kernels
from fdk_jax.format.quantised_tensor import SPEC_FIELDS, QuantisedTensor
from fdk_jax.product import cpu_backend
from pallas_kernels import target
from pallas_kernels.case import Arrays

BACKENDS = ("pallas", "cpu", "xla")
ARITHMETIC = ("exact", "int16", "int8")
# Arithmetics other than "exact", by the backend that must be asked for.
INEXACT = {"cpu": ("int16", "int8"), "pallas": ("int8",)}
LAYOUT_OF = {"pallas": "planar", "cpu": "tiled", "xla": "interchange"}
# The platform on which the kernels that read a layout run.
PLATFORM_OF = {"planar": "cuda", "tiled": "cpu"}


@dataclasses.dataclass(frozen=True)
class Product:
    """What is static about one product; hashable."""

    bits: int
    group_size: int
    out_features: int
    in_features: int
    layout: str
    uniform: bool
    backend: str | None
    arithmetic: str
    out_dtype: Any
    interpret: bool

    @property
    def spec(self) -> dict[str, Any]:
        """The arguments of `packing.convert`."""
        return {name: getattr(self, name) for name in SPEC_FIELDS}

    @classmethod
    def of(
        cls,
        x: Any,
        w: QuantisedTensor,
        *,
        backend: str | None,
        out_dtype: Any,
        arithmetic: str,
        interpret: bool = False,
    ) -> "Product":
        """The product of x and a weight that is in the layout of `backend`, if there is one."""
        return cls(
            **w.spec,
            layout=w.layout if backend is None else LAYOUT_OF[backend],
            uniform=w.uniform,
            backend=backend,
            arithmetic=arithmetic,
            out_dtype=jnp.dtype(x.dtype if out_dtype is None else out_dtype),
            interpret=interpret,
        )


@dataclasses.dataclass(frozen=True)
class Choice:
    """What computes a product on a platform.

    Attributes:
        backend: "pallas", "cpu" or "xla".
        reason: why.
    """

    backend: str
    reason: str


def check_backend(backend: str) -> str:
    """Returns `backend` if there is one of that name."""
    if backend not in BACKENDS:
        raise ValueError(f"{backend=} is not one of {BACKENDS}")
    return backend


def default_backend() -> str:
    """The backend whose kernels run on JAX's default platform: "pallas", "cpu" or "xla"."""
    platform = jax.default_backend()
    if platform in ("gpu", "cuda"):
        return "pallas" if target.current().has_kernels else "xla"
    return "cpu" if platform == "cpu" and cpu_backend.unavailable_reason() is None else "xla"


def choose(product: Product, operands: Arrays, platform: str) -> Choice:
    """The backend of a product in a program that is lowered for a platform.

    Args:
        product: what is static about it.
        operands: its arrays with x [M, K], or their shapes and dtypes.
        platform: "cpu", "cuda", ...
    """
    if product.backend is not None:
        return Choice(product.backend, "asked for")
    if product.layout == "interchange":
        return Choice("xla", "the weight is in the interchange layout")
    if PLATFORM_OF[product.layout] != platform:
        return Choice("xla", f"a {product.layout} weight has no kernel on {platform}")
    if product.layout == "planar":
        plan = gpu_plan(product, operands)
        if plan.kernel == "xla":
            return Choice("xla", plan.reason)
        return Choice("pallas", f"the weight is prepared for it, on {target.current()}")
    missing = cpu_backend.unsupported_reason(product.bits, product.group_size)
    if missing is not None:
        return Choice("xla", missing)
    return Choice("cpu", "the weight is prepared for it, on a CPU")


def gpu_plan(product: Product, operands: Arrays) -> pallas_kernels.Plan:
    """The kernel of a product on the GPU at hand."""
    return pallas_kernels.plan_of(
        operands,
        bits=product.bits,
        group_size=product.group_size,
        out_features=product.out_features,
        uniform=product.uniform,
        out_dtype=product.out_dtype,
        arithmetic=product.arithmetic,
    )
