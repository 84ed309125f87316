"""Gradients with respect to activations and bias, on every backend."""

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from backends import BACKENDS, running

import fdk_jax
from fdk_jax.benchmark.accuracy import Expected


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("bits", [1, 4, 8])
@pytest.mark.parametrize("transform", [lambda f: f, jax.jit, jax.remat])
def test_gradients_equal_those_of_the_dense_product(backend, bits, transform, rng):
    q = fdk_jax.quantise(rng.standard_normal((17, 130)).astype(np.float32), bits)
    w = oracle.weights(q)
    x = rng.standard_normal((2, 3, 130))
    bias, g = rng.standard_normal(17), rng.standard_normal((2, 3, 17))
    prepared = fdk_jax.prepare(q, backend)

    @transform
    def loss(x, bias):
        y = fdk_jax.matmul(x, prepared, backend=backend, bias=bias)
        return (y * jnp.asarray(g, jnp.float32)).sum() + 0.5 * (y**2).sum()

    args = jnp.asarray(x, jnp.float32), jnp.asarray(bias, jnp.float32)
    with running(backend):
        dx, dbias = jax.grad(loss, argnums=(0, 1))(*args)
    dy = g + x @ w.T + bias
    assert oracle.relative_rms(dx, dy @ w) < 1e-5
    assert oracle.relative_rms(dbias, dy.sum((0, 1))) < 1e-5


def test_vmapped_gradients(rng):
    q = fdk_jax.quantise(rng.standard_normal((8, 64)).astype(np.float32), 4)
    x = jnp.asarray(rng.standard_normal((5, 64)), jnp.float32)
    dx = jax.vmap(jax.grad(lambda x: fdk_jax.matmul(x, q).sum()))(x)
    expected = np.broadcast_to(oracle.weights(q).sum(0), (5, 64))
    assert oracle.relative_rms(dx, expected) < 1e-5


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("bits", "n", "k", "group"), [(4, 17, 130, 64), (1, 8, 64, 32), (8, 5, 24, 8)]
)
def test_gradients_of_scales_and_codebooks(backend, bits, n, k, group, rng):
    """DW = g^T x; a scale and a codebook entry get the sums over the weights that they make."""
    w = rng.standard_normal((n, k)).astype(np.float32)
    q = fdk_jax.quantise(w, bits, group_size=group, codebook="kmeans")
    x, g = rng.standard_normal((3, k)), rng.standard_normal((3, n))
    prepared = fdk_jax.prepare(q, backend)

    def loss(w):
        y = fdk_jax.matmul(jnp.asarray(x, jnp.float32), w, backend=backend)
        return (y * jnp.asarray(g, jnp.float32)).sum()

    with running(backend):
        grads = jax.grad(loss, allow_int=True)(prepared)
    dense = g.T @ x
    codes = oracle.unpack(np.asarray(q.packed), bits, k)
    values, scales = np.asarray(q.codebook, np.float64)[codes], np.asarray(q.scales, np.float64)
    dscales = np.stack(
        [(dense * values)[:, i : i + group].sum(1) for i in range(0, k, group)], axis=1
    )
    dcodebook = np.zeros(2**bits)
    np.add.at(dcodebook, codes, dense * np.repeat(scales, group, axis=1)[:, :k])
    _, got = fdk_jax.packing.convert(
        prepared.packed, grads.scales, prepared.layout, "interchange", **q.spec
    )
    assert oracle.relative_rms(got, dscales) < 1e-5
    assert oracle.relative_rms(grads.codebook, dcodebook) < 1e-5


def in_forward_mode(f):
    """Each way to differentiate f forwards at x."""
    one = lambda x: (x,)  # noqa: E731
    yield lambda x: jax.jvp(f, one(x), one(x))
    yield jax.jit(lambda x: jax.jvp(f, one(x), one(x)))
    yield lambda x: jax.jvp(jax.jit(f), one(x), one(x))
    yield jax.jacfwd(f)
    yield jax.jit(jax.hessian(lambda x: jnp.tanh(f(x)).sum()))
    yield lambda x: jax.linearize(f, x)[1](x)
    yield lambda x: jax.jvp(lambda x: jax.lax.map(f, x[None]), one(x), one(x))
    yield lambda x: jax.jvp(jax.vmap(f), one(x), one(x))


def test_forward_mode_names_the_remedy(rng):
    q = fdk_jax.quantise(rng.standard_normal((8, 64)).astype(np.float32), 4)
    x = jnp.ones((2, 64))
    for call in in_forward_mode(lambda x: fdk_jax.matmul(x, q)):
        with pytest.raises(TypeError, match=r"forward-mode.*use jax\.vjp.*fdk_jax\.dequantise"):
            call(x)
    with pytest.raises(TypeError, match="forward-mode"):
        jax.jvp(lambda b: fdk_jax.matmul(x, q, bias=b), (jnp.ones(8),), (jnp.ones(8),))


def test_integer_codes_have_no_gradient_and_the_rest_has(rng):
    """JAX's own words, which docs/integrations.md explains, and the two ways around them."""
    q = fdk_jax.quantise(rng.standard_normal((8, 64)).astype(np.float32), 4)
    tree, x = {"a": {"kernel": q}}, jnp.ones((2, 64))
    loss = lambda tree: fdk_jax.matmul(x, tree["a"]["kernel"]).sum()  # noqa: E731
    for transform in (jax.grad, jax.value_and_grad, jax.jacrev):
        with pytest.raises(TypeError, match=r"got uint8.*allow_int"):
            transform(loss)(tree)
    with pytest.raises(TypeError, match="float0"):
        jax.jvp(loss, (tree,), (tree,))
    whole = jax.jit(jax.grad(loss, allow_int=True))(tree)["a"]["kernel"]
    trained, put_back = fdk_jax.trainable(tree)
    parts = jax.jit(jax.grad(lambda trained: loss(put_back(trained))))(trained)
    assert set(parts) == {"a.kernel.scales", "a.kernel.codebook"}
    assert (parts["a.kernel.scales"] == whole.scales).all()
    assert (parts["a.kernel.codebook"] == whole.codebook).all()


def test_second_derivatives_in_reverse_mode(rng):
    q = fdk_jax.quantise(rng.standard_normal((8, 64)).astype(np.float32), 4)
    w, x = oracle.weights(q), rng.standard_normal(64)
    f = lambda x: jnp.square(fdk_jax.matmul(x, q)).sum()  # noqa: E731
    got = jax.jit(jax.jacrev(jax.grad(f)))(jnp.asarray(x, jnp.float32))
    assert oracle.relative_rms(got, 2 * w.T @ w) < 1e-5


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_gradients_keep_the_dtype_of_the_activations(dtype, rng):
    q = fdk_jax.quantise(jnp.asarray(rng.standard_normal((8, 64)), dtype), 4)
    x = jnp.asarray(rng.standard_normal((2, 64)), dtype)
    dx = jax.grad(lambda x: fdk_jax.matmul(x, q, out_dtype=jnp.float32).sum())(x)
    assert dx.dtype == dtype
    # A gradient is a sum over rows of weights, each rounded to the dtype of the activations.
    sums = [oracle.rounded(oracle.weights(q), dtype).sum(0), oracle.weights(q).sum(0)]
    size = np.sqrt((oracle.weights(q) ** 2).sum(0))
    oracle.check(dx, [Expected.of(np.broadcast_to(s, (2, 64)), 1e-6 * size) for s in sums])
