"""The runs of the scaling table: training with checkpoints, and what the trained and packed models lose."""

import dataclasses
import functools
import math
import shutil
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax import Array

import fdk_jax
from fdk_jax.benchmark import environment, records
from fdk_jax.layers.linear import QuantisedWeight
from fdk_jax.learning import training
from fdk_jax.learning.losses import next_token_losses
from fdk_jax.product.choice import default_backend
from fdk_jax.quality.corpus import Tokens, tokenise
from fdk_jax.quality.scaling_model import LanguageModel, Shape, best_attention, stored_bytes

SUITE = "scaling"
FOLDER = "/tmp/fdk_scaling"  # of checkpoints and of the tokens, unless another is given
# Layers of 100, 34, 8.8, 2.3 and 0.8 million weights. The embedding comes to them.
SIZES = {
    "huge": Shape(1024, 2688, 8, 8192),
    "large": Shape(640, 1664, 7, 8192),
    "medium": Shape(384, 1024, 5, 8192),
    "small": Shape(256, 640, 3, 8192),
    "tiny": Shape(128, 384, 4, 8192),
}
GROUP = 64
_VARIED = ("refresh_every", "seed", "rate", "start_step", "embedding_bits")
Note = Callable[[str], None]


@dataclasses.dataclass(frozen=True)
class Plan:
    """How every model of the table is trained.

    Attributes:
        tokens: of training, rounded down to whole chunks.
        context: tokens a sequence.
        batch: sequences a step.
        chunk: steps a call of the compiled program.
        refresh_every: steps between refreshed codebooks.
        test_batches: of held-out sequences.
        checkpoint_chunks: between checkpoints.
        rate: the peak learning rate of a model of hidden size D is rate / sqrt(D).
        seed: of weights and of the order of sequences.
        start_step: steps before it see float weights.
        embedding_bits: of the embedding, which is the head too, at least; 16 leaves it in bfloat16.
        reproducible: whether XLA is asked for sums in one order on a GPU, by programs that are not tuned.
    """

    tokens: int = 40_000_000
    context: int = 512
    batch: int = 64
    chunk: int = 50
    refresh_every: int = 25
    test_batches: int = 24
    checkpoint_chunks: int = 10
    rate: float = 0.05
    seed: int = 0
    start_step: int = 0
    embedding_bits: int = 4
    reproducible: bool = False

    def small(self) -> "Plan":
        """The same in the size of a test."""
        return dataclasses.replace(
            self, context=64, batch=8, chunk=5, test_batches=4, checkpoint_chunks=1
        )

    @property
    def variant(self) -> str:
        """What sets rows of this plan apart from those of the table: " seed 1"; "" for nothing."""
        plain = Plan()
        changed = [n for n in _VARIED if getattr(self, n) != getattr(plain, n)]
        return "".join(f" {name} {getattr(self, name)}" for name in changed)

    @property
    def chunks(self) -> int:
        """Calls of the compiled program, at least one."""
        return max(1, self.tokens // (self.context * self.batch * self.chunk))

    @property
    def steps(self) -> int:
        """Of the optimiser."""
        return self.chunks * self.chunk


@dataclasses.dataclass(frozen=True)
class Data:
    """Windows of tokens on the device.

    Attributes:
        train: [windows, context].
        test: [batches, batch, context].
        bytes_per_token: of the held-out text.
        text: name and digest.
        vocabulary: number of tokens.
    """

    train: Array
    test: Array
    bytes_per_token: float
    text: str
    vocabulary: int


def make_data(plan: Plan, name: str, tokens: Tokens) -> Data:
    """The windows of a text; the held-out ones are of other documents.

    Raises:
        ValueError: too little text.
    """
    train = tokens.train[: len(tokens.train) // plan.context * plan.context]
    train = train.reshape(-1, plan.context)
    size = plan.batch * plan.context
    batches = min(plan.test_batches, len(tokens.test) // size)
    if len(train) < plan.batch or not batches:
        raise ValueError(
            f"{len(tokens.train)} and {len(tokens.test)} tokens are too few for batches of {size}"
        )
    test = tokens.test[: batches * size].reshape(batches, plan.batch, plan.context)
    ratio = tokens.test_bytes / len(tokens.test)
    text = f"{name} {tokens.digest}"
    return Data(jnp.asarray(train), jnp.asarray(test), ratio, text, tokens.vocabulary)


def order(plan: Plan, windows: int) -> np.ndarray:
    """int32 [steps, batch]: which windows a step reads; each once before any comes again."""
    rng = np.random.default_rng(plan.seed)
    needed = plan.steps * plan.batch
    passes = [rng.permutation(windows) for _ in range(-(-needed // windows))]
    return np.concatenate(passes)[:needed].astype(np.int32).reshape(plan.steps, plan.batch)


def loss(model: nnx.Module, tokens: Array) -> Array:
    """Mean next-token cross-entropy of windows of any integer dtype."""
    tokens = tokens.astype(jnp.int32)
    return next_token_losses(model(tokens), tokens).mean()


def make_model(plan: Plan, shape: Shape, bits: int, attention: str) -> LanguageModel:
    """A new model; below 16 bits, in quantisation-aware training."""
    model = LanguageModel(shape, attention=attention, seed=plan.seed)
    if bits == 16:
        return model
    return training.quantisation_aware(  # type: ignore[return-value]
        model,
        bits,
        group_size=GROUP,
        codebook="kmeans",
        dtype=jnp.bfloat16,
        embedding_bits=table if (table := max(bits, plan.embedding_bits)) < 16 else None,
        seed=plan.seed,
    )


def make_optimiser(plan: Plan, shape: Shape, model: nnx.Module) -> nnx.Optimizer:
    """AdamW with a warm-up and a cosine decay."""
    peak = plan.rate / math.sqrt(shape.hidden)
    schedule = optax.warmup_cosine_decay_schedule(
        0.0, peak, max(1, plan.steps // 20), plan.steps, peak / 20
    )
    adamw = optax.adamw(schedule, b1=0.9, b2=0.95, weight_decay=0.1)
    return nnx.Optimizer(model, optax.chain(optax.clip_by_global_norm(1.0), adamw), wrt=nnx.Param)


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnums=2)
def _train_chunk(
    step: Callable, graph: Any, state: Any, train: Array, rows: Array
) -> tuple[Any, Array]:
    """Steps of training on windows `rows` [steps, batch] of `train`; and their losses."""

    def one(state: Any, row: Array) -> tuple[Any, Array]:
        model, optimizer = nnx.merge(graph, state)
        value = step(model, optimizer, train[row])
        return nnx.state((model, optimizer)), value

    return jax.lax.scan(one, state, rows)


@functools.partial(jax.jit, static_argnums=0)
def _mean_loss(graph: Any, state: Any, test: Array) -> Array:
    model = nnx.merge(graph, state)
    return jnp.mean(jax.lax.map(functools.partial(loss, model), test))


def mean_loss(model: nnx.Module, test: Array) -> float:
    """Of held-out windows [batches, batch, context], in nats a token."""
    return float(_mean_loss(*nnx.split(model), test))


class Run:
    """One model in training.

    Args:
        plan: of the table.
        shape: of the model.
        bits: 16, 8, 4, 2 or 1.
        data: of the text.
        attention: see `LanguageModel`.
        folder: of its checkpoints, with the last of which it goes on; None for none.
    """

    def __init__(
        self, plan: Plan, shape: Shape, bits: int, data: Data, attention: str, folder: Path | None
    ):
        self.plan, self.data, self.folder = plan, data, folder
        model = make_model(plan, shape, bits, attention)
        optimizer = make_optimiser(plan, shape, model)
        self._graph, self._state = nnx.split((model, optimizer))
        self._order = order(plan, len(data.train))
        self.losses: list[float] = []
        self.seconds: list[float] = []
        self._saver = None
        if folder is not None:
            import orbax.checkpoint

            self._saver = orbax.checkpoint.StandardCheckpointer()
            self._restore(folder)
        step = training.make_train_step(
            loss, start_step=plan.start_step, refresh_every=plan.refresh_every
        )
        started = time.monotonic()
        lowered = _train_chunk.lower(step, self._graph, self._state, data.train, self._rows(0))
        same = plan.reproducible and jax.default_backend() == "gpu"
        self._program = lowered.compile({"xla_gpu_deterministic_ops": True} if same else None)
        self.compile_seconds = time.monotonic() - started

    @property
    def done(self) -> int:
        """Chunks that were trained."""
        return len(self.seconds)

    @property
    def model(self) -> nnx.Module:
        """As it is now."""
        return nnx.merge(self._graph, self._state)[0]

    def _rows(self, chunk: int) -> Array:
        return jnp.asarray(self._order[chunk * self.plan.chunk : (chunk + 1) * self.plan.chunk])

    def advance(self) -> float:
        """Trains a chunk and returns its mean loss; saves where a checkpoint is due."""
        started = time.monotonic()
        self._state, values = self._program(self._state, self.data.train, self._rows(self.done))
        values = np.asarray(values, np.float64)
        self.seconds.append(time.monotonic() - started)
        self.losses += values.tolist()
        if self.done % self.plan.checkpoint_chunks == 0 and self.done < self.plan.chunks:
            self.save()
        return float(values.mean())

    def save(self) -> None:
        """Writes a checkpoint and drops those before it; nothing where there is no folder or nothing new."""
        if self._saver is None or self.folder is None or (self.folder / str(self.done)).exists():
            return
        self._saver.save((self.folder / str(self.done)).absolute(), self._saved())
        self._saver.wait_until_finished()
        for old in self.folder.glob("[0-9]*"):
            if old.name != str(self.done):
                shutil.rmtree(old)

    def _saved(self) -> dict[str, Any]:
        leaves = {str(i): leaf for i, leaf in enumerate(jax.tree.leaves(self._state))}
        losses, seconds = (np.asarray(a, np.float64) for a in (self.losses, self.seconds))
        return {"state": leaves, "losses": losses, "seconds": seconds}

    def _restore(self, folder: Path) -> None:
        finished = [int(p.name) for p in folder.glob("[0-9]*") if p.name.isdigit()]
        if not finished or self._saver is None:
            return
        chunks = max(finished)
        like = jax.eval_shape(lambda: self._saved() | {"losses": 0, "seconds": 0})
        like["losses"] = np.zeros(chunks * self.plan.chunk)
        like["seconds"] = np.zeros(chunks)
        found = self._saver.restore((folder / str(chunks)).absolute(), like)
        leaves = [jnp.asarray(found["state"][str(i)]) for i in range(len(found["state"]))]
        self._state = jax.tree.unflatten(jax.tree.structure(self._state), leaves)
        self.losses = np.asarray(found["losses"]).tolist()
        self.seconds = np.asarray(found["seconds"]).tolist()

    def fields(self) -> dict[str, Any]:
        """What a row says of the training and of the model that came out of it."""
        curve = np.asarray(self.losses).reshape(-1, self.plan.chunk).mean(1)
        held_out = mean_loss(self.model, self.data.test)
        return {
            "loss": held_out,
            "bits_per_byte": held_out / math.log(2) / self.data.bytes_per_token,
            "training_loss": float(curve[-1]),
            "curve": [round(float(v), 4) for v in curve],
            "step_ms": 1000 * statistics.median(self.seconds) / self.plan.chunk,
            "training_seconds": sum(self.seconds),
            "compile_seconds": self.compile_seconds,
        }

    def packed_fields(self, note: Note) -> dict[str, Any]:
        """What the exported model takes and loses, multiplied by the kernels of this platform.

        Where these fail, by XLA: the trained model's figures stand, and the row says what was wrong.
        """
        packed = training.export(self.model)
        fields: dict[str, Any] = {"bytes": stored_bytes(packed)}
        if not jax.tree.leaves(nnx.state(packed, QuantisedWeight)):
            return fields
        for backend in dict.fromkeys((default_backend(), "xla")):
            try:
                lost = mean_loss(fdk_jax.prepare(packed, backend), self.data.test)
            except Exception as error:  # any that a compiler or a driver may raise
                fields["packed_error"] = f"{backend}: {type(error).__name__}: {error}"[:500]
                note(f"the packed model failed on {fields['packed_error']}")
                continue
            return fields | {"packed_backend": backend, "packed_loss": lost}
        return fields


def run(
    plan: Plan,
    text: Path,
    out: Path,
    folder: Path,
    grid: list[tuple[str, int]],
    note: Note,
    *,
    deadline: float | None = None,
    dry: bool = False,
) -> bool:
    """Trains the models of a grid whose rows `out` does not have yet, and appends these.

    Args:
        plan: how they are trained.
        text: see `fdk_jax.quality.corpus.documents`.
        out: a JSONL file.
        folder: of checkpoints and of the tokens.
        grid: (name in `SIZES`, bits) of each model.
        note: called with a word on how far it is.
        deadline: by `time.monotonic()`; past it a checkpoint is written and nothing more is begun.
        dry: two chunks of each model, and an estimate of the whole; no rows and no checkpoints.

    Returns:
        Whether nothing failed. What fails is noted, and the next model is trained.
    """
    known = records.read([out]) if out.exists() and out.stat().st_size else []
    tokens = tokenise(text, max(shape.vocabulary for shape in SIZES.values()), folder)
    data = make_data(plan, tokens.name, tokens)
    note(
        f"{len(tokens.train):,} tokens to train on, {data.test.size:,} held out,"
        f" {data.bytes_per_token:.2f} bytes each; {plan.steps} steps on {jax.devices()[0]}"
    )
    shared = dataclasses.asdict(plan) | {
        "suite": SUITE, "text": data.text, "group_size": GROUP, "codebook": "kmeans",
        "dtype": "bfloat16", "vocabulary": data.vocabulary,
        "tokens": plan.steps * plan.batch * plan.context,
    }  # fmt: skip
    plain = dataclasses.asdict(Plan())  # what older rows do not say
    done = {
        row["name"]
        for row in known
        if all(row.get(k, plain.get(k)) == v for k, v in shared.items())
    }
    where = environment.describe(jax.devices()[0])
    total, fine = 0.0, True
    for size, bits in grid:
        if (name := f"{size} {bits}{plan.variant}") in done:
            continue
        if deadline is not None and time.monotonic() > deadline:
            note("out of time: the same command goes on")
            break
        place = folder / f"{name.replace(' ', '-')}-{data.text.split()[-1]}-{plan.steps}"
        try:
            made = _one(plan, size, bits, data, None if dry else place, note, deadline)
        except Exception as error:  # the other models of the grid do not depend on this one
            note(f"{name} failed: {type(error).__name__}: {error}")
            fine = False
            continue
        if made is None:
            continue
        row, estimate = made
        total += estimate
        if not dry:
            with records.Writer(out) as writer:
                writer.write(records.make_row(where, shared, {"name": name}, row))
            shutil.rmtree(place, ignore_errors=True)
    if dry:
        note(f"the whole would take about {total:.0f} s")
    return fine


def _one(
    plan: Plan,
    size: str,
    bits: int,
    data: Data,
    folder: Path | None,
    note: Note,
    deadline: float | None,
) -> tuple[dict[str, Any], float] | None:
    """The row of a model and the seconds that a whole run takes; None where the time was up."""
    name, shape, started = f"{size} {bits}", SIZES[size], time.monotonic()
    attention = best_attention(plan.batch, plan.context)
    try:
        training_run = Run(plan, shape, bits, data, attention, folder)
    except jax.errors.JaxRuntimeError:
        if attention == "xla":
            raise
        attention = "xla"
        training_run = Run(plan, shape, bits, data, attention, folder)
    note(f"{name}: compiled in {training_run.compile_seconds:.1f} s, {attention} attention")
    chunks = min(plan.chunks, 2) if folder is None else plan.chunks
    while training_run.done < chunks:
        value = training_run.advance()
        if training_run.done % 5 == 0 or training_run.done == chunks:
            step = training_run.done * plan.chunk
            note(f"{name}: step {step} of {plan.steps}, loss {value:.4f}")
        if deadline is not None and time.monotonic() > deadline and training_run.done < chunks:
            training_run.save()
            note(f"{name}: out of time after {training_run.done} chunks; the same command goes on")
            return None
    trained = time.monotonic()
    fields = {
        "bits": bits,
        "size": size,
        "parameters": shape.parameters,
        "embedding_parameters": shape.vocabulary * shape.hidden,
        "attention": attention,
        **training_run.fields(),
        **training_run.packed_fields(note),
    }
    rest = (plan.chunks - training_run.done) * training_run.seconds[-1]
    note(
        f"{name}: loss {fields['loss']:.4f}, packed {fields.get('packed_loss')},"
        f" {fields['bytes']:,} bytes, {fields['step_ms']:.2f} ms a step,"
        f" evaluated in {time.monotonic() - trained:.1f} s"
    )
    return fields, time.monotonic() - started + rest
