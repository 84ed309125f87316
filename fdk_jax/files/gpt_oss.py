"""MXFP4 experts of gpt-oss: `P_blocks` [E, N, K / 32, 16] and `P_scales` [E, N, K / 32].

Rows of gate and up alternate, as in the float tensor of the same name; that one is [E, K, N].
"""

from collections.abc import Mapping
from typing import Any

from fdk_jax.files.compressed_tensors import mxfp4
from fdk_jax.files.contents import Stored
from fdk_jax.files.groups import Group

NAME = "gpt-oss MXFP4"


def weights(
    settings: Mapping[str, Any], stored: Mapping[str, Stored], notes: list[str]
) -> dict[str, Stored]:
    """The weights of a checkpoint by name; see `fdk_jax.files.folder`."""
    made = {}
    for name, array in stored.items():
        if name.endswith("_scales"):
            if name.removesuffix("_scales") + "_blocks" not in stored:
                raise ValueError(f"{name} has no blocks: the checkpoint is not complete")
        elif not name.endswith("_blocks"):
            made[name] = array
        else:
            base = name.removesuffix("_blocks")
            parts = {"blocks": array, "scales": stored.get(base + "_scales")}
            group = Group(base, {key: part for key, part in parts.items() if part is not None})
            made[base] = mxfp4(group, "blocks", "scales", NAME)
    return made
