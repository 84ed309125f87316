"""Codes of a block of columns, chosen one after another: the inner loop of error correction and of sweeps.

XLA runs a loop over columns as some launches for each; here the loop is inside of one. The plain twin is the
loop in `fdk_jax.learning.rounding`, which serves larger codebooks and other devices.

Glossary: a block has B columns of the weight, which lie along the first axis; N rows of the weight, along the
second; each program has R of these, and all columns.
"""

import functools

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl

from pallas_kernels import triton_compat
from pallas_kernels.target import Target

_ROWS = 32
_LEVELS = 16  # each is compared with every weight


def unsupported_reason(levels: int, gpu: Target) -> str | None:
    """Why `rounded` does not run on a GPU with so many levels, or None."""
    if gpu.no_pallas:
        return gpu.no_pallas
    return f"{levels} levels are more than {_LEVELS}" if levels > _LEVELS else None


def rounded(
    state: Array,
    old: Array | None,
    scales: Array,
    inner: Array,
    levels: Array,
    middle: Array,
    *,
    interpret: bool = False,
) -> tuple[Array, Array]:
    """The loop over the columns of one block.

    Without `old`, columns are rounded, and errors spread over those to come (GPTQ): column i becomes the
    nearest level times its scale, and state -= inner[i]^T error with error = (state[i] - that) / inner[i, i].
    With `old`, state is half the negative gradient: column i becomes what is nearest to
    old[i] + state[i] / inner[i, i], and state -= inner[i]^T (new - old[i]).

    Args:
        state: float32 [B, N].
        old: float32 [B, N], the values before; or None.
        scales: float32 [B, N].
        inner: float32 [B, B].
        levels: float32 [E], ascending.
        middle: float32 [E - 1], between which codes change: a code is the number of them below a quotient.
        interpret: run in Pallas' interpreter.

    Returns:
        (float32 [B, N], int32 [B, N]): the errors, or with `old` the new values; and the codes.
    """
    shape = state.shape
    given = (state, scales) if old is None else (state, scales, old)
    return pl.pallas_call(
        functools.partial(_kernel, descends=old is not None),
        grid=(pl.cdiv(shape[1], _ROWS),),
        out_shape=(
            jax.ShapeDtypeStruct(shape, jnp.float32),
            jax.ShapeDtypeStruct(shape, jnp.int32),
        ),
        compiler_params=triton_compat.compiler_params(num_warps=4, num_stages=1),
        interpret=interpret,
        name="fdk_columns",
    )(inner, levels, middle, *given)


def _kernel(inner_ref, levels_ref, middle_ref, state_ref, scales_ref, *refs, descends: bool):
    # inner :: [B, B], levels :: [E], middle :: [E - 1], all else :: [B, N]
    columns, n = state_ref.shape
    out_ref, codes_ref = refs[-2:]
    column = jnp.arange(columns)
    row = pl.program_id(0) * _ROWS + jnp.arange(_ROWS)
    mask = row < n
    levels = [levels_ref[i] for i in range(levels_ref.shape[0])]
    middle = [middle_ref[i] for i in range(middle_ref.shape[0])]

    def load(ref, i: Array, other: float) -> Array:
        return triton_compat.load(ref.at[i, row], mask=mask, other=other)

    def step(i: Array, state: Array) -> Array:
        here = jnp.sum(jnp.where((column == i)[:, None], state, 0.0), axis=0)
        weight = triton_compat.load(inner_ref.at[i, column])
        pivot = triton_compat.load(inner_ref.at[i, i])
        scale = load(scales_ref, i, 1.0)
        before = load(refs[0], i, 0.0) if descends else jnp.zeros_like(here)
        wanted = before + here / pivot if descends else here
        quotient = wanted / scale
        code = jnp.zeros(quotient.shape, jnp.int32)
        value = jnp.full(quotient.shape, levels[0], jnp.float32)
        for edge, level in zip(middle, levels[1:], strict=True):
            above = quotient > edge
            code += above.astype(jnp.int32)
            value = jnp.where(above, level, value)
        new = scale * value
        change = new - before if descends else (wanted - new) / pivot
        triton_compat.store(out_ref.at[i, row], new if descends else change, mask=mask)
        triton_compat.store(codes_ref.at[i, row], code, mask=mask)
        return state - weight[:, None] * change[None, :]

    whole = state_ref.at[column[:, None], row[None, :]]
    start = triton_compat.load(whole, mask=mask[None, :], other=0.0)
    jax.lax.fori_loop(0, columns, step, start)
