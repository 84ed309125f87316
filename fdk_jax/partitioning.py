"""Products of sharded weights: each device multiplies the part that it holds.

XLA cannot look into a kernel, so under plain jit it would gather a sharded weight before the call. The rule
here tells it that rows (N) are independent and that parts along K are summed.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental.custom_partitioning import SdyShardingRule, custom_partitioning
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from fdk_jax import packing


def sharded(run: Callable[[Any, Any], Array], product: Any) -> Callable[[Any], Array]:
    """`run(product, operands)` as a function of operands that follows the sharding of the weight.

    Args:
        run: computes one product on one device.
        product: static description of the whole product; its `out_features` and `in_features` are
            replaced by those of a part.

    Returns:
        A function of `fdk_jax.dispatch.Operands`.
    """
    if product.layout == "interchange":
        # jnp all the way: XLA partitions it by itself.
        return lambda operands: run(product, operands)
    call = custom_partitioning(lambda operands: run(product, operands))

    def partition(mesh: Mesh, args, result):
        (operands,) = args
        rows, columns = _weight_axes(product, operands.packed)
        local = _local_product(product, mesh, rows, columns)
        m_axis = None
        if operands.x.sharding.spec and operands.x.sharding.spec[0] not in (rows, columns):
            m_axis = operands.x.sharding.spec[0]
        specs = _specs(product, operands, m_axis, rows, columns)
        shardings = jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs)

        def part(operands):
            operands = operands._replace(codebook=_local_codebook(product, local, operands, rows))
            if columns is None:
                return run(local, operands)
            # Only one device of a row may add the bias; the sum is then rounded once.
            partial = dataclasses.replace(local, out_dtype=jnp.dtype(jnp.float32))
            y = jax.lax.psum(run(partial, operands._replace(bias=None)), columns)
            if operands.bias is not None:
                y += operands.bias.astype(y.dtype)[None]
            return y.astype(product.out_dtype)

        return mesh, part, NamedSharding(mesh, PartitionSpec(m_axis, rows)), (shardings,)

    call.def_partition(partition, sharding_rule=lambda mesh, args, results: _rule(product, args))
    return call


def _weight_axes(product, packed) -> tuple[Any, Any]:
    """Mesh axes (or None) over which the rows and the columns of a weight are sharded."""
    sharding = packed.sharding
    if not isinstance(sharding, NamedSharding):
        raise ValueError(
            f"the sharding of the weight is not named ({sharding}); place it with"
            " jax.sharding.NamedSharding"
        )
    spec = (*sharding.spec, *[None] * (len(packed.shape) - len(sharding.spec)))
    n_axis, k_axis = packing.SHARDED_AXES[product.layout][0]
    return spec[n_axis] or None, spec[k_axis] or None


def _size(mesh: Mesh, names: Any) -> int:
    names = () if names is None else names if isinstance(names, tuple) else (names,)
    return math.prod(mesh.shape[name] for name in names)


def _local_product(product, mesh: Mesh, rows: Any, columns: Any):
    """The product of one device's part, whose arrays must be a whole weight of their own."""
    n, k = _size(mesh, rows), _size(mesh, columns)
    local = dataclasses.replace(
        product, out_features=product.out_features // n, in_features=product.in_features // k
    )
    (pn, pk), (sn, sk) = packing.SHARDED_AXES[product.layout]
    fits = product.out_features % n == 0 and product.in_features % (k * product.group_size) == 0
    if fits and n * k > 1:
        dtype = jnp.float32
        whole = packing.layout_struct(product.layout, dtype=dtype, **product.facts)
        part = packing.layout_struct(product.layout, dtype=dtype, **local.facts)
        for w, p, (i, j) in zip(whole, part, ((pn, pk), (sn, sk)), strict=True):
            expected = list(p.shape)
            expected[i] *= n
            expected[j] *= k
            fits &= tuple(expected) == w.shape
    if not fits and n * k > 1:
        raise ValueError(
            f"a {product.layout} weight with N={product.out_features}, K={product.in_features} and"
            f" group_size={product.group_size} does not split evenly into {n} parts along N and"
            f" {k} along K: shard it before fdk_jax.prepare, or use fewer devices"
        )
    return local


def _local_codebook(product, local, operands, rows: Any) -> Array:
    """The codebooks of one device's rows, taken from all of them (they are small)."""
    codebook = operands.codebook
    if codebook.ndim == 1 or rows is None:
        return codebook
    block = product.out_features // codebook.shape[0]
    step = math.gcd(block, local.out_features)
    first = jax.lax.axis_index(rows) * local.out_features
    return codebook[(first + jnp.arange(0, local.out_features, step)) // block]


def _specs(product, operands, m_axis: Any, rows: Any, columns: Any):
    def weight(array, axes):
        spec: list[Any] = [None] * len(array.shape)
        spec[axes[0]], spec[axes[1]] = rows, columns
        return PartitionSpec(*spec)

    packed_axes, scales_axes = packing.SHARDED_AXES[product.layout]
    return operands._replace(
        x=PartitionSpec(m_axis, columns),
        packed=weight(operands.packed, packed_axes),
        scales=weight(operands.scales, scales_axes),
        codebook=PartitionSpec(*[None] * len(operands.codebook.shape)),
        bias=None if operands.bias is None else PartitionSpec(rows),
    )


def _rule(product, types) -> SdyShardingRule:
    """Shardy's factors: m and n pass through; K is settled in `partition`."""
    ranks = [len(t.shape) for t in types]

    def factors(array: str, rank: int, axes: tuple[int, int]):
        names = [f"{array}{i}" for i in range(rank)]
        names[axes[0]] = "n"
        return tuple(names)

    packed_axes, scales_axes = packing.SHARDED_AXES[product.layout]
    operands = [
        ("m", "k"),
        factors("p", ranks[1], packed_axes),
        factors("s", ranks[2], scales_axes),
        tuple(f"c{i}" for i in range(ranks[3])),
        *[("n",)] * (len(ranks) - 4),
    ]
    return SdyShardingRule(tuple(operands), (("m", "n"),))
