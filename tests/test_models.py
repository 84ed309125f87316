"""Models against golden values of `transformers`: logits, quantisation, configuration, random weights."""

import dataclasses
import json

import numpy as np
import pytest
from flax import nnx
from model_data import DATA, expected, relative

import fdk_jax
from fdk_jax import models
from fdk_jax.models import rope
from fdk_jax.models.config import ModelConfig, custom_llama, qwen3
from fdk_jax.models.loading import read_config
from fdk_jax.product import cpu_backend

FOLDERS = sorted(path.name for path in DATA.iterdir())


@pytest.mark.parametrize("name", FOLDERS)
def test_logits_and_greedy_tokens_equal_transformers(name):
    generator = models.Generator(models.load(DATA / name, dtype="float32"))
    golden = expected(name)
    assert relative(generator.logits(golden["tokens"]), golden["logits"]) < 1e-5
    out = generator.generate(golden["tokens"][:, :7].tolist(), max_tokens=24)
    assert out.tokens == golden["greedy"].tolist()


@pytest.mark.parametrize(
    ("name", "bits"), [("llama2", 1), ("llama3", 4), ("qwen2", 2), ("qwen3", 8)]
)
def test_quantised_while_loading_equals_dequantised_weights(name, bits):
    quantised = models.load(
        DATA / name, dtype="float32", quantisation=models.Quantisation(bits, codebook="kmeans")
    )
    plain = models.Generator(fdk_jax.dequantise(quantised))
    generator = models.Generator(quantised)
    tokens = expected(name)["tokens"]
    assert relative(generator.logits(tokens), plain.logits(tokens)) < 1e-5
    prompt = tokens[:, :5].tolist()
    assert generator.generate(prompt, max_tokens=8).tokens == (
        plain.generate(prompt, max_tokens=8).tokens
    )
    kinds = {type(layer.attention.qkv) for layer in quantised.layers}
    assert kinds == {fdk_jax.QuantisedLinear}


def test_quantising_the_module_equals_quantising_while_loading():
    plain = models.load(DATA / "qwen2", dtype="float32")
    tokens = expected("qwen2")["tokens"]
    loaded = models.load(DATA / "qwen2", dtype="float32", quantisation=models.Quantisation(4))
    swapped = fdk_jax.quantise(plain, bits=4)
    assert isinstance(swapped.lm_head, nnx.Linear)
    found = models.Generator(swapped).logits(tokens)
    np.testing.assert_allclose(found, models.Generator(loaded).logits(tokens), rtol=2e-4, atol=2e-4)


def test_head_can_be_quantised_too():
    options = models.Quantisation(4, head_bits=8)
    model = models.load(DATA / "qwen2", dtype="float32", quantisation=options)
    assert model.lm_head.weight.get_value().bits == 8
    plain = models.Generator(fdk_jax.dequantise(model))
    tokens = expected("qwen2")["tokens"]
    assert relative(models.Generator(model).logits(tokens), plain.logits(tokens)) < 1e-5


def test_arithmetic_of_activations():
    if (reason := cpu_backend.unavailable_reason()) is not None:
        pytest.skip(reason)
    options = dict(quantisation=models.Quantisation(4, 32, head_bits=8), dtype="float32")
    tokens = expected("qwen2")["tokens"]
    exact, int8 = (
        models.Generator(models.load(DATA / "qwen2", **options, **more), backend="cpu")
        for more in ({}, dict(backend="cpu", arithmetic="int8"))
    )
    assert 1e-4 < relative(int8.logits(tokens), exact.logits(tokens)) < 0.1
    assert len(int8.generate(tokens[:, :4].tolist(), max_tokens=5).tokens[0]) == 5
    with pytest.raises(ValueError, match="needs backend=\"cpu\", not 'xla'"):
        models.load(DATA / "qwen2", **options, backend="xla", arithmetic="int8")
    with pytest.raises(ValueError, match="arithmetic='fp8'"):
        models.load(DATA / "qwen2", arithmetic="fp8")


def test_bfloat16_model_is_close_to_float32():
    golden = expected("llama3")
    logits = models.Generator(models.load(DATA / "llama3")).logits(golden["tokens"])
    assert relative(logits, golden["logits"]) < 3e-2


@pytest.mark.parametrize(
    ("size", "billions"), [("4B", 3.88), ("12B", 11.52), ("31B", 30.64), ("1B", 1.24), ("8B", 8.03)]
)
def test_custom_shapes_have_the_published_parameter_counts(size, billions):
    assert custom_llama(size).num_parameters / 1e9 == pytest.approx(billions, abs=0.01)


@pytest.mark.parametrize(
    ("size", "billions"), [("0.6B", 0.596), ("1.7B", 1.72), ("4B", 4.02), ("8B", 8.19)]
)
def test_qwen3_shapes_have_the_published_parameter_counts(size, billions):
    assert qwen3(size).num_parameters / 1e9 == pytest.approx(billions, abs=0.01)


@pytest.mark.parametrize("shapes", [custom_llama, qwen3])
def test_unknown_size(shapes):
    with pytest.raises(ValueError, match="'13B'"):
        shapes("13B")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (dict(model_type="mamba"), "mamba"),
        (dict(hidden_act="relu"), "relu"),
        (dict(use_sliding_window=True), "sliding"),
        (dict(rope_scaling=dict(rope_type="spiral", factor=2.0)), "spiral"),
        (dict(num_attention_heads=5), "num_heads=5"),
        (dict(hidden_size=None), None),
    ],
)
def test_unsupported_configuration_is_named(change, words):
    config = json.loads((DATA / "llama2" / "config.json").read_text())
    config.pop("rope_parameters", None)
    config |= change
    if words is None:
        del config["hidden_size"]
        words = "hidden_size"
    with pytest.raises(ValueError, match=words):
        ModelConfig.from_hf(config)


def test_both_spellings_of_rope_give_the_same():
    config = json.loads((DATA / "llama3" / "config.json").read_text())
    new = ModelConfig.from_hf(config)
    rope = config.pop("rope_parameters")
    config["rope_theta"] = rope.pop("rope_theta")
    config["rope_scaling"] = rope
    assert ModelConfig.from_hf(config) == new


def test_linear_rope_scaling_divides_frequencies():
    config = read_config(DATA / "llama2")
    scaled = dataclasses.replace(config, rope_scaling=models.RopeScaling("linear", 4.0))
    ratio = rope.inverse_frequencies(
        config.layer(0).rope, config.head_dim
    ) / rope.inverse_frequencies(scaled.layer(0).rope, scaled.head_dim)
    np.testing.assert_allclose(ratio, 4.0, rtol=1e-6)


def test_tied_head_becomes_a_quantised_copy():
    options = models.Quantisation(4, head_bits=8)
    model = models.load(DATA / "qwen3", dtype="float32", quantisation=options)
    assert model.lm_head.weight.get_value().bits == 8
    tokens = expected("qwen3")["tokens"]
    plain = models.Generator(fdk_jax.dequantise(model))
    assert relative(models.Generator(model).logits(tokens), plain.logits(tokens)) < 1e-5


@pytest.mark.parametrize(
    ("bits", "codebook"),
    [(16, "uniform"), (8, "uniform"), (4, "kmeans"), (2, "kmeans"), (1, "kmeans")],
)
def test_random_models_run_and_stay_finite(bits, codebook):
    config = ModelConfig(256, 128, 192, 2, 4, 2, 32, dtype="bfloat16")
    model = models.random_model(config, bits=bits, codebook=codebook)
    logits = np.asarray(models.Generator(model).logits(np.arange(12).reshape(2, 6)))
    assert np.isfinite(logits).all()
    assert 0.2 < logits.std() < 5
    if bits < 16:
        weight = model.layers[0].attention.qkv.weight.get_value()
        weight.validate()
        assert weight.codebook.ndim == (2 if codebook == "kmeans" and bits > 0 else 1)


@pytest.mark.parametrize("tied", [False, True])
def test_a_random_model_with_a_quantised_embedding(tied):
    config = ModelConfig(256, 128, 192, 2, 4, 2, 32, tie_embeddings=tied)
    model = models.random_model(config, bits=2, head_bits=2, embedding_bits=2)
    assert (model.lm_head.weight is model.embedding) == tied
    assert model.embedding.get_value().bits == 2
    logits = np.asarray(models.Generator(model).logits(np.arange(12).reshape(2, 6)))
    assert np.isfinite(logits).all() and logits.std() > 0.2
    with pytest.raises(ValueError, match="embedding_bits=3"):
        models.random_model(config, bits=2, head_bits=2, embedding_bits=3)


def test_a_tied_embedding_has_the_bits_of_the_head():
    config = ModelConfig(256, 128, 192, 2, 4, 2, 32, tie_embeddings=True)
    with pytest.raises(ValueError, match="head_bits=1"):
        models.random_model(config, bits=2, head_bits=1, embedding_bits=2)


def test_scales_may_be_searched_while_loading():
    """They lose less than the default's, and what they give is what `calibrate_array` gives."""
    plain = models.load(DATA / "qwen2", dtype="float32")
    searched = models.Quantisation(4, scale="search")
    found = models.load(DATA / "qwen2", dtype="float32", quantisation=searched)
    default = models.load(DATA / "qwen2", dtype="float32", quantisation=models.Quantisation(4))
    kernel = plain.layers[0].mlp.down.kernel[...]
    one = found.layers[0].mlp.down.weight.get_value()
    wanted = fdk_jax.calibrate_array(kernel, 4, axes="kn")
    np.testing.assert_array_equal(one.dequantise(), np.asarray(wanted.dequantise()).T)
    other = default.layers[0].mlp.down.weight.get_value()
    errors = [float(np.square(w.dequantise() - np.asarray(kernel).T).sum()) for w in (one, other)]
    assert errors[0] < 0.95 * errors[1]
