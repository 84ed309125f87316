"""`grouped_matmul` on every backend against one float64 product a group."""

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from backends import BACKENDS, running

import fdk_jax

GROUPS = 5
SIZES = [
    [3, 0, 1, 7, 2],  # ragged, one without rows
    [0, 0, 13, 0, 0],
    [0, 4, 0, 0, 0],  # rows past the sum
    [0, 0, 0, 0, 0],
]


def stack(rng, n, k, bits, dtype="float32", codebook="kmeans", group=64, groups=GROUPS):
    w = rng.standard_t(4, (groups, n, k)).astype(np.float32).astype(oracle.DTYPES[dtype])
    return fdk_jax.quantise(jnp.asarray(w), bits, group_size=group, codebook=codebook)


def check_groups(y, x, w, sizes, bias=None):
    """Compares each group's rows with the product of its own matrix."""
    start = 0
    for e, size in enumerate(sizes):
        rows, one = slice(start, start + int(size)), jax.tree.map(lambda a: a[e], w)  # noqa: B023
        oracle.check_product(y[rows], x[rows], one, None if bias is None else bias[e])
        start += int(size)


def check(backend, x, w, sizes, bias=None, **options):
    prepared = fdk_jax.prepare(w, backend)
    with running(backend):
        y = jax.jit(
            lambda x, w, s, b: fdk_jax.grouped_matmul(x, w, s, backend=backend, bias=b, **options)
        )(x, prepared, jnp.asarray(sizes), bias)
    assert y.shape == (x.shape[0], w.out_features)
    assert y.dtype == options.get("out_dtype", x.dtype)
    check_groups(y, x, w, sizes, bias)
    assert not np.asarray(y[sum(sizes) :]).any()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("sizes", SIZES)
def test_ragged_groups(backend, sizes, rng):
    w = stack(rng, 24, 130, 4)
    x = jnp.asarray(rng.standard_normal((13, 130)), jnp.float32)
    bias = jnp.asarray(rng.standard_normal((GROUPS, 24)), jnp.float32)
    check(backend, x, w, sizes, bias)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("bits", [1, 2, 8])
def test_bits_and_dtypes(backend, bits, rng):
    w = stack(rng, 17, 64, bits, "bfloat16", "uniform", 32)
    x = jnp.asarray(rng.standard_normal((9, 64)), jnp.bfloat16)
    check(backend, x, w, [2, 0, 3, 0, 4])
    check(backend, x, w, [2, 0, 3, 0, 4], out_dtype=jnp.float32)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_group_of_several_tiles(backend, rng):
    w = stack(rng, 16, 64, 4, groups=2)
    x = jnp.asarray(rng.standard_normal((90, 64)), jnp.float32)
    check(backend, x, w, [3, 85])
    w = stack(rng, 16, 64, 4, groups=12)
    check(backend, x, w, [1, 0, 40, 0, 0, 33, 0, 0, 0, 9, 0, 4])


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients(backend, rng):
    sizes = jnp.asarray([2, 0, 5, 1, 3])
    w = stack(rng, 24, 96, 4)
    x = jnp.asarray(rng.standard_normal((13, 96)), jnp.float32)
    bias = jnp.asarray(rng.standard_normal((GROUPS, 24)), jnp.float32)
    g = jnp.asarray(rng.standard_normal((13, 24)), jnp.float32)
    prepared = fdk_jax.prepare(w, backend)
    with running(backend):
        dx, db = jax.grad(
            lambda x, b: (
                fdk_jax.grouped_matmul(x, prepared, sizes, backend=backend, bias=b) * g
            ).sum(),
            argnums=(0, 1),
        )(x, bias)
    dense = np.stack([oracle.weights(jax.tree.map(lambda a: a[e], w)) for e in range(GROUPS)])  # noqa: B023
    group = np.repeat(np.arange(GROUPS + 1), [*np.asarray(sizes), 2])
    wide = np.asarray(g, np.float64)
    exact = np.stack(
        [wide[i] @ dense[e] if e < GROUPS else np.zeros(96) for i, e in enumerate(group)]
    )
    np.testing.assert_allclose(np.asarray(dx), exact, rtol=1e-4, atol=1e-4)
    sums = np.stack([wide[group == e].sum(0) for e in range(GROUPS)])
    np.testing.assert_allclose(np.asarray(db), sums, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("sizes", [[2, 0, 5, 1, 3], [40, 0, 3, 0, 0], [0, 1, 0, 0, 42]])
def test_gradients_of_scales_and_codebooks(backend, sizes, rng):
    """Each matrix's are those of the product of its own rows."""
    rows = sum(sizes) + 2
    w = stack(rng, 24, 96, 4)
    x, g = (jnp.asarray(rng.standard_normal((rows, n)), jnp.float32) for n in (96, 24))
    prepared = fdk_jax.prepare(w, backend)

    def loss(w):
        return (fdk_jax.grouped_matmul(x, w, jnp.asarray(sizes), backend=backend) * g).sum()

    with running(backend):
        got = jax.grad(loss, allow_int=True)(prepared)
    _, scales = fdk_jax.packing.convert(
        prepared.packed, got.scales, prepared.layout, "interchange", **w.spec
    )
    start = 0
    for e, size in enumerate(sizes):
        rows, one = slice(start, start + size), jax.tree.map(lambda a: a[e], w)  # noqa: B023
        start += size
        dense = np.asarray(g[rows], np.float64).T @ np.asarray(x[rows], np.float64)
        codes = oracle.unpack(np.asarray(one.packed), 4, 96)
        values = np.asarray(one.codebook, np.float64)[codes]
        spread = np.repeat(np.asarray(one.scales, np.float64), 64, axis=1)[:, :96]
        by_code = np.zeros(16)
        np.add.at(by_code, codes, dense * spread)
        by_group = np.add.reduceat(dense * values, [0, 64], axis=1)
        np.testing.assert_allclose(np.asarray(scales[e]), by_group, rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(np.asarray(got.codebook[e]), by_code, rtol=1e-4, atol=1e-4)


def test_forward_mode_names_the_remedy(rng):
    w, x = stack(rng, 8, 64, 4), jnp.ones((3, 64))
    sizes = jnp.asarray([1, 2, 0, 0, 0])
    with pytest.raises(TypeError, match=r"use jax\.vjp"):
        jax.jvp(lambda x: fdk_jax.grouped_matmul(x, w, sizes), (x,), (x,))


def test_no_layout_but_the_prepared_ones_kernel_and_vmap(rng):
    w = fdk_jax.prepare(stack(rng, 24, 64, 4), "xla")
    x = jnp.asarray(rng.standard_normal((2, 6, 64)), jnp.float32)
    sizes = jnp.asarray([[1, 2, 0, 3, 0], [0, 0, 6, 0, 0]])
    y = jax.vmap(fdk_jax.grouped_matmul, (0, None, 0))(x, w, sizes)
    for i in range(2):
        check_groups(y[i], x[i], w, np.asarray(sizes[i]))


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        (dict(x=jnp.ones((3, 63))), ValueError, "K=64"),
        (dict(x=jnp.ones((3, 64), jnp.int32)), TypeError, "int32"),
        (dict(w=jnp.ones((2, 8, 64))), TypeError, "QuantisedTensor"),
        (dict(w="one"), ValueError, "stacked"),
        (dict(group_sizes=[1, 2]), TypeError, "list"),
        (dict(group_sizes=jnp.ones(2)), TypeError, "float32"),
        (dict(group_sizes=jnp.ones(3, jnp.int32)), ValueError, "one size for each"),
        (dict(group_sizes=jnp.asarray([1, 3])), ValueError, "at most 3"),
        (dict(group_sizes=jnp.asarray([4, -1])), ValueError, "negative"),
        (dict(bias=jnp.ones(8)), ValueError, "row for each"),
        (dict(out_dtype=jnp.int8), TypeError, "out_dtype"),
        (dict(backend="tpu"), ValueError, "backend='tpu'"),
    ],
)
def test_bad_calls(change, error, words):
    w = fdk_jax.quantise(jnp.ones((2, 8, 64), jnp.float32), 4)
    call = dict(x=jnp.ones((3, 64)), w=w, group_sizes=jnp.asarray([1, 2])) | change
    if isinstance(call["w"], str):
        call["w"] = jax.tree.map(lambda a: a[0], w)
    with pytest.raises(error, match=words):
        fdk_jax.grouped_matmul(**call)
