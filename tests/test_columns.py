"""The kernel of a block of columns, interpreted, beside the same loop in NumPy in float64."""

import dataclasses

import backends
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest

from fdk_jax.format import codebooks, quantisation
from fdk_jax.format.quantisation import middle_of
from fdk_jax.learning import rounding
from pallas_kernels import columns, triton_compat
from pallas_kernels.target import H200

pytestmark = pytest.mark.skipif(not triton_compat.AVAILABLE, reason="needs Pallas' Triton module")


def loop(state, old, scales, inner, levels):
    """The definition, one column at a time; and how near a quotient came to an edge."""
    state = state.astype(np.float64)
    middle = (levels[1:] + levels[:-1]) / 2
    out, codes, margin = np.zeros_like(state), np.zeros(state.shape, int), np.inf
    for i in range(len(state)):
        before = 0 if old is None else old[i]
        wanted = state[i] if old is None else before + state[i] / inner[i, i]
        quotients = wanted / scales[i]
        codes[i] = (quotients[:, None] > middle).sum(1)
        margin = min(margin, np.abs(quotients[:, None] - middle).min())
        new = scales[i] * levels[codes[i]]
        change = (wanted - new) / inner[i, i] if old is None else new - before
        out[i] = change if old is None else new
        state -= inner[i][:, None] * change
    return out, codes, margin


ON_A_GPU = pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs a GPU")


@pytest.mark.parametrize("interpret", [True, pytest.param(False, marks=ON_A_GPU)])
@pytest.mark.parametrize("descends", [False, True])
@pytest.mark.parametrize(("bits", "n"), [(1, 32), (2, 40), (4, 7)])
def test_a_block_of_columns(bits, n, descends, interpret, rng):
    size = 16
    x = rng.standard_normal((200, size))
    second = x.T @ x / 200 + 0.1 * np.eye(size)
    inner = second if descends else np.triu(np.linalg.cholesky(np.linalg.inv(second)).T)
    state, old = rng.standard_normal((2, size, n))
    scales = rng.uniform(0.5, 1.5, (size, n))
    levels = np.asarray(codebooks.uniform(bits) if bits < 4 else codebooks.nf4(), np.float32)
    single = [np.asarray(a, np.float32) for a in (state, old, scales, inner)]
    given = [jnp.asarray(a) for a in single]
    before = given[1] if descends else None
    out, codes = columns.rounded(
        given[0],
        before,
        *given[2:],
        jnp.asarray(levels),
        middle_of(jnp.asarray(levels)),
        interpret=interpret,
    )
    wide = [a.astype(np.float64) for a in single]
    wanted, wanted_codes, margin = loop(
        wide[0], wide[1] if descends else None, *wide[2:], levels.astype(np.float64)
    )
    # No quotient is so near to an edge that float32 may fall on its other side.
    assert margin > 1e-6
    np.testing.assert_array_equal(codes, wanted_codes)
    oracle.check_values(out, wanted, slack=1e-5)


@pytest.mark.parametrize("descends", [False, True])
def test_it_lowers_for_a_gpu(descends):
    def shape(*size):
        return jax.ShapeDtypeStruct(size, jnp.float32)

    block = shape(128, 4100)
    arguments = block, block if descends else None, block, shape(128, 128), shape(16), shape(15)
    with backends.for_a_gpu():
        traced = jax.jit(columns.rounded).trace(*arguments)
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert "fdk_columns" in text


@ON_A_GPU
@pytest.mark.parametrize("bits", [2, 4])
def test_whole_matrices_on_a_gpu(bits, rng):
    """Error correction and a sweep with the kernel cost what they do with XLA's loop."""
    n, k = 200, 300
    w = rng.standard_normal((n, k)).astype(np.float32)
    x = rng.standard_normal((1000, k)) * np.exp(rng.standard_normal(k))
    second = (x.T @ x / len(x)).astype(np.float32)
    levels = jnp.asarray(codebooks.uniform(bits) if bits < 4 else codebooks.nf4())
    options = {"group_size": 64, "dtype": jnp.float32}
    given = jnp.asarray(w), quantisation.scaled(jnp.asarray(w), 64, "absmax")[1], levels
    errors = {}
    for fused in (True, False):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(rounding, "_fused", lambda *_, fused=fused: fused)
            codes = rounding.corrected(*given, jnp.asarray(second), **options)
            swept = rounding.descend(given[0], codes, *given[1:], jnp.asarray(second), **options)
        scales = np.repeat(np.asarray(given[1], np.float64), 64, axis=1)[:, :k]
        made = [scales * np.asarray(levels, np.float64)[np.asarray(c)] for c in (codes, swept)]
        errors[fused] = [np.trace((q - w) @ second @ (q - w).T) for q in made]
    assert errors[True][1] < errors[True][0]
    np.testing.assert_allclose(errors[True], errors[False], rtol=5e-3)


def test_where_it_runs():
    assert columns.unsupported_reason(16, H200) is None
    assert "17 levels" in columns.unsupported_reason(17, H200)
    without = dataclasses.replace(H200, triton=False)
    assert "Triton" in columns.unsupported_reason(16, without)
