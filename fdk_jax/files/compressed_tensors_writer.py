"""Weights written as a folder of compressed-tensors (pack-quantized), which vLLM and transformers read."""

import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy

from fdk_jax.files.atomic import new_folder
from fdk_jax.files.bits import pack, turned, unpack
from fdk_jax.files.folder import read_config
from fdk_jax.files.safetensors_folder import INDEX
from fdk_jax.format.quantised_tensor import QuantisedTensor

Weight = QuantisedTensor | np.ndarray
_KEPT = ("*.json", "*.jinja", "*.model", "*.txt")


def encode(w: QuantisedTensor) -> dict[str, np.ndarray] | None:
    """`weight_packed`, `weight_scale` and `weight_shape` of a matrix [N, K]; None if it is not integers.

    Its codebook must be a multiple of the integers -2**(bits - 1), ... that fits the dtype of its scales to the
    last bit.
    """
    codebook = np.asarray(w.codebook).reshape(-1, 2**w.bits)
    codes = unpack(np.asarray(w.packed), w.bits, lowest_first=False)[:, : w.in_features]
    if (codebook != codebook[0]).any() or w.bits not in (4, 8) or w.in_features % w.group_size:
        return None
    used = np.unique(codes)
    wanted, half = codebook[0][used], 2 ** (w.bits - 1)
    largest = wanted[np.abs(wanted).argmax()]
    for top in (*range(half, 0, -1),) if largest else ():
        factor = np.float32(abs(largest) / top)
        integers = wanted / factor
        if (integers != np.rint(integers)).any() or integers.max() > half - 1:
            continue
        scales = np.asarray(w.scales)
        scaled = (scales.astype(np.float32) * factor).astype(scales.dtype)
        if (scaled.astype(np.float32) != scales.astype(np.float32) * factor).any():
            return None
        table = np.zeros(2**w.bits, np.uint8)
        table[used] = (integers + half).astype(np.uint8)
        codes = np.pad(table[codes], [(0, 0), (0, -codes.shape[1] % (32 // w.bits))])
        return {
            "weight_packed": turned(pack(codes, w.bits), w.bits).view(np.int32),
            "weight_scale": scaled,
            "weight_shape": np.asarray([w.out_features, w.in_features], np.int64),
        }
    return None


def write(
    folder: str | os.PathLike,
    weights: Mapping[str, Callable[[], Weight]],
    *,
    like: str | os.PathLike,
) -> None:
    """Writes a checkpoint folder with quantised linear layers.

    Args:
        folder: a folder that does not exist yet.
        weights: Hugging Face's name to a function that gives the array.
        like: the folder of the float model, whose config.json and tokenizer are kept.

    Raises:
        FileExistsError: the folder is there.
        OSError: it could not be written, and is not there.
        ValueError: a quantised weight that is not scale times integers of 4 or 8 bits.
    """
    target, source = Path(folder), Path(like)
    if target.exists():
        raise FileExistsError(f"{target} exists; give the name of a new folder")
    config = read_config(source)
    arrays, schemes, plain = {}, {}, []
    for name, give in weights.items():
        w, module = give(), name.removesuffix(".weight")
        if not isinstance(w, QuantisedTensor):
            arrays[name] = np.ascontiguousarray(w)
            if w.ndim == 2 and "embed" not in module:
                plain.append(module)
            continue
        parts = encode(w)
        if parts is None or "embed" in module:
            raise ValueError(
                f"{module}: compressed-tensors does not hold {w.bits}-bit codes of this codebook: quantise to"
                " 4 or 8 bits with integers as codebook"
            )
        arrays |= {f"{module}.{part}": np.ascontiguousarray(a) for part, a in parts.items()}
        whole = w.group_size >= w.in_features
        schemes.setdefault((w.bits, None if whole else w.group_size), []).append(module)
    config["quantization_config"] = _settings(schemes, plain)
    with new_folder(target) as temporary:
        copy_texts(source, temporary)
        text = json.dumps(config, indent=2) + "\n"
        (temporary / "config.json").write_text(text, encoding="utf-8")
        try:
            safetensors.numpy.save_file(arrays, temporary / "model.safetensors", {"format": "pt"})
        except safetensors.SafetensorError as error:
            raise OSError(f"{target} could not be written: {error}") from error


def copy_texts(source: Path, target: Path) -> None:
    """Copies a checkpoint folder's files but config.json and the weights: tokenizer, templates."""
    left = ("config.json", "quantization_config.json", INDEX)
    for pattern in _KEPT:
        for path in source.glob(pattern):
            if path.name not in left:
                shutil.copy(path, target)


def _settings(schemes: Mapping[tuple, list[str]], plain: list[str]) -> dict[str, Any]:
    groups = {}
    several = len(schemes) > 1
    for i, ((bits, size), modules) in enumerate(schemes.items()):
        groups[f"group_{i}"] = {
            "targets": modules if several else ["Linear"],
            "weights": {
                "num_bits": bits,
                "type": "int",
                "symmetric": True,
                "strategy": "channel" if size is None else "group",
                "group_size": size,
                "dynamic": False,
            },
            "input_activations": None,
            "output_activations": None,
        }
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": plain,
    }
