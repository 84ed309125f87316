"""Folders of prepared models: weights in the layout of the kernels that run them, read without conversion."""

import functools
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
from flax import nnx

from fdk_jax import checkpoint, files
from fdk_jax.files.atomic import new_folder
from fdk_jax.files.compressed_tensors_writer import copy_texts
from fdk_jax.format.quantised_tensor import QuantisedTensor
from fdk_jax.layers.linear import QuantisedWeight
from fdk_jax.layers.trees import prepare
from fdk_jax.models import names
from fdk_jax.models.config import ModelConfig
from fdk_jax.models.transformer import Transformer, shapes
from fdk_jax.models.weights import set_linear, set_vector, share_table

_WEIGHTS = "model.fdk"


def is_prepared(path: str | Path) -> bool:
    """Whether `write` made a folder."""
    return (Path(path) / _WEIGHTS).is_file()


def write(folder: str | os.PathLike, model: Transformer, *, like: str | os.PathLike) -> None:
    """Writes a model that is on one device.

    Args:
        folder: a folder that does not exist yet.
        model: its weights are written in the layout that they have.
        like: where the model came from: a Hugging Face folder or a GGUF file.

    Raises:
        FileExistsError: the folder is there.
        ValueError: a model that several devices share.
    """
    target = Path(folder)
    if model.parallel is not None:
        raise ValueError("a model that several devices share cannot be prepared; load it on one")
    if any(names.layer_stacks(model.config, i) for i in range(model.config.num_layers)):
        raise ValueError("preparing a mixture of experts is not implemented")
    if target.exists():
        raise FileExistsError(f"{target} exists; give the name of a new folder")
    like = Path(like)
    config = dict(files.read_config(like)) | {"dtype": model.config.dtype}
    for key in ("quantization_config", "quantization", "torch_dtype"):
        config.pop(key, None)
    with new_folder(target) as temporary:
        made = files.read_tokenizer(like)
        if made is None:
            copy_texts(like, temporary)
        else:
            (temporary / "tokenizer.json").write_text(made.tokenizer, encoding="utf-8")
            _write_json(temporary / "tokenizer_config.json", dict(made.config))
            stops = {"eos_token_id": list(made.stop_tokens)}
            _write_json(temporary / "generation_config.json", stops)
        _write_json(temporary / "config.json", config)
        checkpoint.save(temporary / _WEIGHTS, model, keep_layout=True)


def read(path: str | Path, *, dtype: str | None, backend: str, arithmetic: str) -> Transformer:
    """Reads what `write` wrote; weights in another backend's layout are converted.

    Raises:
        ValueError: a damaged file, or another dtype than the model's.
    """
    config = ModelConfig.from_hf(files.read_config(path), dtype=dtype)
    tree = checkpoint.load(Path(path) / _WEIGHTS)
    stored = _at(tree, ("norm", "scale")).dtype
    if stored != config.dtype:
        raise ValueError(f"{path} is prepared for {stored}, not for dtype={config.dtype!r}")
    tree = prepare(tree, backend)
    model = shapes(config)
    table = tree["embedding"]
    quantised = isinstance(table, QuantisedTensor)
    model.embedding = QuantisedWeight(table) if quantised else nnx.Param(table)
    set_vector(model, ("norm", "scale"), _at(tree, ("norm", "scale")))
    place = functools.partial(_place, dtype=jnp.dtype(config.dtype), arithmetic=arithmetic)
    for index, layer in enumerate(model.layers):
        node = _at(tree, ("layers", index))
        for vector, _ in names.layer_vectors(config, index).values():
            set_vector(layer, vector, _at(node, vector))
        for projection in names.layer_projections(config, index):
            place(layer, projection.path, _at(node, projection.path))
    if "lm_head" in tree:  # of its own, whatever config.json says
        place(model, ("lm_head",), tree["lm_head"])
    elif quantised and config.tie_embeddings:
        place(model, ("lm_head",), {"weight": table})
        share_table(model)
    return model


def _place(module, path, node: Mapping[str, Any], *, dtype, arithmetic: str) -> None:
    weight = node["weight"] if "weight" in node else node["kernel"]
    set_linear(module, path, weight, node.get("bias"), dtype, arithmetic)


def _at(tree: Mapping, path) -> Any:
    try:
        return functools.reduce(lambda node, key: node[key], path, tree)
    except (KeyError, TypeError):
        raise ValueError(
            f"the prepared model lacks {'.'.join(map(str, path))}: it does not fit its config.json"
        ) from None


def _write_json(path: Path, values: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
