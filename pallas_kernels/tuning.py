"""Which kernel a product takes, with which launch configuration."""

import dataclasses
from typing import Any


@dataclasses.dataclass(frozen=True)
class Plan:
    """The choice for one product.

    Attributes:
        kernel: "gather".
        reason: why, in words.
    """

    kernel: str
    reason: str

    def __str__(self) -> str:
        return f"{self.kernel}: {self.reason}"


def plan(
    m: int,
    *,
    bits: int,
    group_size: int,
    out_features: int,
    in_features: int,
    uniform: bool,
    dtype: Any,
    device_kind: str | None = None,
) -> Plan:
    """The kernel and configuration that a product takes, and why. Runs nothing.

    Args:
        m: rows of x.
        bits: width of a code.
        group_size: weights a scale.
        out_features: N.
        in_features: K.
        uniform: whether the codebook is affine in the code.
        dtype: of x.
        device_kind: as JAX names the device, e.g. "NVIDIA H200"; None for the default device.
    """
    return Plan("gather", "looks every code up in memory; serves every case")
