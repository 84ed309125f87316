"""Text from a model: prompts are read once, then all tokens come from one compiled loop."""

import concurrent.futures
import dataclasses
import functools
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from fdk_jax.layers.trees import prepare
from fdk_jax.models.cache import KVCache
from fdk_jax.models.config import ModelConfig
from fdk_jax.models.modules import Transformer
from fdk_jax.models.sampling import Method, Sampling, choose

_RUN = 16  # tokens on a GPU before it looks whether all sequences are done
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


@dataclasses.dataclass(frozen=True)
class Generation:
    """What `Generator.generate` returns.

    Attributes:
        tokens: New tokens of each prompt, up to and without its stop token.
        stopped: Whether a stop token ended each sequence (otherwise `max_tokens` did).
        prefill_seconds: Reading the prompts and choosing the first token, compilation excluded.
        decode_seconds: All later tokens, compilation excluded.
        decode_steps: Steps that took, each of one token a sequence.
    """

    tokens: list[list[int]]
    stopped: list[bool]
    prefill_seconds: float
    decode_seconds: float
    decode_steps: int

    @property
    def tokens_per_second(self) -> float:
        """Decoding speed of the whole batch, stopped sequences counted as running."""
        return self.decode_steps * len(self.tokens) / max(self.decode_seconds, 1e-9)


@dataclasses.dataclass(frozen=True)
class _Loop:
    """What is static about a program that decodes.

    Attributes:
        run: tokens between two looks at whether all sequences are done.
        room: most tokens of a program.
        once: whether the first run is all, so that nobody looks.
    """

    run: int
    room: int
    once: bool


def _stretch(tokens: int) -> _Loop:
    """The loop of a program that decodes just so many tokens."""
    return _Loop(tokens, tokens, True)


class Generator:
    """Compiled programs of one model; made once, used for many prompts.

    Programs are compiled for a batch size, a bucket of the prompt length and a bucket of the cache
    length, and kept.

    Args:
        model: From `load`, or any `Transformer`, quantised or not.
        max_context: Most tokens of a prompt and its continuation; None for the model's context length.
        backend: Whose kernels multiply quantised weights ("pallas", "cpu", "xla"); None for the default
            platform's. With several devices, what the model was loaded for.
    """

    def __init__(
        self, model: Transformer, *, max_context: int | None = None, backend: str | None = None
    ):
        self.config = model.config
        self.parallel = model.parallel
        self.max_context = max_context or model.config.max_context
        if self.parallel is None:
            model = prepare(model, backend)
        self._graphdef, state = nnx.split(model)
        leaves, self._treedef = jax.tree.flatten(state)
        self._leaves = tuple(leaves)
        self._programs: dict[Any, jax.stages.Compiled] = {}

    @property
    def leaves(self) -> tuple[Array, ...]:
        """Every array that the programs read."""
        return self._leaves

    def peak_bytes(self) -> int:
        """Device memory that the hungriest program compiled so far needs, weights included."""
        peak = 0
        for program in self._programs.values():
            facts: Any = program.memory_analysis()
            peak = max(
                peak,
                facts.argument_size_in_bytes
                + facts.output_size_in_bytes
                + facts.temp_size_in_bytes
                - facts.alias_size_in_bytes,
            )
        return peak

    def logits(self, tokens: np.ndarray | Array) -> Array:
        """Logits of every position: int [B, T] -> float32 [B, T, V]."""
        tokens = self._everywhere(jnp.asarray(tokens, jnp.int32))

        def run(leaves, tokens):
            return self._model(leaves)(tokens)

        return self._program(("logits", tokens.shape), run, P(), tokens)(self._leaves, tokens)

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        max_tokens: int = 128,
        sampling: Sampling | None = None,
        stop_tokens: Sequence[int] = (),
    ) -> Generation:
        """Continues prompts of any lengths together; the whole decoding is one device program.

        Args:
            prompts: Token numbers, at least one in each prompt.
            max_tokens: Most new tokens for each.
            sampling: None for greedy.
            stop_tokens: Tokens that end a sequence.

        Raises:
            ValueError: an empty batch or prompt, a token outside the vocabulary, or a prompt that leaves
                no room for `max_tokens` in the context.
        """
        batch = self._batch(prompts, max_tokens, sampling, stop_tokens)
        loop = batch.loop(max_tokens - 1)
        batch.compile(loop)
        begin = time.perf_counter()
        cache, progress = batch.prefill()
        columns, steps = [progress.token], 0
        # The decoding is handed over while the prompts are read, and where the program looks, that call returns
        # with the last token: so another thread sees the first one come.
        with concurrent.futures.ThreadPoolExecutor(1) as clock:
            middle = clock.submit(_time_of, progress.token)
            if max_tokens > 1:
                decoded = batch.decode(cache, progress, max_tokens - 1, loop)
                step, new = jax.device_get((decoded[1].step, decoded[2]))
                steps = int(step) - 1
                columns.append(new[:, : min(steps, max_tokens - 1)])
        end = time.perf_counter()
        tokens, stopped = _cut(np.column_stack(columns), stop_tokens)
        return Generation(tokens, stopped, middle.result() - begin, end - middle.result(), steps)

    def stream(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        max_tokens: int = 128,
        sampling: Sampling | None = None,
        stop_tokens: Sequence[int] = (),
        every: int | None = None,
    ) -> Iterator[np.ndarray]:
        """Like `generate`, with the same tokens, but yields them as they come.

        Args:
            prompts: See `generate`.
            max_tokens: See `generate`.
            sampling: See `generate`.
            stop_tokens: See `generate`.
            every: Tokens a device program chooses before they are handed over; None for 1 on a CPU, 8
                elsewhere. The next program is under way meanwhile.

        Yields:
            int32 [B, n]: n new tokens for each prompt. A sequence repeats its stop token once it has
            ended; the iteration ends with the last sequence.
        """
        batch = self._batch(prompts, max_tokens, sampling, stop_tokens)
        loop = _stretch(every or _hand_over_every())
        cache, progress = batch.prefill()
        waiting, done, left = progress.token[:, None], progress.done, max_tokens - 1
        while left > 0:
            # Queued before the tokens in hand are read: the device does not wait for the reader. At the
            # end this computes a few tokens that nobody reads.
            cache, progress, following = batch.decode(cache, progress, loop.run, loop)
            yield np.asarray(waiting)
            if np.asarray(done).all():
                return
            waiting, done = following[:, :left], progress.done
            left -= loop.run
        yield np.asarray(waiting)

    def compile(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        max_tokens: int = 128,
        sampling: Sampling | None = None,
        stop_tokens: Sequence[int] = (),
        streaming: bool = False,
    ) -> None:
        """Compiles what `generate` (or `stream`) of these arguments needs, and runs nothing."""
        batch = self._batch(prompts, max_tokens, sampling, stop_tokens)
        batch.compile(_stretch(_hand_over_every()) if streaming else batch.loop(max_tokens - 1))

    def _batch(self, prompts, max_tokens, sampling, stop_tokens) -> "_Batch":
        lengths = check_prompts(self.config, prompts, max_tokens, self.max_context)
        bucket = prompt_bucket(max(lengths), self.max_context)
        capacity = cache_bucket(max(bucket, max(lengths) + max_tokens))
        tokens = np.zeros((len(prompts), bucket), np.int32)
        for row, prompt in zip(tokens, prompts, strict=True):
            row[: len(prompt)] = prompt
        return _Batch(
            self,
            tokens,
            np.asarray(lengths, np.int32),
            capacity,
            sampling or Sampling(),
            stop_tokens,
        )

    def _model(self, leaves: Sequence[Array]) -> Transformer:
        return nnx.merge(self._graphdef, jax.tree.unflatten(self._treedef, leaves))

    def _everywhere(self, tree: Any) -> Any:
        """Arrays that every device needs whole."""
        if self.parallel is None:
            return tree
        return jax.device_put(tree, NamedSharding(self.parallel.mesh, P()))

    def _cache_of(self, heads: Any, lengths: Any) -> KVCache:
        """A cache with `heads` (a shape, a partition spec) in the place of every array."""
        return KVCache(
            (heads,) * self.config.num_layers, (heads,) * self.config.num_layers, lengths
        )

    def _specs(self, *kinds: type) -> tuple[Any, ...]:
        """Partition specs of arguments or results: caches by heads, all others on every device."""
        if self.parallel is None:
            return ()
        cache = self._cache_of(P(None, self.parallel.axis), P())
        return tuple(cache if kind is KVCache else P() for kind in kinds)

    def _program(self, name: Any, run: Callable, out_specs: Any, *args: Any) -> jax.stages.Compiled:
        """The compiled run(leaves, *args); a cache among the arguments is donated."""
        if name in self._programs:
            return self._programs[name]
        donated = tuple(i + 1 for i, arg in enumerate(args) if isinstance(arg, KVCache))
        if self.parallel is not None:
            specs = self._specs(*(type(arg) for arg in args))
            leaves = tuple(leaf.sharding.spec for leaf in self._leaves)
            run = jax.shard_map(
                run,
                mesh=self.parallel.mesh,
                in_specs=(leaves, *specs),
                out_specs=out_specs,
                check_vma=False,
            )
        jitted = jax.jit(run, donate_argnums=donated)
        self._programs[name] = jitted.lower(self._leaves, *args).compile()
        return self._programs[name]


class _Batch:
    """Prompts read together, with everything that their programs depend on."""

    def __init__(self, generator, tokens, lengths, capacity, sampling, stop_tokens):
        self.generator: Generator = generator
        self.capacity: int = capacity
        self.method: Method = sampling.method
        self.prompts: tuple[Array, Array] = generator._everywhere(
            (jnp.asarray(tokens), jnp.asarray(lengths))
        )
        # Random key, temperature, top_p, stop tokens: inputs, so that new ones compile nothing.
        self.options: tuple[Array, ...] = generator._everywhere(
            (
                jax.random.key(sampling.seed),
                jnp.float32(sampling.temperature),
                jnp.float32(sampling.top_p),
                _padded_stops(stop_tokens),
            )
        )
        self.may_stop = len(stop_tokens) > 0

    def prefill(self) -> tuple[KVCache, Progress]:
        """Reads the prompts and chooses the first new token of each."""
        return self._prefill_program()(self.generator._leaves, *self.prompts, *self.options)

    def loop(self, steps: int) -> _Loop:
        """The loop of a program that decodes at most so many tokens."""
        run = _look_every(steps, self.may_stop)
        return _Loop(run, self.capacity, run >= steps and not self.may_stop)

    def decode(
        self, cache: KVCache, progress: Progress, steps: int, loop: _Loop
    ) -> tuple[KVCache, Progress, Array]:
        """At most `steps` more tokens, rounded up to a multiple of `loop.run`: int32 [B, loop.room]."""
        most = self.generator._everywhere(jnp.int32(steps))
        program = self._decode_program(cache, progress, most, loop)
        return program(self.generator._leaves, cache, progress, most, *self.options)

    def compile(self, loop: _Loop) -> None:
        """Compiles both programs without running them."""
        self._prefill_program()
        cache, progress = self._abstract()
        self._decode_program(cache, progress, progress.step, loop)  # steps are like `step`

    @property
    def _key(self) -> tuple:
        tokens, stops = self.prompts[0], self.options[-1]
        return tokens.shape[0], self.capacity, self.method, stops.size

    def _prefill_program(self) -> Callable:
        def run(leaves, tokens, lengths, key, temperature, top_p, stops):
            logits, cache = self.generator._model(leaves).prefill(tokens, lengths, self.capacity)
            token = choose(logits, jax.random.fold_in(key, 0), temperature, top_p, self.method)
            return cache, Progress(token, _is_stop(token, stops), jnp.int32(1))

        specs = self.generator._specs(KVCache, Progress)
        name = ("prefill", self.prompts[0].shape[1], *self._key)
        return self.generator._program(name, run, specs, *self.prompts, *self.options)

    def _decode_program(
        self, cache: KVCache, progress: Progress, steps: Array, loop: _Loop
    ) -> Callable:
        run = functools.partial(_decode_loop, self.generator._model, method=self.method, loop=loop)
        specs = self.generator._specs(KVCache, Progress, Array)
        name = ("decode", loop, *self._key)
        return self.generator._program(name, run, specs, cache, progress, steps, *self.options)

    def _abstract(self) -> tuple[KVCache, Progress]:
        """Shapes (and shardings) of what `prefill` returns."""
        generator, batch = self.generator, self.prompts[0].shape[0]
        config, parallel = generator.config, generator.parallel

        def struct(shape: tuple[int, ...], dtype: Any, spec: P) -> Any:
            sharding = NamedSharding(parallel.mesh, spec) if parallel else None
            return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

        heads = P(None, parallel.axis) if parallel else P()
        shape = (batch, config.num_kv_heads, self.capacity, config.head_dim)
        cache = generator._cache_of(
            struct(shape, jnp.dtype(config.dtype), heads), struct((batch,), jnp.int32, P())
        )
        return cache, Progress(
            struct((batch,), jnp.int32, P()),
            struct((batch,), bool, P()),
            struct((), jnp.int32, P()),
        )


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
        ValueError: see `Generator.generate`.
    """
    if not len(prompts) or not all(len(prompt) for prompt in prompts):
        raise ValueError("every prompt needs at least one token (a beginning-of-text token, say)")
    if max_tokens < 1:
        raise ValueError(f"{max_tokens=} must be at least 1")
    lowest = min(min(prompt) for prompt in prompts)
    highest = max(max(prompt) for prompt in prompts)
    if lowest < 0 or highest >= config.vocab_size:
        raise ValueError(
            f"tokens {lowest} to {highest} do not fit a vocabulary of {config.vocab_size}"
        )
    lengths = [len(prompt) for prompt in prompts]
    max_context = max_context or config.max_context
    if max(lengths) + max_tokens > max_context:
        raise ValueError(
            f"a prompt of {max(lengths)} tokens and {max_tokens} new ones do not fit a context of"
            f" {max_context}; shorten the prompt, lower max_tokens or raise max_context"
        )
    return lengths


def _look_every(steps: int, may_stop: bool) -> int:
    """Tokens between two looks at whether all sequences are done.

    On a GPU a look is a wait for the device, on a CPU a surplus token is dear. Where no stop token ends a
    sequence early, looks are as rare as they can be without more surplus tokens.
    """
    if jax.default_backend() == "cpu":
        return 1
    if may_stop:
        return _RUN
    rounded = -(-steps // _RUN) * _RUN
    return max(_RUN, min(_LONGEST_RUN, rounded & -rounded))  # the power of two in it


def _hand_over_every() -> int:
    """Tokens of one program when they are wanted as they come."""
    return 1 if jax.default_backend() == "cpu" else 8


def prompt_bucket(tokens: int, most: int) -> int:
    """The padded length of a prompt: a power of two from 16, at most the context."""
    return min(max(16, 1 << (tokens - 1).bit_length()), max(most, tokens))


def cache_bucket(tokens: int) -> int:
    """Slots of a cache for so many tokens: a power of two from 128, then steps of 1024."""
    if tokens <= 1024:
        return max(128, 1 << (tokens - 1).bit_length())
    return -(-tokens // 1024) * 1024


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


def _padded_stops(stop_tokens: Sequence[int]) -> Array:
    """The stop tokens as int32, padded to a power of two with -1, which no sequence ever chooses.

    Never empty: compiling `jax.shard_map` with an argument of shape (0,) ends JAX 0.11.2.
    """
    size = 1 << max(len(stop_tokens) - 1, 0).bit_length()
    return jnp.asarray([*stop_tokens, *[-1] * (size - len(stop_tokens))], jnp.int32)


def _is_stop(token: Array, stops: Array) -> Array:
    return (token[:, None] == stops[None, :]).any(axis=1)


def _decode_loop(
    model_of: Callable[[Sequence[Array]], Transformer],
    leaves: Sequence[Array],
    cache: KVCache,
    progress: Progress,
    steps: Array,
    key: Array,
    temperature: Array,
    top_p: Array,
    stops: Array,
    *,
    method: Method,
    loop: _Loop,
) -> tuple[KVCache, Progress, Array]:
    """Chooses tokens until all sequences are done or there are `steps` of them; or `loop.run` of them.

    A loop of a known length needs no host on a GPU, one that may end early waits for the device each
    time round: so the inner loop has `loop.run` tokens, and only the outer one, if there is one, looks.

    Returns:
        (cache, progress, tokens int32 [B, room]). A sequence that is done repeats its last token.
    """
    model = model_of(leaves)
    begin = progress.step

    def step(_, carry):
        cache, at, out = carry
        logits, cache = model.decode(at.token, cache)
        chosen = choose(logits, jax.random.fold_in(key, at.step), temperature, top_p, method)
        token = jnp.where(at.done, at.token, chosen)
        out = jax.lax.dynamic_update_slice(out, token[:, None], (0, at.step - begin))
        return cache, Progress(token, at.done | _is_stop(token, stops), at.step + 1), out

    def unfinished(carry) -> Array:
        _, at, _ = carry
        return ~at.done.all() & (at.step - begin < steps)

    def several(carry):
        return jax.lax.fori_loop(0, loop.run, step, carry) if loop.run > 1 else step(0, carry)

    carry = (cache, progress, jnp.zeros((progress.token.shape[0], loop.room), jnp.int32))
    return several(carry) if loop.once else jax.lax.while_loop(unfinished, several, carry)
