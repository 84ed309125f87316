"""The plan of a decoding step that has many layers in one launch on a GPU, see `pallas_kernels.layers`.

For one sequence on one device, quantised weights in the planar layout, layers that are all alike, and caches
that are short enough for a program a head.
"""

import dataclasses
import os
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from fdk_jax.models import fused_products
from fdk_jax.models.blocks import blocks
from fdk_jax.models.cache import KVCache
from fdk_jax.models.modules import Layer, RMSNorm
from pallas_kernels import layers as kernels
from pallas_kernels import ring_arithmetic, short_attention, target
from pallas_kernels.case import Case

LAYERS = "FDK_JAX_LAYERS"  # 0: no whole layers in one launch


@dataclasses.dataclass(frozen=True)
class InLayers:
    """As few launches as can have all layers.

    Attributes:
        plan: of a launch of one layer.
        max_layers: of a launch.
    """

    plan: kernels.Plan
    max_layers: int

    def run(
        self,
        layers: Sequence[Layer],
        norm: RMSNorm,
        x: Array,
        angles: Sequence[tuple[Array, Array]],
        lengths: Array,
        keys: Sequence[Array],
        values: Sequence[Array],
    ) -> tuple[Array, tuple[Array, ...], tuple[Array, ...]]:
        """All layers and the norm after them; see `decoding.step`."""
        arrays = [
            _arrays(layer, after, x, *cache)
            for layer, after, *cache in zip(layers, _norms(layers, norm), keys, values, strict=True)
        ]
        first = fused_products.to_scaled(x, _there(layers[0].attention_norm).scale[...])
        missing = self.plan.square_parts(kernels.DOWN) - first.squares.size
        stream = kernels.Stream(first.total, first.scaled, jnp.pad(first.squares, (0, missing)))
        new_keys, new_values = (), ()
        for part in _parts(arrays, self.max_layers):
            plan = dataclasses.replace(self.plan, layers=len(part))
            stream, k, v = kernels.run(plan, part, stream, *angles[0], lengths)
            new_keys, new_values = (*new_keys, *k), (*new_values, *v)
        left = fused_products.Scaled(stream.total, stream.scaled, stream.squares)
        return fused_products.from_scaled(left, norm.eps), new_keys, new_values


def _parts(layers: Sequence[kernels.Layer], max_layers: int) -> list[Sequence[kernels.Layer]]:
    """As few parts as there can be, about as large as each other; all but the last one even, see `Stream`."""
    if len(layers) <= max_layers:
        return [layers]
    launches = -(-len(layers) // (max_layers - max_layers % 2))
    each = -(-len(layers) // launches)
    each += each % 2
    return [layers[start : start + each] for start in range(0, len(layers), each)]


def choose(layers: Sequence[Layer], norm: RMSNorm, x: Array, cache: KVCache) -> InLayers | None:
    """The plan for layers, inputs like x [B, D] and a cache, or None."""
    if not _switched_on() or len(x) > 1 or not _are_alike(layers, norm):
        return None
    first, attention = layers[0], layers[0].attention
    usual = attention.has_usual_heads and attention.is_plain
    products = _products(first, x)
    if not usual or products is None:
        return None
    _, kv_heads, capacity, dim = cache.keys[0].shape
    eps = None if attention.head_norms is None else attention.config.norm_eps
    heads = attention.config.num_heads
    token = short_attention.Case(heads, kv_heads, dim, capacity, x.dtype, eps)
    if capacity >= short_attention.SLOTS:
        return None
    cases = tuple(Case.of(arrays, **spec) for arrays, spec in products)
    gpu = target.current()
    both = _there(first.attention_norm).eps, _there(first.mlp_norm).eps
    config = ring_arithmetic.config(cases, gpu, kernels.GATE_UP)
    plan = kernels.Plan(cases, token, both, 1, config, gpu)
    if kernels.unsupported_reason(plan) is not None:
        return None
    count = kernels.max_layers(plan)
    return InLayers(plan, count) if count > 1 else None


def _switched_on() -> bool:
    """Whether layers may be in one launch, which a switch forbids.

    Raises:
        ValueError: a switch that is neither 0 nor 1.
    """
    switch = os.environ.get(LAYERS, "1")
    if switch not in ("0", "1"):
        raise ValueError(f"{LAYERS}={switch!r} must be 0 or 1")
    return switch == "1"


def _are_alike(layers: Sequence[Layer], norm: RMSNorm) -> bool:
    """Whether the layers are all of one kind, and one that the kernel computes, on one device."""
    if layers[0].attention.axis is not None:
        return False
    if any(fused_products.parts(block) is None for block in blocks(layers, norm)):
        return False
    kinds = set()
    for layer, after in zip(layers, _norms(layers, norm), strict=True):
        graphdef, state = nnx.split(layer)
        shapes = tuple((leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(state))
        kinds.add((graphdef, shapes, after.eps))
    return len(kinds) == 1


def _norms(layers: Sequence[Layer], norm: RMSNorm) -> list[RMSNorm]:
    """The norm after each layer."""
    return [*(_there(layer.attention_norm) for layer in list(layers)[1:]), norm]


def _there(norm: RMSNorm | None) -> RMSNorm:
    """A norm of a layer that `fused_products.parts` knows: it has one."""
    assert norm is not None, "a plan is chosen for layers that it takes"
    return norm


def _products(layer: Layer, x: Array) -> list[tuple[Any, dict[str, Any]]] | None:
    """The layer's weights as kernels take them, for inputs like x [1, D]; None if they are others'."""
    linears = layer.attention.qkv, layer.attention.out, layer.mlp.gate_up, layer.mlp.down
    found = [fused_products.planar(linear, x) for linear in linears]
    weights = [weight for weight in found if weight is not None]
    return weights if len(weights) == len(found) else None


def _arrays(layer: Layer, after: RMSNorm, x: Array, keys: Array, values: Array) -> kernels.Layer:
    """The layer's arrays as the kernel takes them."""
    products = _products(layer, x)
    assert products is not None, "a plan is chosen for layers that it takes"
    weights = tuple(arrays for arrays, _ in products)
    scales = _there(layer.mlp_norm).scale[...], after.scale[...]
    return kernels.Layer(weights, scales, layer.attention.head_norms or (), keys, values)
