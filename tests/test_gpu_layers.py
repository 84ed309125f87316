"""A whole model on a GPU by launches of many layers, the default at 1 bit, beside chains and float32."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from model_data import in_float32, relative

from fdk_jax import models
from fdk_jax.benchmark.shapes import Shape
from fdk_jax.models import fused_layers
from pallas_kernels.target import current

if jax.default_backend() != "gpu":
    pytest.skip("needs an NVIDIA GPU", allow_module_level=True)
if not current().has_bulk_copies or current().no_grid_barriers:
    pytest.skip(f"layers are not one launch on {current()}", allow_module_level=True)

_PROMPT, _STEPS = 5, 30


def test_a_model_of_two_launches_of_layers_as_one_of_chains(rng, monkeypatch):
    """Qwen3-1.7B's 28 layers: logits of 30 steps as near to float32 as those of chains, and tokens equal."""
    shape = Shape.of("qwen3-1.7B-tables1")
    assert shape is not None
    tables = dict(head_bits=shape.head_bits, embedding_bits=shape.embedding_bits)
    model = models.random_model(shape.config, bits=1, group_size=128, backend="pallas", **tables)
    tokens = rng.integers(0, shape.config.vocab_size, (1, _PROMPT + _STEPS))
    with jax.default_matmul_precision("highest"):
        exact = models.Generator(in_float32(model)).logits(tokens)
    exact = np.asarray(exact, np.float64)[0, _PROMPT:]
    launches = []
    run = fused_layers.kernels.run

    def counted(plan, *arguments):
        launches.append(plan.layers)
        return run(plan, *arguments)

    monkeypatch.setattr(fused_layers.kernels, "run", counted)
    monkeypatch.delenv(fused_layers.LAYERS, raising=False)
    default = _logits(model, tokens)
    assert len(launches) == 2 and sum(launches) == len(model.layers), launches
    monkeypatch.setenv(fused_layers.LAYERS, "0")
    chains = _logits(model, tokens)
    assert len(launches) == 2, "chains alone were asked for"
    lost = {"layers": relative(default, exact), "chains": relative(chains, exact)}
    apart = relative(default, chains)
    print(f"layers {lost['layers']:.5f}, chains {lost['chains']:.5f}, apart {apart:.1e}")
    # Both round to bfloat16 at the same places, in other orders of summation.
    assert lost["layers"] < 1.1 * lost["chains"] + 1e-3, lost
    assert apart < 1.3 * np.hypot(*lost.values()) + 1e-3, (lost, apart)
    # A token whose logit is ahead by more than both can be wrong is everybody's.
    best = np.sort(exact, axis=-1)
    clear = best[:, -1] - best[:, -2] > 8 * lost["chains"] * np.sqrt(np.mean(exact**2))
    chosen = [logits.argmax(-1) for logits in (exact, default, chains)]
    print(f"{clear.sum()} of {_STEPS} clear, {(chosen[1] == chosen[2]).sum()} tokens equal")
    assert clear.any()
    for found in chosen[1:]:
        np.testing.assert_array_equal(found[clear], chosen[0][clear])


def _logits(model, tokens):
    """Of every step after the prompt, float64 [steps, V], with the steps' own program."""
    graph, state = nnx.split(model)

    @jax.jit
    def begin(state, prompt):
        model = nnx.merge(graph, state)
        return model.prefill(prompt, jnp.asarray([_PROMPT]), 64)[1]

    @functools.partial(jax.jit, donate_argnums=2)
    def step(state, token, cache):
        return nnx.merge(graph, state).decode(token, cache)

    cache, found = begin(state, jnp.asarray(tokens[:, :_PROMPT], jnp.int32)), []
    for i in range(_PROMPT, tokens.shape[1]):
        logits, cache = step(state, jnp.asarray(tokens[:, i], jnp.int32), cache)
        found.append(np.asarray(logits[0], np.float64))
    return np.stack(found)
