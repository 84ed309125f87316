"""Products of sharded weights under plain jit.

XLA cannot look into a kernel, so it would gather a sharded weight before the call; nor does it see through
the unpacking of weights split along K. The rule here tells it that rows (N) are independent and that the
products of parts along K are summed.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental.custom_partitioning import SdyShardingRule, custom_partitioning
from jax.sharding import AbstractMesh, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from fdk_jax.format import packing

Axis = str | tuple[str, ...] | None


def sharded(run: Callable[[Any, Any], Array], product: Any) -> Callable[[Any], Array]:
    """`run(product, operands)` as a function of operands that follows the sharding of the weight.

    Args:
        run: computes one product on one device.
        product: `fdk_jax.product.choice.Product` of the whole weight.

    Returns:
        A function of `pallas_kernels.case.Arrays`.
    """
    call = custom_partitioning(lambda operands: run(product, operands))

    def partition(mesh: Mesh, args, result):
        (operands,) = args
        n, k = _weight_axes(product, operands.packed)
        local = dataclasses.replace(
            product,
            **part_of(product.spec, product.layout, size(mesh, n), size(mesh, k)),
        )
        m = _free_axis(_padded(operands.x.sharding.spec, 2)[0], n, k)
        specs = _specs(product, operands, m, n, k)
        shardings = jax.tree.map(lambda partition: NamedSharding(mesh, partition), specs)

        def part(operands):
            # Traced while the whole program is compiled, perhaps under jax.set_mesh: a part has no mesh.
            with jax.sharding.use_abstract_mesh(AbstractMesh((), ())):
                return one_device(operands)

        def one_device(operands):
            codebook = local_codebook(
                operands.codebook, product.out_features, local.out_features, n
            )
            operands = operands._replace(codebook=codebook)
            if k is None:
                return run(local, operands)
            # The bias is added once, and the sum rounded once.
            partial = dataclasses.replace(local, out_dtype=jnp.dtype(jnp.float32))
            y = jax.lax.psum(run(partial, operands._replace(bias=None)), k)
            if operands.bias is not None:
                y += operands.bias.astype(y.dtype)[None]
            return y.astype(product.out_dtype)

        return mesh, part, NamedSharding(mesh, P(m, n)), (shardings,)

    call.def_partition(partition, sharding_rule=lambda mesh, args, results: _rule(product, args))
    return call


def with_automatic_axes(call: Callable[[Any], Array], product: Any, operands: Any) -> Array:
    """Runs `call(operands)`; under a mesh of explicit axes, with those axes automatic inside.

    The result is sharded like the leading axes of x and the rows of the weight.
    """
    types = [jax.typeof(a) for a in jax.tree.leaves(operands)]
    mesh = next((t.sharding.mesh for t in types if t.sharding.mesh.explicit_axes), None)
    if mesh is None:
        return call(operands)
    x, packed = jax.typeof(operands.x), jax.typeof(operands.packed)
    n = _padded(packed.sharding.spec, packed.ndim)[packing.SHARDED_AXES[product.layout][0][0]]
    lead = [_free_axis(axis, n) for axis in _padded(x.sharding.spec, x.ndim)[:-1]]
    out = NamedSharding(mesh, P(*lead, n))
    automatic: Any = jax.sharding.auto_axes(call, axes=mesh.explicit_axes, out_sharding=out)
    return automatic(operands)


def _padded(partition: P, rank: int) -> tuple[Any, ...]:
    return (*partition, *[None] * (rank - len(partition)))


def _weight_axes(product, packed) -> tuple[Any, Any]:
    """Mesh axes (or None) over which the rows and the columns of a weight are sharded."""
    if not isinstance(packed.sharding, NamedSharding):
        raise ValueError(
            f"the sharding of the weight is not named ({packed.sharding}); place it with"
            " fdk_jax.sharding.shard"
        )
    partition = _padded(packed.sharding.spec, len(packed.shape))
    n_axis, k_axis = packing.SHARDED_AXES[product.layout][0]
    return partition[n_axis] or None, partition[k_axis] or None


def _free_axis(m: Any, *used: Any) -> Any:
    """A mesh axis over which rows of x are sharded, or None where the weight uses it."""
    names = lambda axis: set(axis if isinstance(axis, tuple) else (axis,)) - {None}  # noqa: E731
    return None if any(names(m) & names(axis) for axis in used) else m


def _specs(product, operands, m: Any, n: Any, k: Any):
    ranks = (len(operands.packed.shape), len(operands.scales.shape))
    packed, scales = weight_specs(product.layout, ranks, n, k)
    return operands._replace(
        x=P(m, k),
        packed=packed,
        scales=scales,
        codebook=P(*[None] * len(operands.codebook.shape)),
        bias=None if operands.bias is None else P(n),
    )


def _rule(product, types) -> SdyShardingRule:
    """Shardy's factors: m and n pass through; K is settled in `partition`."""
    ranks = [len(t.shape) for t in types]

    def factors(array: str, rank: int, n_axis: int) -> tuple[str, ...]:
        names = [f"{array}{i}" for i in range(rank)]
        names[n_axis] = "n"
        return tuple(names)

    (packed_n, _), (scales_n, _) = packing.SHARDED_AXES[product.layout]
    operands: Any = [
        ("m", "k"),
        factors("p", ranks[1], packed_n),
        factors("s", ranks[2], scales_n),
        tuple(f"c{i}" for i in range(ranks[3])),
        *[("n",)] * (len(ranks) - 4),
    ]
    results: Any = (("m", "n"),)
    return SdyShardingRule(tuple(operands), results)


def size(mesh: Mesh | AbstractMesh, axis: Axis) -> int:
    """Number of parts along a mesh axis or several."""
    names = () if axis is None else axis if isinstance(axis, tuple) else (axis,)
    for name in names:
        if name not in mesh.shape:
            raise ValueError(f"the mesh has axes {tuple(mesh.shape)}, not {name!r}")
    return math.prod(mesh.shape[name] for name in names)


def part_of(spec: dict[str, int], layout: str, n_parts: int, k_parts: int) -> dict[str, int]:
    """The spec of one part of a weight.

    Raises:
        ValueError: a slice of the arrays would not be the arrays of a slice.
    """
    n, k, group = spec["out_features"], spec["in_features"], spec["group_size"]
    local = spec | dict(out_features=n // n_parts, in_features=k // k_parts)
    if n_parts * k_parts == 1:
        return local
    fits = n % n_parts == 0 and (k_parts == 1 or k % (k_parts * group) == 0)
    if fits:
        struct = functools.partial(packing.layout_struct, layout, dtype=jnp.float32)
        axes = packing.SHARDED_AXES[layout]
        for whole, part, (i, j) in zip(struct(**spec), struct(**local), axes, strict=True):
            expected = list(part.shape)
            expected[i] *= n_parts
            expected[j] *= k_parts
            fits &= tuple(expected) == whole.shape
    if not fits:
        raise ValueError(
            f"a weight with N={n}, K={k}, group_size={group} in layout {layout!r} does not split evenly"
            f" into {n_parts} parts along N and {k_parts} along K"
        )
    return local


def local_codebook(codebook: Array, rows: int, local_rows: int, n: Axis) -> Array:
    """The codebooks of one device's rows, taken from all of them (they are small)."""
    if codebook.ndim == 1 or rows == local_rows:
        return codebook
    block = rows // codebook.shape[0]
    step = math.gcd(block, local_rows)
    first = jax.lax.axis_index(n) * local_rows
    return codebook[(first + jnp.arange(0, local_rows, step)) // block]


def weight_specs(layout: str, ranks: tuple[int, int], n: Axis, k: Axis) -> tuple[P, P]:
    """PartitionSpecs of (packed, scales), given their ranks."""
    specs = []
    for rank, (i, j) in zip(ranks, packing.SHARDED_AXES[layout], strict=True):
        partition: list[Any] = [None] * rank
        partition[i], partition[j] = n, k
        specs.append(P(*partition))
    return specs[0], specs[1]
