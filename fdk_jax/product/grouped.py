"""`grouped_matmul`: consecutive runs of rows, each times a quantised matrix of its own (mixtures of experts).

Glossary: M rows of x in E runs, `group_sizes` of them long; T rows a tile. A tile holds rows of one run only.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.core import Tracer

import pallas_kernels
from fdk_jax.format import packing
from fdk_jax.format.quantised_tensor import FLOAT_DTYPES, QuantisedTensor
from fdk_jax.product import dispatch, reference
from fdk_jax.product.choice import LAYOUT_OF
from fdk_jax.product.reverse_mode import reverse_only
from pallas_kernels.case import Arrays

if TYPE_CHECKING:
    from jaxtyping import Float, Integer

_FEWEST_ROWS, _MOST_ROWS = 8, 512  # of a tile


def grouped_matmul(
    x: Float[Array, "M K"],
    w: QuantisedTensor,
    group_sizes: Integer[Array, " E"],
    *,
    backend: str | None = None,
    bias: Float[Array, "E N"] | None = None,
    out_dtype: Any = None,
) -> Float[Array, "M N"]:
    """Multiplies each run of consecutive rows by the quantised matrix of its group.

        y[i] = x[i] @ w[e].T + bias[e],  e = the group of row i

    As `jax.lax.ragged_dot`, with packed weights. On a Hopper GPU one launch multiplies all groups; elsewhere a
    matrix is dequantised only while its rows are multiplied, so that memory does not grow with E. Groups
    without rows cost nothing. Differentiable in reverse mode with respect to x, bias, and the scales and
    codebooks of w, as `matmul` is.

    Args:
        x: bfloat16, float16 or float32 [M, K], sorted by group.
        w: stacked matrices, batch shape (E,); `fdk_jax.prepare` puts them into a kernel's layout.
        group_sizes: integers [E], rows of each group. They add up to at most M; rows past their sum get 0.
        backend: see `fdk_jax.matmul`.
        bias: [E, N], added in float32; or None.
        out_dtype: dtype of y; None for the dtype of x.

    Returns:
        y [M, N].

    Raises:
        TypeError: x, w, group_sizes or bias is of the wrong type or dtype.
        ValueError: shapes that do not fit; sizes that are negative or too large (checked outside jit; inside,
            a negative size counts as 0, and rows that x lacks are left out).
        NotImplementedError: the backend cannot do this case.
    """
    out_dtype = _check(x, w, group_sizes, backend, bias, out_dtype)
    if backend is not None and w.layout != LAYOUT_OF[backend]:
        w = dispatch.prepare_tensor(w, backend)
    y = jnp.zeros((x.shape[0], w.out_features), out_dtype)
    if y.size == 0 or w.batch_shape[0] == 0:
        return y
    x, w, bias = reverse_only(x), reverse_only(w), reverse_only(bias)
    return _differentiable(backend, out_dtype, x, w, group_sizes.astype(jnp.int32), bias)


def _check(x, w, group_sizes, backend, bias, out_dtype) -> Any:
    """Refuses what cannot be multiplied; returns the dtype of y."""
    if not isinstance(w, QuantisedTensor):
        raise TypeError(
            f"w must be a QuantisedTensor, got {type(w).__name__}; see fdk_jax.quantise"
        )
    w.validate()
    if len(w.batch_shape) != 1:
        raise ValueError(f"{w} must be stacked along one axis, its batch shape is {w.batch_shape}")
    if not hasattr(x, "dtype") or x.dtype not in FLOAT_DTYPES:
        kind = getattr(x, "dtype", type(x).__name__)
        raise TypeError(f"x must be a bfloat16, float16 or float32 array, got {kind}; cast it")
    if x.ndim != 2 or x.shape[1] != w.in_features:
        raise ValueError(f"{x.shape=} must be [M, K] with K={w.in_features} of {w}")
    groups, kind = w.batch_shape[0], getattr(group_sizes, "dtype", None)
    if kind is None or not jnp.issubdtype(kind, jnp.integer):
        found = type(group_sizes).__name__ if kind is None else kind
        raise TypeError(f"group_sizes must be an array of integers, got {found}")
    if group_sizes.shape != (groups,):
        raise ValueError(f"{group_sizes.shape=} must be ({groups},), one size for each matrix")
    known = groups > 0 and not isinstance(group_sizes, Tracer)
    if known and (int(group_sizes.min()) < 0 or int(group_sizes.sum()) > x.shape[0]):
        raise ValueError(
            f"{group_sizes=} must not be negative, and add up to at most {x.shape[0]} rows of x"
        )
    shape = groups, w.out_features
    if bias is not None and (not hasattr(bias, "dtype") or bias.dtype not in FLOAT_DTYPES):
        kind = getattr(bias, "dtype", type(bias).__name__)
        raise TypeError(f"bias must be a float array, got {kind}")
    if bias is not None and bias.shape != shape:
        raise ValueError(f"{bias.shape=} must be {shape}, a row for each matrix")
    out_dtype = jnp.dtype(x.dtype if out_dtype is None else out_dtype)
    if out_dtype not in FLOAT_DTYPES:
        raise TypeError(f"out_dtype must be bfloat16, float16 or float32, got {out_dtype}")
    dispatch.check_available(backend, x)
    return out_dtype


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _differentiable(backend, out_dtype, x, w, group_sizes, bias) -> Array:
    one_by_one = functools.partial(_one_by_one, backend, out_dtype)
    operands = x, w, group_sizes, bias
    if w.layout != "planar" or backend not in (None, "pallas") or dispatch.interpreted():
        return one_by_one(*operands)
    arrays = Arrays(x, w.packed, w.scales, w.codebook, bias)
    spec: dict[str, Any] = dict(
        bits=w.bits, group_size=w.group_size, out_features=w.out_features, out_dtype=out_dtype
    )
    if pallas_kernels.grouped_unsupported_reason(arrays, **spec) is not None:
        return one_by_one(*operands)

    def together(x, w, group_sizes, bias) -> Array:
        arrays = Arrays(x, w.packed, w.scales, w.codebook, bias)
        return pallas_kernels.grouped_matmul(arrays, group_sizes, **spec)

    if backend == "pallas":
        return together(*operands)
    return jax.lax.platform_dependent(*operands, cuda=together, default=one_by_one)


def _one_by_one(backend, out_dtype, x, w, group_sizes, bias) -> Array:
    """A product for each tile of rows: any backend, any case."""

    def product(tile: Array, matrix: tuple[QuantisedTensor, Array | None]) -> Array:
        one, b = matrix
        return dispatch.matmul(tile, one, backend=backend, bias=b, out_dtype=out_dtype)

    return _over_tiles(product, x, (w, bias), group_sizes, w.out_features, out_dtype)


def _forward(backend, out_dtype, x, w, group_sizes, bias):
    y = _differentiable(backend, out_dtype, x, w, group_sizes, bias)
    return y, (x, w, group_sizes, bias)


def _backward(backend, out_dtype, residuals, g):
    x, w, group_sizes, bias = residuals

    def transposed(tile: Array, one: QuantisedTensor) -> Array:
        x_tile = jnp.zeros((tile.shape[0], w.in_features), x.dtype)
        product = functools.partial(dispatch.matmul, w=one, backend=backend, out_dtype=out_dtype)
        return jax.vjp(product, x_tile)[1](tile)[0]

    dx = _over_tiles(transposed, g, w, group_sizes, w.in_features, x.dtype)
    # Compilers drop the gradients that nobody asks for.
    dw = _weight_gradients(x, g, w, group_sizes)
    if bias is not None:
        _, ends = _ranges(group_sizes, g.shape[0])
        group = jnp.searchsorted(ends, jnp.arange(g.shape[0]), side="right")
        bias = jax.ops.segment_sum(g.astype(jnp.float32), group, bias.shape[0]).astype(bias.dtype)
    return dx, dw, None, bias


def _weight_gradients(
    x: Array, g: Array, w: QuantisedTensor, group_sizes: Array
) -> QuantisedTensor:
    """Gradients with respect to the scales and codebooks of all groups, the codes staying as they are."""
    matrices = w.to_layout("interchange")
    count, tile_rows, tile_at = _tiles(group_sizes, x.shape[0])
    widths = dict(bits=w.bits, group_size=w.group_size, in_features=w.in_features)

    def step(state: tuple[Array, tuple[Array, Array]]) -> tuple[Array, tuple[Array, Array]]:
        i, sums = state
        group, first, _, new = tile_at(i)
        one = _matrix(matrices, group)
        x_tile, g_tile = (jax.lax.dynamic_slice_in_dim(a, first, tile_rows) for a in (x, g))
        g_tile = jnp.where(new[:, None], g_tile, 0).astype(jnp.float32)
        wide = one.scales.astype(jnp.float32)
        parts = reference.weight_gradients(x_tile, g_tile, one.packed, wide, one.codebook, **widths)
        return i + 1, (sums[0].at[group].add(parts[0]), sums[1].at[group].add(parts[1]))

    start = jnp.zeros(matrices.scales.shape, jnp.float32), jnp.zeros_like(w.codebook)
    sums = jax.lax.while_loop(lambda s: s[0] < count, step, (jnp.zeros_like(count), start))[1]
    scales = sums[0].astype(w.dtype)
    _, scales = packing.convert(matrices.packed, scales, "interchange", w.layout, **w.spec)
    none = np.zeros(w.packed.shape, jax.dtypes.float0)
    return dataclasses.replace(w, packed=none, scales=scales, codebook=sums[1])


_differentiable.defvjp(_forward, _backward)


def _ranges(group_sizes: Array, rows: int) -> tuple[Array, Array]:
    """The first row of each group, and the row after its last one."""
    sizes = jnp.maximum(group_sizes, 0)
    ends = jnp.minimum(jnp.cumsum(sizes), rows)
    return jnp.concatenate([jnp.zeros((1,), ends.dtype), ends[:-1]]), ends


def _tiles(group_sizes: Array, rows: int) -> tuple[Array, int, Callable]:
    """(how many tiles, their rows, what tile i is): each holds rows of one group only.

    Tile i is (group, first row, bool [T]: is a row the group's, bool [T]: and in no tile before), since a tile
    that would end past the last row starts earlier.
    """
    # Twice as many as a group has on average: most groups take one tile.
    tile_rows = min(rows, max(_FEWEST_ROWS, min(_MOST_ROWS, 2 * rows // group_sizes.shape[0])))
    starts, ends = _ranges(group_sizes, rows)
    tile_ends = jnp.cumsum(-(-(ends - starts) // tile_rows))

    def tile_at(i: Array) -> tuple[Array, Array, Array, Array]:
        group = jnp.searchsorted(tile_ends, i, side="right")
        tile = i - jnp.where(group > 0, tile_ends[group - 1], 0)
        begin = starts[group] + tile * tile_rows
        first = jnp.minimum(begin, rows - tile_rows)
        index = first + jnp.arange(tile_rows)
        inside = (index >= starts[group]) & (index < ends[group])
        return group, first, inside, inside & (index >= begin)

    return tile_ends[-1], tile_rows, tile_at


def _matrix(matrices: Any, group: Array) -> Any:
    return jax.tree.map(lambda a: jax.lax.dynamic_index_in_dim(a, group, keepdims=False), matrices)


def _over_tiles(product, x: Array, matrices: Any, group_sizes: Array, width: int, dtype) -> Array:
    """`product` of the rows of each group with its slice of `matrices`, a tile at a time: [M, width].

    The number of tiles depends on the sizes of the groups, the shape of one does not.
    """
    count, tile_rows, tile_at = _tiles(group_sizes, x.shape[0])

    def step(state: tuple[Array, Array]) -> tuple[Array, Array]:
        i, y = state
        group, first, inside, _ = tile_at(i)
        x_tile = jax.lax.dynamic_slice_in_dim(x, first, tile_rows)
        result = product(x_tile, _matrix(matrices, group))
        # What a row is given twice is the same.
        before = jax.lax.dynamic_slice_in_dim(y, first, tile_rows)
        result = jnp.where(inside[:, None], result.astype(dtype), before)
        return i + 1, jax.lax.dynamic_update_slice_in_dim(y, result, first, axis=0)

    start = jnp.zeros_like(count), jnp.zeros((x.shape[0], width), dtype)
    return jax.lax.while_loop(lambda state: state[0] < count, step, start)[1]
