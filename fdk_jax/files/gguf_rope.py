"""RoPE's scaling in GGUF's metadata and tensors, as Hugging Face writes it."""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

# Tensors that say how frequencies are scaled, and belong to no layer.
FACTORS = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")
_FREQUENCIES, _LONG, _SHORT = FACTORS
_PREFIX = "rope.scaling."
_YARN = {
    "factor": "factor",
    "original_context_length": "original_max_position_embeddings",
    "yarn_attn_factor": "attention_factor",
    "yarn_beta_fast": "beta_fast",
    "yarn_beta_slow": "beta_slow",
    "yarn_log_multiplier": "mscale_all_dim",
}


def number(value: Any) -> Any:
    """A float as it was written before it became a float32: 1e-06, not 9.999999974752427e-07."""
    return float(str(np.float32(value))) if isinstance(value, (float, np.floating)) else value


def scaling(
    arch: str, own: Mapping[str, Any], factors: Mapping[str, np.ndarray], out: Mapping[str, Any]
) -> dict[str, Any] | None:
    """`rope_scaling` of `config.json`, or None.

    Args:
        arch: the file's architecture.
        own: its metadata, without the architecture's name before each key.
        factors: its tensors of `FACTORS`.
        out: what `config.json` has so far.

    Raises:
        ValueError: a scaling that is not supported or not understood.
    """
    found = {k.removeprefix(_PREFIX): v for k, v in own.items() if k.startswith(_PREFIX)}
    if found.pop("finetuned", None) is False and arch == "granite":
        raise ValueError(
            "GGUF with granite.rope.scaling.finetuned=false (no RoPE) is not supported"
        )
    # A factor alone is one of linear scaling; beside an explicit "none" it says nothing.
    kind = found.pop("type", None) or ("linear" if found.get("factor") else "none")
    if _LONG in factors or _SHORT in factors:
        return _longrope(kind, found, factors)
    if _FREQUENCIES in factors:
        if kind not in ("none", "llama3") or arch == "phi3":
            raise ValueError(
                f"GGUF with rope_freqs.weight and RoPE scaling {kind!r} is not supported"
            )
        return _llama3(factors[_FREQUENCIES], out["rope_theta"], out["head_dim"])
    for key in ("attn_factor", "yarn_ext_factor"):
        if found.pop(key, 1.0) != 1:
            raise ValueError(f"GGUF with {arch}.{_PREFIX}{key} other than 1 is not supported")
    if kind == "none":
        return None
    if kind not in ("linear", "yarn"):
        raise ValueError(f"GGUF with RoPE scaling {kind!r} is not supported")
    names = _YARN if kind == "yarn" else {"factor": "factor"}
    unknown = [key for key in found if key not in names]
    if unknown or "factor" not in found:
        raise ValueError(f"GGUF with RoPE scaling {kind!r} and {sorted(found)} is not supported")
    made = {"rope_type": kind} | {names[key]: number(value) for key, value in found.items()}
    if made.get("mscale_all_dim"):
        made["mscale"] = 1.0
    return made


def _longrope(
    kind: str, found: Mapping[str, Any], factors: Mapping[str, np.ndarray]
) -> dict[str, Any]:
    """Phi's: each frequency has a factor of its own, others beyond the original context."""
    missing = [name for name in (_LONG, _SHORT) if name not in factors]
    unknown = sorted(set(found) - {"attn_factor", "original_context_length"})
    if kind not in ("none", "longrope") or missing or unknown or _FREQUENCIES in factors:
        raise ValueError(
            f"GGUF with RoPE scaling {kind!r}, {sorted(found)} and {sorted(factors)} is not supported"
        )
    if "original_context_length" not in found:
        raise ValueError(f"GGUF with {_LONG} lacks {_PREFIX}original_context_length")
    return {
        "rope_type": "longrope",
        "long_factor": [number(value) for value in factors[_LONG].ravel()],
        "short_factor": [number(value) for value in factors[_SHORT].ravel()],
        "original_max_position_embeddings": found["original_context_length"],
        "attention_factor": number(found.get("attn_factor", 1.0)),
    }


def _llama3(factors: np.ndarray, theta: float, head_dim: int) -> dict[str, Any]:
    """Llama 3's RoPE scaling, of which a file keeps only what divides each frequency.

    Raises:
        ValueError: these are not the factors of any Llama 3 model.
    """
    low, high, context = 1.0, 4.0, 8192
    factor = float(factors.max())
    inverse = 1.0 / theta ** (np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    wavelength = 2 * math.pi / inverse
    smooth = (context / wavelength - low) / (high - low)
    blend = 1 / ((1 - smooth) / factor + smooth)
    wanted = np.where(wavelength > context / low, factor, blend)
    wanted = np.where(wavelength < context / high, 1.0, wanted)
    if factors.shape != wanted.shape or not np.allclose(factors, wanted, rtol=1e-5):
        raise ValueError("GGUF with rope_freqs.weight other than Llama 3's is not supported")
    return {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": low,
        "high_freq_factor": high,
        "original_max_position_embeddings": context,
    }
