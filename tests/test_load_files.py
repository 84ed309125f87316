"""Models from files of other programs: their logits are those of the same weights as floats."""

import dataclasses
import json
from pathlib import Path

import jax
import numpy as np
import pytest
import safetensors.numpy
from flax import nnx
from foreign import values
from test_gguf import HEADS, HIDDEN, INNER, KV, MATRICES, VOCAB, D, blocks, plain, write

from fdk_jax import files, models
from fdk_jax.files import contents, gguf_types
from fdk_jax.models import host_matrices, weights
from fdk_jax.models.tokenizer import Tokenizer
from fdk_jax.product import cpu_backend

TOKENS = np.arange(14, dtype=np.int32).reshape(2, 7) * 5 % VOCAB
NUMBERS = {kind.name: number for number, kind in gguf_types.EXACT.items()}


def float_folder(path: Path, checkpoint: files.Checkpoint) -> Path:
    """The values of a checkpoint as a float32 folder."""
    path.mkdir()
    arrays = {}
    for name, one in checkpoint.tensors.items():
        array = one.read()
        arrays[name] = np.ascontiguousarray(values(array) if one.quantised else array)
    (path / "config.json").write_text(json.dumps(dict(checkpoint.config)))
    safetensors.numpy.save_file(arrays, path / "model.safetensors")
    return path


def logits(path: Path, **options) -> np.ndarray:
    model = models.load(path, dtype="float32", **options)
    return np.asarray(models.Generator(model, backend=options.get("backend")).logits(TOKENS))


def gguf_model(path: Path, rng, kinds: dict[str, str], arch: str = "qwen3") -> Path:
    """A tiny model whose matrices have the types `kinds` by a part of their name."""
    tensors = {key: (value, None) for key, value in plain(arch, rng).items()}
    shapes = MATRICES | {"token_embd.weight": (VOCAB, HIDDEN)}
    for key, (n, k) in shapes.items():
        for part, kind in kinds.items():
            if part in key:
                rows = blocks(kind, n, k, rng)
                if NUMBERS[kind] in (42, 142):
                    rows = rows.view(np.int8)
                tensors[key] = (rows, NUMBERS[kind])
                break
        else:
            if key not in tensors:
                tensors[key] = (rng.standard_normal((n, k)).astype(np.float32) / 16, None)
    return write(path, tensors, arch=arch)


@pytest.mark.parametrize("backend", ["cpu", "xla"])
@pytest.mark.parametrize(
    "kinds",
    [
        {"": "Q1_0"},  # as 1-bit Bonsai: every matrix, the embedding too
        {"": "Q2_0"},  # as ternary Bonsai
        {"embd": "Q8_0", "": "Q4_0"},
        {"attn_v": "Q8_0", "attn_q": "IQ4_NL", "": "MXFP4"},  # parts of one projection differ
        {"attn_k": "TQ2_0", "ffn_up": "NVFP4"},  # floats beside quantised parts
    ],
    ids=["Q1_0", "Q2_0", "Q4_0", "mixed", "floats"],
)
def test_gguf_models(kinds, backend, rng, tmp_path):
    path = gguf_model(tmp_path / "m.gguf", rng, kinds)
    wanted = logits(float_folder(tmp_path / "floats", files.read(path)))
    got = logits(path, backend=backend)
    assert np.abs(got - wanted).max() < 3e-5 * np.abs(wanted).max()


def test_rows_of_queries_and_keys_of_llama_are_put_back(rng, tmp_path):
    """The same weights as a folder of Hugging Face's and as llama.cpp's converter writes them."""
    from test_gguf import interleaved

    floats = plain("llama", rng)
    matrices = {
        key: rng.standard_normal(shape).astype(np.float32) / 16 for key, shape in MATRICES.items()
    }
    from fdk_jax.files.gguf_config import name_of

    arrays = {name_of("llama", key): a for key, a in (floats | matrices).items()}
    for key, heads in (("blk.0.attn_q.weight", HEADS), ("blk.0.attn_k.weight", KV)):
        matrices[key] = interleaved(matrices[key], heads)
    path = write(tmp_path / "m.gguf", {key: (a, None) for key, a in (floats | matrices).items()})
    folder = tmp_path / "folder"
    folder.mkdir()
    config = dict(
        model_type="llama",
        vocab_size=VOCAB,
        hidden_size=HIDDEN,
        intermediate_size=INNER,
        num_hidden_layers=1,
        num_attention_heads=HEADS,
        num_key_value_heads=KV,
        head_dim=D,
        max_position_embeddings=128,
        rms_norm_eps=1e-6,
        tie_word_embeddings=True,
    )
    (folder / "config.json").write_text(json.dumps(config))
    safetensors.numpy.save_file(arrays, folder / "model.safetensors")
    assert models.read_config(path) == models.read_config(folder)
    np.testing.assert_array_equal(logits(path), logits(folder))


def test_what_is_not_as_in_the_file_is_said(rng, tmp_path):
    import gguf

    tensors = {key: (value, None) for key, value in plain("qwen3", rng).items()}
    for key, (n, k) in MATRICES.items():
        rows = gguf.quants.quantize(
            rng.standard_normal((n, k)).astype(np.float32), gguf.GGMLQuantizationType.Q4_1
        )
        tensors[key] = (rows, gguf.GGMLQuantizationType.Q4_1.value)
    path = write(tmp_path / "m.gguf", tensors, arch="qwen3")
    with pytest.raises(ValueError, match="Q4_1"):
        models.load(path)
    with pytest.warns(UserWarning) as seen:
        models.load(path, requantise=8)
    text = "\n".join(str(one.message) for one in seen)
    assert "Q4_1 are requantised to 8 bits" in text
    assert "7 requantised weights, relative error at most" in text
    with pytest.raises(ValueError, match="quantised already"):
        models.load(path, requantise=8, quantisation=models.Quantisation(4))


def test_quantised_files_are_quantised_anew_where_asked(rng, tmp_path):
    path = gguf_model(tmp_path / "m.gguf", rng, {"": "Q8_0"})
    quantisation = models.Quantisation(4, 32)
    with pytest.raises(ValueError, match="requantise=16"):
        models.load(path, quantisation=quantisation)
    found = logits(path, quantisation=quantisation, requantise=16, backend="xla")
    folder = float_folder(tmp_path / "floats", files.read(path))
    np.testing.assert_array_equal(found, logits(folder, quantisation=quantisation, backend="xla"))


def test_scales_keep_their_dtype_beside_bfloat16_activations(rng, tmp_path):
    path = gguf_model(tmp_path / "m.gguf", rng, {"ffn": "Q4_0", "attn": "NVFP4"})
    model = models.load(path, dtype="bfloat16", backend="cpu")
    layer = model.layers[0]
    assert layer.mlp.down.weight.get_value().scales.dtype == "float16"
    assert layer.attention.out.weight.get_value().scales.dtype == "float32"
    got = models.Generator(model, backend="cpu").logits(TOKENS)
    wanted = logits(path)
    assert np.linalg.norm(got - wanted) < 0.03 * np.linalg.norm(wanted)
    w = layer.mlp.down.weight.get_value()
    name = "model.layers.0.mlp.down_proj.weight"
    np.testing.assert_array_equal(
        np.asarray(w.dequantise("float32")), values(files.read(path).tensors[name].read())
    )


def test_a_tied_quantised_embedding_is_held_once(rng, tmp_path):
    path = gguf_model(tmp_path / "m.gguf", rng, {"": "Q1_0"})
    model = models.load(path, dtype="bfloat16")
    assert model.embedding is model.lm_head.weight
    total = sum(leaf.nbytes for leaf in models.Generator(model).leaves)
    weights = sum(int(np.prod(s)) for s in (*MATRICES.values(), (VOCAB, HIDDEN)))
    norms = 2 * sum(a.size for key, a in plain("qwen3", rng).items() if "norm" in key)
    # 1 bit and a scale of 16 bits for 128 weights; codebooks are a few bytes.
    assert (
        weights * (1 + 16 / 128) / 8 + norms <= total < weights * (1 + 16 / 128) / 8 + norms + 200
    )


@pytest.mark.parametrize("layout", ["interchange", "tiled", "planar"])
@pytest.mark.parametrize(
    ("bits", "g", "dtype"), [(1, 128, "float16"), (4, 32, "bfloat16"), (8, 24, "float32")]
)
def test_rows_of_a_quantised_table(layout, bits, g, dtype, rng):
    from fdk_jax.format.quantised_tensor import QuantisedTensor
    from fdk_jax.product.rows import take_rows

    n, k = 42, 200
    codebook = np.sort(rng.integers(-100, 100, (3, 2**bits)), axis=-1).astype(np.float32)
    scales = jax.numpy.asarray(rng.random((n, -(-k // g))), dtype)
    packed = jax.numpy.asarray(rng.integers(0, 256, (n, k * bits // 8)), "uint8")
    w = QuantisedTensor(packed, scales, jax.numpy.asarray(codebook), bits, g, (n, k))
    index = np.asarray([[0, 41, 17], [15, 16, 99]])
    got = jax.jit(lambda w, i: take_rows(w, i, jax.numpy.float32))(w.to_layout(layout), index)
    dense = np.asarray(w.dequantise("float32"))
    np.testing.assert_array_equal(np.asarray(got), dense[np.minimum(index, n - 1)])


@pytest.mark.parametrize("backend", ["cpu", "xla", "pallas"])
@pytest.mark.parametrize("kind", ["Q4_0", "Q1_0", "mixed", "floats"])
@pytest.mark.parametrize(("dtype", "on_host"), [(None, False), (None, True), ("float32", True)])
def test_matrices_by_runs_of_rows_are_those_read_whole(
    kind, dtype, on_host, backend, rng, tmp_path, monkeypatch
):
    """The same bits, wherever a run ends: within a head's permuted rows, a tile, or a part of a projection."""
    kinds = {
        "mixed": {"attn_v": "Q8_0", "attn_q": "IQ4_NL", "": "MXFP4"},
        "floats": {"attn_k": "TQ2_0"},
    }.get(kind, {"": kind})
    path = gguf_model(tmp_path / "m.gguf", rng, kinds, arch="llama")
    with monkeypatch.context() as patch:
        patch.setattr(weights.Placer, "streams", lambda *_: False)
        whole = jax.tree.leaves(nnx.state(models.load(path, backend=backend, dtype=dtype)))
    # On a device that has memory of its own floats are sent by pieces.
    monkeypatch.setattr(host_matrices, "are_used", lambda: on_host)
    monkeypatch.setattr(weights, "_RUN_BYTES", 700)
    monkeypatch.setattr(host_matrices, "_RUN_BYTES", 900)
    monkeypatch.setattr(cpu_backend, "_RUN_BYTES", 5000)
    monkeypatch.setattr(contents, "_RUN_BYTES", 6000)
    by_rows = jax.tree.leaves(nnx.state(models.load(path, backend=backend, dtype=dtype)))
    for one, other in zip(by_rows, whole, strict=True):
        np.testing.assert_array_equal(np.asarray(one), np.asarray(other))


def test_runs_of_rows_of_a_folder(rng, tmp_path):
    """compressed-tensors' words, and a plain array."""
    from fdk_jax.benchmark.loading import write as write_folder
    from fdk_jax.models.config import ModelConfig

    config = ModelConfig(64, 128, 256, 1, 4, 2, 32)
    write_folder(tmp_path / "folder", config, 4, rng)
    tensors = files.read(tmp_path / "folder").tensors
    for name in ("model.layers.0.mlp.down_proj.weight", "model.embed_tokens.weight"):
        one = tensors[name]
        assert one.rows is not None
        whole, some = one.read(), one.rows(5, 17, None)
        assert some.shape[0] == 12
        whole, some = (values(a) if one.quantised else a for a in (whole, some))
        np.testing.assert_array_equal(some, whole[5:17])
        assert len(one.runs(1)) == one.shape[0]
        # What can only be read whole is not read once for each run.
        assert dataclasses.replace(one, rows=None).runs(1) == [(0, one.shape[0])]


@pytest.mark.parametrize("makers", [1, 3])
def test_two_stages_and_the_first_are_under_way_at_most(makers):
    """Arrays that have been read and not been placed yet, and the order in which stages end."""
    from fdk_jax.models import pipeline

    alive, most, ended = set(), [0], []
    stages = [[f"{i}.{j}" for j in range(3)] for i in range(6)]

    def stored(name: str) -> files.Stored:
        def read():
            alive.add(name)
            most[0] = max(most[0], len({one.split(".")[0] for one in tuple(alive)}))
            return np.zeros(1)

        return files.Stored((), "F32", read)

    def begin(line: pipeline.Pipeline, index: int):
        take = line.read(stages[index])

        def make(name: str) -> None:
            take(name)
            alive.discard(name)

        made = [line.make(make, name) for name in stages[index]]
        return lambda: [one.result() for one in made]

    tensors = {name: stored(name) for stage in stages for name in stage}
    with pipeline.Pipeline(tensors, makers) as line:
        begins = [lambda index=index: begin(line, index) for index in range(len(stages))]
        pipeline.run(begins, ended.append)
    assert most[0] <= 3 and not alive and ended == [1, 2, 3, 4, 0, 5]


def test_an_error_of_a_thread_ends_the_load():
    from fdk_jax.models import pipeline

    def read():
        raise ValueError("damaged")

    with (
        pytest.raises(ValueError, match="damaged"),
        pipeline.Pipeline({"a": files.Stored((), "F32", read)}, 2) as line,
    ):
        take = line.read(["a"])
        pipeline.run([lambda: line.make(take, "a").result], lambda _: None)


def test_tokenizer_and_config_of_a_gguf_file(rng, tmp_path):
    pytest.importorskip("tokenizers", reason="needs the tokenizers package")
    import gguf

    path = tmp_path / "m.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("llama-bpe")
    writer.add_token_list(["<s>", "</s>", *"abcĠ", "ab", "Ġab"])
    writer.add_token_types([3, 3] + [1] * 6)
    writer.add_token_merges(["a b", "Ġ ab"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    writer.add_chat_template("{{ bos_token }}{{ messages[0]['content'] }}")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    tokenizer = Tokenizer(path)
    assert tokenizer.encode("ab ab") == [0, 6, 7]
    assert tokenizer.chat([{"role": "user", "content": "ab"}]) == [0, 6]
    assert tokenizer.stop_tokens == (1,) and tokenizer.can_chat
    assert tokenizer.decode([0, 6, 7]) == "ab ab"


def test_the_compilation_cache_is_bounded_and_in_the_users_folder(tmp_path, monkeypatch):
    from fdk_jax import compilation_cache

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    before = {
        name: getattr(jax.config, name)
        for name in (
            "jax_compilation_cache_dir",
            "jax_compilation_cache_max_size",
            "jax_persistent_cache_min_compile_time_secs",
        )
    }
    try:
        jax.config.update("jax_compilation_cache_dir", None)
        compilation_cache.keep()
        assert jax.config.jax_compilation_cache_dir == str(tmp_path / "fdk_jax" / "programs")
        assert jax.config.jax_compilation_cache_max_size == compilation_cache.MAX_BYTES
        jax.config.update("jax_compilation_cache_dir", "/elsewhere")
        compilation_cache.keep()
        assert jax.config.jax_compilation_cache_dir == "/elsewhere"
    finally:
        for name, value in before.items():
            jax.config.update(name, value)
