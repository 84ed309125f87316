"""Every use of Pallas' Triton module: the one file to change when JAX moves it."""

import dataclasses
import re
import warnings
from collections.abc import Mapping
from typing import Any

import jax
from jax import Array
from jax._src import core as jax_core
from jax._src import state
from jax._src.interpreters import mlir
from jax._src.lib.mlir import ir
from jax._src.lib.triton import dialect as tt_dialect
from jax._src.pallas import core as pallas_core
from jax._src.pallas.triton import lowering
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as _triton

from pallas_kernels.ptx import shared_declaration
from pallas_kernels.target import H200, Target

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
    outputs: tuple[jax.ShapeDtypeStruct, ...],
    target: Target,
    *,
    grid: tuple[int, ...],
    num_warps: int,
    name: str,
    cluster: int = 1,
    aliases: Mapping[int, int] | None = None,
) -> tuple[Array, ...]:
    """Launches a kernel whose body is one block of PTX.

    Args:
        source: the block. $1 and the following are the addresses of the operands, then those of the
            results; $0 is scratch. `%ctaid` is the place in the grid.
        operands: arrays in device memory.
        outputs: shapes and dtypes of the results.
        target: the GPU that the block is written for.
        grid: programs.
        num_warps: warps a program.
        name: of the kernel.
        cluster: programs of a thread block cluster. The first axis of `%ctaid` counts each place of the
            grid so often.
        aliases: operands that are updated in place, each with the number of its result.
    """

    def kernel(*refs):
        _inline_ptx.bind(*refs, source=source, outputs=len(outputs))

    params = compiler_params(num_warps=num_warps, num_stages=1)
    if cluster > 1 or shared_bytes(source) > 48 * 1024 or num_warps.bit_count() > 1:
        params = _DirectParams(num_warps=num_warps, num_stages=1, cluster=cluster, target=target)
    call = pl.pallas_call(
        kernel,
        out_shape=outputs,
        grid=grid,
        input_output_aliases=aliases or {},
        compiler_params=params,
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


@lowering.register_lowering(_inline_ptx)
def _inline_ptx_lowering(ctx, *pointers, source, outputs):
    del outputs
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


# A block in a Triton kernel may declare 48 KiB of shared memory, its warps are a power of two, and Pallas'
# Triton knows no clusters. XLA's call for the PTX of a whole kernel has none of these limits: what needs more
# leaves out the compiler. The others keep it, as XLA starts what it compiled itself earlier, by up to 0.8 us.


@dataclasses.dataclass(frozen=True)
class _DirectParams(_triton.CompilerParams):
    cluster: int = 1
    target: Target = H200


def _direct_lowering(
    ctx, *in_nodes, jaxpr, grid_mapping, compiler_params, name, input_output_aliases, **_
):
    [source] = [e.params["source"] for e in jaxpr.eqns if e.primitive is _inline_ptx]
    avals = (*ctx.avals_in, *ctx.avals_out)
    name = mlir.sanitize_name(name)
    threads, cluster = 32 * compiler_params.num_warps, compiler_params.cluster
    x, y, z = (*grid_mapping.grid, 1, 1)[:3]
    launch = {
        "name": name,
        "kernel_type": "ptx",
        "kernel_data": entry(
            source,
            name,
            compiler_params.target,
            operands=len(avals),
            threads=threads,
            cluster=cluster,
        ),
        **{"grid_x": x * cluster, "grid_y": y, "grid_z": z},
        **{"block_x": threads, "block_y": 1, "block_z": 1},
        "shared_mem_bytes": shared_bytes(source),
    }

    def layouts(avals):
        return [tuple(reversed(range(aval.ndim))) for aval in avals]

    return mlir.custom_call(
        call_target_name="__gpu$xla.gpu.ptx",
        result_types=[mlir.aval_to_ir_type(ctx.module_context, a) for a in ctx.avals_out],
        operands=in_nodes,
        backend_config={key: mlir.ir_attribute(value) for key, value in launch.items()},
        operand_layouts=layouts(ctx.avals_in),
        result_layouts=layouts(ctx.avals_out),
        operand_output_aliases=dict(input_output_aliases),
    ).results


pallas_core.register_lowering_rule(_DirectParams, _direct_lowering, "gpu")


def shared_bytes(source: str) -> int:
    """The size of `fdk_shared`, nought if a block of PTX has none."""
    size = re.search(r"fdk_shared\[(\d+)\]", source)
    return int(size[1]) if size else 0


def entry(
    source: str, name: str, target: Target, *, operands: int, threads: int, cluster: int = 1
) -> str:
    """A whole kernel from a block of PTX; its launch gives it the shared memory."""
    source = source.replace(shared_declaration(shared_bytes(source)), "", 1)
    lines = [
        ".version 8.0",
        f".target {target.ptx_target(wgmma='wgmma.' in source)}",
        ".address_size 64",
        ".extern " + shared_declaration(""),
        f".visible .entry {name}({', '.join(f'.param .u64 p{i}' for i in range(1, operands + 1))})",
        f".reqntid {threads}, 1, 1",
        *([f".explicitcluster .reqnctapercluster {cluster}, 1, 1"] if cluster > 1 else []),
        "{",
        f".reg .b64 operand_<{operands + 1}>;",
        *(f"ld.param.u64 operand_{i}, [p{i}];" for i in range(1, operands + 1)),
        *(f"cvta.to.global.u64 operand_{i}, operand_{i};" for i in range(1, operands + 1)),
        re.sub(r"\$(\d+)", r"operand_\1", source),
        "ret;",
        "}",
    ]
    return "\n".join(lines)
