"""BitNet folders of transformers: ternary weights, four rows a byte, one scale a tensor.

Bits 2 i of byte [r, k] hold the code of row r + i * N / 4; a code minus 1 is the weight. `BitLinear` divides by
`weight_scale`, `AutoBitLinear` multiplies by it.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from fdk_jax.files.bits import pack
from fdk_jax.files.contents import Stored, quantised_tensor
from fdk_jax.files.groups import Group, split

NAME = "BitNet"


def weights(
    settings: Mapping[str, Any], stored: Mapping[str, Stored], notes: list[str]
) -> dict[str, Stored]:
    """The weights of a checkpoint by name; see `fdk_jax.files.folder`.

    Raises:
        ValueError: a variant that is not supported.
    """
    kind = settings.get("linear_class", "bitlinear")
    if kind not in ("bitlinear", "autobitlinear"):
        raise ValueError(f"BitNet with linear_class={kind!r} is not supported")
    if settings.get("quantization_mode", "offline") != "offline":
        raise ValueError("BitNet with quantization_mode=online (float weights) is not supported")
    if settings.get("use_rms_norm"):
        raise ValueError("BitNet with use_rms_norm=true is not supported")
    groups, rest = split(stored, "weight_scale", ("weight",))
    notes.append("activations are exact here; BitNet was trained with 8-bit activations")
    divide = kind == "bitlinear"
    return {f"{group.module}.weight": _weight(group, divide) for group in groups} | rest


def _weight(group: Group, divide: bool) -> Stored:
    packed, scale = group.dtype("weight", "U8"), group.dtype("weight_scale", "BF16", "F16", "F32")
    n, k = 4 * packed.shape[0], packed.shape[1]

    def read():
        raw = packed.array()
        codes = np.concatenate([(raw >> np.uint8(2 * i)) & np.uint8(3) for i in range(4)])
        if (codes == 3).any():
            raise ValueError("a ternary code of 3 is damaged")
        one = scale.array().reshape(()).astype(np.float32)
        scales = np.full((n, 1), np.float32(1) / one if divide else one, np.float32)
        return quantised_tensor(
            pack(codes, 2), scales, [-1, 0, 1], bits=2, group_size=k, in_features=k
        )

    return group.weight((n, k), f"{NAME} 2 bits", read)
