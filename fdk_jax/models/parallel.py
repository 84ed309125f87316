"""Tensor and data parallelism: which slice of each weight, and which sequences, a device holds.

The projections into heads and into the gated block are cut along their outputs, those back along their
inputs, so a layer needs two all-reduces of one activation and no weight ever moves. A fused projection is cut
part by part: device d holds its share of the queries, then of the keys, then of the values. Of a mixture of
experts each device holds a run of whole experts. Along a second axis of the mesh devices may hold the same
weights and share a batch.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from fdk_jax.models.config import ModelConfig
from fdk_jax.product.sharding import place, place_in_runs

_RUN_BYTES = 64 << 20  # under way to the devices for each thread that makes parameters


@dataclasses.dataclass(frozen=True)
class Parallel:
    """The axes of a mesh over which weights and batches are cut.

    Attributes:
        mesh: The devices; axes other than these two must have size 1.
        axis: Name of the axis over which every weight matrix is cut.
        data: Name of the axis over which the sequences of a batch are cut, or None.
    """

    mesh: Mesh
    axis: str = "model"
    data: str | None = None

    def __post_init__(self):
        used = (self.axis,) if self.data is None else (self.axis, self.data)
        for name, value in zip(("axis", "data"), used, strict=False):
            if value not in self.mesh.shape:
                raise ValueError(
                    f"{name}={value!r} is not one of the mesh's {self.mesh.axis_names}"
                )
        if self.axis == self.data:
            raise ValueError(f"axis and data are both {self.axis!r}: they need axes of their own")
        if self.mesh.size != self.shards * self.batches:
            raise ValueError(
                f"only the axes {used} may be larger than 1, got a mesh of {dict(self.mesh.shape)}"
            )

    @property
    def shards(self) -> int:
        """Devices that share every weight."""
        return self.mesh.shape[self.axis]

    @property
    def batches(self) -> int:
        """Parts that a batch is cut into."""
        return 1 if self.data is None else self.mesh.shape[self.data]

    @property
    def in_one_process(self) -> bool:
        """Whether all devices are this process's."""
        return all(d.process_index == jax.process_index() for d in self.mesh.devices.flat)

    @property
    def rows(self) -> P:
        """How arrays with a first axis of sequences are cut."""
        return P() if self.data is None else P(self.data)

    @property
    def cache(self) -> P:
        """How the arrays of a key-value cache are cut: by sequences and heads."""
        return P(self.data, self.axis)

    def put(self, value: Any, spec: P) -> Array:
        """An array, the same in every process, cut over the mesh's devices as `spec` says."""
        return place(value, NamedSharding(self.mesh, spec))

    def put_parameter(self, value: Any, spec: P) -> Array:
        """The same of an array that may be large: waits for it, and bounds what is under way."""
        return place_in_runs(value, NamedSharding(self.mesh, spec), _RUN_BYTES)

    def first_row(self, rows: int) -> Array | int:
        """Inside shard_map: which sequence of the batch is the first of this device's `rows`."""
        return 0 if self.data is None else jax.lax.axis_index(self.data) * rows

    def any(self, value: Array) -> Array:
        """Inside shard_map: whether a bool scalar holds for any part of the batch."""
        if self.data is None:
            return value
        return jax.lax.pmax(value.astype(jnp.int32), self.data) > 0

    def local(self, config: ModelConfig) -> ModelConfig:
        """The shape of the slice of a model that one device runs.

        Raises:
            ValueError: a dimension that the devices do not divide.
            NotImplementedError: norms over the heads of all devices.
        """
        if config.qk_norm and config.qk_norm_of == "all":
            raise NotImplementedError(
                "several devices with norms over all heads of the queries and keys (qk_norm_of='all')"
            )
        options = [config.layer(index) for index in range(config.num_layers)]
        for experts in {one.experts for one in options if one.experts is not None}:
            if experts.count % self.shards:
                raise ValueError(
                    f"{experts.count} experts must be divisible by the {self.shards} devices"
                )
        cut = ["num_heads", "num_kv_heads", "vocab_size"]
        if any(one.experts is None for one in options):
            cut.append("intermediate_size")
        for name in cut:
            if getattr(config, name) % self.shards:
                raise ValueError(
                    f"{name}={getattr(config, name)} must be divisible by the {self.shards} devices"
                )
        return dataclasses.replace(
            config, **{name: getattr(config, name) // self.shards for name in cut}
        )
