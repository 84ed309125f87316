"""What is static about a product with a planar weight, and the launch of a kernel for it."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from pallas_kernels import triton_compat

PLANE = 64
TILE_ROWS = 16
SHARED_BYTES = 227 * 1024  # the most of a program


class Arrays(NamedTuple):
    """The arrays of one product: x [M, K], those of a weight (for a kernel here planar), bias [N] or None."""

    x: Array
    packed: Array
    scales: Array
    codebook: Array
    bias: Array | None


class Norm(NamedTuple):
    """The arrays of a residual sum and a norm before a product: what is added to x [M, K], a scale [K]."""

    delta: Array
    scale: Array


@dataclasses.dataclass(frozen=True)
class Case:
    """What is static about a product.

    Attributes:
        uniform: the values of each codebook are evenly spaced, see `fdk_jax.QuantisedTensor`.
        norm_eps: of the RMS norm before the product, see `pallas_kernels.norm_matmul`; or None.
    """

    m: int
    n: int
    k: int
    bits: int
    group_size: int
    books: int
    x_dtype: Any
    scale_dtype: Any
    bias_dtype: Any
    out_dtype: Any
    uniform: bool = False
    norm_eps: float | None = None

    @property
    def planes(self) -> int:
        """E, planes of 64 weights a tile."""
        return 8 // self.bits

    @property
    def even(self) -> bool:
        """Whether kernels compute values from codes instead of looking them up; at 2 bits that is slower."""
        return self.uniform and self.bits in (4, 8)

    @property
    def span(self) -> int:
        """Weights a row of a tile."""
        return self.planes * PLANE

    @property
    def blocks(self) -> int:
        """Tiles along K."""
        return -(-self.k // self.span)

    @property
    def tiles(self) -> int:
        """Tiles along N."""
        return -(-self.n // TILE_ROWS)

    @property
    def quads(self) -> int:
        """Fours of groups along K, as the planar layout stores scales."""
        groups = -(-self.blocks * self.span // self.group_size)
        return -(-groups // 4)

    def unsupported_reason(self, config: Any, shared_bytes: Callable[[], int]) -> str | None:
        """Why a kernel on tensor cores does not take it, or None.

        Args:
            config: the kernel's launch configuration; `rows` are the rows of the weight a program.
            shared_bytes: gives the shared memory of a program, where nothing else stands against the case.
        """
        if self.x_dtype not in (jnp.bfloat16, jnp.float16):
            return f"x is {self.x_dtype}, the tensor cores' inputs are bfloat16 or float16"
        if self.group_size % 8:
            return f"group_size={self.group_size} is no multiple of 8"
        if self.books > 1 and (self.n // self.books) % config.rows:
            return f"{self.books} codebooks do not change at multiples of {config.rows} rows"
        if shared_bytes() > SHARED_BYTES:
            return f"{config} needs more than {SHARED_BYTES} bytes of shared memory"
        return None

    def pad(self, x: Array) -> Array:
        """X [..., K] with noughts behind K, to whole tiles."""
        behind = self.blocks * self.span - x.shape[-1]
        return jnp.pad(x, ((0, 0),) * (x.ndim - 1) + ((0, behind),)) if behind else x

    def launch(
        self,
        source: str,
        arrays: Arrays,
        *,
        grid: tuple[int, int],
        warps: int,
        cluster: int = 1,
        name: str,
        norm: Norm | None = None,
    ) -> tuple[Array, ...]:
        """X times the transpose of the weight, [M, N], by a kernel's PTX; with a norm also the sum [M, K].

        Operands of the PTX: $1 x, $2 packed, $3 scales, $4 codebook, bias if any, those of the norm if there
        is one, then the results.
        """
        operands = (self.pad(arrays.x), *arrays[1:4])
        if arrays.bias is not None:
            operands += (arrays.bias,)
        outputs = (jax.ShapeDtypeStruct((self.m, self.n), self.out_dtype),)
        if norm is not None:
            operands += (self.pad(norm.delta), self.pad(norm.scale))
            outputs += (jax.ShapeDtypeStruct((self.m, self.k), self.x_dtype),)
        return triton_compat.ptx_call(
            source, operands, outputs, grid=grid, num_warps=warps, cluster=cluster, name=name
        )
