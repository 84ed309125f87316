"""Sums over the devices of a model through each other's memory: see `pallas_kernels.peer_sum`.

FDK_JAX_PEER_SUMS=0 leaves all sums to XLA, FDK_JAX_PEER_SUMS=1 takes untried numbers of GPUs, too.
"""

import ctypes
import dataclasses
import functools
import os
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from fdk_jax.models.modules import RMSNorm
from fdk_jax.models.parallel import Parallel
from pallas_kernels import peer_sum
from pallas_kernels.mailbox import words as mailbox_words
from pallas_kernels.peer_sum import PeerSum
from pallas_kernels.target import current

_SWITCH = "FDK_JAX_PEER_SUMS"
_SEEN = (1, 2, 4)  # numbers of GPUs whose sums were seen to be right
# Of JAX's, those whose memory the other GPUs of a process reach; the pools of `cuda_async` have access lists.
_ALLOCATOR, _ALLOCATORS = "XLA_PYTHON_CLIENT_ALLOCATOR", ("default", "bfc", "platform")


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["mailbox", "addresses"],
    meta_fields=["devices", "features"],
)
@dataclasses.dataclass(frozen=True)
class Peers:
    """What sums over devices go through; inside of `jax.shard_map` this device's part.

    Attributes:
        mailbox: uint32, of each device its own, which the others write to.
        addresses: uint32, of each device its number and where the mailboxes are.
        devices: that are summed over.
        features: of the rows that are summed up.
    """

    mailbox: Array
    addresses: Array
    devices: int
    features: int

    def takes(self, x: Array | jax.ShapeDtypeStruct) -> bool:
        """Whether rows like x [B, D] can be summed."""
        fits = x.ndim == 2 and x.shape[1] == self.features
        return fits and peer_sum.unsupported_reason(self._case(x), current()) is None

    def total(self, x: Array) -> Array:
        """The sum of all devices' x [B, D]."""
        return peer_sum.peer_sum(self._case(x), x, self.mailbox, self.addresses, current())[0]

    def add_norm(self, x: Array, residual: Array, norm: RMSNorm) -> tuple[Array, Array]:
        """(residual + the sum of all devices' x, its norm), both [B, D]; the norm has no offset."""
        case = dataclasses.replace(self._case(x), normed=True, eps=norm.eps)
        scale = norm.scale[...]
        found = peer_sum.peer_sum(
            case, x, self.mailbox, self.addresses, current(), residual, scale.astype(x.dtype)
        )
        return found[0], found[1]

    def _case(self, x: Array | jax.ShapeDtypeStruct) -> PeerSum:
        rows, features = x.shape
        return PeerSum(self.devices, rows, features, x.dtype, x.dtype, normed=False)


def specs(parallel: Parallel) -> P:
    """How the arrays of a `Peers` are cut: each device has its own part."""
    return P((parallel.axis,) if parallel.data is None else (parallel.data, parallel.axis))


def make(parallel: Parallel, features: int) -> Peers:
    """Mailboxes on all devices, for rows of so many features.

    The arrays have to live for as long as a program that takes them runs, and may not be donated.
    """
    sharding = NamedSharding(parallel.mesh, specs(parallel))
    words, devices = mailbox_words(parallel.shards, features), _groups(parallel)
    shape = (devices.size * words,)
    mailbox = jax.jit(lambda: jnp.zeros(shape, jnp.uint32), out_shardings=sharding)()
    jax.block_until_ready(mailbox)
    found = {
        shard.device: shard.data.unsafe_buffer_pointer() for shard in mailbox.addressable_shards
    }
    addresses = np.zeros((devices.size, 1 + parallel.shards), np.uint64)
    for number, own in enumerate(addresses):
        group, rank = divmod(number, parallel.shards)
        own[:] = rank, *(found[device] for device in devices[group])
    placed = jax.device_put(addresses.view(np.uint32).reshape(-1), sharding)
    return Peers(mailbox, placed, parallel.shards, features)


def _groups(parallel: Parallel) -> np.ndarray:
    """The mesh's devices [batches, shards]; those of a row are summed over."""
    names = list(parallel.mesh.axis_names)
    devices = np.moveaxis(parallel.mesh.devices, names.index(parallel.axis), -1)
    return devices.reshape(-1, parallel.shards)


def unsupported_reason(parallel: Parallel, features: int) -> str | None:
    """Why devices cannot sum rows of so many features through each other's memory, or None."""
    devices = list(parallel.mesh.devices.flat)
    if os.environ.get(_SWITCH) == "0":
        return f"{_SWITCH}=0"
    if parallel.shards not in _SEEN and os.environ.get(_SWITCH) != "1":
        return f"sums over {parallel.shards} GPUs have not been tried; {_SWITCH}=1 does so"
    if (allocator := os.environ.get(_ALLOCATOR, "default").lower()) not in _ALLOCATORS:
        return f"{_ALLOCATOR}={allocator}: whether other GPUs reach its memory is not known"
    if devices[0].platform != "gpu":
        return f"the devices are of platform {devices[0].platform!r}, not GPUs"
    if not parallel.in_one_process:
        return "the devices are of several processes"
    if reason := current().no_grid_barriers:
        return f"devices wait for each other, but {reason}"
    half = jnp.dtype(jnp.bfloat16)
    case = PeerSum(parallel.shards, 1, features, half, half, normed=True)
    if (reason := peer_sum.unsupported_reason(case, current())) is not None:
        return reason
    for group in _groups(parallel):
        if (reason := _out_of_reach(group)) is not None:
            return reason
    return None


def _out_of_reach(devices: Sequence[jax.Device]) -> str | None:
    """Why some of the devices cannot write to others' memory, or None: XLA lets those that can do so."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        return f"the driver cannot be asked whether devices reach each other: {error}"
    ordinals = [device.local_hardware_id for device in devices]
    for one in ordinals:
        for other in ordinals:
            can = ctypes.c_int(0)
            if one == other:
                continue
            if driver.cuDeviceCanAccessPeer(ctypes.byref(can), one, other) or not can.value:
                return f"GPU {one} does not reach the memory of GPU {other}"
    return None
