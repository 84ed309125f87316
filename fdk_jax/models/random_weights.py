"""Models with random weights, made on the device: for benchmarks and tests of speed.

Quantised weights are drawn as codes, in the kernels' layout, so that no float weight ever exists.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array
from jax.sharding import PartitionSpec as P

from fdk_jax.format import codebooks, packing
from fdk_jax.format.quantised_tensor import QuantisedTensor
from fdk_jax.layers.linear import QuantisedWeight
from fdk_jax.models import names
from fdk_jax.models.config import ModelConfig
from fdk_jax.models.parallel import Parallel
from fdk_jax.models.transformer import Transformer, shapes
from fdk_jax.models.weights import (
    Placer,
    check_arithmetic,
    join_codebooks,
    set_linear,
    set_vector,
    share_table,
)
from fdk_jax.product.choice import LAYOUT_OF, default_backend


def random_model(
    config: ModelConfig,
    *,
    bits: int = 16,
    group_size: int = 64,
    codebook: str = "uniform",
    head_bits: int | None = None,
    embedding_bits: int | None = None,
    backend: str | None = None,
    arithmetic: str = "exact",
    parallel: Parallel | None = None,
    seed: int = 0,
) -> Transformer:
    """A model whose activations stay of the order of one.

    Args:
        config: Shapes.
        bits: 1, 2, 4 or 8; 16 keeps every matrix in the configuration's dtype.
        group_size: Weights that share a scale.
        codebook: "uniform" or "kmeans": an own, uneven codebook for each of the checkpoint's matrices,
            as the published models have.
        head_bits: Bits of the final projection (uniform), or None for the configuration's dtype.
        embedding_bits: Those of the embedding (uniform), or None for the configuration's dtype. With a tied
            head the same as `head_bits`: both are then one array.
        backend: Whose kernels the weights are laid out for; None for the default platform's.
        arithmetic: Of the activations, see `load`.
        parallel: Several devices that share every matrix; each draws its own slices, so that the weights are
            other ones than on one device. None uses the default device.
        seed: Of everything.

    Returns:
        The model.

    Raises:
        ValueError: a codebook, an arithmetic or bits of the embedding that there are not, or shapes that the
            devices do not divide.
        NotImplementedError: a mixture of experts.
    """
    if codebook not in ("uniform", "kmeans"):
        raise ValueError(f"{codebook=} is not uniform or kmeans")
    if embedding_bits not in (None, *packing.BITS):
        raise ValueError(
            f"{embedding_bits=} is not one of {packing.BITS}; None keeps the embedding as it is"
        )
    if config.tie_embeddings and embedding_bits not in (None, head_bits):
        raise ValueError(
            f"{embedding_bits=} of a tied embedding must be head_bits={head_bits}, or None to keep a float copy"
        )
    if any(config.layer(index).experts for index in range(config.num_layers)):
        raise NotImplementedError("random weights of a mixture of experts")
    model = shapes(config, parallel)
    dtype, rng = jnp.dtype(config.dtype), np.random.default_rng(seed)
    backend = backend or default_backend()
    check_arithmetic(arithmetic, backend)
    placer = Placer(parallel, config.dtype, backend)
    shards, layout = placer.shards, LAYOUT_OF[backend]
    # Far faster than the default generator, and good enough for weights that mean nothing.
    keys = _keys(seed)

    def weight(projection: names.Projection, bits: int, codebook: str) -> Array | QuantisedTensor:
        rows = [part.shape[0] for part in projection.parts]
        n, k, cut = sum(rows), projection.parts[0].shape[1], projection.cut
        local = (n // shards, k) if cut == "n" else (n, k // shards)
        if bits == 16:
            return _matrix(next(keys), parallel, local[::-1], int(cut == "n"), dtype, k)
        placer.check_cut(cut, k, group_size)
        # Parts along the inputs lie side by side in the interchange layout, and end to end in all others.
        axis = int(layout == "interchange" and cut == "k")
        weight_shape = (bits, group_size, *local)
        packed, scales = _codes(next(keys), parallel, axis, layout, *weight_shape, dtype, k)
        values = join_codebooks([_codebook(codebook, bits, rng) for _ in rows], rows, shards)
        uniform = codebook == "uniform" or bits == 1
        values = placer.codebook(values, cut)
        return QuantisedTensor(
            packed, scales, values, bits, group_size, local, "nk", layout, uniform
        )

    for index, layer in enumerate(model.layers):
        for path, size in names.layer_vectors(config, index).values():
            set_vector(layer, path, placer.vector(np.ones(size)))
        for projection in names.layer_projections(config, index):
            rows = sum(part.shape[0] for part in projection.parts)
            bias = None
            if projection.parts[0].bias:
                bias = placer.bias(np.zeros(rows), projection.cut)
            matrix = weight(projection, bits, codebook)
            set_linear(layer, projection.path, matrix, bias, dtype, arithmetic)
    set_vector(model, ("norm", "scale"), placer.vector(np.ones(config.hidden_size)))
    if embedding_bits is None:
        # Rows of about unit length, so that a tied head gives logits of the order of one.
        rows, width = config.vocab_size // shards, config.hidden_size
        table = _matrix(next(keys), parallel, (rows, width), 0, dtype, width)
        model.embedding = nnx.Param(table)
    head = names.head(config)
    if head_bits is not None or not config.tie_embeddings:
        matrix = weight(head, head_bits or 16, "uniform")
        set_linear(model, head.path, matrix, None, dtype, arithmetic)
    if embedding_bits is not None and config.tie_embeddings:
        share_table(model)
    elif embedding_bits is not None:
        table = weight(head, embedding_bits, "uniform")
        assert isinstance(table, QuantisedTensor), "embedding_bits are those of a quantised weight"
        model.embedding = QuantisedWeight(table)
    return model


def _keys(seed: int):
    key = jax.random.key(seed, impl="rbg")
    while True:
        key, new = jax.random.split(key)
        yield new


def _on_each(parallel: Parallel | None, draw: Callable[[Array], Any], key: Array, axis: int) -> Any:
    """draw(key), on several devices with a key of each one's own, laid end to end along an axis."""
    if parallel is None:
        return draw(key)

    def own(key: Array) -> Any:
        return draw(jax.random.fold_in(key, jax.lax.axis_index(parallel.axis)))

    partition = P(*[None] * axis, parallel.axis)
    return jax.shard_map(
        own, mesh=parallel.mesh, in_specs=P(), out_specs=partition, check_vma=False
    )(key)


@functools.partial(jax.jit, static_argnums=(1, 2, 3, 4, 5))
def _matrix(
    key: Array, parallel: Parallel | None, shape: tuple[int, ...], axis: int, dtype, fan_in: int
) -> Array:
    """Even values with a variance of 1 / fan_in, of so many on each device."""
    limit = jnp.asarray(math.sqrt(3 / fan_in), dtype)

    def draw(key: Array) -> Array:
        return jax.random.uniform(key, shape, dtype, -limit, limit)

    return _on_each(parallel, draw, key, axis)


@functools.partial(jax.jit, static_argnums=(1, 2, 3, 4, 5, 6, 7, 8, 9))
def _codes(
    key, parallel, axis, layout, bits, group_size, n, k, dtype, fan_in
) -> tuple[Array, Array]:
    """Random (packed, scales) in a layout; every code is valid, so no packing is needed."""
    packed, scales = packing.layout_struct(
        layout, bits=bits, group_size=group_size, out_features=n, in_features=k, dtype=dtype
    )
    factor = jnp.asarray(math.sqrt(3 / fan_in), dtype)
    unsigned = jnp.dtype(f"uint{8 * packed.dtype.itemsize}")

    def draw(key: Array) -> tuple[Array, Array]:
        words = jax.random.bits(key, packed.shape, unsigned)
        return (
            jax.lax.bitcast_convert_type(words, packed.dtype),
            jax.random.uniform(key, scales.shape, scales.dtype) * factor + factor / 2,
        )

    return _on_each(parallel, draw, key, axis)


def _codebook(kind: str, bits: int, rng: np.random.Generator) -> np.ndarray:
    even = codebooks.uniform(bits)
    if kind == "uniform":
        return even
    return np.sort(even + rng.uniform(-0.3, 0.3, even.shape) * 2**-bits).astype(np.float32)
