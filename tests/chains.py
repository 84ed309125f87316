"""Chains of products for the tests of `pallas_kernels.chain`, with their float64 oracle."""

import jax.numpy as jnp
import numpy as np
import oracle
import planar

from fdk_jax.benchmark import accuracy
from pallas_kernels.case import Arrays, Case

HALF = jnp.dtype(jnp.bfloat16)
EPS = (1e-3, 2e-3)


def weight(rng, n, k, bits, codebooks, uniform, bias, group_size, scales):
    """(case, arrays, matrices as kernels may read them, bias) of a product, the last two in float64."""
    (_, *arrays), _, wanted = planar.product(
        rng, 1, n, k, bits, group_size, "bfloat16", codebooks, k**-0.5, uniform, scales
    )
    added = jnp.asarray(rng.normal(size=n), HALF) if bias else None
    kinds = HALF, jnp.dtype(scales), HALF if bias else None, HALF
    case = Case(1, n, k, bits, group_size, codebooks, *kinds, uniform)
    exact = np.zeros(n) if added is None else np.asarray(added, np.float64)
    matrices = wanted.matrices
    if group_size < 32:  # scales multiply weights
        matrices = [*matrices, *(oracle.rounded(m, HALF) for m in matrices)]
    return case, Arrays(jnp.zeros((1, k), HALF), *arrays, added), matrices, exact


def weights(rng, shapes, bits, codebooks, uniform, bias, group_size=64, scales="bfloat16"):
    """Those of a chain: out, gate and up, down, and the next qkv or not; `scales` is their dtype."""
    rows = zip(shapes, codebooks, strict=False)
    kind = uniform, bias, group_size, scales
    return [weight(rng, n, k, bits, b, *kind) for (n, k), b in rows]


def inputs(rng, k, hidden):
    """X [1, K], the residual stream [1, D] and the scales [D] of the two norms."""
    x, residual = (jnp.asarray(rng.normal(size=(1, size)), HALF) for size in (k, hidden))
    return x, residual, [jnp.asarray(rng.uniform(0.5, 2, hidden), HALF) for _ in range(2)]


def _exact(a):
    return np.asarray(a, np.float64)


def _product(weights, index, x, reading, inverse=1.0):
    return x @ weights[index][2][reading].T * inverse + weights[index][3]


def inverse_norm(total, eps):
    """One over the root of a row's mean square."""
    return 1 / np.sqrt(np.mean(total**2) + eps)


def check(found, weights, x, residual, scales, between=None):
    """Compares what a chain leaves (total, scaled, squares, y or None) with float64.

    What is in between is rounded as the kernels leave it; y is compared with the product of what they left.
    """

    def rounded(a):
        return _exact(jnp.asarray(a, HALF))

    def error(reading):
        """By the norm: all is read in one way, as the kernels do."""
        total = rounded(_exact(residual) + _product(weights, 0, _exact(x), reading))
        scaled, inverse = rounded(total * first), inverse_norm(total, EPS[0])
        gate, value = np.split(_product(weights, 1, scaled, reading, inverse), 2, axis=-1)
        inner = rounded(gate / (1 + np.exp(-gate)) * value)
        wanted = total + _product(weights, 2, inner, reading)
        return _norm_of_error(found[0], wanted, inner, weights[2][2][reading])

    first, second = map(_exact, scales)
    if between is None:
        # What comes before was rounded, and may have gone to the other neighbour element by element. Half a
        # percent too much is still found: what bfloat16 rounds has a norm of 0.2 to 0.3%.
        assert min(map(error, range(len(weights[0][2])))) < 4.5e-3
    else:  # what the kernel left in between: each product is compared from what it was given
        check_product(between["sum0"], _exact(x), weights[0], add=_exact(residual))
        total, scaled = _exact(between["sum0"]), _exact(between["scaled0"])
        planar.check_scaled([between[f"{n}0"] for n in ("sum", "scaled", "squares_out")], first)
        inner = _exact(between["y1"])
        check_gated(inner, scaled * inverse_norm(total, EPS[0]), weights[1])
        check_product(found[0], inner, weights[2], add=total)
    planar.check_scaled(found[:3], second)
    total, scaled, _ = map(_exact, found[:3])
    assert (found[3] is None) == (len(weights) < 4)
    if len(weights) > 3:
        check_product(found[3], scaled * inverse_norm(total, EPS[1]), weights[3])


def check_devices(found, weights, xs, residual, scales):
    """Compares what each device leaves: sums are of all of them, gate, up and the next queries its own."""
    first, second = map(_exact, scales)
    sums = [_exact(residual)]
    for index, inputs in ((0, [_exact(x) for x in xs]), (2, [_exact(f["y1"]) for f in found])):
        parts = [own[index] for own in weights]
        joined = [
            np.concatenate(matrices, axis=1)
            for matrices in zip(*(part[2] for part in parts), strict=True)
        ]
        whole = (*parts[0][:2], joined, np.zeros(1))
        got = found[0][f"sum{index}"]
        check_product(got, np.concatenate(inputs, axis=1), whole, add=sums[-1])
        sums.append(_exact(got))
    for left, own in zip(found, weights, strict=True):
        for index, scale in ((0, first), (2, second)):
            names = [f"{n}{index}" for n in ("sum", "scaled", "squares_out")]
            planar.check_scaled([left[name] for name in names], scale)
        scaled, inverse = _exact(left["scaled0"]), inverse_norm(sums[1], EPS[0])
        check_gated(left["y1"], scaled * inverse, own[1])
        check_product(left["y3"], _exact(left["scaled2"]) * inverse_norm(sums[2], EPS[1]), own[3])


def check_product(got, x, weight, add=0.0):
    """Compares x @ matrix.T + bias + add, for the matrix of those that a kernel may read that fits best."""
    oracle.check(got, [e.then(add=add) for e in _expectations(x, weight)])


def check_gated(got, x, weight):
    """Compares the SiLU of the first half of x @ matrix.T + bias times the second half."""
    expected = []
    for both in _expectations(x, weight):
        parts = (np.split(a, 2, axis=-1) for a in (both.value, both.slack, both.noise))
        (gate, up), slacks, noises = parts
        silu = gate / (1 + np.exp(-gate))
        # The slope of SiLU is 1.1 at most; its powers and quotients are approximate.
        slack = 1.1 * slacks[0] * np.abs(up) + slacks[1] * np.abs(silu) + 1e-6 * np.abs(silu * up)
        noise = np.hypot(1.1 * noises[0] * up, noises[1] * silu)
        expected.append(accuracy.Expected.of(silu * up, slack, noise))
    oracle.check(jnp.asarray(got, HALF), expected)


def _expectations(x, weight):
    """What x @ matrix.T + bias may be, for each matrix that a kernel may read."""
    case, _, matrices, bias = weight
    found = []
    for matrix in matrices:
        value, size = x @ matrix.T + bias, np.sqrt(x**2 @ (matrix**2).T)
        noise, slack = 2.0**-12 * size, 0.0
        if _of_integers(case):
            noise, slack = planar.of_integers(x, matrix, quarters=case.bits < 4)
        slack = slack + 1e-5 * (size + np.abs(value))
        found.append(accuracy.Expected.of(value, slack, noise))
    return found


def _of_integers(case):
    """Whether activations become integers."""
    return case.bits == 1 or (
        case.bits in (2, 4) and case.uniform and case.group_size >= 32 and case.k % 512 == 0
    )


def _norm_of_error(got, value, x, matrix):
    size = np.sqrt(x**2 @ (matrix**2).T)
    return np.linalg.norm(_exact(got) - value) / np.linalg.norm(np.maximum(size, np.abs(value)))
