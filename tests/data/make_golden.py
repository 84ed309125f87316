"""Writes the tiny checkpoints below tests/data/models and what `transformers` computes from them.

    python -m pip install torch transformers tokenizers
    python tests/data/make_golden.py

Each folder is a Hugging Face checkpoint with random weights (stored as bfloat16, computed with in
float32) and `expected.npz`: token numbers, their logits, and the greedy continuation of a prompt.
"""

import json
import shutil
from pathlib import Path

import numpy as np
import torch
import transformers
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

HERE = Path(__file__).parent / "models"
GROUP = 64
SHAPE = dict(
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    vocab_size=128,
    max_position_embeddings=256,
    eos_token_id=None,
    bos_token_id=None,
    pad_token_id=None,
)
LLAMA3 = dict(
    rope_type="llama3",
    rope_theta=10000.0,
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=32,
)
TEMPLATE = (
    "{%- for message in messages -%}<|{{ message['role'] }}|>{{ message['content'] | trim }}<|end|>"
    "{%- endfor -%}{%- if add_generation_prompt -%}<|assistant|>{%- endif -%}"
)


def family(kind: str, **options) -> transformers.PreTrainedModel:
    """A random model: larger weights than usual, so that logits differ clearly."""
    torch.manual_seed(sum(map(ord, kind)))
    config = transformers.AutoConfig.for_model(kind, **(SHAPE | options))
    config.dtype = torch.bfloat16
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            noise = torch.randn_like(weight)
            value = 1 + 0.2 * noise if "norm" in name else noise * (weight.shape[-1] ** -0.5)
            value = noise if "embed" in name else value
            weight.copy_(value.bfloat16().float())
    return model.eval()


def expect(folder: Path, model: transformers.PreTrainedModel) -> None:
    """Writes expected.npz."""
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(0, model.config.vocab_size, (2, 24), generator=generator)
    with torch.no_grad():
        logits = model(tokens).logits
        greedy = model.generate(tokens[:, :7], max_new_tokens=24, do_sample=False, use_cache=True)
    np.savez_compressed(
        folder / "expected.npz",
        tokens=tokens.numpy().astype(np.int32),
        logits=logits.numpy().astype(np.float32),
        greedy=greedy[:, 7:].numpy().astype(np.int32),
    )


def write(name: str, model: transformers.PreTrainedModel, shard: str = "10MB") -> Path:
    """A checkpoint folder as `save_pretrained` makes it, with expected.npz."""
    folder = HERE / name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    expect(folder, model)
    model.to(torch.bfloat16).save_pretrained(folder, max_shard_size=shard)
    (folder / "generation_config.json").unlink(missing_ok=True)
    model.to(torch.float32)
    return folder


def pack(codes: np.ndarray, bits: int) -> np.ndarray:
    """First element in the highest bits of its byte, digit by digit."""
    fields = codes.reshape(*codes.shape[:-1], -1, 8 // bits).astype(np.uint32)
    out = np.zeros(fields.shape[:-1], np.uint32)
    for i in range(8 // bits):
        out = out * 2**bits + fields[..., i]
    return out.astype(np.uint8)


def write_kmeans(name: str, bits: int) -> None:
    """The layout of the published k-means checkpoints; expected values from dequantised weights."""
    model = family("llama", rope_parameters=LLAMA3, tie_word_embeddings=False)
    rng = np.random.default_rng(bits)
    arrays = {}
    for key, weight in model.state_dict().items():
        if ".self_attn." not in key and ".mlp." not in key:
            arrays[key] = weight.bfloat16()
            continue
        n, k = weight.shape
        centroids = np.sort(rng.normal(size=2**bits)).astype(np.float32)
        codes = rng.integers(0, 2**bits, size=(n, k))
        scales = torch.from_numpy(rng.uniform(0.05, 0.25, size=(n, k // GROUP)).astype(np.float32))
        scales = scales.bfloat16()
        wide = np.repeat(scales.float().numpy(), GROUP, axis=1)
        weight.copy_(torch.from_numpy(wide * centroids[codes]))
        base = key.removesuffix(".weight")
        arrays[f"{base}.weight_packed"] = torch.from_numpy(pack(codes, bits))
        arrays[f"{base}.scales"] = scales
        arrays[f"{base}.centroids"] = torch.from_numpy(centroids)
    folder = write(name, model)
    (folder / "model.safetensors").unlink()
    save_file(arrays, folder / "model.safetensors")
    config = dict(quant_method="nonlinear", bits=bits, block_size=GROUP, relative_scale="absmax")
    config |= dict(num_centroids=2**bits, centroids=[])
    (folder / "quantization_config.json").write_text(json.dumps(config, indent=2) + "\n")


def write_tokenizer(folder: Path) -> None:
    """A byte-level tokenizer of 320 entries with a chat template and two ways to stop."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|begin|>", "<|end|>", "<|stop|>", "<|system|>", "<|user|>", "<|assistant|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([__doc__, TEMPLATE, "the quick brown fox " * 4], trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = dict(bos_token="<|begin|>", eos_token="<|end|>", chat_template=TEMPLATE)
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
    ends = [tokenizer.token_to_id("<|end|>"), tokenizer.token_to_id("<|stop|>")]
    (folder / "generation_config.json").write_text(json.dumps(dict(eos_token_id=ends)) + "\n")


def main() -> None:
    """Writes every folder."""
    write("llama2", family("llama", num_key_value_heads=4, tie_word_embeddings=False), shard="90KB")
    llama3 = dict(
        hidden_size=96, num_attention_heads=6, head_dim=32, vocab_size=320, rope_parameters=LLAMA3
    )
    folder = write("llama3", family("llama", tie_word_embeddings=True, **llama3))
    write_tokenizer(folder)
    write("qwen2", family("qwen2", tie_word_embeddings=False))
    write("qwen3", family("qwen3", head_dim=32, tie_word_embeddings=True))
    write_kmeans("kmeans-4bit", 4)
    write_kmeans("kmeans-1bit", 1)


if __name__ == "__main__":
    main()
