"""How far a model is from float32 arithmetic on dequantised weights, beside what bfloat16 loses."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import PartitionSpec as P

import fdk_jax
from fdk_jax.benchmark import inputs
from fdk_jax.models import KVCache, ModelConfig, Parallel, Transformer, decoding
from fdk_jax.models.modules import Layer, RMSNorm
from fdk_jax.models.peers import Peers
from fdk_jax.models.peers import specs as peers_specs

# Relative RMS of two layers beyond that of plain bfloat16: activations in integers through eight products.
_TOLERANCE = {"exact": 1e-3, "int16": 2e-3, "int8": 8e-2}


def check(
    model: Transformer, peers: Peers | None, *, batch: int, prompt: int, arithmetic: str
) -> dict[str, Any]:
    """The keys of a row that say how far a model is from float32; with those of a failed row, if too far.

    Args:
        model: whose plan is timed.
        peers: memory of other GPUs that its sums go through, or None.
        batch: sequences.
        prompt: tokens of each prompt.
        arithmetic: of the products, see `fdk_jax.matmul`.
    """
    errors = measure(model, peers, batch=batch, prompt=prompt)
    for key in ("rel_rms_error", "prefill_rel_rms_error"):
        # Roundings of activations that happen elsewhere may add up otherwise than plain ones.
        allowed = 1.5 * errors[f"plain_{key}"] + _TOLERANCE[arithmetic]
        if not errors[key] <= allowed:
            reason = f"{key} {errors[key]:.3g} of two layers is above {allowed:.3g}"
            return errors | {"status": "failed", "reason": reason}
    return errors


def measure(
    model: Transformer, peers: Peers | None, *, batch: int, prompt: int
) -> dict[str, float]:
    """Relative RMS errors after the first two layers and the last norm, against float32 dequantised weights.

    Of one token a sequence, by the plan that a step of this batch size has, chains included;
    of prompts of this length, whose first tokens see few others; and of both with weights that were dequantised
    to the model's dtype, which is what plain bfloat16 loses.

    Args:
        model: whose plan is timed.
        peers: memory of other GPUs that its sums go through, or None.
        batch: sequences.
        prompt: tokens of each prompt.
    """
    config = model.config
    part = nnx.List([*list(model.layers)[:2], model.norm])
    # Small beside what the layers add, which does not depend on its size: norms come first.
    shape = (batch, max(prompt, 2), config.hidden_size)
    x = jax.random.normal(jax.random.key(1), shape, jnp.dtype(config.dtype)) * 2**-6

    def run(function, dtype: str | None, x: jax.Array) -> jax.Array:
        through = peers if dtype is None else None
        return _on_devices(function, part, config, model.parallel, through, dtype, x)

    wide, errors = x.astype(jnp.float32), {}
    token = ("rel_rms_error", _one_token, x[:, 0], wide[:, 0])
    whole = ("prefill_rel_rms_error", _whole_prompt, x, wide)
    for key, function, rows, exact in (token, whole):
        wanted = np.asarray(run(function, "float32", exact), np.float64)
        for name, dtype in ((key, None), (f"plain_{key}", config.dtype)):
            found = np.asarray(run(function, dtype, rows), np.float32)
            errors[name] = inputs.relative_rms_error(found, wanted)
    return errors


def _on_devices(
    function: Callable[[nnx.List, jax.Array, ModelConfig, Peers | None], jax.Array],
    part: nnx.List,
    config: ModelConfig,
    parallel: Parallel | None,
    peers: Peers | None,
    dtype: str | None,
    x: jax.Array,
) -> jax.Array:
    """function(layers and a norm, x, configuration of a slice, peers) by one program on all devices.

    Weights are dequantised to `dtype`, slice by slice where they lie; None leaves them as they are.
    """
    graph, state = nnx.split(part)
    leaves, tree = jax.tree.flatten(state)
    local = config if parallel is None else parallel.local(config)

    def run(leaves: list[jax.Array], peers: Peers | None, x: jax.Array) -> jax.Array:
        here, own = nnx.merge(graph, jax.tree.unflatten(tree, leaves)), local
        if dtype is not None:
            own = dataclasses.replace(local, dtype=dtype)
            here = _dense(here, own, parallel)
        with jax.default_matmul_precision("highest"):
            return function(here, x, own, peers)

    if parallel is not None:
        specs: Any = [leaf.sharding.spec for leaf in leaves]
        run = jax.shard_map(
            run,
            mesh=parallel.mesh,
            in_specs=(specs, peers_specs(parallel), P()),
            out_specs=P(),
            check_vma=False,
        )
    return jax.jit(run)(leaves, peers, x)


def _dense(part: nnx.List, config: ModelConfig, parallel: Parallel | None) -> nnx.List:
    """A copy of layers and a norm with dequantised weights of the configuration's dtype."""
    state = nnx.state(fdk_jax.dequantise(part, jnp.dtype(config.dtype)))

    def make() -> nnx.List:
        rngs, count = nnx.Rngs(0), len(part) - 1
        layers = [Layer(config, config.layer(i), parallel, rngs) for i in range(count)]
        return nnx.List([*layers, RMSNorm(config.hidden_size, config)])

    copy = nnx.eval_shape(make)
    nnx.update(copy, jax.tree.map(lambda a: a.astype(config.dtype), state))
    return copy


def _one_token(part: nnx.List, x: jax.Array, config: ModelConfig, peers: Peers | None) -> jax.Array:
    """[B, D] after the last norm, of one token a sequence [B, D] with an empty cache."""
    shape = (len(x), config.num_kv_heads, 64, config.head_dim)
    caches = (jnp.zeros(shape, x.dtype),) * (len(part) - 1)
    *layers, norm = part
    empty = KVCache(caches, caches, jnp.zeros(len(x), jnp.int32))
    return decoding.step(layers, norm, x, empty, peers)[0]


def _whole_prompt(
    part: nnx.List, x: jax.Array, config: ModelConfig, peers: Peers | None
) -> jax.Array:
    """[B, T, D] after the last norm, of prompts [B, T, D], which XLA sums over devices."""
    del peers, config
    *layers, norm = part
    length = jnp.asarray([[x.shape[1]]], jnp.int32)
    angles = decoding.rotations(layers, jnp.arange(x.shape[1])[None], length, length)
    for layer, angle in zip(layers, angles, strict=True):
        x, *_ = layer.prompt(x, *angle)
    return norm(x)
