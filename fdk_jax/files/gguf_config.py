"""Model configurations and names of GGUF, as Hugging Face writes them."""

import re
from collections.abc import Collection, Mapping
from typing import Any

import numpy as np

from fdk_jax.files import gguf_rope
from fdk_jax.files.transformed import check_untransformed

# GGUF's architecture: Hugging Face's model_type, as far as the metadata do not tell another one (`_family`).
FAMILIES = {
    "llama": "llama",
    "mistral3": "mistral",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "qwen3moe": "qwen3_moe",
    "smollm3": "smollm3",
    "granite": "granite",
    "gemma2": "gemma2",
    "gemma3": "gemma3_text",
    "phi3": "phi3",
    "olmo2": "olmo2",
    "gpt-oss": "gpt_oss",
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
    # Its experts are stacks, which `gguf_experts` joins.
    "gpt-oss": {
        "post_attention_norm": "post_attention_layernorm",
        "ffn_gate_inp": "mlp.router",
        **{f"ffn_{part}_exps": f"mlp.experts.{part}_proj" for part in ("gate", "up", "down")},
    },
    "qwen3moe": {"ffn_gate_inp": "mlp.gate"},
    "llama": {"ffn_gate_inp": "block_sparse_moe.gate"},
}
# Stacked experts [E, N, K]: the name of one of them, by its number.
_EXPERTS = {
    "qwen3moe": {
        f"ffn_{part}_exps": f"mlp.experts.{{}}.{part}_proj" for part in ("gate", "up", "down")
    },
    "llama": {
        f"ffn_{part}_exps": f"block_sparse_moe.experts.{{}}.{name}"
        for part, name in (("gate", "w1"), ("up", "w3"), ("down", "w2"))
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
    "llama": {
        "expert_count": "num_local_experts",
        "expert_used_count": "num_experts_per_tok",
    },
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
    "gemma3": {
        "final_logit_softcapping": "final_logit_softcapping",
        "rope.freq_base_swa": "rope_local_base_freq",
    },
    "gpt-oss": {
        "expert_count": "num_local_experts",
        "expert_used_count": "num_experts_per_tok",
    },
    "qwen3moe": {
        "expert_count": "num_experts",
        "expert_used_count": "num_experts_per_tok",
        "expert_feed_forward_length": "moe_intermediate_size",
    },
}
# What every file says, of each layer or of all.
_COUNTS = ("block_count", "embedding_length", "attention.head_count", "feed_forward_length")
_EPS = "attention.layer_norm_rms_epsilon"
_PATTERN = "attention.sliding_window_pattern"
_TEMPERATURE = "attention.temperature_scale"
_EXPERT_SIZE = "expert_feed_forward_length"
# What else the files of an architecture must say, because llama.cpp has no default for it.
_NEEDED = {
    "granite": ("logit_scale",),
    "qwen3moe": ("expert_count", "expert_used_count", "expert_feed_forward_length"),
    "gpt-oss": ("expert_count", "expert_used_count", "attention.sliding_window"),
}
# Understood, and said by other keys or checked below.
_CHECKED = ("attention.value_length", "rope.dimension_count", "vocab_size", "rope.scaling.")
_OWN_CHECKED = {
    "gemma3": (_PATTERN,),
    "olmo2": (_PATTERN, "rope.freq_base_swa"),
    "mistral3": (_TEMPERATURE,),
    "gpt-oss": (_EXPERT_SIZE,),
}
# Zero means "none" here, as in llama.cpp.
_ZERO_IS_NONE = (
    "attention.sliding_window",
    "attention.scale",
    "embedding_scale",
    "residual_scale",
    "expert_count",
    "final_logit_softcapping",
    _TEMPERATURE,
)
# Of files that name none, whatever the family's own is.
_THETA = 10000.0
_LAYERS_OF_GEMMA3_27B, _LAYERS_OF_GEMMA2_27B = 62, 46
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
    check_untransformed(metadata, "GGUF metadata ")
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
    rope_factors: Mapping[str, np.ndarray],
) -> dict[str, Any]:
    """Hugging Face's `config.json` of a GGUF file.

    Args:
        metadata: of the file.
        names: of its tensors.
        vocab_size: rows of the embedding.
        rope_factors: those of its tensors that scale RoPE's frequencies, `gguf_rope.FACTORS`.

    Raises:
        ValueError: metadata that is missing, or that is not understood.
    """
    arch = architecture(metadata)
    own = _own(arch, metadata)
    keys = _PLAIN_KEYS | _OWN_KEYS.get(arch, {})
    out = {"model_type": FAMILIES[arch], "rope_theta": _THETA, **_DEFAULTS.get(arch, {})}
    out |= {name: gguf_rope.number(own[key]) for key, name in keys.items() if key in own}
    out.setdefault("num_key_value_heads", out["num_attention_heads"])
    of_layer = out["hidden_size"] // out["num_attention_heads"]
    out.setdefault("head_dim", of_layer)
    if own.get("attention.value_length", out["head_dim"]) != out["head_dim"]:
        raise ValueError(
            f"GGUF with {arch}.attention.value_length unlike key_length is not supported"
        )
    rotary = own.get("rope.dimension_count", out["head_dim"])
    if rotary != out["head_dim"]:
        # Half an element more, which rounding down takes away again: dimensions are never one too few.
        out["partial_rotary_factor"] = (rotary + 0.5) / out["head_dim"]
    out["vocab_size"] = vocab_size
    out["tie_word_embeddings"] = "output.weight" not in names
    # Qwen2 has them by itself, in its queries, keys and values alone.
    if arch != "qwen2":
        out["attention_bias"] = "blk.0.attn_q.bias" in names
    if arch not in ("qwen2", "qwen3", "qwen3moe"):
        out["mlp_bias"] = "blk.0.ffn_up.bias" in names
    scaling = gguf_rope.scaling(arch, own, rope_factors, out)
    if scaling is not None:
        out["rope_scaling"] = scaling
    out |= _of_architecture(arch, own, out)
    if (end := metadata.get("tokenizer.ggml.eos_token_id")) is not None:
        out["eos_token_id"] = end
    return out


def _own(arch: str, metadata: Mapping[str, Any]) -> dict[str, Any]:
    """The metadata of the architecture, without its name before each key and without zeros for "none".

    Raises:
        ValueError: some that are missing, or that are not understood.
    """
    own = {
        key.removeprefix(f"{arch}."): v for key, v in metadata.items() if key.startswith(f"{arch}.")
    }
    keys = _PLAIN_KEYS | _OWN_KEYS.get(arch, {})
    checked = (*_CHECKED, *_OWN_CHECKED.get(arch, ()))
    unknown = [key for key in own if key not in keys and not key.startswith(checked)]
    if unknown:
        raise ValueError(
            f"GGUF metadata {[f'{arch}.{key}' for key in sorted(unknown)]} is not supported"
        )
    missing = [key for key in (*_COUNTS, _EPS, *_NEEDED.get(arch, ())) if key not in own]
    if missing:
        raise ValueError(f"the GGUF file lacks the metadata {[f'{arch}.{key}' for key in missing]}")
    for key in keys:
        if isinstance(own.get(key), list):
            own[key] = _same_in_all_layers(f"{arch}.{key}", own[key])
    for key in (*_COUNTS, "rope.dimension_count"):
        if key in own and (type(own[key]) is not int or own[key] < 1):
            raise ValueError(f"GGUF metadata {arch}.{key}={own[key]!r} must be a positive integer")
    return {key: v for key, v in own.items() if key not in _ZERO_IS_NONE or v != 0}


def _of_architecture(arch: str, own: Mapping[str, Any], out: Mapping[str, Any]) -> dict[str, Any]:
    """What a file says by its architecture, or by what it does not say.

    Raises:
        ValueError: metadata that do not go together.
    """
    of_layer = out["hidden_size"] // out["num_attention_heads"]
    layers, window = out["num_hidden_layers"], own.get("attention.sliding_window")
    if arch == "granite" and "attention_multiplier" not in out:
        return {"attention_multiplier": out["head_dim"] ** -0.5}
    if arch == "llama" and "num_local_experts" in out:
        return {"model_type": "mixtral"}
    if arch == "llama" and window is not None:
        return {"model_type": "mistral"}
    if arch == "mistral3":
        return _mistral3(own, out) | {"sliding_window": window}
    if arch in ("gemma2", "gemma3"):
        # Only the largest ones scale by the width of a layer's heads.
        largest = _LAYERS_OF_GEMMA2_27B if arch == "gemma2" else _LAYERS_OF_GEMMA3_27B
        made = {"query_pre_attn_scalar": of_layer if layers == largest else out["head_dim"]}
        if arch == "gemma3":
            made |= {"sliding_window": window} | _layer_types(own, layers)
        return made
    if arch == "olmo2" and window is not None:
        made = {"model_type": "olmo3"} | _layer_types(own, layers)
        if (theta := own.get("rope.freq_base_swa")) is not None:
            local = {"rope_type": "default", "rope_theta": gguf_rope.number(theta)}
            made["rope_parameters"] = {"sliding_attention": local}
        return made
    if arch == "gpt-oss":
        if own.get(_EXPERT_SIZE, out["intermediate_size"]) != out["intermediate_size"]:
            raise ValueError(f"GGUF with gpt-oss.{_EXPERT_SIZE} unlike feed_forward_length")
        if "rope_scaling" not in out:  # its family has one where a file says nothing
            raise ValueError("GGUF of gpt-oss without YaRN is not supported")
        return {"rope_scaling": {**out["rope_scaling"], "truncate": False}}
    if arch == "phi3":
        made = {"sliding_window": window}
        if (original := own.get("rope.scaling.original_context_length")) is not None:
            made["original_max_position_embeddings"] = original
        return made
    off = arch.startswith(("qwen", "smollm"))  # whose families have the window switched off
    if off and window is not None and window < out.get("max_position_embeddings", window + 1):
        raise ValueError(f"GGUF metadata {arch}.attention.sliding_window is not supported")
    return {}


def _mistral3(own: Mapping[str, Any], out: Mapping[str, Any]) -> dict[str, Any]:
    """Ministral 3, whose queries grow with their position, or the text part of a Mistral that reads images."""
    growth, scaling = own.get(_TEMPERATURE), out.get("rope_scaling")
    if growth is None:
        return {}
    if scaling is None or scaling["rope_type"] != "yarn":
        raise ValueError(f"GGUF with mistral3.{_TEMPERATURE} and no YaRN is not supported")
    grown = {**scaling, "llama_4_scaling_beta": gguf_rope.number(growth)}
    return {"model_type": "ministral3", "rope_scaling": grown}


def _layer_types(own: Mapping[str, Any], layers: int) -> dict[str, Any]:
    """Which layers have the window, where a file says it: a period or one value a layer.

    Raises:
        ValueError: it is neither.
    """
    pattern = own.get(_PATTERN)
    if pattern is None:
        return {}
    if type(pattern) is int and pattern > 0:
        pattern = [(i + 1) % pattern != 0 for i in range(layers)]
    if not isinstance(pattern, list) or len(pattern) != layers:
        raise ValueError(
            f"GGUF metadata {_PATTERN}={pattern!r} must be {layers} values or a period"
        )
    return {"layer_types": ["sliding_attention" if s else "full_attention" for s in pattern]}


def _same_in_all_layers(key: str, values: list) -> Any:
    if len(set(values)) != 1:
        raise ValueError(f"GGUF metadata {key} that differs between layers is not supported")
    return values[0]


def name_of(arch: str, name: str) -> str | None:
    """Hugging Face's name of a tensor, with "{}" for an expert's number; None for an unknown tensor."""
    if name in _OUTER:
        return _OUTER[name]
    match = re.fullmatch(r"blk\.(\d+)\.(\w+)\.(weight|bias)", name)
    if match is None:
        return None
    index, part, kind = match.groups()
    names = _LAYER | _OWN.get(arch, {}) | _EXPERTS.get(arch, {})
    if arch == "gpt-oss" and part == "attn_sinks":
        return f"model.layers.{index}.self_attn.sinks"
    if part not in names:
        return None
    end = f".{kind}"
    if arch == "gpt-oss" and part.endswith("_exps"):
        end = "" if kind == "weight" else "_bias"
    return f"model.layers.{index}.{names[part]}{end}"
