"""Model families: what a Hugging Face `config.json` of each says, as a `ModelConfig`.

A family is a row of `FAMILIES`: the defaults that transformers has for keys that a file lacks, the options of
`ModelConfig` that are always the same, and functions for what follows from keys of its own. A key that changes
what a model computes and that its family does not read is an error, never ignored.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from fdk_jax.files.transformed import check_untransformed
from fdk_jax.models import config_types, family_layers
from fdk_jax.models.config import LayerOptions, ModelConfig, Rope
from fdk_jax.models.family_layers import Keys, Layers

_ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
}
# Keys that change what is computed, with the values at which they do not.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "attention_bias": (False,),
    "mlp_bias": (False,),
    "use_bias": (False,),
    "sliding_window": (),
    "use_sliding_window": (False,),
    "layer_types": (),
    "no_rope_layers": ([],),
    "partial_rotary_factor": (1,),
    "rope_local_base_freq": (),
    "rope_interleaved": (False,),
    "use_mrope": (False,),
    "lm_head_bias": (False,),
    "attn_logit_softcapping": (0,),
    "final_logit_softcapping": (0,),
    "query_pre_attn_scalar": (),
    "use_bidirectional_attention": (False,),
    "qk_layernorm": (False,),
    "use_qk_norm": (False,),
    "clip_qkv": (),
    "attention_multiplier": (),
    "embedding_multiplier": (1,),
    "residual_multiplier": (1,),
    "logits_scaling": (1,),
    "logit_scale": (1,),
    "scale_emb": (1,),
    "scale_depth": (),
    "num_experts": (0, 1),
    "num_local_experts": (0, 1),
    "n_routed_experts": (0,),
    "shared_expert_intermediate_size": (0,),
    "attn_temperature_tuning": (False, 0),
    "alibi": (False,),
    "kv_lora_rank": (),
}


@dataclasses.dataclass(frozen=True)
class Family:
    """One `model_type`.

    Attributes:
        defaults: Of transformers, for keys that a file lacks.
        options: Of `ModelConfig`, the same for all its models.
        read: Options that follow from keys of its own.
        layers: What sets its layers apart.
    """

    defaults: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    read: Callable[[Keys], dict[str, Any]] = lambda c: {}
    layers: Layers = family_layers.plain


def _all_biases(c: Keys) -> dict[str, Any]:
    """One key for all projections of attention."""
    bias = bool(c["attention_bias"])
    return dict(qkv_bias=bias, output_bias=bias)


def _llama(c: Keys) -> dict[str, Any]:
    return _all_biases(c) | dict(mlp_bias=bool(c["mlp_bias"]))


def _granite(c: Keys) -> dict[str, Any]:
    return _llama(c) | dict(
        query_scale=float(c["attention_multiplier"]),
        embedding_scale=float(c["embedding_multiplier"]),
        residual_scale=float(c["residual_multiplier"]),
        logit_divisor=float(c["logits_scaling"]),
    )


def _gemma(c: Keys) -> dict[str, Any]:
    if c.get("use_bidirectional_attention"):
        raise ValueError("use_bidirectional_attention=true is not implemented: attention is causal")
    return _all_biases(c) | dict(
        query_scale=float(c["query_pre_attn_scalar"]) ** -0.5,
        embedding_scale=float(c.need("hidden_size")) ** 0.5,
        attention_soft_cap=_positive(c, "attn_logit_softcapping"),
        logit_soft_cap=_positive(c, "final_logit_softcapping"),
    )


def _positive(c: Keys, key: str) -> float | None:
    value = c.get(key)
    return float(value) if value else None


_GEMMA = dict(
    head_dim=256,
    rms_norm_eps=1e-6,
    tie_word_embeddings=True,
    query_pre_attn_scalar=256,
    sliding_window=4096,
    max_position_embeddings=8192,
)
_GEMMA_NORMS = dict(norm_offset=1.0, post_norms=True)
_QWEN = dict(
    use_sliding_window=False,
    max_window_layers=28,
    sliding_window=4096,
    max_position_embeddings=32768,
)
_QWEN_MOE = dict(
    use_sliding_window=False,
    num_experts_per_tok=8,
    moe_intermediate_size=768,
    norm_topk_prob=False,
    decoder_sparse_step=1,
    mlp_only_layers=(),
    max_position_embeddings=32768,
    rms_norm_eps=1e-6,
)
_GPT_OSS_ROPE = dict(
    rope_type="yarn",
    factor=32.0,
    beta_fast=32.0,
    beta_slow=1.0,
    truncate=False,
    original_max_position_embeddings=4096,
)
_MINISTRAL_ROPE = dict(
    rope_type="yarn",
    rope_theta=1000000.0,
    factor=16.0,
    original_max_position_embeddings=16384,
    mscale=1.0,
    mscale_all_dim=1.0,
    llama_4_scaling_beta=0.1,
)
# Models that read images as well: what their text part is where it does not say, and their own defaults for it.
_TEXT_PARTS: dict[str, tuple[str, dict[str, Any]]] = {
    "gemma3": (
        "gemma3_text",
        dict(
            vocab_size=262208,
            hidden_size=2304,
            intermediate_size=9216,
            num_hidden_layers=26,
            num_attention_heads=8,
            num_key_value_heads=4,
        ),
    ),
    "mistral3": ("mistral", {}),
}
# Of all families, as far as their own do not say otherwise.
_DEFAULTS: dict[str, Any] = dict(
    attention_bias=False,
    mlp_bias=False,
    tie_word_embeddings=False,
    rope_theta=10000.0,
    rms_norm_eps=1e-6,
    max_position_embeddings=2048,
)

FAMILIES: dict[str, Family] = {
    "llama": Family(read=_llama),
    "mistral": Family(
        dict(sliding_window=4096, max_position_embeddings=131072), layers=family_layers.one_window
    ),
    "ministral": Family(
        dict(sliding_window=4096, max_position_embeddings=131072),
        layers=family_layers.typed(lambda c, _: c.get("sliding_window") is not None),
    ),
    "ministral3": Family(
        dict(
            head_dim=128,
            rope_parameters=_MINISTRAL_ROPE,
            rms_norm_eps=1e-5,
            max_position_embeddings=262144,
        ),
        layers=family_layers.grown_queries,
    ),
    "qwen2": Family(
        _QWEN,
        dict(qkv_bias=True),
        layers=family_layers.qwen_windows,
    ),
    "qwen3": Family(
        _QWEN | dict(head_dim=128),
        dict(qk_norm=True),
        _all_biases,
        family_layers.qwen_windows,
    ),
    "qwen3_moe": Family(
        _QWEN_MOE,
        dict(qk_norm=True),
        _all_biases,
        family_layers.with_experts(family_layers.used_window, family_layers.qwen_experts),
    ),
    "smollm3": Family(
        dict(
            rope_theta=2000000.0,
            tie_word_embeddings=True,
            use_sliding_window=False,
            no_rope_layer_interval=4,
            max_position_embeddings=32768,
        ),
        read=_llama,
        layers=family_layers.some_without_positions,
    ),
    "phi3": Family(
        dict(
            rms_norm_eps=1e-5,
            partial_rotary_factor=1.0,
            max_position_embeddings=4096,
            original_max_position_embeddings=4096,
        ),
        layers=family_layers.partly_rotated,
    ),
    "olmo2": Family(
        dict(rms_norm_eps=1e-5),
        dict(qk_norm=True, qk_norm_of="all", pre_norms=False, post_norms=True),
        _all_biases,
    ),
    "olmo3": Family(
        dict(rms_norm_eps=1e-5, rope_theta=500000.0, sliding_window=4096),
        dict(qk_norm=True, qk_norm_of="all", pre_norms=False, post_norms=True),
        _all_biases,
        family_layers.two_ropes(None, lambda _, index: (index + 1) % 4 != 0),
    ),
    "granite": Family(
        dict(
            attention_multiplier=1.0,
            embedding_multiplier=1.0,
            residual_multiplier=1.0,
            logits_scaling=1.0,
        ),
        read=_granite,
    ),
    "gemma2": Family(
        _GEMMA | dict(attn_logit_softcapping=50.0, final_logit_softcapping=30.0),
        _GEMMA_NORMS,
        _gemma,
        family_layers.typed(lambda _, index: (index + 1) % 2 != 0),
    ),
    "gemma3_text": Family(
        _GEMMA
        | dict(
            rope_theta=1000000.0,
            rope_local_base_freq=10000.0,
            sliding_window_pattern=6,
            max_position_embeddings=131072,
        ),
        _GEMMA_NORMS | dict(qk_norm=True),
        _gemma,
        family_layers.two_ropes(
            "rope_local_base_freq",
            lambda c, index: (index + 1) % c["sliding_window_pattern"] != 0,
        ),
    ),
    "mixtral": Family(
        dict(
            rope_theta=1000000.0,
            rms_norm_eps=1e-5,
            num_local_experts=8,
            num_experts_per_tok=2,
            max_position_embeddings=131072,
        ),
        layers=family_layers.with_experts(family_layers.one_window, family_layers.mixtral_experts),
    ),
    "gpt_oss": Family(
        dict(
            attention_bias=True,
            head_dim=64,
            sliding_window=128,
            rope_theta=150000.0,
            rope_parameters=_GPT_OSS_ROPE,
            rms_norm_eps=1e-5,
            num_local_experts=128,
            num_experts_per_tok=4,
            swiglu_limit=7.0,
            swiglu_alpha=1.702,
            max_position_embeddings=131072,
        ),
        dict(attention_sinks=True),
        _all_biases,
        family_layers.with_experts(
            family_layers.typed(lambda _, index: (index + 1) % 2 != 0),
            family_layers.gpt_oss_experts,
        ),
    ),
}


def model_config(config: Mapping[str, Any], dtype: str | None = None) -> ModelConfig:
    """See `ModelConfig.from_hf`."""
    config_types.check(config)
    config = _text_part(config)
    config_types.check(config)
    family = config.get("model_type")
    if family not in FAMILIES:
        known = sorted([*FAMILIES, *_TEXT_PARTS])
        raise ValueError(f"model_type={family!r} is not implemented; one of {known} is")
    row = FAMILIES[family]
    c = Keys(config, _DEFAULTS | dict(row.defaults))
    hidden, heads, count = (
        c.need(key) for key in ("hidden_size", "num_attention_heads", "num_hidden_layers")
    )
    head_dim = c.get("head_dim") or hidden // heads
    layers = tuple(row.layers(c, head_dim))
    if not layers:
        raise ValueError(f"num_hidden_layers={count} must be at least 1")
    fields = dict(
        vocab_size=c.need("vocab_size"),
        hidden_size=hidden,
        intermediate_size=c.need("intermediate_size"),
        num_layers=count,
        num_heads=heads,
        num_kv_heads=c.get("num_key_value_heads") or heads,
        head_dim=head_dim,
        norm_eps=float(c["rms_norm_eps"]),
        max_context=c["max_position_embeddings"],
        tie_embeddings=bool(c["tie_word_embeddings"]),
        activation=_activation(c),
        dtype=dtype or _dtype(c),
        family=family,
    )
    rope = layers[0].rope
    if rope and set(layers) == {LayerOptions(rope=Rope(rope.theta, rope.scaling))}:
        fields |= dict(rope_theta=rope.theta, rope_scaling=rope.scaling)
    else:
        fields |= dict(layers=layers)
    fields |= row.read(c) | dict(row.options)
    _check_unread(c, config, family)
    return ModelConfig(**fields)


def _text_part(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The configuration of the text part of a model that has others; any other as it is."""
    family, own = config.get("model_type"), config.get("text_config")
    if family not in _TEXT_PARTS or not isinstance(own, Mapping):
        return config
    kind, defaults = _TEXT_PARTS[family]
    shared = ("dtype", "torch_dtype", "tie_word_embeddings", "quantization_config")
    above = {key: config[key] for key in shared if key in config}
    return dict(model_type=kind) | defaults | above | dict(own)


def _activation(c: Keys) -> str:
    name = c.get("hidden_activation") or c.get("hidden_act")
    if name is None:
        name = "gelu_pytorch_tanh" if "gemma" in c["model_type"] else "silu"
    if name not in _ACTIVATIONS:
        raise ValueError(
            f"hidden_act={name!r} is not implemented; one of {sorted(_ACTIVATIONS)} is"
        )
    return _ACTIVATIONS[name]


def _dtype(c: Keys) -> str:
    """The compute dtype that a file asks for; bfloat16 where it leaves that open."""
    value = c.get("dtype") or c.get("torch_dtype") or "auto"
    name = value.removeprefix("torch.") if isinstance(value, str) else value
    return {"auto": "bfloat16", "float64": "float32"}.get(name, name)


def _check_unread(c: Keys, config: Mapping[str, Any], family: str) -> None:
    """Refuses keys that change what is computed and were not read.

    Raises:
        ValueError: names the first of them.
    """
    check_untransformed(config)
    for key, value in config.items():
        if key in c.asked or key not in _NEUTRAL or value is None or value in _NEUTRAL[key]:
            continue
        longest = config.get("max_position_embeddings") or 0
        if key == "sliding_window" and isinstance(value, int) and 0 < longest <= value:
            continue
        if key == "layer_types" and isinstance(value, list) and set(value) == {"full_attention"}:
            continue
        raise ValueError(
            f"config.json has {key}={value!r}, which is not implemented for model_type={family!r}"
        )
