"""NVFP4 folders of NVIDIA ModelOpt: scales times `weight_scale_2`."""

from collections.abc import Mapping
from typing import Any

from fdk_jax.files.compressed_tensors import nvfp4
from fdk_jax.files.contents import Stored
from fdk_jax.files.groups import split, without_cache_scales

NAME = "ModelOpt"


def weights(
    settings: Mapping[str, Any], stored: Mapping[str, Stored], notes: list[str]
) -> dict[str, Stored]:
    """The weights of a checkpoint by name; see `fdk_jax.files.folder`.

    Raises:
        ValueError: an algorithm other than NVFP4.
    """
    settings = {**settings, **(settings.get("quantization") or {})}
    algorithm = settings.get("quant_algo")
    if algorithm not in ("NVFP4", "NVFP4_AWQ", "W4A16_NVFP4"):
        raise ValueError(f"ModelOpt with quant_algo={algorithm!r} is not supported, only NVFP4")
    if settings.get("kv_cache_quant_algo") or settings.get("kv_cache_scheme"):
        stored = without_cache_scales(stored, notes)
    groups, rest = split(
        stored, "weight_scale_2", ("weight", "weight_scale", "input_scale", "pre_quant_scale")
    )
    if any("pre_quant_scale" in group for group in groups):
        raise ValueError("ModelOpt with pre_quant_scale (scaled activations) is not supported")
    if any("input_scale" in group for group in groups):
        notes.append(
            "activations are exact here; the checkpoint was made for 4-bit float activations"
        )
    made = {
        f"{group.module}.weight": nvfp4(group, "weight", "weight_scale_2", NAME, divide=False)
        for group in groups
    }
    return made | rest
