"""Plans of a decoding step that GPU kernels make possible: sums and norms that come with the products.

See `fdk_jax.models.decoding` for what a plan is. They are for layers with RMS norms before their blocks; those
of one device for one sequence, quantised weights in the planar layout and SwiGLU.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

import pallas_kernels
from fdk_jax.layers.linear import QuantisedLinear
from fdk_jax.models.blocks import Block, blocks
from fdk_jax.models.modules import MLP, Attention, Layer, RMSNorm
from fdk_jax.models.peers import Peers
from pallas_kernels import Scaled
from pallas_kernels.case import Arrays

_without_arrays = functools.partial(
    jax.tree_util.register_dataclass, data_fields=[], meta_fields=[]
)


@_without_arrays
@dataclasses.dataclass(frozen=True)
class InProducts:
    """Four launches between two attentions: each product has the sum or the norm beside it.

    The stream is the residual sum, its next norm deferred to the product that follows.
    """

    def takes(self, block: Block, x: Array) -> bool:
        """Whether there are kernels for a block and inputs like x [B, D]."""
        linears = [block.layer.attention.qkv, *_usual(block).linears]
        return all(_residual_kernel(linear, x) is not None for linear in linears)

    def enter(self, x: Array, norm: RMSNorm, qkv: nnx.Module) -> tuple[Scaled, Array]:
        """The stream before the first layer, and the first layer's queries, keys and values."""
        stream = to_scaled(x, norm.scale[...])
        return stream, _product(qkv, x)(stream, eps=norm.eps)

    def between(self, block: Block, stream: Scaled, mixed: Array) -> tuple[Scaled, Array | None]:
        """A block after its attention: the stream after it, and the next queries, keys and values."""
        attention, mlp, inner, norm, qkv = _usual(block)
        product = functools.partial(_product, x=stream.total)
        stream = product(attention.out)(mixed, residual=stream.total, norm_scale=inner.scale[...])
        gated = mlp.gate(product(mlp.gate_up)(stream, eps=inner.eps))
        stream = product(mlp.down)(gated, residual=stream.total, norm_scale=norm.scale[...])
        return stream, None if qkv is None else product(qkv)(stream, eps=norm.eps)

    def leave(self, stream: Scaled, norm: RMSNorm) -> Array:
        """The normed stream after the last layer, [1, D]."""
        return from_scaled(stream, norm.eps)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class InChains(InProducts):
    """One launch between two attentions, on one device or several.

    The stream is the residual sum [1, D]; after the last layer its norm is deferred.
    """

    peers: Peers | None = None

    def takes(self, block: Block, x: Array) -> bool:
        """Whether there is a kernel for a block and inputs like x [B, D], and one for the first product."""
        chain = _chain_kernel(_usual(block).linears, x, self.peers)
        return chain is not None and _residual_kernel(block.layer.attention.qkv, x) is not None

    def enter(self, x: Array, norm: RMSNorm, qkv: nnx.Module) -> tuple[Array, Array]:
        """See `InProducts.enter`."""
        stream, projected = super().enter(x, norm, qkv)
        return stream.total, projected

    def between(self, block: Block, stream: Array, mixed: Array) -> tuple[Any, Array | None]:
        """See `InProducts.between`."""
        usual = _usual(block)
        chain = _chain_kernel(usual.linears, stream, self.peers)
        assert chain is not None, "a plan is chosen for blocks that it takes"
        norms = usual.mlp_norm, usual.norm
        after, projected = chain(
            mixed,
            stream,
            norm_scales=[norm.scale[...] for norm in norms],
            eps=[norm.eps for norm in norms],
        )
        return (after if block.qkv is None else after.total), projected


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class OverPeers:
    """On several devices: the sum over them, the residual sum and the norm are one launch.

    The stream is (the residual stream [B, D], the same after the newest norm).
    """

    peers: Peers

    def takes(self, block: Block, x: Array) -> bool:
        """Whether there are kernels for a block and inputs like x [B, D]."""
        del block
        return self.peers.takes(x)

    def enter(self, x: Array, norm: RMSNorm, qkv: nnx.Module) -> tuple[Any, Array]:
        """See `InProducts.enter`."""
        rows = norm(x)
        return (x, rows), qkv(rows)

    def between(self, block: Block, stream: Any, mixed: Array) -> tuple[Any, Array | None]:
        """See `InProducts.between`."""
        attention, mlp, inner, norm, qkv = _usual(block)
        x, rows = self.peers.add_norm(attention.out(mixed), stream[0], inner)
        x, rows = self.peers.add_norm(mlp.partial(rows), x, norm)
        return (x, rows), None if qkv is None else qkv(rows)

    def leave(self, stream: Any, norm: RMSNorm) -> Array:
        """The normed stream after the last layer, [B, D]."""
        del norm  # the last block's
        return stream[1]


Plan = InProducts | OverPeers
PLANS = (InChains(), InProducts())  # on one device, the fewest launches first


def choose(
    layers: Sequence[Layer], norm: RMSNorm, x: Array, peers: Peers | None = None
) -> Plan | None:
    """The first plan that takes all layers, for inputs like x [B, D]; None if none does.

    Blocks that are alike are asked for once.

    Args:
        layers: Of the model.
        norm: After the last of them.
        x: The tokens' rows of the embedding.
        peers: What sums over devices may go through, if there are several.
    """
    kinds: dict[Any, Block] = {}
    for block in blocks(layers, norm):
        if parts(block) is None:
            return None
        graphdef, state = nnx.split(tuple(block))
        shapes = tuple((leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(state))
        kinds[graphdef, shapes] = block
    plans: Sequence[Plan] = PLANS
    if layers[0].attention.axis is not None:
        plans = () if peers is None else (InChains(peers), OverPeers(peers))
    for plan in plans:
        if all(plan.takes(block, x) for block in kinds.values()):
            return plan
    return None


class _Usual(NamedTuple):
    """The parts of a block that is what the kernels compute, apart from its weights."""

    attention: Attention
    mlp: MLP
    mlp_norm: RMSNorm
    norm: RMSNorm
    qkv: nnx.Module | None

    @property
    def linears(self) -> list[nnx.Module]:
        """The products of the block, in order."""
        linears: list[nnx.Module] = [self.attention.out, self.mlp.gate_up, self.mlp.down]
        return linears if self.qkv is None else [*linears, self.qkv]


def parts(block: Block) -> _Usual | None:
    """None for a block with anything that the kernels do not compute."""
    layer, norm, qkv = block
    before, inner, mlp = layer.attention_norm, layer.mlp_norm, layer.mlp
    if before is None or inner is None or norm is None or not isinstance(mlp, MLP):
        return None
    usual = (
        layer.attention_post_norm is None
        and layer.mlp_post_norm is None
        and mlp.activation == "silu"
        and layer.scale == 1
        and before.offset == inner.offset == norm.offset == 0
    )
    return _Usual(layer.attention, mlp, inner, norm, qkv) if usual else None


def _usual(block: Block) -> _Usual:
    found = parts(block)
    assert found is not None, "a plan is chosen for blocks that it takes"
    return found


def _product(linear: nnx.Module, x: Array) -> Callable:
    kernel = _residual_kernel(linear, x)
    assert kernel is not None, "a plan is chosen for blocks that it takes"
    return kernel


def _residual_kernel(linear: nnx.Module, x: Array) -> Callable | None:
    """`pallas_kernels.residual_matmul` with the weight of a layer, for inputs like x [B, K].

    None if no GPU kernel takes the norm before this product, and the residual sum after it, with it.
    """
    found = planar(linear, x)
    if found is None or pallas_kernels.residual_plan(found[0], **found[1]) is None:
        return None
    arrays, spec = found
    weight = {name: array for name, array in arrays._asdict().items() if name != "x"}
    return functools.partial(pallas_kernels.residual_matmul, **weight, **spec)


def _chain_kernel(linears: Sequence[nnx.Module], x: Array, peers: Peers | None) -> Callable | None:
    """`pallas_kernels.chain_matmul` with the weights of layers, for inputs like x [B, K].

    None if no GPU kernel takes them in one launch.
    """
    found = [planar(linear, x) for linear in linears]
    weights = [weight for weight in found if weight is not None]
    if len(weights) < len(found):
        return None
    options: dict[str, Any] = {}
    if peers is not None:
        options = dict(devices=peers.devices, peers=(peers.mailbox, peers.addresses))
    if pallas_kernels.chain_plan(weights, options.get("devices", 1)) is None:
        return None
    return functools.partial(pallas_kernels.chain_matmul, weights=weights, **options)


def planar(linear: nnx.Module, x: Array) -> tuple[Arrays, dict[str, Any]] | None:
    """The weight of a layer as `residual_plan` takes it, for inputs like x [B, K]; None if it is another's."""
    if not isinstance(linear, QuantisedLinear) or linear.axis is not None:
        return None
    w, bias = linear.weight.get_value(), linear.bias
    dtype = linear.dtype or jnp.promote_types(x.dtype, w.dtype)
    if w.layout != "planar" or linear.backend not in (None, "pallas") or dtype != x.dtype:
        return None
    row: Any = jax.ShapeDtypeStruct((x.shape[0], w.in_features), x.dtype)
    arrays = Arrays(row, w.packed, w.scales, w.codebook, None if bias is None else bias.get_value())
    spec = {name: value for name, value in w.spec.items() if name != "in_features"}
    return arrays, spec | {"uniform": w.uniform}


def to_scaled(x: Array, scale: Array) -> Scaled:
    """A residual stream [1, D] with a deferred norm."""
    squares = jnp.square(x.astype(jnp.float32)).sum(axis=1)
    return Scaled(x, x * scale[None, :], squares)


def from_scaled(x: Scaled, eps: float) -> Array:
    """The norm of a sum, [1, D]."""
    mean = x.squares.sum() / x.total.shape[1]
    return (x.scaled.astype(jnp.float32) * jax.lax.rsqrt(mean + eps)).astype(x.scaled.dtype)
