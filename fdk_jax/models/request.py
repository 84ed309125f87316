"""Prompts that are read and continued together: their arrays, and the programs that these need."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from fdk_jax.models import loops, speculation
from fdk_jax.models.cache import KVCache
from fdk_jax.models.loops import Loop, Options, Progress, Reading
from fdk_jax.models.programs import Programs
from fdk_jax.models.sampling import Method, Sampling
from fdk_jax.models.speculation import Text


class Request:
    """Prompts, and how they are continued.

    Attributes:
        stop_tokens: Tokens that end a sequence.

    Args:
        programs: Of the model.
        prompts: Token numbers, checked.
        max_tokens: Most new tokens for each.
        max_context: Most tokens of a prompt and its continuation.
        sampling: How tokens are chosen.
        stop_tokens: Tokens that end a sequence.
        guesses: Of a step from the text so far, see `speculation`; for one prompt on one device.
    """

    def __init__(
        self,
        programs: Programs,
        prompts: Sequence[Sequence[int]],
        max_tokens: int,
        max_context: int,
        sampling: Sampling,
        stop_tokens: Sequence[int],
        guesses: int = 0,
    ):
        lengths = np.asarray([len(prompt) for prompt in prompts], np.int32)
        self._runs, self._capacity = plan_runs(
            len(prompts), int(lengths.max()), max_tokens + guesses, max_context
        )
        self._prompt, self._guesses = prompts[0], guesses
        tokens = np.zeros((len(prompts), sum(self._runs)), np.int32)
        for row, prompt in zip(tokens, prompts, strict=True):
            row[: len(prompt)] = prompt
        self.stop_tokens = stop_tokens
        self._programs, self._method = programs, sampling.method
        self._may_stop = len(stop_tokens) > 0
        self._lengths: Array = programs.place(jnp.asarray(lengths))
        self._ends: Array = programs.place(jnp.asarray(lengths + np.int32(max_tokens)))
        self._tokens: list[Array] = [
            programs.place(jnp.asarray(run))
            for run in np.split(tokens, np.cumsum(self._runs)[:-1], axis=1)
        ]
        self._options: Options = programs.place(
            Options(
                sampling.key,
                jnp.float32(sampling.temperature),
                jnp.float32(sampling.top_p),
                padded_stops(stop_tokens),
            )
        )

    def loop(self, steps: int) -> Loop:
        """The loop of a program that decodes at most so many tokens."""
        if self._guesses:  # nobody knows how many steps they take
            run = 1 if jax.default_backend() == "cpu" else _GUESS_RUN
            return Loop(run, self._capacity, once=False)
        run = loops.poll_every(steps, self._may_stop)
        return Loop(run, self._capacity, run >= steps and not self._may_stop)

    def one_run(self, steps: int) -> Loop:
        """The loop of a program that decodes for just so many steps."""
        loop = Loop.of_one_run(steps)
        return dataclasses.replace(loop, max_tokens=steps * (self._guesses + 1))

    def compile(self, loop: Loop | None) -> None:
        """Compiles all programs without running them; that which decodes only for a loop."""
        shaped: Any = jax.ShapeDtypeStruct  # in the place of arrays
        batch = len(self._lengths)
        cache, struct = self._programs.cache_struct(batch, self._capacity), self._programs.struct
        step = struct(shaped((), jnp.int32))
        if len(self._runs) == 1:
            self._prefill_program()
        else:
            config = self._programs.config
            last = shaped((batch, config.hidden_size), jnp.dtype(config.dtype))
            reading = struct(Reading(shaped((batch,), jnp.int32), last))
            self._begin_program()
            for tokens in self._tokens[1:]:
                self._resume_program(cache, reading, tokens, step)
            self._finish_program(cache, reading)
        if loop is not None:
            token, done = (shaped((batch,), dtype) for dtype in (jnp.int32, bool))
            progress = struct(Progress(token, done, shaped((), jnp.int32)))
            if self._guesses:
                self._guess_program(cache, progress, self.text(), step, loop)
            else:
                self._decode_program(cache, progress, step, loop)

    def prefill(self) -> tuple[KVCache, Progress]:
        """Reads the prompts and chooses the first new token of each."""
        if len(self._runs) == 1:
            return self._prefill_program()(*self._first, self._options)
        cache, reading = self._begin_program()(*self._first)
        start = self._runs[0]
        for tokens in self._tokens[1:]:
            args = cache, reading, tokens, self._programs.place(jnp.int32(start))
            cache, reading = self._resume_program(*args)(*args)
            start += tokens.shape[1]
        return self._finish_program(cache, reading)(cache, reading, self._options)

    def limit(self, steps: int) -> Array:
        """A number of tokens as `decode` and `guess` take it."""
        return self._programs.place(jnp.int32(steps))

    def decode(
        self, cache: KVCache, progress: Progress, limit: Array, loop: Loop
    ) -> tuple[KVCache, Progress, Array]:
        """At most so many more tokens, rounded up to a multiple of `loop.run`: int32 [B, loop.max_tokens]."""
        program = self._decode_program(cache, progress, limit, loop)
        return program(cache, progress, limit, self._options)

    def text(self) -> Text:
        """The prompt, from which guesses are made."""
        length = self._capacity + 2 * (self._guesses + 1)
        tokens = np.zeros(length, np.int32)
        tokens[: len(self._prompt)] = self._prompt
        return Text(jnp.asarray(tokens), jnp.int32(0))

    def guess(
        self, cache: KVCache, progress: Progress, text: Text, limit: Array, loop: Loop
    ) -> tuple[KVCache, Progress, Text, Array]:
        """Like `decode`, with guesses; see `speculation.decode`."""
        program = self._guess_program(cache, progress, text, limit, loop)
        return program(cache, progress, text, limit, self._options)

    def _guess_program(self, cache, progress, text, limit, loop: Loop):
        run = functools.partial(
            speculation.decode, method=self._method, loop=loop, guesses=self._guesses
        )
        results = KVCache, Progress, Text, Array
        args = cache, progress, text, limit, self._options
        name = ("guess", loop, self._guesses, *self._key)
        return self._programs.program(name, run, results, *args)

    def _prefill_program(self):
        """All at once, for prompts that one run reads."""
        capacity, method = self._capacity, self._method

        def run(model, tokens, lengths, ends, options):
            cache, reading = loops.begin(model, tokens, lengths, ends, capacity=capacity)
            return loops.finish(model, cache, reading, options, method=method)

        name = ("prefill", self._runs[0], *self._key)
        args = *self._first, self._options
        return self._programs.program(name, run, (KVCache, Progress), *args)

    def _begin_program(self):
        run = functools.partial(loops.begin, capacity=self._capacity)
        name = ("begin", self._runs[0], len(self._lengths), self._capacity)
        return self._programs.program(name, run, (KVCache, Reading), *self._first)

    def _resume_program(self, cache, reading, tokens, start):
        name = ("resume", *tokens.shape, self._capacity)
        args = cache, reading, tokens, start
        return self._programs.program(name, loops.resume, (KVCache, Reading), *args)

    def _finish_program(self, cache, reading):
        run = functools.partial(loops.finish, method=self._method)
        args = cache, reading, self._options
        return self._programs.program(("finish", *self._key), run, (KVCache, Progress), *args)

    def _decode_program(self, cache, progress, steps, loop: Loop):
        run = functools.partial(loops.decode, method=self._method, loop=loop)
        results = (KVCache, Progress, Array)
        args = (cache, progress, steps, self._options)
        return self._programs.program(("decode", loop, *self._key), run, results, *args)

    @property
    def _first(self) -> tuple[Array, Array, Array]:
        """Arguments of the program that reads the first run."""
        return self._tokens[0], self._lengths, self._ends

    @property
    def _key(self) -> tuple[int, int, Method, int]:
        """What programs that choose tokens depend on."""
        return len(self._lengths), self._capacity, self._method, self._options.stops.size


_GUESS_RUN = 4  # steps on a GPU before it polls
_RUN_TOKENS = 8192  # of one prompt that are read at once on a GPU,
# Of all prompts together: activations of a layer stay below a gigabyte or two.
_ALL_RUN_TOKENS = 16384
_CPU_RUN_TOKENS = 512  # both on a CPU, whose kernels are no faster with more
_SCORES = 1 << 28  # elements of the mask between a run and the cache
_SHORTEST_RUN = 256


def plan_runs(batch: int, longest: int, max_tokens: int, max_context: int) -> tuple[list[int], int]:
    """How prompts are read: the lengths of the runs, and the slots of a cache that holds them.

    Prompts that one run can hold are read by one program; of longer ones every run but the last is as long
    as memory, which must not grow with them, allows.

    Args:
        batch: Prompts.
        longest: Tokens of the longest one.
        max_tokens: New tokens for each.
        max_context: Most tokens of a prompt and its continuation.
    """
    on_cpu = jax.default_backend() == "cpu"
    per_run, together = (_CPU_RUN_TOKENS,) * 2 if on_cpu else (_RUN_TOKENS, _ALL_RUN_TOKENS)
    limit = min(per_run, together // batch, _SCORES // (longest + max_tokens))
    run = max(_SHORTEST_RUN, 1 << max(limit, 1).bit_length() - 1)
    full, rest = divmod(longest, run)
    runs = [run] * full
    if rest:
        bucket = prompt_bucket(rest, max_context)
        runs.append(min(bucket, run) if runs or bucket > run else bucket)
    return runs, cache_bucket(max(sum(runs), longest + max_tokens))


def prompt_bucket(tokens: int, max_context: int) -> int:
    """The padded length of a prompt, at most the context.

    Powers of two from 16 to 512, then multiples of 256, from 4096 on of 512, and so on: at most an eighth
    more, where a token costs something, and few programs.
    """
    if tokens <= 512:
        bucket = max(16, 1 << (tokens - 1).bit_length())
    else:
        step = max(256, 1 << (tokens - 1).bit_length() - 4)
        bucket = -(-tokens // step) * step
    return min(bucket, max(max_context, tokens))


def cache_bucket(tokens: int) -> int:
    """Slots of a cache for so many tokens: a power of two from 128, then steps of 1024."""
    if tokens <= 1024:
        return max(128, 1 << (tokens - 1).bit_length())
    return -(-tokens // 1024) * 1024


def padded_stops(stop_tokens: Sequence[int]) -> Array:
    """The stop tokens as int32, padded to a power of two with -1, which no sequence ever chooses.

    Never empty: compiling `jax.shard_map` with an argument of shape (0,) ends JAX 0.11.2.
    """
    size = 1 << max(len(stop_tokens) - 1, 0).bit_length()
    return jnp.asarray([*stop_tokens, *[-1] * (size - len(stop_tokens))], jnp.int32)
