"""Model configurations and names of GGUF, as Hugging Face writes them."""

import math
import re
from collections.abc import Collection, Mapping
from typing import Any

import numpy as np

# GGUF's architecture: Hugging Face's model_type.
FAMILIES = {
    "llama": "llama",
    "mistral3": "ministral3",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "qwen3moe": "qwen3_moe",
    "smollm3": "smollm3",
    "granite": "granite",
    "gemma2": "gemma2",
    "gemma3": "gemma3",
    "phi3": "phi3",
    "olmo2": "olmo2",
}
# Whose rows of queries and keys are ordered for interleaved RoPE; Hugging Face's are for split halves.
INTERLEAVED = ("llama", "mistral3", "smollm3", "granite")
# Whose norms have 1 added.
NORMS_PLUS_ONE = ("gemma2", "gemma3")

_OUTER = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_LAYER = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_qkv": "self_attn.qkv_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_AROUND = {
    "post_attention_norm": "post_attention_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
# What differs from `_LAYER`.
_OWN: dict[str, dict[str, str]] = {
    "gemma2": {**_AROUND, "ffn_norm": "pre_feedforward_layernorm"},
    "gemma3": {**_AROUND, "ffn_norm": "pre_feedforward_layernorm"},
    "olmo2": _AROUND,
    "phi3": {"ffn_up": "mlp.gate_up_proj"},
    "qwen3moe": {"ffn_gate_inp": "mlp.gate"},
}
# Stacked experts [E, N, K]: the name of one of them, by its number.
_EXPERTS = {
    "qwen3moe": {
        f"ffn_{part}_exps": f"mlp.experts.{{}}.{part}_proj" for part in ("gate", "up", "down")
    },
}
_PLAIN_KEYS = {
    "context_length": "max_position_embeddings",
    "block_count": "num_hidden_layers",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "attention.key_length": "head_dim",
    "rope.freq_base": "rope_theta",
    "attention.sliding_window": "sliding_window",
}
_OWN_KEYS: dict[str, dict[str, str]] = {
    "granite": {
        "attention.scale": "attention_multiplier",
        "embedding_scale": "embedding_multiplier",
        "residual_scale": "residual_multiplier",
        "logit_scale": "logits_scaling",
    },
    "gemma2": {
        "attn_logit_softcapping": "attn_logit_softcapping",
        "final_logit_softcapping": "final_logit_softcapping",
    },
    "gemma3": {"final_logit_softcapping": "final_logit_softcapping"},
    "qwen3moe": {
        "expert_count": "num_experts",
        "expert_used_count": "num_experts_per_tok",
        "expert_feed_forward_length": "moe_intermediate_size",
    },
}
# What every file says, of each layer or of all.
_COUNTS = ("block_count", "embedding_length", "attention.head_count", "feed_forward_length")
# Understood, and said by other keys or checked below.
_CHECKED = ("attention.value_length", "rope.dimension_count", "vocab_size", "rope.scaling.")
_DEFAULTS: dict[str, dict[str, Any]] = {
    "gemma2": {"hidden_activation": "gelu_pytorch_tanh"},
    "gemma3": {"hidden_activation": "gelu_pytorch_tanh", "rope_local_base_freq": 10000.0},
    "qwen3moe": {"norm_topk_prob": True, "decoder_sparse_step": 1, "mlp_only_layers": []},
}


def architecture(metadata: Mapping[str, Any]) -> str:
    """The architecture of a file.

    Raises:
        ValueError: one that is not supported, by its name; metadata that changes what weights mean.
    """
    name = metadata.get("general.architecture")
    if not isinstance(name, str) or name not in FAMILIES:
        raise ValueError(
            f"GGUF architecture {name!r} is not supported; one of {sorted(FAMILIES)} is"
        )
    for key in metadata:
        if re.search("hadamard|rotat(ed|ion)|spinquant|quarot", key, re.IGNORECASE):
            raise ValueError(f"GGUF metadata {key!r} (transformed weights) is not supported")
    return name


def other_metadata(metadata: Mapping[str, Any]) -> list[str]:
    """Keys outside of the namespaces that GGUF defines."""
    known = (
        "general",
        "tokenizer",
        "quantize",
        "split",
        "adapter",
        metadata["general.architecture"],
    )
    return sorted(key for key in metadata if key.split(".", 1)[0] not in known)


def config(
    metadata: Mapping[str, Any],
    names: Collection[str],
    vocab_size: int,
    rope_factors: np.ndarray | None,
) -> dict[str, Any]:
    """Hugging Face's `config.json` of a GGUF file.

    Args:
        metadata: of the file.
        names: of its tensors.
        vocab_size: rows of the embedding.
        rope_factors: the tensor `rope_freqs.weight`: what divides each RoPE frequency.

    Raises:
        ValueError: metadata that is missing, or that is not understood.
    """
    arch = architecture(metadata)
    own = {
        key.removeprefix(f"{arch}."): v for key, v in metadata.items() if key.startswith(f"{arch}.")
    }
    keys = _PLAIN_KEYS | _OWN_KEYS.get(arch, {})
    unknown = [key for key in own if key not in keys and not key.startswith(_CHECKED)]
    if unknown:
        raise ValueError(
            f"GGUF metadata {[f'{arch}.{key}' for key in sorted(unknown)]} is not supported"
        )
    missing = [key for key in _COUNTS if key not in own]
    if missing:
        raise ValueError(f"the GGUF file lacks the metadata {[f'{arch}.{key}' for key in missing]}")
    for key in keys:
        if isinstance(own.get(key), list):
            own[key] = _same_in_all_layers(f"{arch}.{key}", own[key])
    for key in (*_COUNTS, "rope.dimension_count"):
        if key in own and (type(own[key]) is not int or own[key] < 1):
            raise ValueError(f"GGUF metadata {arch}.{key}={own[key]!r} must be a positive integer")
    out = {"model_type": FAMILIES[arch], **_DEFAULTS.get(arch, {})}
    out |= {name: _number(own[key]) for key, name in keys.items() if key in own}
    out.setdefault("num_key_value_heads", out["num_attention_heads"])
    width = own.get("rope.dimension_count", out["hidden_size"] // out["num_attention_heads"])
    out.setdefault("head_dim", width)
    if own.get("attention.value_length", out["head_dim"]) != out["head_dim"]:
        raise ValueError(
            f"GGUF with {arch}.attention.value_length unlike key_length is not supported"
        )
    if own.get("rope.dimension_count", out["head_dim"]) != out["head_dim"]:
        out["partial_rotary_factor"] = own["rope.dimension_count"] / out["head_dim"]
    if arch == "llama" and "sliding_window" in out:
        out["model_type"] = "mistral"
    if arch == "gemma2":
        # Only the largest one scales by the width of a layer's heads.
        of_layer = out["hidden_size"] // out["num_attention_heads"]
        out["query_pre_attn_scalar"] = (
            of_layer if out["num_hidden_layers"] == 46 else out["head_dim"]
        )
    out["vocab_size"] = vocab_size
    out["tie_word_embeddings"] = "output.weight" not in names
    # Qwen2 has them by itself, in its queries, keys and values alone.
    if arch != "qwen2":
        out["attention_bias"] = "blk.0.attn_q.bias" in names
    if arch not in ("qwen2", "qwen3", "qwen3moe"):
        out["mlp_bias"] = "blk.0.ffn_up.bias" in names
    scaling = _rope_scaling(arch, own, rope_factors, out)
    if scaling is not None:
        out["rope_scaling"] = scaling
    if (end := metadata.get("tokenizer.ggml.eos_token_id")) is not None:
        out["eos_token_id"] = end
    return out


def _number(value: Any) -> Any:
    """A float as it was written before it became a float32: 1e-06, not 9.999999974752427e-07."""
    return float(str(np.float32(value))) if isinstance(value, float) else value


def _same_in_all_layers(key: str, values: list) -> Any:
    if len(set(values)) != 1:
        raise ValueError(f"GGUF metadata {key} that differs between layers is not supported")
    return values[0]


def _rope_scaling(
    arch: str, own: Mapping[str, Any], factors: np.ndarray | None, out: Mapping[str, Any]
) -> dict[str, Any] | None:
    scaling = {
        key.removeprefix("rope.scaling."): value
        for key, value in own.items()
        if key.startswith("rope.scaling.")
    }
    kind = scaling.pop("type", "none")
    scaling.pop("finetuned", None)
    if factors is not None:
        if kind not in ("none", "llama3") or arch == "phi3":
            raise ValueError(
                f"GGUF with rope_freqs.weight and RoPE scaling {kind!r} is not supported"
            )
        return _llama3(factors, out["rope_theta"], out["head_dim"])
    if kind in ("none", ""):
        return None
    names = {"factor": "factor", "original_context_length": "original_max_position_embeddings"}
    if kind == "yarn":
        names |= {"yarn_beta_fast": "beta_fast", "yarn_beta_slow": "beta_slow"}
    elif kind != "linear":
        raise ValueError(f"GGUF with RoPE scaling {kind!r} is not supported")
    unknown = [key for key in scaling if key not in names]
    if unknown or "factor" not in scaling:
        raise ValueError(f"GGUF with RoPE scaling {kind!r} and {sorted(scaling)} is not supported")
    return {"rope_type": kind} | {names[key]: _number(value) for key, value in scaling.items()}


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


def name_of(arch: str, name: str) -> str | None:
    """Hugging Face's name of a tensor, with "{}" for an expert's number; None for an unknown tensor."""
    if name in _OUTER:
        return _OUTER[name]
    match = re.fullmatch(r"blk\.(\d+)\.(\w+)\.(weight|bias)", name)
    if match is None:
        return None
    index, part, kind = match.groups()
    names = _LAYER | _OWN.get(arch, {}) | _EXPERTS.get(arch, {})
    return f"model.layers.{index}.{names[part]}.{kind}" if part in names else None
