"""Every use of Pallas' Triton module: the one file to change when JAX moves it."""

import warnings
from typing import Any

import jax
from jax import Array
from jax._src import core as jax_core
from jax._src import state
from jax._src.lib.mlir import ir
from jax._src.lib.triton import dialect as tt_dialect
from jax._src.pallas.triton import lowering
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as _triton

# Deprecated since JAX 0.11, still shipped, and what these kernels are written for. JAX warns when a program is
# lowered, so the filter has to stay; it names just this message.
warnings.filterwarnings(
    "ignore", message="The Pallas Triton backend is deprecated", category=DeprecationWarning
)

load = _triton.load
store = _triton.store


def compiler_params(*, num_warps: int, num_stages: int) -> Any:
    """Launch parameters; always given, because without them the choice of a lowering is JAX's."""
    return _triton.CompilerParams(num_warps=num_warps, num_stages=num_stages)


def ptx_call(
    source: str,
    operands: tuple[Array, ...],
    out: jax.ShapeDtypeStruct,
    *,
    grid: tuple[int, ...],
    num_warps: int,
    name: str,
) -> Array:
    """Launches a kernel whose body is one block of PTX.

    Args:
        source: the block. $1 and the following are the addresses of the operands, the last that of the
            result; $0 is scratch. `%ctaid` is the place in the grid.
        operands: arrays in device memory.
        out: shape and dtype of the result.
        grid: programs.
        num_warps: warps a program.
        name: of the kernel.
    """

    def kernel(*refs):
        _inline_ptx.bind(*refs, source=source)

    return pl.pallas_call(
        kernel,
        out_shape=out,
        grid=grid,
        compiler_params=compiler_params(num_warps=num_warps, num_stages=1),
        name=name,
    )(*operands)


_inline_ptx = jax_core.Primitive("fdk_inline_ptx")
_inline_ptx.multiple_results = True


@_inline_ptx.def_effectful_abstract_eval
def _inline_ptx_effects(*refs, source):
    del source
    last = len(refs) - 1
    effects = {state.ReadEffect(i) for i in range(last)} | {state.WriteEffect(last)}
    return [], effects


@lowering.register_lowering(_inline_ptx)
def _inline_ptx_lowering(ctx, *pointers, source):
    # All operands are scalars, so that every thread runs the block exactly once.
    tt_dialect.elementwise_inline_asm(
        [ir.IntegerType.get_signless(32)],
        source,
        constraints=",".join(["=r"] + ["l"] * len(pointers)),
        pure=False,
        packed_element=1,
        args=pointers,
    )
    return []
