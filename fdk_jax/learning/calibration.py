"""`calibrate`: codebooks, scales and codes chosen for the error that they cause on a user's own data."""

from __future__ import annotations

import contextlib
import dataclasses
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array
from rich.console import Console
from rich.progress import Progress

from fdk_jax.format.quantisation import as_matrix
from fdk_jax.format.quantised_tensor import QuantisedTensor
from fdk_jax.layers.linear import QuantisedLinear
from fdk_jax.layers.rules import SKIP
from fdk_jax.layers.surgery import from_flax, replace_layers
from fdk_jax.learning import statistics
from fdk_jax.learning.fitting import (
    ROUNDINGS,
    Format,
    Matrix,
    calibrate_array,
    fit,
    importance_matrix,
    usable,
)
from fdk_jax.learning.statistics import Forward, LinearLayer, default_forward

SHARES = ("tensor", "kind", "model")
IMPORTANCES = ("auto", "activations", "fisher", "none")


def calibrate(
    model: nnx.Module,
    bits: int = 4,
    batches: Iterable[Any] | None = None,
    *,
    group_size: int = 64,
    codebook: Any = "kmeans",
    share: str = "tensor",
    scale: str = "search",
    importance: str = "auto",
    rounding: str = "auto",
    damping: float = 0.05,
    sweeps: int = 3,
    learn: bool | str = False,
    skip: str | None = SKIP,
    dtype: Any = None,
    forward: Forward = default_forward,
    loss: Callable[[nnx.Module, Any], Array] = statistics.default_loss,
    layers_at_a_time: int | None = None,
    in_place: bool = False,
    progress: bool | None = None,
    seed: int = 0,
) -> nnx.Module:
    """Quantises the Linears of an nnx model with codebooks, scales and codes fitted to calibration data.

    Layers are treated in runs: the statistics of a run are collected on the model as it is by then
    (earlier layers quantised), its layers are quantised one after another, and the statistics are dropped.
    The same arguments give the same bits on a CPU; on a GPU fitted levels may differ in their last ones.

    Args:
        model: an nnx model with `nnx.Linear`s or `nnx.LinearGeneral`s.
        bits: 1, 2, 4 or 8.
        batches: calibration data that can be gone through several times (a list, not a generator): what
            `forward` takes, e.g. int [B, T] of tokens. A few hundred sequences are plenty. None: without data.
        group_size: weights along K that share a scale.
        codebook: see `fdk_jax.quantise`; "kmeans", which "auto" stands for here, is fitted with the importance.
        share: who shares a fitted codebook: "tensor" (no one), "kind" (layers with the same last name, such
            as all "down") or "model" (all layers).
        scale: "search" (least weighted error of each group) or a rule of `fdk_jax.quantise`.
        importance: how much an error of a weight matters: "activations" (the mean square of its input),
            "fisher" (its mean squared gradient of `loss`), "none", or "auto": activations if there is data.
        rounding: "corrected" (GPTQ, with second moments of the activations), "nearest", or "auto": corrected
            if there is data.
        damping: part of the mean of the second moments' diagonal that is added to the diagonal; more
            guards against too little data.
        sweeps: see `calibrate_array`.
        learn: True learns each layer's scales and levels for the error of its outputs, once its codes are
            chosen; "scales" leaves the levels; see `calibrate_array`. Needs data, and True `share="tensor"`.
        skip: regular expression, searched in the dotted name; None skips nothing.
        dtype: compute dtype of the weights; None keeps their own.
        forward: maps (model, batch) to float arrays that depend on the layers.
        loss: maps (model, batch of one sequence) to a scalar; for "fisher".
        layers_at_a_time: layers in a run, in the order in which `forward` calls them; None for as many as
            fit their statistics into 1 GiB. Fewer layers see more of the errors before them, at the price of
            more passes over the data; docs/quality.md measures what that brings.
        in_place: changes `model` itself, so that each float weight is freed once it is quantised.
        progress: shows a bar on standard error; None if that is a terminal.
        seed: of the k-means.

    Returns:
        The model with `QuantisedLinear`s: a new one, or `model` if `in_place`.

    Raises:
        ValueError: an argument out of range; or data that is empty, not finite, or never reaches a layer
            (which is named).

    Warns:
        CalibrationWarning: names the layers that have dead inputs or too little data.
    """
    form = Format(bits, group_size, codebook, scale, damping, sweeps, seed, rounding, learn)
    form.check()
    importance, rounding = _resolve(importance, rounding, share, batches)
    if learn and batches is None:
        raise ValueError(f"{learn=} needs calibration data: give batches")
    if learn is True and share != "tensor":
        raise ValueError(
            f"{learn=} gives each layer levels of its own, which {share=} shares: take learn='scales'"
        )
    layers = statistics.linear_layers(model, lambda name: bool(skip and re.search(skip, name)))
    if not layers:
        raise TypeError("the model has no nnx.Linear or nnx.LinearGeneral that is not skipped")
    if batches is not None and iter(batches) is batches:
        raise TypeError("batches is gone through several times: give a list, not a generator")
    if batches is not None:
        first = next(iter(batches), None)
        if first is None:
            raise ValueError("there is no calibration data: batches is empty")
        layers = statistics.in_call_order(model, layers, first, forward)
    form = dataclasses.replace(form, rounding=rounding)
    run = _Run(form, batches, importance, forward, loss, dtype)
    shared = _shared_codebooks(model, layers, run, share, layers_at_a_time)
    model = model if in_place else nnx.clone(model)
    with progress_bar(progress, len(layers)) as advance:
        for names in statistics.chunks(
            layers, run.needs_moments or importance == "fisher", layers_at_a_time
        ):
            data = run.collect(model, names)
            for name in names:
                _replace(model, name, data.pop(name, {}), run, shared.get(_key(name, share)))
                layers.pop(name)
                advance(name)
    return model


def _resolve(importance: str, rounding: str, share: str, batches: Any) -> tuple[str, str]:
    for name, value, allowed in (
        ("importance", importance, IMPORTANCES),
        ("rounding", rounding, ROUNDINGS),
        ("share", share, SHARES),
    ):
        if value not in allowed:
            raise ValueError(f"{name}={value!r} is not one of {allowed}")
    if batches is None and (importance in ("activations", "fisher") or rounding == "corrected"):
        raise ValueError(f"{importance=} and {rounding=} need calibration data: give batches")
    if importance == "auto":
        importance = "none" if batches is None else "activations"
    if rounding == "auto":
        rounding = "nearest" if batches is None else "corrected"
    return importance, rounding


@dataclasses.dataclass(frozen=True)
class _Run:
    """One call of `calibrate`."""

    form: Format
    batches: Any
    importance: str
    forward: Forward
    loss: Callable[[nnx.Module, Any], Array]
    dtype: Any

    @property
    def needs_moments(self) -> bool:
        """Whether second moments are needed as a whole, not their diagonal alone."""
        return self.form.rounding == "corrected" or bool(self.form.learn)

    def collect(self, model: nnx.Module, names: list[str], *, full: bool = True) -> dict[str, dict]:
        """Arguments of `calibrate_array` for layers: "importance" and "second_moment"."""
        out: dict[str, dict] = {name: {} for name in names}
        full = full and self.needs_moments
        if full or self.importance == "activations":
            moments = statistics.second_moments(
                model, self.batches, names, forward=self.forward, full=full
            )
            for name, found in moments.items():
                if full:
                    out[name]["second_moment"] = found.second
                uses = self.importance == "activations"
                out[name]["importance"] = found.diagonal if uses else jnp.ones_like(found.diagonal)
        if self.importance == "fisher":
            squares = statistics.squared_gradients(model, self.batches, names, loss=self.loss)
            for name, found in squares.items():
                out[name]["importance"] = found
        return out


def _key(name: str, share: str) -> str:
    return {"tensor": name, "kind": name.rsplit(".", 1)[-1], "model": ""}[share]


def _shared_codebooks(
    model: nnx.Module,
    layers: dict[str, LinearLayer],
    run: _Run,
    share: str,
    layers_at_a_time: int | None,
) -> dict[str, Array]:
    """float32 [2**bits] for each name that `_key` gives; none if layers share nothing."""
    if share == "tensor" or not run.form.fitted:
        return {}
    importance: dict[str, Any] = {}
    for names in statistics.chunks(layers, run.importance == "fisher", layers_at_a_time):
        found = run.collect(model, names, full=False)
        importance |= {name: found[name].get("importance") for name in names}

    def matrix(name: str, index: tuple[int, ...]) -> Callable[[], Matrix]:
        def get() -> Matrix:
            linear = layers[name]
            weight = as_matrix(linear.layer.kernel.get_value(), linear.axes, run.dtype)[0]
            h = importance[name]
            h = None if h is None else importance_matrix(h, weight, linear.axes)[index]
            return Matrix(weight[index], usable(h))

        return get

    groups: dict[str, list[Callable[[], Matrix]]] = {}
    for name, linear in layers.items():
        for index in np.ndindex(*linear.lead):
            groups.setdefault(_key(name, share), []).append(matrix(name, index))
    return {key: fit(group, run.form)[0] for key, group in groups.items()}


def _replace(model: nnx.Module, name: str, data: dict, run: _Run, levels: Array | None) -> None:
    """Puts the quantised twin in the place of one layer of `model`."""
    form = run.form

    def quantise(kernel: Array, axes: str) -> QuantisedTensor:
        return calibrate_array(
            kernel,
            form.bits,
            group_size=form.group_size,
            codebook=form.codebook if levels is None else levels,
            scale=form.scale,
            axes=axes,
            dtype=run.dtype,
            rounding=form.rounding,
            damping=form.damping,
            sweeps=form.sweeps,
            learn=form.learn,
            seed=form.seed,
            **data,
        )

    def swap(here: str, layer: nnx.Module) -> QuantisedLinear | None:
        if here != name:
            return None
        try:
            return from_flax(layer, quantise)
        except (TypeError, ValueError) as error:
            raise type(error)(f"{name}: {error}") from error

    replace_layers(model, swap, in_place=True)


@contextlib.contextmanager
def progress_bar(progress: bool | None, total: int) -> Iterator[Callable[[str], None]]:
    """A progress bar on standard error, advanced by the name of each finished layer."""
    shown = sys.stderr.isatty() if progress is None else progress
    if not shown:
        yield lambda name: None
        return
    with Progress(console=Console(stderr=True)) as bar:
        task = bar.add_task("calibrate", total=total)
        yield lambda name: bar.update(task, advance=1, description=f"calibrate: {name}")
