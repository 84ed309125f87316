"""One token a sequence through all layers, by a plan that is chosen once for the whole model.

The unit of a plan is a `Block`: what lies between the attentions of two neighbouring layers. Attention
itself is the same in every plan. Where a GPU runs whole layers in one launch, `fused_layers` does.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
from flax import nnx
from jax import Array

from fdk_jax.models import fused_layers, fused_products
from fdk_jax.models.blocks import Block, blocks
from fdk_jax.models.cache import KVCache
from fdk_jax.models.modules import Layer, RMSNorm, add_and_norm, normed
from fdk_jax.models.peers import Peers

Rotation = tuple[Array, Array]


def rotations(
    layers: Sequence[Layer], positions: Array, lengths: Array, ends: Array
) -> list[Rotation]:
    """Each layer's (cosines, sines); layers of equal options share theirs.

    Args:
        layers: Of the model.
        positions: int32, of the tokens.
        lengths: int32, tokens of each sequence so far, these included.
        ends: int32, tokens that each sequence will have: one set of frequencies has to do for all of them.
    """
    shared: dict[Any, Rotation] = {}
    for layer in layers:
        rope = layer.attention.rope
        if rope not in shared:
            at_once = (
                rope is not None and rope.scaling is not None and rope.scaling.kind == "longrope"
            )
            shared[rope] = layer.attention.rotation(positions, ends if at_once else lengths)
    return [shared[layer.attention.rope] for layer in layers]


def step(
    layers: Sequence[Layer],
    norm: RMSNorm,
    x: Array,
    cache: KVCache,
    peers: Peers | None = None,
) -> tuple[Array, tuple[Array, ...], tuple[Array, ...]]:
    """All layers and the norm after them for one token a sequence.

    Args:
        layers: Of the model, at least one.
        norm: After the last of them.
        x: [B, D], the tokens' rows of the embedding.
        cache: What came before them.
        peers: What sums over devices may go through, if there are several.

    Returns:
        (the normed stream [B, D], keys, values), the cache's arrays one token longer.
    """
    longer = cache.lengths + 1
    ends = longer if cache.ends is None else cache.ends
    angles = rotations(layers, cache.lengths, longer, ends)
    arrays = x, angles, cache.lengths, cache.keys, cache.values
    apart = functools.partial(_run, _Apart(), layers, norm)
    whole = fused_layers.choose(layers, norm, x, cache)
    if whole is not None:
        fused = functools.partial(whole.run, layers, norm)
        return jax.lax.platform_dependent(*arrays, cuda=fused, default=apart)
    plan = fused_products.choose(layers, norm, x, peers)
    if plan is None:
        return apart(*arrays)
    fused = functools.partial(_run, plan, layers, norm)
    return jax.lax.platform_dependent(*arrays, cuda=fused, default=apart)


def _run(plan, layers, norm, x, angles, lengths, cache_keys, cache_values):
    stream, projected = plan.enter(x, layers[0].attention_norm, layers[0].attention.qkv)
    keys, values = [], []
    for block, angle, k, v in zip(
        blocks(layers, norm), angles, cache_keys, cache_values, strict=True
    ):
        stream, projected, k, v = _run_layer(
            plan, *nnx.split(tuple(block)), stream, projected, *angle, lengths, k, v
        )
        keys.append(k)
        values.append(v)
    return plan.leave(stream, norm), tuple(keys), tuple(values)


# Layers that are alike are traced once, and XLA inlines the calls.
@functools.partial(jax.jit, static_argnums=1)
def _run_layer(plan, graphdef, state, stream, projected, cos, sin, lengths, keys, values):
    block = Block(*nnx.merge(graphdef, state))
    mixed, keys, values = block.layer.attention.mix(projected, cos, sin, lengths, keys, values)
    return *plan.between(block, stream, mixed), keys, values


@functools.partial(jax.tree_util.register_dataclass, data_fields=[], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class _Apart:
    """Every product by itself, and a residual sum with the norm after it: the plan for every model.

    The stream is (the residual stream [B, D], the same after the newest norm).
    """

    def enter(self, x: Array, norm: RMSNorm | None, qkv: nnx.Module) -> tuple[Any, Array]:
        rows = normed(norm, x)
        return (x, rows), qkv(rows)

    def between(self, block: Block, stream: Any, mixed: Array) -> tuple[Any, Array | None]:
        x, delta = block.layer.after_attention(stream[0], mixed)
        x, rows = add_and_norm(block.norm, x, delta)
        return (x, rows), None if block.qkv is None else block.qkv(rows)

    def leave(self, stream: Any, norm: RMSNorm) -> Array:
        del norm  # the last block's
        return stream[1]
