"""Scales and levels that are learned for the error of a layer's outputs, against float64 twins."""

import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from flax import nnx

import fdk_jax
from fdk_jax.format import packing
from fdk_jax.learning import refitting
from fdk_jax.learning.calibration import calibrate
from fdk_jax.learning.fitting import calibrate_array

DAMPING = 0.05


def make_problem(rng, n=24, k=130):
    """A weight and strongly correlated inputs [tokens, K]."""
    w = (rng.standard_t(5, (n, k)) * 0.02).astype(np.float32)
    mix = rng.standard_normal((k, k)) * np.exp(-np.arange(k) / 25)[:, None]
    x = rng.standard_normal((6 * k, k)) @ mix + 0.05 * rng.standard_normal((6 * k, k))
    return w, x.astype(np.float32)


def moments(x):
    x = x.astype(np.float64)
    return x.T @ x / len(x)


def output_error(w, q, second, damping=0.0):
    d = np.asarray(w, np.float64) - np.asarray(q).astype(np.float64)
    return float(np.sum((d @ second) * d) + damping * np.diagonal(second).mean() * np.sum(d * d))


@pytest.mark.parametrize("rounding", ["nearest", "corrected"])
@pytest.mark.parametrize(
    ("bits", "dtype"), [(1, "bfloat16"), (2, "float16"), (4, "float32"), (8, "bfloat16")]
)
def test_learning_lowers_the_error_of_the_outputs(bits, dtype, rounding, rng):
    w, x = make_problem(rng)
    w, second = w.astype(oracle.DTYPES[dtype]), moments(x)
    options = dict(rounding=rounding, second_moment=second, damping=DAMPING)
    plain, learned = (calibrate_array(w, bits, learn=on, **options) for on in (False, True))
    learned.validate()
    before, after = (output_error(w, stored_weights(q), second, DAMPING) for q in (plain, learned))
    # Sweeps with refitted scales leave little to be learned.
    assert after < before * (0.97 if rounding == "nearest" and bits < 8 else 1)
    assert learned.dtype == w.dtype and (np.asarray(learned.scales).astype(np.float32) > 0).all()
    if bits < 8:
        levels = np.asarray(learned.codebook)
        assert (levels.astype(w.dtype).astype(np.float32) == levels).all()
        assert (np.diff(levels) >= 0).all() and (levels != np.asarray(plain.codebook)).any()


def stored_weights(q):
    """float64 [N, K] of the scales and levels as they are stored, in products of float32."""
    n, k = q.shape
    levels = np.asarray(q.codebook).astype(np.asarray(q.scales).dtype).astype(np.float64)
    codes = np.asarray(packing.unpack(q.packed, q.bits, k))
    rows = np.repeat(
        levels.reshape(-1, levels.shape[-1]), n // (levels.size // levels.shape[-1]), 0
    )
    wide = np.repeat(np.asarray(q.scales).astype(np.float64), min(q.group_size, k), axis=1)[:, :k]
    return wide * np.take_along_axis(rows, codes.astype(int), axis=1)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_quadratic_form_is_the_mean_square_of_the_outputs_error(dtype, rng):
    w, x = make_problem(rng)
    w = w.astype(oracle.DTYPES[dtype])
    q = calibrate_array(w, 2, second_moment=moments(x), learn=True)
    codes = packing.unpack(q.packed, 2, w.shape[1])
    found = refitting.output_error(
        jnp.asarray(w, jnp.float32),
        codes,
        q.scales.astype(jnp.float32),
        q.codebook,
        jnp.asarray(moments(x), jnp.float32),
        group_size=64,
        dtype=dtype,
    )
    error = x.astype(np.float64) @ (w.astype(np.float64) - stored_weights(q)).T
    assert found == pytest.approx(np.mean(np.sum(error**2, axis=1)), rel=1e-4)


def textbook(w, codes, scales, levels, second, group, turns):
    """Levels, then scales, of least error by least squares on a root of the moments; float64."""
    root = np.linalg.cholesky(second).T
    k, target = w.shape[1], w @ root.T
    for _ in range(turns):
        wide = np.repeat(scales, group, axis=1)[:, :k]
        parts = [((wide * (codes == code)) @ root.T).ravel() for code in range(len(levels))]
        levels = np.linalg.lstsq(np.stack(parts, 1), target.ravel(), rcond=None)[0]
        for row in range(len(w)):
            groups = np.zeros((scales.shape[1], k))
            groups[np.arange(k) // group, np.arange(k)] = levels[codes[row]]
            scales[row] = np.linalg.lstsq((groups @ root.T).T, target[row], rcond=None)[0]
    return np.repeat(scales, group, axis=1)[:, :k] * levels[codes]


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_what_is_learned_for_given_codes_is_their_optimum(bits, rng):
    w, x = make_problem(rng)
    second = moments(x) + 0.05 * np.diagonal(moments(x)).mean() * np.eye(w.shape[1])
    options = dict(group_size=32, second_moment=second, rounding="nearest", damping=1e-6)
    plain, learned = (calibrate_array(w, bits, learn=on, **options) for on in (False, True))
    codes = np.asarray(packing.unpack(plain.packed, bits, w.shape[1]))
    assert (codes == np.asarray(packing.unpack(learned.packed, bits, w.shape[1]))).all()
    start = (np.asarray(a, np.float64) for a in (plain.scales, plain.codebook))
    best = textbook(w.astype(np.float64), codes, *start, second, 32, turns=40)
    errors = [output_error(w, q, second) for q in (stored_weights(learned), best)]
    assert errors[1] < errors[0] < 1.03 * errors[1]  # turns end before the last percent
    assert errors[0] < 0.9 * output_error(w, stored_weights(plain), second)


def test_levels_that_change_places_take_their_codes_with_them(rng):
    w, x = make_problem(rng)
    scales, levels = (
        np.full((len(w), 3), 0.02, np.float32),
        np.array([-1, -0.3, 0.4, 1], np.float32),
    )
    codes = np.abs(w[..., None] / np.float32(0.02) - levels).argmin(-1)
    options = dict(group_size=64, dtype=jnp.float32)

    def refitted(codes):
        arrays = (codes.astype(np.uint8), scales, levels, moments(x).astype(np.float32))
        return map(np.asarray, refitting.refit_levels(*map(jnp.asarray, (w, *arrays)), **options))

    same, ascending = refitted(codes)
    turned, found = refitted(3 - codes)
    assert (same == codes).all() and (turned == codes).all() and (np.diff(found) > 0).all()
    np.testing.assert_allclose(found, ascending, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("bits", "options"),
    [
        (2, dict(codebook="uniform")),
        (1, dict(codebook="uniform")),
        (4, dict(codebook=np.arange(-8, 8) / 8)),
        (8, dict()),
        (4, dict(learn="scales")),
    ],
)
def test_levels_that_must_stay_stay_and_scales_are_learned(bits, options, rng):
    w, x = make_problem(rng)
    options = dict(second_moment=moments(x), rounding="nearest", scale="auto") | options
    plain = calibrate_array(w, bits, **options | dict(learn=False))
    learned = calibrate_array(w, bits, **dict(learn=True) | options)
    assert learned.uniform == plain.uniform
    np.testing.assert_array_equal(learned.codebook, plain.codebook)
    errors = [output_error(w, stored_weights(q), moments(x), DAMPING) for q in (plain, learned)]
    assert errors[1] < 0.99 * errors[0]


@pytest.mark.parametrize(
    ("codebook", "bits", "count"), [("fp4", 4, 15), ("ternary", 2, 3), ([-1, -0.2, 0.1, 0.5], 4, 4)]
)
def test_equal_levels_stay_equal(codebook, bits, count, rng):
    w, x = make_problem(rng)
    options = dict(second_moment=moments(x), codebook=codebook)
    plain, learned = (calibrate_array(w, bits, learn=on, **options) for on in (False, True))
    assert len(np.unique(learned.codebook)) == count
    errors = [output_error(w, stored_weights(q), moments(x), DAMPING) for q in (plain, learned)]
    assert errors[1] < 0.99 * errors[0]


def test_scales_of_none_stay_one(rng):
    w, x = make_problem(rng)
    q = calibrate_array(w * 50, 2, scale="none", second_moment=moments(x), learn=True)
    assert (np.asarray(q.scales) == 1).all()
    plain = calibrate_array(w * 50, 2, scale="none", second_moment=moments(x), sweeps=0)
    errors = [output_error(w * 50, stored_weights(a), moments(x)) for a in (plain, q)]
    assert errors[1] < 0.95 * errors[0]


def test_row_blocks_and_stacks_learn_each_by_itself(rng):
    w, x = make_problem(rng, n=8)
    second = moments(x)
    levels = np.array([[-1, -0.3, 0.2, 1], [-2, -0.5, 0.1, 2]], np.float32)
    options = dict(scale="auto", learn=True, group_size=500)
    both = calibrate_array(w, 2, codebook=levels, second_moment=second, **options)
    halves = [
        calibrate_array(h, 2, codebook=one, second_moment=second, **options)
        for h, one in zip((w[:4], w[4:]), levels, strict=True)
    ]
    assert (np.asarray(both.codebook) == np.stack([q.codebook for q in halves])).all()
    assert (oracle.weights(both) == np.concatenate([oracle.weights(q) for q in halves])).all()
    seconds = np.stack([second, np.diag(np.diagonal(second))])
    stack = calibrate_array(
        np.stack([w.T, w.T]), 2, axes="kn", second_moment=seconds, **options | dict(scale="search")
    )
    for made, one in zip(np.asarray(stack.dequantise()), seconds, strict=True):
        more = options | dict(scale="search", axes="kn", second_moment=one)
        np.testing.assert_array_equal(made, calibrate_array(w.T, 2, **more).dequantise())


@pytest.mark.parametrize("rounding", ["nearest", "corrected"])
def test_a_calibrated_layer_is_nearer_to_its_outputs(rounding, rng):
    w, x = make_problem(rng, k=96)
    model = nnx.Sequential(nnx.Linear(96, 24, rngs=nnx.Rngs(0)))
    model.layers[0].kernel.set_value(jnp.asarray(w.T))
    batches = [jnp.asarray(x)]
    options = dict(rounding=rounding, damping=1e-4)
    wanted = np.asarray(model(batches[0]), np.float64)

    def error(learn):
        made = calibrate(model, 2, batches, learn=learn, **options)
        return np.mean((np.asarray(made(batches[0])) - wanted) ** 2)

    plain, scales, both = (error(learn) for learn in (False, "scales", True))
    assert both < plain and scales < plain
    assert both < 0.97 * plain or rounding == "corrected"


def test_shared_levels_stay_shared_where_scales_are_learned(rng):
    layers = [nnx.Linear(40, 40, rngs=nnx.Rngs(i)) for i in range(2)]
    model, x = nnx.Sequential(*layers), jnp.asarray(rng.standard_normal((200, 40)), jnp.float32)
    made = calibrate(model, 2, [x], share="model", learn="scales")
    first, second = (layer.weight.get_value().codebook for layer in made.layers)
    np.testing.assert_array_equal(first, second)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (dict(learn="levels"), "learn='levels' is not False, True or 'scales'"),
        (dict(learn=2), "learn=2"),
        (dict(learn=True, second_moment=None), "give second_moment"),
        (dict(rounding="corrected", second_moment=None), "give second_moment"),
        (dict(rounding="up"), "rounding='up'"),
        (dict(learn="scales", scale="none"), "nothing to learn"),
        (
            dict(learn=True, scale="none", codebook="uniform"),
            "nothing to learn.*codebook='uniform'",
        ),
        (dict(learn=True, rounding="nearest", second_moment=-np.eye(64)), "mean of x x"),
    ],
)
def test_bad_options_of_a_matrix_name_the_value(options, words, rng):
    w = rng.standard_normal((4, 64)).astype(np.float32)
    with pytest.raises(ValueError, match=words):
        calibrate_array(w, 4, **dict(second_moment=np.eye(64)) | options)


@pytest.mark.parametrize(
    ("options", "words"),
    [(dict(batches=None), "give batches"), (dict(share="model"), "learn='scales'")],
)
def test_bad_options_of_a_model_name_the_remedy(options, words):
    model = nnx.Linear(8, 8, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match=words):
        fdk_jax.calibrate(model, 4, **dict(batches=[jnp.eye(8)], learn=True) | options)
