"""Bad calls are refused before any kernel starts, with the value and the remedy."""

import dataclasses
import unittest.mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fdk_jax
from fdk_jax.product import cpu_backend

W = fdk_jax.quantise(jnp.ones((8, 64), jnp.float32), 4)
X = jnp.ones((2, 64))


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: fdk_jax.matmul(X[:, :63], W), ValueError, "K=64"),
        (lambda: fdk_jax.matmul(jnp.float32(1), W), ValueError, "K=64"),
        (lambda: fdk_jax.matmul(X.astype(jnp.int32), W), TypeError, "int32"),
        (lambda: fdk_jax.matmul(np.ones((2, 64)), W), TypeError, "float64"),
        (lambda: fdk_jax.matmul([1.0], W), TypeError, "list"),
        (lambda: fdk_jax.matmul(X, jnp.ones((64, 8))), TypeError, "QuantisedTensor"),
        (lambda: fdk_jax.matmul(X, W, backend="cuda"), ValueError, "backend='cuda'"),
        (lambda: fdk_jax.matmul(X, W, bias=jnp.ones(9)), ValueError, r"\[8\]"),
        (lambda: fdk_jax.matmul(X, W, bias=jnp.ones(8, jnp.int32)), ValueError, "int32"),
        (lambda: fdk_jax.matmul(X, W, out_dtype=jnp.int8), TypeError, "out_dtype"),
        (lambda: fdk_jax.matmul(X, W, arithmetic="int4"), ValueError, "int4"),
        (lambda: fdk_jax.matmul(X, W, arithmetic="int8"), NotImplementedError, 'backend="cpu"'),
        (lambda: fdk_jax.matmul(X, W, backend="pallas"), ValueError, "NVIDIA GPU"),
        (lambda: fdk_jax.quantise(np.full((8, 64), 1e39)), ValueError, "infinity"),
        (lambda: fdk_jax.prepare(W, "tpu"), ValueError, "backend='tpu'"),
        (lambda: fdk_jax.explain(X, W, backend="tpu"), ValueError, "backend='tpu'"),
        (lambda: fdk_jax.explain(X[:, :63], W), ValueError, "K=64"),
        (lambda: fdk_jax.matmul(X, stacked()), ValueError, "stack"),
        (lambda: fdk_jax.matmul(X, jax.tree.map(jnp.float32, W)), TypeError, "scales alone"),
        (
            lambda: fdk_jax.matmul(X, jax.tree.map(jnp.bfloat16, W)),
            TypeError,
            r"w\.astype\(dtype\)",
        ),
        (lambda: fdk_jax.checkpoint.save("never.fdk", {"step": 3}), TypeError, "step is a int"),
    ],
)
def test_matmul_and_friends(call, error, words):
    with pytest.raises(error, match=words):
        call()


def stacked():
    return jax.tree.map(lambda a: jnp.stack([a, a]), W)


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        (dict(packed=W.packed[:, :-1]), ValueError, "packed.shape"),
        (dict(packed=W.packed[:-1]), ValueError, "packed.shape"),
        (dict(packed=W.packed.astype(jnp.int32)), TypeError, "int32"),
        (dict(scales=jnp.ones((8, 2))), ValueError, "scales.shape"),
        (dict(scales=jnp.ones((8, 1), jnp.int8)), TypeError, "scales"),
        (dict(codebook=jnp.ones(15)), ValueError, "codebook.shape"),
        (dict(codebook=jnp.ones((3, 16))), ValueError, "3 codebooks"),
        (dict(codebook=jnp.linspace(1, 0, 16)), ValueError, "ascending"),
        (dict(codebook=jnp.full(16, jnp.nan)), ValueError, "finite"),
        (dict(codebook=jnp.ones(16, jnp.bfloat16)), TypeError, "float32"),
        (dict(bits=5), ValueError, "bits=5"),
        (dict(bits=4.0), ValueError, "bits=4.0"),
        (dict(bits=True, codebook=jnp.arange(2.0)), ValueError, "bits=True"),
        (dict(group_size=0), ValueError, "group_size"),
        (dict(group_size=64.0), ValueError, "group_size"),
        (dict(group_size=True), ValueError, "group_size"),
        (dict(axes="kk"), ValueError, "axes"),
        (dict(axes="nkk"), ValueError, "axes"),
        (dict(layout="marlin"), ValueError, "layout"),
        (dict(shape=(8, 128)), ValueError, "packed.shape"),
    ],
)
def test_tensors_built_by_hand(changes, error, words):
    broken = dataclasses.replace(W, **changes)
    with pytest.raises(error, match=words):
        broken.validate()
    with pytest.raises(error):
        fdk_jax.matmul(X, broken)


def test_values_of_a_codebook_are_read_once():
    """An immutable one is; a numpy array may have changed since, and a flag may ask for more."""
    bent = jnp.linspace(0, 1, 16) ** 2
    w = dataclasses.replace(W, codebook=bent, uniform=False)
    with unittest.mock.patch.object(np, "isfinite", wraps=np.isfinite) as reading:
        w.validate()
        fdk_jax.matmul(X, w)
        dataclasses.replace(w, scales=w.scales * 2).validate()
        assert reading.call_count == 1
    with pytest.raises(ValueError, match="not evenly spaced"):
        fdk_jax.matmul(X, dataclasses.replace(w, uniform=True))
    mutable = np.asarray(bent).copy()
    w = dataclasses.replace(W, codebook=mutable, uniform=False)
    w.validate()
    mutable[3] = np.nan
    with pytest.raises(ValueError, match="finite"):
        fdk_jax.matmul(X, w)


def test_a_missing_cpu_library_is_named(monkeypatch):
    tiled = fdk_jax.prepare(W, "cpu")
    monkeypatch.setattr(cpu_backend, "unavailable_reason", lambda: "it was never built")
    with pytest.raises(ValueError, match="never built"):
        fdk_jax.matmul(X, W, backend="cpu")
    assert fdk_jax.explain(X, tiled).backend == "xla"
    assert np.allclose(fdk_jax.matmul(X, tiled), fdk_jax.matmul(X, W), rtol=1e-5)


def test_a_group_size_without_a_kernel_takes_the_portable_path():
    w = fdk_jax.quantise(jnp.ones((8, 60), jnp.float32), 4, group_size=12)
    tiled = fdk_jax.prepare(w, "cpu")
    x = jnp.ones((2, 60))
    assert fdk_jax.explain(x, tiled, platform="cpu").backend == "xla"
    assert np.allclose(fdk_jax.matmul(x, tiled), fdk_jax.matmul(x, w), rtol=1e-5)
