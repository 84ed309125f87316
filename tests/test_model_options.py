"""What sets model families apart: masks, positions, norms and caps, against float64 written out by hand."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from fdk_jax import models
from fdk_jax.models import attention, rope
from fdk_jax.models.attention import Mask
from fdk_jax.models.config import LayerOptions, ModelConfig, Rope

CONFIG = ModelConfig(96, 32, 48, 3, 4, 2, 16, dtype="float32", max_context=64)

OPTIONS = {
    "window": dict(layers=(LayerOptions(5), LayerOptions(), LayerOptions(2))),
    "no positions": dict(layers=(LayerOptions(rope=None), LayerOptions(), LayerOptions(rope=None))),
    "partial": dict(layers=(LayerOptions(rope=Rope(rotary_dim=4)),) * 3),
    "interleaved": dict(layers=(LayerOptions(rope=Rope(interleaved=True, factor=1.2)),) * 3),
    "bases": dict(layers=tuple(LayerOptions(rope=Rope(10.0**i)) for i in (2, 4, 6))),
    "caps": dict(attention_soft_cap=0.7, logit_soft_cap=1.5, query_scale=0.3),
    "sinks": dict(attention_sinks=True),
    "sandwich": dict(post_norms=True, norm_offset=1.0, qk_norm=True, embedding_scale=5.5),
    "norms after": dict(pre_norms=False, post_norms=True, qk_norm=True, qk_norm_of="all"),
    "gelu": dict(activation="gelu_tanh", tie_embeddings=True),
}


def model_of(options: dict) -> models.Transformer:
    """A model whose norms and sinks are not the usual ones."""
    model = models.Transformer(dataclasses.replace(CONFIG, **options), rngs=nnx.Rngs(0))
    rng = np.random.default_rng(1)
    for path, leaf in nnx.to_flat_state(nnx.state(model)):
        if path[-1] in ("scale", "sinks"):
            leaf.set_value(leaf[...] + jnp.asarray(rng.normal(size=leaf.shape) / 3, jnp.float32))
    return model


def exact(model: models.Transformer, tokens: np.ndarray) -> np.ndarray:
    """Logits [T, V] of one sequence, in float64."""
    c = model.config
    array = lambda a: np.asarray(a[...], np.float64)  # noqa: E731
    erf_free_gelu = lambda x: (  # noqa: E731
        x / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))
    )
    act = {"silu": lambda x: x / (1 + np.exp(-x)), "gelu_tanh": erf_free_gelu}[c.activation]
    cap = lambda s, limit: s if limit is None else limit * np.tanh(s / limit)  # noqa: E731

    def norm(module, x):
        if module is None:
            return x
        root = np.sqrt((x * x).mean(-1, keepdims=True) + c.norm_eps)
        return x / root * (c.norm_offset + array(module.scale))

    def rotated(heads, options):
        """[T, heads, d], each pair as a complex number."""
        if options is None:
            return heads
        size = options.rotary_dim or c.head_dim
        at = np.arange(size)
        first, second = (
            (at[::2], at[1::2]) if options.interleaved else (at[: size // 2], at[size // 2 :])
        )
        angles = np.arange(len(heads))[:, None] / options.theta ** (np.arange(0, size, 2) / size)
        pairs = (heads[..., first] + 1j * heads[..., second]) * options.factor
        pairs = pairs * np.exp(1j * angles)[:, None]
        heads = heads.copy()
        heads[..., first], heads[..., second] = pairs.real, pairs.imag
        return heads

    def attend(module, options, x):
        q, k, v = np.split(
            x @ array(module.qkv.kernel), np.cumsum([c.num_heads, c.num_kv_heads]) * c.head_dim, -1
        )
        if c.qk_norm and c.qk_norm_of == "all":
            q, k = norm(module.q_norm, q), norm(module.k_norm, k)
        q, k, v = (a.reshape(len(x), -1, c.head_dim) for a in (q, k, v))
        if c.qk_norm and c.qk_norm_of == "head":
            q, k = norm(module.q_norm, q), norm(module.k_norm, k)
        q, k = rotated(q, options.rope), rotated(k, options.rope)
        out = np.zeros_like(q)
        for t in range(len(x)):
            begin = 0 if options.window is None else max(0, t + 1 - options.window)
            for h in range(c.num_heads):
                kv = h // (c.num_heads // c.num_kv_heads)
                scores = k[begin : t + 1, kv] @ q[t, h] * (c.query_scale or c.head_dim**-0.5)
                weights = np.exp(cap(scores, c.attention_soft_cap))
                sink = np.exp(array(module.sinks)[h]) if c.attention_sinks else 0
                out[t, h] = weights @ v[begin : t + 1, kv] / (weights.sum() + sink)
        return out.reshape(len(x), -1) @ array(module.out.kernel)

    x = array(model.embedding)[tokens] * c.embedding_scale
    for index, layer in enumerate(model.layers):
        mixed = attend(layer.attention, c.layer(index), norm(layer.attention_norm, x))
        x = x + norm(layer.attention_post_norm, mixed)
        gate, up = np.split(norm(layer.mlp_norm, x) @ array(layer.mlp.gate_up.kernel), 2, -1)
        x = x + norm(layer.mlp_post_norm, (act(gate) * up) @ array(layer.mlp.down.kernel))
    head = array(model.embedding).T if model.lm_head is None else array(model.lm_head.kernel)
    return cap(norm(model.norm, x) @ head, c.logit_soft_cap)


@pytest.mark.parametrize("name", OPTIONS)
def test_options_over_prompts_and_token_by_token(name, rng):
    model = model_of(OPTIONS[name])
    tokens = rng.integers(0, CONFIG.vocab_size, 9)
    wanted = exact(model, tokens)
    tolerance = dict(rtol=1e-4, atol=1e-5 * np.abs(wanted).max())
    np.testing.assert_allclose(jax.jit(model)(tokens[None])[0], wanted, **tolerance)
    logits, cache = model.prefill(jnp.asarray(tokens[None, :4]), jnp.asarray([3]), 64)
    np.testing.assert_allclose(logits[0], wanted[2], **tolerance)
    step = jax.jit(model.decode)
    for at in range(3, 9):
        logits, cache = step(jnp.asarray(tokens[at : at + 1]), cache)
        np.testing.assert_allclose(logits[0], wanted[at], **tolerance)


@pytest.mark.parametrize("mask", [Mask(), Mask(700), Mask(3, 0.5), Mask(None, 0.5)])
@pytest.mark.parametrize("sinks", [False, True])
@pytest.mark.parametrize("tokens", [600, 1500])
def test_attention_over_a_prompt(rng, mask, sinks, tokens):
    q, k, v = (rng.normal(size=(2, tokens, heads, 8)) for heads in (4, 2, 2))
    extra = rng.normal(size=4) if sinks else None
    arrays = [jnp.asarray(a, jnp.float32) for a in (q, k, v)]
    found = attention.over_prompt(*arrays, mask, None if extra is None else jnp.asarray(extra))
    k, v = (np.repeat(a, 2, axis=2) for a in (k, v))
    for row in rng.integers(0, tokens, 6):
        begin = 0 if mask.window is None else max(0, row + 1 - mask.window)
        scores = np.einsum("bhd,bshd->bhs", q[:, row], k[:, begin : row + 1]) / np.sqrt(8)
        if mask.soft_cap is not None:
            scores = mask.soft_cap * np.tanh(scores / mask.soft_cap)
        weights = np.exp(scores)
        total = weights.sum(-1) + (0 if extra is None else np.exp(extra))
        mixed = np.einsum("bhs,bshd->bhd", weights, v[:, begin : row + 1])
        np.testing.assert_allclose(found[:, row], mixed / total[..., None], rtol=2e-4, atol=2e-5)


def test_attention_over_blocks_has_the_gradient_of_the_direct_one(rng, monkeypatch):
    q, k, v = (jnp.asarray(rng.normal(size=(1, 48, h, 4)), jnp.float32) for h in (2, 1, 1))

    def loss(q, k, v):
        return jnp.sin(attention.over_prompt(q, k, v, Mask(20))).sum()

    wanted = jax.grad(loss, (0, 1, 2))(q, k, v)
    monkeypatch.setattr(attention, "_BLOCK", 16)
    for found, one in zip(jax.grad(loss, (0, 1, 2))(q, k, v), wanted, strict=True):
        np.testing.assert_allclose(found, one, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("options", [Rope(rotary_dim=4), Rope(interleaved=True), Rope(), None])
def test_order_of_a_heads_elements(options):
    order = rope.order(options, 16)
    assert order is None or sorted(order) == list(range(16))
    assert (order is None) == (options in (Rope(), None))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (dict(layers=(LayerOptions(),)), "options of 1 layers"),
        (dict(activation="relu"), "activation='relu'"),
        (dict(qk_norm_of="pair"), "qk_norm_of"),
        (dict(pre_norms=False), "needs norms"),
        (dict(layers=(LayerOptions(0),) * 3), "window=0"),
        (dict(layers=(LayerOptions(rope=Rope(rotary_dim=3)),) * 3), "rotary=3"),
        (dict(layers=(LayerOptions(rope=Rope(rotary_dim=18)),) * 3), "rotary=18"),
    ],
)
def test_options_that_make_no_model(options, words):
    with pytest.raises(ValueError, match=words):
        dataclasses.replace(CONFIG, **options)


@pytest.mark.parametrize("name", ["window", "partial", "sinks", "caps"])
def test_a_cache_filled_in_steps(name, rng):
    """Rows of different lengths, each after what its sequence holds already."""
    model = model_of(OPTIONS[name])
    tokens = rng.integers(0, CONFIG.vocab_size, (2, 24))
    begun, more = np.array([7, 3]), np.array([4, 9])
    _, cache = model.prefill(jnp.asarray(tokens[:, :8]), jnp.asarray(begun, jnp.int32), 64)
    rows = np.stack([tokens[row, at : at + 10] for row, at in enumerate(begun)])
    logits, cache = jax.jit(model.extend)(jnp.asarray(rows), jnp.asarray(more, jnp.int32), cache)
    for row, count in enumerate(begun + more):
        wanted = exact(model, tokens[row, :count])[-1]
        np.testing.assert_allclose(logits[row], wanted, rtol=1e-4, atol=1e-5 * np.abs(wanted).max())
    np.testing.assert_array_equal(cache.lengths, begun + more)


@pytest.mark.parametrize("mask", [Mask(), Mask(40)])
@pytest.mark.parametrize("starts", [[0], [70], [5, 100]])
def test_attention_of_a_run_over_the_cache(rng, monkeypatch, mask, starts):
    monkeypatch.setattr(attention, "_BLOCK", 32)
    q, k, v = (rng.normal(size=(2, h, n, 8)) for h, n in ((4, 50), (2, 170), (2, 170)))
    arrays = (q.transpose(0, 2, 1, 3), k, v)
    arrays = [jnp.asarray(a, jnp.float32) for a in arrays]
    found = attention.over_chunk(*arrays, jnp.asarray(starts, jnp.int32), mask)
    for row in range(2):
        for t in (0, 1, 31, 32, 49):
            end = starts[row % len(starts)] + t + 1
            seen = slice(0 if mask.window is None else max(0, end - mask.window), end)
            for h in range(4):
                weights = np.exp(k[row, h // 2, seen] @ q[row, h, t] / np.sqrt(8))
                wanted = weights @ v[row, h // 2, seen] / weights.sum()
                np.testing.assert_allclose(found[row, t, h], wanted, rtol=1e-4, atol=1e-5)
