"""GGUF files that the `gguf` package wrote, against its dequantisers."""

import struct
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from foreign import values

from fdk_jax import files
from fdk_jax.files import gguf_config, gguf_types

gguf = pytest.importorskip("gguf", reason="needs the gguf package (pip install fdk-jax[models])")

HIDDEN, INNER, HEADS, KV, D, VOCAB = 256, 512, 4, 2, 64, 96
# By name in `gguf`, the numbers of types that its installed version may not have.
NEWER = {"Q2_0": 42, "PQ2_0": 142}
EXACT = [kind.name for kind in gguf_types.EXACT.values()]


def blocks(name: str, rows: int, k: int, rng: np.random.Generator) -> np.ndarray:
    """Rows of bytes of a type: quantised by `gguf` where it can, else random codes with sound scales."""
    weight = rng.standard_normal((rows, k)).astype(np.float32)
    kind = {t.name: number for number, t in gguf_types.EXACT.items()}[name]
    try:
        return gguf.quants.quantize(weight, gguf.GGMLQuantizationType(kind))
    except (NotImplementedError, ValueError):
        pass
    block = gguf_types.EXACT[kind]
    raw = rng.integers(0, 256, (rows, k // block.weights, block.size), dtype=np.uint8)
    if name == "NVFP4":
        raw[..., :4] &= 0x7F
    else:
        scales = rng.standard_normal((*raw.shape[:2], 1)).astype(np.float16)
        raw[..., :2] = scales.view(np.uint8)
    return raw.reshape(rows, -1)


def dequantised(name: str, rows: np.ndarray) -> np.ndarray:
    """By `gguf`, or by a second implementation of the types that it lacks."""
    if name not in ("Q1_0", "Q2_0", "PQ2_0"):
        return gguf.quants.dequantize(rows, gguf.GGMLQuantizationType[name])
    size = {"Q1_0": 18, "Q2_0": 18, "PQ2_0": 34}[name]
    raw = rows.reshape(len(rows), -1, size)
    scales = np.ascontiguousarray(raw[..., :2]).view(np.float16).astype(np.float32)
    bits = np.unpackbits(raw[..., 2:], axis=-1, bitorder="little")
    if name == "Q1_0":
        codes = 2.0 * bits - 1
    else:
        codes = bits[..., 0::2] + 2.0 * bits[..., 1::2] - 1
    return (scales * codes).reshape(len(rows), -1).astype(np.float32)


def plain(name: str, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Float tensors of a tiny model in GGUF's names."""
    tensors = {
        "token_embd.weight": rng.standard_normal((VOCAB, HIDDEN)),
        "output_norm.weight": rng.random(HIDDEN),
        "blk.0.attn_norm.weight": rng.random(HIDDEN),
        "blk.0.ffn_norm.weight": rng.random(HIDDEN),
    }
    if name == "qwen3":
        tensors |= {f"blk.0.attn_{a}_norm.weight": rng.random(D) for a in "qk"}
    return {key: value.astype(np.float32) for key, value in tensors.items()}


MATRICES = {
    "blk.0.attn_q.weight": (HEADS * D, HIDDEN),
    "blk.0.attn_k.weight": (KV * D, HIDDEN),
    "blk.0.attn_v.weight": (KV * D, HIDDEN),
    "blk.0.attn_output.weight": (HIDDEN, HEADS * D),
    "blk.0.ffn_gate.weight": (INNER, HIDDEN),
    "blk.0.ffn_up.weight": (INNER, HIDDEN),
    "blk.0.ffn_down.weight": (HIDDEN, INNER),
}


def write(
    path: Path,
    tensors: dict[str, tuple[np.ndarray, int | None]],
    *,
    arch: str = "llama",
    metadata: dict | None = None,
    theta: float = 10000.0,
) -> Path:
    """A GGUF file of (rows of bytes, number of the type) or (floats, None)."""
    writer = gguf.GGUFWriter(path, arch)
    writer.add_block_count(1)
    writer.add_context_length(128)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV)
    writer.add_key_length(D)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_freq_base(theta)
    for key, value in (metadata or {}).items():
        {str: writer.add_string, float: writer.add_float32, int: writer.add_uint32}[type(value)](
            key, value
        )
    renumbered = {}
    for name, (data, kind) in tensors.items():
        if kind is None:
            writer.add_tensor(name, data)
        elif kind in (42, 142):
            # Written as bytes under another type, whose number is then replaced.
            renumbered[name] = kind
            writer.add_tensor(name, data, raw_dtype=None)
        else:
            writer.add_tensor(name, data, raw_dtype=gguf.GGMLQuantizationType(kind))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    if renumbered:
        patch(path, renumbered)
    return path


def patch(path: Path, numbers: dict[str, int]) -> None:
    """Gives tensors that were written as int8 their type, and the shape of their weights."""
    raw = bytearray(path.read_bytes())
    for name, number in numbers.items():
        text = name.encode()
        at = raw.index(struct.pack("<Q", len(text)) + text) + 8 + len(text) + 4
        bytes_a_row, _, kind = struct.unpack_from("<QQI", raw, at)
        assert kind == gguf.GGMLQuantizationType.I8
        weights, size = {42: (64, 18), 142: (128, 34), -42: (128, 34)}[number]
        struct.pack_into("<Q", raw, at, bytes_a_row // size * weights)
        struct.pack_into("<I", raw, at + 16, abs(number))
    path.write_bytes(raw)


def model(path: Path, name: str, rng, arch: str = "llama") -> tuple[Path, dict[str, np.ndarray]]:
    """(a tiny model with every matrix of one type, float32 values of each tensor in GGUF's names)."""
    number = {t.name: number for number, t in gguf_types.EXACT.items()}[name]
    floats = plain(arch, rng)
    tensors = {key: (value, None) for key, value in floats.items()}
    for key, (n, k) in MATRICES.items():
        rows = blocks(name, n, k, rng)
        floats[key] = dequantised(name, rows)
        data = rows.view(np.int8) if name in NEWER else rows
        tensors[key] = (data, number)
    return write(path, tensors, arch=arch), floats


def interleaved(rows: np.ndarray, heads: int) -> np.ndarray:
    """Hugging Face's rows of queries and keys in GGUF's order, as llama.cpp's converter permutes them."""
    return rows.reshape(heads, 2, -1, rows.shape[1]).swapaxes(1, 2).reshape(rows.shape)


@pytest.mark.parametrize("name", EXACT)
@pytest.mark.parametrize("arch", ["llama", "qwen3"])
def test_every_exact_type(name, arch, rng, tmp_path):
    path, wanted = model(tmp_path / "model.gguf", name, rng, arch)
    checkpoint = files.read(path)
    assert checkpoint.config["model_type"] == arch
    assert checkpoint.config["tie_word_embeddings"] is True
    tensors = {key: one.read() for key, one in checkpoint.tensors.items()}
    assert len(tensors) == len(wanted)
    for key, expected in wanted.items():
        hugging = gguf_config.name_of(arch, key)
        assert checkpoint.tensors[hugging].shape == expected.shape
        got = tensors[hugging]
        got = values(got) if checkpoint.tensors[hugging].quantised else got
        heads = {"blk.0.attn_q.weight": HEADS, "blk.0.attn_k.weight": KV}.get(key)
        if heads and arch == "llama":
            got = interleaved(got, heads)
        assert got.dtype == np.float32 and np.array_equal(got, expected), key


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_float_types(dtype, rng, tmp_path):
    floats = plain("llama", rng)
    matrices = {key: rng.standard_normal(shape).astype(dtype) for key, shape in MATRICES.items()}
    tensors = {key: (value, None) for key, value in floats.items()}
    for key, value in matrices.items():
        if dtype == ml_dtypes.bfloat16:
            tensors[key] = (value.view(np.uint8), gguf.GGMLQuantizationType.BF16.value)
        else:
            tensors[key] = (value, None)
    read = files.read(write(tmp_path / "m.gguf", tensors)).tensors
    got = read["model.layers.0.mlp.down_proj.weight"].read()
    assert got.dtype == dtype and np.array_equal(got, matrices["blk.0.ffn_down.weight"])


def test_nvfp4_with_a_factor_of_the_tensor(rng, tmp_path):
    rows = blocks("NVFP4", 128, 256, rng)
    tensors = {key: (value, None) for key, value in plain("llama", rng).items()}
    tensors["blk.0.attn_v.weight"] = (rows, 40)
    tensors["blk.0.attn_v.scale"] = (np.asarray([0.125], np.float32), None)
    tensors["blk.0.attn_v.input_scale"] = (np.asarray([2.0], np.float32), None)
    read = files.read(write(tmp_path / "m.gguf", tensors)).tensors
    got = values(read["model.layers.0.self_attn.v_proj.weight"].read())
    assert np.array_equal(got, dequantised("NVFP4", rows) * np.float32(0.125))


@pytest.mark.parametrize("number", [42, -42])
def test_the_two_formats_of_number_42_are_told_apart(number, rng, tmp_path):
    name = "Q2_0" if number == 42 else "PQ2_0"
    rows = blocks(name, 128, 256, rng)
    tensors = {key: (value, None) for key, value in plain("llama", rng).items()}
    tensors["blk.0.attn_v.weight"] = (rows.view(np.int8), 42)
    path = tmp_path / "m.gguf"
    tensors_ = {k: v if k != "blk.0.attn_v.weight" else (v[0], None) for k, v in tensors.items()}
    write(path, tensors_)
    patch(path, {"blk.0.attn_v.weight": number})
    w = files.read(path).tensors["model.layers.0.self_attn.v_proj.weight"].read()
    assert np.array_equal(values(w), dequantised(name, rows))


@pytest.mark.parametrize("name", ["Q4_1", "Q5_0", "Q5_1", "Q6_K", "Q4_K", "IQ3_S"])
@pytest.mark.parametrize("bits", [4, 8, 16])
def test_requantise(name, bits, rng, tmp_path):
    kind = gguf.GGMLQuantizationType[name]
    weight = rng.standard_normal((128, 256)).astype(np.float32)
    try:
        rows = gguf.quants.quantize(weight, kind)
    except NotImplementedError:
        weights, size = gguf.GGML_QUANT_SIZES[kind]
        raw = rng.integers(0, 256, (128, 256 // weights, size), dtype=np.uint8)
        at = {"Q6_K": [208], "Q4_K": [0, 2], "IQ3_S": [0]}[name]
        for i in at:
            raw[..., i : i + 2] = np.full((128, 1, 1), 0.01, np.float16).view(np.uint8)
        rows = raw.reshape(128, -1)
    wanted = gguf.quants.dequantize(rows, kind)
    tensors = {key: (value, None) for key, value in plain("llama", rng).items()}
    tensors["blk.0.attn_v.weight"] = (rows, kind.value)
    path = write(tmp_path / "m.gguf", tensors)
    with pytest.raises(ValueError, match=rf"{name}.*requantise=8"):
        files.read(path)
    checkpoint = files.read(path, requantise=bits)
    got = checkpoint.tensors["model.layers.0.self_attn.v_proj.weight"].read()
    got = got if bits == 16 else values(got)
    error = np.linalg.norm(got - wanted) / np.linalg.norm(wanted)
    exact = bits == 16 or (bits == 8 and name in ("Q5_0", "Q6_K"))
    assert error == 0 if exact else error < {8: 7e-3, 4: 0.12}[bits]


def test_what_is_not_supported_is_refused_by_its_name(rng, tmp_path):
    tensors = {key: (value, None) for key, value in plain("llama", rng).items()}
    path = tmp_path / "m.gguf"

    def refused(message: str, **options) -> None:
        with pytest.raises(ValueError) as caught:
            files.read(write(path, options.pop("tensors", tensors), **options))
        assert message in str(caught.value) and "\n" not in str(caught.value)

    refused("architecture 'mamba'", arch="mamba")
    refused("prism.hadamard.size", metadata={"prism.hadamard.size": 128})
    refused("general.rotated=1", metadata={"general.rotated": 1})
    files.read(write(path, tensors, metadata={"general.rotated": 0}))
    refused("llama.mystery", metadata={"llama.mystery": 1})
    refused("scaling 'longrope'", metadata={"llama.rope.scaling.type": "longrope"})
    odd = tensors | {"blk.0.ssm_a": (np.ones(4, np.float32), None)}
    refused("blk.0.ssm_a is not known", tensors=odd)
    refused("no token_embd", tensors={"output_norm.weight": tensors["output_norm.weight"]})
    odd = tensors | {"rope_freqs.weight": (np.full(D // 2, 3.0, np.float32), None)}
    refused("rope_freqs.weight other than", tensors=odd)


def test_llama3_rope_is_recognised_by_its_factors(rng, tmp_path):
    factors = []
    for i in range(D // 2):
        wavelength = 2 * np.pi * 500000.0 ** (2 * i / D)
        if wavelength < 8192 / 4:
            factors.append(1.0)
        elif wavelength > 8192:
            factors.append(32.0)
        else:
            smooth = (8192 / wavelength - 1) / 3
            factors.append(1 / ((1 - smooth) / 32 + smooth))
    tensors = {key: (value, None) for key, value in plain("llama", rng).items()}
    tensors["rope_freqs.weight"] = (np.asarray(factors, np.float32), None)
    path = write(tmp_path / "m.gguf", tensors, theta=500000.0)
    assert files.read(path).config["rope_scaling"] == {
        "rope_type": "llama3",
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }


def test_damaged_files_are_refused(rng, tmp_path):
    """Truncation anywhere, and random bytes in the header: a clear error or a sound checkpoint."""
    path, _ = model(tmp_path / "model.gguf", "Q4_0", rng)
    data = path.read_bytes()
    damaged = tmp_path / "damaged.gguf"
    for size in [*range(0, 2000, 97), len(data) - 1]:
        damaged.write_bytes(data[:size])
        with pytest.raises(ValueError):
            files.read(damaged)
    for _ in range(200):
        raw = bytearray(data)
        at = int(rng.integers(4, 2500))
        raw[at : at + 8] = rng.bytes(8)
        damaged.write_bytes(raw)
        try:
            checkpoint = files.read(damaged)
        except (ValueError, FileNotFoundError):
            continue
        for one in checkpoint.tensors.values():
            try:
                one.read()
            except ValueError:
                continue


def test_a_model_of_several_files(rng, tmp_path):
    floats = plain("llama", rng)
    first = {key: (floats[key], None) for key in list(floats)[:2]}
    second = {key: (floats[key], None) for key in list(floats)[2:]}
    write(tmp_path / "m-00001-of-00002.gguf", first)
    with pytest.raises(FileNotFoundError, match="m-00002-of-00002"):
        files.read(tmp_path)
    write(tmp_path / "m-00002-of-00002.gguf", second)
    assert len(files.read(tmp_path).tensors) == len(floats)
    with pytest.raises(ValueError, match="not the first file"):
        files.read(tmp_path / "m-00002-of-00002.gguf")


TOKENS = ["<s>", "</s>", "<unk>", *"abcĠ", "ab", "Ġab", "Ġabc"]


def test_byte_level_tokenizer(rng, tmp_path):
    tokenizers = pytest.importorskip("tokenizers", reason="needs the tokenizers package")
    metadata = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "llama-bpe",
        "tokenizer.ggml.tokens": TOKENS,
        "tokenizer.ggml.token_type": [3, 3, 3] + [1] * 7,
        "tokenizer.ggml.merges": ["a b", "Ġ ab"],
        "tokenizer.ggml.bos_token_id": 0,
        "tokenizer.ggml.eos_token_id": 1,
        "tokenizer.chat_template": "{{ messages }}",
    }
    from fdk_jax.files import gguf_tokenizer

    made = gguf_tokenizer.files(metadata)
    tokenizer = tokenizers.Tokenizer.from_str(made.tokenizer)
    # "Ġabc" is a token that no merge makes: whole words are looked up first.
    assert tokenizer.encode("ab abc ab</s>").ids == [0, 7, 9, 8, 1]
    assert tokenizer.decode([7, 9, 8]) == "ab abc ab"
    assert made.stop_tokens == (1,) and made.config["chat_template"] == "{{ messages }}"
    with pytest.raises(ValueError, match="pre='unheard of'"):
        gguf_tokenizer.files(metadata | {"tokenizer.ggml.pre": "unheard of"})
    with pytest.raises(ValueError, match="model='rwkv'"):
        gguf_tokenizer.files(metadata | {"tokenizer.ggml.model": "rwkv"})


def test_sentencepiece_tokenizer():
    tokenizers = pytest.importorskip("tokenizers", reason="needs the tokenizers package")
    from fdk_jax.files import gguf_tokenizer

    bytes_ = [f"<0x{i:02X}>" for i in range(256)]
    tokens = ["<unk>", "<s>", "</s>", *bytes_, "▁", "a", "b", "ab", "▁ab", "ba"]
    metadata = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": [0.0] * 262 + [-1.0, -2.0, -3.0],
        "tokenizer.ggml.token_type": [2, 3, 3] + [6] * 256 + [1] * 6,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
    }
    tokenizer = tokenizers.Tokenizer.from_str(gguf_tokenizer.files(metadata).tokenizer)
    ids = tokenizer.encode("ab é").ids
    assert [tokens[i] for i in ids] == ["<s>", "▁ab", "▁", "<0xC3>", "<0xA9>"]
    assert tokenizer.decode(ids) == "ab é"
    for name, wanted in (("Phi-3-mini", ["</s>", "▁ab"]), ("other", ["</s>", "▁", "▁ab"])):
        made = gguf_tokenizer.files(metadata | {"general.name": name})
        tokenizer = tokenizers.Tokenizer.from_str(made.tokenizer)
        ids = tokenizer.encode("</s> ab", add_special_tokens=False).ids
        assert [tokens[i] for i in ids] == wanted, name
