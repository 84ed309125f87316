"""Causal attention of many tokens in the C++ library, beside float64 and beside XLA's."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest

from fdk_jax.benchmark import accuracy
from fdk_jax.models import attention, platforms
from fdk_jax.models.attention import Mask
from fdk_jax.product import cpu_backend

pytestmark = pytest.mark.skipif(
    cpu_backend.unavailable_reason() is not None, reason=str(cpu_backend.unavailable_reason())
)
ROUNDING = {"bfloat16": 2.0**-8, "float16": 2.0**-11, "float32": 2.0**-24}
# batch, tokens, kv heads, query heads of each, head_dim, slots, starts, window
CASES = [
    (1, 1, 1, 1, 2, 1, (0,), None),
    (2, 70, 2, 3, 40, 90, (0, 20), None),
    (1, 300, 1, 1, 64, 700, (333,), None),
    (1, 130, 2, 4, 96, 400, (200,), 150),
    (2, 33, 1, 8, 128, 50, (17,), 5),
    (1, 9, 1, 300, 16, 12, (3,), None),
]


def inputs(rng, dtype, batch, tokens, kv_heads, group, head_dim, slots, starts):
    shapes = (batch, tokens, kv_heads * group, head_dim), (batch, kv_heads, slots, head_dim)
    q, keys, values = (
        jnp.asarray(rng.normal(size=s), dtype) for s in (shapes[0], shapes[1], shapes[1])
    )
    return q, keys, values, jnp.asarray(starts, jnp.int32)


def expected(q, keys, values, starts, window):
    """The result in float64, and how far float32 may be from it (see `test_agrees_with_float64`)."""
    q, keys, values = (np.asarray(a.astype(jnp.float32), np.float64) for a in (q, keys, values))
    batch, tokens, heads, d = q.shape
    kv_heads, slots = keys.shape[1:3]
    q = q.reshape(batch, tokens, kv_heads, heads // kv_heads, d)
    products = np.einsum("btkgd,bksd->bkgts", q, keys) * d**-0.5
    sizes = np.einsum("btkgd,bksd->bkgts", abs(q), abs(keys)) * d**-0.5
    at = np.asarray(starts).reshape(-1, 1, 1) + np.arange(tokens)[:, None]
    places = np.arange(slots)
    seen = (places <= at) & (places > at - (window or slots + tokens))
    products = np.where(seen[:, None, None], products, -np.inf)
    weights = np.exp(products - products.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    mix = lambda w, v: np.einsum("bkgts,bksd->btkgd", w, v).reshape(batch, tokens, heads, d)  # noqa: E731
    unit = ROUNDING["float32"]
    # A score is a chain of d + 2 roundings, an exponential off by 2e-7; then chains over the keys, twice.
    relative = (2 * (d + 2) * unit * sizes.max(-1, keepdims=True)) + 1e-6 + 2 * (slots + 4) * unit
    return mix(weights, values), mix(weights * relative, abs(values)) + mix(
        weights, abs(values)
    ) * relative.max()


@pytest.mark.parametrize("dtype", ROUNDING)
@pytest.mark.parametrize("case", CASES)
def test_agrees_with_float64(rng, isa, dtype, case):
    *shape, window = case
    q, keys, values, starts = inputs(rng, dtype, *shape)
    wanted, bound = expected(q, keys, values, starts, window)
    run = functools.partial(cpu_backend.prompt_attention, window=window)
    for by_token in (False, True):
        arranged = [a.swapaxes(1, 2) if by_token else a for a in (keys, values)]
        found = jax.jit(functools.partial(run, by_token=by_token))(q, *arranged, starts)
        assert found.dtype == dtype and found.shape == q.shape
        oracle.check(found, accuracy.Expected.of(wanted, bound))


def test_threads_and_a_batch_of_its_own_change_nothing(rng):
    q, keys, values, starts = inputs(rng, "bfloat16", 3, 600, 2, 2, 64, 700, (0, 40, 100))
    run = functools.partial(cpu_backend.prompt_attention, window=None, by_token=False)
    together = jax.jit(run)(q, keys, values, starts)
    for i in range(3):
        alone = run(q[i : i + 1], keys[i : i + 1], values[i : i + 1], starts[i : i + 1])
        np.testing.assert_array_equal(np.asarray(alone[0]), np.asarray(together[i]))
    mapped = jax.vmap(lambda *a: run(*(x[None] for x in a))[0])(q, keys, values, starts)
    np.testing.assert_array_equal(np.asarray(mapped), np.asarray(together))


def test_large_scores_and_a_nan(rng):
    q, keys, values, starts = inputs(rng, "float32", 1, 140, 1, 1, 8, 140, (0,))
    run = functools.partial(cpu_backend.prompt_attention, window=None, by_token=False)
    found = run(q * 1e4, keys * 1e4, values, starts)
    assert np.isfinite(np.asarray(found)).all()
    found = np.asarray(run(q.at[0, 7].set(jnp.nan), keys, values, starts))
    assert np.isnan(found[0, 7]).all() and np.isfinite(np.delete(found[0], 7, 0)).all()


def test_has_the_derivatives_of_xla(rng):
    q, keys, values, starts = inputs(rng, "float32", 1, 20, 2, 2, 16, 32, (5,))
    mask = Mask(window=9)
    ours = lambda q, k, v: jnp.sin(platforms.chunk_attention(q, k, v, starts, mask, None)).sum()  # noqa: E731
    plain = lambda q, k, v: jnp.sin(attention.over_chunk(q, k, v, starts, mask)).sum()  # noqa: E731
    for found, wanted in zip(
        jax.jit(jax.grad(ours, (0, 1, 2)))(q, keys, values),
        jax.grad(plain, (0, 1, 2))(q, keys, values),
        strict=True,
    ):
        np.testing.assert_allclose(found, wanted, atol=1e-5)
    k, v = (a.swapaxes(1, 2)[:, :20] for a in (keys, values))
    _, found = jax.jvp(lambda q: platforms.prompt_attention(q, k, v, mask, None), (q,), (q,))
    _, wanted = jax.jvp(lambda q: attention.over_prompt(q, k, v, mask), (q,), (q,))
    np.testing.assert_allclose(found, wanted, atol=1e-5)


def test_refuses_what_does_not_fit(rng):
    q, keys, values, starts = inputs(rng, "float32", 1, 4, 2, 2, 8, 16, (0,))
    run = functools.partial(cpu_backend.prompt_attention, window=None, by_token=False)
    with pytest.raises(jax.errors.JaxRuntimeError, match="do not fit"):
        run(q[:, :, :3], keys, values, starts).block_until_ready()
    with pytest.raises(jax.errors.JaxRuntimeError, match="do not fit"):
        run(q, keys, values[:, :, :3], starts).block_until_ready()
