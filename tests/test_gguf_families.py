"""GGUF files of every architecture, with llama.cpp's metadata, beside the folders that they are made of.

What its converter does is written here again, after its source (github.com/ggml-org/llama.cpp, `conversion/`),
with gguf's own table of names; `test_families.py` compares the folders with transformers.
"""

import dataclasses
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
import test_families
from test_families import golden

from fdk_jax import files, models

gguf = pytest.importorskip("gguf", reason="needs the gguf package (pip install fdk-jax[models])")

expected = test_families.expected

ARCHITECTURES = {
    "ministral3": "mistral3",
    "mistral": "llama",
    "mixtral": "llama",
    "qwen3_moe": "qwen3moe",
    "olmo3": "olmo2",
    "gemma3_text": "gemma3",
    "gpt_oss": "gpt-oss",
}
LIKE_LLAMA = ("llama", "mistral", "mixtral", "ministral3", "granite", "smollm3")
# What the converter writes nothing of, or what these tiny shapes have and no model does.
LOST = {
    "llama, dynamic RoPE": "rope_type=dynamic",
    "ministral": "no architecture of GGUF",
    "llama, llama3 RoPE": "factors of another context",
    "llama, YaRN": "truncate=false",
    "qwen2, windows": "windows of Qwen",
    "qwen3, YaRN": "mscale",
    "qwen3, windows": "windows of Qwen",
    "smollm3, windows": "windows of SmolLM3",
    "qwen3_moe": "dense layers",
    "qwen3_moe, not normalised": "dense layers",
    "mixtral": "a window",
    "gpt_oss": "untruncated YaRN",
}
ROWS = [name for name in golden.MODELS if name not in LOST]


def interleaved(rows: np.ndarray, heads: int) -> np.ndarray:
    """Rows of queries or keys as the converter permutes them."""
    return rows.reshape(heads, 2, -1, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def write(
    path: Path,
    config: dict[str, Any],
    arrays: dict[str, np.ndarray],
    arch: str | None = None,
    change: Callable[[Any], None] = lambda writer: None,
) -> Path:
    """The GGUF file that the converter makes of a folder, with other metadata after `change`."""
    family, layers = config["model_type"], config["num_hidden_layers"]
    arch = arch or ARCHITECTURES.get(family, family)
    writer = gguf.GGUFWriter(path, arch)
    writer.add_file_type(0)
    _add_parameters(writer, family, config)
    change(writer)
    number = next(n for n, name in gguf.MODEL_ARCH_NAMES.items() if name == arch)
    names = gguf.get_tensor_name_map(number, layers)
    heads, kv = config["num_attention_heads"], config["num_key_value_heads"]
    if family == "gpt_oss":
        arrays = dict(_parted(arrays))
    experts: dict[str, dict[int, np.ndarray]] = {}
    for name, array in arrays.items():
        if family in LIKE_LLAMA and ".q_proj." in name:
            array = interleaved(array, heads)
        if family in LIKE_LLAMA and ".k_proj." in name:
            array = interleaved(array, kv)
        if family.startswith("gemma") and name.endswith("norm.weight"):
            array = array + 1
        if ".experts." in name and family != "gpt_oss":
            before, _, after = name.partition(".experts.")
            index, _, part = after.partition(".")
            experts.setdefault(f"{before}.experts.{part}", {})[int(index)] = array
            continue
        new = names.get_name(name, try_suffixes=(".weight", ".bias"))
        assert new is not None, name
        writer.add_tensor(new, np.ascontiguousarray(array))
    for name, parts in experts.items():
        new = names.get_name(name, try_suffixes=(".weight",))
        writer.add_tensor(new, np.stack([parts[i] for i in range(len(parts))]))
    rope = config.get("rope_parameters") or {}
    for kind in ("long", "short"):
        if factors := rope.get(f"{kind}_factor"):
            writer.add_tensor(f"rope_factors_{kind}.weight", np.asarray(factors, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _parted(arrays: dict[str, np.ndarray]) -> Iterator[tuple[str, np.ndarray]]:
    """Arrays of gpt-oss with gate and up apart, stacks [E, N, K] and names with an end."""
    for name, array in arrays.items():
        kind = "bias" if name.endswith("_bias") else "weight"
        base = name.removesuffix("_bias")
        if kind == "weight" and ".mlp.experts." in name:
            array = array.swapaxes(1, 2)
        if base.endswith("gate_up_proj"):
            yield f"{base.replace('gate_up_proj', 'gate_proj')}.{kind}", array[:, ::2]
            yield f"{base.replace('gate_up_proj', 'up_proj')}.{kind}", array[:, 1::2]
        elif name.endswith("sinks") or ".mlp.experts." in name:
            yield f"{base}.{kind}", array
        else:
            yield name, array


def _add_parameters(writer, family: str, c: dict[str, Any]) -> None:
    ropes = c.get("rope_parameters") or {}
    rope = ropes.get("full_attention", ropes)
    writer.add_block_count(c["num_hidden_layers"])
    writer.add_context_length(c["max_position_embeddings"])
    writer.add_embedding_length(c["hidden_size"])
    writer.add_feed_forward_length(c["intermediate_size"])
    writer.add_head_count(c["num_attention_heads"])
    writer.add_head_count_kv(c["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(c["rms_norm_eps"])
    head_dim = c["head_dim"]
    usual = c["hidden_size"] // c["num_attention_heads"]
    if family != "phi3" or head_dim != usual:  # phi3's own converter leaves it to the width
        writer.add_key_length(head_dim)
        writer.add_value_length(head_dim)
    if family == "gemma2":
        writer.add_attn_logit_softcapping(c["attn_logit_softcapping"])
        writer.add_final_logit_softcapping(c["final_logit_softcapping"])
        writer.add_sliding_window(c["sliding_window"])
        return
    if theta := rope.get("rope_theta"):
        writer.add_rope_freq_base(theta)
    if theta := ropes.get("sliding_attention", {}).get("rope_theta"):
        writer.add_rope_freq_base_swa(theta)
    if family == "phi3":
        original = rope.get("original_max_position_embeddings", 4096)
        writer.add_rope_scaling_orig_ctx_len(original)
        writer.add_rope_dimension_count(int(rope.get("partial_rotary_factor", 1) * head_dim))
        writer.add_sliding_window(c.get("sliding_window") or 0)
        if "long_factor" in rope:
            scale = c["max_position_embeddings"] / original
            writer.add_rope_scaling_attn_factors((1 + np.log(scale) / np.log(original)) ** 0.5)
        return
    if rope.get("rope_type") in ("linear", "yarn"):
        writer.add_rope_scaling_type(gguf.RopeScalingType(rope["rope_type"]))
        writer.add_rope_scaling_factor(rope["factor"])
    if rope.get("rope_type") == "yarn":
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
        for key, add in (
            ("attention_factor", writer.add_rope_scaling_yarn_attn_factor),
            ("beta_fast", writer.add_rope_scaling_yarn_beta_fast),
            ("beta_slow", writer.add_rope_scaling_yarn_beta_slow),
        ):
            if rope.get(key) is not None:
                add(rope[key])
    if family in LIKE_LLAMA:
        writer.add_vocab_size(c["vocab_size"])
        writer.add_rope_dimension_count(head_dim)
    if family == "ministral3":
        writer.add_rope_scaling_yarn_log_mul(rope["mscale_all_dim"])
        writer.add_attn_temperature_scale(rope["llama_4_scaling_beta"])
    if family == "granite":
        writer.add_attention_scale(c["attention_multiplier"])
        writer.add_embedding_scale(c["embedding_multiplier"])
        writer.add_residual_scale(c["residual_multiplier"])
        writer.add_logit_scale(c["logits_scaling"])
    if family == "gemma3_text":
        writer.add_sliding_window(c["sliding_window"])
    if family == "olmo3":
        writer.add_sliding_window(c["sliding_window"])
        writer.add_sliding_window_pattern([t == "sliding_attention" for t in c["layer_types"]])
    if family == "mistral" and c.get("sliding_window"):
        writer.add_sliding_window(c["sliding_window"])
    if family == "gpt_oss":
        writer.add_sliding_window(c["sliding_window"])
        writer.add_expert_feed_forward_length(c["intermediate_size"])
    if family in ("qwen3_moe", "mixtral", "gpt_oss"):
        writer.add_expert_count(c.get("num_local_experts") or c["num_experts"])
        writer.add_expert_used_count(c["num_experts_per_tok"])
    if family == "qwen3_moe":
        writer.add_expert_feed_forward_length(c["moe_intermediate_size"])


def made(name: str, expected, **changes) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """(config.json, arrays) of a row of `make_families.py`."""
    config = json.loads(str(expected[f"{name}/config"])) | changes
    shapes = json.loads(str(expected[f"{name}/shapes"]))
    return config, {key: golden.weight(name, key, tuple(shape)) for key, shape in shapes.items()}


def folder(path: Path, config: dict[str, Any], arrays: dict[str, np.ndarray]) -> Path:
    path.mkdir()
    (path / "config.json").write_text(json.dumps(config))
    safetensors.numpy.save_file(arrays, path / "model.safetensors")
    return path


def logits(path: Path, tokens: np.ndarray) -> np.ndarray:
    model = models.load(path, dtype="float32")
    return np.asarray(models.Generator(model, max_context=golden.TOKENS).logits(tokens))


def compare(tmp_path: Path, config: dict[str, Any], arrays: dict[str, np.ndarray]) -> None:
    """The same logits from both files, as near as float32 metadata is."""
    tokens = np.random.default_rng(0).integers(0, config["vocab_size"], (2, golden.TOKENS))
    wanted = logits(folder(tmp_path / "folder", config, arrays), tokens)
    found = logits(write(tmp_path / "m.gguf", config, arrays), tokens)
    assert test_families.relative(found, wanted) < 2e-5


@pytest.mark.parametrize("name", ROWS)
def test_as_the_converter_writes_it(name, expected, tmp_path):
    config, arrays = made(name, expected)
    if config["model_type"] == "gemma2":
        # The file has no scale of the queries: only the model of 46 layers has one of its own.
        config["query_pre_attn_scalar"] = config["head_dim"]
    if config["model_type"] == "gemma3_text":
        config["query_pre_attn_scalar"] = config["head_dim"]
        config["layer_types"] = ["sliding_attention"] * 4
    compare(tmp_path, config, arrays)


@pytest.mark.parametrize("name", ["qwen3_moe", "mixtral"])
def test_mixtures_of_experts(name, expected, tmp_path):
    """As published ones are: experts in every layer, no window, weights of the chosen ones that add up to 1."""
    changes = dict(mlp_only_layers=[]) if name == "qwen3_moe" else dict(sliding_window=None)
    config, arrays = made(name, expected, **changes)
    if name == "qwen3_moe":  # of this row's file one layer is dense
        arrays = {key: value for key, value in arrays.items() if ".layers.1.mlp" not in key}
        arrays |= {
            key.replace(".layers.0.", ".layers.1."): -value
            for key, value in arrays.items()
            if ".layers.0.mlp" in key
        }
    compare(tmp_path, config, arrays)


def test_gpt_oss(expected, tmp_path):
    """Published ones have YaRN without rounding to whole pairs, which the file does not say."""
    config, arrays = made("gpt_oss", expected)
    config["rope_parameters"] = {**config["rope_parameters"], "truncate": False}
    compare(tmp_path, config, arrays)


def test_quantised_experts_of_gpt_oss(rng, tmp_path):
    """Gates and what they let through are stacks of their own; joined their rows alternate."""
    kind, rows = gguf.GGMLQuantizationType.MXFP4, {}
    shapes = {"gate": (3, 32, 64), "up": (3, 32, 64), "down": (3, 64, 32)}
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "gpt-oss")
    sizes = dict(hidden_size=64, intermediate_size=32, num_hidden_layers=1, sliding_window=8)
    sizes |= dict(num_attention_heads=2, num_key_value_heads=1, head_dim=32, num_local_experts=3)
    sizes |= dict(num_experts_per_tok=2, max_position_embeddings=64, rms_norm_eps=1e-5)
    _add_parameters(writer, "gpt_oss", sizes | dict(rope_parameters=golden.YARN))
    writer.add_tensor("token_embd.weight", rng.standard_normal((8, 64)).astype(np.float32))
    for part, shape in shapes.items():
        rows[part] = gguf.quants.quantize(rng.standard_normal(shape).astype(np.float32), kind)
        writer.add_tensor(f"blk.0.ffn_{part}_exps.weight", rows[part], raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    tensors = files.read(tmp_path / "m.gguf").tensors
    exact = {part: gguf.quants.dequantize(data, kind) for part, data in rows.items()}
    for part, wanted in (
        ("down", exact["down"]),
        ("gate_up", np.stack([exact["gate"], exact["up"]], axis=2).reshape(3, 64, 64)),
    ):
        stored = tensors[f"model.layers.0.mlp.experts.{part}_proj"]
        w = stored.read()
        w.validate()
        assert stored.shape == wanted.shape
        np.testing.assert_array_equal(np.asarray(w.dequantise(np.float32)), wanted)


def test_gemma3_of_62_layers_has_a_scale_of_its_own(expected, tmp_path):
    """Only the largest one scales queries by the width of a layer's heads; the file does not say so."""
    config, arrays = made("gemma3", expected)
    layer = {k: v for k, v in arrays.items() if ".layers.0." in k}
    for index in range(62):
        arrays |= {k.replace(".layers.0.", f".layers.{index}."): v for k, v in layer.items()}
    config |= dict(num_hidden_layers=62, layer_types=None)
    config |= dict(query_pre_attn_scalar=config["hidden_size"] // config["num_attention_heads"])
    read = models.read_config(write(tmp_path / "m.gguf", config, arrays))
    wanted = models.read_config(folder(tmp_path / "folder", config, arrays))
    assert read.query_scale == wanted.query_scale == 8**-0.5
    assert read.layers == wanted.layers


def test_a_mistral_with_images_is_no_ministral3(expected, tmp_path):
    """Both have one architecture: without a scale of queries by position there is no RoPE scaling either."""
    config, arrays = made("ministral3", expected)
    config |= dict(model_type="mistral", rope_parameters=dict(rope_theta=1e6, rope_type="default"))
    path = write(tmp_path / "m.gguf", config, arrays, arch="mistral3")
    wanted = models.read_config(folder(tmp_path / "folder", config, arrays))
    assert dataclasses.replace(models.read_config(path), dtype="float32") == wanted


def test_what_llama_cpp_takes_for_granted(expected, tmp_path):
    """A factor without a kind is linear; no scale of scores is that of the head; zero is none."""

    def read(change, name="llama, linear RoPE") -> dict[str, Any]:
        return dict(
            files.read(write(tmp_path / "m.gguf", *made(name, expected), change=change)).config
        )

    def without(end):
        def change(writer):
            (metadata,) = writer.kv_data
            for key in [key for key in metadata if key.endswith(end)]:
                del metadata[key]

        return change

    def without_scaling(writer):
        for end in ("type", "factor", "yarn_log_multiplier"):
            without(f"rope.scaling.{end}")(writer)

    def refused(message, *changed):
        with pytest.raises(ValueError, match=message):
            read(*changed)

    found = read(without("rope.scaling.type"))
    assert found["rope_scaling"] == {"rope_type": "linear", "factor": 4.0}
    assert read(without("attention.scale"), "granite")["attention_multiplier"] == 0.25
    assert read(without("sliding_window"), "phi3")["sliding_window"] is None
    found = read(without("temperature_scale"), "ministral3")
    assert found["model_type"] == "mistral" and found["sliding_window"] is None
    refused("layer_norm_rms_epsilon", without("rms_epsilon"))
    refused("granite.logit_scale", without("logit_scale"), "granite")
    refused("finetuned=false", lambda w: w.add_rope_scaling_finetuned(False), "granite")
    refused("qwen2.attention.sliding_window", lambda w: w.add_sliding_window(8), "qwen2, YaRN")
    refused("attn_factor other than 1", lambda w: w.add_rope_scaling_attn_factors(1.5))
    refused("no YaRN", without_scaling, "ministral3")
    refused("sliding_window_pattern", lambda w: w.add_sliding_window_pattern([True]), "gemma3")
