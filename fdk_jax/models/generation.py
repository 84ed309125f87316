"""Text from a model: prompts are read once, then all tokens come from one compiled loop."""

import concurrent.futures
import dataclasses
import operator
import reprlib
import time
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from fdk_jax.layers.trees import prepare
from fdk_jax.models import speculation
from fdk_jax.models.config import ModelConfig
from fdk_jax.models.loops import Loop, stream_every
from fdk_jax.models.programs import Programs
from fdk_jax.models.request import Request
from fdk_jax.models.sampling import Sampling
from fdk_jax.models.transformer import Transformer


@dataclasses.dataclass(frozen=True)
class Generation:
    """What `Generator.generate` returns.

    Attributes:
        tokens: New tokens of each prompt, up to and without its stop token.
        stopped: Whether a stop token ended each sequence (otherwise `max_tokens` did).
        prefill_seconds: Reading the prompts and choosing the first token, compilation excluded.
        decode_seconds: All later tokens, compilation excluded.
        decode_steps: Steps that took, each of one token a sequence.
        model_steps: Times that the model ran for them: fewer with guesses that were right.
    """

    tokens: list[list[int]]
    stopped: list[bool]
    prefill_seconds: float
    decode_seconds: float
    decode_steps: int
    model_steps: int

    @property
    def tokens_per_second(self) -> float:
        """Decoding speed of the whole batch, stopped sequences counted as running."""
        return self.decode_steps * len(self.tokens) / max(self.decode_seconds, 1e-9)


class Generator:
    """Compiled programs of one model; made once, used for many prompts.

    Programs are compiled for a batch size, a bucket of the prompt length and a bucket of the cache
    length; the newest are kept.

    Args:
        model: From `load`, or any `Transformer`, quantised or not.
        max_context: Most tokens of a prompt and its continuation; None for the model's context length.
        backend: Whose kernels multiply quantised weights ("pallas", "cpu", "xla"); None for the default
            platform's. With several devices, what the model was loaded for.
    """

    def __init__(
        self, model: Transformer, *, max_context: int | None = None, backend: str | None = None
    ):
        if max_context is not None:
            _check_count("max_context", max_context, 1)
        if model.parallel is None:
            model = prepare(model, backend)
        self.config = model.config
        self.max_context = max_context or model.config.max_context
        self.programs = Programs(model)

    @property
    def leaves(self) -> tuple[Array, ...]:
        """Every array that the programs read."""
        return self.programs.leaves

    def peak_bytes(self) -> int:
        """Device memory that the hungriest program compiled so far needs, weights included."""
        return self.programs.peak_bytes()

    def logits(self, tokens: np.ndarray | Array) -> Array:
        """Logits of every position: int [B, T] -> float32 [B, T, V]."""
        self._check_batch(len(tokens))
        tokens = self.programs.place(jnp.asarray(tokens, jnp.int32))

        def run(model, tokens):
            return (model(tokens),)

        return self.programs.program(("logits", tokens.shape), run, (Array,), tokens)(tokens)[0]

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        max_tokens: int = 128,
        sampling: Sampling | None = None,
        stop_tokens: Sequence[int] = (),
        speculate: int = 0,
    ) -> Generation:
        """Continues prompts of any lengths together; the whole decoding is one device program.

        Args:
            prompts: Token numbers, at least one in each prompt.
            max_tokens: Most new tokens for each.
            sampling: None for greedy.
            stop_tokens: Tokens that end a sequence.
            speculate: Tokens that are guessed at each step, from what followed the newest ones earlier in the
                text, and checked with it: up to so many more tokens a step where a text repeats itself, such as
                code or summaries; 0 for none. The tokens are those that the model would choose anyway, up to
                the rounding of its products of several tokens. For one prompt on one device.

        Raises:
            ValueError: an empty batch or prompt, a token outside the vocabulary, a prompt that leaves no room
                for `max_tokens` in the context, a batch that the devices which share it do not divide, or
                `speculate` out of range or for several prompts or devices.
        """
        request = self._request(prompts, max_tokens, sampling, stop_tokens, speculate)
        loop = request.loop(max_tokens - 1)
        request.compile(loop if max_tokens > 1 else None)
        fetch, steps, model_steps = self.programs.fetch, 0, 0
        limit = request.limit(max_tokens - 1)  # a GPU would wait for it later
        # The decoding is handed over while the prompts are read, and where the program looks, that call returns
        # with the last token: so another thread, which is there before, sees the first one come.
        with concurrent.futures.ThreadPoolExecutor(1) as clock:
            begin = clock.submit(time.perf_counter).result()
            cache, progress = request.prefill()
            middle = clock.submit(_time_of, progress.token)
            if max_tokens > 1:
                text = None
                if speculate:
                    after = request.guess(cache, progress, request.text(), limit, loop)
                    _, at, text, out = after
                    self.programs.fetch_later(text.steps)
                else:
                    _, at, out = request.decode(cache, progress, limit, loop)
                self.programs.fetch_later(progress.token, at.step, out)
                steps = int(at.step) - 1
                model_steps = steps
                if text is not None:
                    steps, model_steps = min(steps, max_tokens - 1), int(text.steps)
                new = fetch(out)[:, : min(steps, max_tokens - 1)]
        end = time.perf_counter()
        columns = [fetch(progress.token), new] if steps else [fetch(progress.token)]
        tokens, stopped = _cut(np.column_stack(columns), request.stop_tokens)
        seconds = middle.result() - begin, end - middle.result()
        return Generation(tokens, stopped, *seconds, steps, model_steps)

    def stream(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        max_tokens: int = 128,
        sampling: Sampling | None = None,
        stop_tokens: Sequence[int] = (),
        every: int | None = None,
        speculate: int = 0,
    ) -> Iterator[np.ndarray]:
        """Like `generate`, with the same tokens, but yields them as they come.

        Args:
            prompts: See `generate`.
            max_tokens: See `generate`.
            sampling: See `generate`.
            stop_tokens: See `generate`.
            every: Tokens a device program chooses before they are handed over; None for 1 on a CPU, 8
                elsewhere. The next program is under way meanwhile.
            speculate: See `generate`; then `every` counts steps, each of one token at least.

        Yields:
            int32 [B, n]: n new tokens for each prompt. A sequence repeats its stop token once it has
            ended; the iteration ends with the last sequence.
        """
        if every is not None:
            _check_count("every", every, 1)
        request = self._request(prompts, max_tokens, sampling, stop_tokens, speculate)
        loop = request.one_run(every or stream_every())
        cache, progress = request.prefill()
        if speculate:
            yield from self._stream_guesses(request, cache, progress, max_tokens, loop)
            return
        waiting, done, left = progress.token[:, None], progress.done, max_tokens - 1
        self.programs.fetch_later(waiting, done)
        width = 1
        while left > 0:
            # Queued before the tokens in hand are read: the device does not wait for the reader. At the
            # end this computes a few tokens that nobody reads.
            limit = request.limit(loop.run)
            cache, progress, following = request.decode(cache, progress, limit, loop)
            self.programs.fetch_later(following, progress.done)
            yield self.programs.fetch(waiting)[:, :width]
            if self.programs.fetch(done).all():
                return
            waiting, done, width = following, progress.done, left
            left -= loop.run
        yield self.programs.fetch(waiting)[:, :width]

    def _stream_guesses(
        self, request: Request, cache, progress, max_tokens: int, loop: Loop
    ) -> Iterator[np.ndarray]:
        """The stream of one sequence; how many tokens a program has chosen, only it knows."""
        yield self.programs.fetch(progress.token[:, None])
        text, count = request.text(), 1
        while count < max_tokens and not self.programs.fetch(progress.done).all():
            left = max_tokens - count
            cache, progress, text, out = request.guess(
                cache, progress, text, request.limit(left), loop
            )
            self.programs.fetch_later(progress.step, progress.done, out)
            new = int(progress.step) - count
            yield self.programs.fetch(out)[:, : min(new, left)]
            count += new

    def compile(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        max_tokens: int = 128,
        sampling: Sampling | None = None,
        stop_tokens: Sequence[int] = (),
        streaming: bool = False,
        speculate: int = 0,
    ) -> None:
        """Compiles what `generate` (or `stream`) of these arguments needs, and runs nothing."""
        request = self._request(prompts, max_tokens, sampling, stop_tokens, speculate)
        loop = request.loop(max_tokens - 1)
        if streaming:
            loop = Loop.of_one_run(stream_every())
            if speculate:
                request.compile(loop)

    def _check_batch(self, batch: int) -> None:
        parallel = self.programs.parallel
        parts = 1 if parallel is None else parallel.batches
        if batch % parts:
            raise ValueError(
                f"a batch of {batch} must be divisible by the {parts} parts that devices cut it into"
            )

    def _request(self, prompts, max_tokens, sampling, stop_tokens, speculate) -> Request:
        check_prompts(self.config, prompts, max_tokens, self.max_context)
        self._check_batch(len(prompts))
        if sampling is not None and not isinstance(sampling, Sampling):
            raise TypeError(f"{sampling=} must be a fdk_jax.models.Sampling")
        _check_integer("speculate", speculate)
        if not 0 <= speculate <= speculation.MOST:
            raise ValueError(f"{speculate=} must be between 0 and {speculation.MOST} tokens a step")
        if speculate and (len(prompts) > 1 or self.programs.parallel is not None):
            raise ValueError(
                f"{speculate=} is for one prompt on one device, not for {len(prompts)} prompts"
                + (" on several devices" if self.programs.parallel is not None else "")
            )
        self.programs.return_memory()
        how = sampling or Sampling(), _checked_stops(stop_tokens), speculate
        return Request(self.programs, prompts, max_tokens, self.max_context, *how)


def check_prompts(
    config: ModelConfig,
    prompts: Sequence[Sequence[int]],
    max_tokens: int,
    max_context: int | None = None,
) -> list[int]:
    """The lengths of prompts that a model can continue.

    Args:
        config: Of the model.
        prompts: Token numbers.
        max_tokens: New tokens for each.
        max_context: Most tokens of a prompt and its continuation; None for the model's context length.

    Raises:
        TypeError: a prompt that is no list of integers, or another number that is none.
        ValueError: see `Generator.generate`.
    """
    if not hasattr(prompts, "__len__") or isinstance(prompts, (str, bytes)):
        raise TypeError(f"prompts must be a list of lists of tokens, got {type(prompts).__name__}")
    rows = [np.asarray(prompt) for prompt in prompts]
    if wrong := [row for row in rows if row.ndim != 1 or (row.size and row.dtype.kind not in "iu")]:
        raise TypeError(
            f"a prompt must be a list of numbers of tokens, got {reprlib.repr(wrong[0].tolist())}"
        )
    if not rows or not all(map(len, rows)):
        raise ValueError("every prompt needs at least one token (a beginning-of-text token, say)")
    _check_count("max_tokens", max_tokens, 1)
    lowest, highest = min(int(row.min()) for row in rows), max(int(row.max()) for row in rows)
    if lowest < 0 or highest >= config.vocab_size:
        raise ValueError(
            f"tokens {lowest} to {highest} do not fit a vocabulary of {config.vocab_size}"
        )
    lengths = [len(row) for row in rows]
    max_context = max_context or config.max_context
    if max(lengths) + max_tokens > max_context:
        raise ValueError(
            f"a prompt of {max(lengths)} tokens and {max_tokens} new ones do not fit a context of"
            f" {max_context}; shorten the prompt, lower max_tokens or raise max_context"
        )
    return lengths


def _check_integer(name: str, value: Any) -> None:
    """Raises TypeError for what is no integer."""
    if not isinstance(value, (int, np.integer)) or isinstance(value, bool):
        raise TypeError(f"{name}={value!r} must be an integer")


def _check_count(name: str, value: Any, least: int) -> None:
    """Raises TypeError for what is no integer, and ValueError for one that is too small."""
    _check_integer(name, value)
    if value < least:
        raise ValueError(f"{name}={value} must be at least {least}")


def _checked_stops(stop_tokens: Any) -> tuple[int, ...]:
    """Stop tokens as integers; some may be outside of the vocabulary, and then never come.

    Raises:
        TypeError: they are none.
    """
    try:
        stops = tuple(operator.index(token) for token in stop_tokens)
    except TypeError as error:
        raise TypeError(
            f"stop_tokens={stop_tokens!r} must be a list of numbers of tokens"
        ) from error
    return tuple(token for token in stops if 0 <= token < 2**31)


def _time_of(array: Array) -> float:
    """When an array has come."""
    jax.block_until_ready(array)
    return time.perf_counter()


def _cut(rows: np.ndarray, stop_tokens: Sequence[int]) -> tuple[list[list[int]], list[bool]]:
    """Rows up to their first stop token, and whether there was one."""
    tokens, stopped = [], []
    for row in rows.tolist():
        stop = next((i for i, token in enumerate(row) if token in stop_tokens), None)
        tokens.append(row[:stop])
        stopped.append(stop is not None)
    return tokens, stopped
