"""Chains of products for the tests of `pallas_kernels.chain`, with their float64 oracle."""

import jax.numpy as jnp
import numpy as np
import planar

from pallas_kernels.case import Arrays, Case

HALF = jnp.dtype(jnp.bfloat16)
EPS = (1e-3, 2e-3)


def weight(rng, n, k, bits, books, uniform, bias):
    """(case, arrays, matrix in float64, bias in float64) of a product."""
    (_, *arrays), facts, _ = planar.product(
        rng, 1, n, k, bits, 64, "bfloat16", books, k**-0.5, uniform
    )
    matrix = planar.matrix(arrays, facts, n, k, books)
    added = jnp.asarray(rng.normal(size=n), HALF) if bias else None
    case = Case(1, n, k, bits, 64, books, HALF, HALF, HALF if bias else None, HALF, uniform)
    exact = np.zeros(n) if added is None else np.asarray(added, np.float64)
    return case, Arrays(jnp.zeros((1, k), HALF), *arrays, added), matrix, exact


def weights(rng, shapes, bits, books, uniform, bias):
    """Those of a chain: out, gate and up, down, and the next qkv or not."""
    rows = zip(shapes, books, strict=False)
    return [weight(rng, n, k, bits, b, uniform, bias) for (n, k), b in rows]


def inputs(rng, k, hidden):
    """X [1, K], the residual stream [1, D] and the scales [D] of the two norms."""
    x, residual = (jnp.asarray(rng.normal(size=(1, size)), HALF) for size in (k, hidden))
    return x, residual, [jnp.asarray(rng.uniform(0.5, 2, hidden), HALF) for _ in range(2)]


def expected(weights, x, residual, scales):
    """(total, scaled, y or None) in float64, what is in between rounded as the kernels leave it."""

    def rounded(a):
        return np.asarray(jnp.asarray(a, HALF), np.float64)

    def product(place, x, inverse=1.0):
        return x @ weights[place][2].T * inverse + weights[place][3]

    x, residual, *scales = (np.asarray(a, np.float64) for a in (x, residual, *scales))
    total = rounded(residual + product(0, x))
    inverse = 1 / np.sqrt(np.mean(total**2) + EPS[0])
    gate, value = np.split(product(1, rounded(total * scales[0]), inverse), 2, axis=-1)
    total = rounded(total + product(2, rounded(gate / (1 + np.exp(-gate)) * value)))
    scaled = rounded(total * scales[1])
    if len(weights) < 4:
        return total, scaled, None
    return total, scaled, product(3, scaled, 1 / np.sqrt(np.mean(total**2) + EPS[1]))


def check(found, wanted):
    """Compares (total, scaled, squares, y) with (total, scaled, y)."""
    total, scaled, squares, y = (None if a is None else np.asarray(a, np.float64) for a in found)
    for ours, exact in zip((total, scaled, y), wanted, strict=True):
        assert (ours is None) == (exact is None)
        if exact is not None:
            error = np.sqrt(np.mean((ours - exact) ** 2))
            assert error < planar.TOLERANCE["bfloat16"] * np.sqrt(np.mean(exact**2))
    np.testing.assert_allclose(squares.sum(), (total**2).sum(), rtol=1e-5)
