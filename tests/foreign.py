"""Small checkpoint folders in other programs' layouts, and what they hold, without code of the library."""

import json
from pathlib import Path

import numpy as np
import safetensors.numpy

from fdk_jax.format.quantised_tensor import QuantisedTensor


def folder(path: Path, arrays: dict, config: dict, **files_: dict) -> Path:
    """A checkpoint folder."""
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text(json.dumps({"model_type": "llama"} | config))
    for name, settings in files_.items():
        (path / f"{name}.json").write_text(json.dumps(settings))
    safetensors.numpy.save_file(arrays, path / "model.safetensors")
    return path


def values(w: QuantisedTensor) -> np.ndarray:
    """Float32 values of an interchange tensor by a few lines that share no code with the library."""
    per_byte = 8 // w.bits
    shifts = [8 - w.bits * (i + 1) for i in range(per_byte)]
    codes = np.stack([(np.asarray(w.packed) >> s) & (2**w.bits - 1) for s in shifts], -1)
    codes = codes.reshape(*codes.shape[:-2], -1)[..., : w.shape[1]]
    table = np.asarray(w.codebook).reshape(-1, 2**w.bits)[0]
    scales = np.asarray(w.scales).astype(np.float32)
    spread = np.repeat(scales, w.group_size, axis=-1)[..., : w.shape[1]]
    return table[codes] * spread


def words(codes: np.ndarray, bits: int) -> np.ndarray:
    """int32 words of codes along the last axis, lowest bits first."""
    per_word = 32 // bits
    fields = codes.reshape(*codes.shape[:-1], -1, per_word).astype(np.uint64)
    shifts = np.arange(per_word, dtype=np.uint64) * np.uint64(bits)
    return (fields << shifts).sum(-1).astype(np.uint32).view(np.int32)
