"""The models suite: one decoding step of a whole model a case."""

import dataclasses
import functools
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from fdk_jax.benchmark import environment, model_errors, probes, records, repeating, timing
from fdk_jax.benchmark.shapes import Shape
from fdk_jax.layers.linear import QuantisedLinear
from fdk_jax.models import (
    Generator,
    ModelConfig,
    Parallel,
    Quantisation,
    Transformer,
    cache_bucket,
    load,
    random_model,
    read_config,
    stored_bits,
)

__all__ = ["ModelCase", "make_cases", "measure"]

_DENSE_BITS = 16
_PROMPT = 2  # tokens of a prompt that a case's name leaves out
_CODEBOOKS = ("uniform", "kmeans")


@dataclasses.dataclass(frozen=True)
class ModelCase:
    """Tokens a second of a model at one batch size.

    Attributes:
        model: "custom-llama-4B", "-12B", "-31B", "-70B" or "-1B", "qwen3-0.6B", "-1.7B", "-4B" or "-8B" (random
            weights), or a checkpoint folder. With "-head8" after a name the final projection has 8 bits, with
            "-tables1" it and the embedding have one.
        backend: "pallas", "cpu" or "xla"; of a model that is not quantised always "xla".
        bits: 1, 2, 4, 8, or 16 for weights that are not quantised.
        batch: sequences decoded together.
        group_size, codebook: None when the weights are not quantised.
        arithmetic: of the activations that quantised weights multiply, see `fdk_jax.matmul`.
        prompt: tokens of each prompt.
        steps: tokens decoded after it.
        devices: that share every matrix.
        speculate: tokens that are guessed a step, in a text that repeats itself; see `repeating`.
    """

    model: str
    backend: str
    bits: int
    batch: int
    group_size: int | None
    codebook: str | None
    arithmetic: str
    prompt: int
    steps: int
    devices: int = 1
    speculate: int = 0

    @property
    def name(self) -> str:
        """Unique, safe as a file name."""
        parts = [Path(self.model).name, self.backend, f"b{self.bits}"]
        if self.bits != _DENSE_BITS:
            parts += [f"g{self.group_size}", str(self.codebook)]
        if self.arithmetic != "exact":
            parts.append(self.arithmetic)
        parts.append(f"batch{self.batch}")
        if self.prompt != _PROMPT:
            parts.append(f"prompt{self.prompt}")
        if self.devices != 1:
            parts.append(f"devices{self.devices}")
        if self.speculate:
            parts.append(f"speculate{self.speculate}")
        return "-".join(parts)

    def fields(self) -> dict[str, Any]:
        """The keys of a row that say what is measured."""
        fields = dataclasses.asdict(self)
        return {"suite": "models", "name": self.name, "m": self.batch, **fields}


def make_cases(
    *,
    models: Sequence[str],
    backends: Sequence[str],
    bits: Sequence[int],
    batches: Sequence[int],
    group_sizes: Sequence[int] = (64,),
    codebooks: Sequence[str] = ("uniform",),
    arithmetics: Sequence[str] = ("exact",),
    prompts: Sequence[int] = (_PROMPT,),
    steps: int = 30,
    devices: Sequence[int] = (1,),
    speculates: Sequence[int] = (0,),
) -> list[ModelCase]:
    """Every combination once; the batch sizes of one model follow each other.

    Args:
        models: see `ModelCase`.
        backends: of the quantised models.
        bits: widths.
        batches: sequences at once.
        group_sizes: of the quantised models.
        codebooks: of the quantised models; a stored one stays as it is.
        arithmetics: of the quantised models; backends other than "cpu" only have "exact".
        prompts: tokens of a prompt.
        steps: tokens after it.
        devices: counts of devices that share a model.
        speculates: tokens guessed a step.
    """
    cases = []
    for model, b, count in itertools.product(models, bits, devices):
        if b >= _DENSE_BITS:
            kinds: list[tuple] = [("xla", None, None, "exact")]
        else:
            kinds = list(itertools.product(backends, group_sizes, codebooks, arithmetics))
        sizes = itertools.product(kinds, batches, prompts, speculates)
        for (backend, group_size, codebook, arithmetic), batch, prompt, speculate in sizes:
            cases.append(
                ModelCase(
                    model=model,
                    backend=backend,
                    bits=min(b, _DENSE_BITS),
                    batch=batch,
                    group_size=group_size,
                    codebook=codebook,
                    arithmetic=arithmetic if backend == "cpu" else "exact",
                    prompt=prompt,
                    steps=steps,
                    devices=count,
                    speculate=speculate,
                )
            )
    return list(dict.fromkeys(cases))


def group(case: ModelCase) -> ModelCase:
    """Each case alone: the largest models leave no room for a second one."""
    return case


def measure(case: ModelCase, session: timing.Session) -> timing.Measurement:
    """Checks the first layer against float32 dequantised weights, then times decoding.

    A sample is the time of one program of `steps` tokens over its steps. Beside it stands the time to the first
    token, `first_token_us`: reading the prompts and choosing a token for each.

    Raises:
        NotImplementedError: this machine lacks the backend, the devices or the memory; or there are guesses for
            several sequences.
    """
    if case.speculate and case.batch > 1:
        raise NotImplementedError(f"guesses are for one sequence, not for {case.batch}")
    device = environment.device_for(case.backend)
    environment.devices_for(case.backend, case.devices)
    with jax.default_device(device):
        with session.using():
            _check_memory(case, device)
            model, generator = _model(_without_batch(case))
            result: dict[str, Any] = _fields(case, model, generator, device, session)
            if case.bits != _DENSE_BITS:
                result |= model_errors.check(
                    model,
                    generator.programs.peers,
                    batch=case.batch,
                    prompt=case.prompt,
                    arithmetic=case.arithmetic,
                )
                if result.get("status") == "failed":
                    return result
            rng = np.random.default_rng(case.batch)
            prompts = rng.integers(
                0, generator.config.vocab_size, (case.batch, case.prompt)
            ).tolist()
            if case.speculate:
                generator = Generator(repeating.without_context(model), backend=case.backend)
                prompts = [repeating.prompt(generator, prompts[0], case.steps)]
        first_token: list[float] = []
        model_steps = 0

        def run() -> float:
            nonlocal model_steps
            out = generator.generate(prompts, max_tokens=case.steps + 1, speculate=case.speculate)
            first_token.append(out.prefill_seconds)
            model_steps = out.model_steps
            return out.decode_seconds / out.decode_steps

        if session.turns is not None:
            with session.using():
                run()  # compiles outside of this run's turn
        seconds = yield run
    result |= records.statistics([s * 1e6 for s in seconds])
    first = records.statistics([s * 1e6 for s in first_token[-len(seconds) :]])
    return result | {
        "tokens_per_s": round(case.batch / result["median_us"] * 1e6, 2),
        "first_token_us": first["median_us"],
        "first_token_stderr_us": first["stderr_us"],
        "first_token_samples_us": first["samples_us"],
        "peak_bytes": generator.peak_bytes(),
        "model_steps": model_steps,
    }


def _without_batch(case: ModelCase) -> ModelCase:
    return dataclasses.replace(case, batch=1, prompt=1, steps=1, speculate=0)


def _config(case: ModelCase) -> ModelConfig:
    shape = Shape.of(case.model)
    return read_config(case.model) if shape is None else shape.config


# One model at a time: the largest fill most of a device.
_held: dict[ModelCase, tuple[Transformer, Generator]] = {}


def _parallel(case: ModelCase) -> Parallel | None:
    """The devices of a case; None for one."""
    if case.devices == 1:
        return None
    devices = np.asarray(environment.devices_for(case.backend, case.devices))
    return Parallel(Mesh(devices, ("model",)))


def _model(case: ModelCase) -> tuple[Transformer, Generator]:
    if case not in _held:
        _held.clear()
        model = _make(case)
        generator = Generator(model, backend=case.backend)
        jax.block_until_ready(generator.leaves)
        _held[case] = model, generator
    return _held[case]


def _make(case: ModelCase) -> Transformer:
    quantised = case.bits != _DENSE_BITS
    if (shape := Shape.of(case.model)) is not None:
        options: dict[str, Any] = dict(
            head_bits=shape.head_bits, embedding_bits=shape.embedding_bits
        )
        if quantised:
            if case.codebook not in _CODEBOOKS:
                raise NotImplementedError(
                    f"random models have codebooks {_CODEBOOKS}, not {case.codebook}"
                )
            options |= dict(group_size=case.group_size, codebook=case.codebook)
            options["arithmetic"] = case.arithmetic
        options["parallel"] = _parallel(case)
        return random_model(shape.config, bits=case.bits, backend=case.backend, **options)
    stored = stored_bits(case.model)
    quantisation = None
    if stored is not None:
        if stored != case.bits:
            raise NotImplementedError(f"{case.model} is stored with {stored} bits")
    elif quantised:
        quantisation = Quantisation(case.bits, case.group_size or 64, case.codebook or "uniform")
    return load(
        case.model,
        quantisation=quantisation,
        backend=case.backend,
        arithmetic=case.arithmetic,
        parallel=_parallel(case),
    )


def _fields(
    case: ModelCase,
    model: Transformer,
    generator: Generator,
    device: jax.Device,
    session: timing.Session,
) -> dict[str, Any]:
    """What one device's step has to read and compute, and how long it needs for that at best."""
    config, head, shards = generator.config, model.lm_head, case.devices
    size = _bytes_of_one(generator.leaves)
    shared = isinstance(head, QuantisedLinear) and head.weight is model.embedding
    if head is not None and not shared:
        # A step reads a row of the embedding for each sequence, and all of a head.
        table, rows = _bytes_of_one(model.embedding.get_value()), config.vocab_size // shards
        size -= table * (rows - case.batch) // rows
    context = case.prompt + case.steps // 2
    size += case.batch * context * _cache_bytes(config) // shards
    tables = config.vocab_size * config.hidden_size * (not config.tie_embeddings)
    products = config.num_parameters - tables
    ops = 2 * case.batch * products // shards
    fields = {"dtype": config.dtype, "parameters": config.num_parameters}
    bound = functools.partial(probes.bound, session, device, size)
    fields |= bound(ops, config.dtype, case.arithmetic)
    ops = _first_token_ops(case, config) // case.devices
    least = bound(ops, config.dtype, case.arithmetic)["bound_us"]
    return fields | {"first_token_bound_us": least}


def _first_token_ops(case: ModelCase, config: ModelConfig) -> int:
    """Multiplications and additions to the first token, of the layers for every token."""
    head = config.vocab_size * config.hidden_size
    layers = config.num_parameters - head * (1 if config.tie_embeddings else 2)
    tokens = case.batch * case.prompt
    # Queries times keys and weights times values, each for half of all pairs.
    pairs = 2 * case.prompt * config.num_layers * config.num_heads * config.head_dim
    return 2 * tokens * layers + 2 * case.batch * head + tokens * pairs


def _bytes_of_one(tree: Any) -> int:
    """Bytes of arrays that one of the devices has."""
    return sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(tree))


def _cache_bytes(config: ModelConfig) -> int:
    """Bytes of keys and values of one token."""
    width = config.num_layers * config.num_kv_heads * config.head_dim
    return 2 * width * jnp.dtype(config.dtype).itemsize


def _check_memory(case: ModelCase, device: jax.Device) -> None:
    """Refuses a case that cannot fit, before anything is allocated.

    Raises:
        NotImplementedError: with what it needs and what there is.
    """
    config = _config(case)
    width = jnp.dtype(config.dtype).itemsize
    tables = (1 if config.tie_embeddings else 2) * config.vocab_size * config.hidden_size
    weight = case.bits / 8 + width / (case.group_size or 1) if case.group_size else width
    need = tables * width + (config.num_parameters - tables) * weight
    tokens = case.prompt + case.steps + 1
    slots = cache_bucket(2 * tokens + case.speculate if case.speculate else tokens)
    need += case.batch * (slots * _cache_bytes(config) + 3 * 4 * config.vocab_size)
    need /= case.devices
    limit = environment.memory_bytes(device)
    if limit is not None and need > 0.95 * limit:
        reason = f"needs {need / 1e9:.1f} of {limit / 1e9:.1f} GB, of which a twentieth stays free"
        if device.platform != "cpu":
            reason += "; XLA_PYTHON_CLIENT_MEM_FRACTION sets what JAX takes of the device"
        raise NotImplementedError(reason)
