"""Model families against `transformers`: logits and greedy tokens of tiny random models, options by name.

`data/make_families.py` says how the expected values were made; the weights come from its seeds.
"""

import importlib.util
import json
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

from fdk_jax import models

DATA = Path(__file__).parent / "data"
SPECIFICATION = importlib.util.spec_from_file_location("make_families", DATA / "make_families.py")
golden = importlib.util.module_from_spec(SPECIFICATION)
SPECIFICATION.loader.exec_module(golden)


def relative(found, wanted) -> float:
    """Largest difference, in units of the expected values' standard deviation."""
    found, wanted = np.asarray(found, np.float64), np.asarray(wanted, np.float64)
    return float(np.abs(found - wanted).max() / wanted.std())


@pytest.fixture(scope="module")
def expected():
    with np.load(golden.FILE) as file:
        return dict(file)


def write(name: str, expected, folder: Path) -> Path:
    """The checkpoint of a row."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(str(expected[f"{name}/config"]))
    shapes = json.loads(str(expected[f"{name}/shapes"]))
    arrays = {key: golden.weight(name, key, tuple(shape)) for key, shape in shapes.items()}
    save_file(arrays, folder / "model.safetensors")
    return folder


# Every option of the modules is in one of these; the others are slow together.
QUICK = (
    "mistral, window",
    "smollm3, windows",
    "phi3, longrope",
    "olmo3, YaRN",
    "granite",
    "gemma3",
    "qwen3_moe, not normalised",
    "gpt_oss",
    "ministral3",
)
ROWS = [
    pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in golden.MODELS
]


@pytest.mark.parametrize("name", ROWS)
def test_logits_and_greedy_tokens_equal_transformers(name, expected, tmp_path):
    folder = write(name, expected, tmp_path)
    generator = models.Generator(models.load(folder, dtype="float32"), max_context=golden.TOKENS)
    tokens = expected[f"{name}/tokens"].astype(np.int32)
    logits = generator.logits(tokens)[:, ::4]
    error = relative(logits, expected[f"{name}/logits"])
    print(f"{name}: {error:.1e}")
    assert error < 5e-5
    prompt = golden.prompt_of(name)
    greedy = expected[f"{name}/greedy"]
    out = generator.generate(tokens[:, :prompt].tolist(), max_tokens=greedy.shape[1])
    assert out.tokens == greedy.tolist()


@pytest.mark.parametrize("inner", ["model.language_model.", "language_model.model."])
def test_the_text_part_of_a_model_that_reads_images(inner, expected, tmp_path):
    plain = models.load(write("gemma3", expected, tmp_path / "text"), dtype="float32")
    folder = tmp_path / "images"
    write("gemma3", expected, folder)
    text = json.loads((folder / "config.json").read_text())
    config = dict(model_type="gemma3", text_config=text, vision_config={}, dtype="bfloat16")
    (folder / "config.json").write_text(json.dumps(config))
    arrays = {
        f"{inner}{name.removeprefix('model.')}": value
        for name, value in load_file(folder / "model.safetensors").items()
    }
    more = {"vision_tower.x.weight": np.ones((2, 2), np.float32)}
    save_file(arrays | more, folder / "model.safetensors")
    with pytest.warns(UserWarning, match="of 'gemma3' only the text part is read"):
        found = models.load(folder, dtype="float32")
    assert found.config == plain.config
    for ours, wanted in zip(
        jax.tree.leaves(nnx.state(found)), jax.tree.leaves(nnx.state(plain)), strict=True
    ):
        assert np.array_equal(ours, wanted)
