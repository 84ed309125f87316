"""Rotations folded into a model's weights: the same function, whose weights and activations have no outliers.

What flows between the layers is turned by an orthogonal matrix, and each head's values by another; the matrices
before them turn it, those after them turn it back. A norm of root mean squares does not notice, once its scale
is part of the matrix after it. Low-bit levels fit what is left better: every weight is a mean over many (QuIP,
arXiv 2307.13304; QuaRot, arXiv 2404.00456). What the last projection of a feed-forward block reads is not
turned: the activation function before it does not let a rotation through.
"""

import dataclasses

import jax.numpy as jnp
import numpy as np
import scipy.linalg
from flax import nnx
from jax import Array

from fdk_jax.format.orientation import to_matrix
from fdk_jax.format.quantised_tensor import QuantisedTensor
from fdk_jax.models.config import ModelConfig
from fdk_jax.models.modules import MLP, Layer, Linear, RMSNorm, make_linear
from fdk_jax.models.transformer import Transformer


@dataclasses.dataclass(frozen=True)
class Rotation:
    """Orthogonal matrices of a model.

    Attributes:
        stream: float32 [D, D], of the residual stream.
        values: float32 [d, d], of each head's values.
    """

    stream: Array
    values: Array

    @classmethod
    def of(cls, config: ModelConfig, seed: int = 0) -> "Rotation":
        """Of a model's shapes.

        Raises:
            ValueError: a model that a rotation cannot be folded into.
        """
        if config.post_norms or not config.pre_norms:
            raise ValueError(
                "a rotation cannot be folded into norms after attention and feed-forward blocks, which"
                f" {config.family!r} models have: leave it out"
            )
        rng = np.random.default_rng(seed)
        return cls(
            *(jnp.asarray(_orthogonal(n, rng)) for n in (config.hidden_size, config.head_dim))
        )


def _orthogonal(size: int, rng: np.random.Generator) -> np.ndarray:
    """float32 [size, size]: a Hadamard matrix with random signs, times a random one for an odd factor."""
    power = size & -size
    odd = np.linalg.qr(rng.standard_normal((size // power, size // power)))[0]
    made = np.kron(odd, scipy.linalg.hadamard(power) / np.sqrt(power))
    return (rng.choice([-1.0, 1.0], size)[:, None] * made).astype(np.float32)


def rotate_layer(layer: Layer, rotation: Rotation) -> None:
    """Turns the float weights of one layer, in place."""
    attention, mlp = layer.attention, layer.mlp
    c, turn = attention.config, rotation.stream
    if not (
        isinstance(attention.qkv, Linear)
        and isinstance(attention.out, Linear)
        and isinstance(mlp, MLP)
        and isinstance(mlp.gate_up, Linear)
        and isinstance(mlp.down, Linear)
        and layer.attention_norm is not None
        and layer.mlp_norm is not None
    ):
        raise ValueError("a rotation is folded into float weights, and not into those of experts")
    _read_turned(attention.qkv, layer.attention_norm, turn)
    start = (c.num_heads + c.num_kv_heads) * c.head_dim
    for name in ("kernel", "bias"):
        if (old := getattr(attention.qkv, name)) is not None:
            setattr(attention.qkv, name, nnx.Param(_turned_heads(old[...], rotation.values, start)))
    kernel = attention.out.kernel[...]  # [H * d, D]
    by_head = kernel.astype(jnp.float32).reshape(-1, c.head_dim, kernel.shape[-1])
    back = jnp.einsum("de,hdn->hen", rotation.values, by_head, precision="highest")
    attention.out.kernel = nnx.Param(back.reshape(kernel.shape).astype(kernel.dtype))
    _write_turned(attention.out, turn)
    _read_turned(mlp.gate_up, layer.mlp_norm, turn)
    _write_turned(mlp.down, turn)


def rotate_ends(model: Transformer, rotation: Rotation) -> None:
    """Turns the embedding and the head, in place; they become matrices of floats, each its own."""
    table, turn = _floats(model.embedding.get_value(), model), rotation.stream
    head = model.lm_head
    if not isinstance(head, Linear):
        kernel = table.T if head is None else _floats(head.weight.get_value(), model).T
        bias = None if head is None else head.bias
        k, n = kernel.shape
        made = nnx.eval_shape(
            lambda: make_linear(k, n, model.config, bias is not None, nnx.Rngs(0))
        )
        made.kernel = nnx.Param(kernel)
        made.bias = None if bias is None else nnx.Param(bias.get_value())
        model.lm_head = nnx.data(made)
        model.config = dataclasses.replace(model.config, tie_embeddings=False)
        head = made
    _read_turned(head, model.norm, turn)
    model.embedding = nnx.Param(_product(table, turn))


def _floats(table: Array | QuantisedTensor, model: Transformer) -> Array:
    """A matrix [V, D] in the dtype of the model."""
    if not isinstance(table, QuantisedTensor):
        return table
    return to_matrix(table.dequantise(jnp.dtype(model.config.dtype)), table.axes)[0]


def rotated(model: Transformer, seed: int = 0) -> Transformer:
    """The same function with turned weights; see the module.

    Args:
        model: on one device, with layers of floats; it is not changed. An embedding or a head that is quantised
            becomes one of floats.
        seed: of the random signs.

    Raises:
        ValueError: norms after attention, experts, or layers that are quantised already.
    """
    rotation = Rotation.of(model.config, seed)
    model = nnx.clone(model)
    for layer in model.layers:
        rotate_layer(layer, rotation)
    rotate_ends(model, rotation)
    return model


def _product(a: Array, b: Array) -> Array:
    """A @ b in float32, in the dtype of the weight among them."""
    dtype = a.dtype if a.dtype != jnp.float32 else b.dtype
    wide = jnp.matmul(a.astype(jnp.float32), b.astype(jnp.float32), precision="highest")
    return wide.astype(dtype)


def _read_turned(linear: Linear, norm: RMSNorm, turn: Array) -> None:
    """A matrix [D, N] after a norm reads the turned stream, and takes over the norm's scale."""
    kernel = linear.kernel[...]
    scale = norm.scale[...].astype(jnp.float32) + norm.offset
    linear.kernel = nnx.Param(
        _product(turn.T, scale[:, None] * kernel.astype(jnp.float32)).astype(kernel.dtype)
    )
    norm.scale = nnx.Param(jnp.full_like(norm.scale[...], 1 - norm.offset))


def _write_turned(linear: Linear, turn: Array) -> None:
    """A matrix [K, D] writes to the turned stream."""
    linear.kernel = nnx.Param(_product(linear.kernel[...], turn))
    if linear.bias is not None:
        linear.bias = nnx.Param(_product(linear.bias[...][None], turn)[0])


def _turned_heads(array: Array, turn: Array, start: int) -> Array:
    """The heads from column `start` on of [..., columns], each turned."""
    rest, values = array[..., :start], array[..., start:]
    heads = values.reshape(*values.shape[:-1], -1, len(turn))
    turned = _product(heads, turn).reshape(values.shape)
    return jnp.concatenate([rest, turned], axis=-1)
