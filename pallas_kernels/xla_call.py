"""Launches kernels that are blocks of PTX: by XLA's own call for a whole kernel, or inside a Triton kernel.

XLA's call has no limits, and needs neither Pallas nor Triton. What XLA compiles itself it starts earlier, by
up to 0.8 us, so that as long as there is Triton a block that fits into one of its kernels goes there: 48 KiB
of shared memory, a power of two of warps, no cluster. FDK_JAX_TRITON=0 does without it.
"""

import functools
import re
from collections.abc import Mapping

import jax
from jax import Array
from jax._src import dispatch
from jax._src.interpreters import mlir
from jax.core import ShapedArray
from jax.extend.core import Primitive

from pallas_kernels import triton_compat
from pallas_kernels.ptx import shared_bytes, shared_declaration
from pallas_kernels.target import Target

_MAX_SHARED = 48 * 1024  # of a Triton kernel's block


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
            results; $0 is scratch. `%ctaid` is the index in the grid.
        operands: arrays in device memory.
        outputs: shapes and dtypes of the results.
        target: the GPU that the block is written for.
        grid: programs.
        num_warps: warps a program.
        name: of the kernel.
        cluster: programs of a thread block cluster. The first axis of `%ctaid` counts each index of the
            grid so often.
        aliases: operands that are updated in place, each with the number of its result.
    """
    fits = cluster == 1 and shared_bytes(source) <= _MAX_SHARED and num_warps.bit_count() == 1
    if fits and target.triton:
        return triton_compat.inline_call(
            source,
            operands,
            outputs,
            grid=grid,
            num_warps=num_warps,
            name=name,
            aliases=aliases or {},
        )
    return tuple(
        _whole_kernel.bind(
            *operands,
            source=source,
            outputs=tuple((output.shape, jax.numpy.dtype(output.dtype)) for output in outputs),
            target=target,
            grid=grid,
            threads=32 * num_warps,
            name=name,
            cluster=cluster,
            aliases=tuple(sorted((aliases or {}).items())),
        )
    )


_whole_kernel = Primitive("fdk_whole_kernel")
_whole_kernel.multiple_results = True
_whole_kernel.def_impl(functools.partial(dispatch.apply_primitive, _whole_kernel))


@_whole_kernel.def_abstract_eval
def _shapes(*operands, outputs, **_):
    del operands
    return [ShapedArray(shape, dtype) for shape, dtype in outputs]


def _lowering(ctx, *operands, source, outputs, target, grid, threads, name, cluster, aliases):
    del outputs
    count = len(ctx.avals_in) + len(ctx.avals_out)
    name = mlir.sanitize_name(name)
    x, y, z = (*grid, 1, 1)[:3]
    launch = {
        "name": name,
        "kernel_type": "ptx",
        "kernel_data": entry(
            source, name, target, operands=count, threads=threads, cluster=cluster
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
        operands=operands,
        backend_config={key: mlir.ir_attribute(value) for key, value in launch.items()},
        operand_layouts=layouts(ctx.avals_in),
        result_layouts=layouts(ctx.avals_out),
        operand_output_aliases=dict(aliases),
    ).results


mlir.register_lowering(_whole_kernel, _lowering, platform="cuda")


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
