"""Products with planar weights for the tests of the Pallas kernels, with their float64 oracle."""

import jax.numpy as jnp
import numpy as np

from fdk_jax.format import packing

# Relative RMS of the arithmetic, for activations of each dtype.
TOLERANCE = {"bfloat16": 1e-2, "float16": 2e-3, "float32": 1e-5}


def product(rng, m, n, k, bits, group_size, dtype, books=1, scale=1.0, uniform=False):
    """Arguments of `pallas_kernels.matmul`, the product in float64 and its size without cancellation."""
    dtype = jnp.dtype(dtype)
    codes = rng.integers(0, 2**bits, (n, k)).astype(np.uint8)
    codebook = np.sort(rng.normal(size=(books, 2**bits)), -1).astype(np.float32)
    if uniform:
        zero = rng.integers(0, 2 ** (bits + 1) - 1, (books, 1)) / 2
        step = rng.uniform(0.5, 2, (books, 1)) / 2**bits
        codebook = ((np.arange(2**bits) - zero) * step).astype(np.float32)
    scales = jnp.asarray(scale * rng.uniform(0.5, 2, (n, -(-k // group_size))), dtype)
    x = jnp.asarray(rng.normal(size=(m, k)), dtype)
    facts = dict(bits=bits, group_size=group_size, out_features=n)
    packed, planar = packing.to_planar(packing.pack(codes, bits), scales, in_features=k, **facts)
    values = np.repeat(np.asarray(jnp.asarray(codebook, dtype), np.float64), n // books, 0)
    weight = np.take_along_axis(values, codes.astype(int), -1)
    weight *= np.repeat(np.asarray(scales, np.float64), group_size, -1)[:, :k]
    exact = np.asarray(x, np.float64)
    size = np.sqrt(np.mean(exact**2 @ (weight**2).T))
    return (x, packed, planar, jnp.asarray(codebook)), facts, (exact @ weight.T, size)


def matrix(weight, facts, n, k, books):
    """A planar weight [N, K] in float64, its values as the kernels round them."""
    packed, scales, codebook = weight
    interchange, plain = packing.from_planar(packed, scales, in_features=k, **facts)
    values = np.repeat(np.asarray(codebook.astype(scales.dtype), np.float64), n // books, 0)
    codes = np.asarray(packing.unpack(interchange, facts["bits"], k)).astype(int)
    factors = np.repeat(np.asarray(plain, np.float64), facts["group_size"], -1)[:, :k]
    return np.take_along_axis(values, codes, -1) * factors


NORM_EPS = 1e-3


def residual_product(rng, n, k, books=1, parts=5, bits=1, uniform=False):
    """A `Scaled` [1, K] and a residual [1, N] for `pallas_kernels.residual_matmul`, bfloat16.

    Returns:
        (total, scaled, squares) of the input; (residual, scale); weight arrays; facts; in float64 the
        norm's product and its size without cancellation.
    """
    dtype = jnp.bfloat16
    (x, *weight), facts, _ = product(rng, 1, n, k, bits, 64, dtype, books, uniform=uniform)
    factors = jnp.asarray(rng.uniform(0.5, 2, k), dtype)
    squares = np.zeros(parts, np.float32)
    np.add.at(squares, np.arange(k) % parts, np.asarray(x, np.float32)[0] ** 2)
    exact_weight = matrix(weight, facts, n, k, books)
    exact = np.asarray(x, np.float64)
    normed = np.asarray(factors, np.float64) * exact / np.sqrt(np.mean(exact**2) + NORM_EPS)
    expected = normed @ exact_weight.T, np.sqrt(np.mean(normed**2 @ (exact_weight**2).T))
    residual = jnp.asarray(3 * rng.normal(size=(1, n)), dtype)
    behind = residual, jnp.asarray(rng.uniform(0.5, 2, n), dtype)
    return (x, x * factors[None, :], jnp.asarray(squares)), behind, weight, facts, expected


def check_residual(outputs, behind, expected, size):
    """Compares (sum, scaled, squares) of a product with a residual to float64."""
    total, scaled, squares = (np.asarray(a, np.float64) for a in outputs)
    residual, scale = (np.asarray(a, np.float64) for a in behind)
    error = total - (expected + residual)
    bound = TOLERANCE["bfloat16"] * (size + np.sqrt(np.mean(residual**2)))
    assert np.sqrt(np.mean(error**2)) < bound
    # What is scaled and squared is the sum as it was rounded.
    np.testing.assert_allclose(scaled, total * scale, rtol=2**-8)
    np.testing.assert_allclose(squares.sum(), (total**2).sum(), rtol=1e-5)
