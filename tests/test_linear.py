"""Flax layers, module surgery, linen models on quantised parameters, and training around them."""

import pickle

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracle
import pytest
from backends import BACKENDS, running
from flax import nnx

import fdk_jax


class Net(nnx.Module):
    """Shared layers, a list, attention, an embedding and a head."""

    def __init__(self, rngs: nnx.Rngs):
        self.embed = nnx.Embed(11, 64, rngs=rngs)
        self.blocks = nnx.List([nnx.Linear(64, 64, rngs=rngs) for _ in range(2)])
        self.tied = self.blocks[0]
        self.attention = nnx.MultiHeadAttention(4, 64, decode=False, rngs=rngs)
        self.norm = nnx.LayerNorm(64, rngs=rngs)
        self.lm_head = nnx.Linear(64, 11, use_bias=False, rngs=rngs)

    def __call__(self, tokens):
        h = self.embed(tokens)
        for block in (*self.blocks, self.tied):
            h = h + nnx.relu(block(h))
        return self.lm_head(self.norm(h + self.attention(h)))


@pytest.fixture
def tokens(rng):
    return jnp.asarray(rng.integers(0, 11, (2, 6)), jnp.int32)


def test_module_surgery_agrees_with_dequantised_weights(tokens):
    net = Net(nnx.Rngs(0))
    before = net(tokens)
    quantised = fdk_jax.quantise(net, 4, group_size=32, codebook="kmeans")
    plain = fdk_jax.dequantise(quantised)
    assert isinstance(quantised.blocks[1], fdk_jax.QuantisedLinear)
    assert isinstance(quantised.attention.out, fdk_jax.QuantisedLinear)
    assert isinstance(quantised.lm_head, nnx.Linear) and isinstance(quantised.embed, nnx.Embed)
    assert quantised.tied is quantised.blocks[0] and plain.tied is plain.blocks[0]
    assert isinstance(plain.attention.out, nnx.LinearGeneral)
    expected = np.asarray(plain(tokens), np.float64)
    assert oracle.relative_rms(quantised(tokens), expected) < 1e-5
    assert oracle.relative_rms(jax.jit(lambda m, t: m(t))(quantised, tokens), expected) < 1e-5
    assert (net(tokens) == before).all() and isinstance(net.blocks[0], nnx.Linear)
    assert "6 quantised" in str(fdk_jax.summary(quantised))


@pytest.mark.parametrize("backend", BACKENDS)
def test_prepared_modules_run_on_each_backend(backend, tokens):
    quantised = fdk_jax.quantise(Net(nnx.Rngs(0)), 4, group_size=32)
    expected = np.asarray(quantised(tokens), np.float64)
    prepared = fdk_jax.prepare(quantised, backend)
    for path, layer in nnx.iter_graph(prepared):
        if isinstance(layer, fdk_jax.QuantisedLinear):
            layer.backend = backend
            assert layer.weight.get_value().layout != "interchange" or backend == "xla", path
    with running(backend):
        assert oracle.relative_rms(prepared(tokens), expected) < 1e-5


def test_a_root_linear_and_given_codebooks_reach_every_layer():
    levels = np.array([-1.0, -0.2, 0.3, 1.0], np.float32)
    layer = fdk_jax.quantise(nnx.Linear(64, 8, rngs=nnx.Rngs(0)), 2, codebook=levels)
    assert isinstance(layer, fdk_jax.QuantisedLinear)
    net = fdk_jax.quantise(Net(nnx.Rngs(0)), 2, codebook=levels)
    for _, node in nnx.iter_graph(net):
        if isinstance(node, fdk_jax.QuantisedLinear):
            assert np.asarray(node.weight.get_value().codebook).tolist() == levels.tolist()


def test_stacked_layers_under_nnx_scan():
    @nnx.vmap(in_axes=0, out_axes=0)
    def stack(key):
        return nnx.Linear(32, 32, rngs=nnx.Rngs(key))

    layers = stack(jax.random.split(jax.random.key(0), 3))
    quantised = fdk_jax.quantise(layers, 8, group_size=32)
    assert quantised.weight.get_value().batch_shape == (3,)
    scan = nnx.scan(lambda h, layer: layer(h), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
    x = jnp.ones((2, 32))
    expected = scan(x, fdk_jax.dequantise(quantised))
    assert oracle.relative_rms(scan(x, quantised), np.asarray(expected, np.float64)) < 1e-5


def test_layers_made_by_hand(rng):
    x = jnp.asarray(rng.standard_normal((3, 64)), jnp.float32)
    layer = fdk_jax.QuantisedLinear(64, 24, bits=2, rngs=nnx.Rngs(0))
    w = layer.weight.get_value()
    assert oracle.relative_rms(layer(x), np.asarray(x, np.float64) @ oracle.weights(w).T) < 1e-5
    with pytest.raises(ValueError, match="rngs"):
        fdk_jax.QuantisedLinear(64, 24)
    dense = fdk_jax.QuantisedDense(24, bits=2)
    variables = dense.init(jax.random.key(0), x)
    kernel = variables["params"]["kernel"]
    expected = np.asarray(x, np.float64) @ oracle.weights(kernel).T
    assert oracle.relative_rms(dense.apply(variables, x), expected) < 1e-5
    planar = {"params": {**variables["params"], "kernel": fdk_jax.prepare(kernel, "pallas")}}
    assert oracle.relative_rms(dense.apply(planar, x), expected) < 1e-5


class Linen(nn.Module):
    """Dense, DenseGeneral through attention, and a head that stays."""

    @nn.compact
    def __call__(self, x):
        x = nn.LayerNorm()(nn.Dense(64)(x))
        x = nn.MultiHeadDotProductAttention(4)(x, x)
        return nn.Dense(7, name="lm_head")(x)


def test_linen_models_run_on_quantised_parameters(rng):
    x = jnp.asarray(rng.standard_normal((2, 5, 64)), jnp.float32)
    model = Linen()
    params = model.init(jax.random.key(0), x)
    quantised = fdk_jax.quantise(params, 4, group_size=16)
    apply = jax.jit(fdk_jax.quantised_apply(model.apply))
    expected = model.apply(fdk_jax.dequantise(quantised), x)
    assert oracle.relative_rms(apply(quantised, x), np.asarray(expected, np.float64)) < 1e-5
    assert oracle.relative_rms(apply(params, x), np.asarray(model.apply(params, x), float)) < 1e-6


def test_linen_without_quantised_apply_is_right_and_says_what_is_faster(rng):
    class Cell(nn.Module):
        @nn.compact
        def __call__(self, h):
            return nn.DenseGeneral(64, axis=(-2, -1), name="out")(
                nn.DenseGeneral((4, 16), name="query")(h)
            )

    x = jnp.asarray(rng.standard_normal((5, 64)), jnp.float32)
    stack = nn.scan(
        lambda h, x, _: (h(x), None),
        variable_axes={"params": 0},
        split_rngs={"params": True},
        length=3,
    )

    class Stack(nn.Module):
        @nn.compact
        def __call__(self, h):
            return nn.Dense(64)(stack(Cell(), h, None)[0])

    model = Stack()
    small = fdk_jax.quantise(jax.jit(model.init)(jax.random.key(0), x), 4)
    expected = np.asarray(jax.jit(model.apply)(fdk_jax.dequantise(small), x), np.float64)
    with pytest.warns(
        fdk_jax.UnfusedWarning, match=r"fdk_jax\.quantised_apply\(model\.apply"
    ) as caught:
        assert oracle.relative_rms(jax.jit(model.apply)(small, x), expected) < 1e-5
    assert {warning.filename for warning in caught} == {__file__}


class Hand(nn.Module):
    """A kernel of its own."""

    @nn.compact
    def __call__(self, x):
        return x @ self.param("kernel", nn.initializers.lecun_normal(), (64, 32))


class Shared(nn.Module):
    """One layer, used twice."""

    def setup(self):
        self.dense = nn.Dense(64)

    def __call__(self, x):
        return self.dense(jnp.tanh(self.dense(x)))


OF_EACH = dict(variable_axes={"params": 0}, split_rngs={"params": True}, in_axes=0)


@pytest.mark.parametrize(
    ("model", "inputs"),
    [
        (Hand(), 1),
        (Shared(), 1),
        (nn.vmap(nn.Dense, **OF_EACH)(32), 1),
        (nn.vmap(nn.MultiHeadDotProductAttention, **OF_EACH)(4), 2),
    ],
)
def test_linen_modules_of_other_kinds(model, inputs, rng):
    x = [jnp.asarray(rng.standard_normal((3, 5, 64)), jnp.float32)] * inputs
    small = fdk_jax.quantise(jax.jit(model.init)(jax.random.key(0), *x), 4)
    got = jax.jit(fdk_jax.quantised_apply(model.apply, unfused="raise"))(small, *x)
    expected = jax.jit(model.apply)(fdk_jax.dequantise(small), *x)
    assert oracle.relative_rms(got, np.asarray(expected, np.float64)) < 1e-5


def test_what_cannot_be_recognised_is_named_with_the_rule(rng):
    x = jnp.asarray(rng.standard_normal((3, 64)), jnp.float32)
    model = nn.DenseGeneral((8, 16), use_bias=False)
    variables = jax.jit(model.init)(jax.random.key(0), x)
    small = fdk_jax.quantise(variables, 4)  # taken for 64 stacked matrices
    with pytest.warns(fdk_jax.UnfusedWarning, match=r"axes=\{'params\.kernel': 'knn'\}"):
        got = jax.jit(fdk_jax.quantised_apply(model.apply))(small, x)
    expected = np.asarray(jax.jit(model.apply)(fdk_jax.dequantise(small), x), np.float64)
    assert oracle.relative_rms(got, expected) < 1e-5
    small = fdk_jax.quantise(variables, 4, axes={"params.kernel": "knn"})
    jax.jit(fdk_jax.quantised_apply(model.apply, unfused="raise"))(small, x)
    with pytest.raises(TypeError, match=r'a "kernel" .* fits no orientation of a linear layer'):
        fdk_jax.quantise({"kernel": jnp.ones((8, 64, 8, 16)), "bias": jnp.ones((8, 16))})


def test_models_that_read_the_kernel_of_a_layer(rng):
    class Tied(nnx.Module):
        def __init__(self):
            self.layer = nnx.Linear(64, 32, rngs=nnx.Rngs(0))

        def __call__(self, x):
            return self.layer(x) @ self.layer.kernel[...].T

    model, x = Tied(), jnp.asarray(rng.standard_normal((3, 64)), jnp.float32)
    small = fdk_jax.quantise(model, 8)
    assert small.layer.in_features == 64 and small.layer.out_features == 32
    with pytest.warns(fdk_jax.UnfusedWarning, match=r"fdk_jax\.matmul"):
        assert oracle.relative_rms(small(x), np.asarray(model(x), np.float64)) < 2e-2


def test_linear_general_with_batch_axes(rng):
    layer = nnx.LinearGeneral(64, 16, batch_axis={0: 3}, rngs=nnx.Rngs(0))
    x = jnp.asarray(rng.standard_normal((3, 5, 64)), jnp.float32)
    small = fdk_jax.quantise(layer, 8)
    assert small.kernel.get_value().axes == "bkn"
    assert oracle.relative_rms(small(x), np.asarray(layer(x), np.float64)) < 2e-2


def test_linen_layers_without_a_quantised_form_say_so():
    model = nn.Conv(8, (3,))
    x = jnp.ones((1, 5, 64))
    params = model.init(jax.random.key(0), x)["params"]
    q = fdk_jax.quantise(params, 4, axes={"kernel": "kkn"})
    with pytest.raises(ValueError, match="conv_general_dilated"):
        fdk_jax.quantised_apply(model.apply, unfused="raise")({"params": q}, x)
    with pytest.warns(fdk_jax.UnfusedWarning, match="kernel.*conv_general_dilated"):
        got = fdk_jax.quantised_apply(model.apply)({"params": q}, x)
    expected = model.apply({"params": fdk_jax.dequantise(q)}, x)
    assert oracle.relative_rms(got, np.asarray(expected, np.float64)) < 1e-6


def test_low_rank_adapters_train_around_frozen_weights(tokens):
    class Adapted(nnx.Module):
        def __init__(self, rngs):
            self.base = fdk_jax.quantise(Net(rngs), 4, group_size=32)
            self.a = nnx.Param(rngs.normal((11, 4)) * 0.1)
            self.b = nnx.Param(jnp.zeros((4, 11)))

        def __call__(self, tokens):
            logits = self.base(tokens)
            return logits + logits @ self.a[...] @ self.b[...]

    model = Adapted(nnx.Rngs(0))
    frozen = [np.asarray(a) for a in jax.tree.leaves(nnx.state(model, fdk_jax.QuantisedWeight))]
    assert frozen
    optimiser = nnx.Optimizer(model, optax.adam(1e-2), wrt=nnx.Param)

    @nnx.jit
    def step(model, optimiser, tokens):
        def loss(model):
            logits = model(tokens[:, :-1])
            return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()

        value, grads = nnx.value_and_grad(loss)(model)
        optimiser.update(model, grads)
        return value

    with jax.numpy_dtype_promotion("standard"):  # optax counts its steps in integers
        losses = [float(step(model, optimiser, tokens)) for _ in range(30)]
    assert losses[-1] < 0.5 * losses[0]
    after = jax.tree.leaves(nnx.state(model, fdk_jax.QuantisedWeight))
    assert all((np.asarray(a) == f).all() for a, f in zip(after, frozen, strict=True))


def test_a_quantised_tensor_is_an_ordinary_pytree(rng):
    q = fdk_jax.quantise(jnp.asarray(rng.standard_normal((8, 64)), jnp.float32), 4)
    same = jax.jit(lambda w: w, donate_argnums=0)(jax.tree.map(jnp.copy, q))
    for other in (same, pickle.loads(pickle.dumps(q)), jax.tree.map(lambda a: a, q)):
        assert repr(other) == repr(q)
        assert (other.dequantise() == q.dequantise()).all()
    placed = jax.device_put(q, jax.devices()[3])
    assert placed.packed.devices() == {jax.devices()[3]}
    assert "QuantisedTensor" in repr(jax.tree.map(lambda _: None, q))
