"""Prompts that are read and continued together: their arrays, and the programs that these need."""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from fdk_jax.models import loops
from fdk_jax.models.cache import KVCache
from fdk_jax.models.loops import Loop, Options, Progress
from fdk_jax.models.programs import Programs
from fdk_jax.models.sampling import Method, Sampling


class Request:
    """Prompts, and how they are continued.

    Args:
        programs: Of the model.
        tokens: int32 [B, T], each row padded on the right.
        lengths: int32 [B], tokens of each prompt.
        ends: int32 [B], tokens of each prompt and its answer at most.
        capacity: Slots of the cache, at least T.
        sampling: How tokens are chosen.
        stop_tokens: Tokens that end a sequence.
    """

    def __init__(
        self,
        programs: Programs,
        tokens: np.ndarray,
        lengths: np.ndarray,
        ends: np.ndarray,
        capacity: int,
        sampling: Sampling,
        stop_tokens: Sequence[int],
    ):
        self._programs = programs
        self._capacity, self._method = capacity, sampling.method
        self._may_stop = len(stop_tokens) > 0
        self._prompts: tuple[Array, Array, Array] = programs.everywhere(
            (jnp.asarray(tokens), jnp.asarray(lengths), jnp.asarray(ends))
        )
        self._options: Options = programs.everywhere(
            Options(
                jax.random.key(sampling.seed),
                jnp.float32(sampling.temperature),
                jnp.float32(sampling.top_p),
                padded_stops(stop_tokens),
            )
        )

    def loop(self, steps: int) -> Loop:
        """The loop of a program that decodes at most so many tokens."""
        run = loops.poll_every(steps, self._may_stop)
        return Loop(run, self._capacity, run >= steps and not self._may_stop)

    def compile(self, loop: Loop) -> None:
        """Compiles both programs without running them."""
        self._prefill_program()
        batch, struct = self._prompts[0].shape[0], self._programs.struct
        cache = self._programs.cache_struct(batch, self._capacity)
        step = struct((), jnp.int32)
        progress = Progress(struct((batch,), jnp.int32), struct((batch,), bool), step)
        self._decode_program(cache, progress, step, loop)

    def prefill(self) -> tuple[KVCache, Progress]:
        """Reads the prompts and chooses the first new token of each."""
        return self._prefill_program()(*self._prompts, self._options)

    def decode(
        self, cache: KVCache, progress: Progress, steps: int, loop: Loop
    ) -> tuple[KVCache, Progress, Array]:
        """At most `steps` more tokens, rounded up to a multiple of `loop.run`: int32 [B, loop.room]."""
        most = self._programs.everywhere(jnp.int32(steps))
        program = self._decode_program(cache, progress, most, loop)
        return program(cache, progress, most, self._options)

    def _prefill_program(self):
        capacity, method = self._capacity, self._method

        def run(model, tokens, lengths, ends, options):
            logits, cache = model.prefill(tokens, lengths, capacity, ends)
            return cache, loops.first_progress(logits, options, method)

        name = ("prefill", self._prompts[0].shape[1], *self._key)
        results = (KVCache, Progress)
        return self._programs.program(name, run, results, *self._prompts, self._options)

    def _decode_program(self, cache, progress, steps, loop: Loop):
        run = functools.partial(loops.decode, method=self._method, loop=loop)
        results = (KVCache, Progress, Array)
        args = (cache, progress, steps, self._options)
        return self._programs.program(("decode", loop, *self._key), run, results, *args)

    @property
    def _key(self) -> tuple[int, int, Method, int]:
        """What both programs depend on."""
        return self._prompts[0].shape[0], self._capacity, self._method, self._options.stops.size


def padded_stops(stop_tokens: Sequence[int]) -> Array:
    """The stop tokens as int32, padded to a power of two with -1, which no sequence ever chooses.

    Never empty: compiling `jax.shard_map` with an argument of shape (0,) ends JAX 0.11.2.
    """
    size = 1 << max(len(stop_tokens) - 1, 0).bit_length()
    return jnp.asarray([*stop_tokens, *[-1] * (size - len(stop_tokens))], jnp.int32)
