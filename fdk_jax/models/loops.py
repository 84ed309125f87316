"""The device's side of generation: choosing token after token without the host."""

import dataclasses

import jax
import jax.numpy as jnp
from jax import Array

from fdk_jax.models.cache import KVCache
from fdk_jax.models.parallel import Parallel
from fdk_jax.models.sampling import Method, choose
from fdk_jax.models.transformer import Transformer

_RUN = 16  # tokens on a GPU before it polls whether all sequences are done
_LONGEST_RUN = 128
_Carry = tuple[
    KVCache, "Progress", Array
]  # what a loop over tokens carries: the last are the tokens


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

    def choose(
        self, logits: Array, step: Array | int, method: Method, parallel: Parallel | None
    ) -> Array:
        """The `step`-th token of each sequence.

        The draw of a sequence depends on its place in the whole batch, not on how devices share it.
        """
        rows = jnp.arange(logits.shape[0])
        if parallel is not None:
            rows += parallel.first_row(logits.shape[0])
        key = jax.random.fold_in(self.key, step)
        keys = jax.vmap(lambda row: jax.random.fold_in(key, row))(rows)
        return choose(logits, keys, self.temperature, self.top_p, method)


@dataclasses.dataclass(frozen=True)
class Loop:
    """What is static about a program that decodes.

    Attributes:
        run: Tokens between two polls whether all sequences are done.
        max_tokens: At most so many in a program.
        once: Whether the first run is all, so that nobody polls.
    """

    run: int
    max_tokens: int
    once: bool

    @classmethod
    def of_one_run(cls, tokens: int) -> "Loop":
        """The loop of a program that decodes just so many tokens."""
        return cls(tokens, tokens, True)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Reading:
    """Where the reading of prompts stands, besides the cache.

    Attributes:
        lengths: int32 [B], tokens of each prompt.
        last: [B, D], the stream after each prompt's last token, once that has been read.
    """

    lengths: Array
    last: Array

    def seen(self, x: Array, start: Array | int) -> "Reading":
        """After a run of tokens from `start` on, with x [B, T, D] after the layers."""
        at = self.lengths - 1 - start
        rows = jnp.clip(at, 0, x.shape[1] - 1)[:, None, None]
        row = jnp.take_along_axis(x, rows, axis=1)[:, 0]
        here = ((at >= 0) & (at < x.shape[1]))[:, None]
        return dataclasses.replace(self, last=jnp.where(here, row, self.last))


def begin(
    model: Transformer, tokens: Array, lengths: Array, ends: Array, *, capacity: int
) -> tuple[KVCache, Reading]:
    """Reads the first run of the prompts, [B, T], into a new cache of so many slots."""
    x, cache = model.begin(tokens, lengths, ends, capacity)
    return cache, Reading(lengths, jnp.zeros_like(x[:, 0])).seen(x, 0)


def resume(
    model: Transformer, cache: KVCache, reading: Reading, tokens: Array, start: Array
) -> tuple[KVCache, Reading]:
    """Reads the next run of the prompts, [B, T], from token `start` (int32 scalar) of each on."""
    x, cache = model.resume(tokens, start[None], cache)
    return cache, reading.seen(x, start)


def finish(
    model: Transformer, cache: KVCache, reading: Reading, options: Options, *, method: Method
) -> tuple[KVCache, Progress]:
    """Chooses the first new token of each sequence after its prompt."""
    token = options.choose(model.logits(reading.last), 0, method, model.parallel)
    return cache, Progress(token, options.is_stop(token), jnp.int32(1))


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
        (cache, progress, tokens int32 [B, max_tokens]). A sequence that is done repeats its last token.
    """
    begin, parallel = progress.step, model.parallel

    def step(_, carry: _Carry) -> _Carry:
        cache, at, out = carry
        if method.greedy:
            chosen, cache = model.decode_best(at.token, cache)
        else:
            logits, cache = model.decode(at.token, cache)
            chosen = options.choose(logits, at.step, method, parallel)
        token = jnp.where(at.done, at.token, chosen)
        out = jax.lax.dynamic_update_slice(out, token[:, None], (0, at.step - begin))
        return cache, Progress(token, at.done | options.is_stop(token), at.step + 1), out

    def unfinished(at: Progress) -> Array:
        running = ~at.done.all()
        running = running if parallel is None else parallel.any(running)
        return running & (at.step - begin < steps)

    def several(carry: _Carry) -> _Carry:
        return jax.lax.fori_loop(0, loop.run, step, carry) if loop.run > 1 else step(0, carry)

    def poll(polled: tuple[Array, _Carry]) -> tuple[Array, _Carry]:
        carry = several(polled[1])
        return unfinished(carry[1]), carry

    carry = (cache, progress, jnp.zeros((progress.token.shape[0], loop.max_tokens), jnp.int32))
    if loop.once:
        return several(carry)
    return jax.lax.while_loop(lambda polled: polled[0], poll, (unfinished(progress), carry))[1]


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
