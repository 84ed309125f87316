"""What lies between two attentions of a model: the unit in which a decoding step is planned."""

from collections.abc import Sequence
from typing import NamedTuple

from flax import nnx

from fdk_jax.models.modules import Layer, RMSNorm


class Block(NamedTuple):
    """From a layer's attention to the queries, keys and values of the next.

    Attributes:
        layer: Whose output projection and feed-forward block come first.
        norm: After this layer: the next one's before attention (None without one), or the model's last.
        qkv: The next layer's projection, or None after the last layer.
    """

    layer: Layer
    norm: RMSNorm | None
    qkv: nnx.Module | None


def blocks(layers: Sequence[Layer], norm: RMSNorm) -> list[Block]:
    """One block a layer, with the model's last norm after the last of them."""
    following = [(layer.attention_norm, layer.attention.qkv) for layer in layers[1:]]
    return [
        Block(layer, *after)
        for layer, after in zip(layers, [*following, (norm, None)], strict=True)
    ]
