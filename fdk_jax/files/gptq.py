"""GPTQ folders: words of 32 bits along K, one integer zero point a group.

Layout of AutoGPTQ and GPTQModel: `qweight` int32 [K / (32 / b), N], `scales` float16 [K / G, N], `qzeros`
int32 [K / G, N / (32 / b)] with the zero point minus 1 ("gptq") or itself ("gptq_v2"), `g_idx` int32 [K].
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from fdk_jax.files.bits import unpack
from fdk_jax.files.contents import Stored
from fdk_jax.files.groups import Group, split
from fdk_jax.files.zero_points import with_zeros

NAME = "GPTQ"


def weights(
    settings: Mapping[str, Any], stored: Mapping[str, Stored], notes: list[str]
) -> dict[str, Stored]:
    """The weights of a checkpoint by name; see `fdk_jax.files.folder`.

    Raises:
        ValueError: a width or a variant that is not supported.
    """
    bits, version = settings.get("bits"), settings.get("checkpoint_format") or "gptq"
    if bits not in (2, 4, 8):
        raise ValueError(f"GPTQ of {bits} bits is not supported, only 2, 4 and 8")
    if version not in ("gptq", "gptq_v2"):
        raise ValueError(f"GPTQ with checkpoint_format={version!r} is not supported")
    groups, rest = split(stored, "qweight", ("qzeros", "scales", "g_idx"))
    offset = 1 if version == "gptq" else 0
    unordered = [group.module for group in groups if "g_idx" not in group]
    if settings.get("desc_act") and unordered:
        raise ValueError(f"desc_act=true, and {unordered[0]} has no g_idx: which order is it in?")
    made = {f"{group.module}.weight": _weight(group, bits, offset) for group in groups}
    return made | rest


def _weight(group: Group, bits: int, offset: int) -> Stored:
    words, scale = group.dtype("qweight", "I32"), group.dtype("scales", "F16", "BF16", "F32")
    zero = group.dtype("qzeros", "I32")
    k, n = words.shape[0] * 32 // bits, words.shape[1]
    if scale.shape[1] != n or k % scale.shape[0]:
        raise ValueError(f"{group.module}: scales {scale.shape} do not divide a weight [{n}, {k}]")
    g = k // scale.shape[0]

    def read():
        if "g_idx" in group and (group["g_idx"].array() != np.arange(k) // g).any():
            raise ValueError("GPTQ with act-order (desc_act) is not supported")
        codes = unpack(np.ascontiguousarray(words.array().T).view(np.uint8), bits)
        zeros = unpack(zero.array().view(np.uint8), bits)[:, :n].T
        if offset and (zeros == 2**bits - 1).any():
            raise ValueError(
                f"GPTQ with a stored zero point of {2**bits - 1} is not supported: tools disagree on it"
            )
        scales = np.ascontiguousarray(scale.array().T)
        return with_zeros(codes, zeros.astype(np.int32) + offset, scales, bits=bits, group_size=g)

    return group.weight((n, k), f"{NAME} {bits} bits, group {g}", read)
