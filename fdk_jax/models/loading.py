"""Checkpoint folders of Hugging Face, plain or with k-means codebooks, as a `Transformer`."""

import dataclasses
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx

from fdk_jax.format import codebooks
from fdk_jax.format.quantisation import quantise_array
from fdk_jax.layers.trees import default_backend
from fdk_jax.models import names
from fdk_jax.models.config import ModelConfig, read_config
from fdk_jax.models.parallel import Parallel
from fdk_jax.models.safetensors_folder import Entry, read_entries
from fdk_jax.models.transformer import Transformer
from fdk_jax.models.weights import (
    Codes,
    Placer,
    check_arithmetic,
    join_rows,
    set_linear,
    set_norm,
)

_SHOWN = 20  # names of each kind that an error lists


@dataclasses.dataclass(frozen=True)
class Quantisation:
    """How weights are quantised while they are read.

    Attributes:
        bits: 1, 2, 4 or 8.
        group_size: Weights that share a scale.
        codebook: "uniform", "nf4", "kmeans" or the values; see `fdk_jax.quantise`.
        scale: See `fdk_jax.quantise`.
        head_bits: Bits of the final projection (uniform, groups of `group_size`), or None to keep it. A
            head that is tied to the embedding becomes a quantised copy of it.
    """

    bits: int
    group_size: int = 64
    codebook: Any = "uniform"
    scale: str = "auto"
    head_bits: int | None = None


def load(
    folder: str | Path,
    *,
    quantisation: Quantisation | None = None,
    dtype: str | None = None,
    parallel: Parallel | None = None,
    backend: str | None = None,
    arithmetic: str = "exact",
    progress: Callable[[int, int], None] | None = None,
) -> Transformer:
    """Loads a model from a Hugging Face folder, layer by layer.

    Weights are memory-mapped and go straight to the device (or, with `parallel`, each slice to its own).
    A folder with a `quantization_config.json` of method "nonlinear" holds k-means codebooks and is read
    as it is.

    Args:
        folder: With `config.json` and `*.safetensors`, sharded or not.
        quantisation: Quantises the linear layers while reading, all but the final one; None keeps them.
        dtype: Compute dtype; None takes that of the folder.
        parallel: Several devices that share every matrix; None uses the default device.
        backend: Whose kernels quantised weights are laid out for; None for the default platform's.
        arithmetic: Of the activations that quantised weights multiply: "exact"; "int16" or "int8" with
            backend "cpu" (see `fdk_jax.matmul`).
        progress: Called as progress(layers read, layers).

    Returns:
        The model, ready for `fdk_jax.models.Generator`.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: an architecture that is not implemented, a damaged file, a checkpoint that is quantised
            already, or arrays that do not fit: every missing, unexpected or mis-shaped name at once.
    """
    backend = backend or default_backend()
    check_arithmetic(arithmetic, backend)
    config = read_config(folder, dtype=dtype)
    stored = read_stored_quantisation(folder)
    if stored is not None and quantisation is not None:
        raise ValueError(
            f"{folder} is quantised to {stored.bits} bits already; load it without quantisation"
        )
    entries = read_entries(folder)
    check_names(config, entries, stored)
    model = nnx.eval_shape(lambda: Transformer(config, parallel=parallel, rngs=nnx.Rngs(0)))
    placer = Placer(parallel, config.dtype, backend)
    reader = _Reader(config, entries, stored, quantisation, placer, arithmetic)
    for index, layer in enumerate(model.layers):
        reader.layer(layer, index)
        if progress is not None:
            progress(index + 1, config.num_layers)
    reader.outer(model)
    return model


def read_stored_quantisation(folder: str | Path) -> Quantisation | None:
    """How the weights of a folder are stored: None where they are plain.

    Raises:
        ValueError: a quantisation method that is not implemented.
    """
    folder = Path(folder)
    path = folder / "quantization_config.json"
    if path.is_file():
        facts = json.loads(path.read_text(encoding="utf-8"))
    else:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        facts = config.get("quantization_config")
    if facts is None:
        return None
    method = facts.get("quant_method")
    if method != "nonlinear":
        raise ValueError(
            f'{folder}: quant_method={method!r} is not implemented, only "nonlinear" (k-means codebooks)'
        )
    return Quantisation(bits=int(facts["bits"]), group_size=int(facts["block_size"]))


def check_names(
    config: ModelConfig, entries: Mapping[str, Entry], stored: Quantisation | None
) -> None:
    """Compares what a checkpoint holds with what the model needs.

    Raises:
        ValueError: lists every missing, unexpected and mis-shaped name.
    """
    wanted = _expected(config, stored)
    found = {name: entry for name, entry in entries.items() if not names.ignored(name, config)}
    wrong = [
        f"{name} is {list(found[name].shape)}, not {list(shape)}"
        for name, shape in wanted.items()
        if name in found and not _fits(name, found[name].shape, shape)
    ]
    problems = {
        "missing": [name for name in wanted if name not in found],
        "unexpected": [name for name in found if name not in wanted],
        "mis-shaped": wrong,
    }
    lines = []
    for kind, listed in problems.items():
        if listed:
            more = f", and {len(listed) - _SHOWN} more" if len(listed) > _SHOWN else ""
            lines.append(f"{len(listed)} {kind}: {', '.join(listed[:_SHOWN])}{more}")
    if lines:
        raise ValueError("the checkpoint does not fit its config.json: " + "; ".join(lines))


def _fits(name: str, found: tuple[int, ...], wanted: tuple[int, ...]) -> bool:
    if name.endswith(".centroids"):
        return len(found) == 1 and 1 <= found[0] <= wanted[0]
    return found == wanted


def _expected(config: ModelConfig, stored: Quantisation | None) -> dict[str, tuple[int, ...]]:
    """Name and shape of every array that a checkpoint of this model has."""
    wanted: dict[str, tuple[int, ...]] = {
        names.EMBEDDING: (config.vocab_size, config.hidden_size),
        names.FINAL_NORM: (config.hidden_size,),
    }
    if not config.tie_embeddings:
        (head,) = names.head(config).parts
        wanted[f"{head.name}.weight"] = head.shape
    for index in range(config.num_layers):
        for name, (_, size) in names.layer_norms(config, index).items():
            wanted[name] = (size,)
        for projection in names.layer_projections(config, index):
            for part in projection.parts:
                n, k = part.shape
                if part.bias:
                    wanted[f"{part.name}.bias"] = (n,)
                if stored is None:
                    wanted[f"{part.name}.weight"] = (n, k)
                else:
                    wanted[f"{part.name}.weight_packed"] = (n, -(-k * stored.bits // 8))
                    wanted[f"{part.name}.scales"] = (n, -(-k // stored.group_size))
                    wanted[f"{part.name}.centroids"] = (2**stored.bits,)
    return wanted


class _Reader:
    """Fills a model from the entries of a checkpoint."""

    def __init__(self, config, entries, stored, quantisation, placer, arithmetic):
        self.config: ModelConfig = config
        self.entries: Mapping[str, Entry] = entries
        self.stored: Quantisation | None = stored
        self.quantisation: Quantisation | None = quantisation
        self.placer: Placer = placer
        self.arithmetic: str = arithmetic

    def layer(self, layer: nnx.Module, index: int) -> None:
        for name, (path, _) in names.layer_norms(self.config, index).items():
            set_norm(layer, path, self.placer.vector(self._read(name)))
        for projection in names.layer_projections(self.config, index):
            self._projection(layer, projection, self.quantisation)

    def outer(self, model: Transformer) -> None:
        """Embedding, final norm and head."""
        q = self.quantisation
        model.embedding = nnx.Param(self.placer.embedding(self._read(names.EMBEDDING)))
        set_norm(model, ("norm",), self.placer.vector(self._read(names.FINAL_NORM)))
        head = Quantisation(q.head_bits, q.group_size) if q and q.head_bits else None
        if self.config.tie_embeddings and head is None:
            return
        self._projection(model, names.head(self.config), head, plain=True)

    def _projection(self, owner, projection, quantisation, *, plain: bool = False) -> None:
        parts, k = projection.parts, projection.parts[0].shape[1]
        bias = None
        if parts[0].bias:
            rows = [np.asarray(self._read(f"{part.name}.bias")) for part in parts]
            joined = join_rows(rows, self.placer.shards)
            bias = self.placer.vector(joined, cut=projection.cut == "n")
        if self.stored is not None and not plain:
            codes = [self._stored_codes(part.name, self.stored.bits) for part in parts]
            facts = self.stored
        elif quantisation is not None:
            codes = [self._quantised_codes(part.name, quantisation) for part in parts]
            facts = quantisation
        else:
            kernels = [self._read(f"{part.name}.weight") for part in parts]
            set_linear(owner, projection.path, self.placer.kernel(kernels, projection.cut), bias)
            return
        weight = self.placer.quantised(
            codes, projection.cut, bits=facts.bits, group_size=facts.group_size, in_features=k
        )
        set_linear(owner, projection.path, weight, bias, self.arithmetic)

    def _stored_codes(self, name: str, bits: int) -> Codes:
        centroids = np.asarray(self._read(f"{name}.centroids"), np.float32)
        if not np.isfinite(centroids).all() or (np.diff(centroids) < 0).any():
            raise ValueError(f"{name}.centroids must be finite and ascending, got {centroids}")
        return Codes(
            self._read(f"{name}.weight_packed"),
            self._read(f"{name}.scales"),
            centroids,
            bits == 1 or codebooks.is_uniform(centroids),
        )

    def _quantised_codes(self, name: str, q: Quantisation) -> Codes:
        weight = jnp.asarray(self._read(f"{name}.weight")).astype(self.placer.dtype)
        try:
            w = quantise_array(
                weight, q.bits, group_size=q.group_size, codebook=q.codebook, scale=q.scale
            )
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
        return Codes(w.packed, w.scales, np.asarray(w.codebook), w.uniform)

    def _read(self, name: str) -> np.ndarray:
        return self.entries[name].read()
