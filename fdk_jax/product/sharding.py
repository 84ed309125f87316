"""Tensor parallelism: weights sharded along N (rows) or K (columns), each part multiplied where it lies."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from fdk_jax.format.quantised_tensor import QuantisedTensor
from fdk_jax.product import dispatch, partitioning
from fdk_jax.product.partitioning import Axis


def shard(w: QuantisedTensor, mesh: Mesh, *, n: Axis = None, k: Axis = None) -> QuantisedTensor:
    """Places the parts of a weight on the devices of a mesh.

    `fdk_jax.matmul` under plain jit then multiplies every part where it lies.

    Args:
        w: one matrix, in any layout.
        mesh: the devices.
        n: mesh axis (or axes) over which the output features are split: no communication.
        k: mesh axis (or axes) over which the input features are split: adds an all-reduce.

    Raises:
        ValueError: an axis that the mesh lacks, or parts that would cut a group or a tile.
    """
    specs = _specs(w, mesh, n, k)
    return jax.tree.map(lambda a, s: place(a, NamedSharding(mesh, s)), w, specs)


def place(value: Any, sharding: NamedSharding) -> Array:
    """An array, the same in every process, on the devices: each process hands over its own devices' slices."""
    if sharding.is_fully_addressable:
        return jax.device_put(value, sharding)
    if jnp.issubdtype(value.dtype, jax.dtypes.prng_key):
        data = place(jax.random.key_data(value), sharding)
        return jax.random.wrap_key_data(data, impl=jax.random.key_impl(value))
    whole = np.asarray(value)
    return jax.make_array_from_callback(whole.shape, sharding, lambda index: whole[index])


def place_in_runs(value: Any, sharding: NamedSharding, limit: int) -> Array:
    """`place` of an array of this host that waits until it is there; no more than `limit` bytes are under way.

    The bytes of a transfer lie in memory that a device can read: what is under way takes as much again.
    """
    whole = np.asarray(value)
    slices = {
        device: whole[index]
        for device, index in sharding.addressable_devices_indices_map(whole.shape).items()
    }
    size = sum(one.nbytes for one in slices.values())
    if size <= limit or not whole.ndim:
        return jax.block_until_ready(place(whole, sharding))
    rows = len(next(iter(slices.values())))
    step = max(rows * limit // size, 1)
    pieces: dict[jax.Device, list[Array]] = {device: [] for device in slices}
    for begin in range(0, rows, step):
        for device, one in slices.items():
            pieces[device].append(jax.device_put(one[begin : begin + step], device))
        jax.block_until_ready([one[-1] for one in pieces.values()])
    arrays = [jnp.concatenate(one) for one in pieces.values()]
    return jax.make_array_from_single_device_arrays(whole.shape, sharding, arrays)


def matmul(
    x: Array,
    w: QuantisedTensor,
    mesh: Mesh,
    *,
    n: Axis = None,
    k: Axis = None,
    **options: Any,
) -> Array:
    """`fdk_jax.matmul` of a weight sharded by `shard`, through `jax.shard_map`.

    Args:
        x: [..., K]; split along K over `k`, otherwise the same on every device.
        w: the weight.
        mesh: the devices.
        n: mesh axis over which the output features are split.
        k: mesh axis over which the input features are split; the partial sums are added in float32.
        **options: of `fdk_jax.matmul`, except bias.

    Returns:
        y [..., N], split along N over `n`.
    """
    out_dtype = jnp.dtype(options.pop("out_dtype", None) or x.dtype)
    lead = [None] * (x.ndim - 1)

    def part(x: Array, w: QuantisedTensor) -> Array:
        y = dispatch.matmul(x, local_part(w, mesh, n, k), out_dtype=jnp.float32, **options)
        return (y if k is None else jax.lax.psum(y, k)).astype(out_dtype)

    # Kernels do not say over which axes their results vary, so the check of that is off.
    return jax.shard_map(
        part,
        mesh=mesh,
        in_specs=(P(*lead, k), _specs(w, mesh, n, k)),
        out_specs=P(*lead, n),
        check_vma=False,
    )(x, w)


def local_part(w: QuantisedTensor, mesh: Mesh, n: Axis, k: Axis) -> QuantisedTensor:
    """Inside shard_map: one device's arrays as a weight of their own, an [N, K] matrix."""
    local = partitioning.part_of(
        w.spec, w.layout, partitioning.size(mesh, n), partitioning.size(mesh, k)
    )
    codebook = partitioning.local_codebook(w.codebook, w.out_features, local["out_features"], n)
    shape = (local["out_features"], local["in_features"])
    return dataclasses.replace(w, codebook=codebook, shape=shape, axes="nk")


def _specs(w: QuantisedTensor, mesh: Mesh, n: Axis, k: Axis) -> QuantisedTensor:
    partitioning.part_of(w.spec, w.layout, partitioning.size(mesh, n), partitioning.size(mesh, k))
    packed, scales = partitioning.weight_specs(w.layout, (w.packed.ndim, w.scales.ndim), n, k)
    return dataclasses.replace(w, packed=packed, scales=scales, codebook=P())
