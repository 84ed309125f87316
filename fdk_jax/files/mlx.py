"""MLX folders: q * scale + bias, exact where every bias is the same multiple of its scale.

Layout of `mlx.core.quantize`: `weight` uint32 [N, K * b / 32], lowest bits first, `scales` and `biases`
[N, K / G] in bfloat16, float16 or float32.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from fdk_jax.files.bits import WIDTHS, turned
from fdk_jax.files.contents import Stored, quantised_tensor
from fdk_jax.files.groups import Group, split

NAME = "MLX"


def weights(
    settings: Mapping[str, Any], stored: Mapping[str, Stored], notes: list[str]
) -> dict[str, Stored]:
    """The weights of a checkpoint by name; see `fdk_jax.files.folder`.

    Raises:
        ValueError: a mode other than affine.
    """
    groups, rest = split(stored, "scales", ("weight", "biases"))
    made = {}
    for group in groups:
        own = settings.get(group.module)
        options = {**settings, **own} if isinstance(own, Mapping) else settings
        if options.get("mode", "affine") != "affine":
            raise ValueError(f"MLX with mode={options['mode']!r} is not supported, only affine")
        made[f"{group.module}.weight"] = _weight(group, options["bits"], options["group_size"])
    return made | rest


def _weight(group: Group, bits: int, group_size: int) -> Stored:
    words, scale = group.dtype("weight", "U32"), group.dtype("scales", "BF16", "F16", "F32")
    if bits not in WIDTHS:
        raise ValueError(
            f"{group.module}: MLX weights of {bits} bits are not supported, only of {WIDTHS}"
        )
    n, k, bias = words.shape[0], words.shape[1] * 32 // bits, group["biases"]

    def read():
        scales = scale.array()
        zero = _zero(scales, bias.array())
        return quantised_tensor(
            turned(words.array().view(np.uint8), bits),
            scales,
            np.arange(2**bits, dtype=np.float32) + zero,
            bits=bits,
            group_size=group_size,
            in_features=k,
        )

    return group.weight((n, k), f"{NAME} {bits} bits, group {group_size}", read)


def _zero(scales: np.ndarray, biases: np.ndarray) -> np.float32:
    """The one c for which biases = c * scales, exactly.

    Raises:
        ValueError: there is none: an offset a group is not a codebook.
    """
    wide, offsets = scales.astype(np.float32), biases.astype(np.float32)
    used = wide != 0
    if used.any():
        c = np.float32(offsets[used].flat[0] / wide[used].flat[0])
        # A multiple of a half: then q + c is exact, and so is its product with a narrow scale.
        if 2 * c == np.round(2 * c) and (offsets == c * wide).all():
            return c
    elif not offsets.any():
        return np.float32(0)
    raise ValueError(
        "MLX weights with an offset of its own for each group are not scale times codebook;"
        " they are not supported"
    )
