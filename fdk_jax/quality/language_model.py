"""A small language model, trained within minutes on a CPU on `fdk_jax.quality.text`."""

import dataclasses
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax import Array

from fdk_jax.learning.losses import next_token_loss
from fdk_jax.learning.training import make_train_step
from fdk_jax.models.config import ModelConfig
from fdk_jax.models.transformer import Transformer
from fdk_jax.quality.text import VOCABULARY, Language, windows

_TRAINING_TEXT, _TEST_TEXT, _CALIBRATION_TEXT = 1, 2, 3


@dataclasses.dataclass(frozen=True)
class Recipe:
    """Sizes of the model and of its training.

    Attributes:
        hidden: hidden size; a multiple of 64, so that groups are full.
        intermediate: inner size of the gated block.
        layers: transformer layers.
        context: characters a sequence.
        batch: sequences a step.
        steps: of training.
        tuning_steps: of quantisation-aware training, from the trained model.
        learning_rate: peak of the schedule.
        test_sequences: for perplexity.
        calibration_sequences: for calibration; from a text of their own.
    """

    hidden: int = 128
    intermediate: int = 384
    layers: int = 2
    context: int = 96
    batch: int = 24
    steps: int = 500
    tuning_steps: int = 150
    learning_rate: float = 6e-3
    test_sequences: int = 384
    calibration_sequences: int = 96

    @property
    def config(self) -> ModelConfig:
        """Of the Llama that is trained: float32, heads of 32."""
        heads = self.hidden // 32
        return ModelConfig(
            vocab_size=VOCABULARY,
            hidden_size=self.hidden,
            intermediate_size=self.intermediate,
            num_layers=self.layers,
            num_heads=heads,
            num_kv_heads=heads,
            head_dim=32,
            max_context=self.context,
            dtype="float32",
        )


SMALL = Recipe(
    hidden=64, intermediate=128, context=64, steps=300, tuning_steps=100, test_sequences=128
)


@dataclasses.dataclass(frozen=True)
class Data:
    """Text for one recipe.

    Attributes:
        train: int32 [sequences, context].
        test: int32 [sequences, context].
        calibration: int32 [batches, sequences, context].
        entropy: of the language, in nats a character: the least loss that any model can have.
    """

    train: np.ndarray
    test: np.ndarray
    calibration: np.ndarray
    entropy: float


def make_data(recipe: Recipe) -> Data:
    """Writes the texts of a recipe; every sequence of training is new."""
    language = Language.invent()
    length, batch = recipe.context, recipe.batch
    tokens, entropy = language.write(
        length * batch * (recipe.steps + recipe.tuning_steps), _TRAINING_TEXT
    )
    test = language.write(length * recipe.test_sequences, _TEST_TEXT)[0]
    calibration = language.write(length * recipe.calibration_sequences, _CALIBRATION_TEXT)[0]
    rows = windows(calibration, length)
    rows = rows[: len(rows) // batch * batch].reshape(-1, batch, length)
    return Data(windows(tokens, length), windows(test, length), rows, entropy)


def batches(data: Data, recipe: Recipe, first: int, count: int) -> Iterator[Array]:
    """Batches int32 [batch, context] of training steps `first` to `first + count`."""
    for step in range(first, first + count):
        yield jnp.asarray(data.train[step * recipe.batch : (step + 1) * recipe.batch])


def loss(model: nnx.Module, tokens: Array) -> Array:
    """Mean next-token cross-entropy."""
    return next_token_loss(model(tokens), tokens)


def optimiser(model: nnx.Module, peak: float, steps: int) -> nnx.Optimizer:
    """AdamW with a warm-up and a cosine decay over `steps`."""
    schedule = optax.warmup_cosine_decay_schedule(0.0, peak, max(1, steps // 10), steps, peak / 20)
    transform = optax.chain(
        optax.clip_by_global_norm(1.0), optax.adamw(schedule, b2=0.98, weight_decay=0.01)
    )
    return nnx.Optimizer(model, transform, wrt=nnx.Param)


def train(
    recipe: Recipe, data: Data, *, seed: int = 0, watch: Callable[[int, float], None] | None = None
) -> Transformer:
    """The trained model, its weights rounded to bfloat16 values: what quantisation starts from.

    Args:
        recipe: sizes.
        data: of the recipe.
        seed: of the initial weights.
        watch: called with each step and its loss.
    """
    model = Transformer(recipe.config, rngs=nnx.Rngs(seed))
    tune(model, recipe, data, first=0, steps=recipe.steps, peak=recipe.learning_rate, watch=watch)
    graph, state = nnx.split(model)
    rounded = jax.tree.map(lambda a: a.astype(jnp.bfloat16).astype(jnp.float32), state)
    return nnx.merge(graph, rounded)


def tune(
    model: nnx.Module,
    recipe: Recipe,
    data: Data,
    *,
    first: int,
    steps: int,
    peak: float,
    refresh_every: int = 0,
    watch: Callable[[int, float], None] | None = None,
) -> None:
    """Trains a model in place, on batches from step `first` of the data on."""
    optimizer = optimiser(model, peak, steps)
    step = make_train_step(loss, refresh_every=refresh_every)
    for index, batch in enumerate(batches(data, recipe, first, steps)):
        value = step(model, optimizer, batch)
        if watch is not None:
            watch(index, float(value))
