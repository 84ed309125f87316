"""Products one after another in one launch: from a token's attention to the next layer's queries.

    total = residual + out x                          scaled = total * norm_scale
    inner = silu(gate scaled / rms(total)) * (up scaled / rms(total))
    total' = total + down inner                       scaled' = total' * norm_scale'
    y = qkv scaled' / rms(total')

With several devices each has a part of the columns of out and down, and the sums of both are over all devices:
a program sends what it has of its rows to the same program of the others, see `mailbox`.

As launches of their own each would start with an empty pipe and end with an idle one; here the producer warps
never stop, see `ring`. What the products leave to each other goes through memory, that is, through L2.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from pallas_kernels import mailbox, ring, ring_arithmetic, xla_call
from pallas_kernels.case import Arrays, Case
from pallas_kernels.ptx import Ptx
from pallas_kernels.ring_launch import Launch
from pallas_kernels.ring_plan import LaunchPlan, ProductPlan
from pallas_kernels.target import Target

GATED = 1  # the index of gate and up
_ALIKE = ("bits", "scale_dtype")  # in all products
_PEERS = ("mailbox", "addresses")
OVER_DEVICES = (1, 4)  # bits whose chains over several GPUs were seen to be right on GPUs
_RESIDUAL = (0, 2)  # the indices of the products whose outputs are added to the residual stream


class Outputs(NamedTuple):
    """What a chain leaves: a `Scaled` in parts, and the product after it, if there is one."""

    total: Array
    scaled: Array
    squares: Array
    y: Array | None


def cases(
    products: Sequence[Case],
    eps: Sequence[float],
    config: ring.Config,
    target: Target,
    devices: int = 1,
) -> list[Case]:
    """The products (output; gate and up; down; and the next qkv, or not) with what is around them.

    Args:
        products: as `residual_plan` has them.
        eps: of the norms after the two sums.
        config: W and P.
        target: the GPU.
        devices: whose products are summed up.
    """
    found: list[Case] = []
    for index, case in enumerate(products):
        around: dict[str, Any] = dict(residual=index in _RESIDUAL)
        if index in _RESIDUAL:
            around["devices"] = devices
        if index - 1 in _RESIDUAL:
            before = _plan(found[-1], config, index - 1)
            around |= dict(squares=config.programs * before.square_parts, norm_eps=eps[index // 2])
        found.append(dataclasses.replace(case, **around))
    return found


def unsupported_reason(
    products: Sequence[Case], config: ring.Config, target: Target, devices: int = 1
) -> str | None:
    """Why the kernel does not take a chain of products, whose sums are of so many devices, or None."""
    if (reason := ring.unsupported_chain(config, target)) is not None:
        return reason
    if target.no_grid_barriers:
        return f"its programs wait for each other, but {target.no_grid_barriers}"
    if config.programs > target.multiprocessors:
        return (
            f"{config} has more programs than {target.multiprocessors} multiprocessors run at once"
        )
    if devices > 1 and products[0].bits not in OVER_DEVICES:
        return f"chains of {products[0].bits} bits over several GPUs have not been tried on GPUs"
    if devices > 1 and config.programs > mailbox.MAX_PROGRAMS:
        return f"{config} has more programs than a mailbox counts"
    first = products[0]
    for index, case in enumerate(products):
        if any(getattr(case, name) != getattr(first, name) for name in _ALIKE):
            return "the products have codes or scales of several kinds"
        if case.n % 16 or case.k % case.span:
            return f"{case.n} x {case.k} is not of whole tiles"
        if case.x_dtype != jnp.bfloat16 or case.out_dtype != jnp.bfloat16:
            return f"{case.x_dtype} and {case.out_dtype} are not bfloat16"
        if devices > 1 and index in _RESIDUAL and case.bias_dtype is not None:
            return f"the bias of product {index} would be added by each of {devices} devices"
        runs = 2 if index == GATED else 1
        if case.n // runs % 16 or (
            case.codebooks > 1 and (case.codebooks % runs or case.n // case.codebooks % 16)
        ):
            return f"{case.codebooks} codebooks and {runs} runs of {case.n} rows are not of whole tiles"
        reason = ring_arithmetic.unsupported_product(case, config.consumers, config.programs)
        if reason is not None:
            return reason
    # A slot of the ring is of any product. Rows that have one scale each may be of several lengths.
    if len({_plan(case, config, i).slot_bytes for i, case in enumerate(products)}) > 1:
        return "the products have groups of several sizes"
    around = cases(products, (0.0, 0.0), config, target, devices)
    needed = _launch_plan(around, config, target).shared_bytes
    return target.lacks_shared_memory(config, needed)


def matmul(
    products: Sequence[Case],
    weights: Sequence[Arrays],
    x: Array,
    residual: Array,
    norm_scales: Sequence[Array],
    config: ring.Config,
    target: Target,
    peers: tuple[Array, Array] | None = None,
) -> Outputs:
    """Runs a chain.

    Args:
        products: from `cases`.
        weights: of the products; their `x` is not read.
        x: [1, K] of the first one.
        residual: [1, D].
        norm_scales: [D] of the norms after the two sums.
        config: W and P. P programs have to fit on the device at once, or they never end.
        target: the GPU.
        peers: the mailbox and the addresses of `peer_sum`, where several devices sum up.
    """
    arrays = {"x": x, "residual": residual, "counters": jnp.zeros(len(products), jnp.int32)}
    if peers is not None:
        mailbox.check(peers[0], products[0].devices, products[0].n)
        arrays |= dict(zip(_PEERS, peers, strict=True))
    for index, weight in enumerate(weights):
        names = dict(packed=weight.packed, scales=weight.scales, codebook=weight.codebook)
        if weight.bias is not None:
            names["bias"] = weight.bias
        if index in _RESIDUAL:
            names["norm_scale"] = norm_scales[index // 2]
        arrays |= {f"{name}{index}": array for name, array in names.items()}
    shapes = outputs(products, config, target)
    results = xla_call.ptx_call(
        source(products, config, target),
        tuple(arrays.values()),
        tuple(shapes.values()),
        target,
        grid=(config.programs,),
        num_warps=config.warps,
        name="fdk_chain",
    )
    found = dict(zip(shapes, results, strict=True))
    return Outputs(found["sum2"], found["scaled2"], found["squares_out2"], found.get("y3"))


def source(products: Sequence[Case], config: ring.Config, target: Target) -> str:
    """The kernel's PTX."""
    return _writer(products, config, target).write()


def outputs(
    products: Sequence[Case], config: ring.Config, target: Target
) -> dict[str, jax.ShapeDtypeStruct]:
    """Names of the kernel's results and what they are, in order."""
    found = {}
    for index, case in enumerate(products):
        width = case.n // 2 if index == GATED else case.n
        row = jax.ShapeDtypeStruct((1, width), case.out_dtype)
        if not case.residual:
            found[f"y{index}"] = row
            continue
        parts = config.programs * _plan(case, config, index).square_parts
        found[f"sum{index}"] = found[f"scaled{index}"] = row
        found[f"squares_out{index}"] = jax.ShapeDtypeStruct((parts,), jnp.float32)
    return found


def _operands(products: Sequence[Case], config: ring.Config, target: Target) -> list[str]:
    """Names of the kernel's operands and results, in order."""
    names = ["x", "residual", "counters", *_PEERS * (products[0].devices > 1)]
    for index, case in enumerate(products):
        kinds = ("packed", "scales", "codebook", "bias", "norm_scale")
        names += [f"{name}{index}" for name in kinds if name in case.operands]
    return [*names, *outputs(products, config, target)]


def _plan(case: Case, config: ring.Config, index: int) -> ProductPlan:
    return ring_arithmetic.of(case, config.consumers).plan_class(
        case=case,
        consumers=config.consumers,
        programs=config.programs,
        position=index,
        gated=index == GATED,
    )


def _launch_plan(products: Sequence[Case], config: ring.Config, target: Target) -> LaunchPlan:
    plans = (_plan(case, config, index) for index, case in enumerate(products))
    return LaunchPlan(tuple(plans), target.shared_bytes, signals=len(products) - 1)


def _writer(products: Sequence[Case], config: ring.Config, target: Target) -> Launch:
    ptx, plan = Ptx(target), _launch_plan(products, config, target)
    operands = ptx.operands(*_operands(products, config, target))
    # Each reads what the one before it has left, and the second sum is of the first one.
    inputs = [
        dict(x=operands["x"], residual=operands["residual"]),
        dict(x=operands["scaled0"], squares=operands["squares_out0"]),
        dict(x=operands["y1"], residual=operands["sum0"]),
        dict(x=operands.get("scaled2"), squares=operands.get("squares_out2")),
    ]
    peers = {name: operands[name] for name in _PEERS if name in operands}
    writers = []
    for index, case in enumerate(products):
        own = {name: operands.get(f"{name}{index}") for name in case.operands}
        found = {name: register for name, register in own.items() if register is not None} | inputs[
            index
        ]
        if case.residual:
            found |= peers
        arithmetic = ring_arithmetic.of(case, config.consumers)
        writers.append(arithmetic(plan.products[index], target, ptx, found))
    return Launch(plan, writers, operands["counters"])
