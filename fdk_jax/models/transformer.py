"""A decoder-only language model: embedding, layers, head; over prompts and token by token."""

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from fdk_jax.format.quantised_tensor import QuantisedTensor
from fdk_jax.layers.linear import QuantisedLinear, QuantisedWeight
from fdk_jax.models import decoding, platforms
from fdk_jax.models.cache import KVCache, fill
from fdk_jax.models.config import ModelConfig
from fdk_jax.models.modules import Layer, Linear, RMSNorm, make_linear
from fdk_jax.models.parallel import Parallel
from fdk_jax.models.peers import Peers
from fdk_jax.product.rows import take_rows as take_quantised_rows


class Transformer(nnx.Module):
    """A decoder-only language model.

    Args:
        config: Shapes and options of the whole model.
        parallel: None for one device. Otherwise this is what one device of the mesh runs inside
            `jax.shard_map`, while the arrays are global: see `fdk_jax.models.Generator`.
        rngs: Random weights for a new model; `load` fills a checkpoint in.
        layers: Numbers of the layers to make; None for all of them.
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        parallel: Parallel | None = None,
        rngs: nnx.Rngs,
        layers: Sequence[int] | None = None,
    ):
        self.config = config
        self.parallel = parallel
        self.peers: Peers | None = None  # a program on several devices has them
        local = parallel.local(config) if parallel else config
        dtype, shape = jnp.dtype(config.dtype), (local.vocab_size, config.hidden_size)
        scale = jnp.asarray(config.hidden_size**-0.5, dtype)
        self.embedding: nnx.Param | QuantisedWeight = nnx.Param(
            jax.random.normal(rngs.params(), shape, dtype) * scale
        )
        self.layers = nnx.List(
            [
                Layer(local, config.layer(i), parallel, rngs)
                for i in (range(config.num_layers) if layers is None else layers)
            ]
        )
        self.norm = RMSNorm(config.hidden_size, config)
        self.lm_head: Linear | QuantisedLinear | None = (
            None
            if config.tie_embeddings
            else make_linear(config.hidden_size, local.vocab_size, config, False, rngs)
        )

    def __call__(self, tokens: Array) -> Array:
        """Logits of every position: int [B, T] -> float32 [B, T, V]."""
        length = jnp.asarray([[tokens.shape[1]]], jnp.int32)
        return self.logits(self._run(tokens, length, length)[0])

    def prefill(
        self, tokens: Array, lengths: Array, cache_length: int, ends: Array | None = None
    ) -> tuple[Array, KVCache]:
        """Reads prompts.

        Args:
            tokens: int [B, T], each row padded on the right.
            lengths: int32 [B], tokens of each prompt, at least 1.
            cache_length: Slots of the new cache, at least T.
            ends: int32 [B], tokens of each prompt and its answer, as far as known; RoPE that has frequencies
                of its own for long sequences chooses by them.

        Returns:
            float32 [B, V], the logits after each prompt's last token; and the cache.
        """
        lengths = lengths.astype(jnp.int32)
        ends = lengths if ends is None else ends.astype(jnp.int32)
        x, cache = self.begin(tokens, lengths, ends, cache_length)
        last = jnp.take_along_axis(x, (lengths - 1)[:, None, None], axis=1)[:, 0]
        return self.logits(last), cache

    def extend(self, tokens: Array, counts: Array, cache: KVCache) -> tuple[Array, KVCache]:
        """Reads more tokens of each sequence.

        Args:
            tokens: int [B, T], each row padded on the right; the padding takes slots of the cache for as long
                as this runs, so that `cache.lengths` + T must not be more than there are.
            counts: int32 [B], tokens of each row, at least 1.
            cache: What came before them.

        Returns:
            float32 [B, V], the logits after each row's last token; and the longer cache.
        """
        lengths = cache.lengths + counts
        ends = lengths if cache.ends is None else cache.ends
        longer = dataclasses.replace(cache, lengths=lengths, ends=ends)
        x, longer = self.resume(tokens, cache.lengths, longer)
        last = jnp.take_along_axis(x, (counts - 1)[:, None, None], axis=1)[:, 0]
        return self.logits(last), longer

    def begin(
        self, tokens: Array, lengths: Array, ends: Array, cache_length: int
    ) -> tuple[Array, KVCache]:
        """Reads the first run of prompts.

        Args:
            tokens: int [B, T], no more than `cache_length` of each prompt.
            lengths: int32 [B], tokens of each prompt, those of later runs included.
            ends: See `prefill`.
            cache_length: Slots of the new cache.

        Returns:
            The stream after the layers [B, T, D], and the cache, which has these lengths and ends already.
        """
        x, keys, values = self._run(tokens, lengths[:, None], ends[:, None])
        keys, values = (tuple(fill(a, cache_length) for a in arrays) for arrays in (keys, values))
        return x, KVCache(keys, values, lengths, ends)

    def resume(self, tokens: Array, starts: Array, cache: KVCache) -> tuple[Array, KVCache]:
        """A later run, of tokens int [B, T] from slots `starts` int32 [B or 1] on; see `begin`."""
        ends = cache.lengths if cache.ends is None else cache.ends
        rows = cache.lengths[:, None], ends[:, None]
        x, keys, values = self._run(tokens, *rows, starts, cache)
        return x, dataclasses.replace(cache, keys=tuple(keys), values=tuple(values))

    def look_ahead(self, tokens: Array, cache: KVCache) -> tuple[Array, KVCache]:
        """Reads several tokens of each sequence, each as `decode` would if all before it were right.

        Args:
            tokens: int [B, T], for which the cache needs so many free slots.
            cache: What came before them.

        Returns:
            float32 [B, T, V], the logits after each token; and the cache with their keys and values, whose
            lengths are as before: whoever keeps some of the tokens adds how many.
        """
        lengths = cache.lengths[:, None] + 1 + jnp.arange(tokens.shape[1])[None]
        ends = lengths if cache.ends is None else cache.ends[:, None]
        x, keys, values = self._run(tokens, lengths, ends, cache.lengths, cache)
        return self.logits(x), dataclasses.replace(cache, keys=tuple(keys), values=tuple(values))

    def logits(self, x: Array) -> Array:
        """The stream after the layers [..., D] to logits float32 [..., V]."""
        return self._head(self.norm(x))

    def decode(self, tokens: Array, cache: KVCache) -> tuple[Array, KVCache]:
        """Reads one token a sequence: int [B] -> (logits float32 [B, V], the longer cache)."""
        x, cache = self._step(tokens, cache)
        return self._head(x), cache

    def decode_best(self, tokens: Array, cache: KVCache) -> tuple[Array, KVCache]:
        """Reads one token a sequence: int [B] -> (the tokens with the best logits int32 [B], the longer cache).

        Of several devices each looks through its own part of the vocabulary.
        """
        x, cache = self._step(tokens, cache)
        logits = self._own_logits(x)
        best = jnp.argmax(logits, axis=-1).astype(jnp.int32)
        if self.parallel is None:
            return best, cache
        value = jnp.take_along_axis(logits, best[:, None], axis=-1)[:, 0]
        rank = jax.lax.axis_index(self.parallel.axis)
        # Float32 holds the numbers of all tokens.
        pair = jnp.stack([value, (best + rank * logits.shape[-1]).astype(jnp.float32)], axis=1)
        pairs = jax.lax.all_gather(pair, self.parallel.axis, axis=1, tiled=True)
        values, found = pairs[:, ::2], pairs[:, 1::2]
        first = jnp.argmax(values, axis=1)  # of those that are alike, as in a row of all
        return jnp.take_along_axis(found, first[:, None], axis=1)[:, 0].astype(jnp.int32), cache

    def _step(self, tokens: Array, cache: KVCache) -> tuple[Array, KVCache]:
        """The stream [B, D] after the last norm, and the longer cache."""
        x = self.embed(tokens)
        x, keys, values = decoding.step(self.layers, self.norm, x, cache, self.peers)
        return x, KVCache(keys, values, cache.lengths + 1, cache.ends)

    def _run(
        self,
        tokens: Array,
        lengths: Array,
        ends: Array,
        starts: Array | None = None,
        cache: KVCache | None = None,
    ) -> tuple[Array, list[Array], list[Array]]:
        """A run of tokens through all layers, with lengths and ends [B, 1 or T]; see `Layer.prompt`."""
        x, positions = self.embed(tokens), jnp.arange(tokens.shape[1])[None]
        if starts is not None:
            positions = positions + starts[:, None]
        keys, values = [], []
        angles = decoding.rotations(self.layers, positions, lengths, ends)
        for index, (layer, angle) in enumerate(zip(self.layers, angles, strict=True)):
            before = () if cache is None else (starts, cache.keys[index], cache.values[index])
            x, k, v = _run_layer(*nnx.split(layer), x, *angle, *before)
            keys.append(k)
            values.append(v)
        return x, keys, values

    def embed(self, tokens: Array) -> Array:
        """What the first layer sees of tokens int [...]: [..., D]."""
        if self.parallel is None:
            rows = self._rows(tokens)
        else:
            # Each device holds a run of the vocabulary and adds zeros for the other tokens.
            size = self.embedding.get_value().shape[0]
            local = tokens - jax.lax.axis_index(self.parallel.axis) * size
            owned = (local >= 0) & (local < size)
            rows = self._rows(jnp.where(owned, local, 0))
            rows = jnp.where(owned[..., None], rows, jnp.zeros((), rows.dtype))
            if self.peers is not None and self.peers.takes(rows):
                rows = self.peers.total(rows)
            else:
                rows = jax.lax.psum(rows, self.parallel.axis)
        if self.config.embedding_scale == 1:
            return rows
        return rows * jnp.asarray(self.config.embedding_scale, rows.dtype)

    def _rows(self, tokens: Array) -> Array:
        table = self.embedding.get_value()
        if isinstance(table, QuantisedTensor):
            return take_quantised_rows(table, tokens, dtype=self.config.dtype)
        return platforms.take_rows(table, tokens)

    def _head(self, x: Array) -> Array:
        logits = self._own_logits(x)
        if self.parallel is None:
            return logits
        axis = logits.ndim - 1
        return jax.lax.all_gather(logits, self.parallel.axis, axis=axis, tiled=True)

    def _own_logits(self, x: Array) -> Array:
        """Those of this device's part of the vocabulary: [..., D] to float32 [..., V]."""
        head, cap = self.lm_head, self.config.logit_soft_cap
        if head is None:
            logits = platforms.linear_of_rows(x, self.embedding[...])
        elif isinstance(head, Linear):
            logits = head(x, jnp.float32)
        else:
            logits = head(x).astype(jnp.float32)
        if self.config.logit_divisor != 1:
            logits = logits / self.config.logit_divisor
        if cap is not None:
            logits = cap * jnp.tanh(logits / cap)
        return logits


def shapes(config: ModelConfig, parallel: Parallel | None = None) -> Transformer:
    """A model of shapes in the place of arrays; of layers that are alike one is traced, which takes time."""
    options = [config.layer(i) for i in range(config.num_layers)]
    kinds = list(dict.fromkeys(options))
    model = nnx.eval_shape(
        lambda: Transformer(
            config,
            parallel=parallel,
            rngs=nnx.Rngs(0),
            layers=[options.index(kind) for kind in kinds],
        )
    )
    made = list(model.layers)
    model.layers = nnx.List([nnx.clone(made[kinds.index(option)]) for option in options])
    return model


# Layers that are alike are traced once, and XLA inlines the calls.
@functools.partial(jax.jit, static_argnums=0)
def _run_layer(graphdef: nnx.GraphDef, state: nnx.State, *args: Array):
    return nnx.merge(graphdef, state).prompt(*args)
