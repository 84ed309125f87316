"""Live comparison with `transformers` on PyTorch; skipped where they are not installed."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest

from fdk_jax import models
from fdk_jax.models import names

torch = pytest.importorskip("torch", reason="needs torch and transformers: see docs/models.md")
transformers = pytest.importorskip("transformers", reason="needs transformers: see docs/models.md")

DATA = Path(__file__).parent / "data"
SPECIFICATION = importlib.util.spec_from_file_location("make_golden", DATA / "make_golden.py")
golden = importlib.util.module_from_spec(SPECIFICATION)
SPECIFICATION.loader.exec_module(golden)

LINEAR = dict(rope_type="linear", rope_theta=10000.0, factor=4.0)
LLAMA3 = dict(
    hidden_size=96, num_attention_heads=6, head_dim=32, rope_parameters=golden.LLAMA3
)  # an attention wider than the model
VARIANTS = {
    "llama2": ("llama", dict(num_key_value_heads=4, tie_word_embeddings=False)),
    "llama3": ("llama", dict(tie_word_embeddings=True, **LLAMA3)),
    "llama-one-kv-head": ("llama", dict(num_key_value_heads=1, tie_word_embeddings=False)),
    "llama-biases": ("llama", dict(attention_bias=True, mlp_bias=True, tie_word_embeddings=False)),
    "llama-linear-rope": ("llama", dict(rope_parameters=LINEAR, tie_word_embeddings=True)),
    "qwen2": ("qwen2", dict(tie_word_embeddings=False)),
    "qwen2-tied": ("qwen2", dict(tie_word_embeddings=True)),
    "qwen3": ("qwen3", dict(head_dim=32, tie_word_embeddings=True)),
    "qwen3-untied": ("qwen3", dict(head_dim=32, tie_word_embeddings=False)),
}


def _load(folder: Path):
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


@pytest.fixture
def random_model(tmp_path):
    """A function that makes a random model of a variant: theirs, and its folder for ours."""

    def make(variant: str):
        kind, options = VARIANTS[variant]
        folder = tmp_path / variant
        golden.family(kind, **options).to(torch.bfloat16).save_pretrained(folder)
        return _load(folder), folder

    return make


def assert_equal(theirs, generator: models.Generator, rng: np.random.Generator) -> None:
    """Logits to float32 accuracy, and the same greedy tokens."""
    tokens = rng.integers(0, theirs.config.vocab_size, (3, 40))
    with torch.no_grad():
        wanted = theirs(torch.from_numpy(tokens)).logits.numpy().astype(np.float64)
        greedy = theirs.generate(
            torch.from_numpy(tokens[:, :9]), max_new_tokens=20, do_sample=False
        ).numpy()
    found = np.asarray(generator.logits(tokens), np.float64)
    assert np.linalg.norm(found - wanted) / np.linalg.norm(wanted) < 1e-5
    out = generator.generate(tokens[:, :9].tolist(), max_tokens=20)
    assert out.tokens == greedy[:, 9:].tolist()


def set_weights(theirs, ours: models.Transformer) -> None:
    """Gives their model the dequantised matrices of ours."""
    state = theirs.state_dict()  # shares memory with the model

    def copy(owner, projection: names.Projection) -> None:
        for name in projection.path:
            owner = getattr(owner, name)
        matrix = np.asarray(owner.weight.get_value().dequantise(np.float32))
        ends = np.cumsum([part.shape[0] for part in projection.parts])[:-1]
        for part, rows in zip(projection.parts, np.split(matrix, ends), strict=True):
            name = part.name if f"{part.name}.weight" in state else "lm_head"
            state[f"{name}.weight"].copy_(torch.from_numpy(rows.copy()))

    for index, layer in enumerate(ours.layers):
        for projection in names.layer_projections(ours.config, index):
            copy(layer, projection)
    if hasattr(ours.lm_head, "weight"):
        copy(ours, names.head(ours.config))


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_and_greedy_tokens(variant, random_model, rng):
    theirs, folder = random_model(variant)
    assert_equal(theirs, models.Generator(models.load(folder, dtype="float32")), rng)


@pytest.mark.parametrize("variant", ["llama2", "llama3", "llama-biases", "qwen2", "qwen3-untied"])
@pytest.mark.parametrize(
    "quantisation",
    [
        models.Quantisation(4, 32, "kmeans"),
        models.Quantisation(1, 64, "kmeans"),
        models.Quantisation(2, 16),
        models.Quantisation(8, 64, "uniform"),
    ],
    ids=lambda q: f"{q.bits}bit",
)
def test_quantised_weights_dequantised_in_both(variant, quantisation, random_model, rng):
    theirs, folder = random_model(variant)
    ours = models.load(folder, dtype="float32", quantisation=quantisation)
    set_weights(theirs, ours)
    assert_equal(theirs, models.Generator(ours), rng)


def test_quantised_head(random_model, rng):
    theirs, folder = random_model("qwen2")
    options = models.Quantisation(4, 32, head_bits=8)
    ours = models.load(folder, dtype="float32", quantisation=options)
    set_weights(theirs, ours)
    assert_equal(theirs, models.Generator(ours), rng)


@pytest.mark.parametrize("bits", [4, 1])
def test_published_layout_dequantised_by_hand(bits, rng):
    """The codes of a k-means checkpoint unpacked here, without the package."""
    folder = DATA / "models" / f"kmeans-{bits}bit"
    config = transformers.AutoConfig.from_pretrained(folder)
    theirs = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    state = theirs.state_dict()
    from safetensors.torch import load_file

    arrays = load_file(folder / "model.safetensors")
    for name, value in state.items():
        base = name.removesuffix(".weight")
        if name in arrays:
            value.copy_(arrays[name].float())
            continue
        packed, scales = arrays[f"{base}.weight_packed"].numpy(), arrays[f"{base}.scales"].float()
        shifts = np.arange(8 - bits, -1, -bits)  # the first code has the highest bits
        codes = (packed[:, :, None] >> shifts & (2**bits - 1)).reshape(len(packed), -1)
        levels = arrays[f"{base}.centroids"].float().numpy()[codes]
        value.copy_(torch.from_numpy(levels) * scales.repeat_interleave(golden.GROUP, 1))
    assert_equal(theirs, models.Generator(models.load(folder, dtype="float32")), rng)
