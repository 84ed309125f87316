"""Losses of language models, from logits."""

import jax
import jax.numpy as jnp
from jax import Array


def next_token_losses(logits: Array, tokens: Array) -> Array:
    """Cross-entropy of each token given those before it.

    Args:
        logits: float [B, T, V], of the position after each token.
        tokens: int [B, T].

    Returns:
        float32 [B, T - 1], in nats.
    """
    if logits.ndim != 3 or tokens.ndim != 2 or logits.shape[:2] != tokens.shape:
        raise ValueError(f"{logits.shape=} must be [B, T, V] for {tokens.shape=} of [B, T]")
    if tokens.shape[1] < 2:
        raise ValueError(f"{tokens.shape=}: a next-token loss needs at least 2 tokens a sequence")
    log_probability = jax.nn.log_softmax(logits[:, :-1].astype(jnp.float32), axis=-1)
    # Not by `take_along_axis`, whose gradient is a scatter: slow where a GPU is to give the same bits again.
    index = jax.lax.broadcasted_iota(tokens.dtype, log_probability.shape, 2)
    return -jnp.where(index == tokens[:, 1:, None], log_probability, 0).sum(-1)


def next_token_loss(logits: Array, tokens: Array) -> Array:
    """Mean of `next_token_losses`: float32 scalar, in nats a token."""
    return next_token_losses(logits, tokens).mean()


def kl_divergences(reference: Array, logits: Array) -> Array:
    """KL(reference || model) of the next-token distribution at each position.

    Args:
        reference: float [..., V], logits of the model that is to be kept.
        logits: float [..., V].

    Returns:
        float32 [...], in nats.
    """
    p = jax.nn.log_softmax(reference.astype(jnp.float32), axis=-1)
    q = jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1)
    return jnp.sum(jnp.exp(p) * (p - q), axis=-1)
