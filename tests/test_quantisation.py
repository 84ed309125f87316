"""Scales, codes and codebooks against the published rules; trees and modules."""

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
import rounding_bits
from flax import nnx
from flax.core import FrozenDict

import fdk_jax
from fdk_jax.format import codebooks, densities, dequantisation
from fdk_jax.format.packing import BITS
from fdk_jax.format.quantisation import DEFAULTS, resolve_scale
from fdk_jax.learning import training


def heavy_tailed(rng, shape, dtype="float32"):
    return (rng.standard_t(4, shape) * 0.02).astype(oracle.DTYPES[dtype])


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_rounding_gives_numpys_bits(rng, dtype):
    rounding_bits.check(rng, dtype, dequantisation.round_to)


@pytest.mark.parametrize("scale", ["absmean", "rms"])
def test_scales_of_huge_weights_are_finite(rng, scale):
    w = (rng.uniform(0.5, 1, (4, 128)) * 3e38).astype(np.float32)
    q = fdk_jax.quantise(w, 4, scale=scale)
    exact = w.reshape(4, 2, 64).astype(np.float64)
    exact = exact.mean(-1) if scale == "absmean" else np.sqrt((exact**2).mean(-1))
    np.testing.assert_allclose(np.asarray(q.scales, np.float64), exact, rtol=1e-6)
    small = fdk_jax.quantise(w * np.float32(2.0**-120), 4, scale=scale)
    np.testing.assert_array_equal(small.packed, q.packed)
    np.testing.assert_array_equal(small.scales, q.scales * np.float32(2.0**-120))


def test_every_width_has_a_codebook_by_default():
    assert {*DEFAULTS} == {*BITS}


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("dtype", sorted(oracle.DTYPES))
@pytest.mark.parametrize(("n", "k", "group"), [(6, 256, 64), (3, 130, 64), (5, 40, 8), (2, 7, 32)])
def test_published_rules_bit_for_bit(bits, dtype, n, k, group, rng):
    w = heavy_tailed(rng, (n, k), dtype)
    q = fdk_jax.quantise(w, bits, group_size=group, codebook="uniform")
    kind = "absmean" if bits <= 2 else "absmax"
    levels = np.linspace(-1, 1, 2**bits, dtype=np.float32)
    codes, scales = oracle.quantise(w, bits, group, levels, kind)
    assert q.scales.dtype == w.dtype
    assert (np.asarray(q.scales) == scales).all()
    assert (oracle.unpack(np.asarray(q.packed), bits, k) == codes).all()
    assert (np.asarray(q.codebook) == levels).all()


@pytest.mark.parametrize(
    ("bits", "levels", "kind"),
    [
        (8, codebooks.uniform(8), "absmax"),
        (4, codebooks.nf4(), "absmax"),
        (2, densities.cube_root(4, scale="rms"), "rms"),
        (1, codebooks.uniform(1), "absmean"),
    ],
    ids=lambda value: str(value) if isinstance(value, int | str) else "",
)
def test_the_default_is_named_by_width(bits, levels, kind, rng):
    w = heavy_tailed(rng, (6, 130))
    codes, scales = oracle.quantise(w, bits, 64, levels, kind)
    trained = training.fake_quantise(jnp.asarray(w), bits)
    layer = training.FakeQuantisedLinear(
        nnx.Linear(130, 6, rngs=nnx.Rngs(0)), "kn", bits=bits, group_size=64, codebook="auto",
        scale="auto", dtype=None, seed=0,
    )  # fmt: skip
    np.testing.assert_array_equal(layer.codebook.get_value(), levels)
    for q in (
        fdk_jax.quantise(w, bits),
        fdk_jax.quantise({"up": {"kernel": w.T}}, bits)["up"]["kernel"],
    ):
        assert (np.asarray(q.codebook) == levels).all() and (np.asarray(q.scales) == scales).all()
        assert (oracle.unpack(np.asarray(q.packed), bits, 130) == codes).all()
    np.testing.assert_array_equal(trained, fdk_jax.quantise(w, bits).dequantise())
    # A scale that is named is taken.
    named = np.asarray(fdk_jax.quantise(w, bits, scale="absmax").scales)
    np.testing.assert_array_equal(named[:, 0], np.abs(w[:, :64]).max(1))


@pytest.mark.parametrize("scale", ["absmax", "absmean", "rms", "none", "auto"])
@pytest.mark.parametrize("dtype", sorted(oracle.DTYPES))
@pytest.mark.parametrize("entries", [3, 16])
def test_given_codebooks_bit_for_bit(scale, dtype, entries, rng):
    w = rng.standard_normal((4, 128)).astype(oracle.DTYPES[dtype])
    levels = np.sort(rng.standard_normal(entries)).astype(np.float32)
    q = fdk_jax.quantise(w, 4, codebook=levels, scale=scale)
    codes, scales = oracle.quantise(w, 4, 64, levels, resolve_scale(scale, 4))
    assert (np.asarray(q.scales) == scales).all()
    assert (oracle.unpack(np.asarray(q.packed), 4, 128) == codes).all()
    assert np.asarray(q.codebook)[entries - 1 :].tolist() == [levels[-1]] * (17 - entries)


def test_a_tie_goes_to_the_lower_code():
    w = jnp.asarray([[-1.0, 0.0, 1.0, 0.0]], jnp.float32)
    q = fdk_jax.quantise(w, 1, group_size=4, scale="none")
    assert oracle.unpack(np.asarray(q.packed), 1, 4).tolist() == [[0, 0, 1, 0]]


def test_extremes_stay_finite(rng):
    for dtype in oracle.DTYPES.values():
        w = np.zeros((3, 128), dtype)
        w[1, :64] = np.finfo(np.float16).max / 2
        w[2] = np.float32(2e-24).astype(dtype)
        for bits in BITS:
            q = fdk_jax.quantise(w, bits)
            assert np.isfinite(np.asarray(q.dequantise()).astype(np.float32)).all()
            assert (np.asarray(q.scales).astype(np.float32) > 0).all()


@pytest.mark.parametrize("draw", ["standard_normal", "laplace", "student"])
@pytest.mark.parametrize("entries", [2, 4, 8, 16])
def test_kmeans_is_near_the_optimum(draw, entries, rng):
    sample = {
        "standard_normal": lambda: rng.standard_normal(200_000),
        "laplace": lambda: rng.laplace(size=200_000),
        "student": lambda: rng.standard_t(4, 200_000),
    }[draw]().astype(np.float32)
    found = rms_error(sample, np.asarray(codebooks.fit(sample, entries)))
    assert found <= 1.005 * optimal_rms(sample, entries)
    even = np.linspace(sample.min(), sample.max(), entries)
    assert found <= rms_error(sample, even)


def rms_error(sample, levels):
    middle = (levels[1:] + levels[:-1]) / 2
    return np.sqrt(np.mean((levels[np.searchsorted(middle, sample)] - sample.astype(float)) ** 2))


def optimal_rms(sample, entries, cells=1500):
    """Exact k-means of the sample reduced to equal-count cells: dynamic programming."""
    parts = np.array_split(np.sort(sample.astype(np.float64)), cells)
    mass = np.array([len(p) for p in parts], float)
    mean = np.array([p.mean() for p in parts])
    inside = sum(((p - p.mean()) ** 2).sum() for p in parts)
    m = np.concatenate([[0], np.cumsum(mass)])
    f = np.concatenate([[0], np.cumsum(mass * mean)])
    s = np.concatenate([[0], np.cumsum(mass * mean**2)])
    i, j = np.triu_indices(cells + 1, 1)
    cost = np.full((cells + 1, cells + 1), np.inf)
    cost[i, j] = (s[j] - s[i]) - (f[j] - f[i]) ** 2 / (m[j] - m[i])
    best = cost[0]
    for _ in range(entries - 1):
        best = (best[:, None] + cost).min(0)
    return np.sqrt((best[-1] + inside) / len(sample))


def test_kmeans_importance_and_determinism(rng):
    sample = rng.standard_normal(5000).astype(np.float32)
    importance = (sample > 1).astype(np.float32)
    weighted = np.asarray(codebooks.kmeans(sample, 2, importance=importance))
    alone = np.asarray(codebooks.kmeans(sample[sample > 1], 2))
    kept = sample[sample > 1]
    assert rms_error(kept, weighted) <= 1.01 * rms_error(kept, alone)
    assert (weighted == np.asarray(codebooks.kmeans(sample, 2, importance=importance))).all()
    assert (np.diff(weighted) >= 0).all()
    q = fdk_jax.quantise(
        sample.reshape(50, 100), 2, codebook="kmeans", importance=importance.reshape(50, 100)
    )
    q.validate()


def test_kmeans_beats_uniform_on_weights(rng):
    w = heavy_tailed(rng, (64, 512))
    for bits in BITS:
        even = fdk_jax.quantise(w, bits, codebook="uniform").dequantise() - w
        fitted = fdk_jax.quantise(w, bits, codebook="kmeans").dequantise() - w
        # At 1 bit and absmean scales the even levels -1, 1 are the optimum already.
        assert np.linalg.norm(fitted) < np.linalg.norm(even) * (1.0001 if bits == 1 else 1)


def test_kmeans_fits_the_weights_and_its_published_recipe_the_quotients(rng):
    """Each is the better one by its own measure, and the published one does not see the scales."""
    w = heavy_tailed(rng, (64, 512)) * np.exp(rng.normal(size=(64, 1)) * 2).astype(np.float32)
    w[:8] = 0
    for bits in BITS:
        ours, theirs = (
            fdk_jax.quantise(w, bits, codebook=name, scale="absmax")
            for name in ("kmeans", "kmeans-quotients")
        )
        errors = [np.asarray(q.dequantise()) - w for q in (ours, theirs)]
        assert np.linalg.norm(errors[0]) < np.linalg.norm(errors[1])
        scales = np.repeat(np.asarray(ours.scales), 64, axis=1)
        quotients = (w / scales).astype(np.float32)
        assert rms_error(quotients, np.asarray(theirs.codebook)) <= rms_error(
            quotients, np.asarray(ours.codebook)
        )
        alone = codebooks.fit(quotients, 2**bits)
        assert (np.asarray(theirs.codebook) == np.asarray(alone)).all()
        # The same error in every row's own unit is the same fit.
        again = fdk_jax.quantise(w * np.float32(2.0**40), bits, codebook="kmeans", scale="absmax")
        np.testing.assert_allclose(again.codebook, ours.codebook, rtol=1e-5, atol=1e-6)


def test_nf4_is_the_published_table():
    table = codebooks.nf4()
    assert table.shape == (16,) and table[7] == 0
    assert table[[0, 8, 14]].tolist() == pytest.approx([-1.0, 0.0795803, 0.7229568])
    assert (np.diff(table) > 0).all()


def test_measured_bytes(rng):
    for bits in BITS:
        q = fdk_jax.quantise(jnp.asarray(rng.standard_normal((256, 1024)), jnp.bfloat16), bits)
        assert q.bytes_per_weight == pytest.approx(bits / 8 + 2 / 64, rel=1e-2)
        assert f"{bits} bits" in repr(q) and "256x1024" in repr(q)


def params(rng):
    a = lambda *shape: jnp.asarray(rng.standard_normal(shape), jnp.float32)  # noqa: E731
    return {
        "params": {
            "embed_tokens": {"embedding": a(32, 64)},
            "layers": [
                {"q_proj": {"kernel": a(64, 128), "bias": a(128)}},
                {"up": {"weight": a(96, 64)}},
            ],
            "stacked": {"mlp": {"kernel": a(3, 64, 32)}},
            "attention": {"query": {"kernel": a(64, 4, 16)}, "out": {"kernel": a(4, 16, 64)}},
            "norm": {"scale": a(64)},
            "conv_in": {"kernel": a(3, 3, 8, 16)},
            "lm_head": {"kernel": a(64, 32)},
        }
    }


def test_trees_keep_their_structure_and_say_what_happened(rng):
    tree = params(rng)
    q = fdk_jax.quantise(tree, 8, group_size=32)
    inner = q["params"]
    assert inner["layers"][0]["q_proj"]["kernel"].axes == "kn"
    assert inner["layers"][1]["up"]["weight"].axes == "nk"
    assert inner["stacked"]["mlp"]["kernel"].batch_shape == (3,)
    assert inner["attention"]["query"]["kernel"].axes == "knn"
    assert inner["attention"]["out"]["kernel"].axes == "kkn"
    for kept in ("embed_tokens", "norm", "conv_in", "lm_head"):
        assert not any(
            map(fdk_jax.is_quantised, jax.tree.leaves(inner[kept], is_leaf=fdk_jax.is_quantised))
        )
    text = fdk_jax.summary(q)
    assert len(text.quantised) == 5 and len(text.kept) == 5
    assert text.bytes_after < text.bytes_before and "5 quantised, 5 kept" in str(text)
    back = fdk_jax.dequantise(q)
    assert jax.tree.structure(back) == jax.tree.structure(tree)
    for got, expected in zip(jax.tree.leaves(back), jax.tree.leaves(tree), strict=True):
        assert got.shape == expected.shape
        assert oracle.relative_rms(got, np.asarray(expected, np.float64)) < 0.01


def test_other_containers(rng):
    frozen = fdk_jax.quantise(FrozenDict(params(rng)), 4)
    assert isinstance(frozen, FrozenDict)
    state = fdk_jax.quantise(nnx.state(nnx.Linear(64, 8, rngs=nnx.Rngs(0))), 4)
    assert isinstance(state["kernel"], fdk_jax.QuantisedWeight)
    pair = fdk_jax.quantise(({"kernel": jnp.ones((64, 8))}, None), 4)
    assert isinstance(pair, tuple) and pair[1] is None


def test_skip_axes_and_codebooks_by_name(rng):
    tree = {"a": {"kernel": jnp.ones((64, 8))}, "b": {"kernel": jnp.ones((64, 8))}}
    q = fdk_jax.quantise(
        tree, 2, skip="^a$", axes={"b": "nk"}, codebook={"^b$": [-1, -0.5, 0.5, 1]}
    )
    assert not fdk_jax.is_quantised(q["a"]["kernel"])
    assert q["b"]["kernel"].axes == "nk"
    assert np.asarray(q["b"]["kernel"].codebook).tolist() == [-1, -0.5, 0.5, 1]


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda w: fdk_jax.quantise(w, 3), ValueError, "bits=3"),
        (lambda w: fdk_jax.quantise(w, 4, group_size=0), ValueError, "group_size"),
        (lambda w: fdk_jax.quantise(w, 4, scale="max"), ValueError, "scale='max'"),
        (lambda w: fdk_jax.quantise(w, 4, codebook="int4"), ValueError, "codebook='int4'"),
        (lambda w: fdk_jax.quantise(w, 2, codebook="nf4"), ValueError, "bits=4"),
        (lambda w: fdk_jax.quantise(w, 1, codebook=[0.0, 1.0, 2.0]), ValueError, "2 entries"),
        (lambda w: fdk_jax.quantise(w, 1, codebook=[1.0, 0.0]), ValueError, "ascend"),
        (lambda w: fdk_jax.quantise(w, 1, codebook=[0.0, np.nan]), ValueError, "finite"),
        (lambda w: fdk_jax.quantise(w.at[0, 0].set(np.nan), 4), ValueError, "NaN"),
        (
            lambda w: fdk_jax.quantise({"l": {"kernel": w.at[0, 0].set(np.inf)}}),
            ValueError,
            "l.kernel",
        ),
        (lambda w: fdk_jax.quantise(w.astype(jnp.int32), 4), TypeError, "int32"),
        (lambda w: fdk_jax.quantise(w, 4, axes="kkn"), ValueError, "too few axes"),
        (lambda w: fdk_jax.quantise(w, 4, axes="ab"), ValueError, "axes"),
        (lambda w: fdk_jax.quantise(w, 4, dtype=jnp.int8), TypeError, "dtype"),
        (lambda w: codebooks.kmeans(w[:0], 2), ValueError, "at least one"),
        (lambda w: codebooks.kmeans(w, 2, importance=w[:1]), ValueError, "importance"),
        (
            lambda w: codebooks.kmeans(w, 2, importance=-jnp.ones_like(w)),
            ValueError,
            "non-negative",
        ),
    ],
)
def test_bad_arguments_name_the_value(call, error, words):
    with pytest.raises(error, match=words):
        call(jnp.ones((4, 64)))


@pytest.mark.parametrize("codebook", ["uniform", "kmeans"])
def test_large_weights_are_quantised_in_blocks_of_rows(rng, monkeypatch, codebook):
    weight = jnp.asarray(rng.standard_normal((37, 96)), jnp.bfloat16)
    whole = fdk_jax.quantise(weight, 4, codebook=codebook)
    monkeypatch.setattr("fdk_jax.format.quantisation._BLOCK", 96 * 10)
    rows = fdk_jax.quantise(weight, 4, codebook=codebook)
    np.testing.assert_allclose(rows.codebook, whole.codebook, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(rows.scales, whole.scales)
    different = np.mean(np.asarray(rows.packed) != np.asarray(whole.packed))
    assert different == 0 if codebook == "uniform" else different < 0.01
    with pytest.raises(ValueError, match="NaN or infinity"):
        fdk_jax.quantise(weight.at[36, 5].set(jnp.inf), 4, codebook=codebook)


def test_which_codebooks_are_uniform():
    """Evenly spaced, 0 at a value or halfway between two: kernels compute such values from their codes."""
    codes = np.arange(16, dtype=np.float32)
    for even in (codebooks.uniform(8), codes, codes - 15, (codes - 8) / 7, (codes - 4.5) * 1e-3):
        assert codebooks.is_uniform(even)
    for uneven in (codes + 1, codes - 4.25, -codes, 0 * codes, 0 * codes + 2, codebooks.nf4()):
        assert not codebooks.is_uniform(uneven)
    assert not codebooks.is_uniform(np.stack([codes, codebooks.nf4()]))
    assert codebooks.is_uniform(np.stack([codes, codes - 8]))
    assert codebooks.is_uniform(np.asarray([3.0, 3.0], np.float32))


@pytest.mark.parametrize("dtype", sorted(oracle.DTYPES))
def test_a_codebook_is_rounded_by_what_no_compiler_takes_for_nothing(dtype, rng):
    """On a GPU XLA leaves out casts to a narrower type and back, unless something stands between them."""
    w = fdk_jax.quantise(rng.normal(size=(16, 128)).astype(np.float32), 1, dtype=jnp.dtype(dtype))
    for run in (lambda w: w.dequantise("float32"), lambda w: fdk_jax.matmul(jnp.ones((1, 128)), w)):
        assert ("optimization_barrier" in str(jax.make_jaxpr(run)(w))) == (dtype != "float32")
