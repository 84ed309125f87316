"""Scales of a dtype of their own beside activations of any other; groups from 16 weights to a whole row."""

import jax.numpy as jnp
import numpy as np
import pytest

import fdk_jax
from fdk_jax.format.quantised_tensor import QuantisedTensor

DTYPES = ("bfloat16", "float16", "float32")
EPS = {"bfloat16": 2.0**-8, "float16": 2.0**-11, "float32": 2.0**-24}


def weight(
    rng, bits: int, g: int, dtype: str, n: int, k: int
) -> tuple[QuantisedTensor, np.ndarray]:
    """(a weight with integers as codebook, which every dtype holds; its values in float64)."""
    codes = rng.integers(0, 2**bits, (n, k))
    codebook = np.sort(rng.choice(np.arange(-100, 100), 2**bits, replace=bits == 8)).astype(
        np.float32
    )
    scales = jnp.asarray(rng.random((n, -(-k // g))) * 0.1 + 0.01, dtype)
    packed = fdk_jax.packing.pack(jnp.asarray(codes, jnp.uint8), bits)
    spread = np.repeat(np.asarray(scales).astype(np.float64), g, axis=1)[:, :k]
    return QuantisedTensor(packed, scales, jnp.asarray(codebook), bits, g, (n, k)), codebook[
        codes
    ] * spread


@pytest.mark.parametrize("backend", ["xla", "cpu"])
@pytest.mark.parametrize("scale_dtype", DTYPES)
@pytest.mark.parametrize("x_dtype", DTYPES)
@pytest.mark.parametrize(("bits", "g"), [(1, 128), (2, 16), (4, 32), (4, 200), (8, 256)])
def test_products(backend, scale_dtype, x_dtype, bits, g, rng):
    if backend == "cpu" and fdk_jax.product.cpu_backend.unavailable_reason() is not None:
        pytest.skip("the C++ library is not built")
    n, k, m = 37, 200, 3
    w, dense = weight(rng, bits, g, scale_dtype, n, k)
    x = jnp.asarray(rng.standard_normal((m, k)), x_dtype)
    wide = np.asarray(x).astype(np.float64)
    got = np.asarray(fdk_jax.matmul(x, w, backend=backend, out_dtype=jnp.float32))
    terms = np.abs(wide) @ np.abs(dense).T
    # "xla" rounds the weight to the dtype of x; both sum in float32.
    eps = EPS[x_dtype] if backend == "xla" else EPS["float32"]
    wrong = np.abs(got - wide @ dense.T) / ((eps + k * 2.0**-24) * terms)
    assert wrong.max() < 1, f"worst of {wrong.size}: {wrong.max()}"


@pytest.mark.parametrize("layout", ["interchange", "planar", "tiled"])
@pytest.mark.parametrize("scale_dtype", DTYPES)
def test_layouts_keep_scales(layout, scale_dtype, rng):
    w, dense = weight(rng, 4, 32, scale_dtype, 37, 200)
    moved = w.to_layout(layout)
    assert moved.scales.dtype == scale_dtype
    got = np.asarray(moved.dequantise(jnp.float32)).astype(np.float64)
    np.testing.assert_array_equal(got, dense.astype(np.float32))
