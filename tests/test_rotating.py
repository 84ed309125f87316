"""Rotations folded into the weights of a model."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from fdk_jax.format.quantisation import quantise_array
from fdk_jax.models.config import ModelConfig
from fdk_jax.models.rotating import Rotation, rotated
from fdk_jax.models.transformer import Transformer
from fdk_jax.models.weights import set_linear

SHAPES = dict(
    vocab_size=96, hidden_size=48, intermediate_size=64, num_layers=2, num_heads=4, num_kv_heads=2,
    head_dim=16, dtype="float32",
)  # fmt: skip


def make_model(**options) -> Transformer:
    """Random weights, with biases and scales of norms that are not those of a new model."""
    model = Transformer(ModelConfig(**SHAPES, **options), rngs=nnx.Rngs(0))
    graph, state = nnx.split(model)
    rng = np.random.default_rng(1)
    noisy = [
        a + jnp.asarray(0.3 * rng.standard_normal(a.shape), a.dtype) for a in jax.tree.leaves(state)
    ]
    return nnx.merge(graph, jax.tree.unflatten(jax.tree.structure(state), noisy))


def test_matrices_are_orthogonal():
    rotation = Rotation.of(ModelConfig(**SHAPES))
    for matrix, size in ((rotation.stream, 48), (rotation.values, 16)):
        assert matrix.shape == (size, size)
        np.testing.assert_allclose(matrix @ matrix.T, np.eye(size), atol=1e-6)
    # A power of two is a Hadamard matrix with signs: all entries of one size.
    np.testing.assert_allclose(np.abs(rotation.values), 0.25, rtol=1e-6)


@pytest.mark.parametrize(
    "options",
    [
        {},
        dict(tie_embeddings=True),
        dict(qkv_bias=True, output_bias=True, mlp_bias=True, qk_norm=True),
        dict(norm_offset=1.0, embedding_scale=3.0, residual_scale=0.5),
    ],
    ids=["plain", "tied", "biases", "scales"],
)
def test_the_function_stays_and_outliers_go(options):
    model = make_model(**options)
    # One input of the stream is larger than all others, as in trained models.
    model.embedding = nnx.Param(model.embedding[...].at[:, 5].multiply(30.0))
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 96, (2, 12)))
    before = np.asarray(model(tokens))
    other = rotated(model)
    after = np.asarray(other(tokens))
    assert np.abs(after - before).max() < 1e-4 * np.abs(before).max()
    np.testing.assert_array_equal(np.asarray(model(tokens)), before)
    largest = [np.abs(np.asarray(m.embedding[...])).max() for m in (model, other)]
    assert largest[1] < 0.5 * largest[0]


@pytest.mark.parametrize("tied", [True, False])
def test_tables_and_heads_that_are_quantised_become_floats(tied):
    model = make_model(tie_embeddings=tied)
    dtype = jnp.dtype(model.config.dtype)
    table = quantise_array(model.embedding[...], 8, group_size=16)
    head = table if tied else quantise_array(model.lm_head.kernel[...].T, 8, group_size=16)
    set_linear(model, ("lm_head",), head, None, dtype, "exact")
    model.embedding = type(model.lm_head.weight)(table)
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 96, (2, 12)))
    before, after = np.asarray(model(tokens)), np.asarray(rotated(model)(tokens))
    assert np.abs(after - before).max() < 1e-4 * np.abs(before).max()


def test_what_cannot_be_folded_is_refused():
    with pytest.raises(ValueError, match="norms after attention"):
        rotated(make_model(post_norms=True, family="gemma2"))
