"""What is refused of a checkpoint and why, what is ignored, and what loading tells."""

import numpy as np
import pytest
from model_data import DATA, expected, rewrite
from safetensors import safe_open

import fdk_jax
from fdk_jax import models


@pytest.fixture
def copy(writable):
    """A function that copies a golden folder to where a test may change it."""
    return lambda name: writable(DATA / name)


def test_every_wrong_name_is_reported_at_once(copy):
    folder = copy("qwen3")

    def change(arrays):
        del arrays["model.norm.weight"]
        del arrays["model.layers.1.mlp.up_proj.weight"]
        arrays["model.layers.0.self_attn.q_norm.weight"] = np.ones(5, np.float32)
        arrays["model.layers.7.extra"] = np.ones(3, np.float32)

    rewrite(folder, change)
    with pytest.raises(ValueError) as caught:
        models.load(folder)
    text = str(caught.value)
    assert "2 missing" in text and "1 unexpected" in text and "1 mis-shaped" in text
    for name in ("model.norm.weight", "up_proj", "q_norm.weight is [5], not [32]", "7.extra"):
        assert name in text


def test_ignored_names_do_not_matter(copy):
    folder = copy("llama3")

    def change(arrays):
        arrays["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(16, np.float32)
        arrays["lm_head.weight"] = arrays["model.embed_tokens.weight"]

    rewrite(folder, change)
    models.load(folder)


def test_a_tied_head_of_other_values_is_used(copy):
    """As transformers does, which says so as well; one row that differs is enough."""
    folder = copy("llama3")

    def change(arrays):
        head = arrays["model.embed_tokens.weight"].copy()
        head[5] *= 2
        arrays["lm_head.weight"] = head

    tied, tokens = models.load(folder, dtype="float32"), expected("llama3")["tokens"]
    rewrite(folder, change)
    with pytest.warns(UserWarning, match="lm_head.weight has values of its own"):
        model = models.load(folder, dtype="float32")
    assert not model.config.tie_embeddings
    ours, theirs = (models.Generator(one).logits(tokens) for one in (model, tied))
    theirs = np.array(theirs)
    theirs[..., 5] *= 2
    np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)


def test_missing_files(copy, tmp_path):
    with pytest.raises(FileNotFoundError, match="does not exist"):
        models.load(tmp_path / "nowhere")
    folder = copy("llama2")
    gone = next(folder.glob("model-00002*"))
    gone.unlink()
    with pytest.raises(FileNotFoundError, match="model-00002"):
        models.load(folder)
    for path in folder.glob("*.safetensors*"):
        path.unlink()
    with pytest.raises(FileNotFoundError, match=r"no .*safetensors"):
        models.load(folder)


@pytest.mark.parametrize("size", [0, 5, 40, 5000])
def test_truncated_weights_are_refused(copy, size):
    folder = copy("qwen3")
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(ValueError, match=r"truncated|damaged"):
        models.load(folder)


def test_quantised_checkpoints_are_not_quantised_again():
    with pytest.raises(ValueError, match="quantised already"):
        models.load(DATA / "kmeans-4bit", quantisation=models.Quantisation(2))


def test_unknown_quantisation_method(copy):
    folder = copy("kmeans-1bit")
    (folder / "quantization_config.json").write_text('{"quant_method": "hqq", "bits": 4}')
    with pytest.raises(ValueError, match="hqq"):
        models.load(folder)


def test_fewer_centroids_than_codes(copy):
    folder = copy("kmeans-4bit")
    with safe_open(folder / "model.safetensors", "flax") as file:
        arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    for name in list(arrays):
        if name.endswith(".centroids"):
            arrays[name] = arrays[name][:11]
    from safetensors.flax import save_file as save_jax

    save_jax(arrays, folder / "model.safetensors")
    weight = models.load(folder, backend="xla").layers[0].mlp.down.weight.get_value()
    assert weight.codebook.shape == (16,)
    assert (np.asarray(weight.codebook)[10:] == np.asarray(weight.codebook)[10]).all()


def test_progress_counts_layers():
    seen = []
    models.load(DATA / "qwen2", progress=lambda *args: seen.append(args))
    assert seen == [(1, 2), (2, 2)]


def test_saved_model_is_loaded_again(tmp_path):
    model = models.load(DATA / "kmeans-4bit", dtype="float32")
    fdk_jax.checkpoint.save(tmp_path / "model.fdk", model)
    again = fdk_jax.checkpoint.load(tmp_path / "model.fdk", like=model)
    tokens = expected("kmeans-4bit")["tokens"]
    np.testing.assert_array_equal(
        models.Generator(again).logits(tokens), models.Generator(model).logits(tokens)
    )
