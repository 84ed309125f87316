"""Codebooks: published ones by their definitions, densities, k-means against slow float64 twins."""

import statistics as stdlib

import jax.numpy as jnp
import numpy as np
import oracle
import pytest

import fdk_jax
from fdk_jax.format import codebooks, densities


def test_fp4_is_e2m1():
    values = []
    for sign, exponent, mantissa in np.ndindex(2, 4, 2):
        magnitude = mantissa / 2 if exponent == 0 else 2.0 ** (exponent - 1) * (1 + mantissa / 2)
        values.append((-1) ** sign * magnitude)
    assert np.allclose(codebooks.fp4() * 6, sorted(values), atol=1e-7)


def test_nf4_follows_from_its_definition():
    quantile = stdlib.NormalDist().inv_cdf
    above = [quantile(p) for p in np.linspace(0.9677083, 0.5, 9)[:-1]]
    below = [-quantile(p) for p in np.linspace(0.9677083, 0.5, 8)[:-1]]
    levels = np.sort([*above, 0.0, *below])
    assert np.allclose(codebooks.nf4(), levels / np.abs(levels).max(), atol=2e-6)


@pytest.mark.parametrize("entries", [2, 4, 16, 256])
def test_cube_root_densities_have_the_published_quantiles(entries):
    ranks = np.arange(1, entries + 1) / (entries + 1)
    quantile = stdlib.NormalDist().inv_cdf
    normal = densities.cube_root(entries, scale="rms")
    assert np.allclose(normal, np.sqrt(3) * np.array([quantile(p) for p in ranks]), atol=1e-3)
    laplace = densities.cube_root(entries, scale="none", distribution="laplace")
    exact = -np.sign(ranks - 0.5) * 3 / np.sqrt(2) * np.log(1 - 2 * np.abs(ranks - 0.5))
    assert np.allclose(laplace, exact, atol=3e-3)
    # (7 - 2) / 3 degrees of freedom have no closed form; 3 * 2 + 2 = 8 degrees give 2, which has one.
    student = densities.cube_root(entries, scale="rms", distribution="student", degrees=8)
    t2 = (2 * ranks - 1) * np.sqrt(2 / (4 * ranks * (1 - ranks)))
    assert np.allclose(student, t2 * np.sqrt((8 - 2) / 2), rtol=5e-3, atol=1e-3)
    for distribution in densities.DISTRIBUTIONS:
        levels = densities.cube_root(entries, distribution=distribution)
        assert levels[-1] == 1 and (levels == -levels[::-1]).all() and (np.diff(levels) > 0).all()


@pytest.mark.parametrize("name", ["normal", "laplace", "student"])
def test_cube_root_codebooks_suit_their_distribution(name, rng):
    draw = {
        "normal": lambda: rng.standard_normal((64, 1024)),
        "laplace": lambda: rng.laplace(size=(64, 1024)),
        "student": lambda: rng.standard_t(7, (64, 1024)),
    }[name]
    w = draw().astype(np.float32)
    for bits in (2, 4):
        error = {
            codebook: oracle.relative_rms(
                fdk_jax.quantise(w, bits, codebook=codebook, scale="rms").dequantise(), w
            )
            for codebook in (name, "uniform", "kmeans")
        }
        assert error["kmeans"] * 0.999 <= error[name] < error["uniform"]
        assert error[name] < 1.25 * error["kmeans"]


def test_refine_takes_lloyd_steps(rng):
    values = rng.standard_normal(3000).astype(np.float32)
    importance = rng.random(3000).astype(np.float32)
    levels = np.array([-3.0, -0.1, 0.2, 9.0], np.float32)
    got = codebooks.refine(
        jnp.asarray(values), jnp.asarray(levels), importance=jnp.asarray(importance), steps=3
    )
    want = levels.astype(np.float64)
    for _ in range(3):
        code = np.abs(values[:, None] - want).argmin(1)
        for i in range(4):
            if (code == i).any():
                want[i] = np.average(values[code == i], weights=importance[code == i])
    assert np.allclose(got, want, atol=1e-5) and got[3] == 9.0


def test_a_shared_codebook_is_that_of_all_values_together(rng):
    parts = [rng.standard_normal(4000).astype(np.float32) * s for s in (1, 3)]
    weights = [np.ones(4000, np.float32), rng.random(4000).astype(np.float32)]
    shared = codebooks.fit_parts(
        [lambda i=i: (jnp.asarray(parts[i]), weights[i]) for i in range(2)], 8
    )
    together = codebooks.fit(np.concatenate(parts), 8, importance=np.concatenate(weights))
    assert np.allclose(shared, together, atol=1e-5)


@pytest.mark.parametrize("entries", [2, 4, 16])
def test_a_fit_goes_on_from_given_levels(rng, entries):
    values = jnp.asarray(rng.standard_normal(20_000).astype(np.float32))
    whole = np.asarray(codebooks.fit(values, entries))

    def error(levels):
        return float(np.square(np.asarray(values)[:, None] - levels).min(1).mean())

    near = np.asarray(codebooks.fit(values[:10_000] * 1.01, entries))
    later = np.asarray(codebooks.fit_parts([lambda: (values, None)], entries, start=near))
    assert error(later) < error(near) and error(later) < 1.001 * error(whole)


def test_ternary_codes_through_the_product(rng):
    w = rng.standard_normal((32, 128)).astype(np.float32)
    q = fdk_jax.quantise(w, 2, codebook="ternary")
    assert np.asarray(q.codebook).tolist() == [-1, 0, 1, 1]
    scale = np.abs(w.reshape(32, 2, 64)).mean(-1).repeat(64, -1)
    assert np.allclose(oracle.weights(q), scale * np.clip(np.round(w / scale), -1, 1), atol=1e-6)
    x = rng.standard_normal((5, 128)).astype(np.float32)
    oracle.check_product(fdk_jax.matmul(jnp.asarray(x), q), x, q)
