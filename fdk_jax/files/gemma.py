"""Gemma's own quantised folders (`quant_method` "gemma"): integers of 2, 4 or 8 bits with a scale a row.

Layout of transformers' `gemma_quant`: uint8, lowest bits first, along K; int8 of 8 bits. Embeddings are
`embedding_quantized` with `embedding_scale`.
"""

import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from fdk_jax.files.bits import turned
from fdk_jax.files.contents import Stored, quantised_tensor
from fdk_jax.files.groups import Group, split

NAME = "Gemma"
_SCALES = ("input_activation_scale", "output_activation_scale")


def weights(
    settings: Mapping[str, Any], stored: Mapping[str, Stored], notes: list[str]
) -> dict[str, Stored]:
    """The weights of a checkpoint by name; see `fdk_jax.files.folder`."""
    linears, rest = split(stored, "weight_scale", ("weight", *_SCALES))
    tables, rest = split(rest, "embedding_quantized", ("embedding_scale",))
    made = {
        f"{g.module}.weight": _weight(g, "weight", "weight_scale", _bits(settings, g.module))
        for g in linears
    }
    for g in tables:
        bits = _bits(settings, g.module)
        made[f"{g.module}.weight"] = _weight(g, "embedding_quantized", "embedding_scale", bits)
    calibrated = any(
        float(g[name].array().ravel()[0]) for g in linears for name in _SCALES if name in g
    )
    if calibrated:
        notes.append("activations are exact here; the checkpoint was made for 8-bit activations")
    return made | rest


def _bits(settings: Mapping[str, Any], module: str) -> int:
    """The first pattern that a module's name matches says its width."""
    default = int(settings.get("num_bits", 4))
    for pattern, options in (settings.get("module_quant_configs") or {}).items():
        if re.search(pattern, module):
            return int((options or {}).get("num_bits", default))
    return default


def _weight(group: Group, codes: str, scales: str, bits: int) -> Stored:
    packed, scale = group.dtype(codes, "I8" if bits == 8 else "U8"), group.dtype(scales, "F32")
    if bits not in (2, 4, 8):
        raise ValueError(
            f"{group.module}: Gemma weights of {bits} bits are not supported, only of 2, 4 and 8"
        )
    n, k = packed.shape[0], packed.shape[1] * 8 // bits
    groups = scale.shape[-1]
    if scale.shape != (n, groups) or not groups or k % groups:
        raise ValueError(f"{group.module}: scales {scale.shape} do not divide a weight [{n}, {k}]")

    def read():
        raw = packed.array().view(np.uint8)
        raw = raw ^ np.uint8(0x80) if bits == 8 else turned(raw, bits)
        values = np.arange(2**bits) - 2 ** (bits - 1)
        return quantised_tensor(
            raw, scale.array(), values, bits=bits, group_size=k // groups, in_features=k
        )

    return group.weight((n, k), f"{NAME} {bits} bits, group {k // groups}", read)
