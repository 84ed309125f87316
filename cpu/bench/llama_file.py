"""Llama models as GGUF files that llama.cpp runs, whose weights are made up."""

from collections.abc import Callable
from pathlib import Path

import numpy as np

from fdk_jax.models import ModelConfig


def write(
    path: Path, config: ModelConfig, matrix: Callable[[int, int], tuple[np.ndarray, int]]
) -> None:
    """Writes a model with tied embeddings and norms of ones.

    Args:
        path: of the file.
        config: the shape.
        matrix: maps (rows, columns) to the bytes of a weight and GGML's number of their type.
    """
    import gguf

    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(config.max_context)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_heads)
    writer.add_head_count_kv(config.num_kv_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_layer_norm_rms_eps(config.norm_eps)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("none")

    def weight(name: str, rows: int, columns: int) -> None:
        data, number = matrix(rows, columns)
        name += ".weight"
        # Not `add_tensor`, which refuses numbers of types that the package does not know.
        kind = np.dtype(np.float32)
        writer.add_tensor_info(name, (rows, columns), kind, data.nbytes, raw_dtype=number)
        writer.tensors[-1][name].tensor = data

    def norm(name: str) -> None:
        writer.add_tensor(f"{name}.weight", np.ones(config.hidden_size, np.float32))

    heads, kv = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    weight("token_embd", config.vocab_size, config.hidden_size)
    norm("output_norm")
    for layer in range(config.num_layers):
        base = f"blk.{layer}"
        norm(f"{base}.attn_norm")
        norm(f"{base}.ffn_norm")
        for name, rows in (("attn_q", heads), ("attn_k", kv), ("attn_v", kv)):
            weight(f"{base}.{name}", rows, config.hidden_size)
        weight(f"{base}.attn_output", config.hidden_size, heads)
        for name in ("ffn_gate", "ffn_up"):
            weight(f"{base}.{name}", config.intermediate_size, config.hidden_size)
        weight(f"{base}.ffn_down", config.hidden_size, config.intermediate_size)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
