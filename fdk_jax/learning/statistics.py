"""What calibration data says about a model's linear layers: second moments of inputs, squared gradients.

The inputs of a layer are recorded through a gradient: a recorder returns its input unchanged, and its rule of
differentiation gives "the gradient" of an array of zeros as the sum of x x^T. So the statistics come out of a
pure function, through jit, scan, vmap and nested calls alike; XLA drops the rest of the backward pass, whose
result nobody reads.
"""

import functools
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from fdk_jax.layers.surgery import axes_of, plain_linear, replace_layers
from fdk_jax.learning import compiling
from fdk_jax.learning.losses import next_token_loss

Forward = Callable[[nnx.Module, Any], Any]


class CalibrationWarning(UserWarning):
    """Calibration data that can be used, but not as it should be."""


class Moments(NamedTuple):
    """Inputs of one layer over all tokens.

    Attributes:
        second: float32 [..., K, K], the mean of x x^T; or [..., K], its diagonal. Leading axes are those of
            stacked layers.
        tokens: number of inputs that were seen (the fewest of stacked layers).
        full: whether `second` is the whole matrix.
    """

    second: Array
    tokens: int
    full: bool

    @property
    def diagonal(self) -> Array:
        """float32 [..., K], the mean square of each input."""
        return jnp.diagonal(self.second, axis1=-2, axis2=-1) if self.full else self.second


class LinearLayer(NamedTuple):
    """A linear layer of an nnx model: the orientation of its kernel and what its input looks like.

    Attributes:
        layer: `nnx.Linear` or `nnx.LinearGeneral`.
        axes: see `QuantisedTensor`.
        lead: leading axes of stacked layers.
        in_features: K.
        inputs: the axes of the input that are contracted.
    """

    layer: Any
    axes: str
    lead: tuple[int, ...]
    in_features: int
    inputs: tuple[int, ...]


def linear_layers(model: nnx.Module, skip: Callable[[str], bool]) -> dict[str, LinearLayer]:
    """The layers of a model that compute as `nnx.Linear`s do, by dotted name, shared ones once."""
    found: dict[str, LinearLayer] = {}

    def look(name: str, layer: nnx.Module) -> None:
        plain = None if skip(name) else plain_linear(layer)
        if plain is None:
            return
        shape, axes = plain.kernel.get_value().shape, axes_of(layer)["kernel"]
        axis = getattr(layer, "axis", -1)
        inputs = (axis,) if isinstance(axis, int) else tuple(axis)
        lead = len(shape) - len(axes)
        k = int(np.prod(shape[lead : lead + axes.count("k")]))
        found[name] = LinearLayer(layer, axes, shape[:lead], k, inputs)

    replace_layers(model, look, in_place=True)
    return found


class _Tap(nnx.Variable):
    """Zeros whose gradient is a statistic."""


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _record(inputs: tuple[int, ...], full: bool, x: Array, second: Array, tokens: Array) -> Array:
    return x


def _record_forward(inputs, full, x, second, tokens):
    return x, x


def _record_backward(inputs, full, x, g):
    x = jnp.moveaxis(x, inputs, range(-len(inputs), 0)).astype(jnp.float32)
    rows = x.reshape(-1, int(np.prod(x.shape[x.ndim - len(inputs) :])))
    if full:
        second = jnp.matmul(rows.T, rows, precision=jax.lax.Precision.HIGHEST)
    else:
        second = jnp.sum(rows * rows, axis=0)
    return g, second, jnp.float32(rows.shape[0])


_record.defvjp(_record_forward, _record_backward)


class _Wrapped(nnx.Module):
    """A linear layer that something is to be learned about; checks its inputs."""

    def __init__(self, name: str, linear: LinearLayer):
        self.name, self.inputs, self.in_features = name, linear.inputs, linear.in_features
        self.layer = linear.layer

    def check(self, x: Array) -> None:
        sizes = [x.shape[a] for a in self.inputs if -x.ndim <= a < x.ndim]
        if len(sizes) < len(self.inputs) or np.prod(sizes) != self.in_features:
            raise ValueError(
                f"{self.name}: the calibration data reaches this layer as {x.shape}, where"
                f" axes {self.inputs} must hold {self.in_features} features"
            )


class _Recorder(_Wrapped):
    """Records second moments of the inputs."""

    def __init__(self, name: str, linear: LinearLayer, full: bool):
        super().__init__(name, linear)
        self.full, k = full, linear.in_features
        self.second = _Tap(jnp.zeros((*linear.lead, *((k, k) if full else (k,))), jnp.float32))
        self.tokens = _Tap(jnp.zeros(linear.lead, jnp.float32))

    def __call__(self, x: Array, *args: Any, **kwargs: Any) -> Array:
        self.check(x)
        second, tokens = self.second.get_value(), self.tokens.get_value()
        return self.layer(_record(self.inputs, self.full, x, second, tokens), *args, **kwargs)


class _Order:
    """Names in the order of calls; an object of its own to jit."""

    def __init__(self):
        self.names: list[str] = []


class _Noter(_Wrapped):
    """Notes when it is traced."""

    def __init__(self, name: str, linear: LinearLayer, order: _Order):
        super().__init__(name, linear)
        self.order = order

    def __call__(self, x: Array, *args: Any, **kwargs: Any) -> Array:
        self.check(x)
        self.order.names.append(self.name)
        return self.layer(x, *args, **kwargs)


def default_forward(model: nnx.Module, batch: Any) -> Any:
    """`model(batch)`."""
    return model(batch)


def default_loss(model: nnx.Module, tokens: Array) -> Array:
    """Next-token cross-entropy of `model(tokens)`."""
    return next_token_loss(model(tokens), tokens)


def second_moments(
    model: nnx.Module,
    batches: Iterable[Any],
    names: Sequence[str],
    *,
    forward: Forward = default_forward,
    full: bool = True,
) -> dict[str, Moments]:
    """Second moments of the inputs of linear layers over calibration data.

    Args:
        model: an nnx model; it is not changed.
        batches: what `forward` takes, e.g. int arrays [B, T] of tokens; equal shapes compile once.
        names: dotted names of layers, as in `linear_layers`.
        forward: maps (model, batch) to any float arrays that depend on the layers.
        full: the matrix of x x^T; False for its diagonal alone.

    Returns:
        Moments by name.

    Raises:
        ValueError: no data; data that is not finite or never reaches a layer, which is named.
    """
    layers = linear_layers(model, lambda name: name not in names)
    if missing := [name for name in names if name not in layers]:
        raise ValueError(f"the model has no linear layers called {missing}")
    recording = replace_layers(
        model, lambda name, _: _Recorder(name, layers[name], full) if name in layers else None
    )
    graph, taps, rest = nnx.split(recording, _Tap, ...)
    total, count = taps, {}
    for index, batch in enumerate(batches):
        _check_batch(batch, index)
        total = _with_batch(forward, graph, total, rest, batch)
        new = {name: _at(total, name, "tokens") for name in layers}
        count = {name: count.get(name, 0) + np.asarray(new[name]).astype(int) for name in layers}
    if not count:
        raise ValueError("there is no calibration data: batches is empty")
    return {name: _moments(name, _at(total, name, "second"), count[name]) for name in layers}


@functools.partial(
    jax.jit, static_argnums=(0, 1), donate_argnums=2, compiler_options=compiling.OPTIONS
)
def _with_batch(forward: Forward, graph: Any, total: Any, rest: Any, batch: Any) -> Any:
    """Adds what the taps record of one batch to the sums of second moments; the tokens are the batch's own.

    In one program, so that the sums exist once. The taps themselves are zeros that nothing is computed from.
    """

    def run(taps: Any) -> Any:
        return forward(nnx.merge(graph, taps, rest, copy=True), batch)

    out, pull = jax.vjp(run, jax.tree.map(jnp.zeros_like, total))
    (found,) = pull(jax.tree.map(_zeros, out))
    return jax.tree_util.tree_map_with_path(
        lambda path, old, new: new if _is_count(path) else old + new, total, found
    )


def _is_count(path: tuple) -> bool:
    """Whether a path of a state leads to the tokens of a recorder."""
    names = [key for part in path if isinstance(key := getattr(part, "key", None), str)]
    return names[-1] == "tokens"


@functools.partial(jax.jit, donate_argnums=0)
def _add(total: Any, part: Any) -> Any:
    return jax.tree.map(jnp.add, total, part)


def _zeros(leaf: Array) -> Any:
    """A cotangent of zeros."""
    if jnp.issubdtype(leaf.dtype, jnp.floating):
        return jnp.zeros_like(leaf)
    return np.zeros(leaf.shape, jax.dtypes.float0)


def _at(state: Any, name: str, leaf: str) -> Array:
    for path, variable in nnx.to_flat_state(state):
        if ".".join(map(str, path)) == f"{name}.{leaf}" if name else path == (leaf,):
            return variable.get_value() if isinstance(variable, nnx.Variable) else variable
    raise ValueError(f"{name}: the layer is shared under another name; calibrate it under that one")


def _check_batch(batch: Any, index: int) -> None:
    for leaf in jax.tree.leaves(batch):
        if not hasattr(leaf, "dtype"):
            raise TypeError(f"calibration batch {index} holds {type(leaf).__name__}, not arrays")
        if jnp.issubdtype(leaf.dtype, jnp.floating) and not bool(jnp.isfinite(leaf).all()):
            raise ValueError(f"calibration batch {index} of {leaf.shape} holds NaN or infinity")


def _moments(name: str, total: Array, count: np.ndarray) -> Moments:
    """Means from sums, after the checks that need them."""
    tokens = int(count.min())
    if tokens == 0:
        raise ValueError(
            f"{name}: no calibration data reaches this layer; leave it out with skip, or give data that does"
        )
    full = total.ndim == count.ndim + 2
    per_layer = jnp.asarray(count, jnp.float32).reshape(*count.shape, *(1,) * (1 + full))
    moments = Moments(total / per_layer, tokens, full)
    diagonal = np.asarray(moments.diagonal)
    if not np.isfinite(diagonal).all():
        raise ValueError(f"{name}: the calibration data gives activations that are NaN or infinite")
    k, dead = diagonal.shape[-1], int((diagonal == 0).sum())
    if dead == diagonal.size:
        raise ValueError(f"{name}: all inputs are zero in the calibration data")
    if dead:
        warnings.warn(
            f"{name}: {dead} of {diagonal.size} inputs are zero in all {tokens} tokens of the calibration data;"
            " their weights are rounded to the nearest code",
            CalibrationWarning,
            stacklevel=4,
        )
    if tokens < k and full:
        warnings.warn(
            f"{name}: {tokens} tokens of calibration data are few for {k} inputs; give several times as many",
            CalibrationWarning,
            stacklevel=4,
        )
    return moments


def squared_gradients(
    model: nnx.Module,
    batches: Iterable[Any],
    names: Sequence[str],
    *,
    loss: Callable[[nnx.Module, Any], Array] = default_loss,
) -> dict[str, Array]:
    """Squared gradients of each weight, averaged over sequences: the diagonal of the empirical Fisher matrix.

    Args:
        model: an nnx model; it is not changed.
        batches: pytrees of arrays with the sequences along the first axis.
        names: dotted names of layers.
        loss: maps (model, batch of one sequence) to a scalar.

    Returns:
        float32 arrays of the kernels' shapes, by name.

    Raises:
        ValueError: no data, or gradients that are zero or not finite; the layer is named.
    """
    layers = linear_layers(model, lambda name: name not in names)

    def chosen(path: tuple, _: Any) -> bool:
        return path[-1] == "kernel" and ".".join(map(str, path[:-1])) in layers

    graph, kernels, rest = nnx.split(model, chosen, ...)

    total, sequences = None, 0
    for index, batch in enumerate(batches):
        _check_batch(batch, index)
        part = _squares(loss, graph, kernels, rest, batch)
        total = part if total is None else _add(total, part)
        sequences += len(jax.tree.leaves(batch)[0])
        jax.block_until_ready(total)
    if not sequences:
        raise ValueError("there is no calibration data: batches is empty")
    out = {name: _at(total, name, "kernel") / jnp.float32(sequences) for name in layers}
    for name, value in out.items():
        if not bool(jnp.isfinite(value).all()):
            raise ValueError(
                f"{name}: the loss on the calibration data has gradients that are not finite"
            )
        if not bool((value > 0).any()):
            raise ValueError(
                f"{name}: the loss on the calibration data does not depend on this layer"
            )
    return out


@functools.partial(jax.jit, static_argnums=(0, 1))
def _squares(loss: Callable, graph: Any, kernels: Any, rest: Any, batch: Any) -> Any:
    """Sums of squared gradients over the sequences of one batch."""

    def one(total: Any, sequence: Any) -> tuple[Any, None]:
        def run(kernels: Any) -> Array:
            merged = nnx.merge(graph, kernels, rest, copy=True)
            return loss(merged, jax.tree.map(lambda leaf: leaf[None], sequence))

        gradient = jax.grad(run)(kernels)
        add = lambda t, g: t + jnp.square(g.astype(t.dtype))  # noqa: E731
        return jax.tree.map(add, total, gradient), None

    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, jnp.float32), kernels)
    return jax.lax.scan(one, zeros, batch)[0]


def in_call_order(
    model: nnx.Module, layers: dict[str, LinearLayer], batch: Any, forward: Forward
) -> dict[str, LinearLayer]:
    """The same layers, in the order in which `forward` calls them; those it never calls come last."""
    order = _Order()
    noting = replace_layers(
        model, lambda name, _: _Noter(name, layers[name], order) if name in layers else None
    )
    nnx.eval_shape(forward, noting, batch)
    called = [name for name in dict.fromkeys(order.names) if name in layers]
    return {name: layers[name] for name in (*called, *layers)}


def chunks(
    layers: Mapping[str, LinearLayer], full: bool, layers_at_a_time: int | None, budget: int = 2**30
) -> list[list[str]]:
    """Runs of layer names whose statistics fit into `budget` bytes at the same time."""
    if layers_at_a_time is not None and layers_at_a_time < 1:
        raise ValueError(f"{layers_at_a_time=} must be at least 1, or None")
    out: list[list[str]] = []
    used = 0
    for name, linear in layers.items():
        k = linear.in_features
        size = 4 * int(np.prod(linear.lead, initial=1)) * k * (k if full else 1)
        enough = out and (
            len(out[-1]) >= layers_at_a_time if layers_at_a_time else used + size > budget
        )
        if not out or enough:
            out.append([])
            used = 0
        out[-1].append(name)
        used += size
    return out
