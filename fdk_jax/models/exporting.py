"""A model's weights by their Hugging Face names, and as files that other programs run."""

import dataclasses
import functools
import os
from collections.abc import Callable
from typing import Any

import numpy as np

from fdk_jax.files import compressed_tensors_writer, gguf_writer
from fdk_jax.format.quantised_tensor import QuantisedTensor
from fdk_jax.layers.linear import QuantisedLinear
from fdk_jax.models import names, prepared
from fdk_jax.models.transformer import Transformer

Give = Callable[[], QuantisedTensor | np.ndarray]


def weights(model: Transformer) -> dict[str, Give]:
    """Hugging Face's name to a function that gives the array on the host: projections are taken apart.

    Raises:
        ValueError: the model is shared by several devices.
    """
    if model.parallel is not None:
        raise ValueError("a model that several devices share cannot be exported; load it on one")
    if any(names.layer_stacks(model.config, i) for i in range(model.config.num_layers)):
        raise ValueError("exporting a mixture of experts is not implemented")
    found: dict[str, Give] = {names.EMBEDDING: functools.partial(_value, model.embedding)}
    for index, layer in enumerate(model.layers):
        for name, (path, _) in names.layer_vectors(model.config, index).items():
            vector: Any = functools.reduce(getattr, path, layer)
            found[name] = functools.partial(_value, vector)
        for projection in names.layer_projections(model.config, index):
            _add(found, functools.reduce(getattr, projection.path, layer), projection.parts)
    found[names.FINAL_NORM] = functools.partial(_value, model.norm.scale)
    if not model.config.tie_embeddings:
        _add(found, model.lm_head, names.head(model.config).parts)
    return found


def export(
    model: Transformer,
    path: str | os.PathLike,
    *,
    like: str | os.PathLike,
    format: str,
    otherwise: str | None = None,
) -> dict[str, float]:
    """Writes a model for llama.cpp (GGUF), vLLM and transformers (compressed-tensors), or to load it again.

    Args:
        model: quantised or not, on one device.
        path: the `.gguf` file, or a new folder.
        like: where the model came from: a GGUF file, or a Hugging Face folder; its metadata and tokenizer are
            kept.
        format: "gguf", "compressed-tensors", or "prepared": a folder for `models.load` on a machine with the
            same kernels, which reads the weights without any conversion.
        otherwise: for GGUF: the type of quantised weights that no type holds, see `gguf_writer.write`.

    Returns:
        The relative error of each weight that is not written exactly; empty if all are.

    Raises:
        ValueError: weights that the format does not hold, by their names.
    """
    if format == "gguf":
        return gguf_writer.write(path, weights(model), like=like, otherwise=otherwise)
    if format == "prepared":
        prepared.write(path, model, like=like)
        return {}
    if format != "compressed-tensors":
        raise ValueError(f'{format=} is not one of "gguf", "compressed-tensors" and "prepared"')
    compressed_tensors_writer.write(path, weights(model), like=like)
    return {}


def _value(variable) -> QuantisedTensor | np.ndarray:
    value = variable.get_value()
    return _on_host(value) if isinstance(value, QuantisedTensor) else np.asarray(value)


def _on_host(w: QuantisedTensor) -> QuantisedTensor:
    w = w.to_layout("interchange")
    return dataclasses.replace(
        w,
        packed=np.asarray(w.packed),
        scales=np.asarray(w.scales),
        codebook=np.asarray(w.codebook),
    )


def _add(found: dict[str, Give], linear, parts) -> None:
    """The parts of a linear layer, which lie one after the other along its outputs."""
    begin = 0
    for part in parts:
        rows = slice(begin, begin + part.shape[0])
        found[f"{part.name}.weight"] = functools.partial(_rows, linear, rows)
        if part.bias:
            found[f"{part.name}.bias"] = lambda rows=rows: np.asarray(linear.bias.get_value())[rows]
        begin = rows.stop


def _rows(linear, rows: slice) -> QuantisedTensor | np.ndarray:
    if not isinstance(linear, QuantisedLinear):
        return np.asarray(linear.kernel.get_value())[:, rows].T
    w = _on_host(linear.weight.get_value())
    codebook = w.codebook
    if codebook.ndim == 2:
        run = w.out_features // len(codebook)
        codebook = codebook[rows.start // run : -(-rows.stop // run)]
        codebook = codebook[0] if (codebook == codebook[0]).all() else codebook
    return dataclasses.replace(
        w,
        packed=w.packed[rows],
        scales=w.scales[rows],
        codebook=codebook,
        shape=(rows.stop - rows.start, w.in_features),
    )
