"""The kernel of a block of columns, interpreted, beside the same loop in NumPy in float64."""

import jax.numpy as jnp
import numpy as np
import pytest

from fdk_jax.format import codebooks
from fdk_jax.format.quantisation import middle_of
from pallas_kernels import columns, triton_compat

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


@pytest.mark.parametrize("descends", [False, True])
@pytest.mark.parametrize(("bits", "n"), [(1, 32), (2, 40), (4, 7)])
def test_a_block_of_columns(bits, n, descends, rng):
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
        interpret=True,
    )
    wide = [a.astype(np.float64) for a in single]
    wanted, wanted_codes, margin = loop(
        wide[0], wide[1] if descends else None, *wide[2:], levels.astype(np.float64)
    )
    assert (
        margin > 1e-6
    )  # no quotient is so near to an edge that float32 may fall on its other side
    np.testing.assert_array_equal(codes, wanted_codes)
    np.testing.assert_allclose(out, wanted, rtol=2e-5, atol=2e-5)


def test_where_it_runs():
    assert columns.supported(16, "gpu") and not columns.supported(17, "gpu")
    assert not columns.supported(16, "cpu")
