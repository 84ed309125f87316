"""A QuantisedTensor where an array is expected, and models that hold some: printed, saved, exported."""

import pickle

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from flax import nnx, serialization

import fdk_jax
from fdk_jax.product import rows as product_rows


@pytest.fixture
def w(rng):
    return fdk_jax.quantise(rng.standard_normal((24, 64)).astype(np.float32), 4)


def test_products_and_views(w, rng):
    exact, x = oracle.weights(w), rng.standard_normal((3, 64)).astype(np.float32)
    close = lambda a, b: oracle.relative_rms(a, np.asarray(b, np.float64)) < 1e-5  # noqa: E731
    for product in (w @ x.T, w @ jnp.asarray(x).T, np.matmul(w, x.T)):
        assert isinstance(product, jax.Array) and close(product, exact @ x.T)
    for product in (x @ w.T, np.matmul(x, w.T)):
        assert isinstance(product, jax.Array) and close(product, x @ exact.T)
    assert close(np.ones((24, 64)) + w, 1 + exact)
    with pytest.raises(AttributeError, match=r"'reshape': fdk_jax\.matmul\(x, w\)"):
        w.reshape(-1)
    for product in (
        lambda x: x @ w.T,
        jax.jit(lambda x: x @ w.T),
        lambda x: jnp.dot(x, w.T),
        lambda x: jnp.einsum("mk,nk->mn", x, w),
    ):
        with pytest.warns(fdk_jax.UnfusedWarning, match=r"fdk_jax\.matmul\(x, w\)") as caught:
            assert close(product(jnp.asarray(x)), x @ exact.T)
        assert {warning.filename for warning in caught} == {__file__}
    assert close(fdk_jax.einsum("mk,nk->nm", jnp.asarray(x), w), exact @ x.T)
    assert close(np.asarray(w), exact) and close(w.dequantise(), exact)
    assert w.T.axes == "kn" and w.T.shape == (64, 24) and w.T.T.axes == "nk"
    assert w[...] is w and w[:] is w and len(w) == 24 and w.ndim == 2
    ids = jnp.asarray([[3, -1], [0, 23]])
    assert close(w[ids], exact[np.asarray(ids)]) and close(w[5], exact[5])
    assert close(w[2:4], exact[2:4])
    half = w.astype(jnp.bfloat16)
    assert fdk_jax.is_quantised(half) and half.dtype == jnp.bfloat16
    assert oracle.relative_rms(half.dequantise(), exact) < 1e-2
    with pytest.raises(ValueError, match="copy=False"):
        np.array(w, copy=False)
    stack = fdk_jax.quantise(rng.standard_normal((3, 16, 64)).astype(np.float32), 4, axes="bnk")
    assert stack[1].axes == "nk" and stack.batch_shape == (3,) and len(list(stack)) == 3
    with pytest.raises(ValueError, match="einsum"):
        _ = stack.T


@pytest.mark.parametrize("layout", ["interchange", "planar", "tiled"])
@pytest.mark.parametrize(("n", "k", "bits"), [(128, 128, 4), (70, 130, 2), (96, 64, 8)])
def test_rows_are_looked_up_in_any_layout(layout, n, k, bits, rng):
    w = fdk_jax.quantise(rng.standard_normal((n, k)).astype(np.float32), bits)
    ids = rng.integers(0, n, 7)
    assert (w.to_layout(layout)[jnp.asarray(ids)] == w.dequantise()[ids]).all()


def test_einsum_names_what_does_not_fit(rng):
    w = fdk_jax.quantise(rng.standard_normal((4, 64, 16)).astype(np.float32), 8, axes="nkn")
    x = jnp.ones((2, 64))
    assert fdk_jax.einsum("td,ndh->tnh", x, w).shape == (2, 4, 16)
    assert fdk_jax.einsum("...d,ndh->...hn", x, w, out_dtype=jnp.bfloat16).dtype == jnp.bfloat16
    with pytest.raises(ValueError, match=r"multiplied as 'bkn'.*quantised as 'nkn'.*axes="):
        fdk_jax.einsum("nd,ndh->nh", jnp.ones((4, 64)), w)
    with pytest.raises(TypeError, match="QuantisedTensor"):
        fdk_jax.einsum("td,ndh->tnh", x, jnp.ones((4, 64, 16)))
    with pytest.raises(TypeError, match="int32"):
        fdk_jax.einsum("td,ndh->tnh", jnp.ones((2, 64), jnp.int32), w)
    with pytest.raises(ValueError, match="two operands"):
        fdk_jax.einsum("td->t", x, w)


def test_numpy_saves_the_unpacked_weight(w, tmp_path):
    for save in (np.save, jnp.save):
        save(tmp_path / "w.npy", w)
        assert (np.load(tmp_path / "w.npy", allow_pickle=False) == np.asarray(w)).all()
    np.savez(tmp_path / "w.npz", w=w)
    assert (np.load(tmp_path / "w.npz", allow_pickle=False)["w"] == np.asarray(w)).all()


def model():
    return fdk_jax.quantise(
        nnx.Sequential(
            nnx.Linear(64, 32, rngs=nnx.Rngs(0)),
            jax.nn.gelu,
            nnx.Einsum("bk,kn->bn", (32, 16), rngs=nnx.Rngs(1)),
        )
    )


def test_models_are_printed():
    small = model()
    for shown in (small, small.layers[0], nnx.state(small), small.layers[0].weight):
        assert "bits" in repr(shown) and str(shown)
    nnx.display(small)
    layer = small.layers[0]
    assert layer.in_features == 64 and layer.out_features == 32 and layer.use_bias
    assert layer.kernel is layer.weight
    assert layer.kernel.T.axes == "nk"


def test_models_are_pickled_cloned_split_and_merged():
    small, x = model(), jnp.ones((2, 64))
    expected = small(x)
    graph, state = nnx.split(small)
    for other in (pickle.loads(pickle.dumps(small)), nnx.clone(small), nnx.merge(graph, state)):
        assert type(other.layers[2]) is type(small.layers[2])
        assert (other(x) == expected).all()
    assert isinstance(small.layers[2], nnx.Einsum)


def test_flax_serialization(w, rng):
    tree = {"layer": {"kernel": w}, "bias": jnp.ones(3)}
    data = serialization.to_bytes(tree)
    other = {"layer": {"kernel": fdk_jax.quantise(jnp.ones((24, 64)), 4)}, "bias": jnp.zeros(3)}
    back = serialization.from_bytes(other, data)
    assert repr(back["layer"]["kernel"]) == repr(w)
    assert (back["layer"]["kernel"].dequantise() == w.dequantise()).all()
    other["layer"]["kernel"] = fdk_jax.quantise(jnp.ones((24, 64)), 8)
    with pytest.raises(ValueError, match="bits"):
        serialization.from_bytes(other, data)


@pytest.mark.parametrize("backend", ["xla", "cpu"])
def test_export(w, backend):
    pytest.importorskip("flatbuffers", reason="jax.export serialises with flatbuffers")
    if backend == "cpu" and fdk_jax.product.cpu_backend.unavailable_reason():
        pytest.skip(f"no CPU library: {fdk_jax.product.cpu_backend.unavailable_reason()}")
    w, x = fdk_jax.prepare(w, backend), jnp.ones((2, 64))
    run = jax.jit(lambda x, w: fdk_jax.matmul(x, w))
    checks = [jax.export.DisabledSafetyCheck.custom_call("fdk_matmul")]
    data = jax.export.export(run, disabled_checks=checks)(x, w).serialize()
    again = jax.export.deserialize(data)
    assert (again.call(x, w) == run(x, w)).all()


@pytest.mark.parametrize("rows", [256, 300])
@pytest.mark.parametrize("dtype", ["int8", "uint8", "int16", "uint16"])
def test_narrow_indices_find_their_rows(dtype, rows, rng):
    """Bytes are tokens of some models; where they index a table of more rows they found NaN, or other rows."""
    table = fdk_jax.quantise(rng.standard_normal((rows, 64), np.float32), 8)
    ids = jnp.asarray([[1, 99], [127, 0]], dtype)
    expected = np.asarray(table.dequantise())[np.asarray(ids)]
    module = nnx.Embed(rows, 64, rngs=nnx.Rngs(0))
    module.embedding = nnx.Param(table.dequantise())
    small = fdk_jax.quantise(module, 8, axes={"embedding": "nk"})
    for w in (table, fdk_jax.prepare(table, "cpu")):
        found = {
            "index": w[ids],
            "take": fdk_jax.quantised_apply(lambda w, i: jnp.take(w, i, axis=0))(w, ids),
            "module": fdk_jax.prepare(small, "cpu")(ids),
            "model": product_rows.take_rows(w, ids, jnp.float32),
        }
        for name, got in found.items():
            np.testing.assert_allclose(got, expected, atol=2e-2, err_msg=name)


@pytest.mark.parametrize("dtype", ["int32", "bool", "complex64", "float8_e4m3fn"])
def test_other_dtypes_are_refused(w, dtype):
    """Scales of another kind made zeros of the weight."""
    with pytest.raises(TypeError, match=f"not {dtype}: fdk_jax.dequantise"):
        w.astype(dtype)
    assert w.astype(np.float64).dtype == jnp.float32  # as JAX's own arrays


def test_true_is_no_index(w):
    assert w[True].shape == (1, *w.shape)
