"""Scales, levels and codes of one matrix are fitted to data, against slow float64 twins."""

import jax.numpy as jnp
import numpy as np
import oracle
import pytest

import fdk_jax
from fdk_jax.format import codebooks
from fdk_jax.format.packing import BITS
from fdk_jax.learning import refitting, rounding
from fdk_jax.learning.fitting import calibrate_array


def make_problem(rng, n=24, k=130):
    """A weight, and second moments of strongly correlated inputs."""
    w = (rng.standard_t(5, (n, k)) * 0.02).astype(np.float32)
    mix = rng.standard_normal((k, k)) * np.exp(-np.arange(k) / 25)[:, None]
    x = rng.standard_normal((6 * k, k)) @ mix + 0.05 * rng.standard_normal((6 * k, k))
    return w, (x.T @ x / len(x)).astype(np.float32)


def output_error(w, q, second):
    d = np.asarray(w, np.float64) - np.asarray(q).astype(np.float64)
    return float(np.sum((d @ second.astype(np.float64)) * d))


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("group", [64, 50])
def test_scale_search_beats_every_rule_in_every_group(bits, group, rng):
    w, second = make_problem(rng)
    h = np.diagonal(second)
    levels = codebooks.uniform(bits) if bits > 1 else np.array([-0.7, 1.1], np.float32)

    def errors(scales):
        wide = np.repeat(np.asarray(scales, np.float64), group, 1)[:, : w.shape[1]]
        nearest = np.abs(w[..., None] / wide[..., None] - levels).argmin(-1)
        square = h * (w - wide * levels[nearest]) ** 2
        return np.stack([square[:, i : i + group].sum(1) for i in range(0, w.shape[1], group)], 1)

    kind = "absmean" if bits <= 2 else "absmax"
    base = fdk_jax.quantise(w, bits, group_size=group, codebook=levels, scale=kind).scales
    found = rounding.search_scales(
        jnp.asarray(w),
        base,
        jnp.asarray(levels),
        jnp.asarray(h)[None],
        group_size=group,
        dtype=jnp.float32,
    )
    best = np.min([errors(np.asarray(base) * m) for m in np.arange(0.4, 1.61, 0.05)], axis=0)
    assert (errors(found) <= best * 1.0001).all()
    assert errors(found).sum() < errors(base).sum() * (1 if bits < 8 else 1.0001)


@pytest.mark.parametrize("bits", [1, 2, 4])
@pytest.mark.parametrize("factor", [1 / 4, 4])
def test_scale_search_reaches_levels_of_any_size(bits, factor, rng):
    """Levels four times as small need scales four times as large: the same products, to rounding."""
    w, _ = make_problem(rng)
    levels = jnp.asarray(codebooks.uniform(bits))
    kind = "absmean" if bits <= 2 else "absmax"
    base = fdk_jax.quantise(w, bits, group_size=64, codebook="uniform", scale=kind).scales

    def error(levels):
        options = dict(group_size=64, dtype=jnp.float32)
        scales = rounding.search_scales(jnp.asarray(w), base, levels, None, **options)
        codes = rounding.nearest(jnp.asarray(w), scales, levels, **options)
        wide = np.repeat(np.asarray(scales), 64, 1)[:, : w.shape[1]]
        return np.linalg.norm(w - wide * np.asarray(levels)[np.asarray(codes)])

    # Strides are wider than multiples; what follows them refines the scale that they found.
    assert error(levels * jnp.float32(factor)) < 1.03 * error(levels)


def textbook_correction(w, scales, levels, second, damping, group):
    """Optimal brain quantisation in a fixed order, with an explicit inverse that shrinks; float64."""
    k = w.shape[1]
    h = second.astype(np.float64) + damping * np.mean(np.diagonal(second)) * np.eye(k)
    order = list(np.argsort(-np.diagonal(second), kind="stable"))
    w, codes = w.astype(np.float64).copy(), np.zeros(w.shape, np.int64)
    while order:
        i, rest = order[0], order[1:]
        inverse = np.linalg.inv(h[np.ix_(order, order)])
        s = scales[:, i // group].astype(np.float64)
        codes[:, i] = np.abs((w[:, i] / s)[:, None] - levels).argmin(-1)
        error = (w[:, i] - s * levels[codes[:, i]]) / inverse[0, 0]
        w[:, rest] -= np.outer(error, inverse[0, 1:])
        order = rest
    return codes


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("k", [40, 130])
def test_error_correction_is_gptq_on_any_codebook(bits, k, rng):
    w, second = make_problem(rng, k=k)
    levels = np.sort(rng.standard_normal(2**bits)).astype(np.float32)
    scales = np.asarray(fdk_jax.quantise(w, bits, group_size=32, codebook=levels).scales)
    got = rounding.corrected(
        jnp.asarray(w), jnp.asarray(scales), jnp.asarray(levels), jnp.asarray(second),
        group_size=32, dtype=jnp.float32, damping=0.01,
    )  # fmt: skip
    want = textbook_correction(w, scales, levels, second, 0.01, 32)
    wide = np.repeat(scales, 32, 1)[:, :k]
    ours, theirs = (output_error(w, wide * levels[np.asarray(c)], second) for c in (got, want))
    # A rounding that falls the other way in float32 changes what follows it; the quality stays.
    assert np.mean(np.asarray(got) == want) > 0.9
    assert ours == pytest.approx(theirs, rel=0.1)


@pytest.mark.parametrize(
    ("bits", "dtype"), [(1, "float32"), (2, "bfloat16"), (4, "float32"), (8, "float32")]
)
def test_each_step_lowers_the_output_error(bits, dtype, rng):
    # Enough weights for 256 levels: with a dozen for each the search often ends in a worse optimum.
    w, second = make_problem(rng, n=200)
    w = w.astype(oracle.DTYPES[dtype])
    options = dict(axes="nk", importance=np.diagonal(second))
    error = {
        "kmeans": fdk_jax.quantise(w, bits, codebook="kmeans"),
        "weighted": calibrate_array(w, bits, **options),
        "corrected": calibrate_array(w, bits, second_moment=second, sweeps=0, **options),
        "descended": calibrate_array(w, bits, second_moment=second, **options),
    }
    for q in error.values():
        q.validate()
        assert q.dtype == w.dtype and (np.asarray(q.scales).astype(np.float32) > 0).all()
    output = {name: output_error(w, oracle.weights(q), second) for name, q in error.items()}
    assert output["corrected"] < 0.8 * output["weighted"]
    assert output["descended"] < output["corrected"]
    # Without correlations, which the search does not see, its error is the least.
    alone = np.diag(np.diagonal(second))
    weighted = {name: output_error(w, oracle.weights(q), alone) for name, q in error.items()}
    assert weighted["weighted"] < 1.001 * weighted["kmeans"]


def descended(w, codes, scales, levels, second):
    """One sweep in float64, a column after the other."""
    values = scales * levels[codes]
    for i in range(w.shape[1]):
        pull = (w - values) @ second[:, i]
        best = values[:, i] + pull / second[i, i]
        codes[:, i] = np.abs((best / scales[:, i])[:, None] - levels).argmin(-1)
        values[:, i] = scales[:, i] * levels[codes[:, i]]
    return codes


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("k", [40, 130, 300])
def test_a_sweep_is_coordinate_descent(bits, k, rng):
    w, second = make_problem(rng, k=k)
    levels = np.sort(rng.standard_normal(2**bits)).astype(np.float32)
    scales = np.asarray(fdk_jax.quantise(w, bits, group_size=32, codebook=levels).scales)
    wide = np.repeat(scales, 32, 1)[:, :k].astype(np.float64)
    before = rng.integers(0, 2**bits, w.shape)
    got = np.asarray(
        rounding.descend(
            jnp.asarray(w), jnp.asarray(before, jnp.uint8), jnp.asarray(scales), jnp.asarray(levels),
            jnp.asarray(second), group_size=32, dtype=jnp.float32, damping=0.01,
        )
    )  # fmt: skip
    damped = second.astype(np.float64) + 0.01 * np.diagonal(second).mean() * np.eye(k)
    want = descended(w.astype(np.float64), before.copy(), wide, levels.astype(np.float64), damped)
    errors = [output_error(w, wide * levels[c], damped) for c in (before, got, want)]
    assert errors[1] < errors[0]
    # A rounding that falls the other way in float32 changes what follows it.
    assert np.mean(got == want) > 0.97
    assert errors[1] == pytest.approx(errors[2], rel=0.03)


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_refitted_levels_solve_the_normal_equations(bits, rng):
    w, second = make_problem(rng)
    n, k = w.shape
    scales = rng.uniform(0.02, 0.04, (n, -(-k // 32))).astype(np.float32)
    levels = np.sort(rng.standard_normal(2**bits)).astype(np.float32)
    wide = np.repeat(scales, 32, 1)[:, :k].astype(np.float64)
    codes = np.abs((w / wide)[..., None] - levels).argmin(-1)
    options = dict(group_size=32, dtype=jnp.float32)
    arrays = [jnp.asarray(codes, jnp.uint8), *map(jnp.asarray, (scales, levels, second))]
    new, found = map(np.asarray, refitting.refit_levels(jnp.asarray(w), *arrays, **options))
    parts = np.stack([wide * (codes == code) for code in range(2**bits)])
    pulled = parts @ second
    system = np.einsum("enk,fnk->ef", pulled, parts)
    wanted = np.linalg.solve(
        system + 1e-6 * np.trace(system) / 2**bits * np.eye(2**bits),
        np.einsum("enk,nk->e", pulled, w) + 1e-6 * np.trace(system) / 2**bits * levels,
    )
    assert (np.diff(found) > 0).all()
    np.testing.assert_allclose(found[new], wanted[codes], rtol=2e-3, atol=2e-4)


@pytest.mark.parametrize(("n", "k", "group"), [(37, 100, 32), (70, 192, 64), (5, 40, 64)])
def test_refitted_scales_solve_the_normal_equations(n, k, group, rng):
    w, second = make_problem(rng, n, k)
    groups, levels = -(-k // group), np.array([-1, -0.3, 0.3, 1])
    scales = rng.uniform(0.02, 0.08, (n, groups)).astype(np.float32)
    wide = np.repeat(scales, group, axis=1)[:, :k]
    codes = np.abs(w[..., None] / wide[..., None] - levels).argmin(-1)
    found = refitting.refit_scales(
        jnp.asarray(w),
        jnp.asarray(codes, jnp.uint8),
        jnp.asarray(scales),
        jnp.asarray(levels, jnp.float32),
        jnp.asarray(second),
        group_size=group,
        dtype=jnp.float32,
    )
    for row in range(n):
        parts = np.zeros((groups, k))  # what each group adds to the row at a scale of 1
        parts[np.arange(k) // group, np.arange(k)] = levels[codes[row]]
        system = parts @ second @ parts.T
        ridge = 1e-4 * np.trace(system) / groups
        residual = parts @ second @ w[row] - system @ scales[row]
        wanted = scales[row] + np.linalg.solve(system + ridge * np.eye(groups), residual)
        wanted = np.where(wanted > 0, wanted, scales[row])
        np.testing.assert_allclose(found[row], wanted, rtol=2e-4, atol=1e-6)


def test_row_blocks_keep_their_codebooks_and_stacks_their_matrices(rng):
    w, second = make_problem(rng, n=8)
    levels = np.stack([codebooks.uniform(2), 2 * codebooks.uniform(2)])
    options = dict(second_moment=second, scale="auto")
    both = calibrate_array(w, 2, codebook=levels, **options)
    halves = [
        calibrate_array(w[i * 4 : i * 4 + 4], 2, codebook=levels[i], **options) for i in range(2)
    ]
    assert (oracle.weights(both) == np.concatenate([oracle.weights(q) for q in halves])).all()
    stack = calibrate_array(
        np.stack([w.T, w.T * 2]), 4, axes="kn", second_moment=np.stack([second] * 2), scale="auto"
    )
    assert stack.batch_shape == (2,) and stack.dequantise().shape == (2, 130, 8)
    assert oracle.relative_rms(stack.dequantise()[1], w.T * 2) < 0.3


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (dict(importance=-np.ones(64)), "non-negative"),
        (dict(importance=np.ones(3)), r"importance of shape \(3,\)"),
        (dict(second_moment=np.ones((3, 3))), "second_moment of shape"),
        (dict(second_moment=np.full((64, 64), np.nan)), "NaN"),
        (dict(second_moment=-np.eye(64)), "positive definite"),
    ],
)
def test_bad_arrays_name_the_value(options, words):
    with pytest.raises(ValueError, match=words):
        calibrate_array(
            np.ones((4, 64), np.float32) * np.arange(1, 65, dtype=np.float32), 4, **options
        )
