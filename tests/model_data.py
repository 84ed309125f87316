"""Checkpoints of models for tests: golden folders, and folders of random weights."""

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from safetensors import safe_open
from safetensors.numpy import save_file

import fdk_jax
from fdk_jax.benchmark import shapes
from fdk_jax.models import Transformer
from fdk_jax.models.config import ModelConfig

DATA = Path(__file__).parent / "data" / "models"


def relative(found, wanted) -> float:
    """||found - wanted|| / ||wanted|| in float64."""
    found, wanted = np.asarray(found, np.float64), np.asarray(wanted, np.float64)
    return float(np.linalg.norm(found - wanted) / np.linalg.norm(wanted))


def expected(name: str) -> dict[str, np.ndarray]:
    """What `transformers` computed for a folder."""
    return dict(np.load(DATA / name / "expected.npz"))


def in_float32(model: Transformer) -> Transformer:
    """The same weights, dequantised, with float32 arithmetic."""
    # A quantised table that is the head, too, becomes two matrices.
    tied = model.lm_head is None
    config = dataclasses.replace(model.config, dtype="float32", tie_embeddings=tied)
    copy = nnx.eval_shape(lambda: Transformer(config, rngs=nnx.Rngs(0)))
    state = nnx.state(fdk_jax.dequantise(model, jnp.dtype("float32")))
    nnx.update(copy, jax.tree.map(lambda leaf: leaf.astype("float32"), state))
    return copy


def rewrite(folder: Path, change) -> None:
    """Applies `change` to the dictionary of arrays of a one-file folder."""
    with safe_open(folder / "model.safetensors", "numpy") as file:
        arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    change(arrays)
    save_file(arrays, folder / "model.safetensors")


def wide_config(**options) -> ModelConfig:
    """A model that 8 devices can share, groups of 16 included."""
    fields = dict(vocab_size=256, hidden_size=128, intermediate_size=256, num_layers=2)
    fields |= dict(num_heads=16, num_kv_heads=8, head_dim=16, dtype="float32", qk_norm=True)
    return ModelConfig(**(fields | options))


def write_folder(folder: Path, config: ModelConfig) -> Path:
    """A checkpoint with random weights."""
    from fdk_jax.models.stages import expected

    rng = np.random.default_rng(3)
    folder.mkdir()
    settings = shapes.of_hugging_face(config) | dict(
        model_type="qwen3" if config.qk_norm else "llama", dtype=config.dtype
    )
    (folder / "config.json").write_text(json.dumps(settings))
    arrays = {
        name: (rng.normal(size=shape) / np.sqrt(shape[-1])).astype(np.float32)
        for name, shape in expected(config).items()
    }
    save_file(arrays, folder / "model.safetensors")
    return folder
