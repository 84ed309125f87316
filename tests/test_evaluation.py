"""Errors, perplexity and divergence against numpy; token files; the quality table."""

import math

import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from flax import nnx

import fdk_jax
from fdk_jax.learning.evaluation import evaluate, read_tokens
from fdk_jax.quality import curves, table


class Tiny(nnx.Module):
    """Tokens to logits through two linear layers."""

    def __init__(self, vocabulary=12, seed=0):
        rngs = nnx.Rngs(seed)
        self.embed = nnx.Embed(vocabulary, 64, rngs=rngs)
        self.up = nnx.Linear(64, 32, rngs=rngs, dtype=jnp.float32)
        self.down = nnx.LinearGeneral((4, 8), 64, axis=(-2, -1), rngs=rngs, dtype=jnp.float32)
        self.lm_head = nnx.Linear(64, vocabulary, rngs=rngs)

    def __call__(self, tokens):
        x = self.embed(tokens)
        a = nnx.relu(self.up(x))
        return self.lm_head(x + self.down(a.reshape(*a.shape[:-1], 4, 8)))


def test_a_layer_that_was_quantised_before_has_no_error(rng):
    """The head of many checkpoints is: it is the same in both models."""
    model = Tiny()
    model = fdk_jax.quantise(model, 8, group_size=16, skip="up|lm_head")
    assert isinstance(model.down, fdk_jax.QuantisedLinear)
    quantised = fdk_jax.quantise(model, 4, group_size=16)
    report = evaluate(quantised, model, rng.integers(0, 12, 401), context=20)
    layers = {layer.name: layer for layer in report.layers}
    assert layers["down"].weight_error is None and layers["down"].output_error is None
    assert 0 < layers["up"].weight_error < 0.2 and layers["up"].output_error is not None
    assert report.weight_error == layers["up"].weight_error and "down" in str(report)


def log_softmax(x):
    x = np.asarray(x, np.float64)
    return (
        x
        - np.log(np.exp(x - x.max(-1, keepdims=True)).sum(-1, keepdims=True))
        - x.max(-1, keepdims=True)
    )


def test_all_figures_against_numpy(rng):
    model = Tiny()
    quantised = fdk_jax.quantise(model, 2, group_size=16, codebook="kmeans", dtype=jnp.bfloat16)
    tokens = rng.integers(0, 12, 101)
    report = evaluate(quantised, model, tokens, context=20, batch_size=3)
    rows = tokens[:100].reshape(5, 20)
    p, q = (log_softmax(m(jnp.asarray(rows)))[:, :-1] for m in (model, quantised))
    taken = lambda a: np.take_along_axis(a, rows[:, 1:, None], -1).mean()  # noqa: E731
    assert report.tokens == 95
    assert report.perplexity == pytest.approx(math.exp(-taken(q)), rel=1e-4)
    assert report.reference_perplexity == pytest.approx(math.exp(-taken(p)), rel=1e-4)
    assert report.kl == pytest.approx((np.exp(p) * (p - q)).sum(-1).mean(), rel=1e-3)
    assert report.agreement == pytest.approx((p.argmax(-1) == q.argmax(-1)).mean())
    layers = {layer.name: layer for layer in report.layers}
    assert set(layers) == {"up", "down"}
    x = np.asarray(model.embed(jnp.asarray(rows)), np.float64).reshape(-1, 64)
    a = np.maximum(
        x @ np.asarray(model.up.kernel[...], np.float64) + np.asarray(model.up.bias[...]), 0
    )
    errors, sizes = [], []
    for name, inputs in {"up": x, "down": a}.items():
        w = getattr(quantised, name).weight.get_value()
        new = oracle.weights(w)
        old = np.asarray(getattr(model, name).kernel[...], np.float64).reshape(new.shape[::-1]).T
        assert layers[name].weight_error == pytest.approx(oracle.relative_rms(new, old), rel=1e-4)
        output = oracle.relative_rms(inputs @ new.T, inputs @ old.T)
        assert layers[name].output_error == pytest.approx(output, rel=1e-3)
        assert layers[name].bytes_per_weight == pytest.approx(2 / 8 + 2 / 16 + 16 / new.size)
        errors.append(np.sum((new - old) ** 2))
        sizes.append(np.sum(old**2))
    assert report.weight_error == pytest.approx(np.sqrt(sum(errors) / sum(sizes)), rel=1e-4)
    kept = sum(
        v.size * 4 for v in (model.embed.embedding, model.lm_head.kernel, model.lm_head.bias)
    )
    kept += 4 * (32 + 64) + sum(getattr(quantised, n).weight.get_value().nbytes for n in layers)
    assert report.model_bytes == kept
    text = str(report)
    assert "down" in text and f"{report.kl:.4f}" in text


def test_a_model_does_not_differ_from_itself(rng):
    model = Tiny()
    report = evaluate(model, model, rng.integers(0, 12, (4, 9)))
    assert report.layers == () and report.kl == pytest.approx(0, abs=1e-6) and report.agreement == 1
    alone = evaluate(fdk_jax.quantise(model, 8))
    assert alone.perplexity is None and alone.weight_error is None and len(alone.layers) == 2
    assert "-" in str(alone)


def test_no_knowledge_is_perplexity_of_the_vocabulary(rng):
    flat = lambda model, tokens: jnp.zeros((*tokens.shape, 12), jnp.float32)  # noqa: E731
    assert evaluate(
        Tiny(), None, rng.integers(0, 12, 64), forward=flat
    ).perplexity == pytest.approx(12)


def test_token_files(rng, tmp_path):
    tokens = rng.integers(0, 12, 50)
    np.save(tmp_path / "a.npy", tokens)
    tokens.astype("<u2").tofile(tmp_path / "a.bin")
    for name in ("a.npy", "a.bin"):
        assert (read_tokens(tmp_path / name) == tokens).all()
    model = Tiny()
    from_file = evaluate(model, None, str(tmp_path / "a.bin"), context=10)
    assert from_file == evaluate(model, None, tokens, context=10)


@pytest.mark.parametrize(
    ("tokens", "error", "words"),
    [
        (np.ones(5), ValueError, "integers"),
        (np.ones((2, 2, 2), int), ValueError, "integers"),
        (np.ones(1, int), ValueError, "at least 2"),
        (np.array([0, -1, 2]), ValueError, "not negative"),
        (np.array([0, 12, 2]), ValueError, "token 12 .* 12 tokens"),
        ("tokens.txt", ValueError, "must be a .npy file"),
        ("absent.npy", FileNotFoundError, "absent"),
    ],
)
def test_bad_tokens(tokens, error, words):
    with pytest.raises(error, match=words):
        evaluate(Tiny(), None, tokens)


def test_models_that_do_not_match(rng):
    quantised = fdk_jax.quantise(Tiny(), 4)
    with pytest.raises(ValueError, match="no float linear layers called"):
        evaluate(quantised, quantised)
    with pytest.raises(ValueError, match="logits"):
        evaluate(
            Tiny(),
            None,
            rng.integers(0, 12, 8),
            forward=lambda model, tokens: model.embed(tokens)[0],
        )


def test_the_table_and_its_figure(tmp_path):
    base = dict(status="ok", bytes_per_weight=0.5, kl=0.01, entropy=0.3, curve=[2.0, 1.5, 1.0])
    rows = [
        dict(base, bits=16, method="reference", perplexity=2.0),
        dict(base, bits=4, method="nf4", perplexity=2.25),
        dict(base, bits=1, method="kmeans", perplexity=9.0),
        dict(base, bits=1, method="qat", perplexity=2.5),
    ]
    lines = table.markdown(rows, table.METHODS).splitlines()
    assert len(lines) == 4 and len({line.count("|") for line in lines}) == 1
    assert "| 4 | 0.500 |" in lines[2] and "2.250 (0.010)" in lines[2]
    curves.draw(rows, tmp_path / "figure.svg")
    assert (tmp_path / "figure.svg").read_text().startswith("<?xml")
    assert [path.name for path in tmp_path.iterdir()] == ["figure.svg"]
