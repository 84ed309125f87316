"""What the C++ library does in a decoding step beside products with quantised weights."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest

from fdk_jax import models
from fdk_jax.benchmark import accuracy
from fdk_jax.models import platforms
from fdk_jax.models.config import ModelConfig
from fdk_jax.product import cpu_backend

pytestmark = pytest.mark.skipif(
    cpu_backend.unavailable_reason() is not None, reason=str(cpu_backend.unavailable_reason())
)
DTYPES = ["bfloat16", "float16", "float32"]


def random(rng, dtype, *shape):
    """Normal values."""
    return jnp.asarray(rng.normal(size=shape), dtype)


@pytest.mark.parametrize(
    ("m", "k", "n"), [(1, 1, 1), (1, 203, 777), (3, 64, 256), (5, 130, 17), (16, 33, 300)]
)
@pytest.mark.parametrize("rows", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
def test_dense(rng, isa, m, k, n, rows, dtype):
    x, w = random(rng, dtype, m, k), random(rng, dtype, *((n, k) if rows else (k, n)))
    wide = np.asarray(w.astype(jnp.float32), np.float64)
    wanted = oracle.expectations(x, [wide if rows else wide.T])
    for out_dtype in ("float32", dtype):
        run = jax.jit(functools.partial(cpu_backend.dense, rows=rows, out_dtype=out_dtype))
        found = run(x, w)
        assert found.dtype == out_dtype and found.shape == (m, n)
        oracle.check(found, wanted)


def test_dense_refuses_what_does_not_fit(rng):
    x, w = random(rng, "float32", 17, 8), random(rng, "float32", 8, 4)
    with pytest.raises(jax.errors.JaxRuntimeError, match="16 tokens"):
        cpu_backend.dense(x, w, rows=False, out_dtype=jnp.float32).block_until_ready()
    with pytest.raises(jax.errors.JaxRuntimeError, match="do not fit"):
        cpu_backend.dense(x[:2], w, rows=True, out_dtype=jnp.float32).block_until_ready()


def test_norms_refuse_what_does_not_fit(rng):
    x, scale = random(rng, "float32", 2, 8), random(rng, "float32", 7)
    with pytest.raises(jax.errors.JaxRuntimeError, match="do not fit"):
        cpu_backend.add_rms_norm(x, x, scale, eps=1e-5)[0].block_until_ready()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1,), (3,), (2, 4)])
def test_take_rows(rng, dtype, shape):
    table = random(rng, dtype, 11, 5)
    index = jnp.asarray(rng.integers(-3, 15, shape), jnp.int32)
    wanted = np.asarray(table)[np.clip(np.asarray(index), 0, 10)]
    np.testing.assert_array_equal(jax.jit(platforms.take_rows)(table, index), wanted)


def _attention_inputs(rng, dtype, batch, kv_heads, group, head_dim, capacity):
    heads = kv_heads * group
    cache = (batch, kv_heads, capacity, head_dim)
    angles = rng.normal(size=(batch, head_dim // 2))
    return (
        random(rng, dtype, batch, (heads + 2 * kv_heads) * head_dim),
        jnp.asarray(np.cos(angles), jnp.float32),
        jnp.asarray(np.sin(angles), jnp.float32),
        jnp.asarray(rng.integers(0, capacity, batch), jnp.int32),
        random(rng, dtype, *cache),
        random(rng, dtype, *cache),
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "shape", [(1, 1, 1, 2, 3), (2, 3, 2, 10, 40), (3, 2, 4, 64, 1000)], ids=str
)
def test_attention_agrees_on_every_isa(rng, isa, dtype, shape):
    """The best ISA is compared with float64 in test_decode_attention.py."""
    args = _attention_inputs(rng, dtype, *shape)
    found = jax.jit(cpu_backend.attention)(*args)
    cpu_backend.library().set_isa("scalar")
    for ours, wanted in zip(found, jax.jit(cpu_backend.attention)(*args), strict=True):
        wanted = np.asarray(wanted, np.float64)
        # What is not quite the same in float32 may be rounded to either neighbour.
        slack = 1e-5 * (np.abs(wanted) + 1) + accuracy.half_ulp(wanted, dtype)
        oracle.check(ours, accuracy.Expected.of(wanted, slack))


def test_attention_passes_a_nan_on(rng):
    qkv, cos, sin, lengths, keys, values = _attention_inputs(rng, "float32", 2, 1, 2, 4, 6)
    keys = keys.at[0, 0, 0, 0].set(jnp.nan)
    lengths = jnp.full_like(lengths, 3)
    out = np.asarray(cpu_backend.attention(qkv, cos, sin, lengths, keys, values)[0])
    assert np.isnan(out[0]).all() and np.isfinite(out[1]).all()


def test_attention_refuses_what_does_not_fit(rng):
    qkv, cos, sin, lengths, keys, values = _attention_inputs(rng, "float32", 2, 1, 2, 4, 6)
    with pytest.raises(jax.errors.JaxRuntimeError, match="do not fit the cache"):
        cpu_backend.attention(qkv[:1], cos, sin, lengths, keys, values)[0].block_until_ready()


@pytest.mark.parametrize("bits", [4, 16])
def test_a_decoding_step_copies_neither_cache_nor_weights(bits):
    config = ModelConfig(512, 64, 128, 2, 4, 2, 16, tie_embeddings=True)
    generator = models.Generator(models.random_model(config, bits=bits, backend="cpu"))
    generator.generate([[1, 2]], max_tokens=5)
    (program,) = (p for name, p in generator.programs.items() if name[0] == "decode")
    shapes = ["[1,2,128,16]", "[512,64]"]  # of the cache, of the embedding
    shapes += ["[64,128]", "[64,256]", "[128,64]"]  # of matrices, where they are not quantised
    for line in program.as_text().splitlines():
        value = line.partition(" = ")[2]
        made = value.partition("{")[0]  # the dtype and shape of one array; tuples begin with "("
        if not made.startswith("(") and any(made.endswith(shape) for shape in shapes):
            assert any(word in value for word in ("parameter(", "get-tuple-element(")), line
