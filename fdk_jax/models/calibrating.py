"""Checkpoints quantised with a text of the user's: `load_calibrated`.

Layer by layer: the float model waits on the host, the device holds one layer of it, the residual stream of the
text, and what is quantised already. Layers that are alike share their compiled programs.
"""

import contextlib
import functools
import itertools
import logging
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from fdk_jax.format.orientation import to_matrix
from fdk_jax.format.quantisation import quantise_array
from fdk_jax.layers.linear import QuantisedLinear
from fdk_jax.layers.trees import default_backend, prepare
from fdk_jax.learning import compiling
from fdk_jax.learning.calibration import calibrate, progress_bar
from fdk_jax.learning.evaluation import read_tokens
from fdk_jax.models import decoding, names
from fdk_jax.models.loading import Quantisation, load
from fdk_jax.models.rotating import Rotation, rotate_ends, rotate_layer
from fdk_jax.models.tokenizer import Tokenizer
from fdk_jax.models.transformer import Transformer
from fdk_jax.models.weights import check_arithmetic, set_linear

LOG = logging.getLogger(__name__)  # says at INFO when each layer is done
_BATCH_TOKENS = 2048
Batch = tuple[Array, Array, Array]  # the residual stream [B, T, D], cosines and sines [1, T, d / 2]


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
        ValueError: fewer than two tokens, windows of fewer, or not a text.
    """
    path = Path(path)
    if context < 2:
        raise ValueError(
            f"{context=} must be at least 2: a window predicts each token but its first"
        )
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
    rotate: bool = False,
    learn: bool | str = False,
) -> Transformer:
    """Loads a model and quantises it by `fdk_jax.calibrate`: codebooks, scales and codes fitted to a text.

    The float model must fit into the host's memory; the device needs room for one layer of it, for the second
    moments of that layer's inputs (4 K**2 bytes for each matrix of K inputs) and for the quantised model. Each
    layer is fitted to what the quantised ones before it leave.

    Args:
        path: See `load`; a checkpoint of floats, or of a kind that `requantise=16` makes floats.
        quantisation: Its codebook "auto" stands for "kmeans", its scale "auto" for "search".
        windows: Tokens int [B, T]; some thousand tokens, several times as many as a layer has inputs.
        requantise: See `load`.
        dtype: See `load`.
        backend: See `load`.
        arithmetic: See `load`.
        progress: See `fdk_jax.calibrate`.
        rotate: Folds rotations of the residual stream and of the heads' values into the weights first, which
            helps at 2 and 1 bits (docs/quality.md); a head that is tied to the embedding becomes a matrix of
            its own. See `fdk_jax.models.rotated`.
        learn: See `fdk_jax.calibrate`.

    Returns:
        The model, ready for `fdk_jax.models.Generator`.

    Raises:
        ValueError: As `load` and `fdk_jax.calibrate`; or a checkpoint that is quantised already, or has
            stacked weights of experts, which `calibrate` does not know.
    """
    backend = backend or default_backend()
    check_arithmetic(arithmetic, backend)
    model = load(path, requantise=requantise, dtype=dtype, backend="xla", device=_host())
    q = quantisation
    if any(isinstance(one, QuantisedLinear) for _, one in nnx.iter_modules(model.layers)):
        raise ValueError(f"{path} is quantised already: there is nothing to calibrate")
    if any(names.layer_stacks(model.config, i) for i in range(model.config.num_layers)):
        raise ValueError(f"{path} has stacked weights of experts, which cannot be calibrated")
    options: dict[str, Any] = dict(
        group_size=q.group_size,
        codebook=q.codebook,
        scale="search" if q.scale == "auto" else q.scale,
        learn=learn,
    )
    LOG.info("read")
    rotation = Rotation.of(model.config) if rotate else None
    if rotation is not None:
        rotate_ends(model, rotation)
    layers = _calibrated_layers(model, windows, q.bits, rotation, options)
    with progress_bar(progress, model.config.num_layers) as advance:
        for index, layer in enumerate(layers):
            for _, one in nnx.iter_modules(layer):
                if isinstance(one, QuantisedLinear) and arithmetic != "exact":
                    one.arithmetic, one.backend = arithmetic, "cpu"
            model.layers[index] = prepare(layer, backend)
            advance(f"layer {index}")
            LOG.info("layer %d", index)
    model = _moved_module(model)
    if q.head_bits is not None:
        head = model.lm_head
        table = model.embedding[...] if head is None else to_matrix(head.kernel[...], "kn")[0]
        weight = quantise_array(table, q.head_bits, group_size=q.group_size)
        set_linear(model, ("lm_head",), weight, None, jnp.dtype(model.config.dtype), arithmetic)
    return prepare(model, backend)


def _calibrated_layers(
    model: Transformer,
    windows: Sequence[np.ndarray] | np.ndarray,
    bits: int,
    rotation: Rotation | None,
    options: dict,
) -> Iterator[nnx.Module]:
    """The layers of a float model, quantised on the default device one after another."""
    graph, state = nnx.split(model)
    embed = jax.jit(lambda state, rows: nnx.merge(graph, state).embed(rows))
    streams, angles = [], []
    for rows in _runs(windows):
        streams.append(_moved(embed(state, rows)))
        length = jnp.asarray([[rows.shape[1]]], jnp.int32)
        angles.append(
            decoding.rotations(model.layers, jnp.arange(rows.shape[1])[None], length, length)
        )
    for index, layer in enumerate(model.layers):
        layer = _moved_module(layer)
        if rotation is not None:
            rotate_layer(layer, rotation)
        inputs = [(x, *angle[index]) for x, angle in zip(streams, angles, strict=True)]
        with _named(f"layers.{index}"):
            calibrate(layer, bits, inputs, in_place=True, progress=False, forward=_after, **options)
        streams = [_step(*nnx.split(layer), one) for one in inputs]
        yield layer


def _after(layer: Any, batch: Batch) -> Array:
    """The residual stream after a layer."""
    return layer.prompt(*batch)[0]


@functools.partial(jax.jit, static_argnums=0, compiler_options=compiling.OPTIONS)
def _step(graph: nnx.GraphDef, state: nnx.State, batch: Batch) -> Array:
    return _after(nnx.merge(graph, state), batch)


def _runs(windows: Sequence[np.ndarray] | np.ndarray) -> Iterator[Array]:
    """Windows of one length together, int [B, T], some thousand tokens at a time."""
    for length, rows in itertools.groupby(windows, len):
        count = max(1, _BATCH_TOKENS // length)
        while some := list(itertools.islice(rows, count)):
            yield jnp.asarray(np.stack(some))


@contextlib.contextmanager
def _named(name: str) -> Iterator[None]:
    """Puts the name of a layer before those of its parts, in errors and warnings."""
    with warnings.catch_warnings(record=True) as notes:
        try:
            yield
        except (TypeError, ValueError) as error:
            raise type(error)(f"{name}.{error}") from error
    for note in notes:
        warnings.warn(f"{name}.{note.message}", note.category, stacklevel=2)


def _host() -> jax.Device | None:
    """The processor beside the default device; None where that is one, or JAX may not use it."""
    if jax.default_backend() == "cpu":
        return None
    try:
        return jax.local_devices(backend="cpu")[0]
    except RuntimeError:
        return None


def _moved(tree: Any) -> Any:
    """Arrays on the default device."""
    return tree if _host() is None else jax.device_put(tree, jax.local_devices()[0])


def _moved_module(module: Any) -> Any:
    graph, state = nnx.split(module)
    return nnx.merge(graph, _moved(state))
