"""The Mosaic GPU kernel on a GPU, for one weight and for groups of rows: every element against float64."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import planar
import pytest

import fdk_jax
from fdk_jax.format import packing
from pallas_kernels import choice, grouped, mosaic_integers, mosaic_matmul
from pallas_kernels.case import Arrays, Case
from pallas_kernels.mosaic_matmul import Config
from pallas_kernels.target import current

if jax.default_backend() != "gpu" or not current().has_wgmma:
    pytest.skip("needs an NVIDIA GPU with wgmma (sm_90)", allow_module_level=True)


def _configs():
    """Widths with each configuration that a row of the table stands for."""
    half, found = jnp.dtype(jnp.bfloat16), set()
    for row in choice.table():
        if row["kernel"] == "mosaic":
            m, n, k, bits = (row[name] for name in ("m", "n", "k", "bits"))
            config = Config(**row["config"])
            if config == mosaic_matmul.ANY:
                case = Case(m, n, k, bits, 64, 1, half, half, None, half)
                config = mosaic_matmul.guess(case, current())
            found.add((bits, config))
    return sorted(found, key=str)


def _product(rng, m, n, k, bits, group, dtype, codebooks, bias, scales=None, **values):
    """Case, arrays, what the product should be, and the bias or None."""
    scales, uniform = jnp.dtype(scales or dtype), values.get("uniform", False)
    arrays, _, wanted = planar.product(
        rng, m, n, k, bits, group, dtype, codebooks, scale_dtype=scales, **values
    )
    added = jnp.asarray(rng.normal(size=n), dtype) if bias else None
    half = jnp.dtype(dtype)
    bias_dtype = half if bias else None
    case = Case(m, n, k, bits, group, codebooks, half, scales, bias_dtype, half, uniform)
    return case, Arrays(*arrays, added), wanted, added


def _poison():
    """Leaves NaN in the memory that the next output takes."""
    jnp.full(64 << 20, jnp.nan, jnp.bfloat16).block_until_ready().delete()


def _check(rng, m, n, k, bits, group, dtype, config, codebooks=1, bias=False, **values):
    case, arrays, wanted, added = _product(
        rng, m, n, k, bits, group, dtype, codebooks, bias, **values
    )
    reason = mosaic_matmul.unsupported_reason(case, config, current())
    assert reason is None, reason
    _poison()
    wanted.check(mosaic_matmul.matmul(case, config, arrays), added)


@pytest.mark.parametrize(("bits", "config"), _configs(), ids=str)
def test_tuned_configurations(rng, bits, config):
    """Ragged along every axis: a last program with few rows, few tokens, and a part of a slab."""
    k = 2048 * config.splits + 1032
    _check(rng, config.tokens + 3, config.rows + 72, k, bits, 64, "bfloat16", config, bias=True)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("bits", [1, 2, 4, 8])
@pytest.mark.parametrize("group", [8, 16, 32, 64, 128, 512])
def test_groups(rng, bits, group, dtype):
    _check(rng, 70, 264, 1544, bits, group, dtype, Config(64, 2, 1, 6, 2))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("scales", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize(
    ("bits", "group"), [(1, 128), (2, 128), (2, 1544), (4, 16), (4, 32), (4, 768), (8, 32)]
)
def test_groups_with_scales_of_their_own(rng, bits, group, scales, dtype):
    _check(rng, 70, 264, 1544, bits, group, dtype, Config(64, 2, 1, 6, 2), scales=scales)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("scale", [1.0, 1e-3])
@pytest.mark.parametrize(
    ("group", "config"),
    [
        (16, Config(64, 2, 1, 6, 2)),
        (64, Config(256, 2, 1, 4, 2, splits=2)),
        (64, Config(128, 1, 2, 8, 2)),
        (128, Config(64, 1, 4, 8, 2, splits=2)),
        (2056, Config(128, 2, 1, 4, 2, cluster=2)),
    ],
    ids=str,
)
@pytest.mark.parametrize("bits", [4, 8])
def test_evenly_spaced_values(rng, bits, group, config, scale, dtype):
    """A zero and a step for each codebook, any of the values or between two; 4 bits look them up."""
    shape = 70, 6 * config.rows, 2056, bits, group
    _check(rng, *shape, dtype, config, codebooks=6, bias=True, uniform=True, scale=scale)


@pytest.mark.parametrize(
    "config",
    [
        Config(16, 1, 4, 16, 2),
        Config(48, 1, 2, 8, 2),
        Config(64, 2, 2, 8, 2),
        Config(128, 2, 1, 4, 2, cluster=2),
        Config(256, 2, 1, 4, 2, cluster=2),
        Config(64, 1, 4, 8, 2, splits=2),
        Config(64, 2, 2, 8, 3, splits=2),
        Config(48, 2, 1, 8, 2, splits=2),
        Config(16, 2, 1, 8, 2, splits=2),
        Config(128, 2, 1, 8, 2, splits=2),
        Config(256, 2, 1, 4, 2, splits=2),
        Config(64, 1, 4, 8, 2),
        Config(112, 1, 2, 8, 2, cluster=2),
        Config(128, 3, 1, 8, 3),
        Config(96, 3, 1, 8, 3, splits=2),
        Config(64, 4, 1, 8, 3),
    ],
    ids=str,
)
@pytest.mark.parametrize("m", [1, 16, 131])
def test_configurations_with_codebooks_of_their_own(rng, config, m):
    n = 3 * config.rows
    _check(rng, m, n, 2056, 4, 64, "bfloat16", config, codebooks=3, bias=True)


@pytest.mark.parametrize("bits", [1, 4])
def test_the_same_bits_again_and_again(rng, bits):
    config = Config(64, 1, 4, 8, 2, splits=2)
    case, arrays, *_ = _product(rng, 64, 512, 4096, bits, 64, "bfloat16", 1, False)
    first = np.asarray(mosaic_matmul.matmul(case, config, arrays)).view(np.uint16)
    for _ in range(100):
        again = np.asarray(mosaic_matmul.matmul(case, config, arrays)).view(np.uint16)
        np.testing.assert_array_equal(first, again)


_PERSISTENT = [
    Config(256, 2, 1, 4, 2),
    Config(192, 2, 1, 4, 2),
    Config(128, 2, 1, 8, 2),
    Config(128, 3, 1, 4, 2),
    Config(64, 4, 1, 6, 2),
]
# Tiles along M and N, and programs: more than tiles, and fewer, with and without a rest to share.
_SHARED = [(1, 3, 7), (2, 3, 4), (3, 3, 2), (1, 1, 4), (5, 29, 132), (2, 20, 128)]


@pytest.mark.parametrize(
    ("config", "tiles_m", "tiles_n", "programs"),
    [(_PERSISTENT[0], *shared) for shared in _SHARED]
    + [(config, *shared) for config in _PERSISTENT[1:] for shared in _SHARED[:2]],
    ids=str,
)
@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_persistent_programs(rng, bits, config, tiles_m, tiles_n, programs):
    """Ragged along every axis."""
    m, n = tiles_m * config.tokens - 3, tiles_n * config.rows - 56
    k = 9224 if programs > 100 else 3080
    config = dataclasses.replace(config, programs=programs)
    _check(rng, m, n, k, bits, 64, "bfloat16", config, bias=True)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("group", [16, 128, 3080])
@pytest.mark.parametrize("uniform", [False, True])
def test_persistent_programs_of_other_groups(rng, group, dtype, uniform):
    config = Config(256, 2, 1, 4, 2, programs=5)
    _check(rng, 300, 520, 3080, 8, group, dtype, config, uniform=uniform)


@pytest.mark.parametrize("bits", [1, 4, 8])
@pytest.mark.parametrize(("n", "programs"), [(6144, 131), (14336, 132)])
def test_persistent_programs_give_the_same_bits_again_and_again(rng, bits, n, programs):
    """Flags are zero again after each launch, and the order of sums does not depend on who comes first."""
    config = Config(256, 2, 1, 4, 2, programs=programs)
    case, arrays, wanted, added = _product(rng, 512, n, 4096, bits, 64, "bfloat16", 1, False)
    assert mosaic_matmul.unsupported_reason(case, config, current()) is None
    first = mosaic_matmul.matmul(case, config, arrays)
    wanted.check(first, added)
    first = np.asarray(first).view(np.uint16)
    for _ in range(100):
        again = np.asarray(mosaic_matmul.matmul(case, config, arrays)).view(np.uint16)
        np.testing.assert_array_equal(first, again)


@pytest.mark.parametrize("config", [None, *(config for _, config in grouped._CONFIGS)], ids=str)
@pytest.mark.parametrize(
    ("bits", "sizes", "past"),
    [
        (4, [3, 0, 1, 7, 2], 2),
        (1, [0, 0, 300, 0, 0, 1], 0),
        (2, [0, 0, 0], 20),
        (8, [16, 16, 0, 48, 1] * 13, 9),
    ],
)
def test_grouped(rng, bits, sizes, past, config):
    n, k, groups, rows = 200, 520, len(sizes), sum(sizes) + past
    products = [_product(rng, 1, n, k, bits, 64, "bfloat16", 1, True) for _ in sizes]
    stacked = jax.tree.map(lambda *a: jnp.stack(a), *(arrays for _, arrays, *_ in products))
    x = jnp.asarray(rng.normal(size=(rows, k)), jnp.bfloat16)
    spec = dict(bits=bits, group_size=64, out_features=n, out_dtype=jnp.bfloat16)
    stacked = stacked._replace(x=x)
    case = Case.of(stacked, **spec)
    config = config or grouped.configuration(case, groups, current())[0]
    _poison()
    y, start = mosaic_matmul.matmul(case, config, stacked, jnp.asarray(sizes, jnp.int32)), 0
    for (*_, wanted, added), count in zip(products, sizes, strict=True):
        here = slice(start, start + count)
        dataclasses.replace(wanted, x=np.asarray(x[here])).check(y[here], added)
        start += count
    assert not np.asarray(y[start:]).any()


def _integer_product(rng, m, n, k, bits, group, dtype, codebooks=1, scales=None):
    """Case, arrays, what integers of both sides should give, and the exact product.

    The integers are what the library makes of x and of the scales, see tests/test_mosaic.py; the codes are
    looked up here.
    """
    case, arrays, wanted, added = _product(
        rng, m, n, k, bits, group, dtype, codebooks, True, scales
    )
    made, factors = mosaic_integers.rounded(case, arrays, m)
    of_x, of_rows = (np.asarray(a, np.float64) for a in factors)
    x = np.asarray(made.x, np.float64).reshape(m, -1, 2, 4, 4).swapaxes(2, 3).reshape(m, k)
    x *= of_x[:, None]
    assert np.all(np.abs(x - np.asarray(wanted.x, np.float64)) <= 0.501 * of_x[:, None])
    by_row = np.asarray(made.scales, np.float64).reshape(case.tiles, -1, 8, 4, 2)
    by_row = by_row.transpose(0, 4, 2, 1, 3).reshape(16 * case.tiles, -1)[:n]
    packed, _ = packing.from_planar(
        arrays.packed, arrays.scales, bits=bits, group_size=group, out_features=n, in_features=k
    )
    codes, which = np.asarray(packing.unpack(packed, bits, k)), np.arange(n) * codebooks // n
    values = np.asarray(made.codebook, np.float16).astype(np.float64)[which[:, None], codes]
    weight = np.rint(values * np.repeat(by_row, group, 1)[:, :k]) * of_rows[:n, None]
    return (
        case,
        arrays,
        dataclasses.replace(wanted, x=x, matrices=[weight], bits=8),
        added,
    )


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
@pytest.mark.parametrize(
    ("m", "n", "k", "group", "dtype", "config", "kind"),
    [
        (300, 520, 2048, 64, "bfloat16", None, {}),
        (70, 264, 1056, 32, "float16", Config(64, 2, 1, 6, 2), {}),
        (513, 512, 4096, 512, "bfloat16", Config(128, 2, 1, 4, 2), dict(codebooks=2)),
        (257, 136, 1568, 8, "bfloat16", Config(256, 2, 1, 3, 2), dict(scales="float32")),
        (1, 128, 256, 128, "float16", Config(16, 2, 1, 6, 2), dict(scales="bfloat16")),
    ],
)
def test_integers(rng, bits, m, n, k, group, dtype, config, kind):
    case, arrays, wanted, added = _integer_product(rng, m, n, k, bits, group, dtype, **kind)
    config = config or mosaic_integers.guess(case, current())
    if (reason := mosaic_integers.unsupported_reason(case, config, current())) is not None:
        pytest.skip(reason)
    _poison()
    wanted.check(mosaic_integers.matmul(case, config, arrays), added)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_integers_of_a_row_that_is_not_finite(rng, value):
    case, arrays, *_ = _integer_product(rng, 300, 264, 1056, 4, 64, "bfloat16")
    config = mosaic_integers.guess(case, current())
    arrays = arrays._replace(x=arrays.x.at[7, 100].set(value))
    y = np.asarray(mosaic_integers.matmul(case, config, arrays), np.float32)
    np.testing.assert_array_equal(np.isfinite(y).all(1), np.arange(300) != 7)
    assert not np.isfinite(y[7]).any()


@pytest.mark.parametrize("bits", [1, 4])
def test_integers_by_the_library(rng, bits):
    weight = jnp.asarray(rng.normal(size=(512, 2048)), jnp.bfloat16)
    w = fdk_jax.prepare(fdk_jax.quantise(weight, bits), "pallas")
    x = jnp.asarray(rng.normal(size=(2, 256, 2048)), jnp.bfloat16)
    told = fdk_jax.explain(x, w, backend="pallas", arithmetic="int8")
    assert told.kernel.startswith("mosaic_integers")
    y = fdk_jax.matmul(x, w, backend="pallas", arithmetic="int8").astype(jnp.float32)
    exact = fdk_jax.matmul(x, w, backend="pallas").astype(jnp.float32)
    assert 0 < jnp.linalg.norm(y - exact) < 0.02 * jnp.linalg.norm(exact)


def _off(right, row):
    """A kernel that is half a percent off everywhere, or by a percent in one row of the weight."""

    def wrong(case, *arguments):
        y = right(case, *arguments).astype(jnp.float32)
        largest = jnp.argmax(jnp.abs(y).sum(0))
        factor = jnp.where(jnp.arange(y.shape[1]) == largest, 1.01, 1.0) if row else 1.005
        return (y * jnp.broadcast_to(factor, y.shape)).astype(case.out_dtype)

    return wrong


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("row", [False, True])
def test_a_kernel_that_is_off_fails(rng, row, dtype, monkeypatch):
    monkeypatch.setattr(mosaic_matmul, "matmul", _off(mosaic_matmul.matmul, row))
    with pytest.raises(AssertionError, match="worst element"):
        _check(rng, 70, 264, 1544, 4, 64, dtype, Config(64, 2, 1, 6, 2))


@pytest.mark.parametrize("row", [False, True])
def test_an_integer_kernel_that_is_off_fails(rng, row, monkeypatch):
    monkeypatch.setattr(mosaic_integers, "matmul", _off(mosaic_integers.matmul, row))
    with pytest.raises(AssertionError, match="worst element"):
        test_integers(rng, 4, 300, 520, 2048, 64, "bfloat16", None, {})
