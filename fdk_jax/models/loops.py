"""The device's side of generation: choosing token after token without the host."""

import dataclasses

import jax
import jax.numpy as jnp
from jax import Array

from fdk_jax.models.cache import KVCache
from fdk_jax.models.sampling import Method, choose
from fdk_jax.models.transformer import Transformer

_RUN = 16  # tokens on a GPU before it polls whether all sequences are done
_LONGEST_RUN = 128


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Progress:
    """Where a batch of generations stands, besides its cache.

    Attributes:
        token: int32 [B], the newest token of each sequence; it is not in the cache yet.
        done: bool [B], sequences that have met a stop token.
        step: int32 scalar, tokens chosen so far.
    """

    token: Array
    done: Array
    step: Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Options:
    """What new values of compile nothing new.

    Attributes:
        key: Random key.
        temperature: float32 scalar.
        top_p: float32 scalar.
        stops: int32 [n], n >= 1; -1 for none.
    """

    key: Array
    temperature: Array
    top_p: Array
    stops: Array

    def is_stop(self, token: Array) -> Array:
        """Whether tokens [B] end their sequences."""
        return (token[:, None] == self.stops[None, :]).any(axis=1)

    def choose(self, logits: Array, step: Array | int, method: Method) -> Array:
        """The `step`-th token of each sequence."""
        key = jax.random.fold_in(self.key, step)
        return choose(logits, key, self.temperature, self.top_p, method)


@dataclasses.dataclass(frozen=True)
class Loop:
    """What is static about a program that decodes.

    Attributes:
        run: Tokens between two polls whether all sequences are done.
        room: Most tokens of a program.
        once: Whether the first run is all, so that nobody polls.
    """

    run: int
    room: int
    once: bool

    @classmethod
    def of_one_run(cls, tokens: int) -> "Loop":
        """The loop of a program that decodes just so many tokens."""
        return cls(tokens, tokens, True)


def first_progress(logits: Array, options: Options, method: Method) -> Progress:
    """The first new token of each sequence, from the logits [B, V] behind its prompt."""
    token = options.choose(logits, 0, method)
    return Progress(token, options.is_stop(token), jnp.int32(1))


def decode(
    model: Transformer,
    cache: KVCache,
    progress: Progress,
    steps: Array,
    options: Options,
    *,
    method: Method,
    loop: Loop,
) -> tuple[KVCache, Progress, Array]:
    """Chooses tokens until all sequences are done or there are `steps` of them; or `loop.run` of them.

    A loop of a known length needs no host on a GPU, one that may end early waits for the device each
    time round: so the inner loop has `loop.run` tokens, and only the outer one, if there is one, polls.

    Returns:
        (cache, progress, tokens int32 [B, room]). A sequence that is done repeats its last token.
    """
    begin = progress.step

    def step(_, carry):
        cache, at, out = carry
        logits, cache = model.decode(at.token, cache)
        token = jnp.where(at.done, at.token, options.choose(logits, at.step, method))
        out = jax.lax.dynamic_update_slice(out, token[:, None], (0, at.step - begin))
        return cache, Progress(token, at.done | options.is_stop(token), at.step + 1), out

    def unfinished(carry) -> Array:
        _, at, _ = carry
        return ~at.done.all() & (at.step - begin < steps)

    def several(carry):
        return jax.lax.fori_loop(0, loop.run, step, carry) if loop.run > 1 else step(0, carry)

    carry = (cache, progress, jnp.zeros((progress.token.shape[0], loop.room), jnp.int32))
    return several(carry) if loop.once else jax.lax.while_loop(unfinished, several, carry)


def poll_every(steps: int, may_stop: bool) -> int:
    """Tokens between two polls whether all sequences are done.

    On a GPU a poll is a wait for the device, on a CPU a surplus token is dear. Where no stop token ends a
    sequence early, polls are as rare as they can be without more surplus tokens.
    """
    if jax.default_backend() == "cpu":
        return 1
    if may_stop:
        return _RUN
    rounded = -(-steps // _RUN) * _RUN
    return max(_RUN, min(_LONGEST_RUN, rounded & -rounded))  # the power of two in it


def stream_every() -> int:
    """Tokens of one program when they are wanted as they come."""
    return 1 if jax.default_backend() == "cpu" else 8
