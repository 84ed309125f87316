"""`evaluate`: what quantisation costs a model, layer by layer and in the end."""

import dataclasses
import functools
import math
import os
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from fdk_jax.format.orientation import to_matrix
from fdk_jax.layers.linear import QuantisedLinear
from fdk_jax.layers.surgery import replace_layers, to_flax
from fdk_jax.learning import statistics
from fdk_jax.learning.losses import kl_divergences, next_token_losses
from fdk_jax.learning.statistics import Forward, default_forward
from fdk_jax.learning.training import FakeQuantisedLinear


@dataclasses.dataclass(frozen=True)
class LayerReport:
    """One quantised layer.

    Attributes:
        name: dotted name.
        bits: width of a code.
        weights: number of weights.
        bytes_per_weight: bytes held (codes, scales, codebook) over weights.
        weight_error: relative RMS error of the weights; None without a reference.
        output_error: relative RMS error of the outputs for the reference's own inputs; None without tokens.
    """

    name: str
    bits: int
    weights: int
    bytes_per_weight: float
    weight_error: float | None = None
    output_error: float | None = None


@dataclasses.dataclass(frozen=True)
class Report:
    """What `evaluate` found.

    Attributes:
        layers: one report a quantised layer.
        bytes_per_weight: of all quantised layers together.
        model_bytes: bytes of all arrays of the model.
        weight_error: relative RMS error of all quantised weights together.
        output_error: relative RMS error over all layers' outputs, each layer given the same share.
        perplexity: exp of the mean loss, in nats, of the next token.
        reference_perplexity: the same of the reference.
        kl: mean KL divergence of the next-token distribution from the reference's, in nats a token.
        agreement: share of positions where both models rank the same token first.
        tokens: predicted tokens.
    """

    layers: tuple[LayerReport, ...]
    bytes_per_weight: float | None
    model_bytes: int
    weight_error: float | None
    output_error: float | None
    perplexity: float | None
    reference_perplexity: float | None
    kl: float | None
    agreement: float | None
    tokens: int

    def __str__(self) -> str:
        width = max((len(layer.name) for layer in self.layers), default=5)
        lines = [f"{'layer':{width}}  bits  bytes/weight  weight error  output error"]
        for layer in self.layers:
            lines.append(
                f"{layer.name:{width}}  {layer.bits:4}  {layer.bytes_per_weight:12.4f}"
                f"  {_text(layer.weight_error):>12}  {_text(layer.output_error):>12}"
            )
        per_weight = _text(self.bytes_per_weight)
        lines.append(
            f"{'all':{width}}        {per_weight:>12}  {_text(self.weight_error):>12}"
            f"  {_text(self.output_error):>12}"
        )
        lines.append(
            f"perplexity {_text(self.perplexity)} (reference {_text(self.reference_perplexity)}),"
            f" KL {_text(self.kl)} nats a token, same best token {_text(self.agreement)},"
            f" over {self.tokens:,} tokens; model {self.model_bytes:,} bytes"
        )
        return "\n".join(lines)


def _text(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}" if abs(value) < 1e4 else f"{value:.4g}"


def evaluate(
    model: nnx.Module,
    reference: nnx.Module | None = None,
    tokens: Any = None,
    *,
    context: int = 512,
    batch_size: int = 8,
    forward: Forward = default_forward,
    layers_at_a_time: int | None = None,
) -> Report:
    """Compares a quantised model with the one it came from.

    Args:
        model: an nnx model with `QuantisedLinear`s (or layers in quantisation-aware training).
        reference: the model before quantisation, with layers of the same names; None compares nothing. What
            it holds quantised itself, such as the head of a checkpoint, is not compared layer by layer.
        tokens: int [T] or [B, T]; or the path of a file of them: `.npy`, or `.bin` of little-endian uint16.
            None leaves out perplexity, divergence and outputs.
        context: length of the windows that [T] is cut into; an incomplete last one is dropped.
        batch_size: windows at a time.
        forward: maps (model, int [B, T]) to logits [B, T, V].
        layers_at_a_time: as in `fdk_jax.calibrate`.

    Returns:
        A `Report`; printed, it is a table.

    Raises:
        ValueError: tokens that cannot be read or do not fit the model, or layers that do not match.
    """
    layers = _quantised_layers(model)
    weights = sum(report.weights for report in layers.values())
    held = sum(report.weights * report.bytes_per_weight for report in layers.values())
    rows = None if tokens is None else _windows(read_tokens(tokens), context)
    batches = None
    if rows is not None:
        batches = [jnp.asarray(rows[i : i + batch_size]) for i in range(0, len(rows), batch_size)]
    weight_error = output_error = None
    if reference is not None and layers:
        layers, weight_error, output_error = _errors(
            model, reference, layers, batches, forward, layers_at_a_time
        )
    scores = _Scores() if batches is None else _score_all(model, reference, batches, forward)
    return Report(
        tuple(layers.values()),
        held / weights if weights else None,
        sum(math.prod(a.shape) * a.dtype.itemsize for a in jax.tree.leaves(nnx.state(model))),
        weight_error,
        output_error,
        scores.perplexity,
        scores.reference_perplexity,
        scores.kl,
        scores.agreement,
        scores.tokens,
    )


def read_tokens(source: Any) -> np.ndarray:
    """Integer tokens [T] or [B, T] of an array or a file.

    Args:
        source: an array; or the path of a `.npy` file, or of a `.bin` file of little-endian uint16.

    Raises:
        FileNotFoundError: no such file.
        ValueError: another kind of file, or values that are not tokens.
    """
    if isinstance(source, (str, os.PathLike)):
        path = Path(source)
        if path.suffix == ".npy":
            source = np.load(path, mmap_mode="r", allow_pickle=False)
        elif path.suffix == ".bin":
            source = np.fromfile(path, "<u2")
        else:
            raise ValueError(f"{path} must be a .npy file, or a .bin file of uint16 tokens")
    tokens = np.asarray(source)
    if tokens.ndim not in (1, 2) or not np.issubdtype(tokens.dtype, np.integer):
        raise ValueError(f"tokens must be integers [T] or [B, T], got {tokens.dtype}{tokens.shape}")
    if tokens.shape[-1] < 2 or not tokens.size or tokens.min() < 0 or tokens.max() >= 2**31:
        raise ValueError(
            f"tokens of shape {tokens.shape} must be at least 2 a row, not negative, and below 2**31"
        )
    return tokens


def _windows(tokens: np.ndarray, context: int) -> np.ndarray:
    if context < 2:
        raise ValueError(f"{context=} must be at least 2")
    if tokens.ndim == 1:
        length = min(context, len(tokens))
        tokens = tokens[: len(tokens) // length * length].reshape(-1, length)
    return tokens.astype(np.int32)


def _quantised_layers(model: nnx.Module) -> dict[str, LayerReport]:
    found = {}

    def look(name: str, layer: nnx.Module) -> None:
        if isinstance(layer, QuantisedLinear):
            w = layer.weight.get_value()
        elif isinstance(layer, FakeQuantisedLinear):
            w = layer.quantised()
        else:
            return
        count = math.prod(w.batch_shape) * math.prod(w.shape)
        found[name] = LayerReport(name, w.bits, count, w.bytes_per_weight)

    replace_layers(model, look, in_place=True)
    return found


def _matrices(model: nnx.Module, names: set[str]) -> dict[str, Any]:
    """For each name a function that returns the float32 matrix [..., N, K] of that layer."""
    found = {}

    def look(name: str, layer: nnx.Module) -> None:
        if name not in names:
            return
        if isinstance(layer, FakeQuantisedLinear):
            found[name] = lambda: to_matrix(layer.weight(), layer.axes)[0]
            return

        def matrix() -> Array:
            flax = to_flax(layer, jnp.float32) if isinstance(layer, QuantisedLinear) else layer
            (linear,) = statistics.linear_layers(flax, lambda _: False).values()
            return to_matrix(linear.layer.kernel.get_value().astype(jnp.float32), linear.axes)[0]

        found[name] = matrix

    replace_layers(model, look, in_place=True)
    return found


def _errors(model, reference, layers, batches, forward, layers_at_a_time):
    """Layer reports with errors, and the errors in total; a layer that the reference has quantised has none."""
    before = _quantised_layers(reference)
    changed = [name for name in layers if name not in before]
    originals = statistics.linear_layers(reference, lambda name: name not in changed)
    # A reference without any is the wrong one.
    if missing := [name for name in changed or layers if name not in originals]:
        raise ValueError(f"the reference has no float linear layers called {missing}")
    ours, theirs = _matrices(model, set(changed)), _matrices(reference, set(changed))
    out, squares, outputs = dict(layers), np.zeros(2), []
    for names in statistics.chunks(originals, batches is not None, layers_at_a_time):
        moments = {}
        if batches is not None:
            moments = statistics.second_moments(reference, batches, names, forward=forward)
        for name in names:
            new, old = ours[name](), theirs[name]()
            if new.shape != old.shape:
                raise ValueError(f"{name}: {new.shape} in the model, {old.shape} in the reference")
            error = np.asarray(_square_error(new, old), np.float64)
            squares += error
            output = None
            if name in moments:
                second = moments.pop(name).second
                output = _ratio(np.asarray(_output_error(new, old, second), np.float64))
                outputs.append(output)
            out[name] = dataclasses.replace(
                layers[name], weight_error=_ratio(error), output_error=output
            )
    total = math.sqrt(sum(o * o for o in outputs) / len(outputs)) if outputs else None
    return out, _ratio(squares), total


def _ratio(squares: np.ndarray) -> float:
    """sqrt(error / reference) of two sums of squares."""
    return math.sqrt(max(squares[0], 0.0) / squares[1]) if squares[1] > 0 else 0.0


@jax.jit
def _square_error(new: Array, old: Array) -> Array:
    return jnp.stack([jnp.sum(jnp.square(new - old)), jnp.sum(jnp.square(old))])


@jax.jit
def _output_error(new: Array, old: Array, second: Array) -> Array:
    """trace(D S D^T) of the error and of the weight: mean squares of the outputs."""

    def mean_square(matrix: Array) -> Array:
        through = jnp.matmul(matrix, second, precision=jax.lax.Precision.HIGHEST)
        return jnp.sum(through * matrix)

    return jnp.stack([mean_square(new - old), mean_square(old)])


@dataclasses.dataclass(frozen=True)
class _Scores:
    perplexity: float | None = None
    reference_perplexity: float | None = None
    kl: float | None = None
    agreement: float | None = None
    tokens: int = 0


@functools.partial(nnx.jit, static_argnums=0)
def _score(
    forward: Forward, model: nnx.Module, reference: nnx.Module | None, tokens: Array
) -> Array:
    """Sums over positions: loss, loss of the reference, divergence, agreement; float32 [4]."""
    logits = forward(model, tokens)
    loss = next_token_losses(logits, tokens).sum()
    if reference is None:
        zero = jnp.zeros((), jnp.float32)
        return jnp.stack([loss, zero, zero, zero])
    expected = forward(reference, tokens)
    agree = jnp.argmax(logits[:, :-1], -1) == jnp.argmax(expected[:, :-1], -1)
    return jnp.stack(
        [
            loss,
            next_token_losses(expected, tokens).sum(),
            kl_divergences(expected[:, :-1], logits[:, :-1]).sum(),
            agree.astype(jnp.float32).sum(),
        ]
    )


def _score_all(model, reference, batches, forward) -> _Scores:
    logits = nnx.eval_shape(forward, model, batches[0])
    highest = max(int(batch.max()) for batch in batches)
    if logits.ndim != 3 or logits.shape[:2] != batches[0].shape:
        raise ValueError(
            f"forward must return logits [B, T, V] for {batches[0].shape}, got {logits.shape}"
        )
    if highest >= logits.shape[-1]:
        raise ValueError(f"token {highest} is outside of the model's {logits.shape[-1]} tokens")
    sums, count = np.zeros(4), 0
    for batch in batches:
        sums += np.asarray(_score(forward, model, reference, batch), np.float64)
        count += batch.shape[0] * (batch.shape[1] - 1)
    loss, expected, kl, agreement = sums / count
    if reference is None:
        return _Scores(math.exp(loss), tokens=count)
    return _Scores(math.exp(loss), math.exp(expected), kl, agreement, count)
