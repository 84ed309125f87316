"""`matmul` on every backend, by bits, codebook, dtype and odd shapes, against a float64 oracle."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from backends import BACKENDS, ONLY_WITH_A_GPU, running

import fdk_jax
from fdk_jax.format.packing import BITS


def case(rng, lead, n, k, bits, codebook="uniform", dtype="float32", group=64, bias=False):
    """(x, weight in the interchange layout, bias or None)."""
    w = rng.standard_t(4, (n, k)).astype(np.float32).astype(oracle.DTYPES[dtype])
    q = fdk_jax.quantise(w, bits, group_size=group, codebook=codebook)
    x = jnp.asarray(rng.standard_normal((*lead, k)).astype(oracle.DTYPES[dtype]))
    return x, q, jnp.asarray(rng.standard_normal(n), x.dtype) if bias else None


def check(backend, x, q, bias=None, **options):
    prepared = fdk_jax.prepare(q, backend)
    with running(backend):
        y = jax.jit(lambda x, w, b: fdk_jax.matmul(x, w, backend=backend, bias=b, **options))(
            x, prepared, bias
        )
    assert y.shape == (*x.shape[:-1], q.out_features)
    assert y.dtype == options.get("out_dtype", x.dtype)
    oracle.check_product(y, x, q, bias)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("codebook", ["uniform", "kmeans"])
@pytest.mark.parametrize("dtype", sorted(oracle.DTYPES))
def test_bits_codebooks_and_dtypes(backend, bits, codebook, dtype, rng):
    check(backend, *case(rng, (3,), 40, 192, bits, codebook, dtype, bias=True))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("bits", [1, 4])
@pytest.mark.parametrize(
    ("lead", "n", "k", "group"),
    [
        ((), 1, 64, 64),
        ((1,), 17, 65, 64),
        ((2, 3), 33, 130, 32),
        ((5,), 7, 31, 8),
        ((1, 1, 1), 64, 576, 128),
        ((33,), 96, 200, 64),
    ],
)
def test_odd_shapes(backend, bits, lead, n, k, group, rng):
    check(backend, *case(rng, lead, n, k, bits, "kmeans", group=group))


@pytest.mark.parametrize("backend", BACKENDS)
def test_out_dtype_and_mixed_weights(backend, rng):
    x, q, _ = case(rng, (4,), 24, 128, 4, "kmeans", "bfloat16")
    check(backend, x, q, out_dtype=jnp.float32)
    check(backend, x.astype(jnp.float32), q)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("bits", [1, 4])
def test_row_blocks_with_codebooks_of_their_own(backend, bits, rng):
    x, q, _ = case(rng, (2,), 96, 128, bits)
    codebooks = np.sort(rng.standard_normal((3, 2**bits)), -1).astype(np.float32)
    q = dataclasses.replace(q, codebook=jnp.asarray(codebooks), uniform=bits == 1)
    q.validate()
    check(backend, x, q)


@pytest.mark.parametrize("backend", BACKENDS)
def test_nothing_to_do(backend, rng):
    x, q, bias = case(rng, (0,), 8, 64, 4, bias=True)
    check(backend, x, q, bias)
    x, q, _ = case(rng, (2, 0, 3), 8, 64, 4)
    check(backend, x, q)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_not_finite_activations_propagate(backend, value, rng):
    x, q, _ = case(rng, (2,), 8, 128, 4)
    x = x.at[0, 5].set(value)
    with running(backend):
        got = np.asarray(fdk_jax.matmul(x, fdk_jax.prepare(q, backend), backend=backend))
    assert not np.isfinite(got[0]).any()
    oracle.check_product(got[1], x[1], q)


@pytest.mark.parametrize("backend", BACKENDS)
def test_extreme_scales(backend, rng):
    for factor in (1e-30, 1e30):
        w = (rng.standard_normal((16, 128)) * factor).astype(np.float32)
        x = jnp.asarray(rng.standard_normal((2, 128)), jnp.float32)
        check(backend, x, fdk_jax.quantise(w, 4))


@pytest.mark.parametrize("backend", BACKENDS)
def test_vmap_over_activations_weights_and_both(backend, rng):
    x, q, _ = case(rng, (3, 2), 24, 128, 4)
    stack = fdk_jax.quantise(
        jnp.asarray(rng.standard_normal((3, 24, 128)), jnp.float32), 4, codebook="kmeans"
    )
    one = fdk_jax.prepare(q, backend)
    many = fdk_jax.prepare(stack, backend)

    def product(x, w):
        return fdk_jax.matmul(x, w, backend=backend)

    with running(backend):
        over_x = jax.vmap(product, (0, None))(x, one)
        over_w = jax.vmap(product, (None, 0))(x[0], many)
        over_both = jax.jit(jax.vmap(product))(x, many)
    oracle.check_product(over_x, x, q)
    for i in range(3):
        w = jax.tree.map(lambda a: a[i], stack)  # noqa: B023
        oracle.check_product(over_w[i], x[0], w)
        oracle.check_product(over_both[i], x[i], w)


@pytest.mark.parametrize("backend", BACKENDS)
def test_scan_over_stacked_layers(backend, rng):
    stack = fdk_jax.quantise(jnp.asarray(rng.standard_normal((3, 64, 64)) / 8, jnp.float32), 8)
    x = jnp.asarray(rng.standard_normal((2, 64)), jnp.float32)
    with running(backend):
        got, _ = jax.lax.scan(
            lambda h, w: (fdk_jax.matmul(h, w, backend=backend), None),
            x,
            fdk_jax.prepare(stack, backend),
        )
    expected = np.asarray(x, np.float64)
    for i in range(3):
        expected = oracle.product(expected, jax.tree.map(lambda a: a[i], stack))  # noqa: B023
    oracle.check_values(got, expected, slack=1e-5)


def test_an_unprepared_weight_is_converted_for_an_explicit_backend(rng):
    x, q, _ = case(rng, (2,), 24, 128, 4)
    with running("pallas"):
        y = fdk_jax.matmul(x, q, backend="pallas")
        assert "prepare it once" in str(fdk_jax.explain(x, q, backend="pallas"))
    oracle.check_product(y, x, q)


def test_a_prepared_weight_works_on_platforms_without_its_kernel(rng):
    x, q, _ = case(rng, (2,), 24, 128, 2, "kmeans")
    planar = fdk_jax.prepare(q, "pallas")
    oracle.check_product(fdk_jax.matmul(x, planar), x, q)
    assert "no kernel on cpu" in fdk_jax.explain(x, planar, platform="cpu").reason
    assert fdk_jax.explain(x, planar, platform="cuda").backend == "pallas"


@ONLY_WITH_A_GPU
def test_no_kernel_reformats_a_prepared_weight(rng):
    """Prepared weights go into the kernel's call as they are: nothing else touches their bytes."""
    x, q, _ = case(rng, (1,), 64, 512, 4, dtype="bfloat16")
    planar = fdk_jax.prepare(q, "pallas")
    traced = jax.jit(lambda x, w: fdk_jax.matmul(x, w, backend="pallas")).trace(x, planar)
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    shape = "x".join(map(str, planar.packed.shape))
    users = re.findall(rf"= \"?([\w.]+).*tensor<{shape}x", text)
    assert users and set(users) <= {"stablehlo.custom_call", "call"}
