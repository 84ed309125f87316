"""Tensor parallelism: which slice of each weight a device holds.

The projections into heads and into the gated block are cut along their outputs, those back along
their inputs, so a layer needs two all-reduces of one activation and no weight ever moves. A fused
projection is cut part by part: device d holds its share of the queries, then of the keys, then of
the values.
"""

import dataclasses

from jax.sharding import Mesh

from fdk_jax.models.config import ModelConfig


@dataclasses.dataclass(frozen=True)
class Parallel:
    """A mesh axis over which every weight matrix is cut.

    Attributes:
        mesh: The devices; axes other than `axis` must have size 1.
        axis: Name of the mesh axis.
    """

    mesh: Mesh
    axis: str = "model"

    def __post_init__(self):
        if self.axis not in self.mesh.shape:
            raise ValueError(f"axis={self.axis!r} is not one of the mesh's {self.mesh.axis_names}")
        if self.mesh.size != self.mesh.shape[self.axis]:
            raise ValueError(
                f"a mesh with one axis larger than 1 is needed, got {dict(self.mesh.shape)}"
            )

    @property
    def shards(self) -> int:
        """Devices along the axis."""
        return self.mesh.shape[self.axis]

    def local(self, config: ModelConfig) -> ModelConfig:
        """The shape of the slice of a model that one device runs.

        Raises:
            ValueError: a dimension that the devices do not divide.
            NotImplementedError: biases behind a projection that is cut along its inputs.
        """
        if config.output_bias or config.mlp_bias:
            raise NotImplementedError("tensor parallelism of output_bias or mlp_bias")
        cut = ("num_heads", "num_kv_heads", "intermediate_size", "vocab_size")
        for name in cut:
            if getattr(config, name) % self.shards:
                raise ValueError(
                    f"{name}={getattr(config, name)} must be divisible by the {self.shards} devices"
                )
        return dataclasses.replace(
            config, **{name: getattr(config, name) // self.shards for name in cut}
        )
