"""RoPE as Hugging Face's `config.json` writes it: `rope_theta`, `rope_scaling`, `rope_parameters`.

As transformers reads it: `rope_scaling` goes before `rope_parameters` where a file has both, and a parameter
goes before a field of the same name beside it.
"""

import math
from collections.abc import Mapping
from typing import Any

from fdk_jax.models.config import Rope, RopeScaling

_COMMON = ("rope_type", "type", "rope_theta", "partial_rotary_factor", "finetuned")
_KEYS = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "yarn": (
        "factor",
        "original_max_position_embeddings",
        "attention_factor",
        "beta_fast",
        "beta_slow",
        "mscale",
        "mscale_all_dim",
        "truncate",
    ),
    "longrope": (
        "short_factor",
        "long_factor",
        "factor",
        "original_max_position_embeddings",
        "attention_factor",
    ),
}


def read_rope(
    parameters: Mapping[str, Any],
    config: Mapping[str, Any],
    *,
    theta: float,
    head_dim: int,
    partial: float | None = None,
    grows: bool = False,
) -> Rope:
    """The rotary embedding of one kind of layer.

    Args:
        parameters: `rope_scaling` or `rope_parameters`, or the entry of a layer type in it.
        config: The whole file.
        theta: Base where the parameters have none.
        head_dim: Width of a head.
        partial: Share of it that is rotated, where the parameters do not say; None in families that rotate
            whole heads.
        grows: Whether the family multiplies queries by what grows with their position.

    Raises:
        ValueError: a kind or a parameter that is not implemented, or one that is missing, by its name.
    """
    kind = parameters.get("rope_type") or parameters.get("type") or "default"
    if kind not in _KEYS:
        raise ValueError(f"rope_type={kind!r} is not implemented; one of {sorted(_KEYS)} is")
    understood = {*_COMMON, *_KEYS[kind], *(_KEYS["llama3"] if kind == "default" else ())}
    growth = parameters.get("llama_4_scaling_beta") if grows else None
    if grows:
        understood |= {"llama_4_scaling_beta", "max_position_embeddings"}
    for name, value in parameters.items():
        if name not in understood and value is not None:
            raise ValueError(f"{name}={value!r} of rope_type={kind!r} is not implemented")
    theta = float(parameters.get("rope_theta") or theta)
    share = float(_given(parameters, "partial_rotary_factor", 1.0 if partial is None else partial))
    if partial is None and share != 1:
        raise ValueError(f"partial_rotary_factor={share} is not implemented for this model_type")
    rotary = int(head_dim * share)
    scaling, factor = _scaling(kind, parameters, config, rotary)
    return Rope(
        theta,
        scaling,
        None if rotary == head_dim else rotary,
        factor=factor,
        query_growth=(float(growth), scaling.original_context) if growth and scaling else None,
    )


def _scaling(
    kind: str, parameters: Mapping[str, Any], config: Mapping[str, Any], rotary: int
) -> tuple[RopeScaling | None, float]:
    """The scaling, and the factor of cosines and sines."""
    context = config.get("max_position_embeddings") or 2048

    def need(name: str) -> Any:
        value = parameters.get(name)
        if value is None:
            raise ValueError(f"rope_type={kind!r} needs {name!r}, got {dict(parameters)}")
        return value

    if kind == "default":
        return None, 1.0
    if kind == "linear":
        return RopeScaling("linear", float(need("factor"))), 1.0
    if kind == "dynamic":
        return RopeScaling("dynamic", float(need("factor")), original_context=context), 1.0
    # A field of this name beside the parameters goes first here, as in transformers.
    original = config.get("original_max_position_embeddings")
    original = original or parameters.get("original_max_position_embeddings") or context
    if kind == "llama3":
        scaling = RopeScaling(
            "llama3",
            float(need("factor")),
            low_freq_factor=float(need("low_freq_factor")),
            high_freq_factor=float(need("high_freq_factor")),
            original_context=int(original),
        )
        return scaling, 1.0
    factor = float(parameters.get("factor") or context / original)
    if kind == "yarn":
        scaling = RopeScaling(
            "yarn",
            factor,
            original_context=int(original),
            beta_fast=float(parameters.get("beta_fast") or 32),
            beta_slow=float(parameters.get("beta_slow") or 1),
            truncate=bool(_given(parameters, "truncate", True)),
        )
        return scaling, float(_given(parameters, "attention_factor", _yarn(parameters, factor)))
    short, long = (tuple(map(float, need(f"{name}_factor"))) for name in ("short", "long"))
    if {len(short), len(long)} != {rotary // 2}:
        raise ValueError(
            f"short_factor and long_factor have {len(short)} and {len(long)} values, not {rotary // 2}"
        )
    scaling = RopeScaling(
        "longrope", original_context=int(original), short_factors=short, long_factors=long
    )
    usual = 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original))
    return scaling, float(_given(parameters, "attention_factor", usual))


def _yarn(parameters: Mapping[str, Any], factor: float) -> float:
    """The usual factor of attention (arXiv 2309.00071, equation 22)."""

    def scale(weight: float = 1.0) -> float:
        return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0

    above, below = parameters.get("mscale"), parameters.get("mscale_all_dim")
    return scale(above) / scale(below) if above and below else scale()


def _given(values: Mapping[str, Any], name: str, otherwise: Any) -> Any:
    """A value that may be absent or null."""
    value = values.get(name)
    return otherwise if value is None else value
