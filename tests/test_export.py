"""Models written for other programs, read by those programs' own readers and by ours."""

import dataclasses
import json
import sys

import jax.numpy as jnp
import numpy as np
import pytest
from foreign import values
from model_data import DATA, wide_config, write_folder
from test_gguf import MATRICES, gguf
from test_load_files import TOKENS, gguf_model, logits

from fdk_jax import files, models
from fdk_jax.models.exporting import export, weights

INTEGERS = {4: np.arange(-8, 8) / 8, 8: np.arange(-128, 128) / 128}


@pytest.mark.parametrize("arch", ["llama", "qwen3"])
@pytest.mark.parametrize(
    "kinds",
    [
        {"": "Q1_0"},
        {"embd": "Q8_0", "ffn": "TQ2_0", "": "Q4_0"},
        {"attn": "MXFP4", "": "IQ4_NL"},
        {"attn_v": "Q8_0", "": "Q4_0"},  # a projection of two widths takes the wider one
    ],
    ids=["Q1_0", "Q4_0", "IQ4_NL", "mixed"],
)
def test_gguf_there_and_back(kinds, arch, rng, tmp_path):
    path = gguf_model(tmp_path / "m.gguf", rng, kinds, arch)
    model = models.load(path, dtype="float32")
    assert export(model, tmp_path / "again.gguf", like=path, format="gguf") == {}
    before, after = (files.read(one).tensors for one in (path, tmp_path / "again.gguf"))
    assert before.keys() == after.keys()
    for name, one in before.items():
        a, b = one.read(), after[name].read()
        assert one.quantised == after[name].quantised
        if one.quantised:
            np.testing.assert_array_equal(values(a), values(b))
            assert b.bits <= 8 if len(kinds) > 1 else b.bits == a.bits
    np.testing.assert_array_equal(logits(path), logits(tmp_path / "again.gguf"))
    reader = gguf.GGUFReader(tmp_path / "again.gguf")
    theirs = {t.name: gguf.quants.dequantize(t.data, t.tensor_type) for t in reader.tensors
              if t.tensor_type.name != "Q1_0"}  # fmt: skip
    original = {t.name: t for t in gguf.GGUFReader(path).tensors}
    for name in MATRICES.keys() & theirs.keys():
        old = original[name]
        np.testing.assert_array_equal(
            theirs[name], gguf.quants.dequantize(old.data, old.tensor_type)
        )


def test_gguf_of_a_quantised_model(rng, tmp_path):
    path = gguf_model(tmp_path / "m.gguf", rng, {})
    options = models.Quantisation(4, 64, INTEGERS[4])
    model = models.load(path, quantisation=options, dtype="bfloat16")
    assert export(model, tmp_path / "q4.gguf", like=path, format="gguf") == {}
    kinds = {t.name: t.tensor_type.name for t in gguf.GGUFReader(tmp_path / "q4.gguf").tensors}
    assert all(kinds[name] == "Q4_0" for name in MATRICES)
    again = models.load(tmp_path / "q4.gguf", dtype="bfloat16")
    for a, b in zip(model.layers, again.layers, strict=True):
        one, two = (layer.mlp.down.weight.get_value() for layer in (a, b))
        np.testing.assert_array_equal(one.dequantise("float32"), two.dequantise("float32"))
    # No type of GGUF has NF4's values.
    model = models.load(path, quantisation=models.Quantisation(4, 64, "nf4"), dtype="bfloat16")
    with pytest.raises(ValueError, match=r'no type of GGUF.*otherwise="Q8_0"'):
        export(model, tmp_path / "nf4.gguf", like=path, format="gguf")
    assert not (tmp_path / "nf4.gguf").exists()
    errors = export(model, tmp_path / "nf4.gguf", like=path, format="gguf", otherwise="Q8_0")
    assert len(errors) == 7 and max(errors.values()) < 8e-3
    with pytest.raises(ValueError, match="is not one of"):
        export(model, tmp_path / "x", like=path, format="onnx")


@pytest.mark.parametrize(("bits", "g"), [(4, 32), (8, 64)])
def test_compressed_tensors(bits, g, tmp_path):
    source = DATA / "qwen2"
    options = models.Quantisation(bits, g, INTEGERS[bits])
    model = models.load(source, quantisation=options, dtype="float32")
    target = tmp_path / "folder"
    assert export(model, target, like=source, format="compressed-tensors") == {}
    checkpoint = files.read(target)
    assert checkpoint.format == "compressed-tensors"
    given = weights(model)
    for name, one in checkpoint.tensors.items():
        if one.quantised:
            np.testing.assert_array_equal(values(one.read()), values(given[name]()))
    assert sum(one.quantised for one in checkpoint.tensors.values()) == 14
    tokens = TOKENS % model.config.vocab_size
    ours = models.Generator(model).logits(tokens)
    np.testing.assert_array_equal(
        ours, models.Generator(models.load(target, dtype="float32")).logits(tokens)
    )
    with pytest.raises(FileExistsError):
        export(model, target, like=source, format="compressed-tensors")
    compressors = pytest.importorskip(
        "compressed_tensors.compressors", reason="needs compressed-tensors"
    )
    import torch
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from safetensors.torch import load_file

    arrays = load_file(target / "model.safetensors")
    args = QuantizationArgs(num_bits=bits, type="int", strategy="group", group_size=g)
    scheme = QuantizationScheme(targets=["Linear"], weights=args)
    name = "model.layers.0.mlp.down_proj"
    state = {k.rpartition(".")[2]: v for k, v in arrays.items() if k.startswith(name)}
    state["weight_scale"] = state["weight_scale"].to(torch.float32)
    compressor = compressors.BaseCompressor.get_value_from_registry("pack-quantized")
    theirs = compressor.decompress(state, scheme)["weight"].numpy()
    np.testing.assert_array_equal(theirs, values(given[f"{name}.weight"]()))


def test_what_compressed_tensors_does_not_hold(tmp_path):
    model = models.load(DATA / "kmeans-4bit")
    with pytest.raises(ValueError, match="does not hold 4-bit codes of this codebook"):
        export(model, tmp_path / "folder", like=DATA / "qwen2", format="compressed-tensors")
    assert not (tmp_path / "folder").exists()


@pytest.mark.parametrize("source", ["qwen2", "kmeans-4bit", "gguf"])
@pytest.mark.parametrize("backend", ["cpu", "xla"])
def test_prepared_models_load_without_conversion(source, backend, rng, tmp_path, monkeypatch):
    from fdk_jax.format import packing

    path = DATA / source if source != "gguf" else gguf_model(tmp_path / "m.gguf", rng, {"": "Q1_0"})
    options = models.Quantisation(4, 32, head_bits=8) if source == "qwen2" else None
    model = models.load(path, quantisation=options, backend=backend)
    wanted = models.Generator(model, backend=backend).logits(TOKENS)
    export(model, tmp_path / "prepared", like=path, format="prepared")
    monkeypatch.setattr(packing, "_converted", None)  # converting would fail
    again = models.load(tmp_path / "prepared", backend=backend)
    monkeypatch.undo()
    got = models.Generator(again, backend=backend).logits(TOKENS)
    np.testing.assert_array_equal(got, wanted)
    if source == "gguf":
        assert again.embedding is again.lm_head.weight
    with pytest.raises(ValueError, match="prepared for bfloat16"):
        models.load(tmp_path / "prepared", dtype="float32")


def test_a_prepared_head_is_its_own_where_config_json_ties_it_to_a_quantised_table(tmp_path):
    like = write_folder(tmp_path / "like", wide_config())
    settings = json.loads((like / "config.json").read_text())
    (like / "config.json").write_text(json.dumps(settings | {"tie_word_embeddings": True}))
    options = dict(bits=4, group_size=16, head_bits=4, embedding_bits=8, backend="xla")
    config = dataclasses.replace(models.read_config(like), tie_embeddings=False)
    model = models.random_model(config, **options)
    export(model, tmp_path / "prepared", like=like, format="prepared")
    tokens = jnp.arange(6)[None]
    again = models.load(tmp_path / "prepared", backend="xla")
    np.testing.assert_array_equal(again(tokens), model(tokens))


@pytest.mark.skipif(sys.platform != "linux", reason="needs limits of files' sizes")
@pytest.mark.parametrize("format", ["prepared", "compressed-tensors", "gguf"])
def test_a_full_disk_leaves_nothing(format, rng, tmp_path):
    """A limit stands for it: writing fails in the middle, with OSError, and what was written is gone."""
    like = gguf_model(tmp_path / "m.gguf", rng, {}) if format == "gguf" else DATA / "qwen2"
    quantisation = models.Quantisation(4, 32, INTEGERS[4])
    model = models.load(like, quantisation=quantisation, backend="xla")
    import resource  # of POSIX systems alone

    before, limits = sorted(tmp_path.iterdir()), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))
    try:
        with pytest.raises(OSError):
            export(model, tmp_path / "target", like=like, format=format)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert sorted(tmp_path.iterdir()) == before
