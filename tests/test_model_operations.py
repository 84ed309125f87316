"""The operations of a model by platform: values, and what a decoding step lowers to for a GPU."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from backends import ONLY_WITH_A_GPU
from flax import nnx
from model_data import relative

from fdk_jax import models
from fdk_jax.benchmark import accuracy
from fdk_jax.models import attention, fused_layers, platforms
from fdk_jax.models.cache import append
from fdk_jax.models.config import ModelConfig
from fdk_jax.product import cpu_backend
from pallas_kernels import dense, norm, ring_arithmetic
from pallas_kernels.target import H200, using


@pytest.mark.parametrize(("m", "k", "n"), [(1, 192, 128), (3, 256, 256), (16, 1024, 384)])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_dense_kernel(rng, m, k, n, dtype):
    x, w = (jnp.asarray(rng.normal(size=shape), dtype) for shape in ((m, k), (k, n)))
    rows = np.asarray(w, np.float64).T
    wanted = accuracy.product(np.asarray(x, np.float64), rows)
    oracle.check(dense.matmul(x, w, out_dtype=jnp.float32, interpret=True), wanted)
    oracle.check(platforms.linear(x, w, jnp.float32), wanted)
    oracle.check(platforms.linear(x, w, x.dtype), oracle.expectations(x, [rows]))
    with pytest.raises(ValueError, match="multiples"):
        dense.matmul(x, w[:, 1:], out_dtype=jnp.float32, interpret=True)


@pytest.mark.parametrize("m", [1, 3])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_linear_of_rows(rng, m, dtype):
    x, rows = (jnp.asarray(rng.normal(size=shape), dtype) for shape in ((m, 64), (40, 64)))
    found = platforms.linear_of_rows(x, rows)
    oracle.check(found, oracle.expectations(x, [np.asarray(rows, np.float64)]))


@pytest.mark.parametrize("features", [96, 128, 3072])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_add_rms_norm_kernel(rng, features, dtype):
    x, delta = (jnp.asarray(rng.normal(size=(2, features)), dtype) for _ in range(2))
    scale = jnp.asarray(rng.normal(size=features), dtype)
    total = np.asarray(x, np.float64) + np.asarray(delta, np.float64)
    ways = [functools.partial(norm.add_rms_norm, interpret=True), platforms.add_rms_norm]
    if cpu_backend.unavailable_reason() is None:
        ways.insert(0, cpu_backend.add_rms_norm)
    for way in ways:
        found = way(x, delta, scale, eps=1e-5)
        oracle.check_values(found[0], total)
        # Some normalise the sum as it was rounded, and some round what is normalised before they scale it.
        sums = (total, np.asarray(found[0], np.float64))
        normed = [s / np.sqrt((s**2).mean(-1, keepdims=True) + 1e-5) for s in sums]
        either = [(n, n) for n in normed]
        either += [tuple(oracle.rounded(n * (1 + e), dtype) for e in (-1e-6, 1e-6)) for n in normed]
        wide = np.asarray(scale, np.float64)
        expected = []
        for low, high in either:
            slack = np.abs(wide) * (np.abs(high - low) / 2 + 1e-6 * np.abs(low))
            expected.append(accuracy.Expected.of((low + high) / 2 * wide, slack))
        oracle.check(found[1], expected)


@ONLY_WITH_A_GPU
@pytest.mark.parametrize(
    ("batch", "launches"),
    [
        # The first projection; attention and four products, in the first layer after another norm; the last
        # layer, with no next one; the head.
        (1, 1 + 2 * (1 + 4) + (1 + 3) + 1),
        # Two norms more in a layer, and the first one like the others.
        (2, 1 + (1 + 4 + 2) + (1 + 3 + 2) + 1),
    ],
)
def test_a_decoding_step_lowers_for_cuda_with_one_copy_of_a_layer(batch, launches):
    config = ModelConfig(1024, 512, 1024, 7, 4, 2, 128)
    graph, state = nnx.split(models.random_model(config, bits=4, backend="pallas"))
    shape = (batch, config.num_kv_heads, 64, config.head_dim)
    arrays = (jnp.zeros(shape, config.dtype),) * config.num_layers
    cache = models.KVCache(arrays, arrays, jnp.zeros(batch, jnp.int32))
    program = jax.jit(lambda s, t, c: nnx.merge(graph, s).decode(t, c))
    traced = program.trace(state, jnp.zeros(batch, jnp.int32), cache)
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("call @_run_layer") == 7
    assert text.count("custom_call @__gpu$xla.gpu.triton") == launches


@ONLY_WITH_A_GPU
@pytest.mark.parametrize("bits", [1, 4])
def test_a_decoding_step_of_chains_is_two_launches_a_layer(bits, monkeypatch):
    monkeypatch.setattr(ring_arithmetic, "CONSUMERS", {bits: 8})
    monkeypatch.setattr(fused_layers, "choose", lambda *arguments: None)
    config = ModelConfig(1024, 512, 1024, 7, 4, 2, 128)
    graph, state = nnx.split(models.random_model(config, bits=bits, backend="pallas"))
    arrays = (jnp.zeros((1, config.num_kv_heads, 64, config.head_dim), config.dtype),) * 7
    cache = models.KVCache(arrays, arrays, jnp.zeros(1, jnp.int32))
    program = jax.jit(lambda s, t, c: nnx.merge(graph, s).decode(t, c))
    with using(H200):
        traced = program.trace(state, jnp.zeros(1, jnp.int32), cache)
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("call @_run_layer") == 7
    # The last layer, with no next one, is not like the others.
    assert text.count('name = "fdk_chain"') == text.count('name = "decode_attention"') == 2


def test_attention_over_a_long_prompt_in_blocks(rng):
    q, k, v = (jnp.asarray(rng.normal(size=(1, 1536, h, 16)), jnp.float32) for h in (4, 2, 2))
    found = attention.over_prompt(q, k, v)
    rows = [0, 511, 512, 1023, 1535]
    for row in rows:
        lengths = jnp.array([row + 1], jnp.int32)
        wanted = attention.over_cache(
            q[:, row], k.transpose(0, 2, 1, 3), v.transpose(0, 2, 1, 3), lengths
        )
        assert relative(found[:, row], wanted) < 1e-5


@pytest.mark.parametrize("batch", [1, 3])
def test_cache_append_touches_one_slot(rng, batch):
    cache = jnp.asarray(rng.normal(size=(batch, 2, 8, 4)), jnp.float32)
    new = jnp.asarray(rng.normal(size=(batch, 2, 4)), jnp.float32)
    lengths = np.array([3, 0, 7][:batch], np.int32)
    wanted = np.array(cache)
    for b, slot in enumerate(lengths):
        wanted[b, :, slot] = new[b]
    np.testing.assert_array_equal(append(cache, new, jnp.asarray(lengths)), wanted)
