"""Several tokens a step where a text repeats itself: guessed from the text so far, and checked by the model.

The guess is what followed the newest tokens when they last occurred (Saxena, Prompt Lookup Decoding, 2023).
A step reads the newest token and the guesses at once; with few tokens a product takes hardly longer than with
one. Every token is the one that the model chooses there, by the same draw as without guesses: a guess only
decides whether the next choice is known already.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax import Array

from fdk_jax.models.cache import KVCache
from fdk_jax.models.loops import Loop, Options, Progress
from fdk_jax.models.sampling import Method
from fdk_jax.models.transformer import Transformer

MOST = 16  # guesses a step: with more, products are no longer as fast as those of one token


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Text:
    """One sequence, its newest token left out.

    Attributes:
        tokens: int32 [H], as many as the cache holds, and space for all that will come.
        steps: int32 scalar, times that the model ran for them since the prompt.
    """

    tokens: Array
    steps: Array


def guess(tokens: Array, length: Array, count: int) -> tuple[Array, Array]:
    """What followed the newest two or three tokens when they last occurred.

    Args:
        tokens: int32 [H], the text and space after it.
        length: int32 scalar, tokens of the text.
        count: Most guesses.

    Returns:
        (int32 [count], how many of them are guesses); a position with three equal tokens is preferred.
    """
    positions, last = jnp.arange(tokens.shape[0]), length - 1

    def equal(back: int) -> Array:
        """Where the token so many positions before is the one so many before the last."""
        return (jnp.roll(tokens, back) == tokens[last - back]) & (positions >= back)

    two = equal(0) & equal(1) & (positions < last) & (last >= 1)
    three = two & equal(2) & (last >= 2)
    score = jnp.where(two, positions + 1, 0) + jnp.where(three, tokens.shape[0], 0)
    position = jnp.argmax(score)
    found = jax.lax.dynamic_slice(jnp.pad(tokens, (0, count)), (position + 1,), (count,))
    return found, jnp.where(score[position] > 0, jnp.minimum(count, last - position), 0)


def decode(
    model: Transformer,
    cache: KVCache,
    progress: Progress,
    text: Text,
    limit: Array,
    options: Options,
    *,
    method: Method,
    loop: Loop,
    guesses: int,
) -> tuple[KVCache, Progress, Text, Array]:
    """Chooses tokens of one sequence until it is done or there are `limit` of them, or for `loop.run` steps.

    Args:
        model: Which chooses.
        cache: Of all tokens but the newest.
        progress: Where the sequence stands.
        text: The same tokens as in the cache.
        limit: int32 scalar.
        options: How tokens are chosen.
        method: See `Options.choose`.
        loop: Steps between two polls, and `max_tokens`, of which this needs `guesses` more of.
        guesses: Of each step.

    Returns:
        (cache, progress, text, tokens int32 [1, loop.max_tokens + 2 (guesses + 1)]); those after the
        chosen ones mean nothing.
    """
    begin, width = progress.step, guesses + 1
    positions = jnp.arange(width)

    def unfinished(at: Progress) -> Array:
        return ~at.done[0] & (at.step - begin < limit)

    def step(_, carry):
        cache, at, text, out = carry
        running, length = unfinished(at), cache.lengths[0]
        full = text.tokens.at[length].set(at.token[0])
        guessed, known = guess(full, length + 1, guesses)
        read = jnp.concatenate([at.token, guessed])
        logits, cache = model.look_ahead(read[None], cache)

        def choose(logits: Array, step: Array) -> Array:
            return options.choose(logits[None], step, method, None)[0]

        chosen = jax.vmap(choose)(logits[0], at.step + positions)
        right = (chosen[:-1] == guessed) & (positions[:-1] < known)
        new = jnp.where(running, 1 + jnp.cumprod(right.astype(jnp.int32)).sum(), 0)
        done = at.done | (options.is_stop(chosen) & (positions < new)).any()
        token = jnp.where(running, chosen[jnp.maximum(new - 1, 0)], at.token[0])
        out = jax.lax.dynamic_update_slice(out, chosen[None], (0, at.step - begin))
        tokens = jax.lax.dynamic_update_slice(text.tokens, read, (length,))
        text = Text(tokens, text.steps + running.astype(jnp.int32))
        cache = dataclasses.replace(cache, lengths=cache.lengths + new)
        return cache, Progress(token[None], done, at.step + new), text, out

    def several(carry):
        return jax.lax.fori_loop(0, loop.run, step, carry)

    carry = cache, progress, text, jnp.zeros((1, loop.max_tokens + 2 * width), jnp.int32)
    if loop.once:
        return several(carry)
    return jax.lax.while_loop(lambda carry: unfinished(carry[1]), several, carry)
