"""A sentence encoder of the BERT family (all-MiniLM-L6-v2), as packages ship it in float32."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from fdk_jax.files.safetensors_folder import read_stored


class Block(nnx.Module):
    """One layer: attention, then a feed-forward part, each added and then normalised."""

    def __init__(self, hidden: int, inner: int, heads: int, eps: float, rngs: nnx.Rngs):
        self.heads = heads
        self.query, self.key, self.value, self.out = (
            nnx.Linear(hidden, hidden, rngs=rngs) for _ in range(4)
        )
        self.up, self.down = (
            nnx.Linear(hidden, inner, rngs=rngs),
            nnx.Linear(inner, hidden, rngs=rngs),
        )
        self.norm1, self.norm2 = (nnx.LayerNorm(hidden, epsilon=eps, rngs=rngs) for _ in range(2))

    def __call__(self, x: Array, mask: Array) -> Array:
        """Maps float [B, T, D] and bool [B, T] to [B, T, D].

        What goes into the linear layers is zero where a row is padded: no one reads the outputs there, and
        calibration is not to fit them.
        """
        keep = mask[..., None].astype(x.dtype)
        shape = (*x.shape[:2], self.heads, -1)
        q, k, v = (layer(x * keep).reshape(shape) for layer in (self.query, self.key, self.value))
        scores = jnp.einsum("bqhd,bkhd->bhqk", q, k) / jnp.sqrt(jnp.float32(q.shape[-1]))
        scores = jnp.where(mask[:, None, None], scores, jnp.float32(-1e9))
        mixed = jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(scores, -1), v).reshape(x.shape)
        x = self.norm1(x + self.out(mixed * keep))
        return self.norm2(x + self.down(jax.nn.gelu(self.up(x * keep), approximate=False) * keep))


class Encoder(nnx.Module):
    """Tokens to unit vectors: mean of the last layer over the tokens of a sentence."""

    def __init__(self, config: dict, rngs: nnx.Rngs):
        hidden, eps = config["hidden_size"], config["layer_norm_eps"]
        self.words = nnx.Embed(config["vocab_size"], hidden, rngs=rngs)
        self.positions = nnx.Embed(config["max_position_embeddings"], hidden, rngs=rngs)
        self.norm = nnx.LayerNorm(hidden, epsilon=eps, rngs=rngs)
        self.layers = nnx.List(
            [
                Block(hidden, config["intermediate_size"], config["num_attention_heads"], eps, rngs)
                for _ in range(config["num_hidden_layers"])
            ]
        )

    def __call__(self, tokens: Array) -> Array:
        """Maps int [B, T], 0 where a row is padded, to float32 [B, D]."""
        mask = tokens != 0
        x = self.norm(self.words(tokens) + self.positions(jnp.arange(tokens.shape[1]))[None])
        for layer in self.layers:
            x = layer(x, mask)
        mean = jnp.where(mask[..., None], x, 0).sum(1) / mask.astype(x.dtype).sum(1, keepdims=True)
        return mean / jnp.linalg.norm(mean, axis=-1, keepdims=True)


def load(folder: str | Path) -> Encoder:
    """The encoder of a Hugging Face folder."""
    config = json.loads((Path(folder) / "config.json").read_text("utf-8"))
    model = nnx.eval_shape(lambda: Encoder(config, nnx.Rngs(0)))
    stored = read_stored(folder)

    def take(name: str) -> Array:
        return jnp.asarray(np.asarray(stored[name].array(), np.float32))

    def fill(layer: nnx.Linear | nnx.LayerNorm, name: str) -> None:
        if isinstance(layer, nnx.Linear):
            layer.kernel = nnx.Param(take(f"{name}.weight").T)
        else:
            layer.scale = nnx.Param(take(f"{name}.weight"))
        layer.bias = nnx.Param(take(f"{name}.bias"))

    # Every token is of the first type; its vector is added to every position.
    kind = take("embeddings.token_type_embeddings.weight")[0]
    model.words.embedding = nnx.Param(take("embeddings.word_embeddings.weight"))
    model.positions.embedding = nnx.Param(
        take("embeddings.position_embeddings.weight") + kind[None]
    )
    fill(model.norm, "embeddings.LayerNorm")
    for index, layer in enumerate(model.layers):
        here = f"encoder.layer.{index}"
        for ours, theirs in (
            ("query", "attention.self.query"),
            ("key", "attention.self.key"),
            ("value", "attention.self.value"),
            ("out", "attention.output.dense"),
            ("norm1", "attention.output.LayerNorm"),
            ("up", "intermediate.dense"),
            ("down", "output.dense"),
            ("norm2", "output.LayerNorm"),
        ):
            fill(getattr(layer, ours), f"{here}.{theirs}")
    return model


def tokenise(folder: str | Path, texts: list[str], length: int = 48) -> np.ndarray:
    """int32 [texts, length], zeros after the tokens of each."""
    import tokenizers

    tokenizer = tokenizers.Tokenizer.from_file(str(Path(folder) / "tokenizer.json"))
    tokenizer.enable_truncation(length)
    tokenizer.enable_padding(length=length)
    return np.asarray([e.ids for e in tokenizer.encode_batch(texts)], np.int32)
