"""bitsandbytes folders of 4 bits: NF4 and FP4, nested scales too.

Layout of `bitsandbytes.functional.quantize_4bit`: `weight` uint8 [N * K / 2, 1], the first code in the high
bits; `weight.absmax` for runs of `blocksize` weights of the flattened matrix; `weight.quant_map` float32 [16];
`weight.quant_state.bitsandbytes__nf4` a JSON text in bytes. Nested: uint8 `absmax` indexes
`weight.nested_quant_map`, times `weight.nested_absmax` of `nested_blocksize` of them, plus `nested_offset`.
"""

import json
from collections.abc import Mapping
from typing import Any

import numpy as np

from fdk_jax.files.bits import recoded, sorted_values
from fdk_jax.files.contents import Stored, quantised_tensor
from fdk_jax.files.groups import Group, split

NAME = "bitsandbytes"
_STATES = tuple(f"weight.quant_state.bitsandbytes__{kind}" for kind in ("nf4", "fp4"))
_PARTS = ("weight", "weight.absmax", "weight.nested_absmax", "weight.nested_quant_map", *_STATES)


def weights(
    settings: Mapping[str, Any], stored: Mapping[str, Stored], notes: list[str]
) -> dict[str, Stored]:
    """The weights of a checkpoint by name; see `fdk_jax.files.folder`.

    Raises:
        ValueError: codes of 8 bits, or a storage that is not bytes.
    """
    if settings.get("load_in_8bit") or any(name.endswith(".SCB") for name in stored):
        raise ValueError("bitsandbytes of 8 bits (LLM.int8) is not supported, only NF4 and FP4")
    if settings.get("bnb_4bit_quant_storage", "uint8") != "uint8":
        raise ValueError(
            f"bitsandbytes with bnb_4bit_quant_storage={settings['bnb_4bit_quant_storage']!r} is not"
            " supported, only uint8"
        )
    groups, rest = split(stored, "weight.quant_map", _PARTS)
    return {f"{group.module}.weight": _weight(group) for group in groups} | rest


def _weight(group: Group) -> Stored:
    name = next((state for state in _STATES if state in group), _STATES[0])
    state = json.loads(np.asarray(group.dtype(name, "U8").array()).tobytes())
    packed, absmax = group.dtype("weight", "U8"), group["weight.absmax"]
    shape, size, quant_map = state["shape"], int(state["blocksize"]), group["weight.quant_map"]
    if len(shape) != 2:
        raise ValueError(f"{group.module}: bitsandbytes weights of shape {shape} are not supported")
    n, k = shape
    if k % size:
        raise ValueError(
            f"{group.module}: bitsandbytes blocks of {size} weights that run over the ends of rows of {k}"
            " are not supported"
        )

    def read():
        scales = absmax.array()
        if scales.dtype == np.uint8:
            scales = _nested(group, scales, state)
        values, codes = sorted_values(quant_map.array().astype(np.float32))
        bytes_ = packed.array().reshape(n, k // 2)
        if (codes != np.arange(16)).any():
            bytes_ = recoded(bytes_, codes, 4)
        scales = scales.astype(np.float32, copy=False).reshape(n, k // size)
        return quantised_tensor(bytes_, scales, values, bits=4, group_size=size, in_features=k)

    return group.weight((n, k), f"{NAME} {state['quant_type'].upper()}, group {size}", read)


def _nested(group: Group, scales: np.ndarray, state: Mapping[str, Any]) -> np.ndarray:
    """Float32 scales of uint8 ones, as `dequantize_blockwise` computes them."""
    table = group["weight.nested_quant_map"].array().astype(np.float32)
    factors = group["weight.nested_absmax"].array().astype(np.float32)
    spread = np.repeat(factors, int(state["nested_blocksize"]))[: scales.size]
    flat = table[scales.ravel()] * spread
    return flat + np.float32(state["nested_offset"])
