"""Every use of Pallas' Triton module: the one file that changes when JAX moves it, or takes it away.

It is deprecated since JAX 0.11.0. What needs it, and what there is instead where `AVAILABLE` is false:

- `inline_call`, a block of PTX inside of a Triton kernel: XLA's own call for a whole kernel, see `xla_call`;
- `plain`, products in ordinary Pallas operations: XLA decodes, then dots;
- `dense`, `norm`, `columns` (of calibration): XLA's own;
- `attention` that `short_attention` and `split_attention`, which are PTX, do not take: XLA's own.
"""

import warnings
from collections.abc import Mapping
from typing import Any

import jax
from jax import Array
from jax._src import core as jax_core
from jax._src import state
from jax.experimental import pallas as pl

try:
    from jax._src.lib.mlir import ir
    from jax._src.lib.triton import dialect as tt_dialect
    from jax._src.pallas.triton import lowering
    from jax.experimental.pallas import triton as _triton
except ImportError:
    AVAILABLE = False
else:
    AVAILABLE = True
    load = _triton.load
    store = _triton.store

# JAX warns when a program is lowered, so the filter has to stay; it names just this message.
warnings.filterwarnings(
    "ignore", message="The Pallas Triton backend is deprecated", category=DeprecationWarning
)


def compiler_params(*, num_warps: int, num_stages: int) -> Any:
    """Launch parameters; always given, because without them the choice of a lowering is JAX's."""
    return _triton.CompilerParams(num_warps=num_warps, num_stages=num_stages)


def inline_call(
    source: str,
    operands: tuple[Array, ...],
    outputs: tuple[jax.ShapeDtypeStruct, ...],
    *,
    grid: tuple[int, ...],
    num_warps: int,
    name: str,
    aliases: Mapping[int, int],
) -> tuple[Array, ...]:
    """Launches a block of PTX inside of a Triton kernel; see `xla_call.ptx_call`."""

    def kernel(*refs):
        _inline_ptx.bind(*refs, source=source, outputs=len(outputs))

    call = pl.pallas_call(
        kernel,
        out_shape=outputs,
        grid=grid,
        input_output_aliases=dict(aliases),
        compiler_params=compiler_params(num_warps=num_warps, num_stages=1),
        name=name,
    )
    return call(*operands)


_inline_ptx = jax_core.Primitive("fdk_inline_ptx")
_inline_ptx.multiple_results = True


@_inline_ptx.def_effectful_abstract_eval
def _inline_ptx_effects(*refs, source, outputs):
    del source
    first = len(refs) - outputs
    effects = {state.ReadEffect(i) for i in range(first)}
    return [], effects | {state.WriteEffect(i) for i in range(first, len(refs))}


def _inline_ptx_lowering(ctx, *pointers, source, outputs):
    del ctx, outputs
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


if AVAILABLE:
    lowering.register_lowering(_inline_ptx)(_inline_ptx_lowering)
