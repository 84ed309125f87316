"""Whole models are calibrated: statistics of their layers, options, bad data by name."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from flax import nnx

import fdk_jax
from fdk_jax.learning.calibration import calibrate
from fdk_jax.learning.evaluation import evaluate
from fdk_jax.learning.statistics import (
    CalibrationWarning,
    linear_layers,
    second_moments,
    squared_gradients,
)
from fdk_jax.models.config import ModelConfig
from fdk_jax.models.transformer import Transformer


class Toy(nnx.Module):
    """A Linear, a LinearGeneral over two axes, and a Linear that is used twice."""

    def __init__(self, rngs):
        self.first = nnx.Linear(12, 20, rngs=rngs)
        self.general = nnx.LinearGeneral((4, 5), (3, 4), axis=(-2, -1), rngs=rngs)
        self.again = nnx.Linear(12, 12, rngs=rngs)
        self.inputs = None

    def __call__(self, x):
        a = jax.jit(lambda layer, x: layer(x), static_argnums=())(self.first, x)
        b = self.general(a.reshape(*a.shape[:-1], 4, 5)).reshape(*a.shape[:-1], 12)
        return self.again(nnx.relu(self.again(b)))


def test_second_moments_are_those_of_the_inputs(rng):
    model = Toy(nnx.Rngs(0))
    batches = [rng.standard_normal((6, 7, 12)).astype(np.float32) for _ in range(3)]
    got = second_moments(model, [jnp.asarray(b) for b in batches], ["first", "general", "again"])
    x = np.concatenate(batches).reshape(-1, 12).astype(np.float64)
    a = np.asarray(model.first(jnp.asarray(x, jnp.float32)))
    b = np.asarray(model.general(a.reshape(-1, 4, 5))).reshape(-1, 12)
    c = np.concatenate([b, np.maximum(np.asarray(model.again(jnp.asarray(b))), 0)])
    for name, inputs in {"first": x, "general": a, "again": c}.items():
        assert got[name].tokens == len(inputs)
        assert oracle.relative_rms(got[name].second, inputs.T @ inputs / len(inputs)) < 1e-5
        assert np.allclose(got[name].diagonal, np.mean(inputs**2, 0), rtol=1e-4)


def test_squared_gradients_are_averaged_over_sequences(rng):
    model = Toy(nnx.Rngs(0))
    x = rng.standard_normal((5, 2, 12)).astype(np.float32)
    got = squared_gradients(
        model, [jnp.asarray(x[:2]), jnp.asarray(x[2:])], ["first"], loss=squares
    )["first"]
    expected = 0
    for row in x:
        gradient = nnx.grad(squares)(model, jnp.asarray(row[None])).first.kernel[...]
        expected = expected + np.asarray(gradient, np.float64) ** 2 / len(x)
    assert oracle.relative_rms(got, expected) < 1e-4


def squares(model, x):
    return jnp.mean(jnp.square(model(x)))


def stacked_model(rngs):
    @nnx.vmap(in_axes=0, out_axes=0)
    def make(key):
        return nnx.Linear(8, 8, rngs=nnx.Rngs(key))

    class Stack(nnx.Module):
        def __init__(self):
            self.layers = make(jax.random.split(rngs.params(), 3))

        def __call__(self, x):
            @nnx.scan(in_axes=(0, nnx.Carry), out_axes=nnx.Carry)
            def run(layer, x):
                return nnx.relu(layer(x)) + x

            return run(self.layers, x)

    return Stack()


def test_layers_under_scan(rng):
    model = stacked_model(nnx.Rngs(0))
    x = jnp.asarray(rng.standard_normal((32, 8)), jnp.float32)
    got = second_moments(model, [x], ["layers"])["layers"]
    assert got.second.shape == (3, 8, 8) and got.tokens == 32
    kernel, bias, a = (
        *(np.asarray(p[...], np.float64) for p in (model.layers.kernel, model.layers.bias)),
        x,
    )
    for i in range(3):
        a = np.asarray(a, np.float64)
        assert oracle.relative_rms(got.second[i], a.T @ a / 32) < 1e-4
        a = np.maximum(a @ kernel[i] + bias[i], 0) + a
    quantised = calibrate(model, 4, [x], group_size=8, scale="auto")
    assert oracle.relative_rms(quantised(x), np.asarray(model(x))) < 0.2


@pytest.fixture(scope="module")
def llama():
    config = ModelConfig(32, 64, 64, 1, 2, 2, 32, dtype="float32")
    return Transformer(config, rngs=nnx.Rngs(0))


@pytest.fixture(scope="module")
def tokens():
    # Never used by the last token: every layer still sees every input.
    return [
        jnp.asarray(np.random.default_rng(i).integers(0, 32, (8, 24)), jnp.int32) for i in range(2)
    ]


@pytest.mark.parametrize(
    "options",
    [
        {},
        dict(share="kind", importance="fisher", layers_at_a_time=1),
        dict(share="model", rounding="nearest", scale="auto"),
        dict(codebook="ternary", importance="none"),
    ],
)
def test_calibrate_is_deterministic_and_leaves_the_model_alone(options, llama, tokens):
    before = jax.tree.map(np.asarray, nnx.state(llama))
    first, second = (calibrate(llama, 2, tokens, dtype=jnp.bfloat16, **options) for _ in range(2))
    arrays = [jax.tree.leaves(nnx.state(m)) for m in (first, second)]
    assert all((np.asarray(a) == np.asarray(b)).all() for a, b in zip(*arrays, strict=True))
    after = jax.tree.map(np.asarray, nnx.state(llama))
    assert all(map(np.array_equal, jax.tree.leaves(before), jax.tree.leaves(after)))
    summary = fdk_jax.summary(first)
    assert len(summary.quantised) == 4 and any("lm_head" in name for name in summary.kept)
    plain = fdk_jax.quantise(llama, 2, dtype=jnp.bfloat16)
    wanted = np.asarray(llama(tokens[0]))
    error = [oracle.relative_rms(m(tokens[0]), wanted) for m in (first, plain)]
    assert error[0] < error[1] * (1.1 if options.get("codebook") == "ternary" else 1)
    codebooks = {np.asarray(leaf).tobytes() for leaf in codebooks_of(first)}
    assert len(codebooks) == {"kind": 4, "model": 1}.get(
        options.get("share"), 1 if "codebook" in options else 4
    )


def codebooks_of(model):
    found = []
    for _, module in nnx.iter_modules(model):
        if isinstance(module, fdk_jax.QuantisedLinear):
            found.append(module.weight.get_value().codebook)
    return found


def test_calibrate_without_data_and_in_place(llama, tokens, capsys):
    model = nnx.clone(llama)
    same = calibrate(model, 4, in_place=True, progress=True)
    assert same is model and len(fdk_jax.summary(model).quantised) == 4
    assert "calibrate" in capsys.readouterr().err
    plain = fdk_jax.quantise(llama, 4)
    error = [evaluate(m, llama).weight_error for m in (model, plain)]
    assert error[0] < 0.95 * error[1]
    assert oracle.relative_rms(model(tokens[0]), np.asarray(llama(tokens[0]))) < 0.5


def test_linear_layers_by_name(llama):
    names = list(linear_layers(llama, lambda name: "mlp" in name))
    assert len(names) == 3 and "layers.0.attention.qkv" in names and "lm_head" in names


class Gate(nnx.Module):
    """A layer after a mask of its inputs, and one that is never called."""

    def __init__(self, mask):
        self.mask = tuple(mask)
        self.open = nnx.Linear(4, 4, rngs=nnx.Rngs(0))
        self.idle = nnx.Linear(4, 4, rngs=nnx.Rngs(1))

    def __call__(self, x):
        return self.open(x * jnp.asarray(self.mask, jnp.float32)[None])


def test_bad_data_is_told_by_layer(rng):
    x = jnp.asarray(rng.standard_normal((16, 4)), jnp.float32)
    model = Gate([1, 1, 1, 1])
    skip = "idle"
    with pytest.raises(ValueError, match=r"^idle: no calibration data reaches"):
        calibrate(model, 4, [x])
    with pytest.raises(ValueError, match=r"open: .*NaN or inf"):
        calibrate(Gate([1, np.inf, 1, 1]), 4, [x], skip=skip)
    with pytest.raises(ValueError, match=r"batch 1 .*NaN"):
        calibrate(model, 4, [x, x.at[0, 0].set(jnp.nan)], skip=skip)
    with pytest.raises(ValueError, match=r"open: .*\(16, 3\).*4 features"):
        calibrate(Gate([1, 1, 1]), 4, [x[:, :3]], skip=skip)
    with pytest.raises(ValueError, match=r"open: all inputs are zero"):
        calibrate(Gate([0, 0, 0, 0]), 4, [x], skip=skip)
    with pytest.raises(ValueError, match=r"open: .*gradients"):
        loss = lambda model, x: jnp.sum(jnp.sqrt(model(x) * 0))  # noqa: E731
        calibrate(model, 4, [x], skip=skip, importance="fisher", loss=loss)
    with pytest.raises(ValueError, match="batches is empty"):
        calibrate(model, 4, [])
    with pytest.raises(TypeError, match="generator"):
        calibrate(model, 4, (b for b in [x]), skip=skip)
    with pytest.warns(CalibrationWarning, match="open: 2 of 4 inputs are zero"):
        calibrate(Gate([1, 0, 1, 0]), 4, [x], skip=skip)
    with pytest.warns(CalibrationWarning, match="open: 3 tokens .* few for 4"):
        calibrate(model, 4, [x[:3]], skip=skip)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        calibrate(model, 4, [x], skip=skip)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (dict(bits=3), "bits=3"),
        (dict(scale="max"), "scale='max'"),
        (dict(share="all"), "share='all'"),
        (dict(importance="hessian"), "importance='hessian'"),
        (dict(importance="fisher"), "give batches"),
        (dict(rounding="corrected"), "give batches"),
        (dict(rounding="up"), "rounding='up'"),
        (dict(damping=0), "damping=0"),
        (dict(sweeps=-1), "sweeps=-1"),
        (dict(layers_at_a_time=0), "layers_at_a_time=0"),
        (dict(codebook="nf4", bits=2), "bits=4"),
    ],
)
def test_bad_options_name_the_value(options, words, llama):
    with pytest.raises(ValueError, match=words):
        calibrate(llama, **options)
