"""Checkpoints quantised with a text of the user's: `load_calibrated`."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx

from fdk_jax.format.orientation import to_matrix
from fdk_jax.format.quantisation import quantise_array
from fdk_jax.layers.linear import QuantisedLinear
from fdk_jax.layers.trees import default_backend, prepare
from fdk_jax.learning.calibration import calibrate
from fdk_jax.learning.evaluation import read_tokens
from fdk_jax.models import names
from fdk_jax.models.loading import Quantisation, load
from fdk_jax.models.tokenizer import Tokenizer
from fdk_jax.models.transformer import Transformer
from fdk_jax.models.weights import check_arithmetic, set_linear


def token_windows(
    path: str | Path, tokenizer: Tokenizer, *, context: int = 512, tokens: int = 16384
) -> np.ndarray:
    """Windows int32 [B, T] of a file, spread over all of it.

    Args:
        path: UTF-8 text; or tokens, as a `.npy` file or a `.bin` file of little-endian uint16.
        tokenizer: of the model.
        context: T, or less if the file holds less.
        tokens: B * T at most, but one window at least.

    Raises:
        FileNotFoundError: no such file.
        ValueError: fewer than two tokens, or not a text.
    """
    path = Path(path)
    if path.suffix in (".npy", ".bin"):
        found = read_tokens(path).reshape(-1)
    else:
        try:
            found = np.asarray(tokenizer.encode(path.read_text("utf-8")), np.int32)
        except UnicodeDecodeError as error:
            raise ValueError(f"{path} is not a text in UTF-8: {error}") from error
    length = min(context, len(found))
    if length < 2:
        raise ValueError(f"{path} holds {len(found)} tokens; 2 are the least")
    rows = found[: len(found) // length * length].reshape(-1, length).astype(np.int32)
    count = max(1, min(len(rows), tokens // length))
    return rows[np.linspace(0, len(rows) - 1, count).astype(int)]


def load_calibrated(
    path: str | Path,
    quantisation: Quantisation,
    windows: np.ndarray | Sequence[np.ndarray],
    *,
    requantise: int | None = None,
    dtype: str | None = None,
    backend: str | None = None,
    arithmetic: str = "exact",
    progress: bool | None = None,
) -> Transformer:
    """Loads a model and quantises it by `fdk_jax.calibrate`: codebooks, scales and codes fitted to a text.

    The float model must fit into memory.

    Args:
        path: See `load`; a checkpoint of floats, or of a kind that `requantise=16` makes floats.
        quantisation: Its codebook "auto" stands for "kmeans", its scale "auto" for "search".
        windows: Tokens int [B, T]; some thousand tokens, several times as many as a layer has inputs.
        requantise: See `load`.
        dtype: See `load`.
        backend: See `load`.
        arithmetic: See `load`.
        progress: See `fdk_jax.calibrate`.

    Returns:
        The model, ready for `fdk_jax.models.Generator`.

    Raises:
        ValueError: As `load` and `fdk_jax.calibrate`; or a checkpoint that is quantised already, or has
            stacked weights of experts, which `calibrate` does not know.
    """
    backend = backend or default_backend()
    check_arithmetic(arithmetic, backend)
    model, q = load(path, requantise=requantise, dtype=dtype, backend="xla"), quantisation
    if any(isinstance(one, QuantisedLinear) for _, one in nnx.iter_modules(model.layers)):
        raise ValueError(f"{path} is quantised already: there is nothing to calibrate")
    if any(names.layer_stacks(model.config, i) for i in range(model.config.num_layers)):
        raise ValueError(f"{path} has stacked weights of experts, which cannot be calibrated")
    options: dict[str, Any] = dict(
        group_size=q.group_size,
        codebook=q.codebook,
        scale="search" if q.scale == "auto" else q.scale,
    )
    batches = [jnp.asarray(row)[None] for row in windows]
    calibrate(model, q.bits, batches, in_place=True, progress=progress, **options)
    if q.head_bits is not None:
        head = model.lm_head
        table = model.embedding[...] if head is None else to_matrix(head.kernel[...], "kn")[0]
        weight = quantise_array(table, q.head_bits, group_size=q.group_size)
        set_linear(model, ("lm_head",), weight, None, jnp.dtype(model.config.dtype))
    for _, layer in nnx.iter_modules(model):
        if isinstance(layer, QuantisedLinear) and arithmetic != "exact":
            layer.arithmetic, layer.backend = arithmetic, "cpu"
    return prepare(model, backend)
