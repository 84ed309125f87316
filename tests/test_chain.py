"""Several products in one launch: values against float64, on the emulator of PTX, and what is refused."""

import jax.numpy as jnp
import numpy as np
import planar
import ptx_machine
import pytest

from pallas_kernels import chain, ring
from pallas_kernels.case import Arrays, Case

HALF = jnp.dtype(jnp.bfloat16)
EPS = (1e-3, 2e-3)


def _weight(rng, n, k, bits, books, uniform, bias):
    """(case, arrays, matrix in float64, bias in float64) of a product."""
    (_, *arrays), facts, _ = planar.product(
        rng, 1, n, k, bits, 64, "bfloat16", books, k**-0.5, uniform
    )
    matrix = planar.matrix(arrays, facts, n, k, books)
    added = jnp.asarray(rng.normal(size=n), HALF) if bias else None
    case = Case(1, n, k, bits, 64, books, HALF, HALF, HALF if bias else None, HALF, uniform)
    exact = np.zeros(n) if added is None else np.asarray(added, np.float64)
    return case, Arrays(None, *arrays, added), matrix, exact


def _expected(weights, x, residual, scales):
    """The chain in float64, intermediate results rounded as the kernels leave them."""

    def rounded(a):
        return np.asarray(jnp.asarray(a, HALF), np.float64)

    def product(place, x):
        return x @ weights[place][2].T + weights[place][3]

    total = rounded(residual + product(0, x))
    inverse = 1 / np.sqrt(np.mean(total**2) + EPS[0])
    scaled = rounded(total * scales[0])
    bias = weights[1][3]
    gate, value = np.split((product(1, scaled) - bias) * inverse + bias, 2, axis=-1)
    inner = rounded(gate / (1 + np.exp(-gate)) * value)
    total = rounded(total + product(2, inner))
    scaled = rounded(total * scales[1])
    y = None
    if len(weights) > 3:
        bias = weights[3][3]
        y = (product(3, scaled) - bias) / np.sqrt(np.mean(total**2) + EPS[1]) + bias
    return total, scaled, y


def _run(cases, weights, x, residual, scales, config):
    """The kernel on the emulator, its outputs poisoned before: by name."""
    counters = np.zeros(len(cases), np.int32)
    arrays = [np.asarray(x), np.asarray(residual), counters]
    for place, (_, weight, *_) in enumerate(weights):
        own = [weight.packed, weight.scales, weight.codebook]
        own += [weight.bias] * (weight.bias is not None)
        own += [scales[place // 2]] * (place in (0, 2))
        arrays += [np.asarray(a) for a in own]
    outputs = {
        name: np.full(o.shape, np.nan, o.dtype) for name, o in chain._outputs(cases, config).items()
    }
    source = chain._writer(cases, config).write()
    operands = [*arrays, *outputs.values()]
    ptx_machine.run(source, operands, (1, 1), 32 * config.warps, cluster=config.programs)
    assert not counters.any(), "the next launch finds counters in use"
    return outputs


@pytest.mark.parametrize(
    ("bits", "uniform", "books", "config", "last", "bias"),
    [
        (1, False, (1, 2, 1, 3), ring.Config(2, 3), True, False),
        (1, False, (1, 1, 1, 1), ring.Config(3, 5), False, True),
        (4, False, (1, 2, 1, 3), ring.Config(2, 7), True, False),
        (4, True, (1, 1, 1, 1), ring.Config(4, 2), True, True),
        (2, False, (1, 4, 1, 1), ring.Config(3, 4), False, False),
        (8, True, (1, 2, 1, 3), ring.Config(4, 3), True, False),
        (8, False, (1, 1, 1, 1), ring.Config(4, 5), True, False),
    ],
)
def test_values_of_a_chain(rng, bits, uniform, books, config, last, bias):
    shapes = [(512, 512), (1024, 512), (512, 512), (96, 512)][: 4 if last else 3]
    weights = [
        _weight(rng, n, k, bits, b, uniform, bias) for (n, k), b in zip(shapes, books, strict=False)
    ]
    products = [case for case, *_ in weights]
    assert chain.unsupported_reason(products, config) is None
    cases = chain.cases(products, EPS, config)
    x, residual = (jnp.asarray(rng.normal(size=(1, 512)), HALF) for _ in range(2))
    scales = [jnp.asarray(rng.uniform(0.5, 2, 512), HALF) for _ in range(2)]
    found = _run(cases, weights, x, residual, scales, config)
    exact = [np.asarray(a, np.float64) for a in (x, residual)]
    total, scaled, y = _expected(weights, *exact, [np.asarray(s, np.float64) for s in scales])
    for name, value in (("sum2", total), ("scaled2", scaled), ("y3", y)):
        if value is not None:
            error = np.asarray(found[name], np.float64) - value
            assert np.sqrt(np.mean(error**2)) < 1e-2 * np.sqrt(np.mean(value**2)), name
    squares = np.asarray(found["squares_out2"], np.float64).sum()
    np.testing.assert_allclose(
        squares, np.sum(np.asarray(found["sum2"], np.float64) ** 2), rtol=1e-5
    )
