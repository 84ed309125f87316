"""K-means codebooks of the 1-Bit-Wonder models: `quant_method` "nonlinear", the interchange layout itself."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from fdk_jax.files.contents import Stored, quantised_tensor
from fdk_jax.files.groups import Group, split
from fdk_jax.format.packing import check_bits

NAME = "1-Bit-Wonder"


def weights(
    settings: Mapping[str, Any], stored: Mapping[str, Stored], notes: list[str]
) -> dict[str, Stored]:
    """The weights of a checkpoint by name; see `fdk_jax.files.folder`."""
    bits, group_size = int(settings["bits"]), int(settings["block_size"])
    groups, rest = split(stored, "weight_packed", ("scales", "centroids"))
    made = {f"{group.module}.weight": _weight(group, bits, group_size) for group in groups}
    return made | rest


def _weight(group: Group, bits: int, group_size: int) -> Stored:
    packed = group.dtype("weight_packed", "U8")
    scales, centroids = group.dtype("scales", "BF16", "F16", "F32"), group["centroids"]
    check_bits(bits)
    n, k = packed.shape[0], packed.shape[1] * 8 // bits

    def read():
        values = np.asarray(centroids.array(), np.float32)
        return quantised_tensor(
            packed.array(), scales.array(), values, bits=bits, group_size=group_size, in_features=k
        )

    return group.weight((n, k), f"{NAME} {bits} bits, group {group_size}", read)
