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
@pytest.mark.parametrize("transform", [lambda f: f, jax.jit, jax.remat, jax.checkpoint])
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


def test_the_weight_gets_no_gradient(rng):
    q = fdk_jax.quantise(rng.standard_normal((8, 64)).astype(np.float32), 4)
    x = jnp.ones((2, 64))
    grads = jax.grad(lambda w: fdk_jax.matmul(x, w).sum(), allow_int=True)(q)
    assert not np.asarray(grads.scales).any() and not np.asarray(grads.codebook).any()


def test_forward_mode_says_so(rng):
    q = fdk_jax.quantise(rng.standard_normal((8, 64)).astype(np.float32), 4)
    x = jnp.ones((2, 64))
    with pytest.raises(TypeError, match="forward-mode"):
        jax.jvp(lambda x: fdk_jax.matmul(x, q), (x,), (x,))


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
