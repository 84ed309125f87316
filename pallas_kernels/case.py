"""What is static about a product with a planar weight, and the launch of a kernel for it."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from pallas_kernels import decoding, layout, xla_call
from pallas_kernels.layout import PART_BYTES, PLANE, SCALE_GROUPS, TILE_ROWS
from pallas_kernels.target import Target


class Arrays(NamedTuple):
    """The arrays of one product: x [M, K], those of a weight (for a kernel here planar), bias [N] or None."""

    x: Array
    packed: Array
    scales: Array
    codebook: Array
    bias: Array | None


@dataclasses.dataclass(frozen=True)
class Case:
    """What is static about a product: y = x w.T + bias, all that kernels are planned and written from.

    Attributes:
        m, n, k: shape of the product: x [M, K], w [N, K], y [M, N].
        bits: width of a code: 1, 2, 4 or 8.
        group_size: weights along K that share a scale.
        codebooks: codebooks, each of N / codebooks consecutive rows.
        x_dtype, scale_dtype, out_dtype: of x, of the scales, of y.
        bias_dtype: None without a bias.
        uniform: the values of each codebook are evenly spaced, see `fdk_jax.QuantisedTensor`.
        squares: if not zero, x is to be divided by its root mean square; the launch before has left the sum
            of the squares in so many parts.
        norm_eps: what is added to that mean.
        residual: the product is added to a residual, and leaves what the next one's norm needs.
        devices: whose products are summed up before that, through `mailbox`es, if there are several.
        arithmetic: "exact"; or "int8": x and the weight may be rounded to integers, see `mosaic_integers`.
    """

    m: int
    n: int
    k: int
    bits: int
    group_size: int
    codebooks: int
    x_dtype: Any
    scale_dtype: Any
    bias_dtype: Any
    out_dtype: Any
    uniform: bool = False
    squares: int = 0
    norm_eps: float = 0.0
    residual: bool = False
    devices: int = 1
    arithmetic: str = "exact"

    @classmethod
    def of(
        cls,
        arrays: Arrays,
        *,
        bits: int,
        group_size: int,
        out_features: int,
        uniform: bool = False,
        out_dtype: Any = None,
        arithmetic: str = "exact",
    ) -> "Case":
        """The case of arrays, or of their shapes and dtypes; stacked weights count as one matrix.

        Args:
            arrays: x, the weight and the bias; with stacked weights [E, ...] x has the rows of all.
            bits: see the attributes.
            group_size: see the attributes.
            out_features: N.
            uniform: see the attributes.
            out_dtype: None for the dtype of x.
            arithmetic: see the attributes.
        """
        stacked = arrays.packed.shape[0] if len(arrays.packed.shape) == 6 else 1
        return cls(
            m=arrays.x.shape[0],
            n=out_features,
            k=arrays.x.shape[1],
            bits=bits,
            group_size=group_size,
            codebooks=arrays.codebook.size // max(1, stacked) // 2**bits,
            x_dtype=arrays.x.dtype,
            scale_dtype=arrays.scales.dtype,
            bias_dtype=None if arrays.bias is None else arrays.bias.dtype,
            out_dtype=jnp.dtype(arrays.x.dtype if out_dtype is None else out_dtype),
            uniform=uniform,
            arithmetic=arithmetic,
        )

    @property
    def operands(self) -> tuple[str, ...]:
        """Names of the operands of a kernel's PTX, then of its results, in order from $1."""
        bias = ("bias",) * (self.bias_dtype is not None)
        squares = ("squares",) * (self.squares > 0)
        arrays = ("x", "packed", "scales", "codebook", *bias, *squares)
        if self.residual:
            peers = ("mailbox", "addresses") * (self.devices > 1)
            return (*arrays, "residual", "norm_scale", *peers, "sum", "scaled", "squares_out")
        return (*arrays, "y")

    @property
    def out_bytes(self) -> int:
        """Bytes of a result."""
        return jnp.dtype(self.out_dtype).itemsize

    @property
    def planes(self) -> int:
        """E, planes of 64 weights a tile."""
        return layout.planes(self.bits)

    @property
    def parts(self) -> int:
        """Parts of a tile: of each a lane loads 16 bytes."""
        return layout.parts(self.bits)

    @property
    def tile_bytes(self) -> int:
        """Bytes of a tile's codes."""
        return self.parts * PART_BYTES

    @property
    def computes_values(self) -> bool:
        """Whether kernels compute values instead of looking them up, of uniform codebooks; slower at 2 bits."""
        return self.uniform and self.bits in decoding.COMPUTED

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
    def scale_fours(self) -> int:
        """Fours of groups along K, as the planar layout stores scales."""
        groups = -(-self.blocks * self.span // self.group_size)
        return -(-groups // SCALE_GROUPS)

    def unsupported_reason(
        self, config: Any, target: Target, shared_bytes: Callable[[], int]
    ) -> str | None:
        """Why a kernel on tensor cores does not take it, or None.

        Args:
            config: the kernel's launch configuration; `rows` are the rows of the weight a program.
            target: the GPU.
            shared_bytes: gives the shared memory of a program, where nothing else stands against the case.
        """
        if target.unknown:
            return target.unknown
        if config.cluster > 1 and not target.has_clusters:
            return f"{target.architecture} has no clusters of thread blocks, {config} needs them"
        if self.x_dtype not in (jnp.bfloat16, jnp.float16):
            return f"x is {self.x_dtype}, the tensor cores' inputs are bfloat16 or float16"
        if self.group_size % 8:
            return f"group_size={self.group_size} is no multiple of 8"
        if self.codebooks > 1 and (self.n // self.codebooks) % config.rows:
            return f"{self.codebooks} codebooks do not change at multiples of {config.rows} rows"
        return target.lacks_shared_memory(config, shared_bytes())

    def pad(self, x: Array) -> Array:
        """X [M, K] with zeros after K, to whole tiles."""
        padding = self.blocks * self.span - x.shape[1]
        return jnp.pad(x, ((0, 0), (0, padding))) if padding else x

    def launch(
        self,
        source: str,
        arrays: Arrays,
        target: Target,
        *,
        grid: tuple[int, int],
        warps: int,
        cluster: int = 1,
        name: str,
        others: tuple[Array, ...] = (),
        squares: int = 0,
    ) -> tuple[Array, ...]:
        """X times the transpose of the weight by a kernel's PTX: the results that `operands` names.

        Args:
            source: the PTX.
            arrays: x and what `matmul` has.
            target: the GPU that the PTX is written for.
            grid: programs.
            warps: warps a program.
            cluster: programs of a thread block cluster.
            name: of the kernel.
            others: the operands after the bias.
            squares: how many the kernel leaves, if there is a residual.
        """
        operands = (self.pad(arrays.x), *arrays[1:4])
        if arrays.bias is not None:
            operands += (arrays.bias,)
        row = jax.ShapeDtypeStruct((self.m, self.n), self.out_dtype)
        outputs = (row,)
        if self.residual:
            outputs = (row, row, jax.ShapeDtypeStruct((squares,), jnp.float32))
        return xla_call.ptx_call(
            source,
            operands + others,
            outputs,
            target,
            grid=grid,
            num_warps=warps,
            cluster=cluster,
            name=name,
        )
