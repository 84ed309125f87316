"""Properties of the public surface over whatever a caller may pass: a right answer or a documented error.

`make fuzz` sets FDK_FUZZ_ROUNDS: so many times the examples that a property asks for, other ones in every run.
Without it a test looks at a few, always the same.
"""

import dataclasses
import tempfile
from pathlib import Path

import fuzzing
import hypothesis.extra.numpy as hnp
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import oracle
import pytest
from backends import BACKENDS, running
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

import fdk_jax
from fdk_jax import checkpoint
from fdk_jax.format import packing

DOCUMENTED = (TypeError, ValueError, NotImplementedError)
# Few sizes, so that programs are compiled once: 0, 1, primes, whole tiles and their neighbours.
SIZES = st.sampled_from([0, 1, 7, 16, 17, 64, 67, 129])
BITS = st.sampled_from(packing.BITS)
GROUPS = st.sampled_from([1, 3, 8, 24, 64, 128, 10**9])
FLOATS = st.sampled_from(sorted(oracle.DTYPES))
KEYS = st.text("abc._é/ ", min_size=1, max_size=4) | st.integers(-3, 3)


def examples(count: int):
    chosen = settings(
        max_examples=count if fuzzing.RANDOM else max(4, count // 8),
        deadline=None,
        suppress_health_check=list(HealthCheck),
        derandomize=not fuzzing.RANDOM,
        database=None,
    )
    return lambda test: fuzzing.in_rounds(chosen(test))


@st.composite
def unusual(draw, array: np.ndarray) -> np.ndarray:
    """The same numbers, held otherwise: strided, reversed, transposed, misaligned, read-only."""
    kind = draw(st.sampled_from(["plain", "strided", "reversed", "transposed", "misaligned"]))
    if kind == "strided":
        wide = np.zeros((*array.shape[:-1], array.shape[-1] * 3), array.dtype)
        wide[..., ::3] = array
        array = wide[..., ::3]
    elif kind == "reversed":
        array = array[::-1].copy()[::-1]
    elif kind == "transposed":
        array = np.ascontiguousarray(array.T).T
    elif kind == "misaligned":
        raw = np.zeros(array.nbytes + 1, np.uint8)
        raw[1:] = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
        array = raw[1:].view(array.dtype).reshape(array.shape)
    array.flags.writeable = draw(st.booleans())
    return array


@st.composite
def weights(draw, n=None, k=None) -> np.ndarray:
    """Finite weights [N, K]: normal, tiny, denormal, huge, constant rows, groups of zeros."""
    n, k = draw(SIZES) if n is None else n, draw(SIZES) if k is None else k
    dtype = oracle.DTYPES[draw(FLOATS)]
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    values = rng.standard_normal((n, k))
    kind = draw(
        st.sampled_from(["normal", "tiny", "denormal", "huge", "constant", "zeros", "mixed"])
    )
    limits = ml_dtypes.finfo(dtype)
    if kind == "tiny":
        values *= float(limits.tiny) * 4
    elif kind == "denormal":
        values *= float(limits.smallest_subnormal) * 3
    elif kind == "huge":
        values *= float(limits.max) / 1e3 / 8
    elif kind == "constant":
        values[:] = 0.37
    elif kind == "zeros":
        values[:, : k // 2] = 0
        values[n // 2 :] = 0
    elif kind == "mixed":
        values *= 10.0 ** rng.integers(-3, 3, (n, 1))
    return draw(unusual(values.astype(dtype)))


@examples(30)
@given(data=st.data(), bits=BITS, shape=st.lists(SIZES, min_size=1, max_size=3))
def test_pack_and_unpack_are_inverse_and_match_numpy(data, bits, shape):
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    codes = data.draw(unusual(rng.integers(0, 2**bits, shape, np.uint8)))
    packed = packing.pack(codes, bits)
    assert packed.shape == (*shape[:-1], -(-shape[-1] * bits // 8))
    assert np.array_equal(packing.unpack(packed, bits, shape[-1]), codes)
    if codes.size:
        rows = np.asarray(packed).reshape(-1, packed.shape[-1])
        assert np.array_equal(oracle.unpack(rows, bits, shape[-1]), codes.reshape(-1, shape[-1]))


@examples(60)
@given(
    codes=hnp.arrays(
        st.sampled_from([np.uint8, np.int8, np.int32, np.float32, np.bool_]),
        hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=9),
    ),
    bits=st.sampled_from([1, 2, 4, 8, 0, 3, -1, 16, 4.0, "4", None, True]),
)
def test_pack_of_anything(codes, bits):
    try:
        packed = packing.pack(codes, bits)
    except DOCUMENTED:
        return
    assert np.array_equal(packing.unpack(packed, bits, codes.shape[-1]), codes)


@examples(15)
@given(data=st.data(), w=weights(), bits=BITS, group=GROUPS)
@pytest.mark.parametrize("layout", ["planar", "tiled"])
def test_layouts_are_exact_inverses(layout, data, w, bits, group):
    q = fdk_jax.quantise(w, bits, group_size=group)
    backend = {"planar": "pallas", "tiled": "cpu"}[layout]
    there = fdk_jax.prepare(q, backend)
    there.validate()
    back = fdk_jax.prepare(there, "xla")
    assert np.array_equal(back.packed, q.packed)
    assert np.array_equal(back.scales, q.scales)


@examples(20)
@given(
    w=weights(),
    bits=BITS,
    group=GROUPS,
    codebook=st.sampled_from(["uniform", "kmeans", "normal"]),
    scale=st.sampled_from(["auto", "absmax", "absmean", "rms", "none"]),
)
def test_dequantised_weights_are_finite_and_as_the_oracle_says(w, bits, group, codebook, scale):
    try:
        q = fdk_jax.quantise(w, bits, group_size=group, codebook=codebook, scale=scale)
    except ValueError:
        # Nothing to fit, or a group too small for levels of a density.
        assert (codebook == "kmeans" and not w.size) or (codebook == "normal" and group < 4)
        return
    q.validate()
    values = np.asarray(fdk_jax.dequantise(q)).astype(np.float64)
    assert values.shape == w.shape
    expected = oracle.weights(q) if w.size else values
    top = float(ml_dtypes.finfo(w.dtype).max)
    tiny = float(ml_dtypes.finfo(w.dtype).tiny)
    fits = np.abs(expected) < top
    error = np.abs(values - expected)[fits]
    assert (error <= np.abs(expected[fits]) * 2.0**-7 + tiny).all()
    # Every value is a scale times a level, and a group of zeros has the smallest of scales.
    assert np.isfinite(np.asarray(q.scales).astype(np.float64)).all()


@examples(60)
@given(
    array=hnp.arrays(
        st.sampled_from([np.float32, np.float16, np.float64, np.int32, np.uint8, np.complex64]),
        hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=5),
    ),
    bits=st.sampled_from([1, 4, 3, 0, -4, 4.0, "4", None]),
    group=st.sampled_from([8, 64, 0, -8, 2.5, "64", None, 10**30]),
    codebook=st.sampled_from(
        [
            "uniform",
            "kmeans",
            "nf4",
            "median",
            None,
            (),
            (1.0,),
            (2.0, 1.0),
            (0.0, 0.0),
            (np.nan,) * 2,
        ]
    ),
    axes=st.sampled_from(["nk", "kn", "k", "", "xy", "kk", None, 7]),
)
def test_quantise_of_anything(array, bits, group, codebook, axes):
    """NaN, infinities, wrong dtypes, unsorted or empty codebooks, nonsense of every type."""
    codebook = np.asarray(codebook, np.float32) if isinstance(codebook, tuple) else codebook
    try:
        q = fdk_jax.quantise(array, bits, group_size=group, codebook=codebook, axes=axes)
    except DOCUMENTED as error:
        assert str(error)
        return
    q.validate()
    assert np.isfinite(array).all()
    assert fdk_jax.dequantise(q).shape == array.shape


@examples(12)
@given(data=st.data(), bits=BITS, group=st.sampled_from([8, 64, 128]), dtype=FLOATS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_products_of_any_shape_and_contents(backend, data, bits, group, dtype):
    """M, N and K of 0, 1 and primes; strided, misaligned and read-only x; constant and zero weights."""
    m, n, k = data.draw(st.sampled_from([0, 1, 3, 17])), data.draw(SIZES), data.draw(SIZES)
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    w = rng.standard_normal((n, k)).astype(oracle.DTYPES[dtype])
    if data.draw(st.booleans()):
        w[: n // 2] = 0
    q = fdk_jax.quantise(
        w, bits, group_size=group, codebook=data.draw(st.sampled_from(["uniform", "normal"]))
    )
    x = data.draw(unusual(rng.standard_normal((m, k)).astype(oracle.DTYPES[dtype])))
    with running(backend):
        y = fdk_jax.matmul(jnp.asarray(x), fdk_jax.prepare(q, backend), backend=backend)
    assert y.shape == (m, n)
    assert y.dtype == x.dtype
    assume(y.size)
    oracle.check_product(y, x, q)


@examples(12)
@given(data=st.data(), bits=BITS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_arbitrary_bits_of_x_and_scales_stay_in_their_row(backend, data, bits):
    """NaN, infinity and denormals in one row of x or of the scales never reach another."""
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    q = fdk_jax.quantise(rng.standard_normal((18, 67)).astype(np.float32), bits)
    x = rng.standard_normal((3, 67)).astype(np.float32)
    clean = oracle.product(x, q)
    x[1] = rng.integers(0, 2**32, 67, np.uint32).view(np.float32)
    scales = np.asarray(q.scales).copy()
    scales[5] = data.draw(st.sampled_from([np.nan, np.inf, -np.inf, 1e-42]))
    q = dataclasses.replace(q, scales=jnp.asarray(scales))
    with running(backend):
        y = fdk_jax.matmul(jnp.asarray(x), fdk_jax.prepare(q, backend), backend=backend)
    keep_rows, keep_columns = [0, 2], [n for n in range(18) if n != 5]
    got = np.asarray(y)[keep_rows][:, keep_columns]
    assert oracle.relative_rms(got, clean[keep_rows][:, keep_columns]) <= 1e-5


@examples(80)
@given(data=st.data())
def test_tensors_built_by_hand_are_right_or_refused(data):
    """Arrays and metadata that do not fit together, in every combination of wrong values."""
    q = fdk_jax.quantise(np.ones((8, 64), np.float32), 4)
    array = st.sampled_from(
        [np.uint8, np.int8, np.uint16, np.float32, np.float16, np.float64]
    ).flatmap(
        lambda dtype: hnp.arrays(
            dtype, st.sampled_from([(), (0,), (8, 1), (8, 32), (16,), (2, 16), (1, 4, 64), (8, 64)])
        )
    )
    wrong = {
        "packed": array.map(as_jax),
        "scales": array.map(as_jax),
        "codebook": array.map(as_jax),
        "bits": st.sampled_from([1, 2, 4, 8, 3, "4", None, 4.0]),
        "group_size": st.sampled_from([8, 64, 0, -1, 6.5, "64", True, 10**30]),
        "shape": st.sampled_from(
            [(8, 64), (64, 8), (8,), (), (-8, -64), (8.0, 64.0), (2**40, 2**40)]
        ),
        "axes": st.sampled_from(["nk", "kn", "", "nkk", "ab", "kk"]),
        "layout": st.sampled_from(["interchange", "planar", "tiled", "", None]),
        "uniform": st.sampled_from([True, False, None, "yes"]),
    }
    fields = data.draw(st.lists(st.sampled_from(sorted(wrong)), min_size=1, max_size=3))
    broken = dataclasses.replace(q, **{name: data.draw(wrong[name]) for name in fields})
    assert isinstance(repr(broken) if _shaped(broken) else "", str)
    try:
        broken.validate()
    except DOCUMENTED:
        with pytest.raises(DOCUMENTED):
            fdk_jax.matmul(jnp.ones((1, 64)), broken)
        return
    if not broken.batch_shape:
        y = fdk_jax.matmul(jnp.ones((1, broken.in_features)), broken)
        assert y.shape == (1, broken.out_features)


def as_jax(array: np.ndarray) -> jax.Array:
    with np.errstate(over="ignore"):
        return jnp.asarray(array)


def _shaped(w) -> bool:
    try:
        w.validate()
    except DOCUMENTED:
        return False
    return True


@examples(60)
@given(
    x=hnp.arrays(
        st.sampled_from([np.float32, np.float16, np.float64, np.int8, np.bool_]),
        st.sampled_from([(), (64,), (2, 64), (0, 64), (2, 63), (64, 2), (1, 1, 64)]),
    ),
    options=st.fixed_dictionaries(
        {},
        optional={
            "backend": st.sampled_from(["xla", "cpu", "pallas", "", "CPU", 3, None]),
            "bias": st.sampled_from(
                [None, np.ones(8, np.float32), np.ones(9, np.float32), np.ones(8), 1.0]
            ),
            "out_dtype": st.sampled_from(
                [None, "float32", "bfloat16", "int8", "nonsense", np.float64]
            ),
            "arithmetic": st.sampled_from(["exact", "int8", "int16", "", None, 8]),
        },
    ),
)
def test_matmul_of_anything(x, options):
    q = fdk_jax.quantise(np.ones((8, 64), np.float32), 4)
    try:
        y = fdk_jax.matmul(x, q, **options)
    except DOCUMENTED as error:
        assert str(error)
        return
    assert y.shape == (*x.shape[:-1], 8)
    assert x.dtype in (np.float32, np.float16)


LEAVES = st.one_of(
    st.none(),
    st.tuples(st.sampled_from([np.float32, np.int32, np.uint8, np.bool_]), SIZES).map(
        lambda t: jnp.zeros((t[1],), t[0])
    ),
    st.tuples(st.sampled_from([1, 7, 17]), st.sampled_from([1, 8, 67]), BITS).map(
        lambda t: fdk_jax.quantise(np.ones(t[:2], np.float32), t[2])
    ),
)
TREES = st.recursive(
    LEAVES,
    lambda inner: st.dictionaries(KEYS, inner, max_size=3) | st.lists(inner, max_size=3).map(tuple),
    max_leaves=6,
)


@examples(40)
@given(tree=TREES)
def test_trees_of_any_structure_come_back_from_checkpoints(tree):
    """Odd keys, empty containers, None, arrays of no elements; the file is equal or refused at once."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "tree"
        try:
            checkpoint.save(path, tree)
        except DOCUMENTED:
            assert not path.exists()
            return
        result = checkpoint.load(path, like=tree)
    assert jax.tree.structure(result) == jax.tree.structure(tree)
    for a, b in zip(jax.tree.leaves(result), jax.tree.leaves(tree), strict=True):
        assert a.dtype == b.dtype and np.array_equal(a, b)
