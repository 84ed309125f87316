"""AWQ folders: words of 32 bits along N, (q - zero) * scale.

Layout of AutoAWQ's "gemm" version: `qweight` int32 [K, N / 8], `qzeros` int32 [K / G, N / 8], `scales` float16
[K / G, N]; nibble i of a word belongs to column 0 2 4 6 1 3 5 7 [i].
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from fdk_jax.files.bits import unpack
from fdk_jax.files.contents import Stored
from fdk_jax.files.groups import Group, size_of, split
from fdk_jax.files.zero_points import with_zeros

NAME = "AWQ"
_COLUMN_OF_NIBBLE = (0, 2, 4, 6, 1, 3, 5, 7)


def weights(
    settings: Mapping[str, Any], stored: Mapping[str, Stored], notes: list[str]
) -> dict[str, Stored]:
    """The weights of a checkpoint by name; see `fdk_jax.files.folder`.

    Raises:
        ValueError: a width or a version that is not supported.
    """
    bits = settings.get("bits", settings.get("w_bit"))
    version = str(settings.get("version", "gemm")).lower()
    if bits != 4:
        raise ValueError(f"AWQ of {bits} bits is not supported, only 4")
    if version != "gemm":
        raise ValueError(f"AWQ of version={version!r} is not supported, only gemm")
    groups, rest = split(stored, "qweight", ("qzeros", "scales"))
    if groups:
        notes.append(
            "AWQ weights with several zero points are held exactly, in 8 bits a weight instead of 4"
        )
    size = settings.get("group_size", settings.get("q_group_size"))
    return {f"{group.module}.weight": _weight(group, size) for group in groups} | rest


def _weight(group: Group, group_size: Any) -> Stored:
    words, scale = group.dtype("qweight", "I32"), group.dtype("scales", "F16", "BF16", "F32")
    zero = group.dtype("qzeros", "I32")
    k, n = words.shape[0], words.shape[1] * 8
    if len(scale.shape) != 2 or scale.shape[1] != n:
        raise ValueError(f"{group.module}: scales {scale.shape} do not fit a weight [{n}, {k}]")
    g = size_of(group.module, k, scale.shape[0], group_size)

    def read():
        codes = np.ascontiguousarray(_columns(words.array()).T)
        scales = np.ascontiguousarray(scale.array().T)
        return with_zeros(codes, _columns(zero.array()).T, scales, bits=4, group_size=g)

    return group.weight((n, k), f"{NAME} 4 bits, group {g}", read)


def _columns(words: np.ndarray) -> np.ndarray:
    """Codes uint8 [rows, N] of words int32 [rows, N / 8]."""
    nibbles = unpack(np.ascontiguousarray(words).view(np.uint8), 4).reshape(len(words), -1, 8)
    return nibbles[..., np.argsort(_COLUMN_OF_NIBBLE)].reshape(len(words), -1)
