"""Every format on one trained model: rows, and the table of them."""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax.numpy as jnp
from flax import nnx

from fdk_jax.format import codebooks
from fdk_jax.format.quantisation import scaled
from fdk_jax.layers.trees import quantise
from fdk_jax.learning import training
from fdk_jax.learning.calibration import calibrate
from fdk_jax.learning.evaluation import evaluate
from fdk_jax.learning.statistics import linear_layers
from fdk_jax.quality.language_model import Data, Recipe, tune

BITS = (8, 4, 2, 1)
_GROUP = 64
_DTYPE = jnp.bfloat16
# Of the peak learning rate of the training from scratch.
_TUNING_RATE = 1 / 3
_REFRESH_EVERY = 25

METHODS = {
    "uniform": "uniform",
    "nf4": "NF4",
    "fp4": "FP4",
    "ternary": "ternary",
    "normal": "cube root",
    "kmeans": "k-means",
    "weighted": "weighted k-means, scale search",
    "corrected": "+ error correction",
    "qat": "+ QAT",
}
VARIANTS = {
    "corrected": "as above",
    "fisher": "importance by squared gradients",
    "shared": "one codebook for the model",
    "sequential": "one layer at a time",
}


def rows(
    model: nnx.Module, recipe: Recipe, data: Data, note: Callable[[str], None]
) -> Iterator[dict[str, Any]]:
    """One row for each format: its quality on the test text; and "curve" for those that trained.

    Args:
        model: the trained model, its weights on the grid of bfloat16.
        recipe: of the model.
        data: of the model.
        note: called with a word on what comes next.
    """

    def row(bits: float, method: str, quantised: nnx.Module, **extra: Any) -> dict[str, Any]:
        report = evaluate(quantised, model, data.test, batch_size=32)
        return {
            "name": f"{bits}-{method}",
            "bits": bits,
            "method": method,
            "group_size": _GROUP,
            "bytes_per_weight": report.bytes_per_weight or _DTYPE.dtype.itemsize,
            "perplexity": report.perplexity,
            "kl": report.kl,
            "agreement": report.agreement,
            "weight_error": report.weight_error,
            "output_error": report.output_error,
            **extra,
        }

    yield row(16, "reference", model)
    for bits in BITS:
        for method, make in post_training(model, data, bits).items():
            note(f"{bits} bits, {method}")
            yield row(bits, method, make())
    note("3 bits in codes of 4")
    yield row(3, "corrected", _eight_levels(model, data))
    for bits in (*BITS, 16):
        note(f"{bits} bits, training")
        tuned, curve = train_through(model, recipe, data, bits)
        yield row(bits, "qat", tuned, curve=curve)


def post_training(model: nnx.Module, data: Data, bits: int) -> dict[str, Callable[[], nnx.Module]]:
    """Ways to quantise a trained model at a width, by name."""
    calibration = [jnp.asarray(batch) for batch in data.calibration]
    options: dict[str, Any] = dict(group_size=_GROUP, dtype=_DTYPE)
    special = {4: ("nf4", "fp4"), 2: ("ternary",)}.get(bits, ())

    def plain(name: str) -> Callable[[], nnx.Module]:
        return lambda: quantise(model, bits, codebook=name, **options)

    ways = {name: plain(name) for name in ("uniform", *special, "normal", "kmeans")}
    # Error correction alone: what the sweeps after it add is shown on real networks.
    calibrated: dict[str, dict[str, Any]] = {
        "weighted": dict(rounding="nearest"),
        "corrected": {},
    }
    if bits <= 4:
        calibrated |= {
            "fisher": dict(importance="fisher"),
            "shared": dict(share="model"),
            "sequential": dict(layers_at_a_time=1),
        }
    for name, more in calibrated.items():
        ways[name] = functools.partial(
            calibrate, model, bits, calibration, sweeps=0, **options, **more
        )
    return ways


def _eight_levels(model: nnx.Module, data: Data) -> nnx.Module:
    """What 3-bit codes could do: 8 fitted levels, held in 4-bit codes."""

    def quotients(linear: Any) -> Callable[[], tuple[Any, None]]:
        kernel = linear.layer.kernel.get_value().T.astype(_DTYPE)
        return lambda: (scaled(kernel, _GROUP, "absmax")[0], None)

    layers = linear_layers(model, lambda name: name == "lm_head")
    levels = codebooks.fit_parts([quotients(linear) for linear in layers.values()], 8)
    calibration = [jnp.asarray(batch) for batch in data.calibration]
    return calibrate(
        model, 4, calibration, codebook=levels, group_size=_GROUP, dtype=_DTYPE, sweeps=0
    )


def train_through(
    model: nnx.Module, recipe: Recipe, data: Data, bits: int
) -> tuple[nnx.Module, list[float]]:
    """Tunes a copy of a model through k-means quantisation; 16 bits: as it is, for comparison.

    Returns:
        The exported model, and the training loss of each step in nats a character.
    """
    curve: list[float] = []
    tuned = nnx.clone(model)
    if bits < 16:
        tuned = training.quantisation_aware(
            tuned, bits, codebook="kmeans", group_size=_GROUP, dtype=_DTYPE
        )
    tune(
        tuned,
        recipe,
        data,
        first=recipe.steps,
        steps=recipe.tuning_steps,
        peak=recipe.learning_rate * _TUNING_RATE,
        refresh_every=_REFRESH_EVERY,
        watch=lambda _, value: curve.append(round(value, 4)),
    )
    return training.export(tuned), curve


def markdown(found: list[dict[str, Any]], methods: dict[str, str]) -> str:
    """A table of perplexity (KL divergence in nats) by bits and method."""
    cells = {(row["bits"], row["method"]): row for row in found if row["method"] in methods}
    by_bits = {row["bits"]: row["bytes_per_weight"] for row in cells.values()}
    lines = ["| bits | bytes a weight | " + " | ".join(methods.values()) + " |"]
    lines.append("|---" * (len(methods) + 2) + "|")
    for bits in (8, 4, 3, 2, 1):
        if bits not in by_bits:
            continue
        texts = []
        for method in methods:
            row = cells.get((bits, method))
            texts.append("" if row is None else f"{row['perplexity']:.3f} ({row['kl']:.3f})")
        lines.append(f"| {bits} | {by_bits[bits]:.3f} | " + " | ".join(texts) + " |")
    return "\n".join(lines)
