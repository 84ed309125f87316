"""GPTQ folders: words of 32 bits along K, one integer zero point a group.

Layout of AutoGPTQ and GPTQModel: `qweight` int32 [K / (32 / b), N], `scales` float16 [K / G, N], `qzeros`
int32 [K / G, N / (32 / b)] with the zero point minus 1 ("gptq") or itself ("gptq_v2"), `g_idx` int32 [K].
"""

import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from fdk_jax.files.bits import unpack
from fdk_jax.files.contents import Stored
from fdk_jax.files.groups import Group, size_of, split
from fdk_jax.files.zero_points import with_zeros

NAME = "GPTQ"
# What GPTQModel's `dynamic` may say of some modules; the others of these change how codes were found alone.
_DYNAMIC = {"bits", "group_size", "desc_act", "sym", "mse", "damp_percent", "damp_auto_increment"}


def weights(
    settings: Mapping[str, Any], stored: Mapping[str, Stored], notes: list[str]
) -> dict[str, Stored]:
    """The weights of a checkpoint by name; see `fdk_jax.files.folder`.

    Raises:
        ValueError: a width or a variant that is not supported.
    """
    version = settings.get("checkpoint_format") or "gptq"
    if version not in ("gptq", "gptq_v2"):
        raise ValueError(f"GPTQ with checkpoint_format={version!r} is not supported")
    groups, rest = split(stored, "qweight", ("qzeros", "scales", "g_idx"))
    offset = 1 if version == "gptq" else 0
    made = {}
    for group in groups:
        own = _of_module(settings, group.module)
        if own.get("bits") not in (2, 4, 8):
            raise ValueError(f"GPTQ of {own.get('bits')} bits is not supported, only 2, 4 and 8")
        if own.get("desc_act") and "g_idx" not in group:
            raise ValueError(
                f"desc_act=true, and {group.module} has no g_idx: which order is it in?"
            )
        made[f"{group.module}.weight"] = _weight(group, own["bits"], offset, own.get("group_size"))
    return made | rest


def _of_module(settings: Mapping[str, Any], module: str) -> Mapping[str, Any]:
    """The settings of a module: those of the first pattern of `dynamic` that its name begins with go first.

    GPTQModel's patterns are regular expressions; "-:" before one says that its modules are not quantised.

    Raises:
        ValueError: `dynamic` is not understood, or says of a quantised module that it is none.
    """
    dynamic = settings.get("dynamic") or {}
    if not isinstance(dynamic, Mapping):
        raise ValueError(f"GPTQ with dynamic={dynamic!r} is not supported: it must be an object")
    for pattern, own in dynamic.items():
        if not isinstance(own, Mapping):
            raise ValueError(f"GPTQ with dynamic {pattern!r}: {own!r} must be an object")
        left_out = pattern.startswith("-:")
        try:
            found = re.match(pattern.removeprefix("-:" if left_out else "+:"), module)
        except re.error as error:
            raise ValueError(f"GPTQ with dynamic: {pattern!r} is no pattern: {error}") from None
        if found and left_out:
            raise ValueError(f"{module} is quantised, and dynamic leaves it out by {pattern!r}")
        if found:
            unknown = sorted(set(own) - _DYNAMIC)
            if unknown:
                raise ValueError(
                    f"GPTQ with dynamic {unknown[0]}={own[unknown[0]]!r} of {pattern!r}"
                    " is not supported"
                )
            return {**settings, **own}
    return settings


def _weight(group: Group, bits: int, offset: int, group_size: Any) -> Stored:
    words, scale = group.dtype("qweight", "I32"), group.dtype("scales", "F16", "BF16", "F32")
    zero = group.dtype("qzeros", "I32")
    k, n = words.shape[0] * 32 // bits, words.shape[1]
    if len(scale.shape) != 2 or scale.shape[1] != n:
        raise ValueError(f"{group.module}: scales {scale.shape} do not fit a weight [{n}, {k}]")
    g = size_of(group.module, k, scale.shape[0], group_size)

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
