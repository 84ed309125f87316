"""Kinds of values of a Hugging Face `config.json`: a wrong one is named, and not computed with."""

import math
from collections.abc import Mapping
from typing import Any

_MOST = {
    "num_hidden_layers": 10_000
}  # more would be read for minutes before a name is found missing
# Integers of at least 1.
_COUNTS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "max_position_embeddings",
    "original_max_position_embeddings",
    "num_experts_per_tok",
    "moe_intermediate_size",
    "decoder_sparse_step",
    "no_rope_layer_interval",
    "sliding_window_pattern",
)
# Integers of at least 0, which some files write for "none".
_COUNTS_OR_NONE = ("sliding_window", "max_window_layers", "num_experts", "num_local_experts")
# Finite numbers above 0.
_POSITIVE = (
    "rope_theta",
    "rope_local_base_freq",
    "partial_rotary_factor",
    "query_pre_attn_scalar",
    "logits_scaling",
    "swiglu_limit",
    "swiglu_alpha",
)
# Finite numbers of at least 0.
_NUMBERS = (
    "rms_norm_eps",
    "attention_multiplier",
    "embedding_multiplier",
    "residual_multiplier",
    "attn_logit_softcapping",
    "final_logit_softcapping",
)
_FLAGS = (
    "tie_word_embeddings",
    "attention_bias",
    "mlp_bias",
    "use_sliding_window",
    "norm_topk_prob",
    "use_bidirectional_attention",
)
_TEXTS = ("model_type", "hidden_act", "hidden_activation", "dtype", "torch_dtype")
_OBJECTS = ("text_config", "rope_scaling", "rope_parameters")
_LISTS = ("layer_types", "no_rope_layers", "mlp_only_layers")
# Of `rope_scaling` and `rope_parameters`.
_ROPE_FLAGS = ("truncate", "finetuned")
_ROPE_TEXTS = ("rope_type", "type")
_ROPE_LISTS = ("short_factor", "long_factor")
_ROPE_NUMBERS = (
    "rope_theta",
    "partial_rotary_factor",
    "factor",
    "low_freq_factor",
    "high_freq_factor",
    "original_max_position_embeddings",
    "attention_factor",
    "beta_fast",
    "beta_slow",
    "mscale",
    "mscale_all_dim",
    "llama_4_scaling_beta",
)


def check(config: Mapping[str, Any]) -> None:
    """Refuses values that are not of their key's kind; null is none at all.

    Raises:
        ValueError: names the key, its value and what it must be.
    """
    for key, value in config.items():
        wanted = None if value is None else _wanted(key, value)
        if wanted:
            raise ValueError(f"config.json has {key}={value!r}, which must be {wanted}")
        if key in ("rope_scaling", "rope_parameters") and value:
            _check_rope(key, value)


def _wanted(key: str, value: Any) -> str | None:
    """What a value must be and is not."""
    if key in _COUNTS or key in _COUNTS_OR_NONE:
        low, high = int(key in _COUNTS), _MOST.get(key, 2**40)
        right = type(value) is int and low <= value <= high
        return None if right else f"an integer from {low} to {high}"
    if key in _POSITIVE:
        return None if _is_number(value) and value > 0 else "a number above 0"
    if key in _NUMBERS:
        return None if _is_number(value) and value >= 0 else "a number, not below 0"
    kinds = (
        (_FLAGS, bool, "true or false"),
        (_TEXTS, str, "a text"),
        (_OBJECTS, Mapping, "a JSON object"),
        (_LISTS, (list, tuple), "a list"),
    )
    for keys, kind, words in kinds:
        if key in keys:
            return None if isinstance(value, kind) else words
    return None


def _check_rope(name: str, parameters: Mapping[str, Any]) -> None:
    for key, value in parameters.items():
        if value is None:
            continue
        if isinstance(value, Mapping):  # of a kind of layers
            _check_rope(f"{name}.{key}", value)
            continue
        if key in _ROPE_TEXTS:
            right, words = isinstance(value, str), "a text"
        elif key in _ROPE_FLAGS:
            right, words = isinstance(value, bool), "true or false"
        elif key in _ROPE_LISTS:
            right = isinstance(value, (list, tuple)) and all(
                _is_number(one) and one > 0 for one in value
            )
            words = "a list of numbers above 0"
        elif key in _ROPE_NUMBERS:
            right, words = _is_number(value), "a finite number"
        else:
            continue  # refused by its name, if it is not understood
        if not right:
            raise ValueError(f"config.json has {name}.{key}={value!r}, which must be {words}")


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)
