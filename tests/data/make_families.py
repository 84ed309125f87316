"""Writes tests/data/families.npz: what `transformers` computes with tiny random models of many families.

    python -m pip install torch transformers
    python tests/data/make_families.py [NAME ...]

A family is its `config.json`, a seed and expected values. The weights are not kept: both sides make them from
the seed, by `weight` below, so that the file stays small and a test needs no torch.
"""

import json
import sys
import zlib
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).parent
FILE = HERE / "families.npz"
TOKENS = 64  # of a sequence

SHAPE: dict[str, Any] = dict(
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    vocab_size=96,
    max_position_embeddings=256,
    head_dim=16,
    eos_token_id=None,
    bos_token_id=None,
    pad_token_id=None,
)
WINDOW = dict(sliding_window=24)
TWO_TYPES = ["sliding_attention", "full_attention"] * 2
LONG = dict(rope_theta=10000.0, original_max_position_embeddings=32)
YARN = dict(LONG, rope_type="yarn", factor=8.0)
LLAMA3 = dict(LONG, rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0)
DYNAMIC = dict(rope_type="dynamic", rope_theta=10000.0, factor=4.0)
LONGROPE = dict(
    LONG,
    rope_type="longrope",
    short_factor=[1.0, 1.1, 1.25, 1.5, 1.75, 2.0],
    long_factor=[1.5, 2.0, 3.0, 5.0, 8.0, 13.0],
)
# name: (model_type, what differs from SHAPE)
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama, dynamic RoPE": (
        "llama",
        dict(rope_parameters=DYNAMIC, max_position_embeddings=32),
    ),
    "llama, linear RoPE": (
        "llama",
        dict(rope_parameters=dict(rope_type="linear", rope_theta=1e4, factor=4.0)),
    ),
    "llama, llama3 RoPE": ("llama", dict(rope_parameters=LLAMA3)),
    "llama, YaRN": (
        "llama",
        dict(rope_parameters=dict(YARN, beta_fast=16, beta_slow=2, truncate=False)),
    ),
    "mistral": ("mistral", dict(sliding_window=None)),
    "mistral, window": ("mistral", WINDOW),
    "ministral": ("ministral", dict(WINDOW, layer_types=TWO_TYPES)),
    "ministral3": (
        "ministral3",
        dict(
            sliding_window=None,
            rope_parameters=dict(YARN, mscale=1.0, mscale_all_dim=1.0, llama_4_scaling_beta=0.4),
        ),
    ),
    "qwen2, YaRN": ("qwen2", dict(rope_parameters=YARN)),
    "qwen2, windows": (
        "qwen2",
        dict(WINDOW, use_sliding_window=True, max_window_layers=2),
    ),
    "qwen3, YaRN": (
        "qwen3",
        dict(rope_parameters=dict(YARN, mscale=0.7, mscale_all_dim=1.2), tie_word_embeddings=True),
    ),
    "qwen3, windows": (
        "qwen3",
        dict(WINDOW, use_sliding_window=True, max_window_layers=1, attention_bias=True),
    ),
    "smollm3": ("smollm3", dict(rope_parameters=dict(rope_type="default", rope_theta=5e4))),
    "smollm3, windows": ("smollm3", dict(WINDOW, use_sliding_window=True, mlp_bias=True)),
    "phi3": ("phi3", dict(WINDOW, original_max_position_embeddings=256)),
    "phi3, longrope": (
        "phi3",
        dict(
            hidden_size=64,
            original_max_position_embeddings=32,
            rope_parameters=dict(LONGROPE, partial_rotary_factor=0.75),
            tie_word_embeddings=True,
        ),
    ),
    "olmo2": ("olmo2", dict(rope_parameters=dict(rope_type="default", rope_theta=5e5))),
    "olmo3": ("olmo3", dict(WINDOW)),
    "olmo3, YaRN": (
        "olmo3",
        dict(
            WINDOW,
            attention_bias=True,
            rope_parameters=dict(
                full_attention=dict(YARN), sliding_attention=dict(rope_type="default")
            ),
        ),
    ),
    "granite": (
        "granite",
        dict(
            attention_multiplier=0.11,
            embedding_multiplier=3.0,
            residual_multiplier=0.3,
            logits_scaling=4.0,
            tie_word_embeddings=True,
        ),
    ),
    "gemma2": ("gemma2", dict(WINDOW, query_pre_attn_scalar=24, attn_logit_softcapping=5.0)),
    "gemma3": (
        "gemma3_text",
        dict(
            WINDOW,
            query_pre_attn_scalar=24,
            layer_types=TWO_TYPES,
            rope_parameters=dict(
                full_attention=dict(rope_type="linear", rope_theta=1e6, factor=8.0),
                sliding_attention=dict(rope_type="default", rope_theta=1e4),
            ),
        ),
    ),
    "qwen3_moe": (
        "qwen3_moe",
        dict(
            num_experts=6,
            num_experts_per_tok=2,
            moe_intermediate_size=24,
            norm_topk_prob=True,
            mlp_only_layers=[1],
        ),
    ),
    "qwen3_moe, not normalised": (
        "qwen3_moe",
        dict(
            num_experts=5,
            num_experts_per_tok=3,
            moe_intermediate_size=24,
            norm_topk_prob=False,
            decoder_sparse_step=2,
        ),
    ),
    "mixtral": ("mixtral", dict(WINDOW, num_local_experts=4, num_experts_per_tok=2)),
    "gpt_oss": (
        "gpt_oss",
        dict(WINDOW, num_local_experts=4, num_experts_per_tok=2, rope_parameters=YARN),
    ),
}


def prompt_of(name: str) -> int:
    """Tokens of a sequence that its greedy continuation starts from.

    transformers has short and long frequencies within one answer of "longrope", and reads all again where they
    change; so that one answer is compared that has one set of them.
    """
    return 40 if "longrope" in name else 20


def weight(model: str, name: str, shape: tuple[int, ...]) -> np.ndarray:
    """The array of a checkpoint, float32 values that bfloat16 holds; logits differ clearly.

    Args:
        model: Name of the row.
        name: Of the array in the checkpoint.
        shape: Of it.
    """
    rng = np.random.default_rng(zlib.crc32(f"{model}/{name}".encode()))
    value = rng.standard_normal(shape, np.float32)
    if "norm" in name:
        value = 1 + 0.2 * value
    elif name.endswith(("bias", "sinks")):
        value = 0.5 * value
    elif "embed" not in name:
        value = value * np.float32(2.0 * shape[-1] ** -0.5)
    bits = value.view(np.uint32) & np.uint32(0xFFFF0000)
    return bits.view(np.float32)


def _fill(name: str, model: Any, folder: Path) -> dict[str, np.ndarray]:
    """Gives a model the weights of the seed, by the names that its checkpoints have."""
    import torch
    from safetensors.torch import load_file, save_file

    model.save_pretrained(folder)
    arrays = load_file(folder / "model.safetensors")
    made = {key: weight(name, key, tuple(value.shape)) for key, value in arrays.items()}
    save_file(
        {key: torch.from_numpy(value) for key, value in made.items()},
        folder / "model.safetensors",
        metadata={"format": "pt"},
    )
    return made


def expect(name: str, folder: Path) -> dict[str, Any]:
    """config.json, names and shapes of the arrays, tokens, logits and greedy tokens of a row."""
    import torch
    import transformers

    kind, options = MODELS[name]
    config = transformers.AutoConfig.for_model(kind, **(SHAPE | options))
    config.dtype = torch.float32
    config._attn_implementation = "eager"
    made = _fill(name, transformers.AutoModelForCausalLM.from_config(config), folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    tokens = rng.integers(0, SHAPE["vocab_size"], (2, TOKENS))
    with torch.no_grad():
        logits = model(torch.from_numpy(tokens)).logits.numpy()
        prompt = prompt_of(name)
        greedy = model.generate(
            torch.from_numpy(tokens[:, :prompt]), max_new_tokens=TOKENS - prompt, do_sample=False
        ).numpy()
        after = model(torch.from_numpy(greedy)).logits.numpy()
    top = np.sort(after[:, prompt - 1 : -1], axis=-1)
    margin = float((top[..., -1] - top[..., -2]).min())
    print(f"{name}: {len(made)} arrays, closest choice {margin:.1e}, logits {logits.std():.2f}")
    return dict(
        config=(folder / "config.json").read_text(),
        shapes=json.dumps({key: value.shape for key, value in made.items()}),
        tokens=tokens.astype(np.uint8),
        logits=logits[:, ::4],
        greedy=greedy[:, prompt:].astype(np.uint8),
    )


def main(names: list[str]) -> None:
    """Writes the rows of these names, or all."""
    import tempfile

    arrays = dict(np.load(FILE)) if names and FILE.exists() else {}
    for name in names or MODELS:
        with tempfile.TemporaryDirectory() as folder:
            arrays |= {f"{name}/{k}": np.asarray(v) for k, v in expect(name, Path(folder)).items()}
        np.savez_compressed(FILE, **arrays)


if __name__ == "__main__":
    main(sys.argv[1:])
