"""The plain kernel's shortest form, for Pallas' interpreter: any dtype, group size and codebook.

It decodes by looking every code up in the codebook in memory, in a loop of few operations that compiles at
once; `plain` unrolls that loop for GPUs.

Glossary: BN rows of the weight and BM rows of x a program; a tile of the planar layout
(`fdk_jax.format.packing`) holds planes of two halves of 32 weights; G weights a scale.
"""

import functools

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl

from pallas_kernels import triton_compat
from pallas_kernels.case import Arrays, Case
from pallas_kernels.layout import HALF_PLANE, scale_index

_BLOCK_N = 64
_BLOCK_M = 16


def matmul(case: Case, arrays: Arrays) -> Array:
    """X [M, K] times the transpose of a planar weight, [M, N]; see `pallas_kernels.matmul`."""
    codebook = arrays.codebook.reshape(-1, 2**case.bits)
    operands = (arrays.x, arrays.packed, arrays.scales, codebook)
    if arrays.bias is not None:
        operands += (arrays.bias,)
    return pl.pallas_call(
        functools.partial(_kernel, case),
        out_shape=jax.ShapeDtypeStruct((case.m, case.n), case.out_dtype),
        grid=(pl.cdiv(case.n, _BLOCK_N), pl.cdiv(case.m, _BLOCK_M)),
        compiler_params=triton_compat.compiler_params(num_warps=4, num_stages=1),
        interpret=True,
        name="fdk_gather",
    )(*operands)


def _kernel(case: Case, x_ref, packed_ref, scales_ref, codebook_ref, *rest):
    # x :: [M, K], packed :: [N/16, K/T, 2, 8, 32] uint16, scales :: [N/16, groups/4, 64]
    m, n, k, bits, out_ref = case.m, case.n, case.k, case.bits, rest[-1]
    rows = pl.program_id(0) * _BLOCK_N + jnp.arange(_BLOCK_N, dtype=jnp.int32)
    tokens = pl.program_id(1) * _BLOCK_M + jnp.arange(_BLOCK_M, dtype=jnp.int32)
    # Rows past N read the last one: every index below is in bounds.
    safe_rows = jnp.minimum(rows, n - 1)
    tile, row = (safe_rows >> 4)[:, None], (safe_rows & 15)[:, None]
    codebook_index = jax.lax.div(safe_rows, n // codebook_ref.shape[0])[:, None]
    halves, groups = 2 * case.planes, -(-k // case.group_size)
    h = jnp.arange(HALF_PLANE, dtype=jnp.int32)[None, :]
    columns = jnp.broadcast_to(h, (_BLOCK_N, HALF_PLANE))

    def step(i, total):
        # The code's index among the 64 bits of its lane and step; see packing.
        plane, t = (i >> 1) & (halves // 2 - 1), i & 1
        slot = ((plane * 2 + ((columns >> 1) & 1)) * 2 + (row >> 3)) * 2 + (columns & 1)
        bit = slot * bits if bits > 1 else (slot & 32) + ((slot & 31) >> 1) + ((slot & 1) << 4)
        block = jnp.broadcast_to(jax.lax.div(i, halves), tile.shape)
        word = (columns & -8) + 4 * t + 2 * ((columns >> 2) & 1) + ((bit >> 4) & 1)
        words = packed_ref[tile, block, bit >> 5, row & 7, word]
        codes = (words.astype(jnp.int32) >> (bit & 15)) & (2**bits - 1)
        values = codebook_ref[codebook_index, codes].astype(scales_ref.dtype).astype(jnp.float32)
        offsets = i * HALF_PLANE + h
        group = jnp.minimum(jax.lax.div(i * HALF_PLANE + columns, case.group_size), groups - 1)
        factors = scales_ref[tile, *scale_index(row, group)].astype(jnp.float32)
        mask = (tokens[:, None] < m) & (offsets < k)
        x = triton_compat.load(x_ref.at[tokens[:, None], offsets], mask=mask, other=0)
        weight = (values * factors).astype(x.dtype)
        return total + _dot(x, weight)

    steps = -(-k // HALF_PLANE)
    total = jax.lax.fori_loop(0, steps, step, jnp.zeros((_BLOCK_M, _BLOCK_N), jnp.float32))
    if case.bias_dtype is not None:
        total += rest[0][safe_rows].astype(jnp.float32)[None, :]
    mask = (tokens[:, None] < m) & (rows[None, :] < n)
    out = out_ref.at[tokens[:, None], rows[None, :]]
    triton_compat.store(out, total.astype(out_ref.dtype), mask=mask)


def _dot(x: Array, weight: Array) -> Array:
    precision = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    return jax.lax.dot_general(
        x,
        weight,
        (((1,), (1,)), ((), ())),
        precision=precision,
        preferred_element_type=jnp.float32,
    )
