"""Scales and codes chosen for the error that they cause, given a codebook.

Glossary (one matrix): weight float32 [N, K]; scales float32 [N, ceil(K / G)] on the grid of the compute
dtype; codebook float32 [2**bits] or [C, 2**bits]; importance float32 [N, K] or [1, K]; second float32
[K, K], the mean of x x^T over inputs x, so that the error of the output is

    E |(W - Q) x|**2 = trace((W - Q) second (W - Q)^T)
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from fdk_jax.format.dequantisation import lookup, round_to, spread
from fdk_jax.format.quantisation import middle_of, nearest_codes
from fdk_jax.learning import compiling
from pallas_kernels import columns as columns_kernel
from pallas_kernels import target

# Multiples of the rule's scale that the search tries; 1 is one of them.
_MULTIPLES = np.round(np.arange(0.4, 1.6001, 0.025), 3)
# Steps from there to where the levels span a group, where that is further: those of absmean scales may be.
_STRIDES = np.arange(1, 13) / 12
_REFITS = 2
_BLOCK = 128
# Values of float32 that a search or a system may have in memory at a time. A GPU needs large pieces to be busy.
_ELEMENTS = {"gpu": 2**27}
_FEW_ELEMENTS = 2**24
EXACT = jax.lax.Precision.HIGHEST


def elements() -> int:
    """How many values of float32 may be in memory at a time."""
    return _ELEMENTS.get(jax.default_backend(), _FEW_ELEMENTS)


def grouped(matrix: Array, group_size: int) -> Array:
    """[N, K] -> [N, ceil(K / G), G], zeros at the end; a group that is longer than K is cut."""
    n, k = matrix.shape
    group_size = max(1, min(group_size, k))
    padded = jnp.pad(matrix, ((0, 0), (0, -k % group_size)))
    return padded.reshape(n, -1, group_size)


def search_scales(
    weight: Array,
    base: Array,
    codebook: Array,
    importance: Array | None,
    *,
    group_size: int,
    dtype: Any,
) -> Array:
    """The scale of each group that has the least weighted squared error.

        minimises sum_k importance_k * (w_k - s * codebook[q_k(s)])**2

    Tries multiples of a base scale, and what lies between them and scales with which the levels span a group;
    then solves for the best scale of the codes that were found.

    Args:
        weight: float32 [N, K].
        base: float32 [N, ceil(K / G)], e.g. absmax.
        codebook: float32 [2**bits] or [C, 2**bits].
        importance: float32 [N, K] or [1, K]; None for ones.
        group_size: G.
        dtype: compute dtype, on whose grid scales lie.

    Returns:
        float32 [N, ceil(K / G)]; the error of each group is at most that of its base scale.
    """
    importance = jnp.ones((1, weight.shape[1]), jnp.float32) if importance is None else importance
    search = functools.partial(_search, group_size=group_size, dtype=jnp.dtype(dtype))
    rows = codebook.reshape(-1, codebook.shape[-1])
    step = weight.shape[0] // rows.shape[0]
    # Rows that share a codebook, in pieces that fit into memory.
    piece = max(1, min(step, elements() // max(1, weight.shape[1])))
    parts = []
    for start in range(0, weight.shape[0], step):
        for low in range(start, start + step, piece):
            cut = slice(low, min(low + piece, start + step))
            h = importance[cut] if importance.shape[0] > 1 else importance
            parts.append(search(weight[cut], base[cut], rows[start // step], h))
    return jnp.concatenate(parts)


@functools.partial(jax.jit, static_argnames=("group_size", "dtype"))
def _search(weight, base, codebook, importance, *, group_size, dtype) -> Array:
    w = grouped(weight, group_size)
    h = grouped(jnp.broadcast_to(importance, weight.shape), group_size)
    levels = round_to(codebook, dtype)

    def decode(scales: Array) -> Array:
        quotients = w / scales[..., None]
        flat = quotients.reshape(w.shape[0], -1)
        return lookup(nearest_codes(flat, levels, jnp.float32), levels).reshape(w.shape)

    def error(scales: Array) -> Array:
        return jnp.sum(h * jnp.square(w - scales[..., None] * decode(scales)), axis=-1)

    def keep_better(best: tuple[Array, Array], scales: Array) -> tuple[Array, Array]:
        scales = round_to(scales, dtype)
        scales = jnp.where((scales > 0) & jnp.isfinite(scales), scales, best[0])
        new = error(scales)
        better = new < best[1]
        return jnp.where(better, scales, best[0]), jnp.where(better, new, best[1])

    def try_multiple(best, multiple):
        return keep_better(best, base * multiple), None

    best = jax.lax.scan(try_multiple, (base, error(base)), jnp.asarray(_MULTIPLES, jnp.float32))[0]
    spanning = jnp.abs(w).max(-1) / jnp.maximum(jnp.abs(levels).max(), jnp.finfo(jnp.float32).tiny)
    for edge, multiple, further in (
        (base * _MULTIPLES[-1], 1.0, jnp.maximum),
        (base * _MULTIPLES[0], _MULTIPLES[0], jnp.minimum),
    ):
        end = further(edge, spanning * jnp.float32(multiple))

        def go(best, edge=edge, end=end):
            def stride(best, part):
                return keep_better(best, edge * (end / edge) ** part), None

            return jax.lax.scan(stride, best, jnp.asarray(_STRIDES, jnp.float32))[0]

        best = jax.lax.cond(jnp.any(end != edge), go, lambda best: best, best)
    for _ in range(_REFITS):
        c = decode(best[0])
        square = jnp.sum(h * c * c, axis=-1)
        fit = jnp.sum(h * w * c, axis=-1) / jnp.where(square > 0, square, 1)
        best = keep_better(best, fit)
    return best[0]


@functools.partial(jax.jit, static_argnames=("group_size", "dtype"))
def nearest(weight: Array, scales: Array, codebook: Array, *, group_size: int, dtype: Any) -> Array:
    """uint8 [N, K]: the code of the nearest level, a tie to the lower one."""
    quotients = weight / spread(scales, group_size, weight.shape[1])
    return nearest_codes(quotients, round_to(codebook, dtype), jnp.float32)


def corrected(
    weight: Array,
    scales: Array,
    codebook: Array,
    second: Array,
    *,
    group_size: int,
    dtype: Any,
    damping: float = 0.05,
) -> Array:
    """Codes that make up for each other's errors, as in GPTQ (Frantar et al., arXiv 2210.17323).

    Inputs are taken one by one, those of the largest second moment first; the error of rounding a column
    is spread over the columns still to come so that the error of the output stays least. As scales are fixed
    beforehand, the order is free of the groups. Here the levels are those of any codebook.

    Args:
        weight: float32 [N, K].
        scales: float32 [N, ceil(K / G)].
        codebook: float32 [2**bits] or [C, 2**bits].
        second: float32 [K, K].
        group_size: G.
        dtype: compute dtype of the levels.
        damping: this part of the mean of the diagonal is added to the diagonal.

    Returns:
        uint8 [N, K].

    Raises:
        ValueError: a matrix of second moments that is not positive definite however damped.
    """
    for factor in (1, 10, 100):
        root = _inverse_root(second, jnp.float32(damping * factor))
        if bool(jnp.isfinite(root[0]).all()):
            break
    else:
        raise ValueError(
            f"second moments are not positive definite even with damping={damping * 100}"
        )
    return _corrected(
        weight,
        scales,
        codebook,
        *root,
        group_size=group_size,
        dtype=jnp.dtype(dtype),
        fused=_fused(weight, codebook),
    )


def _fused(weight: Array, codebook: Array) -> bool:
    """Whether a kernel has the loop over the columns of a block."""
    (device, *_) = weight.devices()
    if codebook.ndim != 1 or device.platform != "gpu":
        return False
    return columns_kernel.unsupported_reason(codebook.size, target.current()) is None


@jax.jit
def _inverse_root(second: Array, damping: Array) -> tuple[Array, Array]:
    """(upper U with U^T U = inverse of the damped matrix in a new order, the order)."""
    diagonal = jnp.diagonal(second)
    order = jnp.argsort(-diagonal, stable=True)
    second = second[order][:, order]
    floor = damping * diagonal.mean()
    second = second + jnp.diag(jnp.broadcast_to(floor, diagonal.shape))
    # The Cholesky factor of the reversed matrix, reversed again, is an upper R with second = R R^T;
    # so U is its inverse: one factorisation and no explicit inverse of the matrix.
    upper = jnp.linalg.cholesky(second[::-1, ::-1])[::-1, ::-1]
    identity = jnp.eye(len(diagonal), dtype=jnp.float32)
    return jax.scipy.linalg.solve_triangular(upper, identity, lower=False), order


@functools.partial(
    jax.jit, static_argnames=("group_size", "dtype", "fused"), compiler_options=compiling.OPTIONS
)
def _corrected(weight, scales, codebook, root, order, *, group_size, dtype, fused) -> Array:
    n, k = weight.shape
    levels = round_to(codebook, dtype)
    pad = -k % _BLOCK
    # Columns become rows: each step reads and writes contiguous memory. Padding is inert: zero weights,
    # an identity in the root.
    columns = jnp.pad(weight.T[order], ((0, pad), (0, 0)))
    factors = jnp.pad(
        spread(scales, group_size, k).T[order], ((0, pad), (0, 0)), constant_values=1.0
    )
    root = jnp.pad(root, ((0, pad), (0, pad)))
    root = root + jnp.diag((jnp.arange(k + pad) >= k).astype(jnp.float32))

    def block(b, carry):
        columns, codes = carry
        start = b * _BLOCK
        part = jax.lax.dynamic_slice_in_dim(columns, start, _BLOCK)
        scale = jax.lax.dynamic_slice_in_dim(factors, start, _BLOCK)
        rows = jax.lax.dynamic_slice_in_dim(root, start, _BLOCK)
        inner = jax.lax.dynamic_slice_in_dim(rows, start, _BLOCK, axis=1)

        def column(i, state):
            part, errors, found = state
            w, s = part[i], scale[i]
            code = nearest_codes((w / s)[:, None], levels, jnp.float32)
            q = s * lookup(code, levels)[:, 0]
            error = (w - q) / inner[i, i]
            part = part - inner[i][:, None] * error[None]
            return part, errors.at[i].set(error), found.at[i].set(code[:, 0])

        if fused:
            errors, found = columns_kernel.rounded(
                part, None, scale, inner, levels, middle_of(levels)
            )
            found = found.astype(jnp.uint8)
        else:
            zeros = jnp.zeros((_BLOCK, n), jnp.float32)
            _, errors, found = jax.lax.fori_loop(
                0, _BLOCK, column, (part, zeros, jnp.zeros((_BLOCK, n), jnp.uint8))
            )
        # The root is upper triangular: columns before the block get zeros.
        columns = columns - jnp.matmul(rows.T, errors, precision=EXACT)
        return columns, jax.lax.dynamic_update_slice_in_dim(codes, found, start, 0)

    codes = jnp.zeros((k + pad, n), jnp.uint8)
    codes = jax.lax.fori_loop(0, (k + pad) // _BLOCK, block, (columns, codes))[1]
    return jnp.zeros((k, n), jnp.uint8).at[order].set(codes[:k]).T


def descend(
    weight: Array,
    codes: Array,
    scales: Array,
    codebook: Array,
    second: Array,
    *,
    group_size: int,
    dtype: Any,
    damping: float = 0.05,
) -> Array:
    """One sweep of coordinate descent: each code becomes the best one for all others as they are by then.

    The output error (with damped second moments) never rises. What `corrected` leaves is not a minimum of this
    kind: it never returns to a column.

    Args:
        weight: float32 [N, K].
        codes: uint8 [N, K].
        scales: float32 [N, ceil(K / G)].
        codebook: float32 [2**bits] or [C, 2**bits].
        second: float32 [K, K].
        group_size: G.
        dtype: compute dtype of the levels.
        damping: this part of the mean of the diagonal is added to the diagonal.

    Returns:
        uint8 [N, K].
    """
    return _descend(
        weight,
        codes,
        scales,
        codebook,
        second,
        jnp.float32(damping),
        group_size=group_size,
        dtype=jnp.dtype(dtype),
        fused=_fused(weight, codebook),
    )


@functools.partial(
    jax.jit, static_argnames=("group_size", "dtype", "fused"), compiler_options=compiling.OPTIONS
)
def _descend(
    weight, codes, scales, codebook, second, damping, *, group_size, dtype, fused
) -> Array:
    k = weight.shape[1]
    levels = round_to(codebook, dtype)
    diagonal = jnp.diagonal(second)
    floor = damping * diagonal.mean()
    pad = -k % _BLOCK
    # Columns become rows, see `_corrected`. Padding is inert: no second moments but those of itself.
    second = second + jnp.diag(jnp.broadcast_to(floor, diagonal.shape))
    second = jnp.pad(second, ((0, pad), (0, pad)))
    second = second + jnp.diag((jnp.arange(k + pad) >= k).astype(jnp.float32))
    factors = jnp.pad(spread(scales, group_size, k).T, ((0, pad), (0, 0)), constant_values=1.0)
    values = factors * jnp.pad(lookup(codes, levels).T, ((0, pad), (0, 0)))
    columns = jnp.pad(weight.T, ((0, pad), (0, 0)))
    codes = jnp.pad(codes.T, ((0, pad), (0, 0)))

    def block(b, carry):
        values, codes = carry
        start = b * _BLOCK
        rows = jax.lax.dynamic_slice_in_dim(second, start, _BLOCK)
        inner = jax.lax.dynamic_slice_in_dim(rows, start, _BLOCK, axis=1)
        scale = jax.lax.dynamic_slice_in_dim(factors, start, _BLOCK)
        pull = jnp.matmul(rows, columns - values, precision=EXACT)  # half the negative gradient
        part = jax.lax.dynamic_slice_in_dim(values, start, _BLOCK)
        found = jax.lax.dynamic_slice_in_dim(codes, start, _BLOCK)

        def column(i, state):
            pull, part, found = state
            best = part[i] + pull[i] / inner[i, i]
            code = nearest_codes((best / scale[i])[:, None], levels, jnp.float32)
            new = scale[i] * lookup(code, levels)[:, 0]
            pull = pull - inner[i][:, None] * (new - part[i])[None]
            return pull, part.at[i].set(new), found.at[i].set(code[:, 0])

        if fused:
            part, new = columns_kernel.rounded(pull, part, scale, inner, levels, middle_of(levels))
            found = new.astype(jnp.uint8)
        else:
            _, part, found = jax.lax.fori_loop(0, _BLOCK, column, (pull, part, found))
        return (
            jax.lax.dynamic_update_slice_in_dim(values, part, start, 0),
            jax.lax.dynamic_update_slice_in_dim(codes, found, start, 0),
        )

    return jax.lax.fori_loop(0, (k + pad) // _BLOCK, block, (values, codes))[1][:k].T
